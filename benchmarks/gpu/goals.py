"""Goals, and which of them the rows meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def summarize(rows: Sequence[Row], *, is_tiny: bool = False) -> str:
    """Return a table of the goals in Markdown, and what was not measured or went wrong.

    Args:
        rows: of all parts.
        is_tiny: sizes were small, so that figures meet no goal and miss none.
    """
    lines = ["| goal | reached | met |", "| --- | --- | --- |"]
    for goal, judge in GOALS.items():
        text, is_met = judge(rows)
        met = "not measured" if is_met is None or is_tiny else "yes" if is_met else "no"
        lines.append(f"| {goal} | {text} | {met} |")
    troubles = [row for row in rows if "error" in row]
    if troubles:
        lines += ["", "What went wrong, or was not measured:", ""]
        lines += [f"- {row['part']}, {row['what']}: {_last(row['error'])}" for row in troubles]
    return "\n".join(lines) + "\n"


Judgement = tuple[str, bool | None]  # what was reached, and whether it is enough


def _tests(rows: Sequence[Row]) -> Judgement:
    outcomes = [row["outcome"] for row in rows if row["part"] == "checks" and "outcome" in row]
    passed, failed = (outcomes.count(kind) for kind in ("passed", "failed"))
    return f"{passed} passed, {failed} failed", not failed if passed else None


def _share(rows: Sequence[Row]) -> Judgement:
    shares = {
        row["what"].partition(":")[0]: row["share_of_matmul"]
        for row in _of(rows, "scoring")
        if row["what"].endswith(": flowdata") and "median" in row
    }
    text = "; ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return text or "–", min(shares.values()) >= 0.6 if shares else None


def _against_loops(rows: Sequence[Row]) -> Judgement:
    speeds: dict[str, dict[str, float]] = {}
    for row in _of(rows, "scoring"):
        case, _, loop = row["what"].partition(": ")
        if "median" in row:
            speeds.setdefault(case, {})[loop] = row["median"]
    ratios = [
        (of_case["flowdata"] / speed, f"{case}: {loop}")
        for case, of_case in speeds.items()
        for loop, speed in of_case.items()
        if "flowdata" in of_case and loop != "flowdata"
    ]
    if not ratios:
        return "–", None
    least, what = min(ratios)
    return f"{least:.2f} times the nearest, {what}", least > 1


def _head(rows: Sequence[Row]) -> Judgement:
    ours: dict[str, float] = {}
    others: dict[str, float] = {}
    for row in _of(rows, "head"):
        if (
            "ratio_to_floor" in row
            and "product" not in row["what"]
            and "columns" not in row["what"]
        ):
            way, _, size = row["what"].rpartition(", ")
            best = ours if way.startswith("flowdata") else others
            best[size] = min(row["median"], best.get(size, row["median"]))
    text = "; ".join(f"{size} {ours[size]:.1f} ms, {others[size]:.1f}" for size in ours)
    return text or "–", all(ours[size] <= others[size] for size in ours) if ours else None


def _fused(kind: str, most: float) -> Callable[[Sequence[Row]], Judgement]:
    def judge(rows: Sequence[Row]) -> Judgement:
        medians = {row["what"]: row["median"] for row in _of(rows, "fused_loss")}
        ratios = {}
        for what, value in medians.items():
            size, _, way = what.partition(": ")
            if way == f"fused {kind}":
                of_full_logits = (medians[f"{size}: {each} {kind}"] for each in ("by hand", "full"))
                ratios[size] = value / max(min(of_full_logits), 1e-9)
        text = "; ".join(f"{size} {ratio:.2f}" for size, ratio in ratios.items())
        return text or "–", max(ratios.values()) <= most if ratios else None

    return judge


def _step(rows: Sequence[Row]) -> Judgement:
    medians = {row["what"]: row["median"] for row in _of(rows, "steps") if "median" in row}
    ratios = {
        what.partition(":")[0]: value / medians[what.replace("weighted", "plain")]
        for what, value in medians.items()
        if what.endswith(": weighted")
    }
    text = "; ".join(f"{route} {ratio:.2f}" for route, ratio in ratios.items())
    return text or "–", max(ratios.values()) <= 1.03 if ratios else None


def _drift(rows: Sequence[Row]) -> Judgement:
    shares = {
        row["what"].partition(":")[0]: row["median"]
        for row in _of(rows, "drift")
        if row.get("unit") == "% of training"
    }
    text = "; ".join(f"{name} {share:.1f} %" for name, share in shares.items())
    return text or "–", max(shares.values()) <= 5 if shares else None


GOALS: dict[str, Callable[[Sequence[Row]], Judgement]] = {
    "every test that needs a GPU passes": _tests,
    "scoring reaches 60 % of the matrix products' rate": _share,
    "scoring is faster than every other loop": _against_loops,
    "the head is as fast as the fastest of its peers": _head,
    "the fused loss takes at most the time of full logits": _fused("time", 1.0),
    "and a quarter of their memory": _fused("memory", 0.25),
    "weights cost at most 3 % of a training step": _step,
    "drift at one evaluation in 100 steps costs at most 5 % of training": _drift,
}


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and "error" not in row]


def _last(text: str) -> str:
    return text.strip().splitlines()[-1][:300] if text.strip() else ""
