"""The average of two state dicts, an entry at a time, and which entries have none."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from flowdata.companions.sharding import is_sharded
from flowdata.companions.state import Match, StateDict

_COUNTER = re.compile(r"(^|\.)num_batches_tracked$")
# The parts of a quantised weight beside its integers, as GPTQ, AWQ, bitsandbytes, torch, FP8 and
# compressed-tensors name them: scales, zero points, largest values, tables of values.
_SCALE = re.compile(
    r"scale|scb$|absmax|quant_map|quant_state|zero_?point|qzeros|q_?zero", re.IGNORECASE
)
_FACTOR = re.compile(
    r"(^|\.)(lora_?(embedding_)?[ab]|lora_?(up|down|magnitude_vector))(\.|$)", re.I
)


def averages(
    pretrained: StateDict, finetuned: StateDict, matches: list[Match], alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """Return the name and the average of every entry in turn.

    Args:
        pretrained: the start.
        finetuned: the end, whose dtypes and devices the averages have.
        matches: the entries.
        alpha: α, from 0 to 1.

    Raises:
        ValueError: an entry has no average: it is quantised, or of two kinds.
    """
    scaled_modules = {_module_of(m.end) for m in matches if _SCALE.search(_leaf_of(m.end))}
    for name, start, end in matches:
        values = pretrained[start], finetuned[end]
        _check_kinds(name, *values)
        if 0 < alpha < 1 and _is_quantised(name, *values, _module_of(end) in scaled_modules):
            raise ValueError(
                f"{name!r} ({values[1].dtype}) is quantised and differs between the two: its "
                "integers have no average, and scales must not be averaged without them; load "
                "both models in a floating dtype (dequantise()), average, and quantise the result"
            )
        yield name, average_of(*values, alpha)


def check_no_factors(names: StateDict, owner: str) -> None:
    """Raise ValueError, with the remedy, where entries are factors of low-rank adapters."""
    for name in names:
        if _FACTOR.search(name):
            raise ValueError(
                f"{owner} holds a low-rank adapter ({name!r}): the average of two products is not "
                "the product of averaged factors; merge it into its model first "
                "(model.merge_and_unload()), or pass two PEFT models with their adapters"
            )


def check_has_values(entries: StateDict, owner: str) -> None:
    """Raise ValueError where entries are on the meta device: not loaded yet, or offloaded."""
    for name, value in entries.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{owner} has no values of {name!r}, which is on the device 'meta'; load its "
                "weights first (load_state_dict(..., assign=True)), without offloading"
            )


def average_of(pretrained: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    """Return α · fine-tuned + (1 − α) · pre-trained, as the fine-tuned is: its dtype, its device.

    Integers and bools are those of the fine-tuned, at α = 0 those of the pre-trained.
    """
    start, end = pretrained.detach(), finetuned.detach()
    if alpha == 0:
        return start.to(end.device, end.dtype, copy=True)
    if alpha == 1 or not (end.is_floating_point() or end.is_complex()):
        return end.clone()
    start = start.to(end.device)
    # Float8 has no promotion rules of its own, so the wide dtype is chosen here.
    wide_dtype = torch.float32 if end.dtype.itemsize < 4 else end.dtype
    start, end = start.to(wide_dtype), end.to(wide_dtype)
    # `torch.lerp` takes a difference, which overflows where the ends are large and far apart, and
    # is NaN where both are infinite. Masks hold −inf at both ends: equal values stay as they are.
    average = (1 - alpha) * start + alpha * end
    return torch.where(start == end, end, average).to(finetuned.dtype)


def _check_kinds(name: str, start: Tensor, end: Tensor) -> None:
    kinds = [_kind_of(tensor) for tensor in (start, end)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{name!r} is {kinds[0]} ({start.dtype}) in pretrained and {kinds[1]} ({end.dtype}) in "
            "finetuned; load both in one way (dequantise the one that is quantised)"
        )
    if is_sharded(start) != is_sharded(end):
        raise ValueError(
            f"{name!r} is sharded in one of the two only; gather it first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict, full_state_dict=True)"
        )


def _kind_of(tensor: Tensor) -> str:
    is_own_class = type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if tensor.is_quantized or (is_own_class and not is_sharded(tensor)):
        return f"of the class {type(tensor).__name__}"
    if tensor.dtype == torch.bool:
        return "of bools"
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "of integers"


def _is_quantised(name: str, start: Tensor, end: Tensor, has_scales: bool) -> bool:
    """Whether two entries are parts of quantised weights and differ, so that they have no average.

    Equal integers are fine whatever they are: with them, averaged scales give averaged weights.
    Integers that differ are a counter's (one number), or ids of a buffer, which PyTorch keeps in
    int64; narrower ones, and those with scales beside them, are weights.
    """
    kind = _kind_of(end)
    if kind.startswith("of the class"):
        return True  # a library's quantised tensor, which may look floating
    is_byte = kind == "floating" and end.dtype.itemsize == 1 and has_scales
    is_integer = kind == "of integers" and not _COUNTER.search(name)
    if is_integer and end.numel() == 1:
        is_integer = bool(_SCALE.search(_leaf_of(name)))
    elif is_integer and end.dtype == torch.int64:
        is_integer = has_scales
    return (is_byte or is_integer) and not _are_equal(start, end)


def _are_equal(start: Tensor, end: Tensor) -> bool:
    # Bytes are compared, as torch compares no float8.
    start, end = start.to(end.device, end.dtype).contiguous(), end.contiguous()
    return torch.equal(start.reshape(-1).view(torch.uint8), end.reshape(-1).view(torch.uint8))


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf_of(name: str) -> str:
    return name.rpartition(".")[2]
