"""The features that a frozen body makes of a data set, and the targets, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata._common.data_sets import check_map_style
from flowdata._common.progress import Advance, progress_bar
from flowdata._common.rng import preserved_rng
from flowdata.dataset import FlowWeightedDataset
from flowdata.models.batch_norm import check_batch_norm
from flowdata.models.calling import call_in_order, call_with
from flowdata.models.copies import frozen_model
from flowdata.models.failing import explain_failure
from flowdata.models.placement import home
from flowdata.models.precision import name_of, resolve_dtype
from flowdata.models.tensors import map_tensors
from flowdata.probe.groups import right_grouping
from flowdata.scoring.collate import stack_collate
from flowdata.scoring.grouping import Grouping
from flowdata.store.identity import features_identity
from flowdata.store.kept import check_name, keep
from flowdata.store.random_samples import remark_on_random_samples
from flowdata.targets.labels import split_batch

_OF_ONE_DRAW = (  # what becomes of samples that differ, and what to do
    "features, and so the head, are those of one draw. Give the probe the data set with the "
    "transform of evaluation; the augmented one is for fine-tuning"
)


def compute_features(
    model: nn.Module,
    dataset: Any,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 256,
    dtype: str | torch.dtype = "auto",
    num_workers: int = 0,
    store: str | Path | None = None,
    dataset_id: str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the features and the targets of every sample, in the data set's order.

    A sample has the features that it has alone. A few samples are compared before the run; where
    they change each other's features in a batch, as by padding that leaks, only those of one shape
    are run together, or each alone, and a warning says so.

    Args:
        model: the body, in training or eval mode; see `flowdata.linear_probe`.
        dataset: see `flowdata.linear_probe`.
        collate_fn: see `flowdata.linear_probe`.
        batch_size: samples in one forward pass, at most.
        dtype: see `flowdata.linear_probe`.
        num_workers: as for `torch.utils.data.DataLoader`.
        store: a file, ``*.safetensors``, or its URL, that keeps the features. The same call again
            reads them without running the body; another body, data set or dtype is refused.
        dataset_id: names the data set's content for `store`; None fingerprints its samples.
        progress: shows a bar.

    Returns:
        Features, (N, D) float32 (float64 from a float64 model), and targets, (N,) or (N, C),
        both on the model's device.

    Raises:
        TypeError: `dataset` is a stream, a batch is not made of inputs and targets, or the body
            returns no tensor.
        ValueError: `dataset` is empty, the features are not (B, D), the body does not run in the
            dtype, or fails on samples, samples can't be stacked, BatchNorm1d has no running
            statistics, or a `dataset_id` comes without `store`.
        ScoreMismatchError: `store` holds features of another body, data set or dtype.
        StoreError: `store` is damaged, or is no file of features.
    """
    _check_data_set(dataset)
    check_name(store, dataset_id)
    device = home(model)
    body_dtype = _dtype_of_body(dtype, model, device)
    # Content has to be recognised where features are kept alone: a name would do nothing elsewhere.
    name = "" if store is None else dataset_id
    remark_on_random_samples(dataset, name, skip_unreadable=True, advice=_OF_ONE_DRAW)

    collate = stack_collate if collate_fn is None else collate_fn

    def compute() -> dict[str, Tensor]:
        check_batch_norm(model, of="vector of features")
        with preserved_rng(), frozen_model(model, body_dtype, device) as body:
            grouping = right_grouping(
                lambda samples: _features_of(body, *_parts(collate(samples), device)),
                dataset,
                body_dtype,
                batch_size,
            )
            # A generator of the loader's own: the default one would advance the random state.
            loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=partial(_collate_groups, grouping, collate),
                num_workers=num_workers,
                generator=torch.Generator(),
            )
            explain = partial(_explain, model, body_dtype, device)
            name = "features: running the body"
            with progress_bar(len(dataset), name, "samples", shown=progress) as advance:
                features, targets = _run_body(body, loader, device, advance, explain)
        return {"feature": features, "target": targets}

    tensors: Mapping[str, Tensor]
    if store is None:
        tensors = compute()
    else:
        with preserved_rng():  # reading samples for their fingerprint may draw random numbers
            identity = features_identity(
                body=model,
                dataset=dataset,
                dataset_id=dataset_id,
                collate_fn=collate_fn,
                dtype=name_of(body_dtype),
            )
        tensors = keep(store, identity, compute)
    return tensors["feature"].to(device), tensors["target"].to(device)


