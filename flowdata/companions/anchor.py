"""Parameter-side methods that go with FLOW: staying near the pre-trained weights.

`ParameterAnchor` adds a penalty to the loss, `wise_ft` averages weights afterwards, and
`batch_norm_state` keeps what an old head needs around a fine-tuned body.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn

from flowdata._common.atomic import replacing

StateDict: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, list[int]]
Module = TypeVar("Module", bound=nn.Module)
Measured = TypeVar("Measured")

_BUCKET = 1 << 26  # bytes of differences held at a time


class ParameterAnchor:
    """A penalty on the distance of the trainable parameters from where they started.

    ``strength · Σ (θ − θ*)²`` for ``"l2"``, ``strength · Σ |θ − θ*|`` for ``"l1"``, over every
    parameter that requires a gradient when the anchor is made: with LoRA these are the
    adapters, and a head that is trained counts, too. No differences are kept for the backward
    pass; they are taken again there, a bucket of parameters at a time.

    Source: ℓ2 as in Sanyal et al., ICML 2025, arXiv:2502.02797, section 5, where its strength
    for language models is 1e-3.

    Args:
        model: the model that will be trained; anchored where it stands now, unless `reference`
            says otherwise.
        kind: ``"l2"`` or ``"l1"``.
        strength: ≥ 0; factor of the sum above.
        reference: θ* by parameter name, or a safetensors file that holds it (mapped, not read
            into memory): needed when training resumes from weights that are no longer θ*.
        device: where the snapshot is kept; ``"cpu"`` spares the accelerator's memory for a
            transfer in each step. None keeps it beside the parameters.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown `kind`, a `strength` that isn't finite and ≥ 0, nothing to train,
            or a `reference` that lacks a parameter or has it in another shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> anchor = ParameterAnchor(model, strength=0.5)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(2)
        >>> loss = torch.tensor(1.0) + anchor()
        >>> round(loss.item(), 4)
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["l2", "l1"] = "l2",
        strength: float = 1e-3,
        *,
        reference: StateDict | str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if kind not in ("l2", "l1"):
            raise ValueError(f"kind must be 'l2' or 'l1', got {kind!r}")
        if not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and >= 0, got {strength!r}")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model has no parameter that requires a gradient: nothing to anchor")
        self.kind, self.strength = kind, strength
        self._parameters = list(named.values())
        self._snapshot = _snapshot(model, named, reference, device)

    def __call__(self) -> Tensor:
        """Return the penalty: 0-d float32, on the device of the first parameter."""
        order = 2 if self.kind == "l2" else 1
        penalty: Tensor = _Penalty.apply(order, self._snapshot, *self._parameters)  # type: ignore[no-untyped-call]
        return self.strength * penalty


class _Penalty(torch.autograd.Function):
    """Σ |θ − θ*|^order."""

    @staticmethod
    def forward(ctx: Any, order: int, snapshot: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.order, ctx.snapshot = order, snapshot
        ctx.save_for_backward(*parameters)
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=parameters[0].device)
        for differences in _differences(parameters, snapshot):
            norms = torch._foreach_norm(differences, order, dtype=dtype)
            total += torch.stack([_whole(norm).to(total) for norm in norms]).pow(order).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor] = []
        for differences in _differences(ctx.saved_tensors, ctx.snapshot):
            if ctx.order == 1:
                torch._foreach_sign_(differences)
            for difference in differences:
                shard = _shard(difference)
                shard.mul_(ctx.order * slope.to(shard))
            gradients += differences
        return None, None, *gradients


def _differences(parameters: Sequence[Tensor], snapshot: list[Tensor]) -> Iterator[list[Tensor]]:
    """θ − θ* of every parameter in turn, about `_BUCKET` bytes at a time."""
    start = size = 0
    for end, parameter in enumerate(parameters, start=1):
        size += _shard(parameter).nbytes
        if size < _BUCKET and end < len(parameters):
            continue
        ours = [p.detach() for p in parameters[start:end]]
        theirs = [
            kept.to(p.device, non_blocking=True)
            for kept, p in zip(snapshot[start:end], ours, strict=True)
        ]
        yield list(torch._foreach_sub(ours, theirs))
        start, size = end, 0


