"""The studies of language that ask when weights help.

    python -m benchmarks forgetting evidence-language --model SmolLM2-135M-Instruct.Q4_1.gguf

    noise    the words of every third answer shuffled: weights, trimming, and the clean rows alone
    rules    weights from the current model's losses, judged by answers and drift

What is run, and what was predicted, stands in registered_evidence.md, which was written first.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from benchmarks.forgetting.evidence import EVIDENCE
from benchmarks.forgetting.images import ASSETS
from benchmarks.forgetting.language import ALL, CLEAN_ROWS, Language, Sizes
from flowdata.study import STANDARD, grids, run_study

RATE = 1e-4
PRE_TRAINED, TRIMMED = "pre-trained", "trimmed, 33%"
NO_HARNESS = {"wikitext": 0, "piqa": 0}
STUDIES = {
    "noise": Sizes("noisy", rows=128, test=256, code=16, prose=0, **NO_HARNESS),
    "rules": Sizes("gsm8k", rows=1000, test=64, code=16, exact_match=100, **NO_HARNESS),
}
METHODS = {
    "noise": (PRE_TRAINED, STANDARD, "FLOW", "standard, smaller steps", TRIMMED, CLEAN_ROWS),
    "rules": (PRE_TRAINED, STANDARD, "FLOW", "TALR", "DFT", "EAFT", "ASFT"),
}
SEEDS = {"noise": range(8), "rules": range(2)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the evidence in language."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="holds language/")
    parser.add_argument("--model", required=True, help="SmolLM2's GGUF file; any causal model")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: eight of noise, two of rules"
    )
    parser.add_argument("--results", type=Path, default=EVIDENCE)


def study(options: argparse.Namespace) -> None:
    """Run what the results files lack."""
    for name in options.studies:
        sizes = STUDIES[name]
        task = Language(options.model, options.assets, sizes, options.results / "scores")
        target = f"{Path(options.model).stem} on {sizes.data}"
        run_study(
            options.results / f"forgetting_language_{name}.jsonl",
            {"study": "language", "target": target, **asdict(sizes)},
            task.run,
            methods=grids(METHODS[name], (RATE,), ALL),
            seeds=SEEDS[name] if options.seeds is None else options.seeds,
        )
