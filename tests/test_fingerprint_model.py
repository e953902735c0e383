"""What belongs to a model beside its tensors: attributes, functions, hooks and code."""

import copy
import dataclasses
import functools
import logging
import math
import os
import sys
import textwrap
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowdata import LossScorer, ScoreMismatchError
from flowdata.probe import compute_features
from flowdata.store.fingerprint import fingerprint_callable, fingerprint_model
from tests import zoo
from tests.models import images, scale_logits, tiny_gpt2, tiny_llama, token_samples
from tests.test_fingerprint import outputs_of_two_processes

SCALE = 2.0
TABLE = {"a": 1.0}


def helper(x):
    return SCALE * x


class Body(nn.Module):
    """A classifier of the user's own, with one attribute beside its layer."""

    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.layer(x)

    def named(self):
        return self._mean, self._gain


@dataclasses.dataclass
class Gains:
    low: float
    values: tuple = ()


class Gain:
    unit: ClassVar = "nats"

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


def scaled_by(factor):
    return lambda x: factor * x


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0.0,) * 6, (4.0,) * 6),
        ([1, 2], [1, 3]),
        ([1, [2, {"a": 3}]], [1, [2, {"a": 4}]]),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        ({"a", "b"}, {"a", "c"}),
        (torch.relu, torch.tanh),
        (nn.functional.gelu, nn.functional.silu),
        (np.sin, np.cos),
        (math.sin, math.cos),
        (lambda x: x, lambda x: 3 * x),
        (scaled_by(1), scaled_by(2)),
        (functools.partial(torch.clamp, min=0), functools.partial(torch.clamp, min=1)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        ([torch.zeros(3)], [torch.ones(3)]),
        (np.zeros(3), np.ones(3)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (Gains(1.0), Gains(2.0)),
        (Gains(1.0, (1, 2)), Gains(1.0, (1, 3))),
        (Gain(1.0), Gain(2.0)),
        (Gain(1.0).__call__, Gain(2.0).__call__),
        (Slotted(1), Slotted(2)),
        (types.SimpleNamespace(gain=1), types.SimpleNamespace(gain=2)),
        (slice(0, 3), slice(0, 2)),
        (range(3), range(4)),
        (1 + 2j, 1 + 3j),
        (b"a", b"b"),
        (torch.float32, torch.bfloat16),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)]),  # layers that no parameter list holds
        (nn.ReLU, nn.GELU),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_attribute_of_the_users_own_changes_it(first, second):
    assert fingerprint_model(Body(rule=first)) == fingerprint_model(Body(rule=first).eval())
    assert fingerprint_model(Body(rule=first)) == fingerprint_model(Body(rule=copy.deepcopy(first)))
    assert fingerprint_model(Body(rule=first)) != fingerprint_model(Body(rule=second))
    assert fingerprint_model(Body(rule={"in": [first]})) != fingerprint_model(
        Body(rule={"in": [second]})
    )


def test_private_attributes_count_where_the_class_reads_them():
    first = fingerprint_model(Body(_mean=(0.0,), _gain=1, _unread=1))
    assert fingerprint_model(Body(_mean=(4.0,), _gain=1, _unread=1)) != first
    assert fingerprint_model(Body(_mean=(0.0,), _gain=2, _unread=1)) != first
    assert fingerprint_model(Body(_mean=(0.0,), _gain=1, _unread=2)) == first  # a framework's mark


SOURCE = """
import torch
from torch import nn
FACTOR = 2.0
MEANS = [0.0, 1.0]
def outer(x): return inner(x)
def inner(x): return x + 1
class Base(nn.Module):
    bias = 0.5
    def encode(self, x): return x * 2
    @property
    def gain(self): return 7.0
    @staticmethod
    def shift(x): return x - 1
class Net(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(2))
    @torch.no_grad()
    def wrapped(self, x): return x / 3
    def forward(self, x, power=1):
        def within(y): return y ** power
        y = self.wrapped(self.shift(self.encode(x))) * self.gain + self.bias
        return within(outer(y)) * FACTOR + torch.tensor(MEANS) if "a" in {"a", "b"} else x
"""


