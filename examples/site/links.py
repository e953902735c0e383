"""A hook of MkDocs: what the guides link to outside of their folder becomes part of the site.

A guide links to an example, a notebook or a page of results by its place in the repository, so that
the link works where the repository is read. In the site that file is a page below ``repository/``:
Markdown and pictures as they are, source and notebooks as code. Their own links are followed, too.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

GUIDES = Path(__file__).parent.parent / "guides"
ROOT = GUIDES.parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")  # the path of a link or picture, no address
FOLDER = re.compile(r"\[([^]]+)\]\((?!\w+:)[^)#\s]*/\)")  # a link to a folder, which has no page
SHOWN_AS_CODE = {".py": "python", ".yaml": "yaml", ".jsonl": "json"}
MOST_SHOWN = 50_000  # characters of a file; the rest of a long list of results tells no more


def on_files(files: Files, config: Any) -> Files:
    """Add every file that can be reached from the guides by links."""
    waiting = list(GUIDES.rglob("*.md"))
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in targets_of(page) - known:
            known.add(target)
            if not target.is_relative_to(GUIDES):
                files.append(generated(config, target))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let a page's links lead to where the site has their files."""
    source = source_of(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = resolved(source, match.group())
        if target is None:
            return match.group()
        return os.path.relpath(uri_of(target), Path(page.file.src_uri).parent)

    return LINK.sub(moved, FOLDER.sub(r"\1", markdown))


def generated(config: Any, path: Path) -> File:
    """Return a file of the repository as one of the site."""
    uri, hidden = uri_of(path), InclusionLevel.NOT_IN_NAV
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=notebook_page(path), inclusion=hidden)
    if path.suffix in SHOWN_AS_CODE:
        code = path.read_text()[:MOST_SHOWN]
        title = path.relative_to(ROOT).as_posix()
        content = f"# {title}\n\n```{SHOWN_AS_CODE[path.suffix]}\n{code}\n```\n"
        return File.generated(config, uri, content=content, inclusion=hidden)
    return File.generated(config, uri, abs_src_path=str(path), inclusion=hidden)


def notebook_page(path: Path) -> str:
    """Return a notebook's cells as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def targets_of(page: Path) -> set[Path]:
    """Return the files of the repository that a page links to."""
    links = LINK.findall(page.read_text())
    return {target for link in links if (target := resolved(page, link)) is not None}


def resolved(page: Path, link: str) -> Path | None:
    """Return the file that a page's link names, or None if there is none: MkDocs tells of it."""
    target = Path(os.path.normpath(page.parent / link))
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def uri_of(path: Path) -> str:
    """Return a file's place in the site's sources."""
    if path.is_relative_to(GUIDES):
        return path.relative_to(GUIDES).as_posix()
    is_shown = path.suffix == ".ipynb" or path.suffix in SHOWN_AS_CODE
    return f"repository/{path.relative_to(ROOT).as_posix()}{'.md' if is_shown else ''}"


def source_of(uri: str) -> Path:
    """Return the file of the repository that has this place in the site's sources."""
    if not uri.startswith("repository/"):
        return GUIDES / uri
    path = ROOT / uri.removeprefix("repository/")
    return path if path.exists() else path.with_suffix("")
