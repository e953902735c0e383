"""WiSE-FT: the average of the pre-trained and the fine-tuned weights, at one α or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from flowdata._common.real_numbers import RealNumber, as_python, real_number
from flowdata.companions.averaged_files import average_checkpoints
from flowdata.companions.averaged_modules import AveragedModule, average_states
from flowdata.companions.averages import check_has_values, check_no_factors
from flowdata.companions.state import StateDict

Module = TypeVar("Module", bound=nn.Module)
Measurement = TypeVar("Measurement")


@overload
def wise_ft(pretrained: Module, finetuned: Module, alpha: RealNumber) -> Module: ...


@overload
def wise_ft(
    pretrained: StateDict, finetuned: StateDict, alpha: RealNumber
) -> dict[str, Tensor]: ...


@overload
def wise_ft(
    pretrained: str | Path, finetuned: str | Path, alpha: RealNumber, output: str | Path
) -> Path: ...


def wise_ft(
    pretrained: Any, finetuned: Any, alpha: RealNumber, output: str | Path | None = None
) -> Any:
    """Return the weights α · fine-tuned + (1 − α) · pre-trained.

    Floating entries are averaged in float32 or wider and have the dtype and device that they have
    in `finetuned`; integers and bools are taken from it. α = 0 and 1 give the two ends exactly,
    in that dtype. Nothing given is modified.

    - BatchNorm's statistics are averaged as all else, and are not those of the averaged network:
      where it matters, `torch.optim.swa_utils.update_bn` takes them anew.
    - An output layer that is tied to the embedding at one end only has weights of its own.
    - Quantised weights have no average and are refused, unless both ends have the same integers.
    - Two PEFT models with one LoRA adapter each give one whose adapter is the average of the two
      products, in the rank of both together. One such model and one without is refused.
    - Prefixes of `torch.compile`, DataParallel and DistributedDataParallel make no difference.

    Source: WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903, equation 1.

    Args:
        pretrained: a module, a state dict, or the path of a checkpoint: a file of safetensors or
            of `torch.save` (read with `weights_only`), the index of a sharded one, or a folder of
            `save_pretrained` or of the Hugging Face hub's cache.
        finetuned: the same, with entries of the same names and shapes. Leave a head that only one
            of them has out of both.
        alpha: α, any real number from 0 to 1; there is no extrapolation.
        output: where the average of checkpoints is written, as safetensors. A file if its name
            ends in ``.safetensors`` or `finetuned` is a single file; it may be one of the two
            files. Else a new folder, with the shards, the configuration and the tokenizer of
            `finetuned`, for `from_pretrained`. Tensors pass through memory one at a time; the
            name is given at the end, so that `output` is whole or not there.

    Returns:
        A module (a copy of `finetuned`, out of its wrappers, without gradients), a dict or
        `output` as a path.

    Raises:
        TypeError: the two are not of one kind, `output` is missing for files, or is
            given for anything else.
        FileNotFoundError: a checkpoint, or one of its shards, is not there.
        ValueError: `alpha` is not in [0, 1]; names, shapes or kinds of entries differ (the first
            is named); weights are quantised, sharded over processes, on the meta device or of an
            adapter that has no average; a file is no checkpoint, or `output` a folder that is there
            already.

    Example:
        >>> import torch
        >>> wise_ft({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}, 0.25)
        {'w': tensor([0.2500, 1.5000])}
    """
    alpha = _check_alpha(alpha)
    ends = (pretrained, finetuned)
    if all(isinstance(value, str | PathLike) for value in ends):
        if output is None:
            raise TypeError("output must name the file or folder to write when files are averaged")
        return average_checkpoints(Path(pretrained), Path(finetuned), alpha, Path(output))
    if output is not None:
        raise TypeError("output is for files; modules and state dicts are returned")
    if all(isinstance(value, nn.Module) for value in ends):
        average = AveragedModule(pretrained, finetuned)
        average.load(alpha)
        return average.model
    if all(isinstance(value, Mapping) for value in ends):
        for state, owner in zip(ends, ("pretrained", "finetuned"), strict=True):
            check_no_factors(state, owner)
            check_has_values(state, owner)
        return average_states(pretrained, finetuned, alpha)
    raise TypeError(
        "pretrained and finetuned must both be modules, state dicts or paths of checkpoints; got "
        f"{type(pretrained).__name__} and {type(finetuned).__name__}"
    )


def sweep_wise_ft(
    pretrained: nn.Module,
    finetuned: nn.Module,
    alphas: Iterable[RealNumber],
    measure: Callable[[nn.Module], Measurement],
) -> dict[RealNumber, Measurement]:
    """Return what `measure` returns at each α of `wise_ft`, by α.

    Only one model is in memory beside the two.

    Args:
        pretrained: the model before fine-tuning; it is not modified.
        finetuned: the model after fine-tuning; it is not modified.
        alphas: each from 0 to 1, in a list, an array or a tensor; all are checked first.
        measure: called with the averaged model, which the next α overwrites.

    Returns:
        The measurements by α, as given; numbers of arrays and tensors as Python's.

    Raises:
        TypeError: `alphas` is a single number.
        ValueError: see `wise_ft`.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> weights = sweep_wise_ft(old, new, (0.0, 1.0), lambda model: model.weight.item())
        >>> weights == {0.0: old.weight.item(), 1.0: new.weight.item()}
        True
    """
    if not isinstance(alphas, Iterable) or getattr(alphas, "ndim", 1) == 0:
        raise TypeError(f"alphas must be a sequence of numbers, got {alphas!r}")
    shares = [as_python(alpha) for alpha in alphas]
    for alpha in shares:
        _check_alpha(alpha)
    average = AveragedModule(pretrained, finetuned)
    measurements = {}
    for alpha in shares:
        average.load(float(alpha))
        measurements[alpha] = measure(average.model)
    return measurements


def _check_alpha(alpha: Any) -> float:
    return real_number(alpha, "alpha must lie between 0 and 1", 0, 1)
