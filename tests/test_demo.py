import json
import sys
from statistics import mean, stdev

import pytest
import torch

from flowdata.cli import demo_run

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two seeds of the real demo with fewer epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "_EPOCHS", 3)
        patch.setattr(demo_run, "_PRETRAINING_EPOCHS", 15)
        state = torch.get_rng_state(), torch.get_num_threads()
        result = demo_run.run_demo(tmp_path_factory.mktemp("demo") / "new" / "demo.png", seeds=2)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert torch.get_num_threads() == state[1]
    return result


def test_every_method_and_rate_is_run_with_every_seed(short):
    runs = {(o.method, o.learning_rate, o.seed) for o in short.outcomes}
    assert runs == {
        (m, r, s)
        for m in (demo_run.STANDARD, demo_run.FLOW)
        for r in demo_run.RATES
        for s in (0, 1)
    }
    assert len(short.outcomes) == len(runs)


def test_the_network_knows_the_old_task_and_the_probe_the_new_one_before_it_starts(short):
    for start in short.starts:
        assert start.old > 95
        assert start.probe > 60
        assert start.temperature == pytest.approx(start.losses.median().item(), rel=0.05)


def test_the_table_says_what_was_measured(short):
    table = str(short)
    for method in (demo_run.STANDARD, demo_run.FLOW):
        rate = short.learning_rate(method)
        runs = [o for o in short.outcomes if (o.method, o.learning_rate) == (method, rate)]
        (line,) = (
            line for line in table.splitlines() if line.startswith(f"{method}, rate {rate:g} ")
        )
        for values in ([o.old for o in runs], [o.new for o in runs]):
            assert f"{mean(values):.1f} ± {stdev(values):.1f}" in line
        assert rate == max(demo_run.RATES, key=lambda r: held_out(short, method, r))
    assert f"{mean(s.temperature for s in short.starts):.3f}" in table
    assert "median of the losses" in table
    assert str(short.picture) in table


def held_out(result, method, rate):
    chosen = [o for o in result.outcomes if (o.method, o.learning_rate) == (method, rate)]
    return mean(o.held_out for o in chosen)


def test_the_picture_is_written_and_the_figures_are_json(short):
    assert short.picture.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(json.dumps(short.to_dict()))
    assert len(figures["outcomes"]) == 2 * 2 * len(demo_run.RATES)
    assert figures["chosen"][demo_run.FLOW] == short.learning_rate(demo_run.FLOW)
    assert figures["picture"] == str(short.picture)


def test_the_same_seed_measures_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_run, "_EPOCHS", 1)
    monkeypatch.setattr(demo_run, "_PRETRAINING_EPOCHS", 2)
    monkeypatch.setattr(demo_run, "RATES", (0.03,))
    first, second = (
        demo_run.run_demo(tmp_path / "demo.png", seeds=1, progress=False) for _ in range(2)
    )
    assert first.outcomes == second.outcomes


def test_the_tasks_are_the_same_digits_turned_and_the_parts_do_not_overlap():
    images, labels = torch.rand(1000, 64), torch.arange(1000) % 10
    tasks = demo_run._split(images, labels)
    parts = [tasks.old_train, tasks.held_out, tasks.test]
    for part, upright in ((tasks.train, tasks.old_train), (tasks.test, tasks.old_test)):
        back = part.tensors[0].reshape(-1, 8, 8).rot90(-1, (1, 2)).reshape(-1, 64)
        assert torch.equal(back, upright.tensors[0])
        assert torch.equal(part.tensors[1], upright.tensors[1])
    totals = torch.cat([part.tensors[0] for part in parts]).sum(1)
    assert sorted(totals.tolist()) == pytest.approx(sorted(images.sum(1).tolist()))


def test_bad_input_and_a_missing_package_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        demo_run.run_demo(tmp_path / "demo.png", seeds=0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "flowdata-torch\[demo\]"'):
        demo_run.run_demo(tmp_path / "demo.png", seeds=1, progress=False)
