"""The study of forgetting: its methods, its bookkeeping, its tables, and a tiny run of it."""

import itertools
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flowdata
from benchmarks import forgetting
from benchmarks.forgetting import folders, publish, readme, vision
from flowdata.study import (
    head_task as heads,
)
from flowdata.study import (
    methods,
)
from flowdata.study import (
    picture as pictures,
)
from flowdata.study import (
    runs as study,
)
from flowdata.study import (
    table as tables,
)
from tests import reference

# --- methods ---------------------------------------------------------------------------------

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def fitted(*parts, model=None, steps=6, rate=0.1, momentum=0.9, seed=0, watch=None):
    """A network trained on all of X in each step, and where it started."""
    model = model or network()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(batch):
        if watch:
            watch(model)
        return (model(X) - Y).square().mean()

    methods.train(
        model,
        [None] * steps,
        steps,
        loss,
        lambda p: torch.optim.SGD(p, lr=rate, momentum=momentum),
        methods.Method(parts=parts),
        seed=seed,
    )
    return start, dict(model.state_dict())


def moved(start, end):
    return {name for name in start if not torch.equal(start[name], end[name])}


def test_training_is_plain_sgd_under_a_cosine():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    _, end = fitted()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(end[name], value)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    shares = [methods.cosine(step, 100, 0.1) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0)


def test_an_anchor_pulls_back_to_the_start():
    start, free = fitted(steps=20)
    _, held = fitted(methods.anchor("l2", 1.0), steps=20)
    far = [sum((end[n] - start[n]).square().sum() for n in ("0.weight", "3.weight"))
           for end in (free, held)]  # fmt: skip
    assert far[1] < 0.5 * far[0]


def test_wise_ft_averages_start_and_end():
    start, end = fitted()
    _, averaged = fitted(methods.weight_averaging(0.25))
    for name, wanted in reference.wise_ft(start, end, 0.25).items():
        if end[name].is_floating_point():
            torch.testing.assert_close(averaged[name].double(), wanted, atol=1e-6, rtol=1e-5)


def test_averaging_is_the_mean_of_all_weights_on_the_way():
    seen = []
    fitted(watch=lambda model: seen.append(model[0].weight.detach().clone()))
    _, end = fitted()
    _, averaged = fitted(methods.averaging)
    wanted = torch.stack([*seen, end["0.weight"]]).mean(0)
    torch.testing.assert_close(averaged["0.weight"], wanted)


def test_mofo_moves_the_entries_of_largest_momentum_alone():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
    values, momentum = model.weight.flatten().tolist(), [0.0] * 6
    for step in range(4):
        weight = torch.tensor(values).reshape(2, 3)
        gradient = 2 * (X @ weight.T - Y).T @ X / Y.numel()
        rate = 0.1 * methods.cosine(step, 4, 0.0)
        values, momentum = reference.mofo_step(
            values, gradient.flatten().tolist(), momentum, rate, 0.9, 0.34
        )
    _, end = fitted(methods.mofo(0.34), model=model, steps=4)
    torch.testing.assert_close(end["weight"].flatten(), torch.tensor(values))


def test_mofo_takes_adams_first_moment_as_momentum():
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    methods.train(
        model,
        [None],
        1,
        lambda _: (model(X) - Y).square().mean(),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        methods.Method(parts=(methods.mofo(0.5),)),
        seed=0,
    )
    assert int((model.weight != before).sum()) == 3


def test_hft_trains_another_half_of_the_layers_in_each_round():
    changed, last = [], {}

    def watch(model):
        now = {n: p.detach().clone() for n, p in model.named_parameters()}
        if last:
            changed.append({n.split(".")[0] for n in now if not torch.equal(now[n], last[n])})
        last.update(now)

    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.Linear(3, 2))
    fitted(methods.hft(4), model=model, steps=13, watch=watch, momentum=0.0)
    assert all(len(layers) == 3 for layers in changed)
    assert changed[0] == changed[1] == changed[2]  # one round
    assert len({frozenset(layers) for layers in changed}) > 1


def test_a_tied_parameter_is_one_block_of_hft():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    start, end = fitted(methods.hft(1), model=model, steps=2)
    assert len({name[2:] for name in moved(start, end)}) == 2
    assert len(moved(start, end)) in (2, 4)  # the last layer, or the tied one under both names


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, (1, 3)), nn.Flatten(), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x[:, None, None]))


def test_lora_moves_convolutions_and_linear_layers_by_low_rank_and_leaves_the_modules_whole():
    start, end = fitted(methods.lora(1), model=Convolutional(), steps=5)
    assert list(end) == list(start)
    assert {n for n in moved(start, end) if "running" not in n and "num" not in n} == {
        "body.0.weight",
        "head.weight",
    }
    difference = (end["body.0.weight"] - start["body.0.weight"]).flatten(1)
    assert torch.linalg.matrix_rank(difference, atol=1e-5) == 1


