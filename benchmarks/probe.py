"""The linear probe against scikit-learn on every table set that scikit-learn carries with it.

`python -m benchmarks probe` fits a head by `fit_head` and scikit-learn's pipeline of a
`StandardScaler` with `LogisticRegressionCV` (chosen by log-loss on five folds) or `RidgeCV`, on the
same three quarters of each set, and compares accuracy and log-loss, or R², on the rest, over
several splits. Both see the raw columns. The bound: no worse than half a point and 0.02 nats on any
set.
"""

from __future__ import annotations

import argparse
import warnings
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from benchmarks.rows import RESULTS, machine
from flowdata.probe import fit_head

CLASSES = ("iris", "wine", "breast_cancer", "digits")
VALUES = ("diabetes", "linnerud")
POINTS, NATS = 0.5, 0.02  # by how much the probe may be worse
Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Print the comparison on each set, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks probe", description=__doc__)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--sets", nargs="*", choices=CLASSES + VALUES, default=CLASSES + VALUES)
    parser.add_argument("--dry-run", action="store_true", help="print, but keep no results")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.sets:
        rows.append(compare(name, options.splits))
        print(_markdown(rows[-1]), flush=True)
    if not options.dry_run:
        path = RESULTS / "probe.md"
        path.write_text(table(rows, " ".join(["python -m benchmarks probe", *arguments])))
        print(path)
    if worse := [row["set"] for row in rows if is_worse(row)]:
        raise SystemExit(f"worse than scikit-learn by more than the bound: {', '.join(worse)}")


def compare(name: str, splits: int) -> Row:
    """Return both sides' figures on a set, as means over splits.

    Args:
        name: of the set, one of `CLASSES` and `VALUES`.
        splits: how often the set is split into training and test samples.
    """
    features, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    figures: dict[str, list[dict[str, float]]] = {"flowdata": [], "scikit-learn": []}
    for seed in range(splits):
        parts = train_test_split(
            features, targets, random_state=seed, stratify=targets if name in CLASSES else None
        )
        for side, run in (("flowdata", _ours), ("scikit-learn", _theirs)):
            start = perf_counter()
            outputs = run(name, *parts[:3])
            seconds = perf_counter() - start
            figures[side].append({**_measures(name, outputs, parts[3]), "seconds": seconds})
    means = {
        side: {key: mean(run[key] for run in runs) for key in runs[0]}
        for side, runs in figures.items()
    }
    return {"set": name, "shape": features.shape, "splits": splits, **means}


def is_worse(row: Row) -> bool:
    """Return whether the probe is worse than scikit-learn by more than the bound."""
    ours, theirs = row["flowdata"], row["scikit-learn"]
    return bool(
        ours["points"] < theirs["points"] - POINTS
        or ours.get("nats", 0.0) > theirs.get("nats", 0.0) + NATS
    )


def _ours(name: str, features: np.ndarray, tests: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The probe's outputs for the test samples: probabilities of classes, or values."""
    outputs = int(targets.max()) + 1 if name in CLASSES else targets[0].size
    dtype = torch.long if name in CLASSES else torch.float32
    head = nn.Linear(features.shape[1], outputs)
    fit_head(head, torch.tensor(features, dtype=torch.float32), torch.tensor(targets, dtype=dtype))
    with torch.no_grad():
        logits = head(torch.tensor(tests, dtype=torch.float32)).double()
    return (logits.softmax(1) if name in CLASSES else logits).numpy()


def _theirs(name: str, features: np.ndarray, tests: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The outputs of scikit-learn's pipeline for the test samples."""
    with warnings.catch_warnings():
        # It announces changes of its own defaults, and that the weakest penalties take longer.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        if name in CLASSES:
            model = LogisticRegressionCV(scoring="neg_log_loss", cv=5, max_iter=2000)
            fitted = make_pipeline(StandardScaler(), model).fit(features, targets)
            return np.asarray(fitted.predict_proba(tests))
        model = RidgeCV(np.logspace(-3, 3, 13))
        return np.asarray(
            make_pipeline(StandardScaler(), model).fit(features, targets).predict(tests)
        )


def _measures(name: str, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy in percent and log-loss in nats, or R² in percent."""
    if name in VALUES:
        return {"points": 100 * r2_score(targets, outputs.reshape(targets.shape))}
    accuracy = (outputs.argmax(1) == targets).mean()
    return {"points": 100 * float(accuracy), "nats": log_loss(targets, outputs)}


def table(rows: list[Row], command: str) -> str:
    """Return the rows in Markdown, with the machine named."""
    facts = machine()
    worse = [row["set"] for row in rows if is_worse(row)]
    lines = [
        "# The linear probe against scikit-learn",
        "",
        f"Made by `{command}` at commit {facts['commit']}, {facts['processor']}, torch "
        f"{facts['versions']['torch']}. Means over the splits; accuracy, or R², in percent. "
        f"The bound is {POINTS} points and {NATS} nats; "
        + (f"missed on {', '.join(worse)}." if worse else "it holds on every set."),
        "",
        "| set | samples × features | splits | measure | flowdata | scikit-learn | log-loss, "
        "flowdata | log-loss, scikit-learn | seconds, flowdata | seconds, scikit-learn |",
        "| --- " * 10 + "|",
        *map(_markdown, rows),
    ]
    return "\n".join(lines) + "\n"


def _markdown(row: Row) -> str:
    sides = [row["flowdata"], row["scikit-learn"]]
    cells = [
        row["set"],
        " × ".join(map(str, row["shape"])),
        str(row["splits"]),
        "accuracy" if row["set"] in CLASSES else "R²",
        *(f"{side['points']:.2f}" for side in sides),
        *(f"{side['nats']:.4f}" if "nats" in side else "" for side in sides),
        *(f"{side['seconds']:.2f}" for side in sides),
    ]
    return f"| {' | '.join(cells)} |"
