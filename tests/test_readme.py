"""The README: its blocks run as they stand, in order, in an empty folder."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

import flowdata
from flowdata.cli import main
from flowdata.text import load_model
from tests.chat_templates import tokenizer_with
from tests.models import tiny_llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TRIED = ("Install", "A language model", "An image model, in a loop of your own", "More")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of this name may stand in for the hub's
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def section(title):
    """The blocks under a heading: (language, code)."""
    text = README.partition(f"\n## {title}")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_shell(code):
    """Run a block in bash; the commands of flowdata in this process, which has it loaded."""
    others = [line for line in code.splitlines() if not line.startswith("flowdata ")]
    subprocess.run(["bash", "-euc", "\n".join(others)], check=True)
    for line in code.splitlines():
        if line.startswith("flowdata "):
            assert main(line.partition("#")[0].split()[1:]) == 0


def save_stand_in(folder):
    tokenizer = tokenizer_with(TEMPLATE)
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_on_the_hub():
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(f"{hub}/api/models/{MODEL}", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["stand-in", pytest.param("hub", marks=pytest.mark.slow)])
def put_model(request, monkeypatch):
    """Puts the stand-in for the model into a folder, or leaves the name to the hub."""
    pytest.importorskip("transformers")
    if request.param == "stand-in":
        return lambda folder: save_stand_in(folder / MODEL)
    if not is_on_the_hub():
        pytest.skip(f"no network: {MODEL} can't be reached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # see conftest.py
    return lambda folder: None


def test_it_fits_on_a_page_and_every_block_is_tried():
    assert len(README.splitlines()) <= 170
    blocks = [block for title in TRIED for block in section(title)]
    assert len(blocks) == README.count("\n```") / 2


def test_the_language_models_blocks_run(put_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put_model(tmp_path)
    (_, shell), (_, python) = section("A language model")
    assert MODEL in shell
    assert MODEL in python
    run_shell(shell)
    assert len(flowdata.Scores.load("scores")) == 20
    assert Path("scores/report/report.html").is_file()
    names = {"__name__": "readme"}
    exec(compile(python, "README.md", "exec"), names)
    log = names["trainer"].state.log_history
    assert any("eval_loss_and_drift" in entry for entry in log)
    assert names["meter"](load_model(MODEL)).kl == pytest.approx(0, abs=1e-6)
    assert "Drift(kl=" in capsys.readouterr().out


def test_the_image_models_block_runs_and_shows_what_a_rate_costs(capsys):
    pytest.importorskip("sklearn")
    ((_, python),) = section("An image model, in a loop of your own")
    torch.manual_seed(1)  # the block has a seed of its own
    names = {"__name__": "readme"}
    exec(compile(python, "README.md", "exec"), names)
    assert names["runs"][0][2].kept == 1  # the probe alone competes
    printed = capsys.readouterr().out
    old = {
        name: float(share)
        for name, share in re.findall(r"^(.*): new .*%, old (.*)%, kept .*$", printed, re.M)
    }
    assert len(old) == 6
    assert old["plain, rate 0.03"] < old["FLOW, rate 0.03"] - 10
    assert old["plain, rate 0.03"] < old["plain, rate 0.003"] - 50
    assert re.search(r"^choose (plain|FLOW), rate 0.003$", printed, re.M)


def test_a_fresh_environment_gets_the_extras_that_the_blocks_need():
    ((_, shell),) = section("Install")
    assert '".[demo,transformers]"' in shell
    assert "flowdata demo" in shell


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_the_page_runs_from_top_to_bottom_in_a_fresh_clone(put_model, tmp_path):
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    put_model(tmp_path / "clone")
    script = ["set -euo pipefail"]
    for title in TRIED[:3]:
        for number, (language, code) in enumerate(section(title)):
            if language == "python":
                block = tmp_path / f"{title}_{number}.py"
                block.write_text(code)
                code = f"python {shlex.quote(str(block))}"
            script.append(code)
    environment = {name: os.environ[name] for name in ("PATH", "HOME")}
    subprocess.run(
        ["bash", "-c", "\n".join(script)], check=True, cwd=tmp_path / "clone", env=environment
    )
    assert (tmp_path / "clone" / "flowdata-demo.png").is_file()
    assert list((tmp_path / "clone" / "tuned").glob("*.safetensors"))
