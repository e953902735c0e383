"""The pages and pictures of the results files, written from the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forgetting.methods import ABLATIONS, ORDER
from benchmarks.forgetting.pages import drift, drift_language, evidence, evidence_language
from benchmarks.forgetting.pages.batch_norm import batch_norm_page
from benchmarks.forgetting.pages.choices import choices_page
from benchmarks.forgetting.pages.drift_picture import draw_drift
from benchmarks.forgetting.pages.hard_samples import hard_samples_page
from benchmarks.forgetting.pages.rule import rule_page
from flowdata.study import Record, draw_picture, read_records, report, studies

SHOWN, SHOWN_PROBE = "fashion_mnist", "inverted"  # in the picture of drift
PAGES = {  # one a question, of several studies: which of them it can take, and what it makes of it
    "forgetting_drift": (drift.can_tell, drift.drift_page),
    "forgetting_drift_language": (drift_language.can_tell, drift_language.drift_page),
    "forgetting_evidence_language": (
        evidence_language.can_tell,
        evidence_language.evidence_page,
    ),
    "forgetting_evidence": (evidence.can_tell, evidence.evidence_page),
    "forgetting_batch_norm": (evidence.can_tell, batch_norm_page),
    "forgetting_hard_samples": (evidence.can_tell, hard_samples_page),
    "forgetting_choices": (evidence.can_tell, choices_page),
    "forgetting_rule": (evidence.can_tell, rule_page),
}


@dataclass(frozen=True)
class Study:
    """Runs under the same options, and the names of their page and picture.

    Attributes:
        stem: the files' name in ``benchmarks/results``.
        options: of all runs.
        records: the runs.
        first: options of the results file's first study.
    """

    stem: str
    options: Mapping[str, Any]
    records: list[Record]
    first: Mapping[str, Any]

    def name(self) -> str:
        """Return the target's name, and the options by which a further study differs."""
        options = self.options.items()
        differences = [
            f"{name} {value}" for name, value in options if self.first.get(name) != value
        ]
        return ", ".join([str(self.options["target"]).split(" on ")[-1], *differences])


def read_studies(folder: Path) -> list[Study]:
    """Return the studies of a folder's results files; a file's second one has the stem NAME_2."""
    all_studies = []
    for path in sorted(folder.glob("forgetting_*.jsonl")):
        groups = studies(read_records(path), ORDER)
        for number, (options, records) in enumerate(groups):
            stem = f"{path.stem}_{number + 1}" if number else path.stem
            all_studies.append(Study(stem, options, records, first=groups[0][0]))
    return all_studies


def publish(folder: Path) -> list[Path]:
    """Write the pages and pictures of a folder's results files beside them.

    Each question has a page, of all studies that answer it. A study that answers none of them has a
    page and a picture of its own.

    Returns:
        The files written.
    """
    all_studies, files = read_studies(folder), []
    for study in all_studies:
        if not any(can_tell(study.records) for can_tell, _ in PAGES.values()):
            page, drawing = (folder / f"{study.stem}.{kind}" for kind in ("md", "png"))
            page.write_text(report(study.options, study.records))
            drawing.write_bytes(draw_picture(study.records, variants=ABLATIONS))
            files += [page, drawing]
    for stem, (can_tell, make_page) in PAGES.items():
        records = {each.name(): each.records for each in all_studies if can_tell(each.records)}
        if records:
            files.append(folder / f"{stem}.md")
            files[-1].write_text(make_page(records))
            if make_page is drift.drift_page:
                files.append(_draw_drift(folder / f"{stem}.png", records))
    return files


def _draw_drift(path: Path, records: Mapping[str, list[Record]]) -> Path:
    shown = drift.with_all_drifts(records.get(SHOWN, next(iter(records.values()))))
    path.write_bytes(draw_drift(shown, SHOWN_PROBE, drift.OLD))
    return path
