"""A hook of MkDocs: how to read the reference in a clone is no part of the site."""

from __future__ import annotations

import re
from typing import Any

PARAGRAPH = re.compile(r"^In a clone .*?\n\n", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave out the paragraph of a page of the reference."""
    return PARAGRAPH.sub("", markdown) if page.file.src_uri.startswith("reference/") else markdown