def net(source=SOURCE, name="net_in_a_test"):
    module = types.ModuleType(name)
    exec(compile(textwrap.dedent(source), f"/somewhere/{name}.py", "exec"), vars(module))
    return module.Net()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("self.gain + self.bias", "self.gain - self.bias"),
        ("FACTOR = 2.0", "FACTOR = 3.0"),
        ("MEANS = [0.0", "MEANS = [5.0"),
        ("return x + 1", "return x + 2"),  # of a function that forward's function calls
        ("return x * 2", "return x * 3"),  # of a method of a base class
        ("bias = 0.5", "bias = 0.6"),
        ("return 7.0", "return 8.0"),
        ("return x - 1", "return x - 2"),
        ("return x / 3", "return x / 4"),  # under a decorator of torch
        ("y ** power", "y * power"),
        ("power=1", "power=2"),
        ('{"a", "b"}', '{"c", "b"}'),
    ],
)
def test_edited_code_changes_it(before, after):
    assert SOURCE.count(before) == 1
    edited = SOURCE.replace(before, after)
    assert fingerprint_model(net(edited)) != fingerprint_model(net())


def test_code_that_is_moved_or_laid_out_anew_does_not():
    expected = fingerprint_model(net())
    assert fingerprint_model(net(name="another_file")) == expected
    assert fingerprint_model(net("\n\n# a comment\n" + SOURCE)) == expected
    assert fingerprint_model(net("from __future__ import annotations\n" + SOURCE)) == expected
    documented = SOURCE.replace("power=1):\n", 'power=1):\n        """Words."""\n')
    assert fingerprint_model(net(documented.replace("x, power", "x, \n\n  power"))) == expected
    method = "    def training_step(self, batch): return 1\n"
    assert fingerprint_model(net(SOURCE + method)) == expected


def test_a_forward_put_in_the_place_of_the_classs_changes_it():
    model = Body()
    before = fingerprint_model(model)
    model.forward = lambda x: 3 * model.layer(x)
    tripled = fingerprint_model(model)
    model.forward = lambda x: 4 * model.layer(x)
    assert len({before, tripled, fingerprint_model(model)}) == 3
    del model.forward
    model.forward = model.forward  # the class's own, as accelerate leaves it
    assert fingerprint_model(model) == before


def test_of_a_transformers_model_too():
    prints = {fingerprint_model(tiny_llama())}
    for factor in (2, 3):
        model = tiny_llama()
        scale_logits(model, factor)
        prints.add(fingerprint_model(model))
    for part, name, value in (
        ("", "loss_function", scaled_by(2)),
        ("", "loss_function", scaled_by(3)),
        ("model.layers.1.mlp", "forward", scaled_by(2)),
        ("model.layers.0.self_attn", "scaling", 0.5),
        ("model.layers.0.self_attn", "is_causal", False),
        ("model.layers.0.mlp", "act_fn", nn.Tanh()),
    ):
        model = tiny_llama()
        setattr(model.get_submodule(part), name, value)
        prints.add(fingerprint_model(model))
    assert len(prints) == 9


def test_a_patched_class_of_a_package_changes_it(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = tiny_llama()
    before, forward = fingerprint_model(model), LlamaMLP.forward

    def halved(self, x):
        return forward(self, x) / 2

    monkeypatch.setattr(LlamaMLP, "forward", halved)
    assert fingerprint_model(model) != before
    monkeypatch.undo()
    assert fingerprint_model(model) == before


def test_settings_of_torchs_modules_that_no_repr_tells():
    def attention(heads):
        torch.manual_seed(0)
        return nn.MultiheadAttention(8, heads)

    assert fingerprint_model(attention(2)) == fingerprint_model(attention(2))
    assert fingerprint_model(attention(2)) != fingerprint_model(attention(4))

    def layer(**options):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, **options)

    prints = {fingerprint_model(layer(**o)) for o in ({}, {"norm_first": True})}
    prints.add(fingerprint_model(layer(activation=torch.nn.functional.gelu)))
    assert len(prints) == 3


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook"],
)
def test_hooks_change_it_while_they_are_there(register):
    model = nn.Sequential(Body(), nn.ReLU())
    before = fingerprint_model(model)

    def scaling(factor):
        return lambda module, values, *outputs: factor * (outputs or values)[0]

    prints = [before]
    for factor in (2, 3):
        handle = getattr(model[1], register)(scaling(factor))
        prints.append(fingerprint_model(model))
        handle.remove()
    assert len(set(prints)) == 3
    assert fingerprint_model(model) == before


