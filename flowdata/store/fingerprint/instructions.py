"""What compiled code does: the names it reads and fills, and whether a hook changes its inputs."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Set
from typing import Any

# Methods that change the list, dictionary or set they are called on.
_MUTATORS = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "add", "discard"),
    *("update", "setdefault", "appendleft", "move_to_end", "sort", "reverse"),
}
_METHOD_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_CALLS = ("CALL", "CALL_FUNCTION", "CALL_METHOD", "PRECALL")
_BY_NAME = {"getattr", "setattr", "delattr", "exec", "eval"}  # reach what no instruction names
_ATTRIBUTES, _ITEMS = ("STORE_ATTR", "DELETE_ATTR"), ("STORE_SUBSCR", "DELETE_SUBSCR")
_NO_STEPS = ("CACHE", "NOP", "EXTENDED_ARG")
_SWAPS, _COPIES = ("SWAP", "ROT_TWO", "ROT_THREE"), ("COPY", "DUP_TOP", "DUP_TOP_TWO")


def code_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_within(constant)


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


def attributes_read(function: types.FunctionType) -> set[str]:
    """Return the names of attributes in a function and in those inside it, those in words too.

    ``getattr(options, "scale")`` and ``vars(options)["scale"]`` read one as `options.scale` does.
    """
    names = {part for name in names_read(function) for part in name.split(".")}
    constants = (each for code in code_within(function.__code__) for each in code.co_consts)
    return names | {each for each in constants if isinstance(each, str) and each.isidentifier()}


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
        self.tokenizer.padding_side = x     tokenizer.padding_side
        Net.calls += 1                      Net.calls
        self.seen.append(x)                 seen
        self.seen[key].append(x)            seen
        self.mean.data.mul_(x)              mean
        STORE[key] = x                      STORE
        self.register_buffer("table", x)    table

    These hold what calls have left behind, such as a cache, and no setting; what stands beside
    them in the same object may be one.
    """
    return set().union(*map(_names_filled_by, code_within(function.__code__)))


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]


def _names_filled_by(code: types.CodeType) -> set[str]:
    steps = _steps(code)
    first = code.co_varnames[0] if code.co_argcount else "self"
    names: set[str] = set()
    for index, step in enumerate(steps):
        if step.opname in _ATTRIBUTES:
            owner = _owner(steps, index)
            path = _path(steps, owner, aliases=True)
            if path or _variable(steps, owner) in (None, "self", first):  # no other local variable
                names.add(_joined([*path, step.argval]))
        elif step.opname in _ITEMS:
            names.add(_joined(_path(steps, _owner(steps, index))))
        elif step.opname in _METHOD_LOADS and _changes(str(step.argval)):
            # A tensor's item may be a copy, which `self.table[rows].mul_(x)` changes alone.
            names.add(_joined(_path(steps, index - 1, items=step.argval in _MUTATORS)))
        elif step.argval in ("register_buffer", "setattr"):
            constants = [s for s in steps[index + 1 : index + 3] if s.opname == "LOAD_CONST"]
            names |= {s.argval for s in constants if isinstance(s.argval, str)}
        elif step.opname == "STORE_GLOBAL" or (
            step.opname == "STORE_DEREF" and step.argval in code.co_freevars
        ):
            names.add(step.argval)
    return names - {""}


def below(paths: Set[str], name: object) -> frozenset[str]:
    """Return, of the paths of what is filled, those that begin at a name, from there on.

    Example:
        >>> sorted(below({"cache", "tokenizer.padding_side"}, "tokenizer"))
        ['padding_side']
    """
    start = f"{name}."
    return frozenset(path.removeprefix(start) for path in paths if path.startswith(start))


def _joined(path: list[str]) -> str:
    """A path in one word; a tensor's values are the tensor."""
    return ".".join(path[:-1] if path[1:] and path[-1] == "data" else path)


def _changes(method: str) -> bool:
    """Whether a method of this name changes its object; PyTorch ends such names with a line."""
    return method in _MUTATORS or _is_in_place(method)


def _is_in_place(method: str) -> bool:
    return method.endswith("_") and not method.startswith("__")


def _owner(steps: list[dis.Instruction], index: int) -> int:
    """The index of the last instruction of what a store to an attribute or an item writes to."""
    step = steps[index]
    if step.opname in _ATTRIBUTES:
        return _before_swap(steps, index, "LOAD_ATTR", step.argval, copies=1)
    key = _before_swap(steps, index, "BINARY_", None, copies=2)
    return _expression_start(steps, key) - 1


