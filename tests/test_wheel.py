"""The wheel: what pip installs, away from the repository."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel, beside the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    Path(place, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # after the wheel
    return folder / "env"


def elsewhere(tmp_path):
    """Options under which the repository can't be imported by accident."""
    paths = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"cwd": tmp_path, "env": paths}


def test_the_study_is_in_the_wheel(environment, tmp_path):
    code = "import flowdata, flowdata.study; print(flowdata.study.__file__)"
    path = run(environment / "bin" / "python", "-c", code, **elsewhere(tmp_path))
    assert Path(path.strip()).is_relative_to(environment)


def test_the_demo_runs_from_the_wheel(environment, tmp_path):
    code = (
        "from dataclasses import replace\n"
        "from flowdata.cli import demo_run, main\n"
        "demo_run.RATES = (0.003, 0.03)  # fewer, and fewer epochs\n"
        "demo_run._SIZES = replace(demo_run._SIZES, epochs=3)\n"
        "demo_run._PRETRAINING_EPOCHS = 15\n"
        "main(['demo', '--seeds', '1'])"
    )
    printed = run(environment / "bin" / "python", "-c", code, **elsewhere(tmp_path))
    assert "at equal learning" in printed
    assert (tmp_path / "flowdata-demo.png").stat().st_size > 10_000


def test_a_report_is_written_from_the_wheel(environment, tmp_path):
    code = (
        "import torch, flowdata.report\n"
        "scores = flowdata.Scores(torch.tensor([1.0, 2.0]))\n"
        "print(flowdata.report.write_report(scores, 'here').page)"
    )
    run(environment / "bin" / "python", "-c", code, **elsewhere(tmp_path))
    page = (tmp_path / "here" / "report.html").read_text("utf-8")
    assert "const data = await unpack" in page  # the script and the styles are in the wheel
    assert "#explorer" in page