def hooks_that_watch():
    seen, counts = [], {"calls": 0}

    class Tracker:
        calls = 0

        def __call__(self, module, values, output):
            self.calls += 1

        def record(self, module, values, output):
            self.last = output
            self.calls += 1

    def append(module, values, output):
        seen.append(output.detach().mean().item())

    def count(module, values, output):
        counts["calls"] += 1

    return append, count, Tracker().record, lambda module, values, output: None


def hooks_that_change():
    def in_place(module, values, output):
        output.mul_(2)

    def part(module, values, output):
        output[:, 0] = 0

    def attribute(module, values, output):
        output.data = 2 * output.data

    def augmented(module, values, output):
        output += 1

    def out(module, values, output):
        torch.mul(output, 2, out=output)

    def inner(output):
        output.mul_(2)

    def handed_on(module, values, output):
        inner(output)

    def returned(module, values, output):
        if len(output) > 100:
            return None
        return 2 * output

    def hooked_alias(module, values, output):
        alias = output
        alias.zero_()

    def function(module, values, output):
        torch.relu_(output)

    def switch(module, values, output):
        F.relu(output, True)

    def initialised(module, values, output):
        nn.init.zeros_(output)

    def foreach(module, values, output):
        torch._foreach_mul_([output], 2.0)

    def by_name(module, values, output):
        getattr(output, "mul_")(2)  # noqa: B009

    def nested(module, values, output):
        (lambda value: value.mul_(2))(output)

    return (
        *(in_place, part, attribute, augmented, out, handed_on, returned, hooked_alias),
        *(function, switch, initialised, foreach, by_name, nested),
    )


@pytest.mark.parametrize("hook", hooks_that_watch(), ids=lambda hook: hook.__name__)
def test_hooks_that_only_watch_are_no_part_of_it(hook):
    model = Body()
    before = fingerprint_model(model)
    model.register_forward_hook(hook)
    for _ in range(2):
        assert fingerprint_model(model) == before
        model(torch.ones(2, 6))


@pytest.mark.parametrize("hook", hooks_that_change(), ids=lambda hook: hook.__name__)
def test_hooks_that_change_what_they_are_given_are(hook):
    model = Body()
    before = fingerprint_model(model)
    model.register_forward_hook(hook)
    hooked = fingerprint_model(model)
    assert hooked != before
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert fingerprint_model(model) == hooked


def test_a_mark_on_a_packages_module_that_no_code_reads_is_none():
    model = tiny_llama()
    before = fingerprint_model(model)
    model.calls, model.model.note = 3, "mine"
    assert fingerprint_model(model) == before


class Remembering(nn.Module):
    """Keeps what its calls leave behind in every way that code does."""

    shared: ClassVar = {}
    shared_calls, shared_sizes = 0, 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.calls, self.outputs, self.sizes, self._table = 0, [], {}, None
        self.sums, self.total = {4: 0, 5: 0}, torch.zeros(())
        self.stats = types.SimpleNamespace(sizes=[])
        self.register_buffer("positions", torch.zeros(1), persistent=False)
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def table(self, length):
        if self._table is None:
            self._table = torch.ones(length)
        return self._table

    def forward(self, x):
        self.calls += 1
        self.sums[len(x)] += 1
        Remembering.shared_calls += 1
        type(self).shared_sizes = len(x)
        self.total.add_(len(x))
        self.stats.sizes.append(len(x))
        setattr(self, "longest", len(x))  # noqa: B010
        self.sizes[tuple(x.shape)] = len(x)
        self.shared[len(x)] = 1
        self.last = self.layer(x - self.mean)
        self.outputs.append(self.last.detach())
        self.register_buffer("positions", torch.arange(len(x)), persistent=False)
        return self.last * self.table(3)


