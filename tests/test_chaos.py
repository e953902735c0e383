"""Kills, corruptions and fuzz: briefly in every run, at length under `pytest -m chaos`."""

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer, ScoreMismatchError, Scores
from flowdata.errors import StoreError
from flowdata.store.folder import read_manifest
from flowdata.store.format import _canonical, _metadata, _signed
from flowdata.store.repair import read_finished_packs
from flowdata.store.verify import verify_store

ROOT = Path(__file__).parent.parent
N, PACK = 40, 5
torch.manual_seed(0)
DATA = TensorDataset(torch.randn(N, 4), torch.arange(N) % 3)
MODEL = nn.Linear(4, 3)


# --- kills -----------------------------------------------------------------------------------


def killed(kills, seed):
    command = [sys.executable, "-m", "tests.chaos_kills", str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_losses_are_bit_identical_after_a_few_kills():
    seen = killed(3, seed=0)
    assert seen["kills"] >= 3
    assert seen["stores"] >= 1


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1])
def test_losses_are_bit_identical_after_fifty_kills_with_changing_rank_counts(seed):
    seen = killed(50, seed)
    assert seen["kills"] >= 50
    assert seen["resumed"] > 5
    assert set(seen["ranks"]) == {1, 2, 3, 4}


# --- corruptions -----------------------------------------------------------------------------


class Stop(Exception):
    pass


def score(folder, stop_after=None):
    """Scores, and how many samples the model ran."""
    ran = []

    def loss(model, batch):
        if len(batch[0]) == PACK:  # the others are of the check
            if stop_after is not None and len(ran) == stop_after:
                raise Stop
            ran.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    scorer = LossScorer(MODEL, loss_of(loss), batch_size=PACK, progress=False)
    try:
        return scorer.score(DATA, store=folder, dataset_id="d"), sum(ran)
    except Stop:
        return None, sum(ran)