def test_lora_gives_gradients_back_to_all_parameters():
    model = Convolutional()
    fitted(methods.lora(1), model=model, steps=1)
    assert all(p.requires_grad for p in model.parameters())


def test_parts_add_up():
    start, alone = fitted(methods.lora(2), model=Convolutional())
    _, both = fitted(methods.weight_averaging(0.5), methods.lora(2), model=Convolutional())
    for name in ("body.0.weight", "head.weight"):
        torch.testing.assert_close(both[name], (start[name] + alone[name]) / 2)


SCORES = flowdata.Scores(
    torch.tensor([0.1, 0.5, 1.0, 4.0]),
    torch.tensor([1, 2, 1, 1]),
    token_losses=torch.tensor([0.1, 0.2, 0.8, 1.0, 4.0]),
    columns={"gradient_norm": torch.tensor([1.0, 2.0, 3.0, 4.0])},
)


def test_dro_prefers_hard_samples_as_strongly_as_flow_prefers_easy_ones():
    weights = methods.dro(SCORES)
    assert weights.mean() == pytest.approx(1)
    assert weights.tolist() == sorted(weights.tolist())
    assert flowdata.effective_sample_size(weights) == pytest.approx(
        flowdata.effective_sample_size(SCORES.weights()), rel=1e-4
    )
    slopes = weights.log().diff() / SCORES.losses.diff()  # exp(+loss / temperature): one slope
    torch.testing.assert_close(slopes, slopes[:1].expand(3))


def test_token_weights_lie_along_the_targets():
    tokens = torch.tensor(reference.flow_weights(SCORES.flat_token_losses.tolist(), 0.8))
    torch.testing.assert_close(methods.flow_tokens(SCORES), tokens.float())
    samples = SCORES.weights()
    torch.testing.assert_close(
        methods.flow_both(SCORES), (tokens * samples[[0, 1, 1, 2, 3]]).float()
    )
    assert methods.easy_tokens(SCORES).tolist() == [1, 1, 1, 0, 0]  # perplexity up to 2.5
    with pytest.raises(ValueError, match="vision has none"):
        methods.flow_tokens(flowdata.Scores(SCORES.losses))


def test_running_median_weights_are_those_of_a_stream():
    losses = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    windows = [order[i : i + 16] for i in range(0, 40, 16)]
    wanted = reference.running_median_weights(windows, lambda i: losses[i].item())
    found = methods.running_median(flowdata.Scores(losses), window=16)
    torch.testing.assert_close(found[order], torch.tensor(wanted), rtol=3e-3, atol=0)


# --- the study -------------------------------------------------------------------------------


class Pretend:
    """Runs that know their result: a bowl over the rate, with noise by seed."""

    def __init__(self, fails_at=None):
        self.runs, self.fails_at = [], fails_at

    def __call__(self, method, rate, seed):
        self.runs.append((method, rate, seed))
        if len(self.runs) == self.fails_at:
            raise KeyboardInterrupt
        gain = {"standard": 0.0, "FLOW": 4.0, "l2": 2.0, "FLOW + l2": 5.0}[method]
        target = 80 - 10 * abs(math.log10(rate / 0.03)) + seed
        if rate > 0.5:
            target = math.nan
        return {
            "validation": target,
            "target": {"accuracy": target},
            "retained": {"CIFAR-10 accuracy": 60 + gain + seed + 0.1 * gain * (seed % 2)},
            "effective_share": 0.5,
        }


NAMES = ("standard", "FLOW", "l2", "FLOW + l2")
OPTIONS = {"study": "vision", "target": "pretend", "images": 5}


def pretend(path, run=None, names=NAMES, rates=(0.01, 0.03, 0.1), seeds=range(3), options=None):
    given = {"methods": dict.fromkeys(names, rates), "seeds": seeds}
    return study.run_study(path, OPTIONS | (options or {}), run or Pretend(), **given)


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


# --- tables ----------------------------------------------------------------------------------


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

    def run(seed, value):
        return {"seed": seed, "target": {"nll": value}, "retained": {"perplexity": 2 * value}}

    ours, theirs = [run(0, 1.0), run(2, 3.0), run(1, 2.5)], [run(1, 2.0), run(0, 1.0)]
    assert tables.compare(ours, theirs, "perplexity").startswith("+0.50 ± 0.71 (p 0.5")
    assert tables.compare(ours[:1], theirs, "perplexity") == "+0.00"


