"""The fingerprint of a function of batches: what it notices, and that use leaves it as it was."""

import argparse
import functools
import importlib
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
)

from flowdata.store.fingerprint import (
    fingerprint_callable,
    fingerprint_model,
    fingerprint_tokenizer,
)
from flowdata.store.fingerprint.model import new_describer

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


class Setting:
    """Sets what is its tokenizer's, by one way or another, and counts its calls."""

    calls = 0

    def __init__(self, shift=0, way="attribute", length=6):
        self.tokenizer, self.way = word_tokenizer(shift), way
        self.parts = types.SimpleNamespace(settings=Computing(), tokenizer=word_tokenizer(shift))
        self.kept, self.options = {"": []}, {"max_length": length}

    def __call__(self, texts):
        if self.way == "attribute":
            self.tokenizer.padding_side = "left"
            self.tokenizer.pad_token = "w0"
            self.parts.settings.latest = texts
        elif self.way == "variable":
            tokenizer = self.tokenizer
            tokenizer.padding_side = tokenizer.truncation_side = "left"
            parts = self.parts
            parts.tokenizer.chat_template = "{{ messages }}"
        elif self.way == "item":
            self.kept[""].append(texts)
            self.options.setdefault("padding", True)
        Setting.calls += 1
        return self.tokenizer(texts, truncation=True, padding=True, max_length=4)

    def batch(self, texts):
        self.latest = texts
        return self(texts)


WORDS = word_tokenizer()


def set_globally(texts):
    WORDS.padding_side = "left"
    return WORDS(texts, padding=True)


def setting_what_it_captures():
    tokenizer = word_tokenizer()

    def collate(texts):
        tokenizer.padding_side = "left"
        return tokenizer(texts, padding=True)

    return collate


