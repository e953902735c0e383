"""The tests that need a GPU, a row for each as it ends, so that a limit loses none that ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from benchmarks.gpu.parts import Row, Setting

TESTS = Path(__file__).parents[2] / "tests"
FILES = ("test_head_triton.py", "test_kl_triton.py", "test_gpu.py")  # the kernels' own first


def measure(setting: Setting) -> Iterator[Row]:
    """Yield what became of each test, and why it failed."""
    if find_spec("pytest") is None:
        yield {"what": "tests", "left_out": "pytest is not installed"}
        return
    results: SimpleQueue[Row | None] = SimpleQueue()
    thread = Thread(target=run_tests, args=(setting.output / "tests.txt", results), daemon=True)
    thread.start()
    while (row := results.get()) is not None:
        yield row
    thread.join()


class Results:
    """A plugin of pytest that passes on what becomes of tests."""

    def __init__(self, results: SimpleQueue[Row | None]) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take one phase of one test."""
        if report.when == "call" or report.outcome != "passed":
            self._take(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Take a file that can't be collected, or is skipped whole."""
        if report.outcome != "passed":
            self._take(report)

    def _take(self, report: Any) -> None:
        row = {"what": report.nodeid, "outcome": report.outcome}
        if report.outcome == "failed":
            row["error"] = str(report.longrepr)[-1500:]
        self.results.put(row)


def run_tests(report: Path, results: SimpleQueue[Row | None]) -> None:
    """Run the tests in this process, and write what pytest prints; None tells their end."""
    import pytest

    # Neither the options of pyproject.toml nor the plugins that they need.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
    files = [str(TESTS / name) for name in FILES]
    try:
        with report.open("w") as output, contextlib.redirect_stdout(output):
            pytest.main([*options, *files], plugins=[Results(results)])
    except Exception as error:  # pytest's own, or of the file
        results.put({"what": "tests", "error": f"{type(error).__name__}: {error}"})
    finally:
        results.put(None)
