import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowdata import ScoreMismatchError, Scores
from flowdata.store import (
    PartWriter,
    StoreError,
    check_identity,
    locked,
    make_manifest,
    read_manifest,
    read_parts,
    save_scores,
    store_digest,
    verify_store,
    write_manifest,
)

SIZES = torch.tensor([2, 1, 3])
MANIFEST = make_manifest({"model": "m"}, {"packs": 3}, {})


def pack(index):
    size = int(SIZES[index])
    return {
        "loss": torch.arange(size, dtype=torch.float32) + index,
        "count": torch.full((size,), index + 1),
        "token_loss": torch.arange(size * (index + 1), dtype=torch.float32),
    }


@pytest.fixture
def begun(tmp_path):
    """A store with packs 0 and 2 in one part, pack 1 in another."""
    write_manifest(tmp_path, MANIFEST)
    writer = PartWriter(tmp_path, MANIFEST, packs_per_part=2)
    for index in (0, 2, 1):
        writer.add(index, pack(index))
    writer.flush()
    return tmp_path


def found(folder):
    return dict(read_parts(folder, MANIFEST, SIZES))


def test_parts_give_back_their_packs(begun):
    packs = found(begun)
    assert sorted(packs) == [0, 1, 2]
    for index, columns in packs.items():
        for name, values in pack(index).items():
            assert torch.equal(columns[name], values)


def test_a_file_is_readable_without_the_library_and_its_bytes_are_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr("flowdata.__version__", "0.1.0")
    scores = Scores(
        torch.tensor([1.5, 2.0]),
        torch.tensor([2, 1]),
        metadata={"identity": {"model": "m"}, "plan": {"packs": 1}},
        token_losses=torch.tensor([1.0, 2.0, 2.0]),
    )
    save_scores(scores, tmp_path / "s")
    file = tmp_path / "s" / "scores.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("loss").tolist() == [1.5, 2.0]
        assert opened.get_tensor("count").dtype == torch.int64
        assert opened.get_tensor("token_offset").tolist() == [0, 2, 3]
        metadata = json.loads(opened.metadata()["flowdata"])
    checksum = metadata.pop("checksum")
    assert metadata == {
        "details": {},
        "flowdata": "0.1.0",
        "format": 1,
        "identity": {"model": "m"},
        "plan": {"packs": 1},
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode())
    for name in ("count", "loss", "token_loss", "token_offset"):
        tensor = safe_open(file, "pt").get_tensor(name)
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    assert checksum == digest.hexdigest()
    pinned = "33c925d4f3b3fda05f3f04f3d58d02bb31d7227acf742830694d9b8720888065"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == pinned


def test_flipped_cut_empty_and_foreign_parts_are_left_out(begun, caplog):
    first, second = sorted(begun.glob("parts/*"))
    content = first.read_bytes()
    whole = found(begun)
    for position in range(0, len(content), 7):
        first.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        packs = found(begun)
        assert set(packs) < set(whole)
    for end in (0, 5, 100, len(content) - 1):
        first.write_bytes(content[:end])
        assert set(found(begun)) < set(whole)
    first.write_bytes(second.read_bytes())
    assert set(found(begun)) < set(whole)
    save_file({"loss": torch.ones(2)}, first)
    assert set(found(begun)) < set(whole)
    assert "what it held is scored again" in caplog.text


def test_parts_of_another_store_are_left_out(begun):
    other = make_manifest({"model": "other"}, {"packs": 3}, {})
    assert store_digest(other) != store_digest(MANIFEST)
    assert dict(read_parts(begun, other, SIZES)) == {}


def test_parts_that_do_not_fit_the_plan_are_left_out(begun):
    assert sorted(dict(read_parts(begun, MANIFEST, torch.tensor([2, 1])))) == [1]
    assert dict(read_parts(begun, MANIFEST, torch.tensor([9, 9, 9]))) == {}


def test_what_differs_is_named(tmp_path):
    kept = {"model": "a", "dataset": "d", "dtype": "bfloat16"}
    check_identity(kept, dict(kept), tmp_path)
    with pytest.raises(
        ScoreMismatchError, match=r"another dtype \(dtype: the store has \"bfloat16\""
    ):
        check_identity(kept, kept | {"dtype": "float32"}, tmp_path)
    with pytest.raises(ScoreMismatchError, match="another model and dataset"):
        check_identity(kept, {"model": "b", "dataset": "e", "dtype": "bfloat16"}, tmp_path)


def test_manifests_that_can_not_be_trusted_are_refused(tmp_path):
    assert read_manifest(tmp_path / "new") is None
    file = tmp_path / "manifest.json"
    for content, message in (
        (b"{", "is damaged"),
        (b"[1]", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"format": 1}', "is damaged"),
        (b'{"format": 1, "identity": [], "plan": {}, "details": {}}', "is damaged"),
        (b'{"format": 99}', "has format 99, this version of flowdata"),
    ):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            read_manifest(tmp_path)


def test_a_damaged_final_file_is_refused(tmp_path):
    Scores(torch.tensor([1.5, 2.0])).save(tmp_path)
    file = tmp_path / "scores.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="checksum does not agree"):
        Scores.load(tmp_path)
    assert "checksum" in verify_store(tmp_path)["scores.safetensors"]


def test_verify_names_the_state_of_every_file(begun):
    states = verify_store(begun)
    assert states.pop("scores.safetensors") == "not there yet: scoring is not finished"
    assert list(states.values()) == ["whole", "whole"]
    with pytest.raises(FileNotFoundError, match="no store at"):
        verify_store(begun / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    scores = Scores(torch.tensor([1.5]))
    scores.save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Scores(torch.tensor([9.0])).save(tmp_path)
    monkeypatch.undo()
    assert Scores.load(tmp_path).losses.tolist() == [1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_the_second_of_two_writers_waits(tmp_path, caplog):
    import threading

    order = []

    def second():
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "another process is scoring into" in caplog.text