def test_tables_and_pictures_are_written_beside_the_results(results):
    file = results / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nwhat stood there\n{readme.END}\nafter\n")
    forgetting.main(["table", "--results", str(results), "--readme", str(file)])
    assert (results / "forgetting_pretend.png").read_bytes()[:4] == b"\x89PNG"
    assert "# Forgetting: vision, pretend" in (results / "forgetting_pretend.md").read_text()
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "what stood there" not in text
    assert "| FLOW + l2 | 81.0 / 66.2 |" in text
    forgetting.main(["table", "--results", str(results), "--readme", str(file)])
    assert file.read_text() == text


def test_the_readme_shows_studies_side_by_side_and_links_further_ones(results):
    pretend(results / "forgetting_short.jsonl", names=("FLOW",), options={"target": "short"})
    further = {"target": "short", "images": 20}
    pretend(results / "forgetting_short.jsonl", names=("FLOW",), seeds=[0], options=further)
    text = readme.readme_table(publish.read_studies(results))
    assert "[pretend](benchmarks/results/forgetting_pretend.md) (4 methods, 3 seeds" in text
    file = "benchmarks/results/forgetting_short_2.md"
    assert f"[short, images 20]({file}) (1 method, 1 seed, " in text
    header, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    assert header == "| method | pretend at 0.03 | short |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in NAMES]
    assert rows[1] == "| FLOW | 81.0 / 65.1 | (0.03: 81.0 / 65.1) |"
    assert [row.count("–") for row in rows] == [1, 0, 1, 1]


def test_the_readme_tells_the_rate_of_a_method_that_takes_another(tmp_path):
    def run(method, rate, seed):
        better = 20 if (method, rate) == ("FLOW", 0.1) else 0
        record = Pretend()(method, rate, seed)
        return record | {"validation": record["validation"] + better}

    pretend(tmp_path / "forgetting_pretend.jsonl", run, names=("standard", "FLOW"))
    text = readme.readme_table(publish.read_studies(tmp_path))
    assert "| standard | 81.0 / 61.0 |" in text
    assert "| FLOW | 81.0 / 65.1 (0.1: 75.8 / 65.1) |" in text


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
    assert pictures._of_temperatures(runs) == {"median": shared, "ess0.1": shared}
    assert pictures._of_temperatures({"standard": shared}) == {}


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12).map(sorted))
def test_names_in_a_picture_lie_apart_and_near_their_points(heights):
    moved = pictures._apart(heights)
    assert all(b - a >= pictures._LINE - 1e-9 for a, b in itertools.pairwise(moved))
    assert sum(moved) == pytest.approx(sum(heights), abs=1e-6)
    if all(b - a >= pictures._LINE for a, b in itertools.pairwise(heights)):
        assert moved == pytest.approx(heights)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no runs"):
        forgetting.main(["table", "--results", str(tmp_path)])


def test_a_text_without_the_marks_is_refused(results):
    with pytest.raises(ValueError, match="the table goes between"):
        readme.with_table("no marks", "table")


def test_the_readme_says_what_the_results_files_say():
    text = forgetting.README.read_text()
    studies = publish.read_studies(forgetting.RESULTS)
    assert text == readme.with_table(text, readme.readme_table(studies))


def test_unknown_methods_and_missing_assets_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no method 'magic'; there are standard"):
        forgetting.main(["vision", "--quick", "--methods", "magic"])
    with pytest.raises(SystemExit, match=r"holds no cifar10_resnet20\.safetensors"):
        forgetting.main(["vision", "--assets", str(tmp_path), "--results", str(tmp_path)])


# --- vision ----------------------------------------------------------------------------------

TINY = heads.Sizes(images=160, epochs=1, batch=32, validation=60, test=200)
needs_assets = pytest.mark.skipif(not vision.ASSETS.is_dir(), reason="needs the shared assets")


@pytest.fixture(scope="module")
def digits():
    return vision.task(vision.ASSETS, "digits", TINY)


@needs_assets
@pytest.mark.slow
def test_flow_forgets_less_than_standard_fine_tuning_and_the_probe_nothing():
    digits = vision.task(vision.ASSETS, "digits", replace(TINY, images=320, epochs=2, test=300))
    runs = {name: digits.run(name, 0.003, 0) for name in ("linear probe", "standard", "FLOW")}
    kept = {name: run["retained"]["CIFAR-10 accuracy"] for name, run in runs.items()}
    learned = {name: run["target"]["accuracy"] for name, run in runs.items()}
    assert kept["linear probe"] > 75
    assert kept["standard"] < kept["FLOW"] - 5 < kept["linear probe"]
    assert learned["FLOW"] > 80
    assert digits.run("FLOW", 0.003, 0)["target"] == runs["FLOW"]["target"]  # the seed decides


@needs_assets
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in {**vision.MAIN, **vision.EXTRA} if n != "standard"])
def test_every_method_has_a_working_row(digits, name):
    record = digits.run(name, 0.003, 1)
    assert record["target"]["accuracy"] > 50
    assert record["retained"]["CIFAR-10 accuracy"] > 15


