"""`python -m benchmarks gpu` is tried whole where there is no GPU, so that none is wasted on it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import PARTS, goals, scoring
from benchmarks.gpu.parts import Setting, run_part
from benchmarks.scoring import peers
from tests.models import tiny_llama, token_samples

REPOSITORY = Path(__file__).parents[1]


def setting(tmp_path, seconds):
    return Setting("cpu", True, tmp_path, tmp_path, time.monotonic() + seconds)


def run_tiny(output, *options, **variables):
    """Run the command as on a CPU; its parts' rows."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tiny", "--output", output, *options]
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    ((result),) = json.loads((output / "gpu.json").read_text())
    assert result["command"].startswith("python -m benchmarks gpu --tiny")
    assert result["machine"]["gpu"].startswith("none")
    assert not [row for row in result["rows"] if "error" in row]
    return result["rows"]


# Everything beyond PyTorch, transformers and Triton that the command could ask for.
BEYOND = ("datasets", "torchdata", "trl", "accelerate", "peft", "pytest", "lm_eval", "vllm")
COMPILER = ("gcc", "cc", "g++", "c++", "as", "ld")


def test_every_part_runs_where_pytorch_transformers_and_triton_are_all_there_is(tmp_path):
    # As if none were installed: not to be imported, nor to be found. No git either.
    hide = f"import sys\nsys.modules.update(dict.fromkeys({BEYOND}))\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    programs, output = tmp_path / "bin", tmp_path / "rows"
    programs.mkdir()
    for name, place in ((name, shutil.which(name)) for name in COMPILER):
        if place:
            (programs / name).symlink_to(place)
    rows = run_tiny(output, "--minutes", "8", PYTHONPATH=str(tmp_path), PATH=str(programs))
    assert {row["part"] for row in rows} == set(PARTS)
    loops = {row["what"] for row in rows if row["part"] in ("scoring", "compiled")}
    assert {"llama-1b, 128k, 50% completions: flowdata, compiled"} <= loops
    left_out = {row["what"]: row["left_out"] for row in rows if "left_out" in row}
    assert left_out["tests"] == "pytest is not installed"
    assert left_out["trainer"] == "accelerate is not installed"
    assert (output / "trace-llama-1b.json.gz").stat().st_size > 1000


def test_tests_and_trainers_run_where_they_are_installed(tmp_path):
    rows = run_tiny(tmp_path, "--parts", "checks", "steps")
    assert not {"tests", "trainer"} & {row["what"] for row in rows if "left_out" in row}
    assert "| every test that needs a GPU passes |" in (tmp_path / "summary.md").read_text()


def test_without_a_gpu_it_measures_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--output", tmp_path]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, cwd=REPOSITORY, env=hidden, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "no GPU is here; --tiny tries the command on a CPU\n"
    assert not list(tmp_path.iterdir())


def rows_of(part, tmp_path, seconds=60):
    machine, *rows = run_part(part, setting(tmp_path, seconds))
    assert "machine" in machine
    return rows


def test_every_loop_is_measured_once_on_every_shape():
    loops = {}
    for case in scoring.CASES:
        loops.setdefault(case[:3], []).extend(case.loops)
    assert all(len(each) == len(set(each)) for each in loops.values())
    del loops["gemma2-2b", 256000, 0.5]  # the same as Gemma's but for its softcaps
    assert all({"flowdata", *scoring.PEERS} <= set(each) for each in loops.values())


def test_without_an_installed_loop_no_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "make_model", None)
    monkeypatch.setattr(scoring, "is_installed", lambda loop: False)
    assert not list(scoring.measure(setting(tmp_path, 60)))


def test_an_error_of_a_part_is_a_row_and_what_came_before_stays(tmp_path):
    def part(setting):
        yield {"what": "first", "median": 1.0}
        raise SystemExit("other losses")

    first, error = rows_of(part, tmp_path)
    assert first == {"what": "first", "median": 1.0}
    assert error == {"what": "the rest of this part", "error": "SystemExit: other losses"}


def test_a_part_that_dies_is_a_row(tmp_path):
    def part(setting):
        yield {"what": "first"}
        os.kill(os.getpid(), signal.SIGKILL)

    assert rows_of(part, tmp_path)[1]["error"] == "exit code -9"


def test_a_part_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.parts._LEEWAY", 0.5)

    def part(setting):
        yield {"what": "first"}
        time.sleep(600)

    start = time.monotonic()
    assert rows_of(part, tmp_path, seconds=4)[-1]["error"] == "stopped at its limit"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("speed", "met"), [(150.0, "yes"), (90.0, "no")])
def test_the_summary_says_which_goals_were_met(speed, met):
    shared = {"part": "scoring", "share_of_matmul": 0.7}
    summary = goals.summarize(
        [
            {"what": "a: flowdata", "median": speed, **shared},
            {"what": "a: usual loop", "median": 100.0, **shared},
            {"part": "scoring", "what": "a: TRL", "left_out": "trl is not installed"},
            {"part": "head", "what": "the rest of this part", "error": "ValueError: no\nroom"},
        ]
    )
    assert f"times the nearest, a: usual loop | {met} |" in summary
    assert "reaches 60 % of the matrix products' rate | a 70% | yes |" in summary
    assert "| weights cost at most 3 % of a training step | – | not measured |" in summary
    assert "- head, the rest of this part: room" in summary


class PretendLLM:
    """As vLLM documents its class; the log-probabilities are transformers'."""

    loads = 0

    def __init__(self, *, model, dtype, **_):
        from transformers import AutoModelForCausalLM

        PretendLLM.loads += 1
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert sampling_params["prompt_logprobs"] == 0
        return [self.read(torch.tensor(prompt["prompt_token_ids"])) for prompt in prompts]

    @torch.no_grad()
    def read(self, ids):
        table = self.model(ids[None]).logits[0].log_softmax(-1).tolist()
        pairs = zip(ids[1:].tolist(), table, strict=False)
        logprobs = [{token: SimpleNamespace(logprob=row[token])} for token, row in pairs]
        return SimpleNamespace(prompt_logprobs=[None, *logprobs])


def test_losses_are_read_from_what_vllm_documents(monkeypatch):
    module = SimpleNamespace(LLM=PretendLLM, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    model, samples = tiny_llama().eval(), token_samples(3)
    first, second = (peers.vllm(model, samples) for _ in range(2))
    assert torch.equal(first, second)
    assert PretendLLM.loads == 1
    torch.testing.assert_close(first, peers.one_at_a_time(model, samples))
