"""WiSE-FT of checkpoints on the disk: every form, a tensor at a time, read by from_pretrained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

from flowdata import wise_ft
from tests import reference
from tests.models import tiny_llama

transformers = pytest.importorskip("transformers")


def two_llamas(old_tied=False, new_tied=False):
    old, new = (tiny_llama(tie_word_embeddings=tied) for tied in (old_tied, new_tied))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for model in (old, new):
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator)
    return old.eval(), new.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


def from_folder(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def check_states(state, old, new, alpha):
    for name, expected in reference.wise_ft(old, new, alpha).items():
        torch.testing.assert_close(state[name].double(), expected, atol=1e-6, rtol=1e-6)


def as_cache(folder, cache):
    """A folder of the hub's cache: snapshots are links to blobs."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return cache


def save_bin(model, folder):
    """The shards and the index that older versions of transformers wrote."""
    folder.mkdir()
    state, weight_map = model.state_dict(), {}
    for number, part in enumerate((list(state)[::2], list(state)[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model.config.save_pretrained(folder)
    return folder


@pytest.fixture
def forms(tmp_path):
    """Every form of checkpoint, of the start and of the end."""
    old, new = two_llamas()
    paths = {}
    for which, model in (("old", old), ("new", new)):
        folder = tmp_path / which
        model.save_pretrained(folder / "shards", max_shard_size="30KB")
        assert len(list((folder / "shards").glob("*.safetensors"))) > 2
        model.save_pretrained(folder / "single")
        torch.save(model.state_dict(), folder / "state.pt")
        torch.save({"model": model.state_dict(), "step": 3}, folder / "training.pth")
        paths[which] = {
            "shards": folder / "shards",
            "index": folder / "shards" / "model.safetensors.index.json",
            "single": folder / "single",
            "file": folder / "single" / "model.safetensors",
            "cache": as_cache(folder / "shards", folder / "models--me--llama"),
            "snapshot": folder / "models--me--llama" / "snapshots" / "abc123",
            "bins": save_bin(model, folder / "bins"),
            "pt": folder / "state.pt",
            "training": folder / "training.pth",
        }
    return old, new, paths


FORMS = ("shards", "index", "single", "file", "cache", "snapshot", "bins", "pt", "training")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_averaged_into_a_file(forms, form, tmp_path):
    old, new, paths = forms
    for start, end in ((form, "shards"), ("file", form), (form, form)):
        out = wise_ft(paths["old"][start], paths["new"][end], 0.3, tmp_path / "mean.safetensors")
        check_states(load_file(out), old.state_dict(), new.state_dict(), 0.3)


@pytest.mark.parametrize("form", ["shards", "index", "single", "cache", "bins"])
def test_a_folder_is_averaged_into_a_folder_that_from_pretrained_reads(forms, form, tmp_path):
    old, new, paths = forms
    out = wise_ft(str(paths["old"]["file"]), paths["new"][form], 0.3, str(tmp_path / "mean"))
    model = from_folder(out)
    check_states(model.state_dict(), old.state_dict(), new.state_dict(), 0.3)
    shards = list(out.glob("*.safetensors"))
    given = len(list(paths["new"]["shards"].glob("*.safetensors")))
    assert len(shards) == {"single": 1, "bins": 2}.get(form, given)
    assert not list(out.glob("*.bin*"))
    assert not any(path.is_symlink() for path in out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean", "new", "old"]


def test_a_folder_that_is_there_stays_as_it_is_and_an_error_leaves_nothing(forms, tmp_path):
    _, _, paths = forms
    with pytest.raises(ValueError, match=r"output must be a new folder, and .* is there already"):
        wise_ft(paths["old"]["shards"], paths["new"]["shards"], 0.5, paths["new"]["shards"])
    state = load_file(paths["old"]["file"])
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, tmp_path / "odd.safetensors")
    for output in (tmp_path / "mean", tmp_path / "mean.safetensors"):
        with pytest.raises(ValueError, match=r"'model.norm.weight' is of integers \(torch.int8\)"):
            wise_ft(tmp_path / "odd.safetensors", paths["new"]["shards"], 0.5, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "odd.safetensors", "old"]
    (tmp_path / "mean").mkdir()
    wise_ft(paths["old"]["shards"], paths["new"]["shards"], 0.5, tmp_path / "mean")
    from_folder(tmp_path / "mean")


@pytest.mark.parametrize("output", ["mean.bin", "mean.pt"])
def test_an_output_that_is_not_safetensors_is_refused(forms, output, tmp_path):
    _, _, paths = forms
    for form in ("file", "shards"):
        with pytest.raises(ValueError, match=r"output is written as safetensors"):
            wise_ft(paths["old"][form], paths["new"][form], 0.5, tmp_path / output)


@pytest.mark.parametrize(("old_tied", "new_tied"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_tied_and_untied_ends_are_themselves(tmp_path, old_tied, new_tied, alpha):
    old, new = two_llamas(old_tied, new_tied)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new", max_shard_size="30KB")
    averaged = [
        wise_ft(old, new, alpha),
        from_folder(wise_ft(tmp_path / "old", tmp_path / "new", alpha, tmp_path / "mean")),
    ]
    averaged[0].save_pretrained(tmp_path / "again")
    averaged.append(from_folder(tmp_path / "again"))
    expected = {0: logits(old), 1: logits(new)}.get(alpha)
    for model in averaged:
        check_states(model.state_dict(), old.state_dict(), new.state_dict(), alpha)
        if expected is not None:
            assert torch.equal(logits(model), expected)
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert is_tied == (old_tied and new_tied)
    for model, tied in ((old, old_tied), (new, new_tied)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_file_that_notes_its_ties_is_believed_and_a_head_that_is_missing_is_not_guessed(tmp_path):
    old, new = two_llamas(True, False)
    save_model(old, str(tmp_path / "old.safetensors"))
    save_model(new, str(tmp_path / "new.safetensors"))
    for start, end in (("old", "new"), ("new", "old")):
        files = (tmp_path / f"{which}.safetensors" for which in (start, end))
        out = wise_ft(*files, 0.3, tmp_path / "m.safetensors")
        ends = {"old": old.state_dict(), "new": new.state_dict()}
        check_states(load_file(out), ends[start], ends[end], 0.3)
        with safe_open(out, "pt") as file:
            assert set(file.metadata()) == {"format"}
    states = {"embed.weight": torch.ones(5, 2), "lm_head.weight": torch.ones(5, 2)}
    with pytest.raises(ValueError, match=r"pretrained lacks 'lm_head.weight'"):
        wise_ft({"embed.weight": torch.ones(6, 2)}, states, 0.5)
    untied = {**new.config.to_dict(), "tie_word_embeddings": False}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps(untied))
    state = {name: v for name, v in new.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(ValueError, match=r"broken lacks 'lm_head.weight'"):
        wise_ft(tmp_path / "broken", tmp_path / "new.safetensors", 0.5, tmp_path / "m.safetensors")


STREAMING = """
import sys
from pathlib import Path
import torch
import flowdata
from flowdata.companions import averages

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

sizes, average_of = [], averages.average_of
def watched(*arguments):
    average = average_of(*arguments)
    sizes.append(resident())
    return average
averages.average_of = watched
flowdata.wise_ft(sys.argv[1], sys.argv[2], 0.5, sys.argv[3])
print(max(sizes) - sizes[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells resident memory")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_streamed_with_a_few_tensors_in_memory(tmp_path, kind):
    size = 4 * 2**20  # bytes of a tensor; each checkpoint has 24 of them
    for which in ("old", "new"):
        folder = tmp_path / which
        folder.mkdir()
        weight_map = {}
        for shard in range(3):
            state = {f"w{shard}.{i}": torch.rand(size // 4) for i in range(8)}
            file = f"model-{shard + 1:05}-of-00003.{kind}"
            if kind == "bin":
                torch.save(state, folder / file)
            else:
                save_file(state, folder / file)
            weight_map.update(dict.fromkeys(state, file))
        index = folder / f"model.{kind}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    script = [sys.executable, "-c", STREAMING]
    paths = [str(tmp_path / name) for name in ("old", "new", "mean")]
    # With it freed tensors are no longer resident; else the allocator keeps some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        script + paths, capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 5 * size  # more than at the first tensor, which has temporary ones
    assert len(list((tmp_path / "mean").glob("*.safetensors"))) == 3


def test_quantised_checkpoints_are_refused_by_their_configuration(tmp_path):
    old, new = two_llamas()
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"finetuned is quantised \(gptq"):
        wise_ft(tmp_path / "old", tmp_path / "new", 0.5, tmp_path / "mean")


def test_a_pickled_module_is_refused_by_what_it_is_without_advice_to_trust_it(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"weights_only=True .*Linear was not an allowed") as error:
        wise_ft(tmp_path / "whole.pt", tmp_path / "state.pt", 0.5, tmp_path / "mean.safetensors")
    assert "save the model's state_dict() alone" in str(error.value)
    assert "trust" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_adapters_on_the_disk_are_refused_with_the_remedy(tmp_path):
    peft = pytest.importorskip("peft")
    old, new = two_llamas()
    old.save_pretrained(tmp_path / "old")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(new, config).save_pretrained(tmp_path / "new")
    file = "adapter_model.safetensors"
    for paths in (("old", "new"), ("new", "old"), ("new", "new"), ("old", f"new/{file}")):
        with pytest.raises(ValueError, match=r"is an adapter .*PeftModel.from_pretrained"):
            wise_ft(*(tmp_path / path for path in paths), 0.5, tmp_path / "mean.safetensors")


def test_a_folder_of_several_checkpoints_or_none_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several checkpoints, a.safetensors and b.safetensors"):
        wise_ft(tmp_path, tmp_path, 0.5, tmp_path / "mean.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    out = wise_ft(tmp_path, tmp_path / "a.safetensors", 0.25, tmp_path / "mean.safetensors")
    assert load_file(out)["w"].tolist() == [0.25, 0.25]  # the usual name is the one that is meant
    index = tmp_path / "away.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../a.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the shard '../a.safetensors', which is a path"):
        wise_ft(index, index, 0.5, tmp_path / "mean")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no weights"):
        wise_ft(tmp_path / "a.safetensors", tmp_path / "none", 0.5, tmp_path / "mean.safetensors")
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        wise_ft("meta-llama/Llama-3", "meta-llama/Llama-3-sft", 0.5, tmp_path / "mean")


@pytest.mark.parametrize("old_tied", [True, False])
def test_a_bias_that_bert_keeps_once_where_it_is_tied_is_one(tmp_path, old_tied):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    ends = [
        transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, tie_word_embeddings=tied)
        ).eval()
        for tied in (old_tied, not old_tied)
    ]
    for name, model in zip(("old", "new"), ends, strict=True):
        model.save_pretrained(tmp_path / name)
    for alpha, end in enumerate(ends):
        out = wise_ft(tmp_path / "old", tmp_path / "new", alpha, tmp_path / f"mean{alpha}")
        model = transformers.AutoModelForMaskedLM.from_pretrained(out).eval()
        assert torch.equal(logits(model), logits(end))


def test_networks_that_scale_a_tied_output_layer_are_refused_beside_untied_ones(tmp_path):
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1}
    old, new = (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, num_heads=2, tie_word_embeddings=tied)
        )
        for tied in (True, False)
    )
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    for ends in ((old, new), (tmp_path / "old", tmp_path / "new")):
        output = (tmp_path / "mean",) if ends[0] is not old else ()
        with pytest.raises(ValueError, match="t5 scales what goes into its output layer"):
            wise_ft(*ends, 0.5, *output)
        wise_ft(ends[0], ends[0], 0.5, *output)
