import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flowdata.companions.anchor import ParameterAnchor
from flowdata.companions.averages import averages
from flowdata.companions.averaging import sweep_wise_ft, wise_ft
from flowdata.companions.batch_norm import batch_norm_state
from tests import reference
from tests.launched import start_ranks
from tests.leave_ranks import leave_ranks
from tests.models import tiny_llama


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def move(model, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator).to(p)


def started_from(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("bucket", [1 << 26, 1, 60])
def test_penalty_and_gradient_match_the_sum_over_single_numbers(kind, bucket, monkeypatch):
    monkeypatch.setattr("flowdata.companions.penalty._BUCKET", bucket)
    model = network()
    started = started_from(model)
    anchor = ParameterAnchor(model, kind, strength=0.3)
    assert anchor().item() == 0
    move(model)
    penalty = anchor()
    assert penalty.item() == pytest.approx(
        reference.anchor_penalty(model.parameters(), started, kind, 0.3), rel=1e-5
    )
    penalty.backward()
    for p, then in zip(model.parameters(), started, strict=True):
        apart = p.detach() - then
        torch.testing.assert_close(p.grad, 0.3 * (2 * apart if kind == "l2" else apart.sign()))


def test_gradients_add_to_those_of_the_loss_and_scale_with_it():
    model = network().double()
    anchor = ParameterAnchor(model, strength=0.5)
    move(model)
    x = torch.randn(8, 3, dtype=torch.float64)
    (3 * (model(x).square().mean() + anchor())).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = copy.deepcopy(model)
    move(plain, size=-0.1)  # back to the start
    penalty = sum(
        ((p - q.detach()) ** 2).sum()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )
    (3 * (model(x).square().mean() + 0.5 * penalty)).backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_only_parameters_that_are_trained_are_anchored():
    model = network()
    model[0].requires_grad_(False)
    started = started_from(model)
    anchor = ParameterAnchor(model)
    move(model)
    expected = reference.anchor_penalty(list(model.parameters())[2:], started[2:], "l2", 1e-3)
    assert anchor().item() == pytest.approx(expected, rel=1e-5)
    anchor().backward()
    assert model[0].weight.grad is None


def test_lora_anchors_the_adapters_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0", "3"]))
    adapters = [p for p in model.parameters() if p.requires_grad]
    started = [p.detach().clone() for p in adapters]
    anchor = ParameterAnchor(model, strength=2.0)
    move(model)
    assert len(adapters) == 4
    assert anchor().item() == pytest.approx(
        reference.anchor_penalty(adapters, started, "l2", 2.0), rel=1e-5
    )


def test_a_shared_parameter_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    anchor = ParameterAnchor(model, strength=1.0)
    with torch.no_grad():
        model["a"].weight += 1
    assert anchor().item() == pytest.approx(4.0)


def test_bfloat16_parameters_give_a_float32_penalty():
    model = network().bfloat16()
    started = [p.float() for p in started_from(model)]
    anchor = ParameterAnchor(model, strength=1.0)
    move(model)
    penalty = anchor()
    assert penalty.dtype == torch.float32
    now = [p.float() for p in model.parameters()]
    assert penalty.item() == pytest.approx(
        reference.anchor_penalty(now, started, "l2", 1.0), rel=0.01
    )
    penalty.backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("wide", [0, 3])
def test_parameters_of_several_dtypes_give_a_penalty_in_the_widest(wide):
    model = network()
    model[wide].double()
    started = [p.double() for p in started_from(model)]
    anchor = ParameterAnchor(model, strength=1.0)
    move(model)
    penalty = anchor()
    assert penalty.dtype == torch.float64
    now = [p.double() for p in model.parameters()]
    assert penalty.item() == pytest.approx(reference.anchor_penalty(now, started, "l2", 1.0))
    penalty.backward()
    for p, then in zip(model.parameters(), started, strict=True):
        torch.testing.assert_close(p.grad, 2 * (p.detach() - then.to(p)))


def test_a_reference_given_is_what_counts_even_if_the_model_has_moved(tmp_path):
    model = network()
    started = started_from(model)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    move(model)
    expected = reference.anchor_penalty(model.parameters(), started, "l2", 1.0)
    for start in (state, tmp_path / "start.safetensors", str(tmp_path / "start.safetensors")):
        anchor = ParameterAnchor(model, strength=1.0, reference=start, device="cpu")
        assert anchor().item() == pytest.approx(expected, rel=1e-5)


def test_a_reference_that_shares_the_models_memory_stays_where_it_was():
    model = network()
    anchor = ParameterAnchor(model, strength=1.0, reference=model.state_dict())
    move(model)
    assert anchor().item() > 0


def test_no_difference_is_kept_between_forward_and_backward():
    model = nn.Linear(1000, 1000)
    anchor = ParameterAnchor(model)
    penalty = anchor()
    node = penalty.grad_fn.next_functions[0][0]
    saved_memory = {t.data_ptr() for t in node.saved_tensors}
    assert saved_memory == {p.data_ptr() for p in model.parameters()}


def test_anchored_training_stays_nearer():
    x, y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    apart = {}
    for strength in (0.0, 1.0):
        model = network()
        started = started_from(model)
        anchor = ParameterAnchor(model, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + anchor()).backward()
            optimizer.step()
        apart[strength] = reference.anchor_penalty(model.parameters(), started, "l2", 1.0)
    assert apart[1.0] < 0.5 * apart[0.0]


FROZEN = nn.Linear(2, 2).requires_grad_(False)
BAD_ANCHORS = [
    ((network(), "l3"), {}, ValueError, "kind must be 'l2' or 'l1', got 'l3'"),
    ((network(), 0.1), {}, ValueError, "got 0.1; for a penalty of that size pass strength=0.1"),
    ((network(), "l2", -1.0), {}, ValueError, "strength must be finite and >= 0, got -1.0"),
    ((network(), "l2", float("nan")), {}, ValueError, "strength must be finite"),
    ((FROZEN,), {}, ValueError, "no parameter that requires a gradient"),
    (("model",), {}, TypeError, "model must be an nn.Module, got str"),
    ((network(),), {"reference": {}}, ValueError, "reference lacks '0.weight', which model has"),
    (
        (nn.Linear(2, 2),),
        {"reference": nn.Linear(2, 3).state_dict()},
        ValueError,
        r"'weight' has shape \(3, 2\) in reference and \(2, 2\) in model",
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_ANCHORS)
def test_an_anchor_that_cannot_hold_says_why(args, options, error, message):
    with pytest.raises(error, match=message):
        ParameterAnchor(*args, **options)


def two_ends():
    old, new = network(0), network(1)
    new(torch.randn(16, 3))  # statistics and num_batches_tracked move
    return old, new


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
def test_state_dicts_are_averaged_as_in_double_precision(alpha):
    old, new = (model.state_dict() for model in two_ends())
    averaged = wise_ft(old, new, alpha)
    for name, expected in reference.wise_ft(old, new, alpha).items():
        if new[name].is_floating_point():
            torch.testing.assert_close(averaged[name].double(), expected, atol=1e-6, rtol=1e-6)
    assert averaged["1.num_batches_tracked"] == (alpha > 0)


def test_the_ends_are_exact():
    old, new = (model.bfloat16().state_dict() for model in two_ends())
    for alpha, end in ((0.0, old), (1.0, new)):
        averaged = wise_ft(old, new, alpha)
        floating = [name for name in end if end[name].is_floating_point()]
        assert all(torch.equal(averaged[name], end[name]) for name in floating)


def test_modules_give_a_new_module_and_stay_as_they_are():
    old, new = two_ends()
    new.train()
    new(torch.randn(4, 3)).sum().backward()
    copies = copy.deepcopy((old.state_dict(), new.state_dict()))
    averaged = wise_ft(old, new, 0.5)
    expected = wise_ft(*copies, 0.5)
    for model, state in ((averaged, expected), (old, copies[0]), (new, copies[1])):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert averaged[0].weight.requires_grad
    assert averaged[0].weight.grad is None
    assert new[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_files_give_what_state_dicts_give(tmp_path, dtype):
    old, new = (model.to(dtype).state_dict() for model in two_ends())
    new["mask"] = old["mask"] = torch.tensor([True, False, True])  # an odd number of bytes
    new["scalar"], old["scalar"] = torch.tensor(3.0), torch.tensor(1.0)
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors", metadata={"format": "pt"})
    out = wise_ft(tmp_path / "old.safetensors", str(tmp_path / "new.safetensors"), 0.4,
                  tmp_path / "mean.safetensors")  # fmt: skip
    assert out == tmp_path / "mean.safetensors"
    read, expected = load_file(out), wise_ft(old, new, 0.4)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert read["scalar"].item() == pytest.approx(1.8)
    with out.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_files_may_be_averaged_in_place_and_leave_nothing_behind(tmp_path):
    old, new = (model.state_dict() for model in two_ends())
    paths = [tmp_path / "old.safetensors", tmp_path / "new.safetensors"]
    for path, state in zip(paths, (old, new), strict=True):
        save_file(state, path)
    wise_ft(*paths, 0.5, paths[1])
    expected = wise_ft(old, new, 0.5)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(paths[1]).items())
    save_file({"other": torch.zeros(1)}, paths[0])
    with pytest.raises(ValueError, match=r"old\.safetensors lacks"):
        wise_ft(*paths, 0.5, tmp_path / "mean.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "new.safetensors",
        "old.safetensors",
    ]


def test_files_are_streamed(tmp_path):
    states = [{f"w{i}": torch.full((256, 256), float(i + k)) for i in range(40)} for k in (0, 1)]
    paths = [tmp_path / "old.safetensors", tmp_path / "new.safetensors"]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    written = []
    average = averages.__globals__["average_of"]

    def watched(*args):
        draft = next(path for path in tmp_path.iterdir() if path.name.startswith(".mean"))
        written.append(draft.stat().st_size)
        return average(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(averages.__globals__, "average_of", watched)
        wise_ft(*paths, 0.5, tmp_path / "mean.safetensors")
    assert written == sorted(written)
    assert written[20] > 15 * 256 * 256 * 4  # on disk before the rest is read


def test_a_sweep_measures_what_each_average_gives_and_leaves_both_ends_alone():
    old, new = two_ends()
    copies = copy.deepcopy((old.state_dict(), new.state_dict()))
    x = torch.randn(5, 3)
    models = set()

    def measure(model):
        models.add(id(model))
        with torch.no_grad():
            return model.eval()(x)

    outputs = sweep_wise_ft(old, new, (0.0, 0.3, 1.0), measure)
    assert list(outputs) == [0.0, 0.3, 1.0]
    assert len(models) == 1
    for alpha, output in outputs.items():
        with torch.no_grad():
            torch.testing.assert_close(output, wise_ft(old, new, alpha).eval()(x))
    for model, state in zip((old, new), copies, strict=True):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        sweep_wise_ft(old, new, (0.5, 1.5), measure)


BAD_PAIRS = [
    (({}, {}, 1.5), ValueError, "alpha must lie between 0 and 1, got 1.5"),
    (({}, nn.Linear(1, 1), 0.5), TypeError, "got dict and Linear"),
    (("a.safetensors", "b.safetensors", 0.5), TypeError, "output must name the file"),
    (({}, {}, 0.5, "out"), TypeError, "output is for files"),
    (
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, 0.5),
        ValueError,
        "pretrained lacks 'b', which finetuned has .1 such",
    ),
    (({"a": torch.zeros(2)}, {}, 0.5), ValueError, "finetuned lacks 'a', which pretrained has"),
    (
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5),
        ValueError,
        r"'a' has shape \(2,\) in pretrained and \(3,\) in finetuned",
    ),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD_PAIRS)
def test_weights_that_do_not_match_are_named(args, error, message):
    with pytest.raises(error, match=message):
        wise_ft(*args)


def test_the_old_head_works_again_once_batch_norm_is_put_back():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(32, 3)
    body(x)
    statistics = batch_norm_state(body)
    before = body.eval()(x)
    body.train()
    body(5 * x + 1)
    with torch.no_grad():
        body[1].weight += 1
    assert not torch.allclose(body.eval()(x), before)
    result = body.load_state_dict(statistics, strict=False)
    assert not result.unexpected_keys
    assert torch.equal(body(x), before)
    assert set(batch_norm_state(nn.BatchNorm1d(2))) == set(nn.BatchNorm1d(2).state_dict())


def sharded_penalty(rank, folder):
    """Run on two processes: the same model, sharded with FSDP2, moved by the same amount."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    anchor = ParameterAnchor(model, strength=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.25
    penalty = anchor()
    penalty.backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    torch.save((penalty.detach(), gradients), f"{folder}/{rank}.pt")
    leave_ranks()


def test_a_model_sharded_over_two_processes_is_anchored_whole(tmp_path):
    start_ranks(sharded_penalty, (str(tmp_path),), 2)
    count = 3 * 5 + 5 + 5 * 2 + 2
    for rank in range(2):
        penalty, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert penalty.item() == pytest.approx(0.1 * count * 0.25**2, rel=1e-5)
        assert all(torch.allclose(g, torch.tensor(0.1 * 2 * 0.25)) for g in gradients)


def test_ends_and_equal_values_are_exact_even_where_they_are_infinite():
    mask = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.tensor([0.1, 3e38])}
    for alpha in (0.0, 0.3, 1.0):
        averaged = wise_ft(mask, mask, alpha)
        assert all(torch.equal(averaged[name], mask[name]) for name in mask)
    large = wise_ft({"w": torch.tensor([3e38])}, {"w": torch.tensor([-3e38])}, 0.5)
    assert large["w"].item() == 0
    start, end = {"w": torch.tensor([1e38])}, {"w": torch.tensor([torch.inf])}
    assert wise_ft(start, end, 0.0)["w"].item() == start["w"].item()
    turned = wise_ft({"w": torch.tensor([1 + 1j])}, {"w": torch.tensor([3 - 1j])}, 0.5)
    assert turned["w"].item() == 2
    eighths = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert wise_ft({"w": eighths}, {"w": eighths}, 0.5)["w"].float().tolist() == [1, 2]


def test_states_other_than_tensors_are_those_of_the_fine_tuned():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    old, new = Noted(2, 2), Noted(2, 2)
    old.note, new.note = "old", "new"
    assert wise_ft(old, new, 0.5).note == "new"


def test_a_reference_may_hold_a_tied_tensor_under_its_other_name(tmp_path):
    from safetensors.torch import save_model

    model = tiny_llama(tie_word_embeddings=True)
    save_model(model, str(tmp_path / "start.safetensors"))
    anchor = ParameterAnchor(model, reference=tmp_path / "start.safetensors")
    assert anchor().item() == 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 2
    assert anchor().item() == pytest.approx(4e-3)
    assert ParameterAnchor(model, reference=tmp_path)().item() == pytest.approx(4e-3)
    with pytest.raises(ValueError, match="strength must be finite"):
        ParameterAnchor(model, strength="1")


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mixed = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
        self.real = nn.Linear(3, 3)


@pytest.mark.parametrize("bucket", [1 << 26, 1])
def test_complex_parameters_count_by_the_squares_of_their_moduli(bucket, monkeypatch):
    monkeypatch.setattr("flowdata.companions.penalty._BUCKET", bucket)
    model = Spectral()
    started = started_from(model)
    model.mixed.requires_grad_(False)
    late = ParameterAnchor(model, strength=0.3)
    model.mixed.requires_grad_(True)
    late()  # before the first step with the parameter
    anchors = [late, ParameterAnchor(model, strength=0.3, reference=Spectral())]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 + 0.4j if p.is_complex() else 0.5)
    for anchor in anchors:
        model.zero_grad()
        penalty = anchor()
        penalty.backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        pairs = zip(model.parameters(), started, strict=True)
        plain = 0.3 * sum((p - then).abs().square().sum() for p, then in pairs)
        plain.backward()
        assert penalty.dtype == torch.float32
        assert penalty.item() == pytest.approx(plain.item(), rel=1e-5)
        for gradient, p in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad)


def test_complex_parameters_have_no_l1_distance():
    with pytest.raises(ValueError, match=r"kind='l1' is for real parameters.*take kind='l2'"):
        ParameterAnchor(Spectral(), "l1")
    model = Spectral()
    model.mixed.requires_grad_(False)
    anchor = ParameterAnchor(model, "l1")
    assert anchor().item() == 0
    model.mixed.requires_grad_(True)
    with pytest.raises(ValueError, match="model trains complex ones"):
        anchor()


def test_ends_without_values_have_no_average():
    whole, empty = nn.Linear(4, 3), nn.Linear(4, 3, device="meta")
    for ends, owner in (((empty, whole), "pretrained"), ((whole, empty), "finetuned")):
        for pair in (ends, [end.state_dict() for end in ends]):
            with pytest.raises(ValueError, match=f"{owner} has no values of 'weight'.*'meta'"):
                wise_ft(*pair, 0.5)
        with pytest.raises(ValueError, match=f"{owner} has no values of 'weight'"):
            sweep_wise_ft(*ends, [0.5], lambda model: 0)
