"""Images that a network with BatchNorm remembers: a probe that needs no data.

BatchNorm keeps the mean and the variance of every channel over the old task's images. Noise that
is changed until it has these in every layer, and until the network is sure of its class, looks to
the network much like its old task. On such images a drift also tells what is lost where BatchNorm
took the new task's statistics; on noise and on the new task's own images it often does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata._common.excerpts import first_line
from flowdata._common.notices import is_first_rank
from flowdata._common.progress import Advance, progress_bar
from flowdata._common.resumable import check_natural
from flowdata._common.rng import preserved_rng
from flowdata.drift.headless import check_has_head
from flowdata.drift.probes import smooth_images
from flowdata.models.batch_norm import batch_norm_layers
from flowdata.models.calling import unwrapped
from flowdata.models.copies import frozen_model
from flowdata.models.placement import home
from flowdata.store.fingerprint import fingerprint_model
from flowdata.store.kept import keep
from flowdata.targets.predictions import logits_of

_AT_ONCE = 128  # images whose statistics are compared with the kept ones
_SCHEME = 2  # of images in several parts; before it classes began anew in each part
_RATE = 0.05  # of Adam, in standard deviations of a pixel
_SURENESS, _ROUGHNESS = 0.3, 0.1  # weights beside the statistics' 1


def inverted_images(
    model: nn.Module,
    shape: tuple[int, int, int],
    samples: int = 128,
    seed: int = 0,
    *,
    steps: int = 100,
    store: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Return images that have the statistics of a network's BatchNorm layers, for a `DriftMeter`.

    Smooth noise is changed by Adam, all pixels freely, to lower Σ over the layers of the distance
    between the images' mean and variance and the kept ones, the loss of a class given to each
    image, the same number of images for each class, up to one, and differences between neighbouring
    pixels. It costs `steps` passes forward and backward over the images, in float32.

    Source: DeepInversion, Yin et al., CVPR 2020, arXiv:1912.08795.

    Args:
        model: a classifier of images (B, C, H, W) with BatchNorm layers, before training, with its
            output layer; it comes back as it was.
        shape: of one image as the model takes it, (channels, height, width).
        samples: how many images; 32 or more, as statistics of few say little.
        seed: of the noise.
        steps: how often the images are changed.
        store: a file, ``*.safetensors``, or its URL, that keeps the images.
        progress: show it, on the first rank, where it takes more than a few seconds.

    Returns:
        (samples, channels, height, width) float32, on the CPU.

    Raises:
        TypeError: the model gives no logits (B, C) for a batch of images.
        ValueError: the model has no BatchNorm layer with statistics, it takes no images of this
            shape, it gives no numbers, its output layer was cut off, or a number is too small.
        ScoreMismatchError: `store` has images of another model, or others of this one.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        >>> inverted_images(nn.Sequential(body, nn.Linear(144, 2)), (3, 8, 8), 32, steps=2).shape
        torch.Size([32, 3, 8, 8])
    """
    check_natural("samples", samples, least=32)
    check_natural("steps", steps, least=1)
    model = unwrapped(model)
    if not _layers_of(model):
        raise ValueError(
            "the model has no BatchNorm layer that keeps statistics, so that no image can be made "
            "to have them; take drift.smooth_images, or the new task's own samples"
        )
    starts, count = smooth_images(shape, samples, seed), max(1, samples // _AT_ONCE)

    @torch.inference_mode(False)  # gradients are needed, whatever the caller is about
    def make() -> Tensor:
        device = home(model)
        parts = starts.to(device).tensor_split(count)
        places = torch.arange(samples, device=device).tensor_split(count)
        shown, total = progress and is_first_rank(), steps * len(parts)
        name = "making inverted images"
        with (
            preserved_rng(seed),
            frozen_model(model, torch.float32, device) as frozen,
            progress_bar(total, name, "steps", shown=shown, patient=True) as advance,
        ):
            check_has_head(frozen, lambda: _logits(frozen, parts[0][:1]))
            inverted = [
                _invert(frozen, *part, steps, advance) for part in zip(parts, places, strict=True)
            ]
            images = torch.cat(inverted).cpu()
        if not images.isfinite().all():
            raise ValueError(
                "the images became inf or NaN, as the model's outputs or the statistics in its "
                "BatchNorm layers are; take the model as it was before it diverged"
            )
        return images

    if store is None:
        return make()
    identity = {
        "kind": "inverted images",
        "model": fingerprint_model(model),
        "shape": list(shape),
        "samples": samples,
        "seed": seed,
        "steps": steps,
    }
    if count > 1:
        identity["scheme"] = _SCHEME
    return keep(store, identity, lambda: {"image": make()})["image"]


def _invert(
    model: nn.Module, images: Tensor, places: Tensor, steps: int, advance: Advance
) -> Tensor:
    """Change images, whose places among all tell their classes, for a number of steps."""
    _logits(model, images)  # a layout that the model's code can't do with is found out unrecorded
    with torch.enable_grad(), _statistics_of(model) as distances:
        images = images.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=_RATE)
        for _ in range(steps):
            distances.clear()
            logits = _logits(model, images)
            sureness = F.cross_entropy(logits, places % logits.shape[1])
            loss = torch.stack(distances).sum() + _SURENESS * sureness
            loss = loss + _ROUGHNESS * _roughness(images)
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            advance(1)
    return images.detach()


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        output = model(images)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"shape must be that of an image as the model takes it, got {tuple(images.shape[1:])}, "
            f"of which the model says: {first_line(error)}"
        ) from error
    try:
        logits = logits_of(output)
    except ValueError:
        logits = None
    if logits is None or logits.dim() != 2:
        raise TypeError(
            f"the model must return logits (B, C) for images {tuple(images.shape)}, got "
            f"{type(output).__name__}"
        )
    return logits.float()


def _roughness(images: Tensor) -> Tensor:
    """The mean squared difference of neighbouring pixels."""
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()


@contextmanager
def _statistics_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that each call of the model fills with its layers' distances from what they keep."""
    distances: list[Tensor] = []

    def compare(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0]
        over = [axis for axis in range(values.dim()) if axis != 1]
        mean, variance = values.mean(over), values.var(over, correction=0)
        distances.append(_norm(mean - layer.running_mean) + _norm(variance - layer.running_var))

    handles = [layer.register_forward_pre_hook(compare) for layer in _layers_of(model)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def _norm(difference: Tensor) -> Tensor:
    """The Euclidean norm, whose gradient at 0 is 0."""
    return (difference.square().sum() + 1e-8).sqrt()


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that keep statistics."""
    return [each for each in batch_norm_layers(model).values() if each.running_mean is not None]
