"""What a GPU's limits leave of a pack's time, on paper: python -m benchmarks roofline.

No GPU is needed. A model of the real size runs one pack on PyTorch's meta device, which computes
shapes alone, and every operation is counted: its floating point operations, the bytes that it reads
and writes, and its launch. An operation takes the longer of its two times at the chip's rates; the
host launches while the chip computes, so that it matters only where it takes longer than all of
them. Attention and the head are kernels of their own and counted by formula:

    attention   2 · Σ s² · heads · d      causal, over samples of s tokens; reads q, k, v, writes o
    head        2 · targets · width · V   reads hidden states and weights once, writes no logits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu.shapes import SHAPES, Shape, configuration
from benchmarks.rows import RESULTS
from flowdata.report.markdown import table

_MODELS = {
    "0.1B": (Shape("Llama", 576, 30, 1536, 9, 3, 64), 49_152),  # SmolLM2's smallest
    "0.5B": (SHAPES["llama-0.5b"], 32_000),
    "1B": (SHAPES["llama-1b"], 128_256),
    "8B": (Shape("Llama", 4096, 32, 14336, 32, 8, 128), 128_256),
    "70B": (Shape("Llama", 8192, 80, 28672, 64, 8, 128), 128_256),
}
_TOKENS, _SAMPLE, _TARGETS = 32_768, 208, 0.5  # of a pack; of a sample, as GSM8K's; share of tokens
_LAUNCH = 10e-6  # seconds of the host for an operation of a Hugging Face model run as it is written
PRODUCTS, ATTENTION, HEAD = "matrix products", "attention", "head"
PASSES = "norms, rotations, activations, sums"
_ATTENTION_NAME = "roofline"  # among transformers' attention functions


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU.

    Attributes:
        name: the product's.
        flops: a second, of large matrix products in bfloat16 as they are measured.
        bandwidth: of its memory, bytes a second, by its data sheet.
    """

    name: str
    flops: float
    bandwidth: float


_CHIPS = (Chip("H100", 790e12, 3.35e12), Chip("H200", 724e12, 4.8e12))


@dataclass
class Stage:
    """Operations of one kind.

    Attributes:
        work: floating point operations and bytes of each, in the order in which they are launched.
    """

    work: list[tuple[float, float]] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating point operations of all."""
        return sum(flops for flops, _ in self.work)

    @property
    def bytes(self) -> float:
        """Bytes that all read and write."""
        return sum(size for _, size in self.work)

    def seconds(self, chip: Chip) -> float:
        """The time on a chip: each operation is bound by its products or by memory."""
        return sum(max(flops / chip.flops, size / chip.bandwidth) for flops, size in self.work)


class Counting(TorchDispatchMode):
    """Counts the operations of a block: matrix products, and passes over tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = {PRODUCTS: Stage(), PASSES: Stage()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        reads = [each for each in _tensors(args) if isinstance(each, Tensor)]
        writes = [each for each in _tensors([output]) if isinstance(each, Tensor)]
        if not writes or func.is_view or func in _FREE:
            return output
        counter = flop_registry.get(func.overloadpacket)
        flops = counter(*args, **(kwargs or {}), out_val=output) if counter else 0
        size = sum(each.numel() * each.element_size() for each in [*reads, *writes])
        self.stages[PRODUCTS if counter else PASSES].work.append((flops, size))
        return output


_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format}


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        else:
            yield value


def count(shape: Shape, vocabulary: int, lengths: Sequence[int], targets: int) -> dict[str, Stage]:
    """Return the stages of one pack by name.

    Args:
        shape: the model's.
        vocabulary: number of classes.
        lengths: tokens of each sample.
        targets: tokens whose losses are scored.
    """
    import transformers

    attention = Stage()
    config = configuration(shape, vocabulary)
    squares = sum(length**2 for length in lengths)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        moved = 2 * (2 * query.numel() + key.numel() + value.numel())
        attention.work.append((2 * squares * query.shape[1] * query.shape[3], moved))
        return torch.empty_like(query.transpose(1, 2)), None

    with torch.device("meta"):
        model = getattr(transformers, f"{shape.family}Model")(config).bfloat16().eval()
        tokens = torch.empty(1, sum(lengths), dtype=torch.long)
        positions = torch.empty(1, sum(lengths), dtype=torch.long)
    _use_attention(model, attend)
    with torch.no_grad(), Counting() as counting:
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    head_bytes = 2 * shape.width * (targets + vocabulary)
    head = Stage([(2 * targets * shape.width * vocabulary, head_bytes)])
    return {**counting.stages, ATTENTION: attention, HEAD: head}


