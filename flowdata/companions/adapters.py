"""Averages of two PEFT models with LoRA: of the products that are added, not of their factors.

    weights of a layer    W + s·B·A        A (r, in), B (out, r), s the scaling
    average of two        (1 − α)·s₁·B₁·A₁ + α·s₂·B₂·A₂
                            = s · [(1 − α)·s₁/s·B₁, α·s₂/s·B₂] · [A₁; A₂]

The factors of both lie side by side, so the rank is the sum of the two ranks, and nothing is lost.
Everything else, the layers W among it, is averaged as in any model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata._common.notices import say
from flowdata.models.adapters import has_plain_start

_A, _B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
_NAMED = (*_A, *_B, "modules_to_save")  # parts of names that the adapter's name follows
# Options under which a layer adds something else than s·B·A.
_OTHER_KINDS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "megatron_config"),
)


class Adapter(NamedTuple):
    """A LoRA adapter in a model.

    Attributes:
        entries: of the model's state dict, by names without the adapter's own.
        ranks: of every layer that it is added to, by the layer's name.
        scalings: s of each of these layers.
        config: PEFT's.
        name: the adapter's own.
    """

    entries: dict[str, Tensor]
    ranks: dict[str, int]
    scalings: dict[str, float]
    config: Any
    name: str


def adapter_of(model: Any, owner: str) -> Adapter:
    """Return the one LoRA adapter of a PEFT model.

    Raises:
        ValueError: it has several, another kind, one that is merged or off, or changes its layers
            otherwise than by adding a product.
    """
    if len(model.peft_config) != 1:
        raise ValueError(
            f"{owner} has the adapters {', '.join(model.peft_config)}; delete all but one "
            "(model.delete_adapter)"
        )
    ((name, config),) = model.peft_config.items()
    kind = getattr(config.peft_type, "value", config.peft_type)
    other_kinds = [option for option in _OTHER_KINDS if getattr(config, option, None)]
    if kind != "LORA" or other_kinds or not has_plain_start(config):
        start = getattr(config, "init_lora_weights", None)
        detail = kind if kind != "LORA" else (*other_kinds, f"init_lora_weights={start!r}")[0]
        raise ValueError(
            f"{owner} has an adapter of the kind {detail}, whose average is not that of plain "
            "LoRA's products; merge it first (model.merge_and_unload()), and the other one too"
        )
    ranks, scalings = {}, {}
    for path, layer in _lora_layers(model, name).items():
        if layer.merged or layer.disable_adapters:
            state = "merged into its layers" if layer.merged else "switched off"
            raise ValueError(
                f"{owner}'s adapter is {state}; call unmerge_adapter() or enable it first"
            )
        if any(getattr(part, "groups", 1) > 1 for part in layer.modules()):
            raise ValueError(f"{owner} has LoRA on a grouped convolution, {path}; merge it first")
        ranks[path], scalings[path] = layer.r[name], float(layer.scaling[name])
    entries = {without_name(key, name): value for key, value in model.state_dict().items()}
    return Adapter(entries, ranks, scalings, config, name)


def joint_model(finetuned: Any, pretrained: Adapter, adapter: Adapter) -> Any:
    """Return a copy of a PEFT model whose adapter has room for the factors of two.

    Args:
        finetuned: the model with `adapter`.
        pretrained: the adapter of the other model.
        adapter: the model's own; the copy's has its name and scaling.
    """
    from peft import get_peft_model  # its models are there, so it is

    ranks, alphas = {}, {}
    for path in [*adapter.ranks, *(path for path in pretrained.ranks if path not in adapter.ranks)]:
        ranks[path] = pretrained.ranks.get(path, 0) + adapter.ranks.get(path, 0)
        scalings = adapter.scalings if path in adapter.scalings else pretrained.scalings
        alphas[path] = scalings[path] * ranks[path]
    config = copy.deepcopy(adapter.config)
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern = _pattern(ranks, config.r)
    config.alpha_pattern = _pattern(alphas, config.lora_alpha)
    config.use_rslora, config.init_lora_weights = False, True
    if pretrained.ranks.keys() != adapter.ranks.keys():
        config.target_modules = {_inner_name(path) for path in ranks}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    model = get_peft_model(copy.deepcopy(finetuned).unload(), config, adapter_name=adapter.name)
    layers = _lora_layers(model, adapter.name)
    if layers.keys() != ranks.keys():
        path = min(layers.keys() ^ ranks.keys())
        raise ValueError(
            f"the two adapters are on different layers ({path} is one), which no target_modules "
            "joins; merge both first (model.merge_and_unload())"
        )
    return model.train(finetuned.training)


def joint_factors(
    model: Any, pretrained: Adapter, adapter: Adapter, alpha: float
) -> dict[str, Tensor]:
    """Return the factors whose product is the average of two adapters' products.

    Args:
        model: of `joint_model`.
        pretrained: the start.
        adapter: the end, whose dtypes and devices the factors have.
        alpha: α, from 0 to 1.

    Returns:
        The entries of the model's state dict, by names without the adapter's own.
    """
    factors = {}
    for key in model.state_dict():
        key = without_name(key, adapter.name)
        path, factor = _layer_and_factor(key)
        if not factor:
            continue
        scaling = float(model.get_submodule(path).scaling[adapter.name])
        ends = [
            (share * end.scalings[path] / scaling, end.entries[key])
            for share, end in ((1 - alpha, pretrained), (alpha, adapter))
            if key in end.entries
        ]
        form = ends[-1][1]  # the adapter's own dtype and device, where it has this layer
        if factor in _A:
            factors[key] = torch.cat([part.to(form) for _, part in ends], dim=0)
        else:  # B takes the shares, in float32
            parts = [(share * part.to(form.device).float()).to(form) for share, part in ends]
            factors[key] = torch.cat(parts, dim=1)
    return factors


def without_factors(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries that are no factors: the layers' own weights, and all that is saved."""
    return {key: value for key, value in entries.items() if not _layer_and_factor(key)[1]}


def without_name(key: str, name: str) -> str:
    """Return a state dict's name without the adapter's own, as PEFT's files have it."""
    parts = key.split(".")
    return ".".join(
        part for i, part in enumerate(parts) if not (part == name and i and parts[i - 1] in _NAMED)
    )


def with_name(key: str, name: str) -> str:
    """Return a state dict's name with the adapter's own in it."""
    return ".".join(part + f".{name}" if part in _NAMED else part for part in key.split("."))


def tell_bases_differ(pretrained: Adapter, adapter: Adapter) -> None:
    """Say that saving the adapter alone loses something, where the models beneath it differ."""
    layers = {key: value for key, value in adapter.entries.items() if ".base_layer." in key}
    for key, value in layers.items():
        other = pretrained.entries.get(key)
        if other is not None and not torch.equal(other.to(value), value):
            say(
                f"the two PEFT models differ beneath their adapters ({key}): the average has the "
                "average of both; save it whole (merge_and_unload()), not its adapter alone"
            )
            return


def _lora_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """The layers that an adapter is added to, by their names."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.scaling
    }


def _layer_and_factor(key: str) -> tuple[str, str]:
    """The layer of a factor, and which factor it is; empty strings where it is none."""
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts) if part in (*_A, *_B)), None)
    return ("", "") if place is None else (".".join(parts[:place]), parts[place])


def _inner_name(path: str) -> str:
    return path.removeprefix("base_model.model.")


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """The layers whose value is not the usual one, by their names in the model beneath."""
    return {_inner_name(path): value for path, value in values.items() if value != usual}