def test_what_a_forward_pass_leaves_behind_does_not_change_it_and_is_named(caplog):
    model = Remembering()
    before = fingerprint_model(model)
    model(torch.ones(4, 6))
    outputs = {}

    def capture(module, values, output):
        outputs["layer"] = output

    model.layer.register_forward_hook(capture)
    hooked = fingerprint_model(model)
    model(torch.ones(5, 6))
    assert fingerprint_model(model) == hooked
    model.layer._forward_hooks.clear()
    with caplog.at_level(logging.WARNING, "flowdata"):
        assert fingerprint_model(model) == before
        assert fingerprint_model(model) == before
    assert "last (forward fills it)" in caplog.text
    for name in ("calls", "outputs", "stats", "total", "last"):
        assert caplog.text.count(f" {name} (forward fills it)") <= 1
    model.mean.fill_(4.0)  # a buffer that is not kept in checkpoints is a setting all the same
    assert fingerprint_model(model) != before


def test_what_can_not_be_described_is_named_once(caplog):
    model = Body(source=Path(os.devnull).open(), lock=(i for i in range(3)))  # noqa: SIM115
    with caplog.at_level(logging.WARNING, "flowdata"):
        before = fingerprint_model(model)
        assert fingerprint_model(model) == before
    assert caplog.text.count("leaves out") == 1
    assert "source (a _io.TextIOWrapper)" in caplog.text
    assert "lock (a builtins.generator)" in caplog.text
    model.source.close()


def test_loggers_optimizers_and_generators_are_no_part_of_it():
    def model(name, seed):
        body = Body(logger=logging.getLogger(name), noise=np.random.default_rng(seed))
        body.optimizer = torch.optim.SGD(body.parameters(), 0.1 * seed)
        return body

    assert fingerprint_model(model("a", 1)) == fingerprint_model(model("b", 2))


def test_code_that_ran_often_stays_the_same():
    model = net()
    before = fingerprint_model(model)
    for _ in range(200):  # Python rewrites the instructions of code that runs often
        model(torch.ones(2))
    assert fingerprint_model(model) == before


def test_attributes_that_lead_back_to_the_model_end():
    model = Body()
    model.itself, model.parts = [model], {"layer": model.layer}
    model.loop = model.parts
    model.parts["loop"] = model.parts
    assert fingerprint_model(copy.deepcopy(model)) == fingerprint_model(model)
    model.rule = lambda x: model.layer(x)
    before = fingerprint_model(model)
    assert fingerprint_model(model) == before
    model.parts["layer"] = model
    assert fingerprint_model(model) != before


# --- one model, run in many ways -----------------------------------------------------------------


def offloaded(model):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model):
    from accelerate import dispatch_model

    parts = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    return dispatch_model(model, parts, main_device="cpu", force_hooks=True)


def released(model):
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(offloaded(model))
    return model


def checkpointing(model):
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward)
    return model


def called(model):
    tokens = torch.randint(2, 190, (2, 40))
    with torch.no_grad():
        if hasattr(model, "config"):
            model(input_ids=tokens, output_hidden_states=True)
        else:
            model(torch.ones(2, 6))
    return model


