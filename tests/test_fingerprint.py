import dataclasses
import functools
import os
import random
import subprocess
import sys
import types
from pathlib import PurePosixPath
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from flowdata.store.fingerprint import (
    fingerprint_callable,
    fingerprint_dataset,
    fingerprint_model,
    fingerprint_tokenizer,
)
from tests.models import TinyResNet, tiny_llama


class Squares(Dataset):
    def __init__(self, count, changed=None):
        self.count, self.changed = count, changed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index**2)), "y": -1 if index == self.changed else index}


class Noisy(Squares):
    def __getitem__(self, index):
        return torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002


def test_one_changed_bit_of_any_tensor_changes_a_models_fingerprint():
    model = TinyResNet()
    before = fingerprint_model(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        flat = tensor.detach().view(-1)
        kept = flat[-1].clone()
        flat[-1] = kept + 1 if kept.dtype == torch.int64 else torch.nextafter(kept, kept + 1)
        assert fingerprint_model(model) != before
        flat[-1] = kept
    assert fingerprint_model(model) == before


def test_swapped_rows_and_values_far_apart_change_it():
    layer = nn.Linear(300, 300, bias=False)
    before = fingerprint_model(layer)
    with torch.no_grad():
        layer.weight[[0, 299]] = layer.weight[[299, 0]]
    assert fingerprint_model(layer) != before


def test_it_depends_on_names_dtype_and_configuration_but_not_on_flags():
    model = tiny_llama()
    before = fingerprint_model(model)
    assert fingerprint_model(model.train()) == fingerprint_model(model.eval()) == before
    assert fingerprint_model(tiny_llama(rms_norm_eps=1e-3)) != before
    assert fingerprint_model(model.bfloat16()) != before
    assert fingerprint_model(nn.Sequential(nn.ReLU())) != fingerprint_model(
        nn.Sequential(nn.GELU())
    )


def test_it_depends_on_the_adapters_that_act_and_how_strongly():
    from peft import LoraConfig, get_peft_model

    def adapted(alpha=8):
        model = tiny_llama()
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj"], lora_alpha=alpha, init_lora_weights=False)
        model = get_peft_model(model, config, adapter_name="a")
        model.add_adapter("b", config)
        return model

    before = fingerprint_model(adapted())
    assert fingerprint_model(adapted()) == before
    assert fingerprint_model(adapted(alpha=64)) != before
    other = adapted()
    other.set_adapter("b")
    assert fingerprint_model(other) != before
    other = adapted()
    with other.disable_adapter():
        assert fingerprint_model(other) != before


def test_it_depends_on_numbers_of_the_users_own():
    class Scaled(nn.Linear):
        def __init__(self, scale):
            super().__init__(2, 2)
            self.scale = scale
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    assert fingerprint_model(Scaled(2.0)) == fingerprint_model(Scaled(2.0).eval())
    assert fingerprint_model(Scaled(2.0)) != fingerprint_model(Scaled(3.0))


def test_adapters_can_be_left_out():
    from peft import LoraConfig, get_peft_model

    def adapted(seed):
        model = tiny_llama()
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))

    first, second = adapted(1), adapted(2)
    assert fingerprint_model(first) != fingerprint_model(second)
    assert fingerprint_model(first, skip_adapters=True) == fingerprint_model(
        second, skip_adapters=True
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TensorDataset(torch.arange(9)), TensorDataset(torch.arange(9).flip(0))),
        (TensorDataset(torch.arange(9)), TensorDataset(torch.arange(8))),
        (TensorDataset(torch.arange(9)), TensorDataset(torch.arange(9).int())),
        (Squares(400), Squares(400, changed=399)),
        (Squares(5000), Squares(5001)),
        (["a", "b"], ["ab", ""]),
        ([{"a": 1, "b": 2}], [{"a": 1, "b": 3}]),
    ],
)
def test_other_content_gives_another_fingerprint(first, second):
    assert fingerprint_dataset(first) == fingerprint_dataset(first)
    assert fingerprint_dataset(first) != fingerprint_dataset(second)


