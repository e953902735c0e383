"""The package as a whole: what an import costs and brings, and what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

import flowdata
from tests.models import TinyResNet, images

ROOT = Path(__file__).parent.parent


def seconds_to_import(name):
    code = (
        "import time; start = time.perf_counter(); "
        f"import {name}; print(time.perf_counter() - start)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )


def test_importing_takes_little_more_than_importing_torch():
    pairs = [(seconds_to_import("torch"), seconds_to_import("flowdata")) for _ in range(5)]
    torch_alone, with_flowdata = (min(column) for column in zip(*pairs, strict=True))
    assert with_flowdata < 1.5 * torch_alone, pairs


def test_importing_brings_no_framework():
    heavy = ["transformers", "datasets", "matplotlib", "peft", "trl", "lightning", "pyarrow"]
    code = f"import sys, flowdata; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in flowdata.__all__:
        assert getattr(flowdata, name).__doc__


def test_doctests_of_the_package():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--doctest-modules",
            "flowdata",
            "--ignore=flowdata/head/triton.py",  # needs Triton, has no examples
            *("-p", "no:cacheprovider", "-n", "0"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def test_the_readmes_five_lines_run(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    model = TinyResNet()
    names = {
        "flowdata": flowdata,
        "DataLoader": DataLoader,
        "model": model,
        "dataset": images(),
        "collate": default_collate,
        "per_sample_loss": lambda model, batch: F.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        ),
    }
    exec(code, names)
    names["loss"].backward()
    assert model.head.weight.grad is not None
    assert sum(len(labels) for _, labels in names["loader"]) == 20
    assert len(flowdata.Scores.load("scores")) == 20
