"""Run the peers' own tests of loaders with a FlowSampler and a FlowWeightedDataset in place.

``python -m tests.peer_suites FOLDER`` runs ``test/stateful_dataloader`` of torchdata and
``tests/test_data_loader.py`` of accelerate, out of the checkouts ``FOLDER/data`` and
``FOLDER/accelerate``, which are not part of this repository. They need the packages `parameterized`
and `expecttest`. Whatever is shuffled there is drawn by a FlowSampler here; tests of what it does
not claim, such as an order without shuffling, are left out by name, with the reason.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowdata.dataset import FlowWeightedDataset
from flowdata.sampler import FlowSampler

ROOT = Path(__file__).parent.parent
SOURCES = {
    "data": "https://github.com/pytorch/data",
    "accelerate": "https://github.com/huggingface/accelerate",
}
FILES = {
    "data": ["test_sampler.py", "test_state_dict.py", "test_dataloader.py"],
    "accelerate": ["test_data_loader.py"],
}
FOLDERS = {"data": "test/stateful_dataloader", "accelerate": "tests"}
UNSHUFFLED = "checks an order without shuffling"
# Tests that are about something else than what the two classes claim, and the reason.
LEFT_OUT = {
    "test_initialization_StatefulDistributedSampler": "names attributes of torchdata's sampler",
    "test_sampler_state_dict": "sets torchdata's `yielded`",
    "test_sampler_load_state_dict": "loads torchdata's `yielded`",
    "test_sampler_next_yielded": "loads torchdata's `yielded`",
    "test_data_order_without_shuffle": UNSHUFFLED,
    "test_skip_data_loader": UNSHUFFLED,
    "test_skip_first_batches": UNSHUFFLED,
    "test_ensure_dataloader_gets_cleaned_up": UNSHUFFLED,
    "test_growing_dataset": "lets a data set grow after its weights are known",
    "test_random_sampler_len": "counts the draws of torch's RandomSampler",
}


CALLS = {"since the last test": 0}


def sampler_of(dataset, replacement=False, num_samples=None, generator=None, **options):
    """A FlowSampler that is called as torch's and the peers' samplers are."""
    CALLS["since the last test"] += 1
    for name in ("shuffle", "data_seed"):
        options.pop(name, None)
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    count = dataset if isinstance(dataset, int) else len(dataset)
    options = {"num_replicas": 1, "rank": 0, "seed": seed, **options}
    return FlowSampler(torch.ones(count), num_samples, replacement=replacement, **options)


def weighted(dataset_class):
    """A data set's class whose instances carry a weight with each sample."""

    def make(*args, **options):
        CALLS["since the last test"] += 1
        dataset = dataset_class(*args, **options)
        return FlowWeightedDataset(dataset, torch.linspace(0.1, 1, len(dataset)))

    return make


class Substitution:
    """A plugin of pytest that puts this library's classes into the peers' tests."""

    def __init__(self, suite):
        self.suite, self.clients = suite, 0

    def pytest_collection_modifyitems(self, config, items):
        """Replace the samplers and data sets in the modules collected; leave out by name."""
        for module in {item.module for item in items}:
            for name in ("StatefulDistributedSampler", "DummySampler", "SeedableRandomSampler"):
                if hasattr(module, name):
                    setattr(module, name, sampler_of)
            if hasattr(module, "DummyMapDataset"):
                module.DummyMapDataset = weighted(module.DummyMapDataset)
        import torchdata.stateful_dataloader.stateful_dataloader as stateful
        from torch.utils.data import dataloader as plain

        for loaders in (plain, stateful):
            loaders.RandomSampler = sampler_of
            if self.suite == "accelerate":  # whose loaders hardly ever shuffle
                loaders.SequentialSampler = sampler_of
        left_out = [item for item in items if item.name in LEFT_OUT]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        for name in sorted({item.name for item in left_out}):
            print(f"left out: {name}, {LEFT_OUT[name]}")

    def pytest_runtest_teardown(self):
        """Note whether the test has used one of the classes."""
        self.clients += CALLS["since the last test"] > 0
        CALLS["since the last test"] = 0

    def pytest_terminal_summary(self, terminalreporter):
        """Say how many tests were clients of this library at all."""
        terminalreporter.line(f"{self.clients} tests used the classes of flowdata")


def run(suite, folder, options):
    """Run one suite in this process; return pytest's exit code."""
    tests = folder / suite / FOLDERS[suite]
    files = [str(tests / name) for name in FILES[suite]]
    base = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir"]
    # A package of the peers is called `tests`, as this one is; files outside of a package are
    # imported by their names, which spawned workers then find.
    mode = "importlib" if (tests / "__init__.py").exists() else "prepend"
    base += [str(folder / suite), f"--import-mode={mode}"]
    return pytest.main([*base, *files, *options], [Substitution(suite)])


def main():
    """Run both suites, each in a process of its own; the exit code is 0 if all tests passed."""
    if len(sys.argv) > 3 and sys.argv[1] == "--suite":
        sys.exit(int(run(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])))
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.peer_suites FOLDER [pytest's options]")
    folder = Path(sys.argv[1]).resolve()
    for suite, address in SOURCES.items():
        if not (folder / suite / FOLDERS[suite]).is_dir():
            sys.exit(f"{folder / suite} is missing: git clone {address} {folder / suite}")
    codes = []
    for suite in SOURCES:
        print(f"\n{suite}", flush=True)
        command = [sys.executable, "-m", "tests.peer_suites", "--suite", suite, str(folder)]
        codes.append(subprocess.run([*command, *sys.argv[2:]], cwd=ROOT, check=False).returncode)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
