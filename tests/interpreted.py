"""Test files of Triton kernels, run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def check_in_interpreter(file):
    """Run a test file in a process of its own: Triton has to be told before it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", file],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
