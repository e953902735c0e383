"""The recipes for clusters: Ray itself where it is installed, Slurm's script outside Slurm."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from flowdata import Scores
from flowdata.cli.parser import parse_options
from tests.forks import bits
from tests.launched import wait_for
from tests.test_cli import run
from tests.test_growing import model_folder, rows_of, write
from tests.test_text import tokenizer

__all__ = ["model_folder", "tokenizer"]  # the fixtures
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm_score.sh"
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# What stands in for Slurm, which takes a cluster: a step is a process of this machine.
SLURM = {
    "srun": 'echo $$ > "$STANDINS/step"; exec "$@"',
    "scancel": 'kill "${1/--signal=/-}" "$(cat "$STANDINS/step")"',
    "scontrol": '[[ $1 = show ]] && echo localhost || echo "$@" > "$STANDINS/requeued"',
}


def as_slurm_starts_it(folder, *arguments, **commands):
    """The script's process, with the environment that Slurm gives a job's first node."""
    for name, text in (SLURM | commands).items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    environment = {
        **ALONE,
        "STANDINS": str(folder),
        "PATH": os.pathsep.join(
            [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", rows_of(600))


def test_ray_goes_on_with_the_same_bits_when_a_worker_is_killed(
    capsys, model_folder, data, tmp_path
):
    pytest.importorskip("ray.train", reason='the recipe for Ray takes: pip install "ray[train]"')
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray_job", model_folder, data, tmp_path],
        cwd=ROOT,
        env={**ALONE, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "killed").read_text() == "2"
    lacking, packs = json.loads((tmp_path / "lacking").read_text())
    assert 0 < lacking < packs
    assert run(capsys, "score", model_folder, data, "--store", tmp_path / "alone")[0] == 0
    shared, alone = Scores.load(tmp_path / "scores"), Scores.load(tmp_path / "alone")
    assert bits(shared) == bits(alone)
    assert shared.metadata["identity"] == alone.metadata["identity"]


def test_slurm_starts_a_command_that_torchrun_and_flowdata_understand(tmp_path):
    job = as_slurm_starts_it(
        tmp_path, "model", "my data.jsonl", "--store", "s", srun='printf "%s\\n" "$@"'
    )
    torchrun, *words = job.communicate(timeout=60)[0].splitlines()
    assert (job.returncode, torchrun) == (0, "torchrun")
    launch = get_args_parser().parse_args(words)
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("1", "2", 3)
    assert re.fullmatch(r"localhost:2\d{4}", launch.rdzv_endpoint)
    assert (launch.module, launch.training_script) == (True, "flowdata")
    options, _ = parse_options(launch.training_script_args)
    assert (options.command, options.data, options.store) == ("score", "my data.jsonl", "s")


@pytest.mark.parametrize(
    ("number", "code", "is_requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)]
)
def test_slurm_job_ends_its_step_before_it_is_requeued(tmp_path, number, code, is_requeued):
    step = 'echo $$ > "$STANDINS/step"; trap "sleep 0.1; touch $STANDINS/ended; exit 1" TERM; '
    step += 'touch "$STANDINS/began"; while true; do sleep 0.01; done'
    too_early = "[[ $1 = show || -e $STANDINS/ended ]] || exit 1; "
    job = as_slurm_starts_it(tmp_path, srun=step, scontrol=too_early + SLURM["scontrol"])
    wait_for(tmp_path / "began")
    job.send_signal(number)
    assert job.communicate(timeout=60)[0] == ""
    assert job.returncode == code
    assert (tmp_path / "ended").exists()
    assert (tmp_path / "requeued").exists() == is_requeued


def test_slurm_job_that_fails_is_not_requeued(tmp_path):
    job = as_slurm_starts_it(tmp_path, srun="exit 3")
    job.communicate(timeout=60)
    assert job.returncode == 3
    assert not (tmp_path / "requeued").exists()


@pytest.mark.chaos
def test_slurm_job_that_is_stopped_goes_on_with_the_same_bits(capsys, model_folder, tmp_path):
    data, store = write(tmp_path / "data.jsonl", rows_of(20_000)), tmp_path / "scores"
    arguments = (model_folder, data, "--store", store, "--max-tokens", 1024)
    job = as_slurm_starts_it(tmp_path, *arguments)
    wait_for(store / "parts", seconds=400)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert re.search(r"stopped with at least .* samples kept in", output), output
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    again = as_slurm_starts_it(tmp_path, *arguments)
    output = again.communicate(timeout=500)[0]
    assert again.returncode == 0, output
    alone = ("score", model_folder, data, "--store", tmp_path / "alone", "--max-tokens", 1024)
    assert run(capsys, *alone)[0] == 0
    assert bits(Scores.load(store)) == bits(Scores.load(tmp_path / "alone"))
