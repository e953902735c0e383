import json
import sys
from dataclasses import replace
from statistics import mean

import pytest
import torch

from flowdata.cli import demo_run
from flowdata.cli.demo_picture import SIZE, draw_demo
from flowdata.cli.demo_result import BEST, BLIND, BY_DRIFT, RIGHT, WRONG
from flowdata.drift import Drift
from flowdata.report.pictures import figure
from flowdata.study import LINEAR_PROBE, STANDARD, kept_at_equal_learning, runs_with_items

pytest.importorskip("sklearn")
RATES = (0.003, 0.03)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two seeds of the real demo with fewer epochs and rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "_SIZES", replace(demo_run._SIZES, epochs=3))
        patch.setattr(demo_run, "_PRETRAINING_EPOCHS", 15)
        patch.setattr(demo_run, "RATES", RATES)
        state = torch.get_rng_state(), torch.get_num_threads()
        result = demo_run.run_demo(tmp_path_factory.mktemp("demo") / "new" / "demo.png", seeds=2)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert torch.get_num_threads() == state[1]
    return result


def test_every_method_and_rate_of_a_case_is_run_with_every_seed(short):
    for case, methods in demo_run.CASES.items():
        runs = [(r["method"], r["rate"], r["seed"]) for r in short.records[case]]
        expected = {(m, rate, s) for m in methods for rate in RATES for s in (0, 1)}
        assert set(runs) == expected | {(LINEAR_PROBE, 0.0, 0), (LINEAR_PROBE, 0.0, 1)}
        assert len(runs) == len(set(runs))


def test_the_probe_keeps_all_of_the_old_task_and_wrong_labels_cost_it_some_of_the_new(short):
    assert short.before > 95
    probes = {
        case: [r for r in runs if r["method"] == LINEAR_PROBE]
        for case, runs in short.records.items()
    }
    for runs in probes.values():
        assert mean(r["retained"]["old task accuracy"] for r in runs) == pytest.approx(short.before)
    new = {case: mean(r["target"]["accuracy"] for r in runs) for case, runs in probes.items()}
    assert 60 < new[WRONG] < new[RIGHT]


def test_the_tables_say_what_was_measured(short):
    text = str(short)
    for case, methods in demo_run.CASES.items():
        table = text[text.index(f"{case[1:]}; the linear probe") :]
        for rate in RATES:
            line = next(line for line in table.splitlines() if line.startswith(f"{rate:g} "))
            for method in methods:
                runs = [
                    r for r in short.records[case] if (r["method"], r["rate"]) == (method, rate)
                ]
                new = mean(r["target"]["accuracy"] for r in runs)
                old = mean(r["retained"]["old task accuracy"] for r in runs)
                assert f"{new:.1f} / {old:.1f}" in line
        runs = runs_with_items(short.records[case])
        for each in kept_at_equal_learning(runs, STANDARD, LINEAR_PROBE)[1:]:
            assert f"{each.method} at equal learning: {each.difference:+.1f}" in table
    assert str(short.picture) in text


def test_choices_are_those_of_their_rules(short):
    chosen = short.choices()
    for rule in (BLIND, BY_DRIFT, BEST):
        assert [run["seed"] for run in chosen[rule]] == [0, 1]
    for seed in (0, 1):
        runs = [r for r in short.records[RIGHT] if r["seed"] == seed]
        assert chosen[BLIND][seed]["validation"] == max(r["validation"] for r in runs)
        averages = [
            (r["target"]["accuracy"] + r["retained"]["old task accuracy"]) / 2 for r in runs
        ]
        best = chosen[BEST][seed]
        assert (
            best["target"]["accuracy"] + best["retained"]["old task accuracy"]
        ) / 2 == pytest.approx(max(averages))


def test_the_picture_is_written_and_the_figures_are_json(short):
    assert short.picture.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(json.dumps(short.to_dict()))
    assert len(figures["cases"][WRONG]) == 2 * (1 + 3 * len(RATES))
    assert len(figures["chosen"][BY_DRIFT]) == 2
    assert figures["picture"] == str(short.picture)


