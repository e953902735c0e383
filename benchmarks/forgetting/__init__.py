"""How much each method forgets, and at what price: FLOW beside the methods of the field.

    python -m benchmarks forgetting vision [--quick]     # ResNet-20: new images against CIFAR-10
    python -m benchmarks forgetting language [--quick]   # SmolLM2-135M: GSM8K against the rest
    python -m benchmarks forgetting evidence             # vision: when do weights help?
    python -m benchmarks forgetting evidence-language    # the same of language
    python -m benchmarks forgetting theory               # the closed forms, drawn
    python -m benchmarks forgetting table                # the pages and pictures of what was run

A study that was stopped goes on where it was. Each of the paper's full-size runs is one command:
see `folders` (ImageNet ResNets on folders of images) and `metamath` (Gemma 2, Llama 3.2).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.rows import RESULTS

QUICK_RESULTS = Path("runs/forgetting")  # not in the repository


def main(argv: list[str] | None = None) -> None:
    """Run a study, or write the pages and pictures of the results files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks forgetting", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("vision", "language"):
        module = importlib.import_module(f"benchmarks.forgetting.{name}")
        command = commands.add_parser(name)
        _add_study_options(command)
        module.add_options(command)
        command.set_defaults(module=module)
    for name in ("evidence", "evidence_language"):
        module = importlib.import_module(f"benchmarks.forgetting.{name}")
        command = commands.add_parser(name.replace("_", "-"))
        module.add_options(command)
        command.set_defaults(study=module.study)
    table = commands.add_parser("table")
    theory = commands.add_parser("theory")
    for command in (table, theory):
        command.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.command in ("vision", "language"):
        _study(options)
    elif options.command.startswith("evidence"):
        options.study(options)
        _tables(options.results)
    elif options.command == "theory":
        from benchmarks.forgetting.theory_picture import draw

        print(draw(options.results / "forgetting_theory.png"))
    else:
        _tables(options.results)


def _study(options: argparse.Namespace) -> None:
    options.results = options.results or (QUICK_RESULTS if options.quick else RESULTS)
    default = "quick" if options.quick else "main"
    options.methods = _method_names(options.methods or [default], options.module)
    options.module.study(options)
    _tables(options.results)


def _method_names(words: list[str], module: ModuleType) -> list[str]:
    """The methods that words stand for: each word is a method's name or a group's."""
    main, extra = list(module.MAIN), list(module.EXTRA)
    groups = {"main": main, "extra": extra, "all": main + extra}
    groups["quick"] = list(module.QUICK_METHODS)
    names = [name for word in words for name in groups.get(word, [word])]
    if unknown := sorted(set(names) - set(main + extra)):
        sys.exit(f"no method {unknown[0]!r}; there are {', '.join(main + extra)}")
    return names


def _tables(results: Path) -> None:
    from benchmarks.forgetting.pages.publish import publish

    files = publish(results)
    if not files:
        sys.exit(
            f"{results} holds no runs (forgetting_*.jsonl): run a study first, or see --results"
        )
    print(*files, sep="\n")


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few minutes: tiny sizes, one rate")
    parser.add_argument("--methods", nargs="+", help="names, or: main (default), extra, all")
    parser.add_argument("--rates", nargs="+", type=float, help="the grid of learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, help="which; by default 0, 1, 2, …")
    parser.add_argument("--results", type=Path, help="folder of the results files")
