"""Two sets of images that need no file: letters in many fonts, and textures.

Both are drawn from a seed, so that whoever runs the study learns the same tasks.
"""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, IMAGES = 32, 3500
TEXTURES = ("stripes", "checks", "dots", "rings", "waves", "bricks", "clouds", "crosses")
_SYMBOLS = ("Siz", "NonUni", "LastResort", "cmex", "cmsy", "Display")  # fonts without letters
_Images = npt.NDArray[np.uint8]


def letters(images: int = IMAGES, seed: int = 0) -> tuple[_Images, npt.NDArray[np.int64]]:
    """Draw capital letters, in matplotlib's fonts, turned, in two colours each.

    Returns:
        images (N, 32, 32, 3), and labels (N,) from 0 to 25.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [f for f in sorted(folder.glob("*.ttf")) if not any(s in f.name for s in _SYMBOLS)]
    random = np.random.default_rng(seed)
    labels = random.integers(26, size=images)
    pictures = np.empty((images, SIDE, SIDE, 3), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        font = ImageFont.truetype(files[random.integers(len(files))], int(random.integers(18, 28)))
        mask = Image.new("L", (SIDE, SIDE))
        middle = tuple(SIDE / 2 + random.uniform(-3, 3, 2))
        letter = string.ascii_uppercase[label]
        ImageDraw.Draw(mask).text(middle, letter, fill=255, font=font, anchor="mm")
        turned = mask.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR)
        picture[:] = _coloured(np.asarray(turned) / 255, random)
    return pictures, labels


def textures(images: int = IMAGES, seed: int = 0) -> tuple[_Images, npt.NDArray[np.int64]]:
    """Draw eight kinds of textures, turned and scaled at random, in two colours each.

    Returns:
        images (N, 32, 32, 3), and labels (N,) from 0 to 7, see `TEXTURES`.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(len(TEXTURES), size=images)
    pictures = np.empty((images, SIDE, SIDE, 3), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        turn, period = random.uniform(0, np.pi), random.uniform(5, 12)
        shift = random.uniform(0, 2 * np.pi, 2)
        y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
        u = (np.cos(turn) * x + np.sin(turn) * y) * 2 * np.pi / period + shift[0]
        v = (np.cos(turn) * y - np.sin(turn) * x) * 2 * np.pi / period + shift[1]
        picture[:] = _coloured(_pattern(TEXTURES[label], u, v, random), random)
    return pictures, labels


def _pattern(
    kind: str,
    u: npt.NDArray[np.float64],
    v: npt.NDArray[np.float64],
    random: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """A texture's values in [0, 1] at two coordinates, whose period is 2π."""
    if kind == "stripes":
        return (np.sin(u) > 0).astype(float)
    if kind == "checks":
        return (np.sin(u) * np.sin(v) > 0).astype(float)
    if kind == "dots":
        return (np.cos(u) + np.cos(v) > 0.8).astype(float)
    if kind == "rings":
        return (np.sin(np.hypot(u, v)) > 0).astype(float)
    if kind == "waves":
        return (np.sin(u + 1.5 * np.sin(v)) > 0).astype(float)
    if kind == "bricks":
        row = np.floor(v / np.pi)
        return ((np.mod(v, np.pi) > 0.6) & (np.mod(u + row % 2 * np.pi, 2 * np.pi) > 0.6)) * 1.0
    if kind == "crosses":
        return (np.minimum(np.abs(np.sin(u / 2)), np.abs(np.sin(v / 2))) < 0.25).astype(float)
    grid = torch.from_numpy(random.normal(size=(1, 1, 6, 6)))
    clouds: Tensor = F.interpolate(grid, (SIDE, SIDE), mode="bicubic")[0, 0]
    return (clouds > 0).double().numpy()


def _coloured(shape: npt.NDArray[np.float64], random: np.random.Generator) -> _Images:
    """A shape (H, W) in [0, 1] between two colours that differ, with noise: (H, W, 3)."""
    ground, ink = random.uniform(0, 255, (2, 3))
    while np.abs(ground - ink).sum() < 150:
        ink = random.uniform(0, 255, 3)
    image = ground + shape[..., None] * (ink - ground) + random.normal(0, 20, (*shape.shape, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
