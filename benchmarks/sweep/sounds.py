"""Samples of sound: waves, or features as an extractor makes them, in the layouts models take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.architectures import Kind
from benchmarks.sweep.building import CLASSES
from benchmarks.sweep.samples import LENGTHS, Data, Words, stacked
from benchmarks.sweep.trials import first_that_runs

_WAVES = (9600, 4800, 16000, 5200, 5200, 7040, 12000, 6400, 6400, 8000, 14400, 4960)  # at 16 kHz
_FRAMES = (90, 40, 150, 44, 44, 66, 120, 60, 60, 76, 136, 42)  # of 10 ms
_TARGETS = (6, 2, 8, 3, 3, 4, 6, 3, 4, 5, 7, 2)


def sound_samples(model: nn.Module, kind: Kind) -> Data:
    """Return the first layout of sounds and labels that a model takes.

    Raises:
        NotBuildable: it takes none of them.
    """
    make = partial(_make, model, kind)
    frames = [partial(make, "input_features", width=width) for width in _widths(model.config)]
    whole = [
        partial(make, "input_features", shape=(mels, 2 * positions))
        for mels, positions in _whole_shapes(model.config)
    ]
    spectrum = [
        partial(make, "input_values", shape=(length, mels))
        for length, mels in _spectra(model.config)
    ]
    waves = [partial(make, "input_values"), partial(make, "input_values", mask=False)]
    return first_that_runs(model, kind, [*spectrum, *whole, *frames, *waves])


def _make(
    model: nn.Module,
    kind: Kind,
    field: str,
    *,
    width: int = 0,
    shape: tuple[int, int] | None = None,
    mask: bool = True,
) -> Data:
    """Waves of unlike lengths; with a `width` frames of them; with a `shape` whole features."""
    generator = torch.Generator().manual_seed(6)
    words = Words(model.config, 6)
    samples: list[dict[str, Any]] = []
    for index in range(len(LENGTHS)):
        size = shape or ((_FRAMES[index], width) if width else (_WAVES[index],))
        sample: dict[str, Any] = {field: torch.randn(size, generator=generator)}
        if kind.name == "audio_classification":
            sample["labels"] = index % CLASSES
        else:
            sample["labels"] = words.text(_TARGETS[index])
        samples.append(sample)

    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = stacked(samples, {})
        if mask and shape is None:
            ones = [{"m": torch.ones(len(sample[field]), dtype=torch.long)} for sample in samples]
            batch["attention_mask"] = stacked(ones, {})["m"]
        return batch

    layout = "whole features" if shape else "frames" if width else "waves"
    return Data(samples, collate, layout + ("" if mask or shape else " without a mask"))


def _parts(config: Any) -> list[Any]:
    names = ("encoder_config", "audio_config", "encoder")
    return [config, *filter(None, (getattr(config, name, None) for name in names))]


def _numbers(config: Any, *names: str) -> list[int]:
    values = [getattr(part, name, None) for part in _parts(config) for name in names]
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def _widths(config: Any) -> list[int]:
    """How wide a frame may be: mel bands, stacked ones, or what the settings call them."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
    return _numbers(config, *names, "feat_dim")


def _whole_shapes(config: Any) -> list[tuple[int, int]]:
    mels, positions = _numbers(config, "num_mel_bins"), _numbers(config, "max_source_positions")
    return [(mel, count) for mel in mels for count in positions if count <= 4000]


def _spectra(config: Any) -> list[tuple[int, int]]:
    mels, lengths = _numbers(config, "num_mel_bins"), _numbers(config, "max_length")
    return [(length, mel) for mel in mels for length in lengths]
