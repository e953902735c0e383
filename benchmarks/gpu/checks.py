"""The tests that need a GPU, a row for each file and for each test that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Row, Setting

TESTS = Path(__file__).parents[2] / "tests"
FILES = ("test_gpu.py", "test_head_triton.py", "test_kl_triton.py")


def measure(setting: Setting) -> Iterator[Row]:
    """Yield how many tests passed, failed and were skipped, and why each that failed did."""
    if find_spec("pytest") is None:
        yield {"what": "tests", "left_out": "pytest is not installed"}
        return
    for name in FILES:
        results = Results()
        run_tests(TESTS / name, setting.output / f"{name}.txt", results)
        counts = {kind: results.counts[kind] for kind in ("passed", "failed", "skipped")}
        yield {"what": name, **counts}
        for test, reason in results.failures.items():
            yield {"what": test, "error": reason}


class Results:
    """A plugin of pytest that counts what becomes of tests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take one phase of one test."""
        if report.when == "call" or report.outcome != "passed":
            self._take(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Take a file that can't be collected, or is skipped whole."""
        if report.outcome != "passed":
            self._take(report)

    def _take(self, report: Any) -> None:
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures[report.nodeid] = str(report.longrepr)[-1500:]


def run_tests(file: Path, report: Path, results: Results) -> None:
    """Run a file's tests in this process, and write what pytest prints."""
    import contextlib

    import pytest

    # Neither the options of pyproject.toml nor the plugins that they need.
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", str(file)]
    with report.open("w") as output, contextlib.redirect_stdout(output):
        pytest.main(arguments, plugins=[results])
