"""WiSE-FT: the average of the pre-trained and the fine-tuned weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from flowdata._common.atomic import replacing
from flowdata.companions.state import StateDict, check_shapes, shapes_of

Module = TypeVar("Module", bound=nn.Module)
Measurement = TypeVar("Measurement")


@overload
def wise_ft(pretrained: Module, finetuned: Module, alpha: float) -> Module: ...


@overload
def wise_ft(pretrained: StateDict, finetuned: StateDict, alpha: float) -> dict[str, Tensor]: ...


@overload
def wise_ft(
    pretrained: str | Path, finetuned: str | Path, alpha: float, output: str | Path
) -> Path: ...


def wise_ft(pretrained: Any, finetuned: Any, alpha: float, output: str | Path | None = None) -> Any:
    """Return the weights α · fine-tuned + (1 − α) · pre-trained.

    Floating entries (BatchNorm statistics included) are averaged in float32 or wider and keep
    the dtype and device they have in `finetuned`; integers and bools are taken from it.
    α = 0 and 1 give the two ends exactly. Nothing given is modified.

    Source: WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903, equation 1.

    Args:
        pretrained: a module, a state dict or the path of a safetensors file.
        finetuned: the same, with entries of the same names and shapes. Merge LoRA adapters
            first; leave a head that only one of them has out of both.
        alpha: α, from 0 to 1.
        output: the file to write when files are averaged. Tensors pass through memory one at a
            time, into a file of another name that is renamed at the end; so `output` may be
            one of the two files.

    Returns:
        A module (a copy of `finetuned`, without gradients), a dict or `output` as a path.

    Raises:
        TypeError: the two are not of one kind, `output` is missing for files, or is
            given for anything else.
        ValueError: `alpha` is not in [0, 1], or names or shapes differ (the first is named).

    Example:
        >>> import torch
        >>> wise_ft({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}, 0.25)
        {'w': tensor([0.2500, 1.5000])}
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    ends = (pretrained, finetuned)
    if all(isinstance(value, (str, Path)) for value in ends):
        if output is None:
            raise TypeError("output must name the file to write when files are averaged")
        return _average_files(Path(pretrained), Path(finetuned), alpha, Path(output))
    if output is not None:
        raise TypeError("output is for files; modules and state dicts are returned")
    if all(isinstance(value, nn.Module) for value in ends):
        averaged = copy.deepcopy(finetuned)
        state = wise_ft(pretrained.state_dict(), finetuned.state_dict(), alpha)
        averaged.load_state_dict(state)
        averaged.zero_grad()
        return averaged
    if all(isinstance(value, Mapping) for value in ends):
        check_shapes(shapes_of(pretrained), shapes_of(finetuned), "pretrained", "finetuned")
        return {
            name: _average(pretrained[name], end, alpha)
            if isinstance(end, Tensor)
            else copy.deepcopy(end)
            for name, end in finetuned.items()
        }
    raise TypeError(
        "pretrained and finetuned must both be modules, state dicts or paths of safetensors "
        f"files; got {type(pretrained).__name__} and {type(finetuned).__name__}"
    )


def sweep_wise_ft(
    pretrained: nn.Module,
    finetuned: nn.Module,
    alphas: Iterable[float],
    measure: Callable[[nn.Module], Measurement],
) -> dict[float, Measurement]:
    """Return what `measure` returns at each α of `wise_ft`, by α.

    Only one model is in memory beside the two.

    Args:
        pretrained: the model before fine-tuning; it is not modified.
        finetuned: the model after fine-tuning; it is not modified.
        alphas: each from 0 to 1.
        measure: called with the averaged model, which the next α overwrites.

    Raises:
        ValueError: see `wise_ft`.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> weights = sweep_wise_ft(old, new, (0.0, 1.0), lambda model: model.weight.item())
        >>> weights == {0.0: old.weight.item(), 1.0: new.weight.item()}
        True
    """
    start, end = pretrained.state_dict(), finetuned.state_dict()
    model = copy.deepcopy(finetuned)
    measurements = {}
    for alpha in alphas:
        model.load_state_dict(wise_ft(start, end, alpha))
        measurements[alpha] = measure(model)
    return measurements


def _average(pretrained: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    """α · fine-tuned + (1 − α) · pre-trained, in the dtype and on the device of the fine-tuned."""
    is_number = finetuned.is_floating_point() or finetuned.is_complex()
    if not is_number or alpha == 1:
        return finetuned.detach().clone()
    start, end = pretrained.detach().to(finetuned.device), finetuned.detach()
    if alpha == 0:
        return start.to(end.dtype, copy=True)
    # Float8 has no promotion rules of its own, so the wide dtype is chosen here.
    wide_dtype = torch.float32 if end.dtype.itemsize < 4 else end.dtype
    start, end = start.to(wide_dtype), end.to(wide_dtype)
    # `torch.lerp` takes a difference, which overflows where the ends are large and far apart, and
    # is NaN where both are infinite. Masks hold −inf at both ends: equal values stay as they are.
    average = (1 - alpha) * start + alpha * end
    return torch.where(start == end, end, average).to(finetuned.dtype)


def _average_files(pretrained: Path, finetuned: Path, alpha: float, output: Path) -> Path:
    """Write the average of two safetensors files, with one tensor of each in memory at a time.

    The header comes first and holds the place of every tensor, so all sizes are found before any
    tensor is averaged:

        | 8 bytes: n | n bytes: {"name": {"dtype", "shape", "data_offsets"}, …} and spaces | data |
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        old, new = (
            stack.enter_context(safe_open(path, framework="pt")) for path in (pretrained, finetuned)
        )
        old_shapes, new_shapes = (
            {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for file in (old, new)
        )
        check_shapes(old_shapes, new_shapes, str(pretrained), str(finetuned))
        names = new.offset_keys()  # in the order of the data
        header = _header(new, names)
        with replacing(output) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                average = _average(old.get_tensor(name), new.get_tensor(name), alpha)
                file.write(average.reshape(-1).view(torch.uint8).numpy().data)
    return output


def _header(file: Any, names: list[str]) -> bytes:
    """The header of a safetensors file whose tensors are those of `file`, in the order of `names`.

    Args:
        file: as `safetensors.safe_open` gives it; its metadata are kept.
        names: of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": file.metadata() or {}}
    end = 0
    for name in names:
        start, end = end, end + file.get_tensor(name).nbytes
        layout = file.get_slice(name)
        header[name] = {
            "dtype": layout.get_dtype(),
            "shape": layout.get_shape(),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)  # the data start at a multiple of 8, as readers map them
