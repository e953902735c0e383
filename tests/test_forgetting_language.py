"""The study of language on a small model: everything but the size is real."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import flowdata
from benchmarks import forgetting
from benchmarks.forgetting import batches, harness, language, texts
from benchmarks.forgetting import language_readouts as readouts
from benchmarks.forgetting import methods as ours
from examples import small
from flowdata.study import runs as study
from flowdata.study.training import passes
from tests import reference

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SIZES = language.Sizes(
    rows=24, batch=4, validation=6, test=8, code=3, prose=2, own_text=5, max_length=200
)
NO_HARNESS = {"wikitext": 0, "piqa": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network, tokenizer = small._small_llama()
    tokenizer.chat_template = TEMPLATE
    ids = torch.tensor([tokenizer(f"It is {n}.\n#### {n}")["input_ids"] for n in range(10, 50)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(40):  # until it finds some tokens easy, as token masking needs
        optimizer.zero_grad()
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    (folder / "language").mkdir()
    for name, start in (("train", 0), ("test", 500)):
        rows = [
            {"question": f"{n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"}
            for n in range(start, start + 40)
        ]
        text = "\n".join(map(json.dumps, rows))
        (folder / "language" / f"gsm8k_{name}.jsonl").write_text(text)
    pages = [
        f" = Page {n} = \n \n{' Words of page .' * 99} {n} . \n \n = = Part = = \n \n More . \n"
        for n in range(3)
    ]
    (folder / "language/wikitext2_valid.txt").write_text(" \n" + "".join(pages))
    piqa = [{"goal": f"Lift {n}", "sol1": "by hand", "sol2": "zzqx", "label": 0} for n in range(5)]
    (folder / "language/piqa_valid_dev.jsonl").write_text("\n".join(map(json.dumps, piqa)))
    return folder


@pytest.fixture(scope="module")
def task(model, assets, tmp_path_factory):
    sizes = language.Sizes(**vars(SIZES) | NO_HARNESS)
    return language.Language(model, assets, sizes, tmp_path_factory.mktemp("scores"))


def nlls(model, sets):
    return [readouts.mean_loss(*items) for items in readouts.item_losses(model, sets)]


def test_the_loss_of_text_is_that_of_one_sample_at_a_time(task):
    sets = [task.test, task.code]
    for found, samples in zip(nlls(task.model, sets), sets, strict=True):
        each = [samples[index] for index in range(len(samples))]
        losses = [reference.causal_lm_sample_loss(task.model, sample) for sample in each]
        wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        assert found == pytest.approx(wanted, rel=5e-3)


def test_only_answers_are_targets(task):
    sample = task.test[0]
    kept = sample["input_ids"][sample["labels"] != -100]
    assert task.tokenizer.decode(kept) == "It is 1000.\n#### 1000<end>"


@pytest.mark.parametrize("name", ["FLOW", "FLOW, tokens", "FLOW, both", "token masking"])
def test_weights_lie_on_the_targets_they_were_made_for(task, name):
    samples, scores = task.start(0)[:2]
    weights = batches.target_weights(language.ALL[name], scores)
    for index in (0, 7):
        losses = scores.token_losses(index)
        own = scores.weights()[index]
        tokens = torch.exp(-losses / scores.flat_token_losses.quantile(0.5))
        wanted = {
            "FLOW": own.expand(len(losses)),
            "FLOW, tokens": tokens,
            "FLOW, both": tokens * own,
            "token masking": (losses.exp() <= 2.5).float(),
        }[name]
        torch.testing.assert_close(weights[index], wanted, rtol=1e-3, atol=1e-5)
        laid = batches.Weighted(samples, weights)[index]
        torch.testing.assert_close(laid["weight"][laid["labels"] != -100], weights[index])


def test_batches_hold_samples_of_like_length_each_drawn_once():
    lengths = torch.randint(1, 300, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)
    drawn = list(batches.LengthBatches(RandomSampler(range(90)), lengths, 8))
    assert len(drawn) == 11
    assert len({index for batch in drawn for index in batch}) == 88

    def padded(rows):
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in rows)

    as_drawn = BatchSampler(RandomSampler(range(90)), 8, drop_last=True)
    assert padded(drawn) - sum(lengths) < 0.4 * (padded(as_drawn) - sum(lengths))
    assert [max(lengths[i] for i in batch) for batch in drawn] != sorted(
        max(lengths[i] for i in batch) for batch in drawn
    )


def test_an_epoch_of_a_sampler_draws_anew():
    sampler = flowdata.FlowSampler(torch.ones(12), seed=0)
    loader = DataLoader(
        range(12), batch_sampler=batches.LengthBatches(sampler, [1] * 12, 4), collate_fn=list
    )
    first, second = [[], []]
    for place, batch in enumerate(passes(loader, 2)):
        (first if place < 3 else second).extend(batch)
    assert len(first) == len(second) == 12
    assert first != second


def test_the_loss_of_a_batch_is_weighted_and_divided_by_its_targets(task):
    samples, scores = task.start(0)[:2]
    weights = batches.target_weights(language.ALL["FLOW"], scores)
    data = batches.Weighted(samples, weights)
    batch = batches.collate([data[0], data[1]])
    assert batch["input_ids"].shape[1] % batches.MULTIPLE == 0
    loss = batches.batch_loss(task.model, batch)
    found = [reference.causal_lm_sample_loss(task.model, samples[i]) for i in (0, 1)]
    total = sum(mean * count * weights[i][0].item() for i, (mean, count) in enumerate(found))
    assert loss.item() == pytest.approx(total / sum(count for _, count in found), rel=0.01)


def test_a_batch_is_held_to_the_frozen_models_predictions(task):
    samples, scores = task.start(0)[:2]
    data = batches.Weighted(samples, batches.target_weights(language.ALL["standard"], scores))
    batch, tuned = batches.collate([data[0], data[1]]), copy.deepcopy(task.model)
    plain = batches.batch_loss(tuned, batch)
    same = batches.batch_loss(tuned, batch, hold=3.0, reference=task.model)
    assert same.item() == pytest.approx(plain.item(), abs=1e-4)
    with torch.no_grad():
        tuned.get_output_embeddings().weight.mul_(1.5)
    loss = batches.batch_loss(tuned, batch)
    held = batches.batch_loss(tuned, batch, hold=3.0, reference=task.model)
    rows = [
        reference.divergences(*(logits_of_targets(m, samples[i]) for m in (task.model, tuned)))
        for i in (0, 1)
    ]
    divergence = torch.cat([row["kl"] for row in rows]).mean().item()
    assert held.item() - loss.item() == pytest.approx(3 * divergence, rel=0.03)


def logits_of_targets(model, sample):
    """The logits at the positions before a sample's targets, (targets, V) float64."""
    with torch.no_grad():
        logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1].double()
    return logits[sample["labels"][1:] != -100]


