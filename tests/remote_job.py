"""A job in a store at a URL: killed, then gone on with by two ranks that share no folder.

`python -m tests.remote_job URL FOLDER` prints what came of it, and the bits of a store in a folder.
"""

import json
import os
import signal
import sys
import tempfile

import fsspec
import torch
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.scoring import resume
from flowdata.store import parts
from flowdata.store.places import files_in, place_of
from tests.forks import bits, in_ranks, start

GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = TensorDataset(torch.randn(60, 5, generator=GENERATOR), torch.arange(60) % 3)
MODEL = torch.nn.Linear(5, 3)


class Deadly:
    """Samples whose reader is killed once a part of its work lies in the store."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, index):
        if names_of_parts(self.store):
            os.kill(os.getpid(), signal.SIGKILL)
        return SAMPLES[index]


def names_of_parts(store):
    return [file.name for file in files_in(place_of(store) / parts.PARTS)]


def score(samples, store):
    scorer = LossScorer(MODEL, "cross_entropy", batch_size=4, progress=False)
    return scorer.score(samples, store=store, dataset_id="samples")


def begun(rank, store):
    score(Deadly(store), store)


def scored(rank, store):
    """What one rank scores, in a folder of its own, and how many packs were there before."""
    os.chdir(tempfile.mkdtemp())
    lacking = []
    run_packs = resume.run_packs

    def counted(job, plan, todo, *arguments):
        lacking.extend([len(todo), len(plan)])
        return run_packs(job, plan, todo, *arguments)

    resume.run_packs = counted
    return {"bits": bits(score(SAMPLES, store)), "lacking": lacking}


def main(url, folder):
    parts._SECONDS = parts._SHARE = 0.0  # a part for every pack
    # Imported before the forks: each of them would import it.
    fsspec.get_filesystem_class(url.partition(":")[0])
    [pid], _ = start(1, begun, url)
    end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    together = in_ranks(2, scored, url)
    [alone] = in_ranks(1, scored, folder)
    print(json.dumps({"end": end, "together": together, "alone": alone}))


if __name__ == "__main__":
    main(*sys.argv[1:])
