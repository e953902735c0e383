"""What compiled code says: its content, the names it reads, and the names it fills.

A file and its line numbers stay out of it, and so does a docstring, so that code may be moved and
laid out anew. The bytecode depends on the version of Python.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Set
from typing import Any

# Packages that are known by their names alone, as Python's own are: a release of theirs, which
# changes code everywhere, is no reason to throw losses away.
_PACKAGES = (
    *(
        "flowdata",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "numpy",
        "datasets",
        "safetensors",
    ),
    *("tokenizers", "torchvision", "torchaudio", "torchao", "bitsandbytes", "timm", "open_clip"),
    *("sentence_transformers", "diffusers", "lightning", "lightning_fabric", "pytorch_lightning"),
    *("lightning_utilities", "torchmetrics", "trl", "scipy", "sklearn", "pandas", "pyarrow", "PIL"),
    *("einops", "triton", "wandb", "tqdm", "pytest", "_pytest", "huggingface_hub", "jinja2"),
)
_LIBRARIES = (set(_PACKAGES) | sys.stdlib_module_names) - {"__main__"}
# Methods that change the list, dictionary or set they are called on.
_MUTATORS = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "add", "discard"),
    *("update", "setdefault", "appendleft", "move_to_end", "sort", "reverse"),
}
_HAS_DOCSTRING = 0x4000000  # the flag of code objects since Python 3.13
# Of the other flags some tell where code stands, and of `from __future__` in its file.
_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR
_FLAGS |= inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ENTRIES = ("forward", "__call__", "__getitem__")  # the methods by which an object is called
_METHOD_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_NO_STEPS = ("CACHE", "NOP", "EXTENDED_ARG")
_SWAPS, _COPIES = ("SWAP", "ROT_TWO", "ROT_THREE"), ("COPY", "DUP_TOP", "DUP_TOP_TWO")


def is_of_library(module_name: str | None) -> bool:
    """Return whether a module of this name belongs to Python or to a package known by name."""
    return module_name is not None and module_name.partition(".")[0] in _LIBRARIES


def home_of(function: types.FunctionType) -> str:
    """Return the name of the module in which a function's code was written.

    `functools.wraps` gives a wrapper the `__module__` of what it wraps; its globals stay its own.
    """
    return str(function.__globals__.get("__name__", "__main__"))


def describe_code(code: types.CodeType) -> list[Any]:
    """Return the content of a code object as JSON-like values, the same in every process."""
    constants = list(code.co_consts)
    if constants and _has_docstring(code):
        constants[0] = None
    return [
        code.co_code.hex(),
        getattr(code, "co_exceptiontable", b"").hex(),
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
        code.co_flags & _FLAGS,
        [list(code.co_names), list(code.co_varnames), list(code.co_freevars)],
        [_describe_constant(constant) for constant in constants],
    ]


def _has_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is a docstring, which no instruction reads."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & _HAS_DOCSTRING)
    is_function = not code.co_name.startswith("<") and bool(code.co_flags & inspect.CO_NEWLOCALS)
    return is_function and isinstance(code.co_consts[0], str)


def _describe_constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):  # of a function defined inside this one
        return describe_code(constant)
    if isinstance(constant, tuple):
        return [_describe_constant(part) for part in constant]
    # The order of a frozenset changes from process to process.
    return sorted(map(repr, constant)) if isinstance(constant, Set) else repr(constant)


def code_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_within(constant)


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that a class's attribute runs: its own and those it wraps or captures."""
    queue, known = [value], set()
    while queue:
        part = queue.pop()
        if id(part) in known:
            continue
        known.add(id(part))
        if isinstance(part, property):
            queue += [part.fget, part.fset]
        elif isinstance(part, staticmethod | classmethod | types.MethodType):
            queue.append(part.__func__)
        elif isinstance(part, functools.partial | functools.cached_property):
            queue.append(part.func)
        elif isinstance(part, types.FunctionType):
            yield part
            queue += contents_of(part).values()
        elif hasattr(part, "__wrapped__"):
            queue.append(part.__wrapped__)


