"""What goes wrong while scoring, and how it goes on from there."""

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import flowdata.scoring.run as scoring_run
from flowdata import FlowWeightedDataset, LossScorer, ScoreMismatchError, Scores
from flowdata.cli import main
from flowdata.errors import SampleError
from tests.models import tiny_llama, token_samples
from tests.test_text import tokenizer

__all__ = ["tokenizer"]  # the fixture
ROOT = Path(__file__).parent.parent


def quiet(model, loss="auto", **options):
    return LossScorer(model, loss, dtype="float32", progress=False, **options)


def numbers(count=40):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


class Broken(Dataset):
    """Raises on some samples, and stops the program at one."""

    def __init__(self, samples, bad, last=None):
        self.samples, self.bad, self.last = samples, bad, last

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == self.last:
            raise KeyboardInterrupt
        if index in self.bad:
            raise OSError(f"no file {index}.png")
        return self.samples[index]


# --- samples that can't be read ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"dataset_id": "d"}])
def test_a_sample_that_raises_is_named(options, workers):
    data = Broken(numbers(), {17})
    with pytest.raises(SampleError, match=r"dataset\[17\] raised OSError: no file 17.png"):
        quiet(nn.Linear(4, 3)).score(data, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", [{0}, {17, 30}, set(range(8)), {0, 39}])
def test_samples_that_raise_can_be_skipped(tmp_path, bad, workers):
    model, samples = tiny_llama(), token_samples(40)
    scorer = quiet(model, token_losses=True, max_tokens=120)
    expected = scorer.score(samples)
    data = Broken(samples, bad)
    scores = scorer.score(data, on_error="skip", store=tmp_path, num_workers=workers)
    missing = scores.losses.isnan()
    assert missing.nonzero().flatten().tolist() == sorted(bad)
    assert scores.counts[missing].eq(0).all()
    assert (scores.losses - expected.losses)[~missing].abs().max() < 1e-4
    assert scores.counts[~missing].equal(expected.counts[~missing])
    last = max(set(range(40)) - bad)
    assert (scores.token_losses(last) - expected.token_losses(last)).abs().max() < 1e-3
    reasons = {str(index): f"OSError: no file {index}.png" for index in bad}
    assert Scores.load(tmp_path).metadata["skipped"] == reasons
    assert (
        scorer.score(data, on_error="skip", store=tmp_path)
        .losses[~missing]
        .equal(scores.losses[~missing])
    )
    weighted = FlowWeightedDataset(data, scores, missing="zero")  # the same data set, still
    assert weighted[last][1] > 0


def test_a_whole_pack_can_be_skipped(tmp_path):
    bad = set(range(4, 12))
    for folder in (None, tmp_path):
        scores = quiet(nn.Linear(4, 3), batch_size=4).score(
            Broken(numbers(), bad), on_error="skip", store=folder
        )
        assert scores.losses.isnan().sum() == 8


@pytest.mark.parametrize("last", [None, 31])
def test_skipped_samples_of_a_store_are_refused_where_none_is_to_be_skipped(tmp_path, last, caplog):
    """Both of a finished store and of a begun one, and whether they can be read by now or not."""
    scorer = quiet(nn.Linear(4, 3), "cross_entropy", batch_size=4)
    options = {"store": tmp_path, "dataset_id": "d"}
    data = Broken(numbers(), {17, 20})
    if last is None:
        scorer.score(data, on_error="skip", **options)
        assert "2 of 40 samples have no loss: 0 without a target, 0 with" in caplog.text
        assert "2 that can't be read; the first is sample 17" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            scorer.score(Broken(numbers(), {17, 20}, last), on_error="skip", **options)
    for bad in ({17, 20}, set()):
        with pytest.raises(
            SampleError,
            match=r"keeps 2 of 40 samples without a loss.*dataset\[17\] first: OSError: no file 17"
            r".*pass on_error='skip'",
        ):
            scorer.score(Broken(numbers(), bad), **options)
    scores = scorer.score(data, on_error="skip", **options)
    assert scores.losses.isnan().nonzero().flatten().tolist() == [17, 20]


def test_a_call_that_a_begun_store_refuses_does_not_wait_for_it(tmp_path, monkeypatch):
    def wait(folder):
        raise TimeoutError

    model, options = nn.Linear(4, 3), {"store": tmp_path, "dataset_id": "d"}
    with pytest.raises(KeyboardInterrupt):
        quiet(model, "cross_entropy", batch_size=4).score(Broken(numbers(), (), 31), **options)
    monkeypatch.setattr("flowdata.scoring.resume.locked", wait)
    with pytest.raises(ScoreMismatchError, match="was made with another model"):
        quiet(nn.Linear(4, 3), "cross_entropy").score(numbers(), **options)
    with pytest.raises(TimeoutError):
        quiet(model, "cross_entropy").score(numbers(), **options)


def test_nothing_but_unreadable_samples_is_an_error():
    data = Broken(numbers(), set(range(40)))
    with pytest.raises(SampleError, match="none of the data set's 40 samples can be read"):
        quiet(nn.Linear(4, 3)).score(data, on_error="skip")
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        quiet(nn.Linear(4, 3)).score(data, on_error="ignore")


# --- disks and processes -------------------------------------------------------------------------


@contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond `size` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path, monkeypatch):
    data, scorer = numbers(4000), quiet(nn.Linear(4, 3), batch_size=200)
    expected = scorer.score(data)
    monkeypatch.setattr("flowdata.store.parts._SECONDS", 0.0)
    monkeypatch.setattr("flowdata.store.parts._SHARE", 0.0)  # a part for each pack
    with file_size_limit(20_000), pytest.raises(OSError, match=r"File too large: .*scores"):
        scorer.score(data, store=tmp_path)  # parts are small; the final file is not
    assert len(list(tmp_path.glob("parts/*"))) == 20
    assert not list(tmp_path.glob("**/.*"))  # nothing half written, no lock
    scores = scorer.score(data, store=tmp_path)
    assert torch.equal(scores.losses, expected.losses)


