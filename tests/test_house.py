"""The house: its rooms, the arrows between them, and their sizes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flowdata"

# From the ground up; a file imports from its own layer and from those below.
LAYERS = [
    {"errors", "_version", "_common"},
    {"weights"},
    {"models"},
    {"targets"},
    {"head"},
    {"store"},
    {"report"},
    {"scores"},
    {"scoring"},
    {
        *("dataset", "sampler", "streaming", "collator", "losses", "token_weights"),
        *("accumulation", "views", "companions", "probe", "text", "study", "drift"),
    },
    {"integrations", "cli", "__main__"},
]
TYPING_ALONE = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
IMPORT_BY_NAME = ("import_module", "importlib.import_module", "__import__")
MOST_FLAT_FILES, MOST_LINES, MOST_BODY_LINES = 20, 350, 50


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root):
    """The syntax tree of every file of the package below `root`, by module name."""
    files = sorted((root / "flowdata").rglob("*.py"))
    return {module_name(path, root): ast.parse(path.read_text()) for path in files}


def imports_of(tree):
    """Every import at any depth, as (module, name or None); those for typing alone left out."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in TYPING_ALONE:
        return [found for branch in tree.orelse for found in imports_of(branch)]
    if isinstance(tree, ast.Import):
        return [(alias.name, None) for alias in tree.names]
    if isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports are absolute"
        return [(tree.module, alias.name) for alias in tree.names]
    if isinstance(tree, ast.Call) and ast.unparse(tree.func) in IMPORT_BY_NAME:
        return [(name.value, None) for name in tree.args[:1] if isinstance(name, ast.Constant)]
    return [found for child in ast.iter_child_nodes(tree) for found in imports_of(child)]


def import_graph(root=ROOT):
    """Which modules of the package each one imports, at module level and inside functions."""
    modules = read_modules(root)
    graph = {name: set() for name in modules}
    for importer, tree in modules.items():
        for module, name in imports_of(tree):
            if module.split(".")[0] == "flowdata":
                submodule = f"{module}.{name}"
                graph[importer].add(submodule if submodule in modules else module)
    return graph


def circles(graph):
    """The strongly connected parts of more than one module (Tarjan, 1972)."""
    numbers, lowest, stack, parts = {}, {}, [], []

    def visit(module):
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for imported in sorted(graph.get(module, ())):
            if imported not in numbers:
                visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], numbers[imported])
        if lowest[module] == numbers[module]:
            part = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(part) > 1:
                parts.append(sorted(part))

    for module in graph:
        if module not in numbers:
            visit(module)
    return parts


def layer(module):
    """A module's layer; the package itself, which hands all names on, is above them all."""
    _, _, path = module.partition(".")
    room = path.split(".")[0]
    if not room:
        return len(LAYERS)
    matches = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    assert matches, f"{module} belongs to no layer: add its room to LAYERS and to CONTRIBUTING.md"
    return matches[0]


def test_no_two_files_import_each_other():
    assert circles(import_graph()) == []


def test_arrows_only_go_down():
    upward = [
        f"{importer} -> {imported}"
        for importer, imports in import_graph().items()
        for imported in sorted(imports)
        if layer(imported) > layer(importer)
    ]
    assert upward == []


def test_no_file_takes_anothers_private_name():
    borrowed = [
        f"{importer}: {module}.{name}"
        for importer, tree in read_modules(ROOT).items()
        for module, name in imports_of(tree)
        if module.startswith("flowdata") and name and name.startswith("_")
        if name not in ("__version__", "_common")
    ]
    assert borrowed == []


def test_no_file_reaches_for_anothers_private_name():
    reached = []
    for importer, tree in read_modules(ROOT).items():
        rooms = [name or module for module, name in imports_of(tree) if "flowdata" in module]
        reached += [
            f"{importer}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            if node.attr.startswith("_") and not node.attr.startswith("__")
            if ast.unparse(node.value) in rooms
        ]
    assert reached == []


def test_every_room_has_a_layer_and_a_place_in_the_plan():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__init__", "__pycache__"}
    assert set().union(*LAYERS) == rooms
    plan = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    assert [room for room in rooms - {"__main__", "_version"} if room not in plan] == []


def test_the_graph_sees_circles_and_imports_inside_functions(tmp_path):
    rooms = tmp_path / "flowdata"
    rooms.mkdir()
    (rooms / "__init__.py").write_text("")
    (rooms / "scores.py").write_text("def load():\n    from flowdata.store import read\n")
    (rooms / "store.py").write_text(
        "from typing import TYPE_CHECKING\nimport flowdata.errors\n"
        "if TYPE_CHECKING:\n    from flowdata.weights import flow_weights\n"
        "else:\n    from flowdata import scores\n"
        "if not TYPE_CHECKING:\n    import flowdata.dataset\n"
        "import importlib\nimportlib.import_module('flowdata.sampler')\n"
    )
    (rooms / "errors.py").write_text("")
    (rooms / "weights.py").write_text("")
    graph = import_graph(tmp_path)
    assert graph["flowdata.store"] == {
        *("flowdata.errors", "flowdata.scores", "flowdata.dataset", "flowdata.sampler")
    }
    assert circles(graph) == [["flowdata.scores", "flowdata.store"]]


def test_few_files_lie_flat():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FLAT_FILES


def python_files():
    return sorted(
        path
        for folder in ("flowdata", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    )


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
    assert {str(p): n for p, n in lengths.items() if n > MOST_LINES} == {}


def body_lines(function):
    """The lines from a function's first statement after its docstring to its last."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def test_no_function_is_too_long():
    too_long = {
        f"{path.relative_to(ROOT)}: {node.name}": body_lines(node)
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if body_lines(node) > MOST_BODY_LINES
    }
    assert too_long == {}


def calls(tree):
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_user_is_told_through_one_logger():
    channels = {"warnings.warn", "warn", "logging.getLogger", "getLogger"}
    modules = read_modules(ROOT)
    tellers = {module for module, tree in modules.items() if channels.intersection(calls(tree))}
    assert tellers == {"flowdata._common.notices"}
    printers = {module for module, tree in modules.items() if "print" in calls(tree)}
    assert {name for name in printers if not name.startswith("flowdata.cli.")} == {
        *("flowdata._common.notices", "flowdata._common.progress")
    }


def test_the_mark_of_no_target_has_a_name():
    literal = ast.dump(ast.UnaryOp(ast.USub(), ast.Constant(100)))
    modules = {
        module
        for module, tree in read_modules(ROOT).items()
        if any(ast.dump(node) == literal for node in ast.walk(tree))
    }
    assert modules == {"flowdata.targets.labels"}


@pytest.mark.parametrize("folder", ["benchmarks", "flowdata"])
def test_neither_imports_an_example(folder):
    importers = [
        str(path)
        for path in (ROOT / folder).rglob("*.py")
        for module, _ in imports_of(ast.parse(path.read_text()))
        if module.split(".")[0] == "examples"
    ]
    assert importers == []
