"""Samples with their weights: what a loader collates into (batch, weight)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from flowdata._common.data_sets import check_map_style
from flowdata.errors import ScoreMismatchError
from flowdata.report.summary import drop_missing
from flowdata.scores import Scores
from flowdata.scores.gathering import gather_weights, is_several
from flowdata.weights import (
    Missing,
    Normalize,
    Temperature,
    resolve_temperature,
)

Layout: TypeAlias = Literal["pair", "triple", "dict"]

_REFERENCE = "reference"  # the key of the frozen model's output

# What StatefulDataLoader saves and Accelerate calls where a data set is random or has epochs.
_PASSED_ON = ("state_dict", "load_state_dict", "set_epoch")


class FlowWeightedDataset(Dataset[Any]):
    """A map-style data set whose samples come with their FLOW weight.

    Weights are 0-d float32 tensors, so that the default collation makes them a (B,) tensor; a
    Python float would become float64. Other methods of `dataset` would return samples without
    weights: they do not show through, so call them on `.dataset`.

    Args:
        dataset: map-style, N samples: a PyTorch data set, a Hugging Face one, a list.
        scores_or_weights: the data set's `Scores`, or (N,) floating weights >= 0, or, for a
            `ConcatDataset`, a list of them, one for each of its parts.
        temperature: as in `resolve_temperature`; of each part by itself where there are
            several (`joint_temperature` gives one for all). Only scores use it: weights are
            taken as they are. Under ``"ess…"`` the largest weight, of each part, is 1.
        layout: ``"pair"`` yields (sample, weight); ``"triple"`` turns a sample (input, target)
            into (input, target, weight); ``"dict"`` adds the weight to a mapping under `key`.
        key: the weight's name under ``layout="dict"``.
        missing: what becomes of samples without a loss: ``"raise"``, or ``"zero"`` for weight 0.
        normalize: ``"mean"`` divides the weights, given ones included, by the mean of them all,
            so that a learning rate tuned for the unweighted loss keeps its scale.
        max_weight: caps the weights, given ones included, after normalising.
        reference: (N, …) floating, what the frozen model makes of each sample
            (`DriftMeter.outputs`), for `drift.output_penalty`. It comes last in each sample, or
            under ``layout="dict"`` as ``"reference"``.

    Raises:
        TypeError: `dataset` is a stream (use `FlowWeightedIterable`), there are several scores
            but no `ConcatDataset`, or a sample does not fit the layout.
        ScoreMismatchError: the scores or weights are of another length or another data set.
        ValueError: the weights, `temperature`, `layout`, `missing`, `normalize` or `max_weight`
            are unusable, a sample has `key` already, or `dataset` carries weights.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> digits = TensorDataset(torch.arange(4.0), torch.tensor([0, 1, 1, 0]))
        >>> weighted = FlowWeightedDataset(digits, torch.tensor([1.0, 0.5, 0.25, 0.0]))
        >>> (inputs, targets), weight = next(iter(DataLoader(weighted, batch_size=3)))
        >>> weight
        tensor([1.0000, 0.5000, 0.2500])
    """

    def __init__(
        self,
        dataset: Any,
        scores_or_weights: Any,
        *,
        temperature: Temperature = "median",
        layout: Layout = "pair",
        key: str = "weight",
        missing: Missing = "raise",
        normalize: Normalize = "none",
        max_weight: float | None = None,
        reference: Tensor | None = None,
    ) -> None:
        if isinstance(dataset, Scores):
            raise TypeError("dataset comes first, then scores_or_weights; got Scores as dataset")
        if isinstance(dataset, FlowWeightedDataset):
            raise ValueError(
                "dataset carries weights already; pass the plain one, dataset.dataset, with the "
                "weights that shall act, such as the product of both"
            )
        check_map_style(dataset)
        self._attach = weight_attacher(layout, key)
        if layout == "dict" and key in (getattr(dataset, "column_names", None) or ()):
            raise ValueError(_collision(key))
        check_match(dataset, scores_or_weights)
        weights = gather_weights(
            scores_or_weights,
            temperature=temperature,
            missing=missing,
            normalize=normalize,
            max_weight=max_weight,
        )
        if len(weights) != len(dataset):
            raise ScoreMismatchError(
                f"scores_or_weights holds {len(weights)} weights, the data set {len(dataset)} "
                "samples; pass one weight for each sample, in the data set's order"
            )
        self.dataset = dataset
        self.weights = _to_float32(weights)
        self.reference = None if reference is None else _check_reference(reference, len(dataset))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.weights)

    def __getitem__(self, index: int) -> Any:
        """Return one sample with its weight."""
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} of a data set of {len(self)} samples")
        position %= len(self)
        # A clone, since a view that is sent to another process takes all N weights along.
        sample = self._attach(self.dataset[position], self.weights[position].clone())
        return sample if self.reference is None else _add_last(sample, self.reference[position])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return a batch of samples with their weights; loaders prefer this to single ones."""
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        # NumPy gathers by a list faster than torch does. Its result is a copy, so that the
        # views below hold the weights of this batch alone.
        weights = torch.from_numpy(self.weights.numpy()[indices]).unbind()
        weighted = [self._attach(s, weight) for s, weight in zip(samples, weights, strict=True)]
        if self.reference is None:
            return weighted
        return [_add_last(s, self.reference[i]) for s, i in zip(weighted, indices, strict=True)]

    def __getattr__(self, name: str) -> Any:
        """Pass on the data set's state and epoch, if it has them: loaders ask whether it does."""
        if name in _PASSED_ON and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def joint_temperature(scores: Sequence[Scores], temperature: Temperature = "median") -> float:
    """Return the temperature that a rule picks over the samples of several data sets together.

    That of ``"ess…"`` makes all their weights relative to the smallest loss of them all: the
    ratios between the data sets are kept.

    Args:
        scores: one `Scores` for each data set; samples without a loss are left out.
        temperature: as in `resolve_temperature`.

    Raises:
        TypeError: `scores` is no list of `Scores`.
        ValueError: no sample has a loss, or the temperature is unusable.

    Example:
        >>> import torch
        >>> easy, hard = Scores(torch.tensor([0.1, 0.2])), Scores(torch.tensor([1.0, 2.0, 3.0]))
        >>> joint_temperature([easy, hard])
        1.0
    """
    if not is_several(scores) or not all(isinstance(part, Scores) for part in scores):
        raise TypeError("scores must be a list of Scores, one for each data set")
    losses = torch.cat([part.losses for part in scores])
    return resolve_temperature(drop_missing(losses), temperature)


