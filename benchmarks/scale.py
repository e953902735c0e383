"""Scoring beyond one process: python -m benchmarks scale [--samples N] [--rows N].

The benchmark measures

- 1, 2 and 4 processes of one thread each, against a speed that grows with their number;
- the cost of coordination for each pack;
- plan and store at many samples;
- what storing losses safely (identities, checksums, files) adds to scoring a language model.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flowdata
from benchmarks import rows
from benchmarks.scoring import cases
from flowdata.cli.bench_inputs import guesses_expected
from flowdata.scoring import resume
from flowdata.scoring import scorer as scorer_module
from flowdata.scoring.plan.packs import plan_padded
from flowdata.scoring.ranks import Ranks
from flowdata.store.fingerprint import fingerprint_model
from flowdata.store.folder import finish
from flowdata.store.format import make_manifest
from flowdata.store.packs import split
from flowdata.store.parts import PartWriter
from flowdata.store.repair import read_finished_packs

Row = dict[str, Any]


def main(argv: list[str]) -> None:
    """Measure everything and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000, help="of plan and store")
    parser.add_argument("--rows", type=int, default=300, help="of GSM8K, scored by a model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a causal language model; random Llama layers without")
    options = parser.parse_args(argv)
    results = [
        *coordination(options.repeats),
        *plan_and_store(options.samples),
        *overhead(options.model, options.rows),
        *processes(options.repeats),
    ]
    print(rows.write("scale", results, " ".join(["python -m benchmarks scale", *argv])))


def printed_row(what: str, values: list[float], unit: str, **more: Any) -> Row:
    """Return a row after printing it."""
    one = rows.row(what, values, unit, **more)
    extras = "  ".join(f"{name} {value:.4g}" for name, value in more.items())
    print(f"{what:58}{one['median']:12,.4g} {unit:14}{extras}", flush=True)
    return one


def coordination(repeats: int, packs: int = 2000) -> list[Row]:
    """Return rows of the microseconds in which a rank claims one pack, over TCP on this machine."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = []
    for ahead in (False, True):
        seconds = []
        for repeat in range(repeats):
            store = dist.PrefixStore(f"{ahead} {repeat}", server)
            ranks = Ranks(store, 0, 2)
            start = time.perf_counter()
            claims = ranks.claims(range(packs), ahead=ahead)
            for pack in claims:
                claims.begins(pack)
            seconds.append((time.perf_counter() - start) / packs * 1e6)
        workers = "with" if ahead else "without"
        results.append(
            printed_row(f"claim of a pack, {workers} DataLoader workers", seconds, "us/pack")
        )
    return results


def plan_and_store(most: int) -> list[Row]:
    """Return rows of the plan and the store, at 1/100, 1/10 and all of `most` samples."""
    sizes = sorted({max(most // 100, 1000), max(most // 10, 1000), most})
    return [one for samples in sizes for one in _plan_and_store(samples)]


def _plan_and_store(samples: int) -> list[Row]:
    generator, results = torch.Generator().manual_seed(0), list[Row]()
    lengths = torch.randint(20, 400, (samples,), generator=generator)
    loss, count = torch.rand(samples, generator=generator), torch.ones(samples).long()
    step = stopwatch(results, samples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = step("plan", lambda: plan_padded(lengths, max_tokens=16384))
        digest = step("digest of the plan", lambda: plan.digest)
        manifest = make_manifest({"samples": samples}, {"digest": digest}, {})
        packs = split({"loss": loss[plan.order], "count": count[plan.order]}, plan.sizes)

        def write() -> None:
            with PartWriter(folder, manifest) as writer:
                for number, columns in enumerate(packs):
                    writer.add(number, columns, {})

        step("parts written", write)
        read = partial(read_finished_packs, folder, manifest, plan.order, plan.sizes)
        step("parts read", lambda: list(read()))
        scores = flowdata.Scores(loss, count, metadata=manifest)
        tensors, manifest = scores.to_tensors(), scores.manifest()
        step("scores written", lambda: finish(folder, tensors, manifest, plan.order, plan.sizes))
        step("scores read", lambda: flowdata.Scores.load(folder))
        size = sum(file.stat().st_size for file in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        *results,
        printed_row(f"store, {samples:,} samples", [size / samples], "bytes/sample"),
        printed_row(f"peak memory up to {samples:,} samples", [peak], "MiB"),
    ]


def stopwatch(results: list[Row], samples: int) -> Callable[[str, Callable[[], Any]], Any]:
    """Return a function that runs a step, adds the row of its seconds, and returns its result."""

    def step(what: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        per_sample = seconds / samples * 1e9
        results.append(
            printed_row(f"{what}, {samples:,} samples", [seconds], "s", ns_each=per_sample)
        )
        return result

    return step


def overhead(model_path: str | None, count: int) -> list[Row]:
    """Return rows of the share of scoring a language model that storing the losses takes."""
    case = cases.Case(width=None if model_path else 576, layers=30)
    model, samples = cases.make(case, count, model_path or "")
    scorer = flowdata.LossScorer(model, "causal_lm", progress=False)
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, timing(parts), guesses_expected():
        start = time.perf_counter()
        scorer.score(samples, store=folder)
        total = time.perf_counter() - start
    results = [printed_row(f"scoring {len(samples)} samples into a store", [total], "s")]
    for name, seconds in parts.items():
        results.append(printed_row(f"  {name}", [seconds], "s", percent=100 * seconds / total))
    share = 100 * sum(parts.values()) / total
    results.append(printed_row("keeping losses safely, of scoring", [share], "%"))
    alone = rows.timed(lambda: fingerprint_model(model), repeats=3)
    results.append(printed_row("fingerprint of the model, alone", alone, "s"))
    return results


STORING_STEPS = (
    (scorer_module, "fingerprint_model", "fingerprint of the model"),
    (scorer_module, "content_identity", "fingerprint of the data"),
    (resume, "read_finished_packs", "reading parts"),
    (resume, "finish", "checksums and final files"),
    (PartWriter, "add", "writing parts while scoring"),
    (PartWriter, "__exit__", "writing the last part"),
)


@contextmanager
def timing(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of those parts of `LossScorer.score` that only store losses safely."""
    originals = [getattr(owner, name) for owner, name, _ in STORING_STEPS]
    for (owner, name, what), original in zip(STORING_STEPS, originals, strict=True):
        setattr(owner, name, _timed(original, what, seconds))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(STORING_STEPS, originals, strict=True):
            setattr(owner, name, original)


