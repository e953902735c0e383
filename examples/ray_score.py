"""Score on a Ray cluster: every worker makes the same call, and they share the work.

    pip install "ray[train]"                           # on all nodes, beside flowdata-torch
    python examples/ray_score.py MODEL DATA --store s3://bucket/scores --workers 8 [--gpu]

The store is a URL, or a folder that all nodes share, as MODEL and DATA are unless they are hub ids.
Ray Train makes a process group of the workers, in which `LossScorer.score` finds the others. When
a worker or a node is lost, Ray begins again with as many workers as there is room for, at most
`--workers`; what was scored is in the store, so that they go on from there, to the same bits.

On several nodes Ray Train keeps its own notes (no losses) where `--notes` says, which all of them
reach.
"""

from __future__ import annotations

import argparse
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from flowdata import LossScorer
from flowdata.text import load_model, load_tokenizer, read_rows, tokenize_rows


def score(options: dict[str, Any]) -> None:
    """Score as one of Ray's workers. Yours: any model and any map-style data set will do."""
    tokenizer = load_tokenizer(options["model"])
    rows = read_rows(options["data"], streaming=True)
    samples = tokenize_rows(rows, tokenizer, template=tokenizer.chat_template is not None)
    scorer = LossScorer(load_model(options["model"]), "causal_lm", device=get_device())
    scorer.score(samples, store=options["store"], dataset_id=samples.identity())


def main(argv: list[str] | None = None) -> None:
    """Score by Ray's workers, and return once the store is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub id, or a folder that all nodes have")
    parser.add_argument("data", help="hub id, or a file or folder that all nodes have")
    parser.add_argument("--store", required=True, help="URL, or a folder that all nodes share")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    parser.add_argument("--retries", type=int, default=10, help="how many losses to survive")
    parser.add_argument("--notes", help="folder or URL for Ray's own notes")
    options = parser.parse_args(argv)
    trainer = TorchTrainer(
        score,
        train_loop_config=vars(options),
        scaling_config=ScalingConfig(num_workers=(1, options.workers), use_gpu=options.gpu),
        run_config=RunConfig(
            storage_path=options.notes, failure_config=FailureConfig(max_failures=options.retries)
        ),
    )
    trainer.fit()
    print(f"all samples scored into {options.store}; next: flowdata verify {options.store}")


if __name__ == "__main__":
    main()
