"""Thumbnails: samples that are images, small enough that a page holds hundreds of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_SIDE = 128  # pixels of the longer side, at most
_LOSSLESS = 64  # pixels of the longer side up to which nothing is lost
_MOST = 500  # thumbnails on a page
_CHANNELS = (1, 3, 4)


def thumbnails(images: Callable[[int], Any], samples: Sequence[int]) -> dict[int, str]:
    """Return the thumbnails of samples, each as a `data:` address, the first 500 of them.

    Args:
        images: gives the image of sample i, as `thumbnail` takes it; None where it has none.
        samples: those that come first are shown.
    """
    pairs = ((index, images(index)) for index in list(dict.fromkeys(samples))[:_MOST])
    return {index: thumbnail(image) for index, image in pairs if image is not None}


def thumbnail(image: Any) -> str:
    """Return an image as the `data:` address of its thumbnail.

    Args:
        image: of PIL, or a tensor or array (H, W), (C, H, W) or (H, W, C) of 1, 3 or 4 channels:
            uint8, or other numbers, which are stretched from their least to their largest, so that
            what a transform normalised can be seen.

    Raises:
        TypeError: it is no image.

    Example:
        >>> thumbnail(np.zeros((2, 2), np.uint8))[:22]
        'data:image/png;base64,'
    """
    from PIL import Image  # which matplotlib needs as well

    # A PIL image of more than 8 bits is stretched, as other numbers are.
    is_read = isinstance(image, Image.Image) and not image.mode.startswith(("I", "F"))
    small = (image if is_read else Image.fromarray(_pixels(image))).convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(small.size) <= _LOSSLESS else "jpeg"
    content = io.BytesIO()
    small.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _pixels(image: Any) -> NDArray[np.uint8]:
    """The pixels (H, W) or (H, W, C) of an image, uint8."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    values = np.asarray(image)
    if values.ndim == 3 and values.shape[0] in _CHANNELS and values.shape[2] not in _CHANNELS:
        values = values.transpose(1, 2, 0)
    values = values[..., None] if values.ndim == 2 else values
    is_number = values.dtype == np.bool_ or np.issubdtype(values.dtype, np.number)
    if not is_number or values.ndim != 3 or values.shape[2] not in _CHANNELS or not values.size:
        shape = f" of shape {values.shape}" if values.ndim else ""
        raise TypeError(
            "images= must give a PIL image, or a tensor or array (H, W), (C, H, W) or (H, W, C) of "
            f"1, 3 or 4 channels, for each sample, got {type(image).__name__}{shape}"
        )
    pixels: NDArray[np.uint8] = values if values.dtype == np.uint8 else _stretched(values)
    return pixels.squeeze(2) if pixels.shape[-1] == 1 else pixels


def _stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers as pixels: their least is black, their largest is white."""
    finite = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = finite.min(), finite.max()
    stretched: NDArray[np.float64] = 255 * (finite - low) / ((high - low) or 1.0)
    return (stretched + 0.5).astype(np.uint8)
