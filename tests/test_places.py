"""Stores at URLs: in memory, and on an S3 server of this machine."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
import torch
from torch.utils.data import TensorDataset

from flowdata import LossScorer, Scores
from flowdata.cli import main
from flowdata.errors import ScoreMismatchError, StoreError
from flowdata.store import lock as locks
from flowdata.store.folder import locked
from flowdata.store.kept import keep
from flowdata.store.lock import lock
from flowdata.store.parts import PartWriter
from flowdata.store.places import (
    beginning_of,
    files_in,
    names_in,
    place_of,
    remove_folder,
    write_whole,
)
from flowdata.store.remote import RemotePath
from flowdata.store.verify import verify_store
from tests.forks import bits
from tests.test_lock import quick
from tests.test_store import MANIFEST, found, pack

__all__ = ["quick"]  # the fixture
GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(40, 4, generator=GENERATOR), torch.arange(40) % 3)
with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = torch.nn.Linear(4, 3)


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket on an S3 server; its address and keys are in the environment."""
    reason = "a local S3 server takes s3fs, moto and flask: pip install -e '.[test]'"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def gs():
    """The URL of a bucket on an emulator of Google's storage; its address is in the environment."""
    reason = "an emulator of Google's storage takes gcsfs and gcp-storage-emulator (pip install)"
    pytest.importorskip("gcsfs", reason=reason)
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    for name in ("gcsfs", "google.auth"):  # they ask for what is not emulated
        logging.getLogger(name).setLevel(logging.ERROR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://bucket"
        fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    """The URL of a bucket of each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["memory", "s3", "gs"])
def url(request):
    """A URL at which nothing is."""
    root = "memory:/" if request.param == "memory" else request.getfixturevalue(request.param)
    yield f"{root}/some/scores"
    remove_folder(place_of(f"{root}/some"))


@pytest.fixture
def memory():
    yield "memory://some/scores"
    remove_folder(place_of("memory://some"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the finished store of `score()`."""
    folder = tmp_path_factory.mktemp("finished")
    score(folder)
    return folder


def copy(folder, url):
    """Put the files of a store in a folder at a URL."""
    for file in files_in(folder):
        write_whole(place_of(url) / file.name, file.read_bytes())


def score(store=None, **options):
    scorer = LossScorer(MODEL, dtype="float32", batch_size=4, progress=False)
    return scorer.score(DATA, store=store, **options), scorer.explain()


# --- a store is the same wherever it lies --------------------------------------------------------


def test_a_store_at_a_url_has_the_files_and_bits_of_one_in_a_folder(url, finished):
    first, _ = score(url)
    again, explanation = score(url)
    assert explanation == f"losses of 40 samples found in {url}"
    assert bits(first) == bits(again) == bits(Scores.load(url)) == bits(Scores.load(finished))
    assert names_in(place_of(url)) == names_in(finished) == ["manifest.json", "scores.safetensors"]
    for file in files_in(place_of(url)):
        assert file.read_bytes() == (finished / file.name).read_bytes()
    assert set(verify_store(place_of(url)).values()) == {"whole"}
    with pytest.raises(ScoreMismatchError, match=f"the store {url} was made with another model"):
        LossScorer(torch.nn.Linear(4, 3), progress=False).score(DATA, store=url)


def test_scores_are_saved_to_a_url_and_loaded_from_it(url, finished):
    scores = Scores.load(finished)
    for place in (url, f"{url}/alone.safetensors"):
        assert str(scores.save(place)) == place
        assert bits(Scores.load(place)) == bits(scores)
        with pytest.raises(FileNotFoundError, match=f"there is no store at {url}/else"):
            Scores.load(f"{url}/else")
    other = Scores(torch.ones(3), metadata={"identity": {"dataset": "other"}})
    with pytest.raises(ScoreMismatchError, match=f"{url} holds the scores of another data set"):
        other.save(url)


DAMAGES = {
    "flipped": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "cut": lambda content: content[:-100],
    "empty": lambda content: b"",
    "foreign": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_is_noticed_and_repaired(memory, damage, finished, caplog):
    url, expected = memory, Scores.load(finished)
    copy(finished, url)
    file = place_of(url) / "scores.safetensors"
    file.write(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(StoreError, match=f"{url}/scores.safetensors"):
        Scores.load(url)
    states = verify_store(place_of(url))
    assert (states["scores.safetensors"] == "whole", states["manifest.json"]) == (False, "whole")
    assert bits(score(url)[0]) == bits(expected)
    assert f"of 10 packs of {url}/scores.safetensors are whole" in caplog.text
    assert set(verify_store(place_of(url)).values()) == {"whole"}


def test_a_lost_manifest_is_written_again(url, finished):
    copy(finished, url)
    manifest = place_of(url) / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    score(url)
    assert manifest.read_bytes() == content


def test_a_damaged_part_costs_its_packs_alone(memory, caplog):
    folder = place_of(memory)
    for index in (0, 1):
        with PartWriter(folder, MANIFEST) as writer:
            writer.add(index, pack(index), {})
    whole, damaged = files_in(folder / "parts")
    damaged.write(damaged.read_bytes()[:-4])
    write_whole(folder / "parts" / ".draft.safetensors", b"")
    assert len(found(folder)) == 1
    assert f"{damaged} is damaged" in caplog.text
    assert str(whole) not in caplog.text


def test_a_folder_of_other_things_is_refused(memory):
    write_whole(place_of(memory) / "thesis.tex", b"\\section{One}")
    with pytest.raises(StoreError, match=r"is not a flowdata store: .* holds thesis\.tex"):
        score(memory)
    with pytest.raises(StoreError, match=r"thesis\.tex is a file; a store is a folder"):
        score(f"{memory}/thesis.tex")


def test_what_is_kept_once_may_lie_at_a_url(memory):
    def make():
        return {"features": torch.ones(3)}

    file = f"{memory}/features.safetensors"
    keep(file, {"body": "a"}, make)
    assert keep(file, {"body": "a"}, lambda: 1 / 0)["features"].tolist() == [1, 1, 1]
    with pytest.raises(ScoreMismatchError, match=f"the file {file} was made with another body"):
        keep(file, {"body": "b"}, make)
    with pytest.raises(ValueError, match="store must name a file"):
        keep(memory, {"body": "a"}, make)


def test_the_command_line_takes_urls(memory, finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(finished, memory)
    assert main(["verify", memory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]
    for command in (
        ["report", memory],
        ["report", memory, "--output", "s3://bucket/page"],
        ["weigh", memory, "--output", "s3://bucket/weighted.jsonl"],
    ):
        assert main(command) == 2
        assert "--output must be a path on a disk, got the URL" in capsys.readouterr().err
    with pytest.raises(ValueError, match="path must be a path on a disk"):
        Scores.load(memory).plot("s3://bucket/losses.png")
    assert list(tmp_path.iterdir()) == []  # no folder that is called "s3:"


# --- the lock ------------------------------------------------------------------------------------


def test_one_of_many_has_the_lock_at_a_time(s3):
    inside, most = [], []

    def work():
        with lock(place_of(f"{s3}/.lock"), "scoring"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert names_in(place_of(s3)) == []


def test_an_object_is_created_once(url):
    place = place_of(url) / "x"
    assert [place.create(b"first"), place.create(b"second")] == [True, False]
    assert place.read_bytes() == b"first"
    assert beginning_of(place, 2) == b"fi"


def test_s3_itself_refuses_the_second_of_two_that_create(s3, monkeypatch):
    """Both looked before either put. The emulator of Google's storage knows no such writes."""
    place = place_of(s3) / "twice"
    looks = iter([False, False, True])
    monkeypatch.setattr(RemotePath, "exists", lambda self: next(looks))
    assert [place.create(b"first"), place.create(b"second")] == [True, False]
    assert place.read_bytes() == b"first"
    place.unlink()


def test_a_lock_at_a_url_is_stale_once_nobody_renews_it(memory, quick):
    path = place_of(memory) / ".lock"
    holder = json.dumps({"host": "elsewhere", "pid": 1, "born": "5", "id": "a"}).encode()
    path.write(holder)
    stop = threading.Event()
    beats = threading.Thread(target=locks._beat, args=(path, holder, stop))
    beats.start()
    threading.Timer(1.2, stop.set).start()
    start = time.monotonic()
    with lock(path, "scoring"):
        assert time.monotonic() - start >= 1.2
        locks._break(path, holder)  # of somebody who looked before: this one is fresh
        assert path.exists()
    assert not path.exists()
    beats.join()


def test_a_lock_that_another_took_is_not_renewed(memory, quick):
    path = place_of(memory) / ".lock"
    with lock(path, "scoring"):
        path.write(b"another's")
        time.sleep(0.3)  # three beats
    assert path.read_bytes() == b"another's"


# --- URLs that can't be used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("sftp://host/scores", "sftp:// is not known to put files whole"),
        ("https://host/scores", r"store must be a path, or a URL that begins with s3://"),
        ("simplecache::s3://bucket/scores", "is not known to put files whole"),
        ("s3://", "names no bucket; pass a URL such as s3://bucket/scores"),
        ("memory:///", "names no bucket"),
        (Path("s3://bucket/scores"), "was a URL and lost a slash, as in every Path; pass URLs as"),
        (Path("file:///scores"), "file:/scores was a URL and lost a slash"),
        ("file://scores", "file:// needs an absolute path, file:///…, got 'file://scores'"),
        ("file://scores/run", "file:// needs an absolute path"),
        ("file://", "file:// needs an absolute path"),
    ],
)
def test_a_url_that_is_no_place_is_refused(store, message):
    for use in (score, Scores.load, Scores(torch.ones(2)).save):
        with pytest.raises(ValueError, match=message):
            use(store)


def test_paths_stay_paths(tmp_path):
    assert place_of("a:b/c") == Path("a:b/c")
    assert place_of(f"file://{tmp_path}/my%20scores") == tmp_path / "my scores"
    assert place_of(f"file://localhost{tmp_path}/a") == tmp_path / "a"
    assert place_of(Path("scores")) == Path("scores")


@pytest.mark.parametrize("name", ["run#1", "run?x=2", "run;3", "100%", "a//b"])
def test_a_file_url_names_its_path_to_the_last_letter(tmp_path, name):
    assert place_of(f"file://{tmp_path}/{name}") == tmp_path / name
    assert place_of(f"file://{tmp_path}/{quote(name)}") == tmp_path / name


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    loaded = sys.modules["fsspec.registry"]._registry  # by earlier tests
    monkeypatch.delitem(loaded, "gs", raising=False)
    with pytest.raises(ImportError, match=r'gs:// needs .*pip install "flowdata-torch\[gs\]"'):
        place_of("gs://bucket/scores")


def test_a_repository_of_the_hub_takes_no_parts():
    message = r"is a repository of the Hub: .* Score into hf://buckets/OWNER/NAME"
    with pytest.raises(StoreError, match=message), locked(place_of("hf://datasets/me/scores")):
        pass


def test_a_bucket_that_is_not_there_is_named(s3):
    for use in (score, Scores(torch.ones(2)).save):
        with pytest.raises(FileNotFoundError, match=r"s3://none/s/.* its bucket is not there"):
            use("s3://none/s")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": None}, PermissionError, "no keys were found. Set AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ConnectionError, "Check the address and the"),
    ],
)
def test_keys_and_addresses_that_are_wrong_are_named(s3, monkeypatch, changes, error, message):
    system = fsspec.get_filesystem_class("s3")
    system.clear_instance_cache()
    monkeypatch.setattr(system, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(error, match=rf"s3://bucket/\S+ could not be .*{message}"):
        Scores.load("s3://bucket/scores")
    system.clear_instance_cache()


# --- a job ---------------------------------------------------------------------------------------


def test_a_job_that_is_killed_goes_on_in_two_processes_without_a_shared_folder(bucket, tmp_path):
    """The first process is killed by SIGKILL once it has put a part; two others share the rest."""
    store = f"{bucket}/job"
    command = [sys.executable, "-m", "tests.remote_job", store, str(tmp_path / "local")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["end"] == -9
    assert "taking over the lock" in done.stderr
    expected = result["alone"]["bits"]
    assert [rank["bits"] for rank in result["together"]] == [expected, expected]
    assert bits(Scores.load(store)) == bits(Scores.load(tmp_path / "local")) == expected
    total = result["alone"]["lacking"][1]
    for rank in result["together"]:
        lacking, packs = rank["lacking"]
        assert 0 < lacking < packs == total
    assert names_in(place_of(store)) == ["manifest.json", "scores.safetensors"]
