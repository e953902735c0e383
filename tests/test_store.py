import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowdata import ScoreMismatchError, Scores
from flowdata.errors import StoreError
from flowdata.store.folder import finish, locked, read_manifest
from flowdata.store.format import make_manifest, store_digest, write_manifest
from flowdata.store.identity import check_identity
from flowdata.store.packs import join, reorder
from flowdata.store.parts import PartWriter
from flowdata.store.repair import read_finished_packs
from flowdata.store.verify import verify_store

SIZES = torch.tensor([2, 1, 3])
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
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
    for indices in ((0, 2), (1,)):
        with PartWriter(tmp_path, MANIFEST) as writer:
            for index in indices:
                writer.add(index, pack(index), {4: "lost"} if index == 1 else {})
    return tmp_path


def found(folder, manifest=MANIFEST, order=ORDER, sizes=SIZES):
    packs = {}
    for finished in read_finished_packs(folder, manifest, order, sizes):
        packs |= finished.packs
    return packs


def test_parts_give_back_their_packs(begun):
    packs = found(begun)
    assert sorted(packs) == [0, 1, 2]
    for index, columns in packs.items():
        for name, values in pack(index).items():
            assert torch.equal(columns[name], values)
    skipped = [finished.skipped for finished in read_finished_packs(begun, MANIFEST, ORDER, SIZES)]
    assert {4: "lost"} in skipped


def test_parts_are_written_as_time_goes_by(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("flowdata.store.parts.monotonic", lambda: clock[0])
    write_manifest(tmp_path, MANIFEST)
    with PartWriter(tmp_path, MANIFEST) as writer:
        counts = []
        for seconds in (5, 9, 11, 20, 21, 5000, 5040, 5051):
            clock[0] = float(seconds)
            writer.add(seconds, pack(0), {})
            counts.append(len(list(tmp_path.glob("parts/*"))))
    assert counts == [0, 0, 1, 1, 2, 3, 3, 4]  # every 10 s, then every hundredth


def test_a_file_is_readable_without_the_library_and_its_bytes_are_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr("flowdata.store.format.__version__", "0.1.0")
    scores = Scores(
        torch.tensor([1.5, 2.0]),
        torch.tensor([2, 1]),
        metadata={"identity": {"model": "m"}, "plan": {"packs": 2}},
        token_losses=torch.tensor([1.0, 2.0, 2.0]),
    )
    finish(
        tmp_path, scores.to_tensors(), scores.manifest(), torch.tensor([1, 0]), torch.tensor([1, 1])
    )
    file = tmp_path / "scores.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = opened.metadata()
    assert tensors["loss"].tolist() == [1.5, 2.0]
    assert tensors["count"].dtype == torch.int64
    assert tensors["token_offset"].tolist() == [0, 2, 3]

    manifest, content = (json.loads(header["flowdata"])[name] for name in ("manifest", "content"))
    digest = hashlib.sha256(canonical(manifest))
    checksum = manifest.pop("checksum")
    assert manifest == {
        "details": {},
        "flowdata": "0.1.0",
        "format": 2,
        "identity": {"model": "m"},
        "plan": {"packs": 2},
        "skipped": {},
    }
    assert checksum == sha256(canonical(manifest))
    for name in ("count", "loss", "pack_checksum", "token_loss", "token_offset"):
        digest.update(f"{name}|{tensors[name].dtype}|{list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    assert content == digest.hexdigest()

    store = sha256(canonical({name: manifest[name] for name in ("format", "identity", "plan")}))
    for pack, content in enumerate(
        (struct.pack("<qff", 1, 2.0, 2.0), struct.pack("<qfff", 2, 1.5, 1.0, 2.0))
    ):
        keyed = hashlib.blake2b(digest_size=8, key=bytes.fromhex(store))
        keyed.update(struct.pack("<q", pack) + content)
        found = int.from_bytes(keyed.digest(), "little", signed=True)
        assert tensors["pack_checksum"][pack] == found

    kept = json.loads((tmp_path / "manifest.json").read_bytes())
    for name, (dtype, first, end) in kept["layout"].items():
        assert {"F32": torch.float32, "I64": torch.int64}[dtype] == tensors[name].dtype
        assert file.read_bytes()[first:end] == tensors[name].numpy().tobytes()
    pinned = {
        "scores.safetensors": "39d4276dd97fea567c22df37cce4ae441fbc1e9f2f650266f63927dc2fbb9938",
        "manifest.json": "a52412921b3c81c52f9126f9f787a118baea3222bfcaa507177ff96856bd0b0b",
    }
    assert {name: sha256((tmp_path / name).read_bytes()) for name in pinned} == pinned


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


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
    assert found(begun, other) == {}


def test_parts_that_do_not_fit_the_plan_are_left_out(begun):
    assert sorted(found(begun, sizes=torch.tensor([2, 1]))) == [1]
    assert found(begun, sizes=torch.tensor([9, 9, 9])) == {}


def test_what_differs_is_named():
    kept = {"model": "a", "dataset": "d", "dtype": "bfloat16"}
    check_identity(kept, dict(kept), "the store s")
    with pytest.raises(
        ScoreMismatchError,
        match=r"another dtype: \"bfloat16\" there, \"float32\" here\. Score into",
    ):
        check_identity(kept, kept | {"dtype": "float32"}, "the store s")
    with pytest.raises(ScoreMismatchError, match="another model and data set: model: "):
        check_identity(kept, {"model": "b", "dataset": "e", "dtype": "bfloat16"}, "the store s")


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("model", "2:{}", "2:{}", "its weights, code or settings differ"),
        ("model", "{}", "2:{}", "it was made by an earlier version of flowdata"),
        ("dataset", "content:2:{}", "content:2:{}", "its samples differ in content or order"),
        ("dataset", "tokens:{}", "tokens:{}", "its samples differ in content or order"),
        ("dataset", "content:2:{} sampled:2/5", "content:2:{} sampled:2/6", "its samples differ"),
        ("loss", "callable:{}", "callable:{}", "the function differs, or a value that it uses"),
        ("collate_fn", "{}", "{}", "the function differs, or a value that it uses"),
        ("digest", "{}", "{}", "its content differs"),
        ("loss", "mse", "callable:{}", '"mse" there, "callable:bbbbbbbbbbbb…" here'),
        ("dataset", "tokens:{}", "mine", '"tokens:aaaaaaaaaaaa…" there, "mine" here'),
    ],
)
def test_words_and_remedy_come_before_fingerprints_and_these_are_short(name, old, new, words):
    stored, expected = {name: old.format("a" * 64)}, {name: new.format("b" * 64)}
    with pytest.raises(ScoreMismatchError) as caught:
        check_identity(stored, expected, "the store s")
    message = str(caught.value)
    assert message.startswith("the store s was made with another ")
    told, remedy, last = message.partition("Score into another folder")
    assert words in told
    assert remedy
    assert ("(fingerprints: " in last) == ("{}" in old and "{}" in new)
    assert "a" * 13 not in message
    assert "b" * 13 not in message


