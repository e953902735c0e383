"""Parameter-side methods that go with FLOW: staying near the pre-trained weights.

`ParameterAnchor` adds a penalty to the loss, `wise_ft` averages weights afterwards, and
`batch_norm_state` keeps what an old head needs around a fine-tuned body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata.companions.state import StateDict, check_shapes, shapes_of

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
    check_shapes(shapes_of(kept), shapes_of(named), "reference", "model", more=True)
    # Tensors given may share the memory of the parameters that are about to move: copy them.
    return [
        kept[name].detach().to(device or p.device, p.dtype, copy=not mapped)
        for name, p in named.items()
    ]