@pytest.mark.parametrize("name", list(language.MAIN))
def test_every_method_has_a_working_row(task, name):
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    record = task.run(name, 3e-3, 0)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    untouched = nlls(task.model, [task.test])[0]
    if name == "pre-trained":
        assert record["target"]["nll"] == pytest.approx(untouched, rel=1e-6)
        assert {drift["kl"] for drift in record["drift"].values()} == {0.0}
    elif name in ours.TOKEN_METHODS:  # these learn easy tokens: the mean loss may rise
        assert record["target"]["nll"] != untouched
    else:
        assert record["target"]["nll"] < untouched
    assert set(record["retained"]) == {"WikiText-2 nll", "code nll"}
    assert list(record["drift"]) == ["own text", "own text after BOS", "validation targets"]
    assert [len(items) for items in record["item_losses"].values()] == [6, 8, 2, 3]


def test_every_third_answer_of_noisy_rows_is_shuffled():
    problems = [
        {"question": f"q{i}", "answer": " ".join(map(str, range(i, i + 20)))} for i in range(9)
    ]
    rows = texts.noisy(problems, seed=0)
    changed = [row != problem for row, problem in zip(rows, problems, strict=True)]
    assert changed == [True, False, False] * 3
    assert all(
        sorted(row["answer"].split()) == sorted(problem["answer"].split())
        for row, problem in zip(rows, problems, strict=True)
    )
    assert texts.noisy(problems, seed=0) == rows
    assert problems[0]["answer"].startswith("0 1 2")


def targets_of(samples):
    return [sample["labels"].ne(-100).sum().item() for sample in samples]


def test_short_answers_are_the_final_number_alone(task, model, assets, tmp_path):
    problems = [{"question": "3 plus 4?", "answer": "It is 7.\n#### 7"}]
    assert texts.short(problems) == [{"question": "3 plus 4?", "answer": "7"}]
    sizes = language.Sizes(**asdict(SIZES) | NO_HARNESS | {"data": "short"})
    cut = language.Language(model, assets, sizes, tmp_path)
    trained, _, validation, _ = cut.start(0)
    for few, many in [(cut.test, task.test), (trained, task.start(0)[0]), (validation, task.test)]:
        assert max(targets_of(few)) < min(targets_of(many))


