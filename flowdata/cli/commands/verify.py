"""`flowdata verify`: what in a store is whole and what is not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from flowdata.cli.exit_codes import DAMAGED, DONE
from flowdata.cli.output import print_result
from flowdata.store.format import MANIFEST, manifest_in
from flowdata.store.places import Place, place_of
from flowdata.store.verify import verify_store


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("store", help="folder or URL to check")


def run(options: argparse.Namespace) -> int:
    """Check every file of a store."""
    place = place_of(options.store)
    findings = verify_store(place)
    whole = all(state == "whole" for state in findings.values())
    lines = [f"{name}: {state}" for name, state in findings.items()]
    if not whole:
        lines.append(f"the same {_maker(place, findings)} scores what is damaged or missing")
    print_result(options, {"whole": whole, "files": findings}, "\n".join(lines))
    return DONE if whole else DAMAGED


def _maker(store: Place, findings: Mapping[str, str]) -> str:
    """What a store was made by, in words: the command notes in the manifest which rows it read."""
    command, call = "flowdata score command", "call of LossScorer.score"
    if findings.get(MANIFEST) != "whole":
        return f"{command}, or the same {call},"
    details = manifest_in(store / MANIFEST)["details"]
    return command if isinstance(details.get("data"), Mapping) else call