def test_the_first_error_is_not_masked_by_a_full_disk(tmp_path, caplog):
    packs = []

    def fails(model, batch):
        packs.extend([1] * (len(batch[0]) == 2))
        if len(packs) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
            raise RuntimeError("the first error")
        return model(batch[0]).sum(1)

    with file_size_limit(100_000), pytest.raises(RuntimeError, match="the first error"):
        quiet(nn.Linear(4, 3), fails, batch_size=2).score(numbers(), store=tmp_path)
    assert "the last 4 packs could not be kept: [Errno 27] File too large" in caplog.text


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_full_while_scoring_keeps_what_is_written(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("root here can't mount a disk")
    monkeypatch.setattr("flowdata.store.parts._SECONDS", 0.0)
    monkeypatch.setattr("flowdata.store.parts._SHARE", 0.0)  # a part for each pack
    data, scorer = numbers(8000), quiet(nn.Linear(4, 3), batch_size=400)
    try:
        with pytest.raises(OSError, match=r"No space left on device: .*safetensors"):
            scorer.score(data, store=tmp_path / "store")
        assert len(list(tmp_path.glob("store/parts/*"))) > 3
        subprocess.run(["mount", "-o", "remount,size=4m", tmp_path], check=True)
        expected = scorer.score(data).losses
        assert torch.equal(scorer.score(data, store=tmp_path / "store").losses, expected)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@contextmanager
def read_only(folder):
    """Even for root, who may write whatever the permissions say."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    for command in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"root here can't make a folder read-only: {done.stderr}")
    yield
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_can_not_be_written_to(tmp_path):
    model = nn.Linear(4, 3)
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    begun.mkdir()
    expected = quiet(model).score(numbers(), store=finished)
    with read_only(begun), pytest.raises(OSError, match=r"Permission denied|Read-only file system"):
        quiet(model).score(numbers(), store=begun)
    with read_only(finished):
        assert torch.equal(quiet(model).score(numbers(), store=finished).losses, expected.losses)


def test_a_collate_function_that_workers_can_not_be_sent():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(ValueError, match=r"can't be sent to .* workers .*num_workers=0"):
            quiet(nn.Linear(4, 3)).score(
                numbers(),
                num_workers=1,
                collate_fn=lambda batch: torch.utils.data.default_collate(batch),
            )
    finally:
        multiprocessing.set_start_method(before, force=True)


# --- torchrun --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def score_command(tmp_path_factory, tokenizer):
    """`flowdata score` of a tiny model and a data set that takes it a while."""
    folder = tmp_path_factory.mktemp("job")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"question": f"{n}+1=" * 9, "answer": "x" * (n % 97 + 1)} for n in range(1200)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["-m", "flowdata", "score", folder / "model", data, "--dtype", "float32"]


@contextmanager
def one_thread():
    """As in the processes of torchrun: a sum over several threads may have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def children(pid):
    """Processes that `pid` has started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def wait_for(happened, seconds=240):  # a busy machine takes its time
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_torchrun_restarts_after_a_killed_rank_and_one_process_has_the_same_bits(
    score_command, tmp_path
):
    """A rank is killed while it scores; torchrun ends the other and starts both anew."""
    arguments = [*score_command, "--max-tokens", "128", "--quiet"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE}
    job = subprocess.Popen(
        [sys.executable, *torchrun, *arguments, "--store", tmp_path / "two", "--json"],
        stderr=subprocess.PIPE,
        **options,
    )
    wait_for(lambda: (tmp_path / "two" / "manifest.json").exists())
    time.sleep(0.3)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    wait_for(lambda: list(tmp_path.glob("two/parts/*")))  # of the rank that was told to end
    out, err = job.communicate(timeout=180)
    assert job.returncode == 0, err
    assert json.loads(out)["samples"] == 1200
    with one_thread():  # this process has imported all already
        assert main([*map(str, arguments[2:]), "--store", str(tmp_path / "one")]) == 0
    first, second = (Scores.load(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(first.losses, second.losses)
    for scores in (first, second):  # two ranks check twice as many samples before the run
        assert scores.metadata.pop("checked")["largest_difference"] < 1e-3
    assert first.metadata == second.metadata


IMPATIENT = """
import sys
from flowdata.cli import main
from flowdata.scoring import signs_of_life

signs_of_life._SILENT = 6.0
sys.exit(main())
"""


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_a_node_that_vanishes_is_noticed_and_the_other_goes_on_alone(score_command, tmp_path):
    """Two launchers stand for two nodes; one of them and its rank are killed while they score."""
    script = tmp_path / "score.py"
    script.write_text(IMPATIENT)
    arguments = [*score_command[3:], "--max-tokens", "64", "--quiet", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--rdzv-id=nodes"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29517", "--max-restarts=3"]
    command = [*torchrun, script, "score", *arguments, "--store", tmp_path / "two"]
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE}
    node = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    time.sleep(3)  # the first one is where they meet
    other = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    wait_for(
        lambda: len(list(tmp_path.glob("two/parts/*"))) or (tmp_path / "two" / ".lock").exists()
    )
    time.sleep(0.3)
    for process in (other.pid, *children(other.pid)):
        os.kill(process, signal.SIGKILL)
    out, err = node.communicate(timeout=240)
    assert node.returncode == 0, err
    assert "has shown no sign of life" in err
    assert json.loads(out.splitlines()[-1])["samples"] == 1200
    one = [sys.executable, "-m", "flowdata", "score", *arguments, "--store", tmp_path / "one"]
    subprocess.run(one, check=True, **options)
    first, second = (Scores.load(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(first.losses, second.losses)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_store_that_goes_on(score_command, tmp_path, number, code):
    arguments = [sys.executable, *score_command, "--max-tokens", "128", "--store", tmp_path / "s"]
    job = subprocess.Popen(
        arguments,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control lets what it starts in the background ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_for(lambda: (tmp_path / "s" / "manifest.json").exists())
    time.sleep(0.5)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    assert "of 1,200 samples kept in" in err
    assert "the same call goes on from there" in err
    assert list(tmp_path.glob("s/parts/*.safetensors"))
    assert not (tmp_path / "s" / ".lock").exists()


# --- options of a call that goes on ------------------------------------------------------------


def stop_before(monkeypatch, pack):
    """Let the next run stop before a pack, the first being 0."""
    run = scoring_run._start_packs

    def stopped(*arguments):
        for number, started in enumerate(run(*arguments)):
            if number == pack:
                raise MemoryError
            yield started

    monkeypatch.setattr(scoring_run, "_start_packs", stopped)


@pytest.mark.parametrize(("first", "then"), [({}, {"max_tokens": 100}), ({"batch_size": 9}, {})])
def test_a_call_that_kept_nothing_may_go_on_with_other_options(first, then, monkeypatch, tmp_path):
    samples, model = token_samples(12), tiny_llama()
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 0)
        with pytest.raises(MemoryError):
            quiet(model, **first).score(samples, store=tmp_path)
    plan = quiet(model, **then).score(samples, store=tmp_path).metadata["plan"]
    asked = {"max_tokens": 4096, "batch_size": None} | then
    assert {name: plan[name] for name in asked} == asked


def test_a_call_that_stops_says_what_the_same_call_does_and_what_is_there(tmp_path, caplog):
    caplog.set_level("INFO", logger="flowdata")
    tokens, images = (token_samples(12), tiny_llama()), (numbers(12), nn.Linear(4, 3))
    for name, (samples, model), options in (
        ("max_tokens", tokens, {}),
        ("batch_size", images, {"batch_size": 9}),
    ):
        store = tmp_path / name
        for pack, told in (
            (0, f"begins again, and with a smaller {name}=N keeps something sooner"),
            (1, "goes on from there"),
        ):
            caplog.clear()
            with pytest.MonkeyPatch.context() as patch:
                stop_before(patch, pack)
                options = {"max_tokens": 100} if name == "max_tokens" and pack else options
                with pytest.raises(MemoryError):
                    LossScorer(model, **options).score(samples, store=store)
            (stopped,) = [line for line in caplog.messages if line.startswith("stopped with")]
            assert stopped.startswith("stopped with 0 of 12 samples kept") == (pack == 0)
            assert stopped.endswith(f"; the same call {told}")
            assert "already" not in caplog.text
        kept = int(re.search("with (.*) of 12", stopped)[1])
        caplog.clear()
        LossScorer(model, **options).score(samples, store=store)
        said = [line for line in caplog.messages if "already" in line]
        assert said == [f"{kept} of 12 samples {'is' if kept == 1 else 'are'} there already"]
        caplog.clear()
        LossScorer(model, **options).score(samples, store=store)
        assert "already" not in caplog.text


def test_the_command_names_its_flag_where_nothing_is_kept(
    capsys, score_command, monkeypatch, tmp_path
):
    stop_before(monkeypatch, 0)
    with pytest.raises(MemoryError):
        main([*map(str, score_command[2:]), "--store", str(tmp_path)])
    assert "with a smaller --max-tokens N keeps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_tokens": 90}, "max_tokens=90 has no effect on a store that was begun with .*=100"),
        ({"batch_size": 2}, "batch_size=2 has no effect on a store that was begun with .*=None"),
        ({"compile": True}, "compile=True has no effect on a store that was begun with .*=False"),
    ],
)
def test_packs_that_are_kept_refuse_other_options(option, message, monkeypatch, tmp_path):
    samples, model = token_samples(12), tiny_llama()
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 1)
        with pytest.raises(MemoryError):
            quiet(model, max_tokens=100).score(samples, store=tmp_path)
    with pytest.raises(ScoreMismatchError, match=message):
        quiet(model, **option).score(samples, store=tmp_path)
    scores = quiet(model).score(samples, store=tmp_path)
    assert scores.metadata["plan"]["max_tokens"] == 100


def test_notes_are_those_of_the_last_call(tmp_path):
    samples, model = numbers(), nn.Linear(4, 3)
    for note in ("first", "second"):
        scores = quiet(model).score(samples, store=tmp_path, details={"note": note})
        assert scores.metadata["details"] == {"note": note}
        assert Scores.load(tmp_path).metadata["details"] == {"note": note}
    assert quiet(model).score(samples, store=tmp_path).metadata["details"] == {"note": "second"}


def test_notes_stay_what_they_are_where_nothing_can_be_written(tmp_path, monkeypatch):
    samples, model = numbers(), nn.Linear(4, 3)
    quiet(model).score(samples, store=tmp_path, details={"note": "first"})

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("flowdata.store.folder.write_file", refused)
    scores = quiet(model).score(samples, store=tmp_path, details={"note": "second"})
    assert scores.metadata["details"] == {"note": "second"}
    assert Scores.load(tmp_path).metadata["details"] == {"note": "first"}
