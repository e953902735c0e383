"""A study's bookkeeping, its page and its picture."""

import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import flowdata
import flowdata.study
from flowdata.study import picture as pictures
from flowdata.study import runs as study
from flowdata.study import table as tables
from flowdata.study.methods import TEMPERATURES
from tests import reference
from tests.pretend import NAMES, OPTIONS, Pretend, pretend

# --- the bookkeeping -------------------------------------------------------------------------


def test_each_method_is_run_at_each_rate_seed_by_seed(tmp_path):
    run = Pretend()
    records = pretend(tmp_path / "r.jsonl", run)
    assert run.runs[:4] == [
        *(("standard", rate, 0) for rate in (0.01, 0.03, 0.1)),
        ("FLOW", 0.01, 0),
    ]
    assert [seed for *_, seed in run.runs] == [seed for seed in range(3) for _ in range(12)]
    assert study.chosen_rates(records) == dict.fromkeys(NAMES, 0.03)
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert {"method", "rate", "seed", "target", "retained", "seconds", "options"} <= set(records[0])


def test_a_rate_is_chosen_by_the_mean_over_seeds_among_those_run_on_most(tmp_path):
    def run(method, rate, seed):
        record = Pretend()(method, rate, seed)
        record["validation"] = {0.01: [5, 5], 0.03: [9, 2], 0.1: [9, 9]}[rate][seed]
        return record

    path = tmp_path / "r.jsonl"
    pretend(path, run, names=("standard",), rates=(0.01, 0.03), seeds=(0, 1))
    records = pretend(path, run, names=("standard",), rates=(0.1,), seeds=(0,))
    assert study.chosen_rates(records) == {"standard": 0.03}  # 5.5 to 5; 0.1 has one seed
    even = [record | {"validation": 1.0} for record in records]
    assert study.chosen_rates(even) == {"standard": 0.01}  # equals: the smaller one


def test_methods_are_compared_at_every_rate_of_standard_fine_tuning(tmp_path):
    path = tmp_path / "r.jsonl"
    pretend(path, names=("standard", "FLOW"))
    pretend(path, names=("FLOW",), rates=(0.3,))
    records = [
        record | ({"rate": 0.0} if record["method"] == "l2" else {})  # as if it didn't train
        for record in pretend(path, names=("l2",), rates=(0.1,))
    ]
    by_rate = study.runs_by_rate(records)
    assert list(by_rate) == [0.01, 0.03, 0.1]
    for rate, runs in by_rate.items():
        assert {m: {r["rate"] for r in found} for m, found in runs.items()} == {
            "standard": {rate},
            "FLOW": {rate},
            "l2": {0.0},
        }
        assert [r["seed"] for r in runs["FLOW"]] == [0, 1, 2]
    worse = [
        record
        | ({"validation": 0.0} if (record["method"], record["rate"]) == ("FLOW", 0.03) else {})
        for record in records
    ]
    assert study.chosen_rates(worse)["FLOW"] != 0.03
    at_one_rate = study.runs_at_rate_of_standard(worse)
    assert {m: found[0]["rate"] for m, found in at_one_rate.items()} == {
        "standard": 0.03,
        "FLOW": 0.03,
        "l2": 0.0,
    }
    assert study.runs_at_rate_of_standard(at_one_rate["FLOW"]) == {}


def test_a_study_that_was_stopped_goes_on_and_runs_nothing_twice(tmp_path):
    path, whole = tmp_path / "r.jsonl", Pretend()
    pretend(tmp_path / "whole.jsonl", whole)
    with pytest.raises(KeyboardInterrupt):
        pretend(path, first := Pretend(fails_at=8))
    with path.open("a") as file:
        file.write('{"method": "FLOW", "ra')  # a line torn by the interruption
    records = pretend(path, second := Pretend())
    assert first.runs[:7] + second.runs == whole.runs
    assert len(records) == len(whole.runs)
    pretend(path, third := Pretend())
    assert third.runs == []


