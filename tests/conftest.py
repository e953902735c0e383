import gc
import os

gc.disable()  # until all is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The coverage that `.ci/run --cov` asks for is not for the pytests that tests start.
    os.environ.pop("PYTEST_ADDOPTS", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import torch.utils.data  # noqa: E402


def pytest_collection_finish():
    """Set aside what the imports made, which lives as long as this process.

    A Trainer collects garbage after each run: half a second, if it goes through all of this again.
    Where that garbage holds a DataLoader that was left half read, each of its workers is waited for
    as long as PyTorch has it look for the end: 5 seconds.
    """
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    gc.collect()
    gc.freeze()
    gc.enable()