def _shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    """The tensor as one rank would hold it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _load(file: Path) -> StateDict:
    """The tensors of a safetensors file, mapped."""
    from safetensors.torch import load_file

    if file.is_dir():
        raise ValueError(f"reference must name a safetensors file, {file} is a folder")
    return load_file(file)


def _with_tied_names(reference: StateDict, model: nn.Module) -> StateDict:
    """A reference under all names of its tensors: files keep a shared one under one name alone."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {
        name: reference[other]
        for group in names.values()
        for name in group
        for other in group
        if other in reference and name not in reference
    }
    return {**reference, **tied}


def _snapshot(
    model: nn.Module,
    named: Mapping[str, Tensor],
    reference: StateDict | str | Path | None,
    device: str | torch.device | None,
) -> list[Tensor]:
    mapped = isinstance(reference, (str, Path))
    if isinstance(reference, (str, Path)):
        reference = _load(Path(reference))
    kept = named if reference is None else _with_tied_names(reference, model)
    _check_shapes(_shapes(kept), _shapes(named), "reference", "model", more=True)
    # Tensors given may share the memory of the parameters that are about to move: copy them.
    return [
        kept[name].detach().to(device or p.device, p.dtype, copy=not mapped)
        for name, p in named.items()
    ]


@overload
def wise_ft(pretrained: Module, finetuned: Module, alpha: float) -> Module: ...
@overload
def wise_ft(pretrained: StateDict, finetuned: StateDict, alpha: float) -> dict[str, Tensor]: ...
@overload
def wise_ft(
    pretrained: str | Path, finetuned: str | Path, alpha: float, output: str | Path
) -> Path: ...


def wise_ft(pretrained: Any, finetuned: Any, alpha: float, output: str | Path | None = None) -> Any:
    """Return the weights α · fine-tuned + (1 − α) · pre-trained.

    Floating entries (BatchNorm statistics included) are averaged in float32 or wider and keep
    the dtype and device they have in `finetuned`; integers and bools are taken from it.
    α = 0 and 1 give the two ends exactly. Nothing given is modified.

    Source: WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903, equation 1.

    Args:
        pretrained: a module, a state dict or the path of a safetensors file.
        finetuned: the same, with entries of the same names and shapes. Merge LoRA adapters
            first; leave a head that only one of them has out of both.
        alpha: α, from 0 to 1.
        output: for files: where the result goes. It is streamed, one tensor in memory at a
            time, written under another name and renamed.

    Returns:
        A module (a copy of `finetuned`, without gradients), a dict or `output` as a path.

    Raises:
        TypeError: the two are not of one kind, or `output` is missing or not wanted.
        ValueError: `alpha` is not in [0, 1], or names or shapes differ (the first is named).

    Example:
        >>> import torch
        >>> wise_ft({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}, 0.25)
        {'w': tensor([0.2500, 1.5000])}
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    both = (pretrained, finetuned)
    if all(isinstance(value, (str, Path)) for value in both):
        if output is None:
            raise TypeError("output must name the file to write when files are averaged")
        return _average_files(Path(pretrained), Path(finetuned), alpha, Path(output))
    if output is not None:
        raise TypeError("output is for files; modules and state dicts are returned")
    if all(isinstance(value, nn.Module) for value in both):
        averaged = copy.deepcopy(finetuned)
        state = wise_ft(pretrained.state_dict(), finetuned.state_dict(), alpha)
        averaged.load_state_dict(state)
        averaged.zero_grad()
        return averaged
    if all(isinstance(value, Mapping) for value in both):
        _check_shapes(_shapes(pretrained), _shapes(finetuned), "pretrained", "finetuned")
        return {
            name: _average(pretrained[name], end, alpha)
            if isinstance(end, Tensor)
            else copy.deepcopy(end)
            for name, end in finetuned.items()
        }
    raise TypeError(
        "pretrained and finetuned must both be modules, state dicts or paths of safetensors "
        f"files; got {type(pretrained).__name__} and {type(finetuned).__name__}"
    )


def sweep_wise_ft(
    pretrained: nn.Module,
    finetuned: nn.Module,
    alphas: Iterable[float],
    measure: Callable[[nn.Module], Measured],
) -> dict[float, Measured]:
    """Return what `measure` finds at each α of `wise_ft`, with one model in memory beside the two.

    Args:
        pretrained: the model before fine-tuning.
        finetuned: and after; neither is modified.
        alphas: each from 0 to 1.
        measure: called with the averaged model, which the next α overwrites.

    Raises:
        ValueError: see `wise_ft`.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> found = sweep_wise_ft(old, new, (0.0, 1.0), lambda model: model.weight.item())
        >>> found == {0.0: old.weight.item(), 1.0: new.weight.item()}
        True
    """
    start, end = pretrained.state_dict(), finetuned.state_dict()
    model = copy.deepcopy(finetuned)
    found = {}
    for alpha in alphas:
        model.load_state_dict(wise_ft(start, end, alpha))
        found[alpha] = measure(model)
    return found


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all BatchNorm parameters and statistics, by their state dict names.

    Taken before fine-tuning, it lets the old head work on the fine-tuned body again:
    ``model.load_state_dict(state, strict=False)``.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, section 5: how accuracy on the
    pre-training task is measured after vision fine-tuning.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> sorted(batch_norm_state(model))[:3]
        ['1.bias', '1.num_batches_tracked', '1.running_mean']
    """
    return {
        f"{path}.{name}".lstrip("."): value.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, value in module.state_dict().items()
    }


