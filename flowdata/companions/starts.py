"""Where a model's parameters started: θ* of those that are trained now, whatever became of them.

A parameter is known by its name without wrappers, so that one that was replaced (weights assigned,
sharded, moved) is found again. A large frozen one has no copy of θ*: it is its own, as long as
nothing has written to it, which a mark of its bits tells.

    trained when the anchor is made      copied
    frozen then, trained now, untouched  copied now
    frozen then, written to since        refused, unless it is small and was copied
    not there then (adapters, heads)     refused
    trained then, frozen now             left out until it is trained again
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.companions.reference import Reference, ReferenceLike, check_holds_weights
from flowdata.companions.sharding import (
    check_followable,
    in_form,
    is_in_form,
    is_sharded,
    is_under_fsdp2,
)
from flowdata.companions.state import check_shapes, plain_names, shapes_of

_SMALL = 1 << 16  # numbers in a tensor whose copy costs nothing that matters
_PART = 1 << 20  # numbers whose bits are summed at a time; they stay in the processor's cache


class Starts:
    """θ* of a model's parameters, by their names without wrappers.

    Args:
        model: it may change afterwards.
        reference: θ* from elsewhere; None means the parameters as they are now.
        device: where copies are kept; None keeps them beside the parameters.

    Raises:
        ValueError: nothing is trained, parameters are on the meta device or in flat pieces, or
            the reference lacks one.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: ReferenceLike | None,
        device: torch.device | None,
    ) -> None:
        check_followable(model)
        self._model, self._device = model, device
        self._plain_names: dict[str, str] = {}
        self._first_names: dict[str, str] = {}  # of a tied parameter, by all of its names
        self._shards: dict[str, Tensor] = {}  # parameters under FSDP2, which its forward swaps
        first_of: dict[int, str] = {}
        own: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters():
            first = first_of.setdefault(id(parameter), name)
            self._first_names[name] = first
            own[first] = parameter
        trained = {name: p for name, p in own.items() if p.requires_grad}
        if not trained:
            raise ValueError("model has no parameter that requires a gradient: nothing to anchor")
        source = None if reference is None else Reference(reference, model)
        self._starts = self._copies(trained, source)
        self._shards.update({name: p for name, p in trained.items() if is_sharded(p)})
        self._file = reference if isinstance(reference, str | PathLike) else None
        # What is frozen: θ* where it is small or from a reference, and the mark of large tensors.
        self._frozen: dict[str, tuple[Tensor | None, int | None]] = {}
        for name, p in {} if self._file is not None else own.items():
            value = p if source is None else source.find(name, p)
            if name in trained or value is None or not _can_be_trained(value):
                continue
            if value.numel() <= _SMALL:
                self._frozen[name] = (value.detach().clone(), None)
            else:
                self._frozen[name] = (None if source is None else value, _mark(value))

    def trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that are trained now, each once, and θ* of each in its form.

        Raises:
            ValueError: nothing is trained, or θ* of a parameter is not known.
        """
        parameters: list[Tensor] = []
        starts: list[Tensor] = []
        names, ids = set(), set()
        for name, parameter in self._parameters():
            names.add(name)
            if id(parameter) in ids:
                continue
            ids.add(id(parameter))
            if parameter.requires_grad:
                current, start = self._follow(name, parameter)
                parameters.append(current)
                starts.append(start)
        if not self._starts.keys() <= names:
            name = min(self._starts.keys() - names)
            raise ValueError(
                f"model no longer has the anchored parameter {name!r}: it was wrapped, removed or "
                "renamed; make the anchor after such changes"
            )
        if not parameters:
            raise ValueError(
                "no parameter of model requires a gradient any more, so the penalty would be 0 for "
                "ever; make the anchor anew once the model is as it will be trained (after "
                "get_peft_model, requires_grad_)"
            )
        return parameters, starts

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter by its name without wrappers, a tied one under each of its names."""
        named = list(self._model.named_parameters(remove_duplicate=False))
        if any(name not in self._plain_names for name, _ in named):
            plain = plain_names(name for name, _ in named)
            self._plain_names = {name: short for short, name in plain.items()}
        return [(self._plain_names[name], parameter) for name, parameter in named]

    def _copies(
        self, parameters: Mapping[str, Tensor], source: Reference | None
    ) -> dict[str, Tensor]:
        """θ* of parameters, copied, in their form."""
        values: Mapping[str, Tensor] = parameters
        if source is not None:
            entries = {name: source.find(name, p) for name, p in parameters.items()}
            values = {name: value for name, value in entries.items() if value is not None}
            check_shapes(
                shapes_of(values), shapes_of(parameters), "reference", "model", may_have_more=True
            )
        copies = {}
        for name, parameter in parameters.items():
            if parameter.is_meta and source is None:
                raise ValueError(
                    f"the model's {name!r} is on the meta device and has no values to stay near; "
                    "load its weights first, or give a reference"
                )
            value = values[name].detach()
            check_holds_weights(value, name, parameter)
            # The model's own tensors are about to move, and a reference may share their memory.
            # Those of a file are nobody else's.
            if source is None or not source.is_file:
                value = value.clone()
            form = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter
            copies[name] = in_form(value, form, self._device)
        return copies

    def _follow(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The parameter to take the distance of, and θ* in its form."""
        key = name if name in self._starts else self._first_names.get(name, name)
        if key not in self._starts:
            self._starts[key] = self._late_start(key, parameter)
        start = self._starts[key]
        if start.shape != parameter.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(parameter.shape)} and had {tuple(start.shape)} when "
                "the anchor was made; make it after the model is resized (resize_token_embeddings)"
                " or sharded (other than by fully_shard)"
            )
        if parameter.is_meta:
            raise ValueError(f"{name!r} is on the meta device, where it has no values")
        if is_sharded(parameter):
            self._shards[key] = parameter
        elif is_sharded(start) and key in self._shards and is_under_fsdp2(self._model):
            # After a forward FSDP2 leaves the outermost parameters whole until the backward. Their
            # shards are still there, and take gradients.
            parameter = self._shards[key]
        if not is_in_form(start, parameter, self._device):
            start = self._starts[key] = in_form(start, parameter, self._device)
        return parameter, start

    def _late_start(self, name: str, parameter: Tensor) -> Tensor:
        """θ* of a parameter that was frozen, or not there, when the anchor was made."""
        if name not in self._first_names:
            raise ValueError(
                f"model trains {name!r}, which it did not have when the anchor was made; make the "
                "anchor after the model is whole (after get_peft_model, new heads)"
            )
        if self._file is not None:
            return self._copies({name: parameter}, Reference(self._file, self._model))[name]
        value, mark = self._frozen.get(name, (None, None))
        value = parameter if value is None else value
        if name not in self._frozen or (mark is not None and mark != _mark(value)):
            raise ValueError(
                f"{name!r} was frozen when the anchor was made and has been written to since, or "
                "the reference lacks it, so where it started is not known; call the anchor once "
                "between requires_grad_ and the next step, or give a reference that has it"
            )
        check_shapes(shapes_of({name: value}), shapes_of({name: parameter}), "reference", "model")
        check_holds_weights(value, name, parameter)
        return in_form(value.detach().clone(), parameter, self._device)


def _can_be_trained(value: Tensor) -> bool:
    """Whether a tensor has values that training may move; quantised ones have not."""
    is_plain = type(value.data) in (Tensor, nn.Parameter) or is_sharded(value)
    is_wide = (value.is_floating_point() or value.is_complex()) and value.dtype.itemsize > 1
    return is_plain and is_wide and not value.is_meta


def _mark(tensor: Tensor) -> int:
    """What tells a large tensor from one that was written to: its bits, each by its place.

    PyTorch's version counters don't tell: fused optimisers write past them. A sum without places
    would miss rows that change theirs, and a norm signs. Integers wrap at 64 bits, so that the sum
    is the same in any order, on any device.
    """
    whole: Any = tensor.detach()
    whole = whole.full_tensor() if is_sharded(tensor) else whole
    whole = torch.view_as_real(whole) if whole.is_complex() else whole
    # The sign of 64 bits would be counted by whether its place is odd, and no more.
    bits = whole.flatten().view(torch.int16 if whole.dtype.itemsize == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(part), device=bits.device)
        total += part.mul_(places).sum()
    return int(total.item())
