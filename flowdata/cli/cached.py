"""A run whose losses are all there already: it is known without the model.

A store's identity holds the model's content, which only a loaded model tells. So the store keeps,
in its details, which files the model was loaded from and with which options: while these are the
same, the losses are, too. Where anything differs, the model is loaded and the scorer decides.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flowdata._common.notices import logger, say
from flowdata._version import __version__
from flowdata.errors import StoreError
from flowdata.report.guessing import guessing_remark
from flowdata.report.markdown import count
from flowdata.scores import Scores
from flowdata.scoring.ranks import ranks_of_this_call
from flowdata.store.folder import SCORES, read_manifest
from flowdata.store.places import Place
from flowdata.text.models import is_adapter, load_transformers
from flowdata.text.tokens import TokenSamples

LOADED = "loaded"  # the field of a store's details

# Options that decide on the losses, beside those that decide on the samples.
_OPTIONS = ("dtype", "device", "max_tokens", "token_losses")


def loaded_with(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what losses depend on beside the samples; None where no file can tell.

    Args:
        options: those of `flowdata score`.
    """
    if options.trust_remote_code:  # its code may lie anywhere
        return None
    files = _files_of(options.model)
    if files is None:
        return None
    return {
        "files": files,
        **{name: getattr(options, name) for name in _OPTIONS},
        "columns": list(options.columns),
        "versions": [__version__, torch.__version__, load_transformers().__version__],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cached_scores(
    samples: TokenSamples, store: Place, loaded: dict[str, Any] | None, *, shown: bool
) -> Scores | None:
    """Return a store's scores of samples; None where it has not all of them, or not surely these.

    Args:
        samples: all of them.
        store: a folder, perhaps not there yet.
        loaded: as `loaded_with` returns it.
        shown: whether to say that the losses were found.
    """
    ranks = ranks_of_this_call(shared=True)
    with ranks.failing_together():
        is_cached = ranks.is_first and _is_cached(samples, store, loaded)
        is_cached = ranks.from_first("cached", is_cached)
        scores = Scores.load(store) if is_cached else None
        ranks.leave()
    if scores is not None:
        say(
            f"losses of {count(len(scores), 'sample')} found in {store}; the model is not loaded",
            shown=shown and ranks.is_first,
        )
        if ranks.is_first and (remark := guessing_remark(scores.losses, scores.metadata)):
            logger.warning(remark)
    return scores


def _is_cached(samples: TokenSamples, store: Place, loaded: dict[str, Any] | None) -> bool:
    with suppress(StoreError):  # the scorer says what is wrong with it, or repairs it
        manifest = read_manifest(store)
        if manifest is None or loaded is None or not (store / SCORES).exists():
            return False
        identity = manifest["identity"]
        is_same = manifest["details"].get(LOADED) == loaded
        if not is_same or identity["dataset"] != samples.identity():
            return False
        Scores.load(store)
        return True
    return False


def _files_of(model: str) -> list[Any] | None:
    """What tells a model's files from others: of a folder, their states; of the hub, the commit.

    No program can set the time at which the system notes a change of a file (`st_ctime`): a file
    with the same one, and the same number on its disk, holds what it held.
    """
    path = Path(model)
    if not path.exists():
        from transformers.utils.hub import cached_file, extract_commit_hash

        with suppress(OSError, ValueError):
            commit = extract_commit_hash(str(cached_file(model, "config.json")), None)
            return None if commit is None else [model, commit]
        return None
    if path.is_dir() and is_adapter(model):  # the base model lies elsewhere
        return None
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    states = [(file.name, file.stat()) for file in files]
    return [
        [name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        for name, state in states
    ]