USED = {  # functions that are given texts
    "a tokenizer": lambda: tokenizing(word_tokenizer()),
    "a collator of transformers": padding,
    "a cached property": Computing,
    "an attribute's attribute": Setting,
    "a variable's attribute": lambda: Setting(way="variable"),
    "an item": lambda: Setting(way="item"),
    "a method": lambda: Setting().batch,
    "a global's attribute": lambda: set_globally,
    "a captured one's attribute": setting_what_it_captures,
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


def with_settings(**settings):
    tokenizer = word_tokenizer()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizing(tokenizer)


class Reversing(PreTrainedTokenizerFast):
    def __init__(self, *, marks):
        super().__init__(tokenizer_object=word_tokenizer().backend_tokenizer)
        self.marks = marks


def processor(shift=0, size=8, template=None):
    images = CLIPImageProcessor(size={"shortest_edge": size})
    parts = CLIPProcessor(images, word_tokenizer(shift))
    parts.chat_template = template
    return tokenizing(parts)


class Scaling:
    """Has a `to_dict` of its own, which tells nothing of the factor."""

    def __init__(self, weight, factor=1):
        self.weight, self._factor = weight, factor

    def to_dict(self):
        return {"weight": self.weight}

    def __call__(self, x):
        return x * self.weight * self._factor


def configured(weight):
    config = BertConfig()
    config.weights = [torch.tensor([weight])]
    return tokenizing(config)


DIFFERENT = {
    "where texts are cut": (with_settings, {"model_max_length": 3}, {"model_max_length": 6}),
    "the side of a cut": (with_settings, {"truncation_side": "left"}, {}),
    "the side of padding": (with_settings, {"padding_side": "left"}, {}),
    "a template": (with_settings, {"chat_template": "{{ messages }}"}, {}),
    "a special token": (with_settings, {"pad_token": "w0"}, {}),
    "a subclass": (lambda marks: tokenizing(Reversing(marks=marks)), {"marks": 1}, {"marks": 2}),
    "a processor's vocabulary": (processor, {"shift": 1}, {}),
    "a processor's size of images": (processor, {"size": 16}, {}),
    "a processor's template": (processor, {"template": "{{ messages }}"}, {}),
    "beside a to_dict of one's own": (Scaling, {"weight": 1, "factor": 2}, {"weight": 1}),
    "a tensor's fifth digit": (
        lambda weight: Scaling(torch.tensor(weight)),
        {"weight": 0.12341},
        {"weight": 0.12344},
    ),
    "what stands beside an attribute that is set": (Setting, {"shift": 1}, {}),
    "what stands beside a variable's": (
        Setting,
        {"shift": 1, "way": "variable"},
        {"way": "variable"},
    ),
    "a tensor in a configuration": (configured, {"weight": 0.12341}, {"weight": 0.12344}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_decides_on_a_functions_batches_changes_its_fingerprint(name):
    make, first, second = DIFFERENT[name]
    assert fingerprint_callable(make(**first)) == fingerprint_callable(make(**first))
    assert fingerprint_callable(make(**first)) != fingerprint_callable(make(**second))


def test_what_calls_fill_is_left_out_and_named():
    describer = new_describer()
    describer.describe(Setting(), "mine")
    names = ("kept", "options", "tokenizer.pad_token", "tokenizer.padding_side")
    names += ("tokenizer.truncation_side", "parts.tokenizer.chat_template")
    places = {"Setting.calls", *(f"mine.{name}" for name in names)}
    assert set(describer.gaps) == {f"{place} (calls fill it)" for place in places}


CLEANING = """
import proj.clean


def by_path(x):
    return proj.clean.scaled(x)


def importing(x):
    from proj.clean import scaled

    return scaled(x)


def importing_a_module(x):
    from . import late

    return late.scaled(x)


def importing_by_path(x):
    import proj.late

    return proj.late.scaled(x)


def importing_under_a_name(x):
    import proj.late as other

    return other.scaled(x)


def of_what_is_not_there(x):
    import a_package_that_is_not_there

    return x
"""
PROJECT = ["by_path", "importing", "importing_a_module", "importing_by_path"]
PROJECT += ["importing_under_a_name"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes a package whose helpers scale by a factor, and imports it anew."""
    folder = tmp_path / "proj"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor):
        helper = f"import proj\n\ndef scaled(x):\n    return {factor} * x\n"
        for name, text in (("__init__", ""), ("clean", helper), ("late", helper)):
            (folder / f"{name}.py").write_text(text)
        (folder / "functions.py").write_text(CLEANING)
        for name in [name for name in sys.modules if name.partition(".")[0] == "proj"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("proj.functions")

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "proj"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", PROJECT)
def test_code_reached_by_modules_and_imports_changes_a_functions_fingerprint(project, name):
    function = getattr(project(2), name)
    before = fingerprint_callable(function)
    assert function(3) == 6
    assert fingerprint_callable(function) == before
    assert fingerprint_callable(getattr(project(2), name)) == before
    assert fingerprint_callable(getattr(project(5), name)) != before


def test_an_import_that_fails_is_named(project):
    describer = new_describer()
    describer.describe(project(2).of_what_is_not_there, "mine")
    assert list(describer.gaps) == ["'import a_package_that_is_not_there' of mine (is not there)"]


def test_attributes_of_a_function_count_but_for_those_that_it_fills():
    def collate(texts):
        collate.calls += 1
        return texts[: collate.length]

    prints = []
    for calls, length in ((0, 1), (7, 1), (0, 2)):
        collate.calls, collate.length = calls, length
        prints.append(fingerprint_callable(collate))
    assert prints[0] == prints[1] != prints[2]


OPTIONS = argparse.Namespace(scale=2.0, output="here")


class Batcher:
    """Reads an option of those that it is given."""

    def __init__(self, options):
        self.scale = options.scale


def scaled(samples, options):
    return samples * options.scale


def by_helper(samples):
    return scaled(samples, OPTIONS)


def by_word(samples):
    return samples * getattr(OPTIONS, "scale")  # noqa: B009


def by_key(samples):
    return samples * vars(OPTIONS)["scale"]


def by_class(samples):
    return samples * Batcher(OPTIONS).scale


@pytest.mark.parametrize("collate", [by_helper, by_word, by_key, by_class])
def test_options_that_are_handed_on_count_where_they_are_read(collate, monkeypatch):
    first = fingerprint_callable(collate)
    monkeypatch.setattr(OPTIONS, "output", "there")
    assert fingerprint_callable(collate) == first
    monkeypatch.setattr(OPTIONS, "scale", 5.0)
    assert fingerprint_callable(collate) != first