def _before_swap(
    steps: list[dis.Instruction], index: int, kind: str, name: str | None, *, copies: int
) -> int:
    """The index of the last instruction before a store that makes what it writes to, or its key.

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


def _path(
    steps: list[dis.Instruction], index: int, *, items: bool = True, aliases: bool = False
) -> list[str]:
    """The names a, b of `self.a.b`, or x, a of a global or captured `x.a`, before a store to it.

    There are none where the value comes from elsewhere, such as a call.

    Args:
        steps: the instructions.
        index: of the last one of the expression.
        items: let `self.a[key]` stand for `self.a`.
        aliases: let a local variable stand for what was last assigned to it.
    """
    names: list[str] = []
    while index >= 0:
        step = steps[index]
        if step.opname in _METHOD_LOADS:
            names.insert(0, step.argval)
            index -= 1
        elif items and (step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"):
            names.clear()
            index = _expression_start(steps, index - 1) - 1
        elif step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            names[:0] = [] if step.argval == "self" else [step.argval]
            break
        else:
            index = _assignment(steps, index) if aliases else -1
    return names[1:] if names[:1] == ["__class__"] else names


def _assignment(steps: list[dis.Instruction], index: int) -> int:
    """The index of the last instruction of what the local variable at `index` was given; or -1."""
    variable = _variable(steps, index)
    stores = (i for i in range(index - 1, 0, -1) if steps[i].opname == "STORE_FAST")
    return next((i - 1 for i in stores if variable and steps[i].argval == variable), -1)


def _expression_start(steps: list[dis.Instruction], end: int) -> int:
    """The index of the first instruction of the expression that ends at `end`."""
    depth = 0
    for index in range(end, -1, -1):
        argument = steps[index].arg if steps[index].opcode >= dis.HAVE_ARGUMENT else None
        depth += dis.stack_effect(steps[index].opcode, argument, jump=False)
        if depth >= 1:
            return index
    return 0


def only_watches(function: types.FunctionType, *, is_method: bool = False) -> bool:
    """Return whether a hook is sure to leave what it is given as it is: it counts, or records.

    It returns nothing, changes no local variable's value in place, and hands nothing to functions
    of the user's own, which might.

    Args:
        function: the hook, or the function behind it.
        is_method: its first argument is an object that it may write to.
    """
    code = function.__code__
    own = code.co_varnames[0] if is_method and code.co_argcount else None
    named = [function.__globals__.get(name) for name in globals_read(function)]
    values = (*named, *contents_of(function).values())
    if any(isinstance(value, types.FunctionType) for value in values):
        return False
    keywords = [
        name for constant in code.co_consts if isinstance(constant, tuple) for name in constant
    ]
    if "out" in keywords or "inplace" in keywords or not _BY_NAME.isdisjoint(code.co_names):
        return False
    if any(_may_change(each, own if each is code else None) for each in code_within(code)):
        return False
    steps = _steps(code)
    for index, step in enumerate(steps):
        if step.opname.startswith("RETURN_"):
            value = step if step.opname == "RETURN_CONST" else steps[index - 1]
            if not (value.opname in ("LOAD_CONST", "RETURN_CONST") and value.argval is None):
                return False
    return True


def _may_change(code: types.CodeType, own: str | None) -> bool:
    """Whether code changes the value of a local variable other than `own`, or may do so.

    `torch.relu_(x)` and `F.relu(x, True)` do, with the value as an argument.
    """
    steps = _steps(code)
    for index, step in enumerate(steps):
        if step.opname in _METHOD_LOADS and _is_in_place(str(step.argval)):
            start = steps[_expression_start(steps, index - 1)]
            if start.opname == "LOAD_GLOBAL":
                return True
        is_switch = step.opname == "LOAD_CONST" and step.argval is True
        if is_switch and any(later.opname in _CALLS for later in steps[index + 1 : index + 3]):
            return True
        owner = _changed_by(steps, index)
        if owner is not None:
            variable = _variable(steps, _expression_start(steps, owner))
            if variable not in (None, own):
                return True
    return False


def _changed_by(steps: list[dis.Instruction], index: int) -> int | None:
    """The index of the last instruction of what a step changes in place; None where it doesn't."""
    step = steps[index]
    if step.opname in (*_ATTRIBUTES, *_ITEMS):
        return _owner(steps, index)
    if step.opname in _METHOD_LOADS and _changes(str(step.argval)):
        return index - 1
    if step.opname.startswith("INPLACE_") or step.argrepr.endswith("="):
        return _expression_start(steps, index - 1) - 1
    return None