def test_random_transforms_give_the_same_and_leave_the_generators_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert fingerprint_dataset(Noisy(30)) == fingerprint_dataset(Noisy(30))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # noqa: NPY002


def test_hugging_face_rows_count_and_not_how_they_are_kept(tmp_path):
    rows = {"text": ["a", None, "ccc"], "ids": [[1, 2], [], [3]], "n": [1.5, 2.0, None]}
    data = datasets.Dataset.from_dict(rows)
    before = fingerprint_dataset(data)
    data.save_to_disk(tmp_path / "saved")
    assert fingerprint_dataset(datasets.load_from_disk(tmp_path / "saved")) == before
    assert (
        fingerprint_dataset(datasets.concatenate_datasets([data, data]).select([3, 1, 2])) == before
    )
    assert fingerprint_dataset(data.select([1, 0, 2])) != before
    for name, values in (
        ("ids", [[1], [2], [3]]),
        ("n", [1.5, None, 2.0]),
        ("text", ["a", "", "ccc"]),
    ):
        assert fingerprint_dataset(datasets.Dataset.from_dict(rows | {name: values})) != before


def test_content_that_has_no_rule_asks_for_an_id():
    with pytest.raises(TypeError, match=r"dataset\[1\] holds a builtins.object.*pass dataset_id="):
        fingerprint_dataset([1, object()])


def test_functions_differ_by_code_defaults_and_captured_values():
    def make(factor, default=1):
        def scale(x, y=default):
            return x * factor + y

        return scale

    assert fingerprint_callable(make(2)) == fingerprint_callable(make(2))
    prints = {fingerprint_callable(f) for f in (make(2), make(3), make(2, 5), len, None)}
    prints |= {fingerprint_callable(functools.partial(make(2), y=n)) for n in (1, 2)}
    assert len(prints) == 7


def outputs_of_two_processes(code):
    """What code prints in two processes, whose sets and dictionaries hash in different orders."""
    return {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }


def test_fingerprints_are_those_of_another_process():
    code = (
        "from tests.test_fingerprint import *\n"
        "f = lambda x: x in {'a', 'b', 'c'}\n"
        "print(fingerprint_callable(f), fingerprint_model(tiny_llama()), "
        "fingerprint_dataset(Squares(10)))"
    )
    assert len(outputs_of_two_processes(code)) == 1


# --- digests of stores on disk: other ones ask for another mark in identity.py ------------------


