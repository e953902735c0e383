"""What can be a data set, with samples by index or as a stream, and what only looks like one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset


def check_map_style(dataset: Any) -> None:
    """Raise TypeError, with what to do, unless a data set gives its samples by index."""
    if isinstance(dataset, DataLoader):
        raise TypeError(
            f"dataset must be map-style, got {type(dataset).__name__}, which gives batches; pass "
            "the data set that it reads, loader.dataset"
        )
    _check_has_samples(dataset)
    if not is_map_style(dataset):
        raise TypeError(
            "dataset must be map-style (with __len__ and __getitem__), got "
            f"{type(dataset).__name__}; for streams use FlowWeightedIterable, or make a list of "
            "what they give, list(itertools.islice(stream, n))"
        )


def check_stream(dataset: Any) -> None:
    """Raise TypeError, with what to do, unless a data set's samples can be read one by one."""
    if isinstance(dataset, DataLoader) and dataset.batch_sampler is not None:
        raise TypeError(
            f"dataset must give samples, got {type(dataset).__name__}, which gives batches; build "
            "it with batch_size=None, or pass the data set that it reads, loader.dataset"
        )
    _check_has_samples(dataset)
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be iterable, got {type(dataset).__name__}"
            f"{'; call it' if callable(dataset) else ''}"
        )


def check_takes_column(dataset: Any, name: Any) -> None:
    """Raise TypeError or ValueError unless a data set is Hugging Face's and can have a new column.

    Args:
        dataset: the user's argument `hf_dataset`.
        name: the column's.
    """
    if not (hasattr(dataset, "add_column") and is_map_style(dataset)):
        remedy = "for others use FlowWeightedDataset"
        if isinstance(dataset, Mapping):
            remedy = "pass the split that was scored"
        elif hasattr(dataset, "iloc") and hasattr(dataset, "columns"):
            remedy = "to a frame assign the weights: frame['weight'] = scores.weights().numpy()"
        elif hasattr(dataset, "add_column"):
            remedy = (
                "a stream has no order that scores could be matched with. Load it without "
                "streaming=True, or use FlowWeightedIterable"
            )
        raise TypeError(
            f"hf_dataset must be a Hugging Face Dataset, got {type(dataset).__name__}; {remedy}"
        )
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be the new column's name, got {name!r}")
    if name in dataset.column_names:
        raise ValueError(f"the data set has a column {name!r} already; pass another name")


def is_map_style(dataset: Any) -> bool:
    """Return whether a data set has a length and gives its samples by index."""
    has_both = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return has_both and not isinstance(dataset, IterableDataset)


def _check_has_samples(dataset: Any) -> None:
    """Refuse what Python can index or iterate over, but not sample by sample."""
    remedy = _remedy(dataset)
    if remedy:
        raise TypeError(f"dataset must be one data set, got {_description(dataset)}; {remedy}")


def _description(dataset: Any) -> str:
    """What was given, as a message names it."""
    kind = type(dataset).__name__
    if isinstance(dataset, str | bytes | PurePath):
        return f"the {kind} {str(dataset)[:60]!r}"
    if isinstance(dataset, type):
        return f"the class {dataset.__name__} itself"
    if isinstance(dataset, Mapping):
        return f"{kind} of {', '.join(map(repr, list(dataset)[:6]))}"
    return kind


def _remedy(dataset: Any) -> str:
    """What to pass instead of something that has no samples of its own; "" if it has them."""
    if isinstance(dataset, str | bytes | PurePath):
        return "read the file first, as with datasets.load_dataset('json', data_files=path)"
    if isinstance(dataset, type):
        return "make one of it and pass that"
    if isinstance(dataset, nn.Module):
        return "pass the samples here; the model goes to LossScorer(model)"
    if isinstance(dataset, Mapping):
        values = list(dataset.values())
        are_columns = values and all(isinstance(v, list | np.ndarray | Tensor) for v in values)
        return "pass datasets.Dataset.from_dict(it)" if are_columns else "pass one of them"
    # Frames and tables have rows, but give columns. They are told by what they can do, since their
    # libraries need not be installed.
    if hasattr(dataset, "iloc"):
        is_frame = hasattr(dataset, "columns")
        return f"pass {'datasets.Dataset.from_pandas(it)' if is_frame else 'its .tolist()'}"
    if hasattr(dataset, "to_dicts") or hasattr(dataset, "collect_schema"):
        return "pass datasets.Dataset.from_polars(it), of a lazy frame after .collect()"
    if hasattr(dataset, "to_pylist") and hasattr(dataset, "column_names"):
        return "pass datasets.Dataset(it), or its .to_pylist()"
    if type(dataset) in (list, tuple) and len(dataset) > 0:  # one of the user's may raise
        return _remedy_of_list(dataset)
    return ""


def _remedy_of_list(items: list[Any] | tuple[Any, ...]) -> str:
    """What to pass instead of a list of data sets, or of inputs and targets."""
    if isinstance(items[0], Dataset) or (
        hasattr(items[0], "column_names") and hasattr(items[0], "__getitem__")
    ):
        return "pass one of its data sets, or torch.utils.data.ConcatDataset of them"
    if len(items) == 2 and all(isinstance(item, np.ndarray | Tensor) for item in items):
        first, second = (item.shape for item in items)
        # Two samples of one data set have as many axes; (N, …) inputs and (N,) targets don't.
        if len(first) > 1 and len(second) == 1 and first[0] == second[0]:
            return "pass torch.utils.data.TensorDataset(*it), of tensors"
    return ""
