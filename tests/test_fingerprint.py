import functools
import os
import random
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from flowdata.store.fingerprint import fingerprint_callable, fingerprint_dataset, fingerprint_model
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
    assert fingerprint_dataset(data.with_transform(lambda batch: {"r": [torch.rand(1)]})) == before
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


def test_fingerprints_are_those_of_another_process():
    code = (
        "from tests.test_fingerprint import *\n"
        "f = lambda x: x in {'a', 'b', 'c'}\n"
        "print(fingerprint_callable(f), fingerprint_model(tiny_llama()), "
        "fingerprint_dataset(Squares(10)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
