"""Text files and chats as token samples, and the models that read them."""

from flowdata.text.formats import Fields, find_fields
from flowdata.text.joining import join_replies
from flowdata.text.models import load_model, load_tokenizer
from flowdata.text.read import read_rows
from flowdata.text.tokens import TokenSamples, tokenize_rows

__all__ = [
    "Fields",
    "TokenSamples",
    "find_fields",
    "join_replies",
    "load_model",
    "load_tokenizer",
    "read_rows",
    "tokenize_rows",
]