def signed(manifest):
    return canonical(manifest | {"checksum": sha256(canonical(manifest))})


def test_manifests_that_can_not_be_trusted_are_refused(tmp_path):
    assert read_manifest(tmp_path / "new") is None
    file = tmp_path / "manifest.json"
    for content, message in (
        (b"{", "is damaged"),
        (b"[1]", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"format": 2}', "is damaged: its checksum"),
        (signed({"format": 2}), "'identity' should be an object"),
        (signed(MANIFEST | {"plan": []}), "'plan' should be an object"),
        (signed(MANIFEST | {"skipped": {"../x": "?"}}), "'skipped' should name indices"),
        (b'{"format": 1}', "has format 1, this version of flowdata .* reads format 2; score into"),
        (b'{"format": 3}', "has format 3, this version of flowdata .* reads format 2; upgrade"),
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
    assert states.pop("manifest.json") == "whole"
    assert list(states.values()) == ["whole", "whole"]
    write_manifest(begun, make_manifest({"model": "other"}, {"packs": 3}, {}))
    assert all("another store" in s for n, s in verify_store(begun).items() if "parts" in n)
    with pytest.raises(FileNotFoundError, match="no store at"):
        verify_store(begun / "nowhere")


def test_a_manifest_of_other_scores_is_named(tmp_path):
    Scores(torch.tensor([1.5]), metadata={"identity": {"dataset": "ours"}}).save(tmp_path)
    write_manifest(tmp_path, make_manifest({"dataset": "theirs"}, {}, {}))
    findings = verify_store(tmp_path)
    assert findings["scores.safetensors"] == "whole"
    assert "belongs to other scores than scores.safetensors" in findings["manifest.json"]
    write_manifest(tmp_path, make_manifest({"dataset": "ours"}, {}, {}))
    assert set(verify_store(tmp_path).values()) == {"whole"}


def test_scores_are_not_saved_over_those_of_others(tmp_path):
    ours, theirs = ({"identity": {"dataset": name}} for name in ("ours", "theirs"))
    scores = Scores(torch.tensor([1.5]), metadata=ours)
    scores.save(scores.save(tmp_path / "store"))
    with pytest.raises(ScoreMismatchError, match="holds the scores of another data set"):
        Scores(torch.tensor([2.5]), metadata=theirs).save(tmp_path / "store")
    assert Scores.load(tmp_path / "store").losses.tolist() == [1.5]
    write_manifest(tmp_path / "begun", make_manifest(theirs["identity"], {"packs": 3}, {}))
    with pytest.raises(ScoreMismatchError, match="holds the scores of another data set"):
        scores.save(tmp_path / "begun")
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["manifest.json"]


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


# --- repair --------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """A finished store of three packs, and what its packs hold."""
    packs = [pack(index) for index in range(3)]
    columns = reorder(join(packs), ORDER.argsort())
    scores = Scores(
        columns["loss"],
        columns["count"],
        metadata=MANIFEST,
        token_losses=columns["token_loss"],
        columns={"entropy": columns["loss"] / 2},
    )
    finish(tmp_path, scores.to_tensors(), scores.manifest(), ORDER, SIZES)
    return tmp_path, [{**each, "entropy": each["loss"] / 2} for each in packs]


def test_every_byte_of_a_finished_store_can_be_damaged_and_costs_few_packs(finished):
    """A flipped byte costs the packs whose numbers it holds; in the header, none."""
    folder, packs = finished
    file = folder / "scores.safetensors"
    content = file.read_bytes()
    layout = json.loads((folder / "manifest.json").read_bytes())["layout"]
    manifest = read_manifest(folder)
    begin = min(first for _, first, _ in layout.values())
    for position in (*range(0, begin, 17), *range(begin, len(content))):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(StoreError):
            Scores.load(folder)
        kept = found(folder, read_manifest(folder) or manifest)
        in_offsets = layout["token_offset"][1] <= position < layout["token_offset"][2]
        lost = 0 if position < begin else 2 if in_offsets else 1
        assert 3 - lost <= len(kept) < (3 if lost else 4), position
        assert all(
            torch.equal(columns[name], packs[index][name])
            for index, columns in kept.items()
            for name in packs[index]
        )
    for end in range(0, len(content), 41):  # cut: what is whole in every column is kept
        file.write_bytes(content[:end])
        for index, columns in found(folder, manifest).items():
            assert torch.equal(columns["loss"], packs[index]["loss"])
    file.write_bytes(content)
    assert (
        Scores.load(folder).counts.tolist()
        == reorder(join(packs), ORDER.argsort())["count"].tolist()
    )


@pytest.mark.parametrize("name", ["count", "token_offset"])
def test_a_layout_that_gives_a_tensor_another_dtype_costs_the_packs_alone(finished, name):
    folder, packs = finished
    manifest = read_manifest(folder)
    _, first, end = manifest["layout"][name]
    manifest["layout"][name] = ["F32", first, first + (end - first) // 2]  # as many, half as wide
    assert found(folder, manifest) == {}
    manifest.pop("layout")
    assert len(found(folder, manifest)) == len(packs)


def test_a_lost_manifest_is_taken_from_any_whole_file(finished, begun):
    folder, _ = finished
    for content in (None, b"", b"{}", (folder / "scores.safetensors").read_bytes()):
        if content is None:
            (folder / "manifest.json").unlink()
        else:
            (folder / "manifest.json").write_bytes(content)
        assert store_digest(read_manifest(folder)) == store_digest(MANIFEST)


def test_a_manifest_that_was_edited_is_not_believed(begun):
    file = begun / "manifest.json"
    file.write_text(file.read_text().replace('"model": "m"', '"model": "n"'))
    assert read_manifest(begun)["identity"] == {"model": "m"}  # a part's
    assert "checksum" in verify_store(begun)["manifest.json"]


def test_files_reach_nothing_outside_their_folder(begun, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for part in begun.glob("parts/*"):
        part.rename(elsewhere / part.name)
    (begun / "parts").rmdir()
    (begun / "parts").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="parts is a link"):
        read_manifest(begun)
    assert len(list(elsewhere.iterdir())) == 2


def test_a_part_is_not_taken_for_scores(begun):
    part = next(begun.glob("parts/*"))
    part.rename(begun / "scores.safetensors")
    with pytest.raises(StoreError, match="is no file of scores"):
        Scores.load(begun)


def test_what_an_interrupted_write_left_is_removed(begun):
    for name in (".scores.safetensors.ab", ".manifest.json.ab", "parts/.x.safetensors.ab"):
        (begun / name).write_text("half")
    with locked(begun):
        assert not list(begun.glob("**/.*.ab"))
    assert sorted(found(begun)) == [0, 1, 2]


def test_details_have_to_be_json():
    with pytest.raises(TypeError, match="details must be JSON-like"):
        make_manifest({}, {}, {"tensor": torch.ones(2)})
