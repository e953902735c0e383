"""The anchor's parameters are the model's, whatever becomes of the model after it was made."""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flowdata.companions.anchor import ParameterAnchor
from tests.launched import start_ranks
from tests.leave_ranks import leave_ranks
from tests.models import tiny_llama


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def move(model, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator).to(p)


def starts_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check(anchor, model, starts, kind="l2"):
    """Compare penalty and gradients with autograd of the obvious formula."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = None
    apart = [(p - starts[name].to(p)).double() for name, p in trained.items()]
    expected = sum((d * d if kind == "l2" else d.abs()).sum() for d in apart)
    gradients = torch.autograd.grad(anchor.strength * expected, trained.values())
    penalty = anchor()
    assert penalty.item() > 0
    assert penalty.item() == pytest.approx(anchor.strength * expected.item(), rel=1e-4)
    penalty.backward()
    for p, gradient in zip(trained.values(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def assign(model):
    model.load_state_dict(network(5).state_dict(), assign=True)
    return model


def replace_one(model):
    model[2].weight = nn.Parameter(torch.ones(2, 4))
    return model


def replace_a_layer(model):
    model[0] = nn.Linear(3, 4)
    return model


def empty_and_load(model):
    model.to_empty(device="cpu").load_state_dict(network(6).state_dict())
    return model


def through_meta(model):
    model.to("meta").to_empty(device="cpu").load_state_dict(network(6).state_dict())
    return model


def swap_on_conversion(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


CHANGES = {
    "nothing": lambda model: model,
    "load_state_dict(assign=True)": assign,
    "a new parameter": replace_one,
    "a new layer": replace_a_layer,
    "to_empty": empty_and_load,
    "through the meta device": through_meta,
    "double": lambda model: model.double(),
    "new parameters in double": swap_on_conversion,
    "frozen in part": lambda model: model[0].requires_grad_(False) and model,
    "compiled": lambda model: torch.compile(model, backend="eager") and model,
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "in DataParallel": lambda model: nn.DataParallel(model).module,
    "a compiled layer": lambda model: model.__setitem__(2, torch.compile(model[2])) or model,
}


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_followed(change, kind):
    model = network()
    starts = starts_of(model)
    anchor = ParameterAnchor(model, kind, strength=0.3)
    anchor()
    model = CHANGES[change](model)
    move(model)
    starts = {name: starts[name.replace("_orig_mod.", "")] for name, _ in model.named_parameters()}
    check(anchor, model, starts, kind)
    move(model, seed=2)
    check(anchor, model, starts, kind)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_a_wrapped_model_is_anchored_and_its_reference_needs_no_wrapper(wrap, tmp_path):
    start, model = network(), network()
    save_file(start.state_dict(), tmp_path / "model.safetensors")
    move(model)
    wrapped = wrap(model)
    for reference in (start, start.state_dict(), wrap(start), wrap(start).state_dict(), tmp_path):
        anchor = ParameterAnchor(wrapped, strength=1.0, reference=reference)
        check(anchor, model, starts_of(start))


def test_gradual_unfreezing_is_followed_from_where_the_layer_was():
    model = network()
    starts = starts_of(model)
    model[0].requires_grad_(False)
    anchor = ParameterAnchor(model, strength=1.0)
    move(model)
    check(anchor, model, starts)
    model[0].requires_grad_(True)
    anchor()  # before the first step with the layer
    move(model)
    check(anchor, model, starts)
    model[2].requires_grad_(False)
    check(anchor, model, starts)
    model[2].requires_grad_(True)
    check(anchor, model, starts)


@pytest.mark.parametrize("kind", ["dict", "module", "file"])
def test_gradual_unfreezing_takes_the_reference_where_there_is_one(kind, tmp_path):
    start, model = network(), network()
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    reference = {
        "dict": start.state_dict(), "module": start, "file": tmp_path / "start.safetensors"
    }[kind]  # fmt: skip
    move(model)
    model[0].requires_grad_(False)
    anchor = ParameterAnchor(model, strength=1.0, reference=reference)
    model[0].requires_grad_(True)
    move(model)
    check(anchor, model, starts_of(start))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_layer_trained_before_the_anchor_saw_it_counts_from_its_start_or_is_refused(options):
    for size in (3, 700):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 2))
        starts = starts_of(model)
        model[0].requires_grad_(False)
        anchor = ParameterAnchor(model, strength=1.0)
        model[0].requires_grad_(True)
        model(torch.ones(1, size)).sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()
        if size == 3:
            check(anchor, model, starts)  # small ones were copied
            continue
        with pytest.raises(ValueError, match=r"'0.weight' was frozen .* written to since"):
            anchor()


def test_a_large_layer_of_equal_values_that_was_written_to_is_refused():
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2))
    nn.init.ones_(model[0].weight).requires_grad_(False)
    anchor = ParameterAnchor(model)
    with torch.no_grad():
        model[0].weight[::2] += 0.5
        model[0].weight[1::2] -= 0.5
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' was frozen .* written to since"):
        anchor()


WRITES = {
    "signs": lambda weight: -weight,
    "rows": lambda weight: weight.roll(1, 0),
    "columns": lambda weight: weight.roll(1, 1),
    "sides": lambda weight: weight.T,
    "one number": lambda weight: weight.index_put(
        (torch.tensor(3), torch.tensor(5)), weight[3, 5] + 1
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("write", WRITES)
def test_a_large_layer_whose_numbers_changed_places_or_signs_is_refused(write, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2)).to(dtype)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    anchor = ParameterAnchor(model)
    assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        model[0].weight.copy_(WRITES[write](before))
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' was frozen .* written to since"):
        anchor()


def test_a_large_layer_unfrozen_after_it_was_moved_to_equal_weights_is_followed():
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2))
    starts = starts_of(model)
    model[0].requires_grad_(False)
    anchor = ParameterAnchor(model, strength=1.0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model[0].requires_grad_(True)
    anchor()
    move(model)
    check(anchor, model, starts)


def test_a_quantised_layer_beneath_is_no_concern_of_the_anchor():
    for dtype in (torch.float8_e4m3fn, torch.int8):
        model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2))
        starts = starts_of(model)
        eighths = model[0].weight.detach().to(dtype)
        model[0].weight = nn.Parameter(eighths, requires_grad=False)
        anchor = ParameterAnchor(model, strength=1.0)
        move(model)
        check(anchor, model, starts)


def test_nothing_trained_is_refused_never_0():
    model = network()
    anchor = ParameterAnchor(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of model requires a gradient any more"):
        anchor()


def test_adapters_that_came_after_the_anchor_are_refused():
    peft = pytest.importorskip("peft")
    model = network()
    anchor = ParameterAnchor(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"lora_A.*did not have when the anchor was made.*after"):
        anchor()
    wrapped.base_model.disable_adapter_layers()
    wrapped.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of model requires a gradient any more"):
        anchor()


def test_adapters_taken_off_again_leave_the_anchor_as_it_was():
    peft = pytest.importorskip("peft")
    model = network()
    starts = starts_of(model)
    anchor = ParameterAnchor(model, strength=1.0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model = wrapped.merge_and_unload()
    model.requires_grad_(True)
    move(model)
    check(anchor, model, starts)


def test_resized_embeddings_are_refused_with_both_shapes():
    model = tiny_llama(tie_word_embeddings=True)
    anchor = ParameterAnchor(model)
    rows, width = model.model.embed_tokens.weight.shape
    model.resize_token_embeddings(rows + 3)
    with pytest.raises(ValueError, match=rf"\({rows + 3}, {width}\) and had \({rows}, {width}\)"):
        anchor()


def test_removed_and_reparametrised_layers_are_refused_by_name():
    model = network()
    anchor = ParameterAnchor(model)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"0.parametrizations.weight.*did not have"):
        anchor()
    model = network()
    anchor = ParameterAnchor(model)
    del model[2]
    with pytest.raises(ValueError, match=r"no longer has the anchored parameter '2.bias'"):
        anchor()


def test_meta_parameters_are_refused_unless_a_reference_says_where_they_start():
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        ParameterAnchor(model)
    start = network()
    anchor = ParameterAnchor(model, strength=1.0, reference=start)
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        anchor()
    model.to_empty(device="cpu").load_state_dict(network(3).state_dict())
    check(anchor, model, starts_of(start))


def test_a_tie_that_is_broken_later_counts_both_from_the_same_start():
    model = tiny_llama(tie_word_embeddings=True)
    starts = starts_of(model)
    anchor = ParameterAnchor(model, strength=1.0)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    starts["lm_head.weight"] = starts["model.embed_tokens.weight"]
    check(anchor, model, starts)
    model.lm_head.weight = model.model.embed_tokens.weight
    move(model)
    check(anchor, model, starts)


def test_an_anchor_copied_with_its_model_follows_the_copy():
    model = network()
    pair = {"model": model, "anchor": ParameterAnchor(model, strength=1.0)}
    twin = copy.deepcopy(pair)
    move(twin["model"])
    assert pair["anchor"]().item() == 0
    check(twin["anchor"], twin["model"], starts_of(model))


def save_in_shards(state, folder):
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_every_form_of_reference_is_read(tmp_path):
    start, model = network(), network()
    starts = starts_of(start)
    state = start.state_dict()
    move(model)
    for name in ("shards", "single", "bin"):
        (tmp_path / name).mkdir()
    index = save_in_shards(state, tmp_path / "shards")
    save_file(state, tmp_path / "single" / "model.safetensors")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    torch.save({"epoch": 3, "state_dict": state, "lr": 0.1}, tmp_path / "training.ckpt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    references = [
        *(index, str(index), index.parent, tmp_path / "single", tmp_path / "bin"),
        *(tmp_path / "bin" / "pytorch_model.bin", tmp_path / "training.ckpt", tmp_path / "old.pt"),
        *(start, state, dict(start.named_parameters())),
    ]
    for reference in references:
        check(ParameterAnchor(model, strength=1.0, reference=reference), model, starts)


def test_adapters_start_where_their_saved_folder_says(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = peft.get_peft_model(network(), config)
    move(model)
    starts = starts_of(model)
    model.save_pretrained(tmp_path)
    move(model, seed=4)
    check(ParameterAnchor(model, strength=1.0, reference=tmp_path), model, starts)


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_references_that_hold_no_weights_are_refused(tmp_path):
    state = network().state_dict()
    (tmp_path / "empty").mkdir()
    torch.save({"model": state, "evil": Evil()}, tmp_path / "evil.pt")
    index = save_in_shards(state, tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "cut.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    quantised = {name: (10 * value).to(torch.int8) for name, value in state.items()}
    cases = [
        (tmp_path / "empty", ValueError, "holds no weights"),
        (tmp_path / "none", FileNotFoundError, "snapshot_download"),
        (tmp_path / "evil.pt", ValueError, "weights_only=True"),
        (index, FileNotFoundError, "names the shard model-00002-of-00002.safetensors"),
        (tmp_path / "cut.safetensors", ValueError, "git-lfs"),
        (tmp_path / "other.pt", ValueError, "reference lacks '0.weight'"),
        (quantised, ValueError, r"'0.weight' quantised \(torch.int8\)"),
        (3, TypeError, "reference must be a module, a state dict or the path"),
    ]
    for reference, error, message in cases:
        with pytest.raises(error, match=message):
            ParameterAnchor(network(), reference=reference)


@pytest.mark.parametrize(
    "strength",
    [np.float32(0.5), np.float64(0.5), Fraction(1, 2), torch.tensor(0.5), np.array(0.5)],
)
def test_the_strength_may_be_any_real_number(strength):
    model = network()
    anchor = ParameterAnchor(model, strength=strength)
    move(model)
    starts = starts_of(network())
    assert anchor.strength == 0.5
    check(anchor, model, starts)
    assert ParameterAnchor(model, strength=np.int64(2)).strength == 2


@pytest.mark.parametrize(
    "strength",
    [np.float32("nan"), np.inf, -np.float64(1), Fraction(-1, 3), torch.tensor([0.5, 0.5]), True, 1j,
     None, torch.tensor(1.0, requires_grad=True)],
)  # fmt: skip
def test_a_strength_that_is_no_number_from_0_on_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got"):
        ParameterAnchor(network(), strength=strength)


def test_flat_pieces_are_refused_by_name():
    model = network()
    for p in model.parameters():
        p.ds_shape = p.shape
        p.data = torch.empty(0)
    with pytest.raises(ValueError, match="ZeRO-3"):
        ParameterAnchor(model)


def sharded_after(rank, folder, ranks, is_sharded_first):
    """Run on each process: train two steps under FSDP2, and without it, and compare."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    plain, model = network(), network()
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    anchors = [ParameterAnchor(plain, strength=0.5)]
    if not is_sharded_first:
        anchors.append(ParameterAnchor(model, strength=0.5))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_sharded_first:
        anchors.append(ParameterAnchor(model, strength=0.5))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for each, anchor in zip((plain, model), anchors, strict=True):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.3)
            (each(x).square().mean() + anchor()).backward()
            optimizer.step()
            optimizer.zero_grad()
    penalties = [anchor().item() for anchor in anchors]
    weights = [p.full_tensor().detach() for p in model.parameters()]
    torch.save((penalties, weights, [p.detach() for p in plain.parameters()]), f"{folder}/{rank}")
    leave_ranks()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("is_sharded_first", [True, False])
def test_fully_shard_before_or_after_the_anchor_trains_as_one_process(
    tmp_path, ranks, is_sharded_first
):
    start_ranks(sharded_after, (str(tmp_path), ranks, is_sharded_first), ranks)
    for rank in range(ranks):
        penalties, weights, expected = torch.load(tmp_path / str(rank), weights_only=True)
        assert penalties[0] > 0
        assert penalties[1] == pytest.approx(penalties[0], rel=1e-4)
        for weight, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, other)
