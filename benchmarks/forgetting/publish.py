"""The pages and pictures of the results files, written from the runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forgetting import drift_language, drift_page, evidence_language_page, evidence_page
from benchmarks.forgetting.drift_picture import draw_drift
from benchmarks.forgetting.methods import ABLATIONS, ORDER
from flowdata.study import Record, draw_picture, read_records, report, studies

SHOWN, SHOWN_PROBE = "fashion_mnist", "inverted"  # in the picture of drift
_PAGES = {  # of several studies together: which of them it can take, and what it makes of them
    "forgetting_drift": (drift_page.can_tell, drift_page.drift_page),
    "forgetting_drift_language": (drift_language.can_tell, drift_language.drift_page),
    "forgetting_evidence_language": (
        evidence_language_page.can_tell,
        evidence_language_page.evidence_page,
    ),
    "forgetting_evidence": (evidence_page.can_tell, evidence_page.evidence_page),
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
    """Write a page and a picture of each study beside its results file, and of several together.

    Returns:
        The files written.
    """
    all_studies, files = read_studies(folder), []
    for study in all_studies:
        page, drawing = (folder / f"{study.stem}.{kind}" for kind in ("md", "png"))
        page.write_text(report(study.options, study.records))
        drawing.write_bytes(draw_picture(study.records, variants=ABLATIONS))
        files += [page, drawing]
    return files + _publish_together(folder, all_studies)


def _publish_together(folder: Path, all_studies: Iterable[Study]) -> list[Path]:
    """Write the pages of several studies, and the picture of vision's drift."""
    files = []
    for stem, (can_tell, page) in _PAGES.items():
        records = {each.name(): each.records for each in all_studies if can_tell(each.records)}
        if not records:
            continue
        files.append(folder / f"{stem}.md")
        files[-1].write_text(page(records))
        if page is drift_page.drift_page:
            shown = records.get(SHOWN, next(iter(records.values())))
            files.append(folder / f"{stem}.png")
            files[-1].write_bytes(
                draw_drift(drift_page.with_all_drifts(shown), SHOWN_PROBE, drift_page.OLD)
            )
    return files
