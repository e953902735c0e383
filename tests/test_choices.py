"""What each rule chooses among a study's runs."""

import math

from flowdata.study import choices, report


def record(method, rate, seed, new, old, agreement):
    drift = {"kl": 1 - agreement, "reverse_kl": 0.0, "cosine": agreement, "agreement": agreement}
    drift |= {"samples": 64, "head": "frozen", "of": "samples"}
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "options": {"study": "mine"},
        "validation": new,
        "target": {"accuracy": new},
        "retained": {"old accuracy": old},
        "drift": {"noise": drift},
    }


RUNS = [
    record("standard", 0.1, 0, 90.0, 20.0, 0.2),
    record("standard", 0.01, 0, 80.0, 75.0, 0.85),
    record("FLOW", 0.1, 0, 84.0, 70.0, 0.8),
    record("FLOW", 0.01, 0, 70.0, 78.0, 0.9),
    record("standard", 0.1, 1, 91.0, 22.0, 0.2),
    record("standard", 0.01, 1, 80.0, 60.0, 0.7),
    record("FLOW", 0.1, 1, 85.0, 72.0, 0.82),
    record("FLOW", 0.01, 1, 70.0, 78.0, 0.88),
]
BEGUN = record("standard", 0.1, 2, 99.0, 9.0, 0.1)  # the only run of its seed so far


def test_validation_alone_chooses_what_forgets_and_drift_what_does_not():
    chosen = choices(RUNS, lambda r: r["target"]["accuracy"] + r["retained"]["old accuracy"])
    keys = {rule: [(run["method"], run["rate"]) for run in runs] for rule, runs in chosen.items()}
    assert keys["blind"] == [("standard", 0.1)] * 2
    assert keys["by drift, noise"] == [("standard", 0.01), ("FLOW", 0.1)]
    assert keys["best"] == [("standard", 0.01), ("FLOW", 0.1)]
    assert choices(RUNS, exchange=0)["by drift, noise"] == choices(RUNS)["blind"]


def test_a_seed_that_lacks_runs_has_no_choice_to_compare():
    assert choices([BEGUN, *RUNS]) == choices(RUNS)
    assert report({"study": "mine"}, [*RUNS, BEGUN]).count("| blind | 90.5 ± 0.7 |") == 1
    assert choices([BEGUN])["blind"] == [BEGUN]  # where no seed has more runs it is whole


def test_losses_of_language_models_are_weighed_in_nats():
    runs = [
        record(m, r, 0, -loss, 0, 1 - kl)
        for m, r, loss, kl in [("a", 1, 0.9, 0.5), ("b", 2, 1.0, 0.1)]
    ]
    for run in runs:
        run["drift"]["noise"]["of"] = "tokens"
    assert choices(runs)["by drift, noise"][0]["method"] == "b"
    assert choices(runs)["blind"][0]["method"] == "a"


def test_accuracies_of_a_study_are_weighed_as_shares_whatever_they_are_of():
    rows = [("a", 1, 62.0, 0.2), ("b", 2, 60.0, 0.9), ("c", 3, 0.5, 0.95)]  # c knows nothing more
    for unit in (1, 100):
        runs = [record(m, rate, 0, new / unit, 0, kept) for m, rate, new, kept in rows]
        for of in ("samples", "tokens"):
            for run in runs:
                run["drift"]["noise"]["of"] = of
            assert choices(runs)["by drift, noise"][0]["method"] == "b"
            assert choices(runs, exchange=0)["by drift, noise"][0]["method"] == "a"


def test_losses_of_classifiers_are_weighed_in_nats_too():
    rows = [("a", 0.01, -0.5, 0.9), ("b", 0.1, -0.3, 0.6), ("c", 0.3, math.nan, 0.1)]
    runs = [record(m, rate, 0, new, 0, kept) for m, rate, new, kept in rows]
    assert choices(runs)["by drift, noise"][0]["method"] == "a"
    assert choices(runs)["blind"][0]["method"] == "b"


def test_a_rule_that_can_not_choose_is_left_out_of_the_page_and_said_to_be():
    rows = [("standard", 0.01, -0.5, 0.9), ("standard", 0.1, 0.3, 0.6)]
    page = report({}, [record(m, rate, 0, new, 0, kept) for m, rate, new, kept in rows])
    assert "| blind |" in page
    assert "| by drift, noise" not in page
    assert (
        "Left out, by drift, noise: validation scores must be accuracies, 0 or more each, or "
        "−loss, 0 or less each; got -0.5 beside 0.3." in page
    )
    diverged = [record(m, rate, 0, math.nan, 0, kept) for m, rate, _, kept in rows]
    assert "Left out, by drift, noise: all runs diverged" in report({}, diverged)


def test_the_best_run_is_none_that_diverged():
    runs = [record("standard", 0.1, 0, math.nan, 0, 0.1), *RUNS[1:4]]
    assert choices(runs, lambda run: run["target"]["accuracy"])["best"] == [RUNS[2]]


def test_the_page_shows_the_choices_beside_the_blind_one():
    page = report({"study": "mine"}, RUNS)
    rows = [line for line in page.splitlines() if line.startswith(("| blind", "| by drift"))]
    assert rows[0].startswith("| blind | 90.5 ± 0.7 | 21.0 ± 1.4 |")
    assert "FLOW 0.1" in rows[1]
    without = [{k: v for k, v in run.items() if k != "drift"} for run in RUNS]
    assert "by drift" not in report({"study": "mine"}, without)
