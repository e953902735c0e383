"""The models of a front: the averages of a base model and its fine-tuned one, one after another.

One of them is in memory at a time. Of whole models both checkpoints are averaged tensor by tensor
into a folder, which is loaded and then overwritten; of adapters, α scales what they add.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowdata.companions.averaging import wise_ft
from flowdata.text.models import check_model, is_adapter, load_model, load_tuned_model

# What LoRA's configuration has where adapters do more than add to layers of the base.
_UNSCALED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
)
# These take a part of the base's weights out of it, so that nothing of them is not the base.
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def models_of_front(
    base: str, tuned: str, alphas: Sequence[float], *, trust_remote_code: bool, device: str | None
) -> Iterator[tuple[float, Any]]:
    """Yield each α with its model, which the next one takes the place of, unless it is still held.

    Args:
        base: the hub id or folder of the model before fine-tuning.
        tuned: that of the model after it, or the folder of PEFT adapters.
        alphas: from 0, the base, to 1, the tuned model.
        trust_remote_code: whether code that comes with a model is run.
        device: where models are to be; None is where they load.
    """
    options: Any = {"trust_remote_code": trust_remote_code, "device": device}
    if is_adapter(tuned):
        model = load_tuned_model(base, tuned, **options)
        for alpha in alphas:
            with _scaled(model, alpha):
                yield alpha, model
        return
    ends = _folder_of(base), _folder_of(tuned)
    with tempfile.TemporaryDirectory(prefix="flowdata-front-") as folder:
        for number, alpha in enumerate(alphas):
            average = Path(folder) / str(number)
            wise_ft(*ends, alpha, average)
            yield alpha, load_model(str(average), **options)
            gc.collect()  # a model's parts refer to each other, so that it outlives its last name
            shutil.rmtree(average)


def write_model(
    base: str, tuned: str, alpha: float, output: Path, *, trust_remote_code: bool
) -> None:
    """Write the model of one α as a folder that `from_pretrained` reads.

    Args:
        base: see `models_of_front`.
        tuned: see `models_of_front`; of adapters, scaled ones are written.
        alpha: from 0 to 1.
        output: a folder that is not there yet.
        trust_remote_code: see `models_of_front`.
    """
    if not is_adapter(tuned):
        wise_ft(_folder_of(base), _folder_of(tuned), alpha, output)
        return
    model = load_tuned_model(base, tuned, trust_remote_code=trust_remote_code)
    with torch.no_grad():
        for layer in _lora_layers(model):
            for factors in (layer.lora_B, layer.lora_embedding_B):
                for factor in factors.values():
                    getattr(factor, "weight", factor).mul_(alpha)
    model.save_pretrained(output)


def check_front(tuned: str) -> None:
    """Raise ValueError for adapters that α can't scale."""
    if not is_adapter(tuned):
        return
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(tuned)
    kind = getattr(config.peft_type, "value", config.peft_type)
    others = [name for name in _UNSCALED if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        others.append("bias")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_CHANGE_THE_BASE):
        others.append(f"init_lora_weights={start!r}")
    if kind != "LORA" or others:
        raise ValueError(
            f"{tuned} has adapters of the kind {', '.join([kind, *others])}, which do not scale; "
            "merge them into the model (merge_and_unload()), save it, and pass that"
        )


@contextmanager
def _scaled(model: Any, alpha: float) -> Iterator[None]:
    """Let adapters add α times as much for a block."""
    layers = _lora_layers(model)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = {name: alpha * value for name, value in layer.scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


def _lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _folder_of(source: str) -> Path:
    """The folder of a model: itself, or where the hub's files are kept here."""
    check_model(source)
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source))