@needs_assets
@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_like_any_other(digits):
    record = digits.run("standard", 1e4, 1)
    assert record["target"]["accuracy"] < 50
    assert record["retained"]["CIFAR-10 accuracy"] < 15


def labels_of(part):
    return torch.stack([label for _, label in part])


@needs_assets
def test_noise_shuffles_a_third_of_the_training_labels_and_no_others():
    clean, noisy = (
        vision.task(vision.ASSETS, target, TINY).split(3) for target in ("digits", "noisy_digits")
    )
    shuffled = labels_of(noisy.train) != labels_of(clean.train)
    assert shuffled[::3].float().mean() > 0.7
    assert not shuffled[1::3].any()
    assert not shuffled[2::3].any()
    assert torch.equal(labels_of(noisy.scored), labels_of(noisy.train))
    assert torch.equal(labels_of(noisy.train).bincount(), labels_of(clean.train).bincount())
    assert torch.equal(labels_of(noisy.validation), labels_of(clean.validation))
    assert torch.equal(labels_of(noisy.test), labels_of(clean.test))


@needs_assets
@pytest.mark.slow
def test_the_command_runs_a_set_given_by_path_and_writes_its_table(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = rng.integers(0, 100, (200, 20, 20)) + 100 * labels[:, None, None]
    np.savez(tmp_path / "own.npz", images=images.astype(np.uint8), labels=labels)
    command = ["vision", "--quick", "--targets", f"shades={tmp_path / 'own.npz'}"]
    command += ["--methods", "standard", "FLOW", "--results", str(tmp_path)]
    forgetting.main(command)
    assert "forgetting_shades.md" in capsys.readouterr().out
    records = study.read_records(tmp_path / "forgetting_shades.jsonl")
    assert [(r["method"], r["seed"]) for r in records] == [
        (name, seed) for seed in (0, 1) for name in ("standard", "FLOW")
    ]
    assert all(record["target"]["accuracy"] > 90 for record in records)
    forgetting.main(command)
    assert study.read_records(tmp_path / "forgetting_shades.jsonl") == records


# --- on a user's own model and data ----------------------------------------------------------


def test_the_study_runs_on_a_model_of_ones_own_in_one_script(tmp_path, capsys):
    from examples import measure_forgetting

    assert (
        len((forgetting.README.parent / "examples/measure_forgetting.py").open().readlines()) < 100
    )
    given = ["--methods", "standard", "FLOW", "FLOW, sampler", "--rates", "0.1", "--seeds", "2"]
    given += ["--epochs", "5", "--output", str(tmp_path / "mine")]
    page = measure_forgetting.main(given)
    assert page in capsys.readouterr().out
    records = study.read_records(tmp_path / "mine.jsonl")
    kept = {(r["method"], r["seed"]): r["retained"]["old accuracy"] for r in records}
    assert len(kept) == 6
    assert all(kept["FLOW", seed] > kept["standard", seed] + 2 for seed in (0, 1))
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    assert "| FLOW | standard |" in (tmp_path / "mine.md").read_text()


# --- the paper's image folders ---------------------------------------------------------------


class TinyBody(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def shades(folder, classes, images):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 60, (30, 40, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}/{number}.png")


def test_image_folders_are_learned_by_one_command(tmp_path):
    for part in ("train", "test"):
        shades(tmp_path / "new" / part, 3, 20)
    shades(tmp_path / "old", 2, 5)
    command = ["--imagenet", str(tmp_path / "old"), "--targets", f"shades={tmp_path / 'new'}"]
    command += ["--methods", "standard", "FLOW", "FLOW, sampler", "LoRA", "--rates", "0.01"]
    command += ["--seeds", "1", "--epochs", "2", "--batch", "16", "--pixels", "24"]
    command += ["--workers", "0", "--results", str(tmp_path)]
    network = nn.Sequential(TinyBody(), nn.Linear(8, 2))
    records = folders.main(command, network)
    assert [record["method"] for record in records] == ["standard", "FLOW", "FLOW, sampler", "LoRA"]
    assert all(record["target"]["accuracy"] > 80 for record in records)
    assert (tmp_path / "forgetting_resnet18_shades.jsonl").exists()


def test_images_are_cut_from_the_middle_or_at_random(tmp_path):
    shades(tmp_path, 1, 1)
    plain, augmented = (folders.Images(tmp_path, 16, augment=flag) for flag in (False, True))
    assert plain[0][0].shape == (3, 16, 16)
    assert torch.equal(plain[0][0], plain[0][0])
    assert len({augmented[0][0].sum().item() for _ in range(8)}) > 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no images: give it one folder for each class"):
        folders.Images(tmp_path / "empty", 16)