def weight_attacher(layout: Layout, key: str) -> Callable[[Any, Tensor], Any]:
    """Return the function that attaches a weight to a sample as a layout says.

    It is a function of this module, or a `partial` of one: loaders can pickle it for their workers.

    Raises:
        ValueError: there is no such layout, or it has no use for the key.
    """
    if key != "weight" and layout in ("pair", "triple"):
        raise ValueError(
            f"key={key!r} names the weight in samples of layout='dict', and layout={layout!r} "
            "would ignore it; pass layout='dict', or leave key out"
        )
    if layout == "pair":
        return _pair
    if layout == "triple":
        return _triple
    if layout == "dict":
        return functools.partial(_add_key, key=key)
    raise ValueError(f"layout must be 'pair', 'triple' or 'dict', got {layout!r}")


def check_bare(layout: Layout, key: str) -> None:
    """Refuse a layout and a key where resampled samples come without their weight."""
    if layout != "pair" or key != "weight":
        raise ValueError(
            f"resample=True yields samples without a weight, so that layout={layout!r} and "
            f"key={key!r} would be ignored; leave them out, or weigh with resample=False"
        )


def _to_float32(weights: Tensor) -> Tensor:
    """Weights as a loop takes them, refused where float32 cannot hold them."""
    single = weights.to("cpu", torch.float32)
    if not single.isfinite().all():
        first = int((~single.isfinite()).int().argmax())
        raise ValueError(
            f"weights[{first}] is {weights[first].item():g}, more than float32 holds, in which "
            "weights go into a loss; scale the weights down"
        )
    if not single.any() and weights.any():
        raise ValueError(
            f"the largest weight is {weights.max().item():g}, less than float32 holds, in which "
            "weights go into a loss; scale the weights up"
        )
    return single


def _pair(sample: Any, weight: Tensor) -> tuple[Any, Tensor]:
    return sample, weight


def _triple(sample: Any, weight: Tensor) -> tuple[Any, Any, Tensor]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TypeError(
            "layout='triple' needs samples (input, target), got "
            f"{type(sample).__name__}{f' of {len(sample)}' if hasattr(sample, '__len__') else ''}; "
            "use layout='pair'"
        )
    return sample[0], sample[1], weight


def _add_key(sample: Any, weight: Tensor, key: str) -> dict[Any, Any]:
    if not isinstance(sample, Mapping):
        raise TypeError(
            f"layout='dict' needs samples that are mappings, got {type(sample).__name__}; "
            "use layout='pair'"
        )
    if key in sample:
        raise ValueError(_collision(key))
    return {**sample, key: weight}


def _add_last(sample: Any, reference: Tensor) -> Any:
    """A weighted sample with the frozen model's output; a clone, as of a weight."""
    if isinstance(sample, Mapping):
        if _REFERENCE in sample:
            raise ValueError(f"the samples have a {_REFERENCE!r} already; rename it")
        return {**sample, _REFERENCE: reference.clone()}
    return (*sample, reference.clone())


def _check_reference(reference: Any, size: int) -> Tensor:
    if not isinstance(reference, Tensor) or not reference.is_floating_point():
        raise TypeError("reference must be a floating tensor, as DriftMeter.outputs() returns it")
    if reference.dim() < 2 or len(reference) != size:
        raise ScoreMismatchError(
            f"reference must have one row for each of the {size} samples, (N, C), in the data "
            f"set's order, got {tuple(reference.shape)}"
        )
    return reference.detach().cpu()


def _collision(key: str) -> str:
    return f"the samples have a {key!r} already; pass another key= for the weight"


def check_match(dataset: Any, scores_or_weights: Any, *, view: bool = True) -> None:
    """Check scores against the data set that they are to weigh, or against its parts."""
    if isinstance(scores_or_weights, Scores):
        scores_or_weights.check_dataset(dataset, view=view)
    elif is_several(scores_or_weights) and isinstance(dataset, ConcatDataset):
        _check_parts(dataset.datasets, scores_or_weights)
    elif is_several(scores_or_weights) and any(isinstance(s, Scores) for s in scores_or_weights):
        raise TypeError(
            "a list of scores is for a torch.utils.data.ConcatDataset of the data sets that "
            f"they were made from, got {type(dataset).__name__}; pass one Scores alone, or "
            "their weights()"
        )


def _check_parts(parts: Sequence[Any], several: Sequence[Any]) -> None:
    """Check the scores or weights of each part of a concatenation against that part."""
    if len(several) != len(parts):
        raise ScoreMismatchError(
            f"{len(several)} scores for {len(parts)} concatenated data sets; pass one for each, in "
            "their order"
        )
    for number, (part, scores) in enumerate(zip(parts, several, strict=True)):
        if isinstance(scores, Scores):
            scores.check_dataset(part)
        elif len(scores) != len(part):
            raise ScoreMismatchError(
                f"scores_or_weights[{number}] holds {len(scores)} weights, part {number} of "
                f"the data set {len(part)} samples"
            )
