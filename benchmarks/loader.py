"""What FlowWeightedDataset and FlowSampler add to a DataLoader, for each batch of small samples.

`python -m benchmarks loader` times a bare shuffling DataLoader and the same with each of the two,
turn by turn, so that a slow moment of the machine slows all of them alike. The samples of a fourth
loader bring a weight that is looked up by hand: it shows what any further 0-d tensor costs in
PyTorch's collation and worker processes. The kinds of samples, the smallest first:

- one row of a tensor of tokens;
- one row of a Hugging Face data set of tokens, padded by a collator;
- a 32 × 32 image, cropped, flipped and normalised by Pillow as a CIFAR recipe does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, default_collate

from benchmarks.rows import row, write
from flowdata.dataset import FlowWeightedDataset
from flowdata.sampler import FlowSampler
from flowdata.targets.labels import IGNORE_INDEX

BATCH = 32


class ByHand(Dataset):
    """The wrapper that people write themselves: it gives a sample and its weight."""

    def __init__(self, dataset: Any, weights: torch.Tensor) -> None:
        self.dataset, self.weights = dataset, weights

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        return self.dataset[index], self.weights[index]


class Images(Dataset):
    """CIFAR-like images with the augmentation that fine-tuning recipes use."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.labels = rng.integers(0, 10, count).tolist()
        self.mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self.deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), 4)
        left, top = random.randrange(9), random.randrange(9)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(self.mean).div_(self.deviation), self.labels[index]


def tensor_rows(count: int) -> tuple[Any, Callable[[list[Any]], Any]]:
    """Rows of 128 tokens, one tensor holding all of them."""
    return TensorDataset(torch.arange(count * 128).view(count, 128)), default_collate


def text_rows(count: int) -> tuple[Any, Callable[[list[Any]], Any]]:
    """Tokenised texts of 64 to 192 tokens in a Hugging Face data set, and their collator."""
    import datasets

    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32_000, rng.integers(64, 193)).tolist() for _ in range(count)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}), pad


def image_rows(count: int) -> tuple[Any, Callable[[list[Any]], Any]]:
    """Small images and their labels."""
    return Images(count), default_collate


def pad(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Pad token rows to the longest; stack their weights if they have any."""
    rows = [sample[0] if isinstance(sample, tuple) else sample for sample in samples]
    ids = [torch.tensor(sample["input_ids"]) for sample in rows]
    labels = [torch.tensor(sample["labels"]) for sample in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    if isinstance(samples[0], tuple):
        batch["weight"] = torch.stack([weight for _, weight in samples])
    return batch


SAMPLES = {"tensor row": tensor_rows, "text row": text_rows, "image": image_rows}


def main(arguments: list[str]) -> None:
    """Print and store the additional cost for each kind of sample and number of workers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loader", description=__doc__)
    parser.add_argument("--count", type=int, default=3_200, help="samples in a pass")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2, 4])
    parser.add_argument("--dry-run", action="store_true", help="print, but keep no results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    rows = []
    for kind, make in SAMPLES.items():
        dataset, collate = make(options.count)
        weights = torch.rand(options.count, generator=torch.Generator().manual_seed(0))
        check(dataset, weights)
        for workers in options.workers:
            results = measure(kind, dataset, collate, weights, workers, options.repeats)
            rows += results
            for each in results:
                low, high = each["spread"]
                spread = f"{low:9.2f} … {high:9.2f}"
                print(
                    f"{each['what']:48} {each['median']:9.2f} {each['unit']:9} {spread}", flush=True
                )
    if not options.dry_run:
        command = " ".join(["python -m benchmarks loader", *arguments])
        print(write("loader", rows, command))


def check(dataset: Any, weights: torch.Tensor) -> None:
    """Check that weighted samples are the bare ones with their weights, alone and in batches."""
    indices = [3, 0, len(weights) - 1, 3]
    pairs = FlowWeightedDataset(dataset, weights)
    random.seed(0)
    expected = [(dataset[index], weights[index]) for index in indices]
    for draw in (lambda: [pairs[i] for i in indices], lambda: pairs.__getitems__(indices)):
        random.seed(0)
        for (sample, weight), (bare, its_weight) in zip(draw(), expected, strict=True):
            assert weight == its_weight
            torch.testing.assert_close(sample, bare, rtol=0, atol=0)


def measure(
    kind: str,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    weights: torch.Tensor,
    workers: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Return rows of a batch's microseconds: bare, and the extra ones of each other loader."""
    random_order = RandomSampler(dataset)
    variants = {
        "bare": (dataset, random_order),
        "FlowSampler": (dataset, FlowSampler(weights)),
        "FlowWeightedDataset": (FlowWeightedDataset(dataset, weights), random_order),
        "a weight by hand": (ByHand(dataset, weights), random_order),
    }
    rounds = []
    for number in range(repeats + 1):
        in_random_order = random.Random(number).sample(list(variants.items()), len(variants))
        loaders = {
            name: DataLoader(data, BATCH, sampler=sampler, collate_fn=collate, num_workers=workers)
            for name, (data, sampler) in in_random_order
        }
        times = one_by_one(loaders) if workers else in_lockstep(loaders)
        rounds += [times] * (number > 0)  # the first round warms up
    bare = [times["bare"] for times in rounds]
    where = f"{kind}, {workers} workers"
    rows = [row(f"{where}: bare", bare, "µs/batch", batch=BATCH)]
    for name in list(variants)[1:]:
        extras = [times[name] - times["bare"] for times in rounds]
        rows.append(row(f"{where}: {name} adds", extras, "µs/batch", batch=BATCH))
        share = [100 * extra / statistics.median(bare) for extra in extras]
        rows.append(row(f"{where}: {name} adds", share, "% of bare", batch=BATCH))
    return rows


def in_lockstep(loaders: dict[str, DataLoader]) -> dict[str, float]:
    """Return the median microseconds of each loader's batches; the loaders take turns by batch."""
    iterators = {name: iter(loader) for name, loader in loaders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(min(map(len, loaders.values()))):
        for name, iterator in iterators.items():
            start = perf_counter()
            next(iterator)
            seconds[name].append(perf_counter() - start)
    return {name: statistics.median(of_loader) * 1e6 for name, of_loader in seconds.items()}


def one_by_one(loaders: dict[str, DataLoader]) -> dict[str, float]:
    """Return the median microseconds of each loader's batches; the loaders run one by one.

    Workers prefetch, and would go on with that while another loader has its turn.
    """
    times = {}
    for name, loader in loaders.items():
        stretch, seconds = 4 * loader.num_workers, []
        iterator = iter(loader)
        for _ in range(1 + 2 * loader.num_workers):  # these were made while the workers started
            next(iterator)
        for _ in range((len(loader) - 1) // stretch - 1):
            start = perf_counter()
            for _ in range(stretch):
                next(iterator)
            seconds.append(perf_counter() - start)
        times[name] = statistics.median(seconds) / stretch * 1e6
    return times