def test_runs_under_other_options_count_apart(tmp_path):
    path = tmp_path / "r.jsonl"
    pretend(path)
    run = Pretend()
    records = study.run_study(
        path, OPTIONS | {"images": 6}, run, methods={"standard": (0.03,)}, seeds=[0]
    )
    assert len(records) == len(run.runs) == 1
    assert [len(group) for _, group in tables.studies(study.read_records(path))] == [36, 1]


def test_numbers_of_tensors_and_numpy_are_numbers(tmp_path):
    runs = []

    def run(method, rate, seed):
        runs.append((method, rate, seed))
        return {
            "validation": torch.tensor(81.5),
            "target": {"accuracy": torch.tensor([80.0])},
            "retained": {"old accuracy": np.float32(70.5)},
            "rate": "the study's own is kept",
            "curve": torch.arange(3),
            "folder": tmp_path,
        }

    file, options = str(tmp_path / "r.jsonl"), {"batch": np.int64(8)}
    how = {"methods": {"standard": np.float32([0.5, 1])}, "seeds": np.arange(1)}
    records = study.run_study(file, options, run, **how)
    assert records == study.run_study(file, options, run, **how) == study.read_records(file)
    assert runs == [("standard", 0.5, 0), ("standard", 1.0, 0)]
    first = records[0]
    assert (first["validation"], first["target"]) == (81.5, {"accuracy": 80.0})
    assert (first["rate"], first["curve"], first["folder"]) == (0.5, [0, 1, 2], str(tmp_path))
    assert "| standard | 0.5 | 80.0 | 70.5 |" in tables.report({}, records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 80.0}, "target must hold measures by name, such as .* got 80.0"),
        ({"target": {"accuracy": "80"}}, r"target\['accuracy'\] must be a number, got '80'"),
        ({"validation": None}, "seed 0: validation must be a number, got None"),
        ({"validation": torch.ones(2)}, "validation must be a number, got tensor"),
        ({"drift": {"new task": 0.1}}, r"drift must hold Drift.to_dict\(\) by the names of probes"),
    ],
)
def test_what_no_page_can_be_made_of_is_not_kept(tmp_path, change, message):
    def run(method, rate, seed):
        return Pretend()(method, rate, seed) | change

    with pytest.raises(TypeError, match=message):
        pretend(tmp_path / "r.jsonl", run)
    assert study.read_records(tmp_path / "r.jsonl") == []


def test_a_study_of_the_new_task_alone_has_a_page(tmp_path):
    records = pretend(tmp_path / "r.jsonl", lambda *key: Pretend()(*key) | {"retained": {}})
    assert "| standard | 0.03 | 81.0 ± 1.0 |" in tables.report({}, records)
    with pytest.raises(ValueError, match="needs a measure in target and one in retained"):
        pictures.draw_picture(records)


def test_a_run_has_to_return_its_measures(tmp_path):
    with pytest.raises(TypeError, match=r"must return a mapping with validation, .* got NoneType"):
        pretend(tmp_path / "r.jsonl", lambda *key: None)
    with pytest.raises(ValueError, match="run returned no 'retained', only 'validation', 'target'"):
        pretend(tmp_path / "r.jsonl", lambda *key: {"validation": 1.0, "target": {"loss": 1.0}})


def test_a_run_that_diverged_is_never_chosen(tmp_path):
    records = pretend(tmp_path / "r.jsonl", rates=(0.3, 1.0), names=("standard",))
    assert study.chosen_rates(records) == {"standard": 0.3}


def test_the_choice_of_a_rate_is_blind_to_what_is_forgotten(tmp_path):
    def run(method, rate, seed):
        record = Pretend()(method, rate, seed)
        record["retained"] = {"CIFAR-10 accuracy": 0.0 if rate == 0.03 else 99.0}
        return record

    records = pretend(tmp_path / "r.jsonl", run)
    assert set(study.chosen_rates(records).values()) == {0.03}


# --- the page and the picture ----------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    pretend(tmp_path / "forgetting_pretend.jsonl")
    return tmp_path


