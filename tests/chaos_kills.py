"""Kill ranks at random moments until a store is finished, again and again.

`python -m tests.chaos_kills KILLS SEED` prints what it saw. It ends with an error if a loss is not,
to the last bit, that of one undisturbed process, or if a pack is run that was kept, or run twice.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import flowdata.store.parts
from flowdata import LossScorer, Scores
from flowdata.scoring import resume
from flowdata.scoring.collate import pad_collate
from flowdata.store.format import read_file
from tests.forks import bits, finish, start
from tests.models import tiny_llama, token_samples

SAMPLES = token_samples(160)
MODEL = tiny_llama()
LONGEST = 1.0  # seconds before a kill
run_packs = resume.run_packs


def slowly(samples):
    time.sleep(0.015)
    return pad_collate(samples)


def score(rank, store, log=None, workers=0):
    def run_and_log_packs(*args):
        for pack in run_packs(*args):
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{pack[0]}\n")
            yield pack

    resume.run_packs = run_and_log_packs
    scorer = LossScorer(MODEL, "causal_lm", max_tokens=100, token_losses=True, progress=False)
    return bits(scorer.score(SAMPLES, collate_fn=slowly, store=store, num_workers=workers))


def kept_packs(folder):
    parts = sorted(folder.glob("parts/[!.]*"))
    return {pack for part in parts for pack in read_file(part)[0]["pack"].tolist()}


def attempt(folder, log, draw, seen, kills):
    """Run ranks on a store, and kill some after a while unless there were kills enough."""
    size, workers = draw.choice([1, 2, 3, 4]), draw.choice([0, 0, 2])
    kept = kept_packs(folder)
    seen["ranks"].append(size)
    seen["resumed"] += len(kept) > 0
    log.write_text("")
    pids, answers = start(size, score, folder, log, workers)
    if seen["kills"] == kills:
        finish(pids, answers)
    else:
        time.sleep(draw.uniform(0, LONGEST))
        victims = pids if draw.random() < 0.3 else [draw.choice(pids)]
        ended = {pid for pid in pids if os.waitpid(pid, os.WNOHANG) != (0, 0)}
        for pid in set(victims) - ended:
            os.kill(pid, signal.SIGKILL)
            seen["kills"] += 1
        for pid in set(pids) - set(victims) - ended:  # as torchrun ends the others
            os.kill(pid, draw.choice([signal.SIGTERM, signal.SIGKILL]))
        for pid in set(pids) - ended:
            os.waitpid(pid, 0)
    packs = [int(line) for line in log.read_text().split()]
    assert kept.isdisjoint(packs), "a pack that was kept was run again"
    assert len(set(packs)) == len(packs), "a pack was run twice"
    seen["packs run"] += len(packs)


def main(kills, seed):
    torch.set_num_threads(1)  # no thread may be alive when ranks are forked
    flowdata.store.parts._SECONDS = 0.05
    draw, expected = random.Random(seed), score(0, None)
    seen = {"kills": 0, "stores": 0, "resumed": 0, "packs run": 0, "ranks": []}
    while seen["kills"] < kills or seen["stores"] == 0:
        with tempfile.TemporaryDirectory() as name:
            folder, log = Path(name) / "s", Path(name) / "log"
            while not (folder / "scores.safetensors").exists():
                attempt(folder, log, draw, seen, kills)
            assert bits(Scores.load(folder)) == expected
            assert score(0, folder) == expected
            seen["stores"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
