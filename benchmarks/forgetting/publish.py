"""Reads the results files, and writes what they say: pages, pictures, the README's tables."""

from __future__ import annotations

from pathlib import Path

from benchmarks.forgetting.readme import Study, readme_table, with_table
from flowdata.study.picture import draw_picture
from flowdata.study.runs import read_records
from flowdata.study.table import report, studies


def read_studies(folder: Path) -> list[Study]:
    """Return the studies of all results files of a folder; a file's further ones are numbered."""
    found = []
    for path in sorted(folder.glob("forgetting_*.jsonl")):
        groups = studies(read_records(path))
        for number, (options, records) in enumerate(groups):
            stem = f"{path.stem}_{number + 1}" if number else path.stem
            found.append(Study(stem, options, records, first=groups[0][0]))
    return found


def publish(folder: Path, readme: Path | None) -> list[Path]:
    """Write a page and a picture of each study beside its results file, and the README's tables."""
    found, written = read_studies(folder), []
    for study in found:
        page, drawing = (folder / f"{study.stem}.{kind}" for kind in ("md", "png"))
        page.write_text(report(study.options, study.records))
        drawing.write_bytes(draw_picture(study.options, study.records))
        written += [page, drawing]
    if readme is not None:
        readme.write_text(with_table(readme.read_text(), readme_table(found)))
        written.append(readme)
    return written