def test_the_table_holds_mean_and_spread_of_the_chosen_runs(results):
    records = study.read_records(results / "forgetting_pretend.jsonl")
    page = tables.report(*tables.studies(records)[0])
    retained = [64.0, 65.4, 66.0]
    spread = f"{statistics.mean(retained):.1f} ± {statistics.stdev(retained):.1f}"
    average = [(80 + seed + kept) / 2 for seed, kept in enumerate(retained)]
    assert "All at rate 0.03:" in page
    assert "| method | 0.01 | 0.03 | 0.1 |" in page
    assert f"| FLOW | {76.2} / 65.1 / 70.7 | 81.0 / 65.1 / 73.1 |" in page
    row = next(line for line in page.splitlines() if line.startswith("| FLOW | 0.03 |"))
    assert row.split(" | ")[2:] == [
        "81.0 ± 1.0",
        spread,
        f"{statistics.mean(average):.1f} ± {statistics.stdev(average):.1f} |",
    ]
    assert "| FLOW + l2 | l2 |" in page
    assert "| FLOW + l2 | FLOW |" in page


def test_differences_are_paired_by_seed_and_tested():
    differences = [1.0, 1.5, 0.7, 1.2]
    p = float(tables.paired_p(differences).split()[1])
    t, freedom = reference.paired_t(differences), 3
    x = np.linspace(abs(t), 4000, 4_000_001)  # the tail of Student's density, summed up
    scale = math.gamma(2) / (math.sqrt(freedom * math.pi) * math.gamma(1.5))
    tail = np.trapezoid(scale * (1 + x**2 / freedom) ** -2, x)
    assert p == pytest.approx(2 * tail, abs=6e-4)
    assert tables.paired_p([0.0, 0.0]) == "p 1"
    assert tables.paired_p([1.0, 1.0]) == "–"  # a t-test would divide by their spread
    assert tables.paired_p([81.3 - 80.3, 80.0 - 79.0]) == "–"

    def run(seed, value):
        return {"seed": seed, "target": {"nll": value}, "retained": {"perplexity": 2 * value}}

    ours, theirs = [run(0, 1.0), run(2, 3.0), run(1, 2.5)], [run(1, 2.0), run(0, 1.0)]
    assert tables.paired_difference(ours, theirs, "perplexity").startswith("+0.50 ± 0.71 (p 0.5")
    assert tables.paired_difference(ours[:1], theirs, "perplexity") == "+0.00"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_is_named_in_page_and_picture(tmp_path, value, monkeypatch):
    def run(method, rate, seed):
        record = Pretend()(method, rate, seed)
        if (method, seed) == ("FLOW", 1) and rate > 0.01:
            record["retained"]["CIFAR-10 accuracy"] = value
        return record

    records = pretend(tmp_path / "r.jsonl", run)
    lines = tables.report({}, records).splitlines()
    assert "| FLOW | 0.03 | 81.0 ± 1.0 | diverged | diverged |" in lines
    assert any("81.0 / diverged / diverged |" in line for line in lines)
    against = [line for line in lines if line.startswith("| FLOW | standard |")]
    assert against[0].endswith("| diverged | diverged |")
    axes, drawn = [], pictures._draw_trade_off
    monkeypatch.setattr(
        pictures, "_draw_trade_off", lambda panel, **how: (axes.append(panel), drawn(panel, **how))
    )
    assert pictures.draw_picture(records)[:4] == b"\x89PNG"
    assert axes[0].get_xlabel().endswith("diverged: FLOW")


def test_a_grid_that_may_end_too_early_is_told(tmp_path):
    path = tmp_path / "r.jsonl"
    pretend(path, names=("standard",), rates=(0.01, 0.03))
    pretend(path, names=("FLOW",), rates=(0.03, 0.1))
    pretend(path, names=("l2",), rates=(0.03,))
    records = pretend(path, names=("FLOW + l2",))
    assert study.edges(records) == {"larger": ["standard"], "smaller": ["FLOW"]}
    page = tables.report(OPTIONS, records)
    assert (
        "A larger rate was not tried and may be better: standard. "
        "A smaller rate was not tried and may be better: FLOW.\n" in page
    )


