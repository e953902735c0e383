"""The evidence: which methods run on which sets, and how what is missing is run."""

import argparse

import pytest

from benchmarks.forgetting import evidence, main, vision
from benchmarks.forgetting.corruptions import corrupted
from benchmarks.forgetting.images import read_arrays
from flowdata.study import LINEAR_PROBE, STANDARD, read_records
from flowdata.study.hits import unpacked


def test_every_set_has_its_start_its_reference_and_trimming_at_the_true_share():
    for target in evidence.TARGETS:
        methods = evidence.methods(target)
        assert {LINEAR_PROBE, STANDARD, "FLOW", "standard, smaller steps"} <= set(methods)
        assert corrupted(target).target in evidence.CLEAN
        if target in evidence.SHARES:
            share = evidence.SHARES[target]
            assert f"trimmed, {share:.0%}" in methods
            assert f"{share:.0%}".rstrip("%") in target
    all_rivals = evidence.methods("wrong33_fashion_mnist")
    assert {"trimmed, 16%", "trimmed, 33%", "trimmed, 66%"} <= set(all_rivals)
    assert all_rivals["FLOW"][-1] == 0.1
    assert all_rivals["trimmed, 16%"] == all_rivals["l2"] == (0.003, 0.01, 0.03)
    assert {"l2", "l2, 0.03", "l2, 0.1", "LoRA, rank 2", "WiSE-FT, 0.25"} <= set(all_rivals)


def test_a_seed_is_whole_before_the_next_begins():
    order = [(target, seed) for target, _, seed in evidence.runs(("digits", "letters"), (0, 1))]
    assert order == [("digits", 0), ("letters", 0), ("digits", 1), ("letters", 1)]


def test_the_study_runs_what_each_set_needs_and_no_other(tmp_path, monkeypatch):
    runs = []

    class Task:
        def __init__(self, target):
            self.target = target

        def run(self, method, rate, seed):
            runs.append((self.target, method, rate, seed))
            return {"validation": 1.0, "target": {"accuracy": 1.0}, "retained": {}}

    monkeypatch.setattr(vision, "task", lambda assets, target, *_: Task(target))
    options = argparse.Namespace(
        assets=None,
        targets=["digits", "wrong20_fashion_mnist"],
        seeds=[3],
        results=tmp_path,
        processes=1,
    )
    evidence.study(options)
    of_digits = {(method, rate) for target, method, rate, _ in runs if target == "digits"}
    expected = evidence.methods("digits").items()
    assert of_digits == {(method, rate) for method, rates in expected for rate in rates}
    assert {seed for *_, seed in runs} == {3}
    of_wrong = {rate for target, _, rate, _ in runs if target != "digits"}
    assert of_wrong == {0.0, 0.001, 0.003, 0.01, 0.03, 0.1}
    before = len(runs)
    evidence.study(options)
    assert len(runs) == before  # it goes on where it was


@pytest.mark.skipif(not vision.ASSETS.is_dir(), reason="needs the shared assets")
def test_the_worst_class_is_the_rare_one_where_one_is_rare():
    labels = read_arrays(vision.ASSETS / "vision" / "fashion_mnist_test_dev.npz")[1][:2000]
    rare = read_records(evidence.EVIDENCE / "forgetting_rare_fashion_mnist.jsonl")
    assert len(rare) == 125
    for run in rare:
        is_right = unpacked(run["hits"]["target"], len(labels)).numpy()
        accuracies = [100 * is_right[labels == each].mean() for each in range(10)]
        assert min(accuracies) == accuracies[0] == pytest.approx(run["target of the worst class"])


def test_an_unknown_set_is_refused():
    parser = argparse.ArgumentParser()
    evidence.add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--targets", "cifar100"])


@pytest.mark.skipif(not vision.ASSETS.is_dir(), reason="needs the shared assets")
def test_processes_share_the_sets_and_do_what_is_lacking(tmp_path, capfd):
    (tmp_path / "forgetting_letters.jsonl").write_text(
        (evidence.EVIDENCE / "forgetting_letters.jsonl").read_text("utf-8"), "utf-8"
    )
    words = ["evidence", "--processes", "2", "--targets", "letters", "--seeds", "0", "1"]
    main([*words, "--results", str(tmp_path)])
    assert "rate" not in capfd.readouterr().err  # all are there
    page = (tmp_path / "forgetting_evidence.md").read_text("utf-8")
    assert "letters (165 runs, 5 seeds)" in page