def prepared(model):
    """A model under bfloat16's autocast, whatever other tests of this process have prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state()
    return model


def cloned(model):
    twin = copy.deepcopy(model)
    twin.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return twin


MODELS = {
    "own": lambda: Body(mean=(1.0,), act=torch.tanh, rule=scaled_by(2)),
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "dynamic": lambda: tiny_llama(
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
    "bert": zoo.bert,
    "gemma": lambda: zoo.decoder("gemma 3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_depend_on_how_a_model_is_run(name):
    before = fingerprint_model(MODELS[name]())
    ways = [nn.Module.train, nn.Module.eval, called, cloned, offloaded, dispatched]
    ways += [released, checkpointing, torch.compile, compiled_forward, prepared, nn.DataParallel]
    for way in ways:
        assert fingerprint_model(way(MODELS[name]())) == before, way


def test_a_saved_model_comes_back_with_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    before = fingerprint_model(model)
    model.save_pretrained(tmp_path)
    assert fingerprint_model(AutoModelForCausalLM.from_pretrained(tmp_path)) == before


def test_lightning_modules_differ_by_their_own_attributes_alone():
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, mean):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self._mean = nn.Linear(6, 3), mean

        def forward(self, x):
            return self.layer(x - self._mean)

        def training_step(self, batch, _):
            return self(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    model = Lit(1.0)
    before = fingerprint_model(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 6)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", **options)
    trainer.fit(model, loader)
    assert fingerprint_model(model) == before
    assert fingerprint_model(Lit(2.0)) != before


def test_the_base_of_adapters_has_the_code_and_the_hooks_of_its_own():
    from peft import LoraConfig, get_peft_model

    def adapted(seed, **options):
        model = tiny_llama()
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
        return get_peft_model(model, config)

    def base(model):
        return fingerprint_model(model, skip_adapters=True)

    before = base(adapted(1))
    assert base(adapted(2)) == base(adapted(1, r=4, lora_dropout=0.1)) == before
    other = adapted(1)
    other.get_base_model().model.norm.register_forward_hook(lambda m, i, o: 2 * o)
    assert base(other) != before
    other = adapted(1)
    other.get_base_model().model.layers[0].self_attn.is_causal = False
    assert base(other) != before


def test_adapters_of_a_model_that_is_none_of_transformers_count():
    from peft import LoraConfig, get_peft_model

    def adapted(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        return get_peft_model(model, LoraConfig(target_modules=["0"], **options))

    model = adapted(init_lora_weights=False)
    before = fingerprint_model(model)
    assert fingerprint_model(adapted(init_lora_weights=False)) == before
    assert fingerprint_model(adapted(init_lora_weights=False, lora_alpha=1)) != before
    with model.disable_adapter():
        assert fingerprint_model(model) != before


def test_weights_that_are_packed_outside_parameters_count():
    def quantized(factor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4))
        with torch.no_grad():
            model[0].weight.mul_(factor)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = engines[-1]
    assert fingerprint_model(quantized(1)) == fingerprint_model(quantized(1))
    assert fingerprint_model(quantized(1)) != fingerprint_model(quantized(2))


def test_models_made_under_inference_mode_and_unsigned_tensors_have_one():
    with torch.inference_mode():
        model = Body()
    model.register_buffer("tokens", torch.arange(5).to(torch.uint16))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    before = fingerprint_model(model)
    model.sparse = 2 * model.sparse
    assert fingerprint_model(model) != before


def test_another_process_gives_the_same():
    code = (
        "from tests.test_fingerprint_model import *\n"
        "print(fingerprint_model(Body(a={'x', 'y', 'z'}, b=scaled_by(2), c=Gain(1), d=helper)),"
        "fingerprint_model(net()), fingerprint_callable(lambda s: TABLE[s] in {1, 'q'}))"
    )
    assert len(outputs_of_two_processes(code)) == 1


def test_functions_differ_by_the_globals_that_they_name(monkeypatch):
    before = fingerprint_callable(helper)
    assert fingerprint_callable(lambda x: TABLE) != fingerprint_callable(lambda x: SCALE)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert fingerprint_callable(helper) != before
    namespace = types.SimpleNamespace(length=8, folder="a")
    cut = functools.partial(lambda args, samples: samples[: args.length], namespace)

    def cut_here(samples):
        return samples[: namespace.length]

    whole, part = fingerprint_callable(cut), fingerprint_callable(cut_here)
    namespace.folder = "b"
    assert fingerprint_callable(cut) != whole
    assert fingerprint_callable(cut_here) == part  # which reads the length alone
    namespace.length = 9
    assert fingerprint_callable(cut_here) != part


# --- what stores are kept from -------------------------------------------------------------------


class Tripled(Body):
    def forward(self, x):
        return 3 * self.layer(x)


class Flat(Body):
    """The images of `tests.models` as six numbers, through the attributes of the case."""

    def forward(self, x):
        x = x.flatten(1)[:, :6] - torch.tensor(self.mean)
        return self.act(self.layer(x))


def flat(**changes):
    return Flat(**{"mean": (0.0,) * 6, "act": torch.relu} | changes)


@pytest.mark.parametrize(
    "changes", [{"mean": (4.0,) * 6}, {"act": torch.tanh}], ids=["tuple", "function"]
)
def test_scores_and_features_of_a_changed_model_are_not_reused(tmp_path, changes):
    data = images(8, classes=3)
    options = {"dtype": "float32", "progress": False}
    first = LossScorer(flat(), **options).score(data, store=tmp_path / "scores")
    again = LossScorer(flat(), **options).score(data, store=tmp_path / "scores")
    assert torch.equal(first.losses, again.losses)
    with pytest.raises(ScoreMismatchError, match="another model"):
        LossScorer(flat(**changes), **options).score(data, store=tmp_path / "scores")
    file = tmp_path / "features.safetensors"
    compute_features(flat(), data, store=file, **options)
    compute_features(flat(), data, store=file, **options)
    with pytest.raises(ScoreMismatchError, match="another body"):
        compute_features(flat(**changes), data, store=file, **options)


def test_scores_of_an_edited_forward_or_a_hooked_model_are_not_reused(tmp_path):
    samples, scorer = token_samples(6), functools.partial(LossScorer, progress=False)
    model = tiny_llama()
    scorer(model).score(samples, store=tmp_path)
    handle = model.lm_head.register_forward_hook(lambda module, values, output: 2 * output)
    with pytest.raises(ScoreMismatchError, match="another model"):
        scorer(model).score(samples, store=tmp_path)
    handle.remove()
    scorer(model).score(samples, store=tmp_path)
    scale_logits(model, 2.0)
    with pytest.raises(ScoreMismatchError, match="another model"):
        scorer(model).score(samples, store=tmp_path)
    assert fingerprint_model(Tripled()) != fingerprint_model(Body())


@pytest.mark.parametrize("kind", ["", "_pre"])
def test_hooks_of_all_modules_change_it_while_they_are_there(kind):
    model = Body()
    before = fingerprint_model(model)
    register = getattr(nn.modules.module, f"register_module_forward{kind}_hook")
    handle = register(lambda module, values, *outputs: (outputs or values)[0] * 2)
    assert fingerprint_model(model) != before
    handle.remove()
    handle = register(lambda module, values, *outputs: None)
    assert fingerprint_model(model) == before
    handle.remove()


def times_scale(module, values):
    return values * module._scale


class Helped(nn.Module):
    """Reads its own private attribute in a function beside the class."""

    def __init__(self):
        super().__init__()
        self._scale, self._unread = 1.0, 1.0

    def forward(self, values):
        return times_scale(self, values)


def test_private_attributes_count_where_a_function_of_the_users_own_reads_them():
    model = Helped()
    before = fingerprint_model(model)
    model._unread = 2.0
    assert fingerprint_model(model) == before
    model._scale = 2.0
    assert fingerprint_model(model) != before


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Tripling(nn.Module):
    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2))]
)
def test_what_torch_jit_compiled_counts(compiled, tmp_path):
    made = {}
    for kind in (Doubling, Tripling):
        torch.jit.save(compiled(kind()), tmp_path / kind.__name__)
        model = torch.jit.load(tmp_path / kind.__name__)
        made[kind] = fingerprint_model(model)
        model.eval()(torch.ones(2))
        assert fingerprint_model(model) == made[kind]
    assert made[Doubling] != made[Tripling]
