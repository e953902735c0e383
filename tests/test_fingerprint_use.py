"""A fingerprint is the same before its function or model was used, and after."""

import functools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from flowdata.store.fingerprint import (
    fingerprint_callable,
    fingerprint_model,
    fingerprint_tokenizer,
)

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8"]


def word_tokenizer(shift=0, **settings):
    """A fast tokenizer of 50 words, which stand at other places of its vocabulary under a shift."""
    vocabulary = {f"w{i}": (i + shift) % 50 for i in range(50)} | {"[PAD]": 50, "[UNK]": 51}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]", **settings
    )


def tokenizing(tokenizer):
    def collate(texts):
        return tokenizer(texts, truncation=True, padding=True, max_length=3, return_tensors="pt")

    return collate


def padding():
    tokenizer = word_tokenizer()
    collate = DataCollatorForSeq2Seq(tokenizer)
    return lambda texts: collate([tokenizer(text, truncation=True, max_length=3) for text in texts])


class Computing:
    def __init__(self):
        self.width = 3

    @functools.cached_property
    def length(self):
        return 2 * self.width

    def __call__(self, texts):
        return [text[: self.length] for text in texts]


USED = {  # functions that are given texts
    "a tokenizer": lambda: tokenizing(word_tokenizer()),
    "a collator of transformers": padding,
    "a cached property": Computing,
}


@pytest.mark.parametrize("name", USED)
def test_use_leaves_a_functions_fingerprint_as_it_was(name):
    collate = USED[name]()
    before = fingerprint_callable(collate)
    collate(TEXTS)
    assert fingerprint_callable(collate) == before


def test_use_leaves_a_tokenizers_fingerprint_as_it_was():
    tokenizer = word_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=2, padding="longest")
    assert tokenizer.backend_tokenizer.truncation
    assert tokenizer.backend_tokenizer.padding
    assert fingerprint_tokenizer(tokenizer) == before
    assert fingerprint_tokenizer(word_tokenizer(shift=1)) != before


class WithTable(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @functools.cached_property
    def table(self):
        return torch.arange(3.0)

    def forward(self, x):
        return super().forward(x + self.table)


def test_a_forward_pass_that_fills_a_cached_property_leaves_a_models_as_it_was():
    model = WithTable()
    before = fingerprint_model(model)
    model(torch.ones(1, 3))
    assert "table" in vars(model)
    assert fingerprint_model(model) == before
