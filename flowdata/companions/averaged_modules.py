"""The average of two modules: a copy of the second, into which averages are loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.companions.adapters import (
    adapter_of,
    is_peft_model,
    joint_factors,
    joint_model,
    tell_bases_differ,
    with_name,
    without_factors,
)
from flowdata.companions.averages import averages, check_no_factors
from flowdata.companions.state import check_same_scaling, match_entries, plain_names
from flowdata.models.calling import unwrapped

_ENDS = ("pretrained", "finetuned")


class AveragedModule:
    """A model that takes the average of two at any α.

    Args:
        pretrained: the start; it is not modified.
        finetuned: the end, of the same architecture; it is not modified.

    Attributes:
        model: a copy of `finetuned`, out of the wrappers of `torch.compile` and DataParallel.

    Raises:
        ValueError: the two don't match, one has an adapter, or one is sharded over processes.
    """

    def __init__(self, pretrained: nn.Module, finetuned: nn.Module) -> None:
        self._pretrained, finetuned = unwrapped(pretrained), unwrapped(finetuned)
        self._finetuned = finetuned
        have_adapters = [is_peft_model(model) for model in (self._pretrained, finetuned)]
        if have_adapters == [True, True]:
            self._adapters = [
                adapter_of(model, owner)
                for model, owner in zip((self._pretrained, finetuned), _ENDS, strict=True)
            ]
            tell_bases_differ(*self._adapters)
            self.model = joint_model(finetuned, *self._adapters)
            return
        self._adapters = []
        for model, owner in zip((self._pretrained, finetuned), _ENDS, strict=True):
            state = model.state_dict()
            check_no_factors(state, owner)
            if any(hasattr(value, "full_tensor") for value in state.values()):
                raise ValueError(
                    f"{owner} is sharded over processes; average the state dicts of "
                    "torch.distributed.checkpoint.state_dict.get_model_state_dict"
                )
        if any(have_adapters):
            owner = _ENDS[have_adapters.index(True)]
            raise ValueError(
                f"{owner} is a PEFT model and the other is not: merge its adapter first "
                "(model.merge_and_unload())"
            )
        configs: list[Any] = [
            getattr(model, "config", None) for model in (self._pretrained, finetuned)
        ]
        if all(hasattr(config, "to_dict") for config in configs):
            check_same_scaling(*(config.to_dict() for config in configs))
        self.model = copy.deepcopy(finetuned)
        _untie(self.model, self._pretrained)

    def load(self, alpha: float) -> None:
        """Give the model the weights α · fine-tuned + (1 − α) · pre-trained."""
        if not self._adapters:
            state = average_states(
                self._pretrained.state_dict(), self._finetuned.state_dict(), alpha
            )
        else:
            state = self._with_adapters(alpha)
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
    averaged = dict(averages(start, end, match_entries(start, end, _ENDS), alpha))
    others = {name: value for name, value in finetuned.items() if name not in averaged}
    for name, value in others.items():
        if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            raise ValueError(
                f"{name!r} is packed (quantised) weights, which have no average; average the "
                "floating models, and quantise the result"
            )
    names = [name for name in finetuned if name in averaged or name in others]
    names += [name for name in averaged if name not in finetuned]
    return {
        name: averaged[name] if name in averaged else copy.deepcopy(others[name]) for name in names
    }


def _untie(model: nn.Module, other: nn.Module) -> None:
    """Give parameters of their own to names that are tied in `model` and differ in `other`."""
    state = other.state_dict()
    others = {plain: state[name] for plain, name in plain_names(state).items()}
    plain_of = {name: plain for plain, name in plain_names(model.state_dict()).items()}
    first_names: dict[int, str] = {}
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
