"""An extension of Griffe: docstrings of this repository, in the words that mkdocstrings reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

REPLACEMENTS = (
    (r"^Example:$", "Examples:"),
    (r"^Raises \(when called\):$", "Raises:"),
    (r"::$", ":"),  # before an indented block, which Markdown takes for code without a second colon
    (r"^( *\w+: )>=", r"\1≥"),  # which would begin a quotation
    # A table of reStructuredText is set as it stands.
    (r"(?ms)^(={4,}[ =]*\n.*^={4,}[ =]*)$", r"```text\n\1\n```"),
)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of each object before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object that has one."""
        if obj.docstring:
            for pattern, replacement in REPLACEMENTS:
                obj.docstring.value = re.sub(
                    pattern, replacement, obj.docstring.value, flags=re.MULTILINE
                )
