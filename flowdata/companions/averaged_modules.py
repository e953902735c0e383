"""The average of two modules: a copy of the second, into which averages are loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.companions.adapters import (
    Adapter,
    adapter_of,
    joint_factors,
    joint_model,
    tell_bases_differ,
    with_name,
    without_factors,
)
from flowdata.companions.averages import averages, check_has_values, check_no_factors
from flowdata.companions.sharding import is_sharded
from flowdata.companions.state import match_entries, plain_names
from flowdata.companions.ties import check_same_scaling
from flowdata.models.calling import is_peft_model, unwrapped
from flowdata.models.copies import deep_copied

_ENDS = ("pretrained", "finetuned")


class AveragedModule:
    """A model that takes the average of two at any α.

    Args:
        pretrained: the start; it is not modified.
        finetuned: the end, of the same architecture; it is not modified.

    Attributes:
        model: a copy of `finetuned`, out of the wrappers of `torch.compile` and DataParallel.

    Raises:
        ValueError: the two don't match, one has an adapter or no values, or one is sharded over
            processes.
    """

    def __init__(self, pretrained: nn.Module, finetuned: nn.Module) -> None:
        self._pretrained, self._finetuned = unwrapped(pretrained), unwrapped(finetuned)
        ends = dict(zip(_ENDS, (self._pretrained, self._finetuned), strict=True))
        for owner, model in ends.items():
            check_has_values(model.state_dict(), owner)
        self._adapters: list[Adapter] = []
        if all(map(is_peft_model, ends.values())):
            self._adapters = [adapter_of(model, owner) for owner, model in ends.items()]
            tell_bases_differ(*self._adapters)
            self.model = joint_model(self._finetuned, *self._adapters)
            return
        for owner, model in ends.items():
            _check_plain(model, owner)
        configs = [getattr(model, "config", None) for model in ends.values()]
        if all(hasattr(config, "to_dict") for config in configs):
            check_same_scaling(*(config.to_dict() for config in configs))  # type: ignore[union-attr]
        self.model = deep_copied(self._finetuned)
        _untie(self.model, self._pretrained)

    def load(self, alpha: float) -> None:
        """Give the model the weights α · fine-tuned + (1 − α) · pre-trained."""
        if self._adapters:
            state = self._with_adapters(alpha)
        else:
            state = average_states(
                self._pretrained.state_dict(), self._finetuned.state_dict(), alpha
            )
        own_names = plain_names(self.model.state_dict())
        plain = plain_names(state)
        entries = {own_names.get(name, name): state[key] for name, key in plain.items()}
        for name, parameter in self.model.named_parameters():
            if name in entries:
                parameter.data = parameter.data.to(entries[name].dtype)
        self.model.load_state_dict(entries)
        self.model.zero_grad()

    def _with_adapters(self, alpha: float) -> dict[str, Any]:
        start, end = self._adapters
        entries = average_states(
            without_factors(start.entries), without_factors(end.entries), alpha
        )
        entries.update(joint_factors(self.model, start, end, alpha))
        return {with_name(key, end.name): value for key, value in entries.items()}


def average_states(
    pretrained: Mapping[str, Any], finetuned: Mapping[str, Any], alpha: float
) -> dict[str, Any]:
    """Return the average of two state dicts; what is no tensor is that of the second.

    Raises:
        ValueError: names, shapes or kinds differ, or an entry has no average.
    """
    start, end = (
        {k: v for k, v in s.items() if isinstance(v, Tensor)} for s in (pretrained, finetuned)
    )
    average = dict(averages(start, end, match_entries(start, end, _ENDS), alpha))
    others = {name: value for name, value in finetuned.items() if name not in average}
    for name, value in others.items():
        if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            raise ValueError(
                f"{name!r} is packed (quantised) weights, which have no average; average the "
                "floating models, and quantise the result"
            )
    # The order is that of the second; entries that are tied there come last.
    names = [*finetuned, *(name for name in average if name not in finetuned)]
    return {
        name: average[name] if name in average else copy.deepcopy(others[name]) for name in names
    }


def _check_plain(model: nn.Module, owner: str) -> None:
    """Raise ValueError where a model's entries can't be averaged one by one."""
    state = model.state_dict()
    check_no_factors(state, owner)
    if any(map(is_sharded, state.values())):
        raise ValueError(
            f"{owner} is sharded over processes; average the state dicts of "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    if is_peft_model(model):
        raise ValueError(
            f"{owner} is a PEFT model and the other is not: merge its adapter first "
            "(model.merge_and_unload())"
        )


def _untie(model: nn.Module, other: nn.Module) -> None:
    """Give parameters of their own to names that are tied in `model` and differ in `other`."""
    state = other.state_dict()
    others = {plain: state[name] for plain, name in plain_names(state).items()}
    plain_of = {name: plain for plain, name in plain_names(model.state_dict()).items()}
    first_names: dict[int, str] = {}  # of parameters by their ids
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        first = first_names.setdefault(id(parameter), name)
        ends = [others.get(plain_of.get(key, "")) for key in (first, name)]
        if first == name or ends[0] is None or ends[1] is None or torch.equal(ends[0], ends[1]):
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if module is model.get_submodule(first.rpartition(".")[0]):
            raise ValueError(
                f"{name!r} and {first!r} are one layer in finetuned and two in pretrained, which "
                "no average joins; load both in one way"
            )
        setattr(module, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        _note_untied(model)


def _note_untied(model: Any) -> None:
    """Tell a Hugging Face model that it is untied, so that saving and loading keep it so."""
    config: Any = getattr(model, "config", None)
    parts: list[Any] = [config]
    parts += [config.get_text_config()] if hasattr(config, "get_text_config") else []
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
