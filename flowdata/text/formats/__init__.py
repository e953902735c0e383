"""Formats of fine-tuning data: rows to conversations."""

from flowdata.text.formats.fields import Fields
from flowdata.text.formats.find import find_fields
from flowdata.text.formats.rows import read_conversation

__all__ = ["Fields", "find_fields", "read_conversation"]