def loss_of(function):
    """A loss whose fingerprint does not depend on what `function` has captured."""
    globals()["running loss"] = function

    class Loss:
        def __call__(self, model, batch):
            return globals()["running loss"](model, batch)

    return Loss()


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A finished store, an unfinished one, one of another model, and the true losses."""
    finished, begun, other = (tmp_path_factory.mktemp(n) / "s" for n in ("f", "b", "o"))
    losses = score(finished)[0].losses
    for packs in (2, 3, 2):
        score(begun, stop_after=packs)
    LossScorer(nn.Linear(4, 3), "cross_entropy", progress=False).score(DATA, store=other)
    return finished, begun, other, losses


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def corrupt(folder, other, draw):
    """Do one thing to a store; returns the files whose packs it may cost."""
    file = draw.choice(files_of(folder))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "zero", "swap", "remove", "edit", "double", "junk"])
    if kind == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content) + 1) :]
    elif kind == "zero" and content:
        begin = draw.randrange(len(content))
        end = min(len(content), begin + draw.choice([1, 64, 4096]))
        content[begin:end] = bytes(end - begin)
    elif kind == "swap":
        second = draw.choice([*files_of(folder), *files_of(other)])
        theirs = second.read_bytes()
        if folder in second.parents:
            second.write_bytes(content)
        file.write_bytes(theirs)
        return [file, second]
    elif kind == "remove":
        file.unlink()
        return [file]
    elif kind == "edit":
        (folder / "manifest.json").write_text(edited(folder / "manifest.json", draw))
        return []
    elif kind == "double" and file.parent.name == "parts":
        shutil.copy(file, file.with_name(f"{draw.random()}.safetensors"))
        return []
    elif kind == "junk":
        (folder / "parts").mkdir(exist_ok=True)
        (folder / "parts" / f"{draw.random()}.safetensors").write_bytes(draw.randbytes(300))
        return []
    file.write_bytes(content)
    return [file]


def edited(file, draw):
    """A manifest with one of its values changed."""
    try:
        manifest = json.loads(file.read_bytes())
        field = draw.choice(["identity", "plan", "details", "skipped", "format"])
        value = draw.choice([None, 7, "x", [], {}, {"model": "x"}, -1, 1e300, "../../etc"])
        if isinstance(manifest[field], dict) and manifest[field] and draw.random() < 0.7:
            manifest[field][draw.choice(sorted(manifest[field]))] = value
        else:
            manifest[field] = value
        return json.dumps(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return "{"


def corruptions(seeds, templates, tmp_path):
    finished, begun, other, losses = templates
    outcomes = {"whole": 0, "repaired": 0, "refused": 0}
    for seed in seeds:
        draw = random.Random(seed)
        template = draw.choice([finished, begun])
        folder = tmp_path / str(seed)
        shutil.copytree(template, folder)
        cost = {part: len(load_file(part)["loss"]) for part in folder.glob("parts/*")}
        undone = 0 if template == finished else N - sum(cost.values())
        damaged = set()
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            damaged.update(corrupt(folder, other, draw) if files_of(folder) else [])
        cost[folder / "scores.safetensors"] = N
        most = undone + sum(cost.get(file, 0) for file in damaged)
        assert set(verify_store(folder).values()), seed
        try:
            loaded = Scores.load(folder)
            assert torch.equal(loaded.losses, losses) or identity_differs(loaded, finished), seed
        except (StoreError, FileNotFoundError):
            pass
        try:
            scores, ran = score(folder)
        except (StoreError, ScoreMismatchError) as error:
            if not damaged:
                raise AssertionError(seed) from error
            outcomes["refused"] += 1
            continue
        assert torch.equal(scores.losses, losses), seed
        assert ran <= most, (seed, ran, most, damaged)
        outcomes["repaired" if damaged else "whole"] += 1
        assert torch.equal(Scores.load(folder).losses, losses), seed
        shutil.rmtree(folder)
    return outcomes


def identity_differs(scores, finished):
    return scores.metadata["identity"] != Scores.load(finished).metadata["identity"]


def test_corruptions_never_give_a_wrong_number(templates, tmp_path):
    outcomes = corruptions(range(150), templates, tmp_path)
    assert outcomes["repaired"] > 4 * outcomes["refused"], outcomes


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_thousand_corruptions_never_give_a_wrong_number(templates, tmp_path):
    outcomes = corruptions(range(1000, 2000), templates, tmp_path)
    assert sum(outcomes.values()) == 1000
    assert outcomes["repaired"] > 4 * outcomes["refused"], outcomes


# --- fuzz ------------------------------------------------------------------------------------

HOSTILE = [
    None,
    True,
    -1,
    0,
    2**63,
    10**30,
    1e308,
    "",
    "../../etc/passwd",
    "\x00",
    "\ud800",
    [],
    {},
    [[[]]],
    {"a": {"a": {}}},
    {"1": "x"},
    {"loss": ["F32", 0, 2**62]},
    {"loss": ["F32", -4, 4], "count": ["I64", 8, 1]},
    {"loss": ["F64", 0, 8]},
    {"loss": [[], 0.5, "8"]},
]


def mutated_bytes(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place : place + draw.choice([1, 8, 100])]
        elif kind == 2:
            content[place:place] = draw.randbytes(draw.choice([1, 8, 60]))
        elif kind == 3:
            content[place:place] = draw.choice([b"9" * 5000, b"[" * 2000, b'"', b"{}", b"\\u0000"])
        else:
            content[place : place + 8] = draw.choice([2**63, 2**31, 0, 7]).to_bytes(8, "little")
    return bytes(content)


def mutated_manifest(manifest, draw):
    """A manifest with hostile values, whose checksum is right."""
    manifest = json.loads(json.dumps(manifest))
    for _ in range(draw.choice([1, 2])):
        field = draw.choice([*manifest, "layout", "new"])
        value = copy.deepcopy(draw.choice(HOSTILE))
        if isinstance(manifest.get(field), dict) and draw.random() < 0.6:
            manifest[field][draw.choice([*manifest[field], "new"])] = value
        else:
            manifest[field] = value
    return manifest


def mutated_file(manifest, draw):
    """A safetensors file of odd tensors, whose checksums are right."""
    names = ["loss", "count", "pack", "token_loss", "token_offset", "pack_checksum", "x"]
    kinds = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.uint8]
    tensors = {}
    for name in draw.sample(names, draw.randrange(1, 6)):
        shape = draw.choice([(), (0,), (1,), (N,), (PACK,), (N + 1,), (2, N), (10,)])
        values = (
            torch.tensor(draw.choice([0, 1, -1, 3, 9, 2**62]))
            .expand(shape)
            .clone(memory_format=torch.contiguous_format)
        )
        tensors[name] = values.to(draw.choice([*kinds, torch.float32, torch.int64]))
    return save(tensors, {"flowdata": _metadata(tensors, manifest)})


def fuzz(count, templates, folder, seed):
    """Every mutation is refused by a StoreError, or gives true packs or scores of odd tensors."""
    finished, begun, _, losses = templates
    manifest = read_manifest(finished)
    order, sizes = torch.arange(N), torch.full((N // PACK,), PACK)
    texts = [(store / "manifest.json").read_bytes() for store in (finished, begun)]
    scores = (finished / "scores.safetensors").read_bytes()
    part = next(begun.glob("parts/*")).read_bytes()
    (folder / "parts").mkdir()
    names = ("manifest.json", "scores.safetensors", "parts/a.safetensors")
    draw, refused = random.Random(seed), 0

    def true_packs(manifest):
        for finished in read_finished_packs(folder, manifest, order, sizes):
            for index, columns in finished.packs.items():
                where = slice(index * PACK, (index + 1) * PACK)
                assert torch.equal(columns["loss"], losses[where]), (seed, index)

    for number in range(count):
        kind = draw.randrange(5)
        if kind == 0:
            name, content = names[0], mutated_bytes(draw.choice(texts), draw)
        elif kind == 1:
            name, content = names[0], _canonical(_signed(mutated_manifest(manifest, draw)))
        elif kind == 2:
            name, content = names[1], mutated_bytes(scores, draw)
        elif kind == 3:
            name, content = names[2], mutated_bytes(part, draw)
        else:
            odd = mutated_manifest(manifest, draw) if draw.random() < 0.3 else manifest
            name, content = draw.choice(names[1:]), mutated_file(odd, draw)
        (folder / name).write_bytes(content)
        try:
            try:
                found = read_manifest(folder) or manifest
                if kind < 4:
                    true_packs(found)
                else:
                    list(read_finished_packs(folder, manifest, order, sizes))
                loaded = Scores.load(folder)
                assert kind == 4 or torch.equal(loaded.losses, losses), (seed, number)
            except (StoreError, FileNotFoundError):
                refused += 1
        except Exception as error:
            raise AssertionError(
                f"seed {seed}, number {number}, {name}: {content[:2000]}"
            ) from error
        (folder / name).unlink()
    return refused


def test_fuzzed_manifests_and_headers_are_refused_cleanly(templates, tmp_path, caplog):
    caplog.set_level("CRITICAL")
    assert fuzz(2000, templates, tmp_path, seed=0) > 1000


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_200_000_fuzzed_manifests_and_headers_are_refused_cleanly(templates, tmp_path, caplog):
    caplog.set_level("CRITICAL")
    assert fuzz(200_000, templates, tmp_path, seed=1) > 100_000