def test_mixed_rows_are_a_third_each_and_leave_the_code_that_is_measured_out(task):
    problems = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(50)]
    rows = texts.mixed(problems, 30, seed=0)
    kinds = ["Continue this Python code:", "Continue this text:"]
    counts = [sum(row["question"].startswith(kind) for row in rows) for kind in kinds]
    assert counts == [10, 10]
    assert sum(row["question"].startswith("q") for row in rows) == 10
    trained = set(texts.code_files(held_out=False))
    assert trained.isdisjoint(texts.code_files(held_out=True))
    assert texts.mixed(problems, 30, seed=0) == rows
    assert texts.mixed(problems, 30, seed=1) != rows


def test_the_command_runs_and_resumes(model, assets, tmp_path, monkeypatch):
    command = ["language", "--quick", "--model", model, "--assets", str(assets), "--no-harness"]
    command += ["--methods", "standard", "FLOW", "--results", str(tmp_path), "--data", "mixed"]
    command += ["--seeds", "0", "1"]
    forgetting.main(command)
    records = study.read_records(tmp_path / "forgetting_language_mixed.jsonl")
    assert [(r["method"], r["seed"]) for r in records] == [
        (name, seed) for seed in (0, 1) for name in ("standard", "FLOW")
    ]
    page = (tmp_path / "forgetting_language_mixed.md").read_text()
    assert "| method | rate | target nll | WikiText-2 nll | code nll |" in page
    assert "average" not in page  # losses and accuracies have none
    monkeypatch.setattr(language.Language, "run", None)
    forgetting.main(command)


def test_a_missing_harness_is_named(model, assets, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    command = ["language", "--model", model, "--assets", str(assets), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"pip install lm_eval==0\.4\.13, or leave them out"):
        forgetting.main(command)


def test_articles_begin_at_headings_of_first_rank(assets):
    text = (assets / "language/wikitext2_valid.txt").read_text()
    pages = [article["text"] for article in harness.articles(text)]
    assert len(pages) == 3
    assert all(page.startswith(f" = Page {n} = ") for n, page in enumerate(pages))
    assert "More" in pages[0]


def test_the_harness_measures_the_local_files(model, assets):
    pytest.importorskip("lm_eval")
    network, tokenizer = language.load_model(model), language.load_tokenizer(model)
    files = {
        "wikitext": assets / "language/wikitext2_valid.txt",
        "piqa": assets / "language/piqa_valid_dev.jsonl",
        "gsm8k": assets / "language/gsm8k_test.jsonl",
    }
    found = harness.evaluate(
        network, tokenizer, files, limits={"wikitext": 2, "piqa": 5, "gsm8k": 2}
    )
    assert found["exact match accuracy"] == 0  # a random network answers nothing
    assert 0 <= found["PIQA accuracy"] <= 100

    pages = [a["text"] for a in harness.articles(files["wikitext"].read_text())][:2]
    loss = words = 0.0
    for page in pages:
        ids = tokenizer(page, add_special_tokens=False)["input_ids"]
        sample = {"input_ids": [tokenizer.eos_token_id, *ids], "labels": [-100, *ids]}
        mean, count = reference.causal_lm_sample_loss(
            network, {name: torch.tensor(value) for name, value in sample.items()}
        )
        loss, words = loss + mean * count, words + len(re.split(r"\s+", page))
    log = torch.tensor(found["WikiText-2 perplexity"]).log().item()
    assert log == pytest.approx(loss / words, rel=0.01)


def test_token_methods_refuse_scores_without_token_losses():
    from flowdata import Scores

    with pytest.raises(ValueError, match="token losses"):
        ours.easy_tokens(Scores(torch.ones(2)))


# --- the paper's run, sharded ----------------------------------------------------------------


def torchrun(model, assets, output, *more):
    data = str(assets / "language/gsm8k_train.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(20000 + os.getpid() % 20000)]
    command += ["-m", "tests.metamath_rank", "--model", model, "--data", data]
    command += ["--rate", "3e-3", "--epochs", "2", "--batch", "8", "--micro", "2"]
    command += ["--output", str(output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_papers_run_is_sharded_over_two_ranks_and_saves_what_it_learned(
    model, assets, task, tmp_path
):
    torchrun(model, assets, tmp_path, "--method", "FLOW + l2", "--wise-ft", "0.5")
    before = nlls(task.model, [task.test])[0]
    tuned, averaged = (language.load_model(str(p)) for p in (tmp_path, tmp_path / "wise_ft_0.5"))
    after, between = (nlls(m, [task.test])[0] for m in (tuned, averaged))
    assert after < between < before
    for name, value in averaged.state_dict().items():
        wanted = (task.model.state_dict()[name] + tuned.state_dict()[name]) / 2
        torch.testing.assert_close(value, wanted)


@pytest.mark.slow
def test_the_papers_run_takes_adapters(model, assets, tmp_path):
    torchrun(model, assets, tmp_path, "--method", "FLOW, sampler", "--lora", "4", "--rows", "24")
    assert (tmp_path / "adapter_model.safetensors").exists()