def _check_data_set(dataset: Any) -> None:
    """Raise TypeError for a data set of another kind."""
    if isinstance(dataset, FlowWeightedDataset):
        raise TypeError(
            "features have no use for weights, got a FlowWeightedDataset; pass the data set that "
            "it weighs, dataset.dataset"
        )
    check_map_style(dataset)


def _dtype_of_body(dtype: str | torch.dtype, model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype to run a body in; without one that is named its own, wherever it runs.

    A body without parameters has no dtype of its own: its features are those of its inputs.
    """
    if next(model.parameters(), None) is None:
        return torch.float32
    return resolve_dtype(dtype, model, device, one_target=True)


def _collate_groups(
    grouping: Grouping, collate: Callable[[list[Any]], Any], samples: list[Any]
) -> list[Any]:
    """The batches that a grouping makes of samples."""
    return [collate(group) for group in grouping(samples)]


def _run_body(
    body: nn.Module,
    loader: Iterable[list[Any]],
    device: torch.device,
    advance: Advance,
    explain: Callable[[Any, RuntimeError], None],
) -> tuple[Tensor, Tensor]:
    """The features and targets of all batches."""
    features: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in chain.from_iterable(loader):
        inputs, target = _parts(batch, device)
        try:
            feature = _features_of(body, inputs, target)
        except RuntimeError as error:
            explain(inputs, error)
            if not features:
                explain_failure(error, inputs, "the first samples of the data set")
            raise
        _check_width(feature, features, "model must return features")
        _check_width(target, targets, "collate_fn must give targets")
        features.append(feature if feature.dtype == torch.float64 else feature.float())
        targets.append(target)
        advance(len(target))
    if not features:
        raise ValueError("dataset is empty: a probe needs at least one sample")
    return torch.cat(features), torch.cat(targets)


def _parts(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """A batch's inputs and targets, on a device."""
    inputs, target = split_batch(map_tensors(batch, lambda tensor: tensor.to(device)))
    if target is None:
        raise TypeError(
            "collate_fn must give batches (inputs, targets) or mappings with 'labels'; "
            f"got {type(batch).__name__}{_second_part(batch)}"
        )
    return inputs, target


def _features_of(body: nn.Module, inputs: Any, target: Tensor) -> Tensor:
    feature = _call(body, inputs)
    _check_feature(feature, target)
    return feature  # type: ignore[no-any-return]


def _explain(
    model: nn.Module, dtype: torch.dtype, device: torch.device, inputs: Any, error: RuntimeError
) -> None:
    """Raise ValueError where it is the run's dtype that a body fails in."""
    if dtype == torch.float32:
        return
    with suppress(RuntimeError), frozen_model(model, torch.float32, device) as body:
        _call(body, inputs)
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model does not run in {name_of(dtype)} ({reason}), and it does in float32; pass "
            "dtype='float32'"
        ) from error


def _second_part(batch: Any) -> str:
    """The words for a pair whose second part is no tensor, such as a tuple of class names."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return f" with targets of type {type(batch[1]).__name__}, which must be a tensor of numbers"
    return ""


def _check_width(rows: Tensor, earlier: list[Tensor], problem: str) -> None:
    """Raise ValueError unless a batch's rows are as wide as those of the batches before it."""
    if earlier and rows.shape[1:] != earlier[0].shape[1:]:
        raise ValueError(
            f"{problem} of one shape for all samples; got {tuple(earlier[0].shape[1:])} and, from "
            f"sample {sum(map(len, earlier))} on, {tuple(rows.shape[1:])} a sample"
        )


def _check_feature(feature: Any, target: Tensor) -> None:
    if not isinstance(feature, Tensor):
        raise TypeError(
            f"model must return a tensor of features, got {type(feature).__name__}; "
            "wrap it in a module that picks one"
        )
    if target.dim() == 0:
        raise ValueError("collate_fn must give one target for each sample, got a single number")
    if feature.dim() != 2 or len(feature) != len(target):
        raise ValueError(
            f"model must return features of shape (B, D); got {tuple(feature.shape)} "
            f"for a batch of {len(target)} targets"
        )


def _call(body: nn.Module, inputs: Any) -> Any:
    """The body's output; a mapping's fields go in by name, those of a tuple one after another."""
    if isinstance(inputs, Mapping):
        return call_with(body, inputs)
    return call_in_order(body, inputs)
