"""The parameter anchor: a penalty on the distance from the pre-trained weights, ℓ2 or L1.

The penalty and its gradient need the differences θ − θ* of all parameters. A plain expression would
keep them from the forward to the backward pass, a second copy of the model. Here both passes take
them anew, some parameters at a time:

    parameters  θ₁ θ₂ θ₃ | θ₄ | θ₅ θ₆    a bucket holds about 64 MiB of differences
    snapshot    θ₁*θ₂*θ₃*| θ₄*| θ₅*θ₆*   beside the parameters, or on the CPU: then a bucket's
                                         part moves to the accelerator and is dropped again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata.companions.state import StateDict, check_shapes, shapes_of

_BUCKET = 1 << 26  # bytes of differences in memory at a time


class ParameterAnchor:
    """A penalty on the distance of the trainable parameters from where they started.

    ``strength · Σ (θ − θ*)²`` for ``"l2"``, ``strength · Σ |θ − θ*|`` for ``"l1"``, over every
    parameter that requires a gradient when the anchor is made. With LoRA these are the
    adapters; a head that is trained counts, too.

    Source: ℓ2 as in Sanyal et al., ICML 2025, arXiv:2502.02797, section 5, where its strength
    for language models is 1e-3.

    Args:
        model: the model that will be trained; anchored where it stands now, unless `reference`
            says otherwise.
        kind: ``"l2"`` or ``"l1"``.
        strength: ≥ 0; factor of the sum above.
        reference: θ* by parameter name, or a safetensors file that holds it (mapped, not read
            into memory). It is needed when training resumes from weights that are no longer θ*.
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
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("model has no parameter that requires a gradient: nothing to anchor")
        self.kind, self.strength = kind, strength
        self._parameters = list(parameters.values())
        self._snapshot = _snapshot(model, parameters, reference, device)

    def __call__(self) -> Tensor:
        """Return the penalty: 0-d float32, on the device of the first parameter."""
        order = 2 if self.kind == "l2" else 1
        penalty: Tensor = _Penalty.apply(order, self._snapshot, *self._parameters)  # type: ignore[no-untyped-call]
        return self.strength * penalty


class _Penalty(torch.autograd.Function):
    """Σ |θ − θ*|^order over all parameters; saves the parameters, not the differences."""

    @staticmethod
    def forward(ctx: Any, order: int, snapshot: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.order, ctx.snapshot = order, snapshot
        ctx.save_for_backward(*parameters)
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=parameters[0].device)
        for differences in _differences(parameters, snapshot):
            # One kernel for a whole bucket: a loop over hundreds of small tensors would launch
            # hundreds. The norm to the power of the order is the sum, and no square is stored.
            norms = torch._foreach_norm(differences, order, dtype=dtype)
            total += torch.stack([_whole(norm).to(total) for norm in norms]).pow(order).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor] = []
        for differences in _differences(ctx.saved_tensors, ctx.snapshot):
            # d/dθ |θ − θ*| is the sign, d/dθ (θ − θ*)² twice the difference: the differences turn
            # into gradients where they lie.
            if ctx.order == 1:
                torch._foreach_sign_(differences)
            for difference in differences:
                shard = _shard(difference)
                shard.mul_(ctx.order * slope.to(shard))
            gradients += differences
        return None, None, *gradients


def _differences(parameters: Sequence[Tensor], snapshot: list[Tensor]) -> Iterator[list[Tensor]]:
    """θ − θ* of every parameter in turn, about `_BUCKET` bytes at a time."""
    start = size = 0  # of the bucket: its first parameter, its bytes
    for end, parameter in enumerate(parameters, start=1):
        size += _shard(parameter).nbytes
        if size < _BUCKET and end < len(parameters):
            continue
        current = [p.detach() for p in parameters[start:end]]
        anchors = [
            anchor.to(p.device, non_blocking=True)
            for anchor, p in zip(snapshot[start:end], current, strict=True)
        ]
        yield list(torch._foreach_sub(current, anchors))
        start, size = end, 0


def _shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, which is all of it unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks' parts; a sharded norm becomes that of the whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _load(file: Path) -> StateDict:
    """The tensors of a safetensors file, mapped into memory rather than read."""
    from safetensors.torch import load_file

    if file.is_dir():
        raise ValueError(f"reference must name a safetensors file, {file} is a folder")
    return load_file(file)


def _with_tied_names(reference: StateDict, model: nn.Module) -> StateDict:
    """A reference with every tied tensor under all of its names.

    A safetensors file keeps a tensor that two layers share under one of its names, which need not
    be the name that the model's parameters have.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    aliases = {
        name: reference[other]
        for names in names_of.values()
        for name in names
        for other in names
        if other in reference and name not in reference
    }
    return {**reference, **aliases}


def _snapshot(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    reference: StateDict | str | Path | None,
    device: str | torch.device | None,
) -> list[Tensor]:
    """θ* of each parameter, in its dtype and on the device that keeps it."""
    from_file = isinstance(reference, (str, Path))
    if isinstance(reference, (str, Path)):
        reference = _load(Path(reference))
    start = parameters if reference is None else _with_tied_names(reference, model)
    check_shapes(shapes_of(start), shapes_of(parameters), "reference", "model", may_have_more=True)
    # The model's own tensors are about to move, and a reference may share their memory: copy them.
    # Those of a file are nobody else's.
    return [
        start[name].detach().to(device or p.device, p.dtype, copy=not from_file)
        for name, p in parameters.items()
    ]
