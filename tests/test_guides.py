"""The guides and notebooks: their code runs, their links lead somewhere, no public name lacks."""

import ast
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import flowdata
from examples.site import formats, in_a_clone
from examples.site.command_line import on_page_markdown
from flowdata import study
from flowdata.cli import main
from flowdata.cli.commands import COMMANDS
from flowdata.cli.parser import make_parser
from flowdata.cli.shell.wording import actions_of

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GUIDES = sorted((EXAMPLES / "guides").glob("*.md"))
PAGES = [*sorted((EXAMPLES / "guides").rglob("*.md")), EXAMPLES / "notebooks" / "README.md"]
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
RUN = ("score", "verify")  # of the commands in guides; the others are parsed alone
REFERENCE = EXAMPLES / "guides" / "reference"
# Rooms of whose names users call none: other rooms hand out what they make, or it is a command.
PUBLIC_ROOMS = ("drift", "probe", "companions", "report", "text", "study")


def blocks(page):
    """A page's code, in order: (language, code)."""
    return re.findall(r"^```(python|sh)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(code):
    """The flowdata commands of a shell block, as lists of words."""
    lines = [line.partition("-m flowdata ")[2] or line for line in code.splitlines()]
    return [
        shlex.split(line.removeprefix("flowdata "))
        for line, original in zip(lines, code.splitlines(), strict=True)
        if "flowdata " in original and not original.startswith(("pip", "python3 -m venv"))
    ]


def needs_trl(code):
    """Whether a block imports TRL, which takes longer than all the rest and has its own tests."""
    return re.search(r"^from trl|integrations\.trl", code, re.MULTILINE) is not None


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guides_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for language, code in blocks(page):
        if language == "sh":
            for words in commands(code):
                make_parser().parse_args(words)
                if words[0] in RUN and "MODEL" not in words:
                    assert main([*words, "--quiet"]) == 0
        elif needs_trl(code):
            ast.parse(code)
        else:
            exec(compile(code, str(page), "exec"), names)
    assert_the_model_before_competes(names)
    if page.stem == "vision":
        assert "\nchosen probe alone\n" in capsys.readouterr().out  # as the guide says
        assert_weights_find_wrong_labels(names)


def assert_weights_find_wrong_labels(names):
    """The hardest samples are wrong labels; weighted runs learn and keep more than plain ones."""
    assert names["is_wrong"][names["hardest"][:100]].all()
    runs = {name: (accuracy, drift.kept) for name, accuracy, drift in names["runs"]}
    rates = [name.removeprefix("FLOW ") for name in runs if name.startswith("FLOW ")]
    pairs = [(*runs[f"FLOW {rate}"], *runs[f"plain {rate}"]) for rate in rates]
    assert all(learned > by_plain for learned, _, by_plain, _ in pairs)
    assert all(kept > by_plain for _, kept, _, by_plain in pairs[1:])  # at the larger rates


def assert_the_model_before_competes(names):
    """Where runs are chosen among, one of them has forgotten nothing."""
    if "runs" in names:
        assert names["runs"][0][2].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_holds_no_output(path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    assert [cell["execution_count"] for cell in cells] == [None] * len(cells)
    names = {"__name__": "notebook"}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
    assert_the_model_before_competes(names)
    printed = capsys.readouterr().out
    assert f"chosen: {names['best']}" in printed
    assert names["best"] in names["models"]
    table = [line for line in printed.splitlines() if ", rate " in line and "chosen:" not in line]
    assert len(table) == 7  # six fine-tunings, and the model without one
    assert sum(line.endswith("<- chosen") for line in table) == 1


def test_the_guide_on_files_has_the_names_that_the_reader_knows():
    page = formats.GUIDE.read_text("utf-8")
    assert page == formats.with_table(page)
    assert "| prompt and reply | `prompt` with `completion`," in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        assert target.is_file(), link
        if anchor:
            content = target.read_text()
            titles = re.findall(r"^#+ (.*)$", content, re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in [*anchors, *re.findall(r"^::: (\S+)$", content, re.MULTILINE)], link


def documented():
    """The names that the reference has an entry for."""
    text = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def test_the_reference_has_every_public_name_once():
    entries = documented()
    assert sorted(entries) == sorted(set(entries))
    last = {entry.rsplit(".", 1)[-1] for entry in entries}
    public = {*flowdata.__all__, *study.__all__}
    for room in PUBLIC_ROOMS:
        public |= set(pkgutil.resolve_name(f"flowdata.{room}").__all__)
    assert sorted(public - last) == []


def test_every_entry_of_the_reference_exists_and_says_what_it_is():
    pytest.importorskip("lightning")
    for entry in documented():
        if not entry.startswith("flowdata.integrations.trl"):
            thing = pkgutil.resolve_name(entry)
            assert thing.__doc__ or entry.endswith((".METHODS", ".STANDARD", ".Part")), entry


def test_every_guide_and_page_of_the_reference_is_on_the_first_page_and_in_the_menu():
    folder = EXAMPLES / "guides"
    first_page = (folder / "README.md").read_text()
    menu = (EXAMPLES / "site" / "mkdocs.yml").read_text()
    for page in folder.rglob("*.md"):
        name = page.relative_to(folder).as_posix()
        assert f"- {name}\n" in menu
        assert name == "README.md" or f"]({name})" in first_page


def test_the_page_of_the_command_line_has_every_option_of_every_command():
    page = on_page_markdown((REFERENCE / "command_line.md").read_text())
    of_all = page.partition("## Every command\n")[2]
    for name in COMMANDS:
        section = page.partition(f"## flowdata {name}\n")[2].partition("\n## ")[0] + of_all
        for action in actions_of(make_parser(), name):
            for word in action.option_strings or [action.dest.upper()]:
                assert re.search(f"`{word}[ `]", section), (name, word)
    assert "- `--store STORE`  \n  folder or URL for the losses (default: scores)\n" in page
    assert "- `--valid DATA` (required)  \n  validation data" in page


def test_every_page_of_the_reference_says_how_to_read_it_in_a_clone():
    names = []
    for page in REFERENCE.glob("*.md"):
        first = page.read_text().split("\n\n")[1]
        if page.stem == "command_line":
            assert "`flowdata score --help`" in first
        else:
            names.append(re.search(r"`python -m pydoc (\S+)`", first)[1])
            assert f"\n::: {names[-1]}\n" in page.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "pydoc", *names], capture_output=True, text=True, check=True
    )
    for name in names:
        docstring = pkgutil.resolve_name(name).__doc__
        assert docstring.splitlines()[0] in done.stdout


def test_the_site_leaves_out_how_to_read_the_reference_in_a_clone():
    for page in REFERENCE.glob("*.md"):
        title, first, *others = page.read_text().split("\n\n")
        assert first.startswith("In a clone ")
        place = SimpleNamespace(file=SimpleNamespace(src_uri=f"reference/{page.name}"))
        text = in_a_clone.on_page_markdown(page.read_text(), page=place)
        assert text.split("\n\n") == [title, *others]
    guide = SimpleNamespace(file=SimpleNamespace(src_uri="README.md"))
    said = "How?\n\nIn a clone of it:\n\npip"
    assert in_a_clone.on_page_markdown(said, page=guide) == said


def test_pictures_of_guides_are_small():
    sizes = {path.name: path.stat().st_size for path in (EXAMPLES / "guides").rglob("*.png")}
    assert len(sizes) > 1
    assert {name: size for name, size in sizes.items() if size > 100_000} == {}
