"""The pages and pictures of the results files, and the README's tables, written from the runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.forgetting import drift_language, drift_page
from benchmarks.forgetting.methods import ABLATIONS, ORDER
from benchmarks.forgetting.readme import Study, readme_table, with_table
from flowdata.study import draw_picture, read_records, report, studies

_PAGES_ON_DRIFT = {
    "forgetting_drift": drift_page,
    "forgetting_drift_language": drift_language,
}


def read_studies(folder: Path) -> list[Study]:
    """Return the studies of a folder's results files; a file's second one has the stem NAME_2."""
    all_studies = []
    for path in sorted(folder.glob("forgetting_*.jsonl")):
        groups = studies(read_records(path), ORDER)
        for number, (options, records) in enumerate(groups):
            stem = f"{path.stem}_{number + 1}" if number else path.stem
            all_studies.append(Study(stem, options, records, first=groups[0][0]))
    return all_studies


def publish(folder: Path, readme: Path | None) -> list[Path]:
    """Write a page and a picture of each study beside its results file, and the README's tables.

    Returns:
        The files written.
    """
    all_studies, files = read_studies(folder), []
    for study in all_studies:
        page, drawing = (folder / f"{study.stem}.{kind}" for kind in ("md", "png"))
        page.write_text(report(study.options, study.records))
        drawing.write_bytes(draw_picture(study.records, variants=ABLATIONS))
        files += [page, drawing]
    for stem, page_on_drift in _PAGES_ON_DRIFT.items():
        of_kind = {
            study.name(): study.records
            for study in all_studies
            if page_on_drift.can_tell(study.records)
        }
        if of_kind:
            file = folder / f"{stem}.md"
            file.write_text(page_on_drift.drift_page(of_kind))
            files.append(file)
    if readme is not None:
        readme.write_text(with_table(readme.read_text(), readme_table(all_studies)))
        files.append(readme)
    return files
