"""What was loaded: whether a checkpoint held all weights of its model, and no more.

Transformers and PEFT draw at random what a file lacks, and say so in a report alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowdata._common.excerpts import first_line
from flowdata._common.notices import warn_once

_MOST_NAMED = 3
_OF_SIZES = "ignore_mismatched_sizes"  # in what transformers says of weights of another shape
_WHOLE = re.compile(r"embed|lm_head")  # weights that PEFT may save whole beside its adapters


@contextmanager
def explained_loading(source: str) -> Iterator[None]:
    """Raise ValueError, in one line, for a file that is damaged or of another model.

    Args:
        source: the model's hub id or path.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"the weights of {source} can't be read ({first_line(error)}): the file is "
                "damaged, or its download was cut; get it again"
            ) from error
        if isinstance(error, RuntimeError) and _OF_SIZES in str(error):
            raise ValueError(
                f"weights of {source} have other shapes than its config.json says, as the report "
                "above shows: one of both is another model's"
            ) from error
        raise


def check_weights(source: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Refuse a model of which weights were drawn at random, and warn of weights without a place.

    Args:
        source: the model's hub id or path.
        missing: names of weights that the file lacks.
        unexpected: names of weights that the model has no place for.

    Raises:
        ValueError: weights are missing.
    """
    if missing:
        others = f", and has {_named(unexpected)} that the model doesn't know" * bool(unexpected)
        raise ValueError(
            f"{source} lacks {_named(missing)} of the model that its config describes{others}: "
            "they were drawn at random, so that its losses mean nothing. It may be a model of "
            "another kind, such as a classifier, or saved from inside a wrapper; if you want it "
            "so, load it with transformers and pass it to LossScorer"
        )
    if unexpected:
        warn_once(
            f"{source} has {_named(unexpected)} that the model which its config.json describes "
            "doesn't know: they are left out",
            about=f"unexpected weights of {source}",
        )


def check_base(source: str, check: Callable[[str], None]) -> None:
    """Check that the model which adapters were made for is here, or may be on the hub.

    Args:
        source: the adapters' folder.
        check: raises FileNotFoundError or ConnectionError for a model that is not.

    Raises:
        FileNotFoundError, ConnectionError: as `check` does, with the adapters' name.
        ValueError: their configuration is damaged.
    """
    try:
        config = json.loads((Path(source) / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"the adapter_config.json of {source} can't be read ({first_line(error)}): get it again"
        ) from None
    base = config.get("base_model_name_or_path")
    if not base:
        return
    try:
        check(base)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"{source} holds adapters on {base}: {error}") from None


def check_adapters(source: str, model: Any) -> None:
    """Refuse adapters that were not all in their file, or not all put into their base.

    Args:
        source: their folder.
        model: PEFT's, with these alone.

    Raises:
        ValueError: their names are not the model's.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    found = set(load_peft_weights(source, device="cpu"))
    unexpected = {name for name in found - expected if not _WHOLE.search(name)}
    if missing := expected - found:
        unexpected_too = f", and has {_named(unexpected)}" * bool(unexpected)
        raise ValueError(
            f"{source} lacks {_named(missing)} of the adapters that its adapter_config.json "
            f"describes{unexpected_too}: they are adapters of another model, or were saved from "
            "inside a wrapper"
        )
    check_weights(source, (), unexpected)


def _named(names: Collection[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED)
    return ", ".join(sorted(names)[:_MOST_NAMED]) + more