def filled(module):
    """The module with parameters that count up, the same wherever and whenever it is made."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 - 3)
    return module


@dataclasses.dataclass
class Point:
    x: int
    y: float


class WordTokenizer:
    """As much of a Hugging Face tokenizer as a fingerprint reads."""

    is_fast, chat_template = False, "{{ messages }}"
    special_tokens_map: ClassVar = {"eos_token": "</s>"}

    def get_vocab(self):
        return {"b": 1, "a": 0}


class Settings:
    def to_dict(self):
        return {"width": 8, "_name_or_path": "there", "inner": {"dtype": "x", "depth": 2}}


class Configured(nn.Linear):
    """A layer with a configuration, a number of its own and a buffer."""

    def __init__(self):
        super().__init__(3, 2)
        self.config, self.scale = Settings(), 2.5
        self.register_buffer("steps", torch.tensor(4))


EVERY_KIND_OF_VALUE = [
    {"b": torch.arange(6).view(2, 3), "a": np.arange(3, dtype=np.int16), "empty": torch.empty(0)},
    (b"bytes", "text", 3, 2.5, True, None, 1j, np.float32(0.5), PurePosixPath("a/b")),
    {"set", "of", "words"},
    Point(1, 2.0),
    np.array(["a", None], dtype=object),
    torch.ones(2, dtype=torch.bfloat16),
]
ROWS = {
    "text": ["a", None, "ccc"],
    "ids": [[1, 2], [], [3]],
    "number": [1.5, 2.0, None],
    "pair": [{"x": 1, "y": "u"}, {"x": 2, "y": "v"}, {"x": 3, "y": "w"}],
}


PINNED_MODELS = {
    "linear": "3173fe5d03f770d56b560e197963d4db492ca6c545a991b00c92c09d24ce1285",
    "large": "1f871af762da5bf37785b418d45e4b087768805c0deabc64fc317a0679ca2450",
    "half": "72eb85bc1d6028175b12e8f73ee42275f9628c9d8d84cc6e1420bcb14ed42d57",
    "nested": "d42ab036e7c6ae55b767bf3c7fe49a548aaffb4aabfbfdb00e8d845fc1143ec0",
    "configured": "3331df80733be36861d7e10d83dd08bd33ad0d5673ba821081d5d63c4cd6c280",
}


def test_digests_of_models_stay_what_they_were():
    digests = {
        "linear": fingerprint_model(filled(nn.Linear(4, 3))),
        # 64 KiB are one checksum: five of them and a rest
        "large": fingerprint_model(filled(nn.Linear(300, 300))),
        "half": fingerprint_model(filled(nn.Linear(4, 3)).bfloat16()),
        "nested": fingerprint_model(filled(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))),
        "configured": fingerprint_model(filled(Configured())),
    }
    assert digests == PINNED_MODELS


PINNED_DATASETS = {
    "tensors": "fc6d6f1dc4e79b3b27e37675211a2c49359b332d8d4c287176316cde7346295a",
    "every kind of value": "2f82c515576f617d2e67efa7ef1c4e5320100535cacebf7c0543f38a83e927e0",
    "read whole": "760426154f8941deb580661faaf8ced8ceb38e57a9fae88783965a83681c8e16",
    "sampled": "791b1c36bd00f23bb265c71a085331006c189e7ad489317b0331a80ba97f931d",
    "rows": "5c4a0a132aae118e7de6e8b02194b57d5fda0e4e4a2df20911571f52e0beee50",
}


def test_digests_of_data_sets_stay_what_they_were():
    digests = {
        "tensors": fingerprint_dataset(TensorDataset(torch.arange(9), torch.ones(9, 2))),
        "every kind of value": fingerprint_dataset(EVERY_KIND_OF_VALUE),
        "read whole": fingerprint_dataset(Squares(400)),
        "sampled": fingerprint_dataset(Squares(5000)),
        "rows": fingerprint_dataset(datasets.Dataset.from_dict(ROWS)),
    }
    assert digests == PINNED_DATASETS


PINNED_CALLABLES = {
    "none": "096938ce6ca6ab8881a1e9cd318a25e8b0eeab2beb42e077767e9d2939146d31",
    "namespace": "3689899b6c67f21b80181a3485ed525a1e313116ce801685e988beb1c42bcc8e",
    "method": "eb1f12474e50742fa8d94abba8d60ee102396a6db83f0ecb25dcd009722fd6d0",
    "with a tokenizer": "39d7e0cefe27c85ce1ab9f28df35e080c3b70c15ae3617673c379e1e66e5ee1a",
    "tokenizer": "5b05b330818a209526f9e11e7715b36aafcc7a9a7c8f4cb3298b24e8418446c3",
}


def test_digests_of_callables_stay_what_they_were():
    """Those of functions with code of their own change with the version of Python."""
    digests = {
        "none": fingerprint_callable(None),
        "namespace": fingerprint_callable(types.SimpleNamespace(length=8, mark="x")),
        "method": fingerprint_callable(functools.partial(len, (1, "a"), key=filled(nn.ReLU()))),
        "with a tokenizer": fingerprint_callable(functools.partial(len, WordTokenizer())),
        "tokenizer": fingerprint_tokenizer(WordTokenizer()),
    }
    assert digests == PINNED_CALLABLES