def _timed(original: Callable[..., Any], what: str, seconds: dict[str, float]) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start

    return run


def processes(repeats: int, samples: int = 240) -> list[Row]:
    """Return rows of the samples a second of 1, 2 and 4 processes, whose losses must agree."""
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: []}
    losses: list[torch.Tensor] = []
    for _ in range(repeats):
        for size, times in seconds.items():
            with tempfile.TemporaryDirectory() as name:
                times.append(_run_ranks(size, samples, Path(name)))
                losses.append(flowdata.Scores.load(Path(name) / "store").losses)
                if not torch.equal(losses[0], losses[-1]):
                    raise SystemExit(f"{size} processes give other losses: nothing reported")
    results = []
    one, cores = min(seconds[1]), os.cpu_count() or 1
    for size, times in seconds.items():
        ideal = one / min(size, cores)
        speed = [samples / value for value in times]
        efficiency = ideal / min(times)
        results.append(
            printed_row(f"{size} processes of one thread", speed, "samples/s", of_ideal=efficiency)
        )
    return results


def _run_ranks(size: int, samples: int, folder: Path) -> float:
    """The seconds of scoring without imports and model, as rank 0 measures them."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone"]
    command = [sys.executable, *launch, "-m", "benchmarks.scale", str(samples), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return float((folder / "seconds").read_text())


def score_as_rank(samples: int, folder: Path) -> None:
    """Score as one of the processes that `_run_ranks` starts; rank 0 writes its seconds."""
    dist.init_process_group("gloo")
    model, data = cases.make(cases.Case(layers=2), samples, "")
    scorer = flowdata.LossScorer(
        model, "causal_lm", dtype="float32", max_tokens=1024, progress=False
    )
    with guesses_expected():
        scorer.score(data[:8])  # warm
        dist.barrier()
        start = time.perf_counter()
        scorer.score(data, store=folder / "store", dataset_id="benchmark")
    if dist.get_rank() == 0:
        (folder / "seconds").write_text(str(time.perf_counter() - start))
    dist.destroy_process_group()


if __name__ == "__main__":
    score_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
