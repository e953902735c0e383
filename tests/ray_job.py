"""A job of examples/ray_score.py on a Ray of this machine, one of whose workers is killed.

`python -m tests.ray_job MODEL DATA FOLDER` scores into FOLDER/scores.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from examples import ray_score
from flowdata.scoring import resume
from flowdata.store import parts


def score_until_killed(options):
    """The example's `score`; the first worker that has written a part is killed by SIGKILL.

    Another one stops once it has written a part, or it would score all the rest before Ray ends it.
    Files beside the store note how many workers there were then, and how many packs were lacking
    when the work began for the last time.
    """
    folder = Path(options["store"]).parent
    is_first_attempt = not (folder / "killed").exists()
    add, run_packs = parts.PartWriter.add, resume.run_packs
    parts._SECONDS = parts._SHARE = 0.0  # a part for every pack

    def add_and_die(self, *pack):
        add(self, *pack)
        if is_first_attempt:
            with suppress(FileExistsError), (folder / "killed").open("x") as file:
                file.write(str(dist.get_world_size()))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)

    def counted(job, plan, todo, *arguments):
        (folder / "lacking").write_text(json.dumps([len(todo), len(plan)]))
        return run_packs(job, plan, todo, *arguments)

    parts.PartWriter.add, resume.run_packs = add_and_die, counted
    ray_score.score(options)  # a worker imports the example anew, where this is its own


def main(model, data, folder):
    ray_score.score = score_until_killed
    ray_score.main([model, data, "--store", f"{folder}/scores", "--notes", f"{folder}/notes"])


if __name__ == "__main__":
    main(*sys.argv[1:])
