"""Formats of fine-tuning data: rows to conversations."""

from flowdata.text.formats.describe import (
    deciding_columns,
    read_columns,
    scored_part,
    unread_columns,
)
from flowdata.text.formats.fields import Fields
from flowdata.text.formats.find import find_fields
from flowdata.text.formats.rows import read_conversation

__all__ = [
    "Fields",
    "deciding_columns",
    "find_fields",
    "read_columns",
    "read_conversation",
    "scored_part",
    "unread_columns",
]
