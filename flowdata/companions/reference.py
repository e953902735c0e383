"""θ* from elsewhere: the entries of a state dict, a module or a checkpoint, by a model's names."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

from torch import Tensor, nn

from flowdata.companions.adapters import without_name
from flowdata.companions.checkpoints import Checkpoint
from flowdata.companions.state import StateDict, plain_names
from flowdata.companions.ties import tied_source
from flowdata.models.calling import unwrapped

ReferenceLike: TypeAlias = "StateDict | nn.Module | str | PathLike[str]"


class Reference:
    """The entries of a reference, found by the plain names of a model's parameters.

    Args:
        source: a module, a state dict, or the path of a checkpoint.
        model: whose names are asked for; its ties and its adapters' names are looked through.

    Attributes:
        is_file: whether its tensors are nobody else's.

    Raises:
        TypeError: it is none of these.
        ValueError: it is a checkpoint that is quantised, or none.
    """

    def __init__(self, source: ReferenceLike, model: nn.Module) -> None:
        self.is_file = isinstance(source, str | PathLike)
        self._entries: Mapping[str, Any]
        if isinstance(source, str | PathLike):
            self._entries = Checkpoint(source, "reference")
            if self._entries.config.get("quantization_config"):
                raise ValueError(
                    f"reference is quantised, says {self._entries.folder / 'config.json'}; give "
                    "the floating weights that it was made from"
                )
        elif isinstance(source, nn.Module):
            self._entries = unwrapped(source).state_dict()
        elif isinstance(source, Mapping):
            self._entries = source
        else:
            raise TypeError(
                "reference must be a module, a state dict or the path of a checkpoint, got "
                f"{type(source).__name__}"
            )
        # A file holds tensors alone, and each would be read to be looked at.
        self._names = plain_names(
            name
            for name in self._entries
            if self.is_file or isinstance(self._entries[name], Tensor)
        )
        self._aliases: dict[str, list[str]] = {}  # all names of a tied parameter, by each of them
        names_by_id: dict[int, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for plain, name in plain_names(parameters).items():
            self._aliases[plain] = names_by_id.setdefault(id(parameters[name]), [])
            self._aliases[plain].append(plain)
        self._adapters = list(getattr(unwrapped(model), "peft_config", {}))

    def find(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return θ* of a parameter, None where the reference has none."""
        # A file keeps a tensor that two layers share under one of its names, and an adapter
        # without the name that it has in a model.
        names = [name, *self._aliases.get(name, [])]
        names += [without_name(name, adapter) for adapter in self._adapters]
        names += [other.replace(".modules_to_save", "") for other in names]
        key = next((self._names[other] for other in names if other in self._names), None)
        if key is None:
            shapes = {
                plain: list(self._entries[original].shape)
                for plain, original in self._names.items()
            }
            source = tied_source(name, list(parameter.shape), shapes, self._entries)
            key = self._names[source] if source is not None else None
        return None if key is None else self._entries[key].detach()


def check_holds_weights(value: Tensor, name: str, parameter: Tensor) -> None:
    """Raise ValueError where a reference's tensor is no value of a parameter by itself."""
    is_byte = value.dtype.itemsize == 1 and value.dtype != parameter.dtype  # float8, with scales
    if is_byte or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        what = "on the meta device" if value.is_meta else f"quantised ({value.dtype})"
        raise ValueError(
            f"reference has {name!r} {what}, which holds no weights by itself; load it in the "
            "model's dtype"
        )
