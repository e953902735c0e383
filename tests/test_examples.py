"""Every example runs, at a tiny size, as FLOW and as the plain loop it says it differs from."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LANGUAGE = ("--samples", "12", "--steps", "2", "--data", "missing.jsonl", "--output", "out")
RUNS = {
    "custom_loop": ("--epochs", "5"),
    "hf_trainer": LANGUAGE,
    "trl_sft": LANGUAGE,
    "lightning": LANGUAGE,
    "llama_lora": LANGUAGE,
}
RESNET = ("--samples", "40", "--size", "32", "--epochs", "1", "--data", "missing.npz")


def run(path, options, folder, *places):
    search = os.pathsep.join(map(str, [EXAMPLES, EXAMPLES.parent, *places]))
    done = subprocess.run(
        [sys.executable, str(path), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_here(path, options, folder, monkeypatch, capsys):
    """The same in this process, which has imported the frameworks already."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(path), run_name="example")["main"](list(options))
    return capsys.readouterr().out


def plain_version(source):
    """The example without FLOW: marked lines dropped, or replaced by what their mark says."""
    lines, waiting = [], None
    for line in source.splitlines():
        code, _, mark = line.partition("  # FLOW")
        indent = code[: len(code) - len(code.lstrip())]
        if line.lstrip().startswith("# plain: "):
            waiting = line.replace("# plain: ", "")
        elif not _:
            lines.append(line)
        elif "plain: " in mark or waiting:
            lines.append(waiting or indent + mark.split("plain: ")[1])
            waiting = None
    text = "\n".join(lines)
    text = text.replace(
        "import FlowTrainer", "import FlowTrainer\nfrom transformers import Trainer"
    )
    return text.replace("from trl import SFTConfig", "from trl import SFTConfig, SFTTrainer")


def accuracies(output):
    line = next(line for line in output.splitlines() if line.startswith("fine-tuned"))
    return [float(word.strip(",")) for word in line.split() if word.strip(",")[0].isdigit()]


@pytest.mark.parametrize("name", list(RUNS))
def test_a_three_line_diff_turns_the_plain_loop_into_flow(name, tmp_path, monkeypatch, capsys):
    if name == "trl_sft":
        pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    assert 0 < sum("  # FLOW" in line for line in source.splitlines()) <= 3
    plain = plain_version(source)
    body = plain.partition("\ndef ")[2]
    for flow in ("Flow", "weighted_mean", "LossScorer(model).score", "scores="):
        assert flow not in body.partition('"""\n')[2]
    plain_path = tmp_path / f"plain_{name}.py"
    plain_path.write_text(plain)
    outputs = [
        run_here(where, RUNS[name], tmp_path, monkeypatch, capsys) for where in (path, plain_path)
    ]
    if name == "custom_loop":
        flow, plain = map(accuracies, outputs)
        assert flow[0] > plain[0] + 0.1  # forgets less
        assert sum(flow) > sum(plain)
    else:
        assert all("loss of the first" in output for output in outputs)
        assert "missing.jsonl is missing" in outputs[0]


def test_companions_add_to_flow(tmp_path, monkeypatch, capsys):
    path = EXAMPLES / "companions.py"
    output = run_here(path, ("--epochs", "2"), tmp_path, monkeypatch, capsys)
    for name in ("pre-trained", "FLOW ", "FLOW + l2", "FLOW + WiSE-FT"):
        assert f"\n{name}" in output


@pytest.mark.parametrize("name", [*RUNS, "companions", "small", "torchvision_resnet"])
def test_every_example_is_short_enough_to_be_read(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


@pytest.mark.slow
def test_the_resnet_recipe_runs_in_an_environment_of_its_own(tmp_path):
    """torchvision breaks peft, trl and lightning beside CPU builds of torch, so it stays apart."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    place = os.environ.get("FLOWDATA_TORCHVISION") or str(tmp_path / "apart")
    if not Path(place).exists():
        wanted = "torchvision==0.28.*"  # the one for torch 2.13
        done = subprocess.run(
            [*install, place, wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"torchvision could not be installed: {done.stderr[-300:]}")
    path = EXAMPLES / "torchvision_resnet.py"
    plain_path = tmp_path / "plain_resnet.py"
    plain_path.write_text(plain_version(path.read_text()))
    assert sum("  # FLOW" in line for line in path.read_text().splitlines()) == 3
    for where in (path, plain_path):
        output = run(where, RESNET, tmp_path, place)
        assert "head again" in output