def contents_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the values that a function captures, by name; cells that are empty are left out."""
    contents = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            contents[name] = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    return contents


def names_read(function: types.FunctionType) -> set[str]:
    """Return the names of globals and attributes in a function and in those inside it."""
    return {name for code in code_within(function.__code__) for name in code.co_names}


def globals_read(function: types.FunctionType) -> set[str]:
    """Return the names of the globals in a function and in those inside it."""
    return {
        step.argval
        for code in code_within(function.__code__)
        for step in dis.get_instructions(code)
        if step.opname == "LOAD_GLOBAL"
    }


def names_filled(function: types.FunctionType) -> set[str]:
    """Return what a function fills: attributes of `self`, and names of containers that it changes.

        self.cache = x                      cache
        Net.calls += 1                      calls, Net
        self.seen.append(x)                 seen
        self.mean.mul_(x)                   mean
        STORE[key] = x                      STORE
        self.register_buffer("table", x)    table

    These hold what calls have left behind, such as a cache, and no setting.
    """
    return set().union(*map(_names_filled_by, code_within(function.__code__)))


def _names_filled_by(code: types.CodeType) -> set[str]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    first = code.co_varnames[0] if code.co_argcount else "self"
    names: set[str] = set()
    for index, step in enumerate(steps):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            owner = _before_swap(steps, index, "LOAD_ATTR", step.argval, copies=1)
            if _variable(steps, owner) in (None, "self", first):  # no other local variable
                names |= {step.argval} | _chain(steps, owner)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            key = _before_swap(steps, index, "BINARY_", None, copies=2)
            names |= _chain(steps, _expression_start(steps, key) - 1)
        elif step.opname in _METHOD_LOADS and _changes(str(step.argval)):
            names |= _chain(steps, index - 1)
        elif step.argval in ("register_buffer", "setattr"):
            constants = [s for s in steps[index + 1 : index + 3] if s.opname == "LOAD_CONST"]
            names |= {s.argval for s in constants if isinstance(s.argval, str)}
        elif step.opname == "STORE_GLOBAL" or (
            step.opname == "STORE_DEREF" and step.argval in code.co_freevars
        ):
            names.add(step.argval)
    return names


def _changes(method: str) -> bool:
    """Whether a method of this name changes its object; PyTorch ends such names with a line."""
    return method in _MUTATORS or (method.endswith("_") and not method.startswith("_"))


def _before_swap(
    steps: list[dis.Instruction], index: int, kind: str, name: str | None, *, copies: int
) -> int:
    """The index of the last instruction of what a store writes to.

    It stands right before the store; in `self.calls += 1` before the copies that `calls` is read
    by, since the sum is made between them.
    """
    end = index - 1
    if end >= 0 and steps[end].opname in _SWAPS:
        while end >= 0:
            is_read = steps[end].opname.startswith(kind) and name in (None, steps[end].argval)
            if is_read and steps[end - 1].opname in _COPIES:
                return end - 1 - (1 if steps[end - 1].opname == "DUP_TOP_TWO" else copies)
            end -= 1
    return end


def _variable(steps: list[dis.Instruction], index: int) -> Any:
    """The local variable that an instruction loads; the last one where it loads several."""
    value = steps[index].argval if index >= 0 and "FAST" in steps[index].opname else None
    return value[-1] if isinstance(value, tuple) else value


def _chain(steps: list[dis.Instruction], index: int) -> set[str]:
    """The names of `self.a.b`, or of a global or captured name, that an expression ends with."""
    names = set()
    while index >= 0 and steps[index].opname in _METHOD_LOADS:
        names.add(steps[index].argval)
        index -= 1
    if not names and index >= 0 and steps[index].opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
        names.add(steps[index].argval)
    return names


def _expression_start(steps: list[dis.Instruction], end: int) -> int:
    """The index of the first instruction of the expression that ends at `end`."""
    depth = 0
    for index in range(end, -1, -1):
        argument = steps[index].arg if steps[index].opcode >= dis.HAVE_ARGUMENT else None
        depth += dis.stack_effect(steps[index].opcode, argument, jump=False)
        if depth >= 1:
            return index
    return 0


def filled_by_calls(kind: type) -> set[str]:
    """Return the names that a class's `forward`, `__call__` or `__getitem__` fills.

    The methods that these name, and those that these name in turn, belong to them.
    """
    names: set[str] = set()
    queue = list(_ENTRIES)
    known = set(queue)
    while queue:
        name = queue.pop()
        for base in kind.__mro__:
            if base is object or base.__module__ == "torch.nn.modules.module":
                continue
            for function in functions_in(vars(base).get(name)):
                names |= names_filled(function)
                queue += names_read(function) - known
                known |= names_read(function)
    return names


def names_read_by(kind: type) -> set[str]:
    """Return the names that the user's own methods of a class read."""
    return {
        name
        for base in kind.__mro__
        if not is_of_library(base.__module__)
        for attribute, value in vars(base).items()
        if attribute != "__init__"
        for function in functions_in(value)
        for name in names_read(function)
    }