def _average(pretrained: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    is_number = finetuned.is_floating_point() or finetuned.is_complex()
    if not is_number or alpha == 1:
        return finetuned.detach().clone()
    start, end = pretrained.detach().to(finetuned.device), finetuned.detach()
    if alpha == 0:
        return start.to(end.dtype, copy=True)
    wide = torch.float32 if end.dtype.itemsize < 4 else end.dtype  # float8 has no promotion
    start, end, narrow = start.to(wide), end.to(wide), end.dtype
    averaged = (1 - alpha) * start + alpha * end  # lerp overflows, and takes inf from inf
    return torch.where(start == end, end, averaged).to(narrow)


def _average_files(pretrained: Path, finetuned: Path, alpha: float, output: Path) -> Path:
    """Write a safetensors file tensor by tensor: 8 bytes of length, a JSON header, the data."""
    from safetensors import safe_open

    with ExitStack() as stack:
        old, new = (
            stack.enter_context(safe_open(path, framework="pt")) for path in (pretrained, finetuned)
        )
        old_shapes, new_shapes = (
            {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for file in (old, new)
        )
        _check_shapes(old_shapes, new_shapes, str(pretrained), str(finetuned))
        header: dict[str, Any] = {"__metadata__": new.metadata() or {}}
        end = 0
        for name in (order := new.offset_keys()):
            start, end = end, end + new.get_tensor(name).nbytes
            header[name] = {
                "dtype": new.get_slice(name).get_dtype(),
                "shape": new_shapes[name],
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        with replacing(output) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                averaged = _average(old.get_tensor(name), new.get_tensor(name), alpha)
                file.write(averaged.reshape(-1).view(torch.uint8).numpy().data)
    return output


def _check_shapes(
    ours: Shapes, theirs: Shapes, our: str, their: str, *, more: bool = False
) -> None:
    """All of their names are ours, with the same shape; so are ours theirs, unless `more`."""
    missing = [name for name in theirs if name not in ours]
    extra = [] if more else [name for name in ours if name not in theirs]
    for names, lacking, having in ((missing, our, their), (extra, their, our)):
        if names:
            raise ValueError(
                f"{lacking} lacks {names[0]!r}, which {having} has ({len(names)} such names); "
                "the names must agree: check prefixes, merge adapters, leave out new heads"
            )
    for name, shape in theirs.items():
        if ours[name] != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(ours[name])} in {our} and {tuple(shape)} in {their}; "
                "leave a head that was exchanged out of both"
            )


def _shapes(entries: StateDict) -> Shapes:
    return {name: list(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}
