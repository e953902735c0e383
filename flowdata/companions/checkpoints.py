"""Checkpoints on the disk: one file or many, safetensors or torch's own, read a tensor at a time.

    folder ─→ model.safetensors.index.json ─→ {"weight_map": {name: shard}} ─→ shards
           └→ model.safetensors, pytorch_model.bin(.index.json) …

Nothing is read before it is asked for: safetensors are mapped into memory, torch's files are, too
(`mmap`), with `weights_only`, so that no code in them is run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # suffixes of files of weights
INDEX = ".index.json"
_USUAL_NAMES = (  # as `save_pretrained` writes them, among other precisions and adapters
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where training loops put the weights


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read when it is asked for.

    Args:
        path: a safetensors file, a file of `torch.save` (read with `weights_only`), the index of
            a sharded checkpoint, or a folder with any of these, as `save_pretrained` writes it
            and the Hugging Face hub's cache keeps it.
        name: what messages call it.

    Attributes:
        path: of the file or folder.
        config: of `config.json` beside the weights; empty where there is none.
        tied_names: entries left out because they are tied, and what they are tied to.
        shard_of: the file's name of every entry.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: it is no checkpoint, more than one, or holds other things than tensors.
    """

    def __init__(self, path: str | PathLike[str], name: str) -> None:
        self.path, self.name = Path(path), name
        source = _find(self.path, name)
        self.is_sharded = source.name.endswith(INDEX)
        self.folder = source.parent
        self.config = _json(self.folder / "config.json")
        self.adapter_config = _json(self.folder / "adapter_config.json")
        self.tied_names: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._readers: dict[str, Any] = {}
        self.shard_of = self._open_shards(source) if self.is_sharded else self._open(source)

    @property
    def may_be_tied(self) -> bool:
        """False where the configuration says that the output layer has weights of its own."""
        return self.config.get("tie_word_embeddings") is not False

    def __getitem__(self, entry: str) -> Tensor:
        reader = self._readers[self.shard_of[entry]]
        tensor: Tensor = reader[entry] if isinstance(reader, dict) else reader.get_tensor(entry)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_of)

    def __len__(self) -> int:
        return len(self.shard_of)

    def _open_shards(self, index: Path) -> dict[str, str]:
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.name}: {index} has no weight_map, which an index has")
        shard_of: dict[str, str] = {}
        for shard in sorted(set(weight_map.values())):
            file = index.parent / shard
            if Path(shard).name != shard:
                raise ValueError(f"{self.name}: {index} names the shard {shard!r}, which is a path")
            if not file.is_file():
                raise FileNotFoundError(
                    f"{self.name}: {index.name} names the shard {shard}, which is not in "
                    f"{index.parent}; download the checkpoint whole"
                )
            shard_of.update(self._open(file))
        absent = [entry for entry in weight_map if shard_of.get(entry) != weight_map[entry]]
        if absent:
            raise ValueError(
                f"{self.name}: {index.name} says that {absent[0]!r} is in {weight_map[absent[0]]}, "
                "which lacks it; the shards are not those of the index"
            )
        return {entry: shard for entry, shard in shard_of.items() if entry in weight_map}

    def _open(self, file: Path) -> dict[str, str]:
        """Open one file of weights; return its name for every entry, in the order of the data."""
        with file.open("rb") as opened:
            is_pickle = opened.read(2) in (b"PK", b"\x80\x02")
        reader = _read_torch(file, self.name) if is_pickle else _map_safetensors(file, self.name)
        self._readers[file.name] = reader
        if isinstance(reader, dict):
            return dict.fromkeys(reader, file.name)
        entries = list(reader.offset_keys())
        metadata = reader.metadata() or {}
        self.metadata.update(metadata)
        # `safetensors.torch.save_model` notes there what it left out of the file.
        self.tied_names.update({name: kept for name, kept in metadata.items() if kept in entries})
        return dict.fromkeys(entries, file.name)


def _find(path: Path, name: str) -> Path:
    """The file of weights, or the index of several, that a path stands for."""
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: there is no {path}; a model of the Hugging Face hub is downloaded by "
            "huggingface_hub.snapshot_download(repository), which returns its folder"
        )
    if path.is_file():
        return path
    if (path / "snapshots").is_dir():  # the hub's cache: a folder for every revision
        revisions = sorted((path / "snapshots").iterdir())
        if len(revisions) != 1:
            raise ValueError(
                f"{name}: {path} holds {len(revisions)} revisions; name one of the folders in "
                f"{path / 'snapshots'}"
            )
        return _find(revisions[0], name)
    for pattern in ("*.safetensors" + INDEX, "*.safetensors", "*" + INDEX, "*"):
        files = [file for file in sorted(path.glob(pattern)) if _is_weights(file)]
        preferred = [file for file in files if file.name in _USUAL_NAMES] or files
        if len(preferred) == 1:
            return preferred[0]
        if preferred:
            raise ValueError(
                f"{name}: {path} holds several checkpoints, {preferred[0].name} and "
                f"{preferred[1].name} among them; name one"
            )
    raise ValueError(f"{name}: {path} holds no weights ({', '.join(WEIGHTS)} or an index of them)")


def _is_weights(file: Path) -> bool:
    """Whether a file's name is one that weights have; a Trainer's own state isn't a model's."""
    others = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
    is_named = file.name.endswith((*WEIGHTS, INDEX)) and not file.name.startswith(others)
    return is_named and file.is_file()


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _map_safetensors(file: Path, name: str) -> Any:
    """An open safetensors file, mapped into memory."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{name}: {file} is neither a safetensors file nor one of torch.save ({error}); "
            "it may be cut short, or a pointer of git-lfs"
        ) from None


def _read_torch(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory where its format allows it."""
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{name}: {file} can't be read with weights_only=True ({_reason(error)}); save the "
            "model's state_dict() alone"
        ) from None
    while isinstance(content, Mapping):
        nested = [key for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: {file} holds a {type(content).__name__}, not a state dict")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        what = f"{others[0]!r} in it is no tensor" if others else "it is empty"
        raise ValueError(f"{name}: {file} is no state dict: {what}; save the state_dict() alone")
    return dict(content)


def _reason(error: Exception) -> str:
    """What a reader with `weights_only` found, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    marks = "WeightsUnpickler error: "
    line = next((line for line in lines if line.startswith(marks)), lines[0])
    return line.removeprefix(marks).partition(". Please")[0]