def _use_attention(model: Any, attend: Callable[..., Any]) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, attend)
    model.config._attn_implementation_internal = _ATTENTION_NAME


def fused_bytes(shape: Shape, tokens: int) -> float:
    """Return the bytes of the passes if each were one kernel that reads and writes once.

    They are two norms and two sums of the residual stream in a layer, a rotation of queries and
    keys, and the activation of one half of the intermediate times the other; one norm at the end.
    """
    norm, addition = 2 * 2 * shape.width, 3 * 2 * shape.width
    rotation = 2 * 2 * (shape.heads + min(shape.key_heads, shape.heads)) * shape.head_width
    activation = 3 * 2 * shape.intermediate
    return tokens * (shape.layers * (2 * (norm + addition) + rotation + activation) + norm)


def page(stages: dict[str, dict[str, Stage]]) -> str:
    """Return a Markdown page of the stages of each model."""
    rates = "; ".join(
        f"{chip.name} {chip.flops / 1e12:.0f} TFLOP/s in products, {chip.bandwidth / 1e12:.2f} TB/s"
        for chip in _CHIPS
    )
    lines = [
        "# A pack's time on paper",
        "",
        (__doc__ or "").partition("\n\n")[2].strip(),
        "",
        f"A pack has {_TOKENS:,} tokens in samples of {_SAMPLE}, half of them targets. Rates: "
        f"{rates}. A launch takes the host {_LAUNCH * 1e6:.0f} µs.",
        "",
        *_work(stages),
        "",
        "The share of the products' rate that the chip leaves, as models are written and with "
        "every pass a kernel that reads and writes once; and the host's time for the launches "
        "beside the chip's for the pack.",
        "",
        *_limits(stages),
        "",
    ]
    return "\n".join(lines)


def _work(stages: dict[str, dict[str, Stage]]) -> list[str]:
    """A table of what each stage of each model takes."""
    rows = []
    for name, of_model in stages.items():
        for stage, each in {**of_model, "**all**": _all(of_model)}.items():
            times = [f"{each.seconds(chip) * 1e3:.1f}" for chip in _CHIPS]
            counts = [f"{each.flops / 1e12:.1f}", f"{each.bytes / 1e9:.1f}", f"{len(each.work):,}"]
            rows.append([name, stage, *counts, *times])
    headings = ["model", "stage", "TFLOP", "GB", "launches", *(f"{c.name}, ms" for c in _CHIPS)]
    return table(headings, rows, words=("stage",))


def _limits(stages: dict[str, dict[str, Stage]]) -> list[str]:
    """A table of what each chip leaves of its rate for each model."""
    rows = [
        [name, chip.name, *_shares(name, of_model, chip)]
        for name, of_model in stages.items()
        for chip in _CHIPS
    ]
    headings = ["model", "chip", "share", "share, passes fused", "host / chip"]
    return table(headings, rows, words=("chip",))


def _shares(name: str, stages: dict[str, Stage], chip: Chip) -> list[str]:
    everything = _all(stages)
    seconds = everything.seconds(chip)
    fused = fused_bytes(_MODELS[name][0], _TOKENS) / chip.bandwidth
    needed = everything.flops / chip.flops
    host = _LAUNCH * len(everything.work)
    shares = needed / seconds, needed / (seconds - stages[PASSES].seconds(chip) + fused)
    return [f"{share:.0%}" for share in (*shares, host / seconds)]


def _all(stages: dict[str, Stage]) -> Stage:
    return Stage([each for stage in stages.values() for each in stage.work])


def main(argv: Sequence[str] | None = None) -> None:
    """Count each model's pack, print the page and write it."""
    argparse.ArgumentParser(prog="python -m benchmarks roofline").parse_args(argv)
    lengths = [_SAMPLE] * (_TOKENS // _SAMPLE)
    targets = round(_TARGETS * sum(lengths))
    stages = {name: count(*model, lengths, targets) for name, model in _MODELS.items()}
    text = page(stages)
    (RESULTS / "roofline.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
