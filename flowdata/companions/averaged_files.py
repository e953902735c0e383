"""The average of two checkpoints, written with one tensor of each in memory at a time.

    pretrained: name → tensor ─┐
                               ├→ average → shard by shard, as those of the fine-tuned checkpoint
    finetuned:  name → tensor ─┘

A safetensors file's header comes first and holds the place of every tensor, so all sizes are taken
before any tensor is averaged:

    | 8 bytes: n | n bytes: {"name": {"dtype", "shape", "data_offsets"}, …} and spaces | data |
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flowdata._common.atomic import replacing
from flowdata._common.safetensors_file import header_of, octets
from flowdata.companions.averages import averages, check_no_factors
from flowdata.companions.checkpoints import INDEX, WEIGHTS, Checkpoint
from flowdata.companions.state import Match, match_entries
from flowdata.companions.ties import check_same_scaling


def average_checkpoints(pretrained: Path, finetuned: Path, alpha: float, output: Path) -> Path:
    """Write the average of two checkpoints as safetensors, and return where.

    Args:
        pretrained: the start, in any form that `Checkpoint` reads.
        finetuned: the end.
        alpha: α, from 0 to 1.
        output: a file if its name ends in ``.safetensors`` or the fine-tuned checkpoint is one
            file; else a folder, with the fine-tuned one's shards, index, configuration and
            tokenizer. A folder appears whole, at the end, and must not have been there.

    Raises:
        FileNotFoundError: a checkpoint, or one of its shards, is not there.
        ValueError: the two don't match, are quantised or adapters, or `output` can't be written.
    """
    if output.suffix in WEIGHTS[1:]:
        raise ValueError(
            f"output is written as safetensors: name a file .safetensors or a folder, not {output}"
        )
    old, new = Checkpoint(pretrained, "pretrained"), Checkpoint(finetuned, "finetuned")
    for checkpoint in (old, new):
        _check_plain(checkpoint)
    check_same_scaling(old.config, new.config)
    matches = match_entries(old, new, (str(pretrained), str(finetuned)))
    is_one_file = finetuned.is_file() and not new.is_sharded
    if output.suffix != WEIGHTS[0] and not is_one_file:
        _write_folder(output, old, new, matches, alpha)
    elif output.is_dir():
        raise ValueError(f"output must name a file, as model.safetensors; {output} is a folder")
    else:
        _write(output, old, new, matches, alpha)
    return output


def _check_plain(checkpoint: Checkpoint) -> None:
    """Raise ValueError where a checkpoint's configuration says that its weights have no average."""
    if checkpoint.adapter_config and "adapter" in next(iter(checkpoint.shard_of.values())):
        raise ValueError(
            f"{checkpoint.name} is an adapter ({checkpoint.path}), whose factors have no average: "
            "load it on its model (PeftModel.from_pretrained) and average two such models, or "
            "merge it (merge_and_unload()) and save the whole model"
        )
    check_no_factors(checkpoint, checkpoint.name)
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"].get("quant_method", "quantised")
        raise ValueError(
            f"{checkpoint.name} is quantised ({method}, says its config.json): integers and their "
            "scales have no average; average the floating checkpoints, and quantise the result"
        )


def _write_folder(
    output: Path, old: Checkpoint, new: Checkpoint, matches: list[Match], alpha: float
) -> None:
    """Write a folder that `from_pretrained` reads, beside `output`, and rename it at the end."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"output must be a new folder, and {output} is there already")
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        _copy_others(new, draft)
        shards: dict[str, list[Match]] = {}
        for match in matches:
            shards.setdefault(_shard_name(new.shard_of[match.end]), []).append(match)
        for shard, parts in shards.items():
            _write(draft / shard, old, new, parts, alpha)
        if new.is_sharded:
            _write_index(draft, shards, new)
        if _is_untied(old, new, matches):
            config = {**new.config, "tie_word_embeddings": False}
            with replacing(draft / "config.json") as file:
                file.write(json.dumps(config, indent=2).encode())
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what lies beside a checkpoint's weights: configuration, tokenizer, code."""
    for file in checkpoint.folder.iterdir():
        if file.is_file() and not file.name.endswith((*WEIGHTS, INDEX)):
            shutil.copyfile(file, folder / file.name)  # what a link of the hub's cache points to


def _shard_name(name: str) -> str:
    """A shard's name as safetensors: pytorch_model-00001-of-00002.bin is model-… there."""
    if name.endswith(".safetensors"):
        return name
    return Path(name.replace("pytorch_model", "model")).with_suffix(".safetensors").name


def _write_index(folder: Path, shards: dict[str, list[Match]], new: Checkpoint) -> None:
    size = sum(new[match.end].nbytes for parts in shards.values() for match in parts)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {match.name: shard for shard, parts in shards.items() for match in parts},
    }
    # model-00001-of-00002.safetensors belongs to model.safetensors.index.json.
    name = next(iter(shards)).split("-0")[0].removesuffix(".safetensors")
    with replacing(folder / f"{name}.safetensors{INDEX}") as file:
        file.write(json.dumps(index, indent=2).encode())


def _is_untied(old: Checkpoint, new: Checkpoint, matches: list[Match]) -> bool:
    """Whether the average has an output layer of its own, which a configuration may deny."""
    starts, ends = {match.start for match in matches}, {match.end for match in matches}
    is_tied_once = len(starts) != len(ends)  # two of one's entries are one entry of the other
    return bool(new.config) and (is_tied_once or not (old.may_be_tied and new.may_be_tied))


def _write(
    path: Path, old: Mapping[str, Tensor], new: Checkpoint, matches: list[Match], alpha: float
) -> None:
    tensors = {match.name: new[match.end] for match in matches}
    with replacing(path) as file:
        file.write(header_of(tensors, {"format": "pt", **_notes(new)}))
        for _, average in averages(old, new, matches, alpha):
            file.write(octets(average.contiguous()))


def _notes(new: Checkpoint) -> dict[str, str]:
    """A checkpoint's metadata without its ties, which the average need not have."""
    return {key: value for key, value in new.metadata.items() if key not in new.tied_names}