def test_one_seed_shows_where_a_grid_may_end(tmp_path):
    path = tmp_path / "r.jsonl"
    pretend(path, names=("standard", "FLOW"), rates=(0.01, 0.03))
    records = pretend(path, names=("standard", "FLOW"), rates=(0.1,), seeds=(1,))
    assert study.edges(records) == {"larger": [], "smaller": []}
    assert "not tried" not in tables.report(OPTIONS, records)
    better = [
        record | {"validation": record["validation"] + 10 * (record["rate"] == 0.1)}
        for record in records
        if record["method"] == "FLOW"
    ]
    assert study.edges(better) == {"larger": ["FLOW"], "smaller": []}
    elsewhere = [
        record | {"seed": record["seed"] + 3 * (record["rate"] == 0.1)} for record in records
    ]
    assert study.edges(elsewhere)["larger"] == ["standard", "FLOW"]  # no seed in common


def test_every_rate_tried_is_shown_with_its_seeds(tmp_path):
    path = tmp_path / "r.jsonl"
    pretend(path, names=("standard", "FLOW"), rates=(0.03, 0.1))
    records = pretend(path, names=("FLOW",), rates=(0.3,), seeds=(0, 1))
    page = tables.report(OPTIONS, records)
    assert "; in brackets how many seeds, where not 3):" in page
    head, _, standard, flow = page.split("where not 3):")[1].split("\n")[2:6]
    assert head == "| method | 0.03 | 0.1 | 0.3 |"
    assert standard.endswith(" | – |")
    assert flow.endswith(" (2) |")
    assert [standard.count("("), flow.count("(")] == [0, 1]


def test_temperatures_are_compared_on_the_seeds_that_they_share():
    runs = {
        name: [{"seed": seed} for seed in range(count)]
        for name, count in {"FLOW": 5, "FLOW, ess0.1": 2, "FLOW + l2": 1, "standard": 1}.items()
    }
    shared = [{"seed": 0}, {"seed": 1}]
    assert pictures._runs_by_rule(runs, TEMPERATURES) == {"median": shared, "ess0.1": shared}
    assert pictures._runs_by_rule({"standard": shared}, TEMPERATURES) == {}


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12).map(sorted))
def test_names_in_a_picture_lie_apart_and_near_their_points(heights):
    moved = pictures._apart(heights)
    assert all(b - a >= pictures._LINE - 1e-9 for a, b in itertools.pairwise(moved))
    assert sum(moved) == pytest.approx(sum(heights), abs=1e-6)
    if all(b - a >= pictures._LINE for a, b in itertools.pairwise(heights)):
        assert moved == pytest.approx(heights)


def test_methods_of_ones_own_have_rows_a_title_and_a_picture(tmp_path):
    def run(method, rate, seed):
        return Pretend()("FLOW" if method == "mine" else method, rate, seed)

    options = {"images": 7}
    records = study.run_study(
        tmp_path / "r.jsonl", options, run, methods={"mine": (0.01, 0.03)}, seeds=(0, 1)
    )
    page = tables.report(options, records)
    assert page.startswith("# Forgetting\n")
    assert "| mine | 0.03 |" in page
    assert pictures.draw_picture(records)[:4] == b"\x89PNG"
    mixed = records + pretend(tmp_path / "s.jsonl", names=("FLOW",))
    ((_, ordered),) = tables.studies(record | {"options": options} for record in mixed)
    assert list(dict.fromkeys(record["method"] for record in ordered)) == ["FLOW", "mine"]


def test_the_rooms_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(
        r"\n\n(    import .*?)\n\n`run_study`", flowdata.study.__doc__, re.DOTALL
    ).group(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    names = {
        "pretrained": model,
        "scores": flowdata.LossScorer(model, progress=False).score(data),
        "meter": flowdata.DriftMeter(model, inputs),
        **dict.fromkeys(("train", "validation", "test", "old_test"), data),
    }
    exec(re.sub(r"^    ", "", code, flags=re.MULTILINE), names)
    assert len(names["records"]) == 27
    assert (tmp_path / "runs/mine.png").read_bytes()[:4] == b"\x89PNG"
