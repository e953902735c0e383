"""The package as a whole: what an import costs and brings, and what the README promises."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowdata
from flowdata.cli.commands import COMMANDS
from flowdata.cli.parser import make_parser

ROOT = Path(__file__).parent.parent


def seconds_to_import(name):
    """Of a processor, which don't depend on what else runs."""
    code = (
        "import time; start = time.process_time(); "
        f"import {name}; print(time.process_time() - start)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )


def test_the_package_describes_itself_in_the_same_words_everywhere():
    written = {
        name: (ROOT / name).read_text("utf-8")
        for name in ("pyproject.toml", "CITATION.cff", "examples/site/mkdocs.yml")
    }
    said = re.search(r'^description = "(.*)"$', written["pyproject.toml"], re.M)[1]
    assert f'\ntitle: "flowdata: {said[0].lower()}{said[1:]}"\n' in written["CITATION.cff"]
    assert f"\nsite_description: {said}\n" in written["examples/site/mkdocs.yml"]
    assert make_parser().description == f"{said}."


def test_importing_takes_little_more_than_importing_torch():
    pairs = [(seconds_to_import("torch"), seconds_to_import("flowdata")) for _ in range(2)]
    torch_alone, with_flowdata = (min(column) for column in zip(*pairs, strict=True))
    assert with_flowdata < 1.5 * torch_alone, pairs


def test_importing_brings_no_framework():
    heavy = ["transformers", "datasets", "matplotlib", "peft", "trl", "lightning", "pyarrow"]
    heavy += ["sklearn", "scipy", "accelerate", "triton"]
    code = f"import sys, flowdata, flowdata.study; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_modules_that_texts_name_are_there_after_the_import_and_not_loaded_by_it():
    texts = [
        ROOT / "README.md",
        *(ROOT / "examples").rglob("*.md"),
        *ROOT.rglob("flowdata/**/*.py"),
    ]
    rooms = {path.stem for path in (ROOT / "flowdata").iterdir() if not path.stem.startswith("_")}
    written = "\n".join(path.read_text("utf-8") for path in texts)
    named = {
        name for name in re.findall(r"\bflowdata\.(\w+)\.\w", written) if name in rooms - {"cli"}
    }
    assert {"views", "study", "text", "drift"} <= named
    code = (
        "import sys, flowdata; "
        "print([n for n in ('study', 'text', 'views') if f'flowdata.{n}' in sys.modules]); "
        f"print([n for n in {sorted(named)} if n not in dir(flowdata) or not getattr(flowdata, n)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
    with pytest.raises(AttributeError, match="module 'flowdata' has no attribute 'vews'"):
        flowdata.vews  # noqa: B018


def test_every_public_name_is_there_and_documented():
    for name in flowdata.__all__:
        assert getattr(flowdata, name).__doc__


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("losses", ["causal_lm_loss", "fused_causal_lm_loss", "weighted_mean"]),
        ("views", ["score_views"]),
        ("companions", ["ParameterAnchor", "sweep_wise_ft", "wise_ft"]),
        ("integrations.transformers", ["FlowTrainer", "FlowTrainerMixin"]),
        ("integrations.trl", ["FlowSFTTrainer"]),
        ("integrations.lightning", ["FlowDataModule", "FlowGuard"]),
    ],
)
def test_modules_that_users_import_by_path_keep_their_names(module, names):
    if module == "integrations.trl":
        pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")
    room = importlib.import_module(f"flowdata.{module}")
    assert [name for name in names if not getattr(room, name).__doc__] == []


@pytest.mark.parametrize(
    ("command", "printed"),
    [("flowdata", "score,report"), ("benchmarks", "forgetting, gpu, head, loader")],
)
def test_both_command_lines_list_their_commands(command, printed):
    arguments = ["--help"] if command == "flowdata" else []
    done = subprocess.run(
        [sys.executable, "-m", command, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert all(name in done.stdout + done.stderr for name in printed.split(","))


@pytest.mark.parametrize(
    ("missing", "command", "extra", "package"),
    [
        ("transformers", ["score", "model", "data"], "transformers", "transformers"),
        ("transformers", ["bench"], "transformers", "transformers"),
        ("sklearn", ["demo"], "demo", "scikit-learn"),
        ("matplotlib", ["demo"], "plotting", "matplotlib"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(missing, command, extra, package):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from flowdata.cli import main; "
        f"sys.exit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    # Installed in place, the command names the folder with the extra; else what the extra has.
    command_line = rf"-m pip install .*(\[{extra}\]|'{package}\W)"
    assert re.search(command_line, done.stderr), done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_pages_name_only_files_and_commands_that_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    scripts = [
        f"{name.replace('.', '/')}.py" for name in re.findall(r"-m examples\.([\w.]+)", text)
    ]
    assert [script for script in scripts if not (ROOT / "examples" / script).exists()] == []
    commands = set(re.findall(r"^flowdata (\w+)|-m flowdata (\w+)|`flowdata (\w+)`", text, re.M))
    assert {name for names in commands for name in names if name} <= set(COMMANDS)


def test_every_dotted_name_in_pages_and_docstrings_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "flowdata").rglob("*.py")]
    pages += (ROOT / "examples").glob("*.py")
    names = {
        name
        for page in pages
        for name in re.findall(r"(?<![\w./@-])flowdata(?:\.\w+)+", page.read_text())
        if not name.endswith((".py", ".md"))
    }
    assert len(names) > 50
    missing = [name for name in sorted(names) if not is_there(name)]
    assert missing == []


def is_there(name):
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        pkgutil.resolve_name(name)
    except AttributeError:
        return False
    except ImportError as error:  # of an extra's package that isn't here, or of the name itself
        return not (error.name or "flowdata").startswith("flowdata")
    return True


def test_doctests_of_the_package():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--doctest-modules",
            "flowdata",
            "--ignore=flowdata/head/triton.py",  # needs Triton, has no examples
            *("-p", "no:cacheprovider", "-n", "0"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def repository_texts():
    """Every file that may tell somebody what to install, by its path."""
    folders = ("flowdata", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.iterdir(), *(ROOT / ".ci").glob("*"), *(ROOT / ".github").rglob("*")]
    kinds = ("", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff")
    return {
        path: path.read_text(errors="replace")
        for path in files
        if path.is_file() and path.suffix in kinds
    }


def packages_to_install(line):
    """The names of what a line's `pip install` commands install."""
    commands = re.findall(r"pip install ([^;&|`]*)", line)
    words = [word.strip("\"'().,") for command in commands for word in command.split()]
    return [re.split(r"[\\[=<>~!]", word)[0] for word in words]


def test_nobody_is_told_to_install_somebody_elses_flowdata():
    assert packages_to_install("run pip install 'flowdata[demo]'; flowdata demo") == ["flowdata"]
    assert packages_to_install('`pip install -q "flowdata-torch[demo]"` flowdata') == [
        "-q",
        "flowdata-torch",
    ]
    extras = re.compile(r"\bflowdata\[")  # of a requirement: a module takes no brackets
    this_file = Path(__file__)
    for path, text in repository_texts().items():
        if path != this_file:
            assert "flowdata" not in [
                name for line in text.splitlines() for name in packages_to_install(line)
            ]
            assert not extras.search(text), path


def test_the_distribution_and_its_extras_have_one_name():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^name = "(.*)"$', project, re.MULTILINE).group(1) == "flowdata-torch"
    assert len(re.findall(r'"flowdata-torch\[', project)) == len(
        re.findall(r'"flowdata.*?\[', project)
    )


def test_the_version_is_the_same_wherever_it_stands():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == flowdata.__version__
