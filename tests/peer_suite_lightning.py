"""Run Lightning's own tests of loaders and distributed samplers with a FlowSampler in place.

``python -m tests.peer_suite_lightning FOLDER`` runs them out of the checkout FOLDER of
https://github.com/Lightning-AI/pytorch-lightning, which is not part of this repository, against the
Lightning that is installed; check out its tag. Wherever Lightning or a test makes a shuffled
DistributedSampler, a FlowSampler is made here; tests of what it does not claim are left out by
name, with the reason.
"""

import sys
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from flowdata.sampler import FlowSampler

SOURCE = "https://github.com/Lightning-AI/pytorch-lightning"
FILES = [
    "tests_pytorch/overrides/test_distributed.py",
    "tests_pytorch/trainer/test_dataloaders.py",
    "tests_pytorch/trainer/connectors/test_data_connector.py",
    "tests_pytorch/trainer/flags/test_overfit_batches.py",
    "tests_pytorch/utilities/test_combined_loader.py",
    "tests_pytorch/loops/test_prediction_loop.py",
    "tests_fabric/test_fabric.py",
    "tests_fabric/test_wrappers.py",
]
# Tests that are about something else than what a FlowSampler claims, and the reason.
LEFT_OUT = {
    "test_unrepeated_distributed_sampler": "names the samples of torch's random order",
    "test_setup_dataloaders_distributed_sampler_shuffle": "names the samples of torch's order",
}

CLIENTS = []  # the tests whose samplers were FlowSamplers


class AsDistributed(type):
    """Makes `isinstance` and calls as torch's sampler has them."""

    def __call__(cls, dataset, num_replicas=None, rank=None, shuffle=True, seed=0, drop_last=False):
        options = {"num_replicas": num_replicas, "rank": rank, "seed": seed, "drop_last": drop_last}
        if not shuffle:
            return DistributedSampler(dataset, shuffle=False, **options)
        CLIENTS[-1] = True
        return FlowSampler(torch.ones(len(dataset)), replacement=False, **options)

    def __instancecheck__(cls, instance):
        return isinstance(instance, DistributedSampler)


class InPlace(metaclass=AsDistributed):
    """What Lightning and its tests call DistributedSampler."""


class Substitution:
    """A plugin of pytest that puts the sampler into Lightning and its tests."""

    def pytest_collection_modifyitems(self, config, items):
        """Replace the sampler in the modules collected; leave out tests by name."""
        from lightning.fabric import fabric
        from lightning.pytorch.trainer.connectors import data_connector

        for module in {fabric, data_connector, *(item.module for item in items)}:
            if hasattr(module, "DistributedSampler"):
                module.DistributedSampler = InPlace
        left_out = [item for item in items if item.originalname in LEFT_OUT]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        for name, reason in LEFT_OUT.items():
            print(f"left out: {name}, which {reason}")

    def pytest_runtest_setup(self):
        """Begin to note whether the test uses a FlowSampler."""
        CLIENTS.append(False)

    def pytest_terminal_summary(self, terminalreporter):
        """Say how many tests were clients of this library at all."""
        terminalreporter.line(f"{sum(CLIENTS)} tests used a FlowSampler")


def main():
    """Run the tests in this process and exit with pytest's code."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.peer_suite_lightning FOLDER [pytest's options]")
    folder = Path(sys.argv[1]).resolve()
    tests = folder / "tests"
    for name in FILES:
        if not (tests / name).is_file():
            sys.exit(
                f"{tests / name} is missing: git clone --branch {lightning.__version__} {SOURCE} "
                f"{folder}"
            )
    sys.path.insert(0, str(tests))
    files = [str(tests / name) for name in FILES]
    base = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-c", "/dev/null"]
    options = [*base, "--rootdir", str(tests), *files, *sys.argv[2:]]
    sys.exit(int(pytest.main(options, [Substitution()])))


if __name__ == "__main__":
    main()
