"""WiSE-FT of state dicts and modules at its edges: numbers, integers, wrappers, adapters."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from flowdata import wise_ft
from flowdata.companions import sweep_wise_ft
from tests import reference
from tests.models import tiny_llama


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def two_ends():
    old, new = network(0), network(1)
    new(torch.randn(16, 3))
    return old, new


ALPHAS = [
    np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2), torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16), np.array(0.5),
]  # fmt: skip


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_may_be_any_real_number(alpha):
    old, new = two_ends()
    state, module = wise_ft(old.state_dict(), new.state_dict(), alpha), wise_ft(old, new, alpha)
    for name, expected in reference.wise_ft(old.state_dict(), new.state_dict(), 0.5).items():
        if state[name].is_floating_point():
            torch.testing.assert_close(state[name].double(), expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(module.state_dict()[name], state[name])
    for one in (np.int64(1), np.uint8(1), torch.tensor(1), np.float32(1)):
        assert torch.equal(wise_ft(old, new, one)[0].weight, new[0].weight)


@pytest.mark.parametrize(
    "alpha",
    [np.float32("nan"), np.float64(1.5), Fraction(-1, 9), torch.tensor([0.5, 0.5]), "0.5",
     None, True, 0.5j, torch.tensor(0.5, requires_grad=True)],
)  # fmt: skip
def test_an_alpha_outside_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got"):
        wise_ft({}, {}, alpha)


@pytest.mark.parametrize(
    "alphas",
    [np.linspace(0, 1, 5), torch.linspace(0, 1, 5), np.linspace(0, 1, 5, dtype=np.float32),
     [Fraction(i, 4) for i in range(5)], (i / 4 for i in range(5))],
)  # fmt: skip
def test_a_sweep_takes_any_sequence_of_numbers_and_its_keys_are_numbers(alphas):
    old, new = two_ends()
    result = sweep_wise_ft(old, new, alphas, lambda model: model[0].weight[0, 0].item())
    assert list(result) == [0, 0.25, 0.5, 0.75, 1]
    start, end = old[0].weight[0, 0].item(), new[0].weight[0, 0].item()
    for alpha in (0.0, 0.25, 1.0):
        assert result[alpha] == pytest.approx((1 - alpha) * start + alpha * end)
    assert result[0] == start
    assert result[1] == end
    assert all(not isinstance(alpha, torch.Tensor | np.generic) for alpha in result)


def test_a_sweep_that_fails_leaves_both_models_as_they_were():
    old, new = two_ends()
    new.train()
    new[0].requires_grad_(False)
    copies = copy.deepcopy((old.state_dict(), new.state_dict()))

    def measure(model):
        model.eval().requires_grad_(False)
        with torch.no_grad():
            model[3].weight.zero_()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sweep_wise_ft(old, new, (0.0, 0.5), measure)
    for model, state in zip((old, new), copies, strict=True):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert new.training
    assert [p.requires_grad for p in new.parameters()] == [False] * 2 + [True] * 4
    calls = []
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 2"):
        sweep_wise_ft(old, new, (0.0, 2), calls.append)
    assert not calls  # told before anything is measured
    with pytest.raises(TypeError, match=r"alphas must be a sequence of numbers, got 0.5"):
        sweep_wise_ft(old, new, 0.5, calls.append)


def test_both_ends_are_exact_in_integers_too():
    old = {
        "position_ids": torch.arange(4)[None],
        "steps": torch.tensor(3),
        "mask": torch.ones(2) > 0,
    }
    new = {
        "position_ids": torch.arange(4)[None],
        "steps": torch.tensor(9),
        "mask": torch.ones(2) < 0,
    }
    for alpha, end in ((0, old), (0.4, new), (1, new)):
        averaged = wise_ft(old, new, alpha)
        assert all(torch.equal(averaged[name], end[name]) for name in end)
        assert all(averaged[name].dtype == end[name].dtype for name in end)


def quantised(kind, seed):
    """Parts of a quantised weight as libraries name them, and a float beside them."""
    g = torch.Generator().manual_seed(seed)
    integers = lambda dtype, *shape: torch.randint(0, 100, shape, generator=g).to(dtype)  # noqa: E731
    floats = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    return {
        "bnb 8-bit": {"l.weight": integers(torch.int8, 4, 4), "l.SCB": floats(4)},
        "bnb 4-bit": {"l.weight": integers(torch.uint8, 8, 1), "l.weight.absmax": floats(2)},
        "gptq": {"l.qweight": integers(torch.int32, 2, 4), "l.scales": floats(1, 4),
                 "l.qzeros": integers(torch.int32, 1, 1), "l.g_idx": torch.zeros(4).int()},
        "awq": {"l.qweight": integers(torch.int32, 4, 1), "l.scales": floats(1, 4)},
        "int64": {"l.weight": integers(torch.int64, 4, 4), "l.weight_scale": floats(4)},
        "int16 of one's own": {"l.q": integers(torch.int16, 4, 4), "l.s": floats(4)},
        "quanto": {"l.weight._data": integers(torch.int8, 4, 4), "l.weight._scale": floats(4)},
        "packed": {"l.weight_packed": integers(torch.int32, 4, 4), "l.weight_scale": floats(4)},
        "fp8": {"l.weight": floats(4, 4).to(torch.float8_e4m3fn), "l.weight_scale_inv": floats(1)},
        "zero point": {"l.scale": floats(), "l.zero_point": integers(torch.int64)},
        "torch": {"l.weight": torch.quantize_per_tensor(floats(4, 4), 0.01 + seed, 0, torch.qint8)},
    }[kind]  # fmt: skip


KINDS = ("bnb 8-bit", "bnb 4-bit", "gptq", "awq", "int64", "int16 of one's own", "quanto",
         "packed", "fp8", "zero point", "torch")  # fmt: skip


def plain(tensor):
    return tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_refused_unless_they_are_one(kind):
    old, new = quantised(kind, 0), quantised(kind, 1)
    with pytest.raises(ValueError, match=r"is quantised and differs.*dequantise"):
        wise_ft(old, new, 0.5)
    for alpha, end in ((0, old), (1, new)):
        averaged = wise_ft(old, new, alpha)
        assert all(torch.equal(plain(averaged[name]), plain(value)) for name, value in end.items())
    if kind != "torch":
        with pytest.raises(ValueError, match=r"lacks|is of integers|is floating|shape"):
            wise_ft({name: torch.rand(4, 4) for name in old}, new, 0.5)
        scale = next(name for name in old if old[name].dtype == torch.float32)
        twin = {**old, scale: 3 * old[scale]}
        averaged = wise_ft(old, twin, 0.5)  # with the same integers, the scales' average is right
        torch.testing.assert_close(averaged[scale], 2 * old[scale])


def test_a_model_quantised_by_torch_is_refused():
    old, new = (
        torch.ao.quantization.quantize_dynamic(network(seed), {nn.Linear}) for seed in (0, 1)
    )
    with pytest.raises(ValueError, match="quantised"):
        wise_ft(old, new, 0.5)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager"),
     lambda model: torch.compile(nn.DataParallel(model), backend="eager")],
)  # fmt: skip
def test_wrappers_make_no_difference(wrap):
    old, new = two_ends()
    expected = wise_ft(old, new, 0.3).state_dict()
    for pair in ((wrap(old), new), (old, wrap(new)), (wrap(old), wrap(new))):
        averaged = wise_ft(*pair, 0.3)
        assert isinstance(averaged, nn.Sequential)
        assert all(torch.equal(averaged.state_dict()[name], expected[name]) for name in expected)
        states = [model.state_dict() for model in pair]
        averaged = wise_ft(*states, 0.3)
        assert averaged.keys() == states[1].keys()
        assert all(torch.equal(v, expected[n.replace("module.", "").replace("_orig_mod.", "")])
                   for n, v in averaged.items())  # fmt: skip


def test_the_result_has_the_dtypes_of_the_fine_tuned():
    old, new = two_ends()
    averaged = wise_ft(old, copy.deepcopy(new).bfloat16(), 0.3)
    assert averaged[0].weight.dtype == torch.bfloat16
    averaged = wise_ft(copy.deepcopy(old).bfloat16(), new.double(), 0.3)
    assert averaged[0].weight.dtype == torch.float64
    start = old[0].weight.bfloat16().double()
    torch.testing.assert_close(averaged[0].weight, 0.7 * start + 0.3 * new[0].weight)


def test_one_layer_under_two_names_cannot_be_untied():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            torch.manual_seed(shared)
            self.a = nn.Linear(2, 2)
            self.b = self.a if shared else nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"'b.weight' and 'a.weight' are one layer in finetuned"):
        wise_ft(Twice(False), Twice(True), 0.5)
    averaged = wise_ft(Twice(True), Twice(False), 0.0)
    assert torch.equal(averaged.a.weight, averaged.b.weight)


peft = pytest.importorskip("peft")


def with_adapter(model, seed, name="default", **options):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | options)
    model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


ADAPTERS = {
    "alike": ({}, {}),
    "other ranks": ({"r": 3, "lora_alpha": 5}, {"r": 1}),
    "rslora": ({"r": 3, "use_rslora": True, "lora_alpha": 7}, {"lora_alpha": 32}),
    "patterns": (
        {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
        {"rank_pattern": {"v_proj": 4}},
    ),
    "other layers": ({"target_modules": ["q_proj", "down_proj"]}, {}),
    "layers by pattern": ({"target_modules": ".*layers.1.*proj"}, {"layers_to_transform": [0]}),
    "names": ({"name": "base"}, {"name": "sft"}),
    "an embedding and a head": ({"target_modules": ["embed_tokens", "q_proj"]},) * 2,
    "saved modules": ({"modules_to_save": ["lm_head"]},) * 2,
    "saved modules and names": (
        {"modules_to_save": ["lm_head"], "name": "a"}, {"modules_to_save": ["lm_head"], "name": "b"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_two_adapters_are_averaged_as_the_models_they_make(case, alpha, tmp_path):
    options = ADAPTERS[case]
    old, new = (with_adapter(tiny_llama(), seed, **o) for seed, o in zip((1, 2), options))  # noqa: B905
    before = [logits(model) for model in (old, new)]
    averaged = wise_ft(old, new, alpha)
    merged = [copy.deepcopy(model).merge_and_unload() for model in (old, new, averaged)]
    expected = reference.wise_ft(*(model.state_dict() for model in merged[:2]), alpha)
    for name, value in merged[2].state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=2e-6, rtol=1e-5)
    assert [torch.equal(logits(m), b) for m, b in zip((old, new), before, strict=True)] == [
        True
    ] * 2
    if alpha in (0, 1):
        torch.testing.assert_close(logits(averaged), before[alpha], atol=1e-4, rtol=1e-4)
    averaged.save_pretrained(tmp_path)
    name = options[1].get("name", "default")
    folder = tmp_path if name == "default" else tmp_path / name
    again = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    torch.testing.assert_close(logits(again), logits(averaged), atol=1e-5, rtol=1e-5)


def test_a_sweep_over_adapters_is_that_over_merged_models():
    old, new = (with_adapter(tiny_llama(), seed) for seed in (1, 2))
    alphas = torch.linspace(0, 1, 3)
    result = sweep_wise_ft(old, new, alphas, logits)
    merged = [copy.deepcopy(model).merge_and_unload() for model in (old, new)]
    for alpha, expected in sweep_wise_ft(*merged, alphas, logits).items():
        torch.testing.assert_close(result[alpha], expected, atol=1e-5, rtol=1e-5)


def test_convolutions_and_bfloat16_adapters_are_averaged():
    def model(seed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], lora_alpha=seed)
        net = peft.get_peft_model(net, config)
        torch.manual_seed(seed)
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        return net.eval()

    for dtype, margin in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        old, new = (model(seed).to(dtype) for seed in (1, 3))
        averaged = wise_ft(old, new, 0.25)
        assert {p.dtype for p in averaged.parameters()} == {dtype}
        states = [m.float().merge_and_unload().state_dict() for m in (old, new, averaged)]
        for name, expected in reference.wise_ft(*states[:2], 0.25).items():
            torch.testing.assert_close(states[2][name].double(), expected, atol=margin, rtol=margin)


def test_models_beneath_that_differ_are_averaged_and_told(caplog):
    caplog.set_level("INFO", "flowdata")
    bases = [tiny_llama(), tiny_llama()]
    with torch.no_grad():
        bases[0].model.layers[0].self_attn.q_proj.weight += 1
    old, new = (with_adapter(base, seed) for base, seed in zip(bases, (1, 2), strict=True))
    averaged = wise_ft(old, new, 0.5).merge_and_unload().state_dict()
    ends = [model.merge_and_unload().state_dict() for model in (old, new)]
    for name, expected in reference.wise_ft(*ends, 0.5).items():
        torch.testing.assert_close(averaged[name].double(), expected, atol=1e-5, rtol=1e-5)
    assert "differ beneath their adapters" in caplog.text


def adapters_that_have_no_average():
    plain = with_adapter(tiny_llama(), 1)
    two = with_adapter(tiny_llama(), 2)
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    merged = with_adapter(tiny_llama(), 2)
    merged.merge_adapter()
    ia3 = peft.get_peft_model(
        tiny_llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    return [
        (plain, with_adapter(tiny_llama(), 2, use_dora=True), "finetuned has .* use_dora.*merge"),
        (with_adapter(tiny_llama(), 2, init_lora_weights="pissa"), plain, "pretrained .*'pissa'"),
        (plain, two, "finetuned has the adapters default, other; delete all but one"),
        (merged, plain, "pretrained's adapter is merged into its layers; call unmerge_adapter"),
        (plain, ia3, "finetuned has an adapter of the kind IA3"),
        (tiny_llama(), plain, "finetuned holds a low-rank adapter .*merge_and_unload"),
        (plain, tiny_llama(), "pretrained holds a low-rank adapter .*merge_and_unload"),
        (ia3, tiny_llama(), "pretrained is a PEFT model and the other is not: merge"),
        (plain.state_dict(), plain.state_dict(), "pretrained holds a low-rank adapter"),
        (tiny_llama().state_dict(), plain.state_dict(), "finetuned holds a low-rank adapter"),
        (plain.get_base_model(), plain.get_base_model(), "pretrained holds a low-rank adapter"),
    ]


def test_adapters_that_have_no_average_are_refused_by_name():
    for old, new, message in adapters_that_have_no_average():
        with pytest.raises(ValueError, match=message):
            wise_ft(old, new, 0.5)