def test_both_panels_show_the_choices_and_the_legend_covers_neither(short):
    with figure(*SIZE, panels=2, sharey=True) as (drawing, panels):
        draw_demo(panels, short)
        drawing.draw_without_rendering()
        (legend,) = drawing.legends
        top = legend.get_window_extent().y1
        for axes, case in zip(panels, short.records, strict=True):
            assert axes.get_legend() is None
            assert axes.get_window_extent().y0 > top
            assert axes.get_xlabel() == "accuracy on the old task (%)"
            marks = {mark.get_label(): mark.get_offsets().tolist() for mark in axes.collections}
            for rule, name in ((BY_DRIFT, "chosen by drift, without"), (BLIND, "chosen by new")):
                (places,) = (found for label, found in marks.items() if label.startswith(name))
                runs = short.choices(case)[rule]
                old = mean(run["retained"]["old task accuracy"] for run in runs)
                new = mean(run["target"]["accuracy"] for run in runs)
                assert places == [[old, new]]
                kept = mean(Drift(**run["drift"]["new task"]).kept for run in runs)
                assert f"drift: kept {kept:.2f} (order only)" in [t.get_text() for t in axes.texts]
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(set(texts)) == 5
    assert panels[0].get_ylabel() == "accuracy on the new task (%)"


def test_the_picture_says_what_the_tasks_and_flow_are_and_clips_no_text(short):
    with figure(*SIZE, panels=2, sharey=True) as (drawing, panels):
        draw_demo(panels, short)
        drawing.draw_without_rendering()
        (legend,) = drawing.legends
        assert drawing.get_suptitle().startswith("A network that reads upright digits (the old")
        names = [text.get_text() for text in legend.get_texts()]
        assert "FLOW (easy samples count more), same rates" in names
        texts = [*panels[0].texts, *panels[1].texts, *drawing.texts, *legend.get_texts()]
        for text in texts:
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= drawing.bbox.width, text.get_text()
            assert 0 <= box.y0 < box.y1 <= drawing.bbox.height, text.get_text()
        assert len(texts) > 15


def test_the_same_seed_measures_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_run, "_SIZES", replace(demo_run._SIZES, epochs=1))
    monkeypatch.setattr(demo_run, "_PRETRAINING_EPOCHS", 2)
    monkeypatch.setattr(demo_run, "RATES", (0.03,))
    first, second = (
        demo_run.run_demo(tmp_path / "demo.png", seeds=1, progress=False) for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()


def test_the_tasks_are_the_same_digits_turned_and_the_parts_do_not_overlap():
    images, labels = torch.rand(1000, 64), torch.arange(1000) % 10
    tasks = demo_run._Tasks(images, labels)
    parts = [tasks.old_train, tasks.held_out, tasks.test]
    for part, upright in ((tasks.train, tasks.old_train), (tasks.test, tasks.old_test)):
        back = part.tensors[0].reshape(-1, 8, 8).rot90(-1, (1, 2)).reshape(-1, 64)
        assert torch.equal(back, upright.tensors[0])
        assert torch.equal(part.tensors[1], upright.tensors[1])
    totals = torch.cat([part.tensors[0] for part in parts]).sum(1)
    assert sorted(totals.tolist()) == pytest.approx(sorted(images.sum(1).tolist()))


def test_a_third_of_the_labels_are_wrong_and_all_are_digits():
    labels = torch.arange(900) % 10
    changed = demo_run._with_wrong(labels)
    assert int((changed != labels).sum()) == 300
    assert set(changed.tolist()) == set(range(10))


def test_bad_input_and_a_missing_package_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        demo_run.run_demo(tmp_path / "demo.png", seeds=0)
    with pytest.raises(ValueError, match=r"output must name a file, and .* is a folder"):
        demo_run.run_demo(tmp_path, seeds=1)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "flowdata-torch\[demo\]"'):
        demo_run.run_demo(tmp_path / "demo.png", seeds=1, progress=False)
