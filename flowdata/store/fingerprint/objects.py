"""Any Python object described by content: functions, classes, and objects with attributes.

A description is JSON-like and the same in every process: it holds no address, no file and no line.
Code of the user's own goes in by its bytecode, with the values that it captures and the globals
that it names; code of a known package by its name.
"""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowdata.store.fingerprint.attributes import (
    function_inside,
    is_beside_results,
    is_builtin_name,
    is_code,
    members_of,
    patches_of,
    state_of,
)
from flowdata.store.fingerprint.code import (
    attributes_read_by,
    cached_properties,
    describe_code,
    filled_by_calls,
    functions_in,
    home_of,
    is_of_library,
    names_read_by,
)
from flowdata.store.fingerprint.hugging_face import (
    fingerprint_tokenizer,
    is_configuration,
    is_tokenizer,
    own_attributes,
    stable_config,
    tokenizer_settings,
)
from flowdata.store.fingerprint.instructions import (
    below,
    contents_of,
    names_filled,
)
from flowdata.store.fingerprint.named import values_named
from flowdata.store.fingerprint.values import (
    canonical,
    class_name,
    is_picture,
    is_plain,
    palette_of,
    update_digest,
)

_WORDS = (torch.dtype, torch.layout, torch.memory_format)  # their text is their content
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_CONTAINERS = (list, tuple, set, dict, collections.defaultdict, collections.deque)
_SCALARS = (bool, int, float, str)
_MOST_DEPTH = 60  # of objects inside objects
_MOST_OBJECTS = 100_000  # that one description goes through


class Describer:
    """Describes objects; one of its own for each fingerprint.

    Args:
        module: takes the describer and a `torch.nn.Module`, returns the module's description.

    Attributes:
        gaps: places, in words, whose content no rule covers, or that hold what calls left behind.
    """

    def __init__(self, module: Callable[[Describer, nn.Module], Any]) -> None:
        self._module = module
        self._places: dict[int, str] = {}  # the paths of the modules of a model in hand
        self._models: list[Any] = []
        self._classes: dict[type, str] = {}
        self._filled: dict[tuple[type, str | None], set[str]] = {}
        self._names: dict[type, set[str]] = {}
        self.gaps: dict[str, None] = {}
        self._count = 0
        self._open: list[int] = []  # ids of the objects inside which this description is
        self._known: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # by id: the objects stay alive

    def describe(
        self, value: Any, place: str, names: Set[str] = frozenset(), filled: Set[str] = frozenset()
    ) -> Any:
        """Return the description of a value.

        Args:
            value: anything.
            place: says where it stands, for messages.
            names: the attributes that the code beside it reads; of a namespace no others count.
            filled: the paths of what the code beside it fills in it (`names_filled`): left out.
        """
        if filled and type(value) in _CONTAINERS:  # calls fill its items
            self.gaps[f"{place} (calls fill it)"] = None
            return "filled"
        if value is None or isinstance(value, _WORDS):
            return str(value)
        if isinstance(value, torch.device):
            return "device"  # the same model is the same on every one
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__name__, value.name]
        if isinstance(value, Tensor) or is_plain(value):
            digest = hashlib.sha256()
            update_digest(digest, value)
            return digest.hexdigest()
        if isinstance(value, types.ModuleType):
            return self._of_python_module(value, place, names, filled)
        return self._of_compound(value, place, names, filled)

    def _of_compound(self, value: Any, place: str, names: Set[str], filled: Set[str]) -> Any:
        """The digest of what may hold other values, and itself among them."""
        if isinstance(value, types.MethodType):  # made anew whenever it is asked for
            owner, function = value.__self__, value.__func__
            kind = owner if isinstance(owner, type) else type(owner)
            filled = frozenset(self.filled(kind, getattr(function, "__name__", None)))
            description = self.describe(owner, place, filled=filled)
            return ["method", description, self.describe(function, place)]
        if isinstance(value, nn.Module):
            return self._of_module(value)
        if id(value) in self._open:
            return ["as above", len(self._open) - self._open.index(id(value))]
        key = id(value), filled
        if key in self._known and not isinstance(value, _NAMESPACES):
            return self._known[key][1]
        self._count += 1
        if self._count > _MOST_OBJECTS or len(self._open) > _MOST_DEPTH:
            self.gaps[f"{place} (too large)"] = None
            return "too large"
        self._open.append(id(value))
        try:
            content = self._content(value, place, names, filled)
        finally:
            self._open.pop()
        digest = hashlib.sha256(canonical(content)).hexdigest()
        self._known[key] = value, digest
        return digest

    def _content(self, value: Any, place: str, names: Set[str], filled: Set[str]) -> Any:
        if isinstance(value, types.FunctionType):
            return self._of_function(value, place, filled)
        if isinstance(value, functools.partial):
            parts = [value.func, list(value.args), dict(value.keywords)]
            return ["partial", *(self.describe(part, place) for part in parts)]
        if isinstance(value, type):
            return self.of_class(value, place, filled=filled)
        if isinstance(value, staticmethod | classmethod | property | functools.cached_property):
            functions = functions_in(value)
            return [type(value).__name__, *(self.describe(f, place) for f in functions)]
        if isinstance(value, Mapping):
            items = self._kept(value, place, filled) if filled else value
            pairs = []
            for key in items:
                at = f"{place}.{key}" if isinstance(key, str) else place
                item = self.describe(items[key], at, filled=below(filled, key))
                pairs.append([self.describe(key, place), item])
            return ["mapping", sorted(pairs, key=canonical)]
        if isinstance(value, Set):  # the order of a set changes from process to process
            return ["set", sorted((self.describe(v, place) for v in value), key=canonical)]
        if isinstance(value, list | tuple) and all(type(item) in _SCALARS for item in value):
            return ["scalars", list(value)]  # as JSON tells them apart, and long ones at once
        if isinstance(value, Sequence | np.ndarray):
            return ["sequence", [self.describe(item, place) for item in value]]
        if isinstance(value, _NAMESPACES):
            fields = {k: v for k, v in vars(value).items() if not names or k in names}
            mapping = types.MappingProxyType(fields)  # whose items are attributes
            return ["namespace", self.describe(mapping, place, filled=filled)]
        return self._of_object(value, place, filled)

    def _kept(self, values: Mapping[str, Any], place: str, filled: Set[str]) -> dict[str, Any]:
        """The values that calls don't fill; the others become gaps."""
        for name in sorted(values.keys() & filled):
            self.gaps[f"{place}.{name} (calls fill it)"] = None
        return {name: value for name, value in values.items() if name not in filled}

    # --- modules -------------------------------------------------------------------------------

    def place_modules(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Note the paths of a model's modules; an attribute that holds one is known by its path."""
        self._models.append(modules)  # which keeps them alive, and their ids their own
        self._places |= {id(module): path for path, module in modules}

    def _of_module(self, module: nn.Module) -> Any:
        if id(module) in self._places:
            return ["module at", self._places[id(module)]]
        return ["module", self._module(self, module)]

    def filled(self, kind: type, entry: str | None = None) -> set[str]:
        """Return `filled_by_calls(kind, entry)`, which takes a while, once for each class."""
        if (kind, entry) not in self._filled:
            self._filled[kind, entry] = filled_by_calls(kind, entry)
        return self._filled[kind, entry]

    def names(self, kind: type) -> set[str]:
        """Return the names in a class's methods, those of known packages among them."""
        if kind not in self._names:
            self._names[kind] = names_read_by(kind, libraries=True)
        return self._names[kind]

    def of_module_class(self, kind: type, place: str, beside: Set[str]) -> Any:
        """Return the description of a module's class; see `of_class`."""
        if kind not in self._classes:
            content = self.of_class(kind, place, beside)
            self._classes[kind] = hashlib.sha256(canonical(content)).hexdigest()
        return self._classes[kind]

    # --- functions and classes -----------------------------------------------------------------

    def _of_function(self, function: types.FunctionType, place: str, filled: Set[str]) -> Any:
        if is_of_library(home_of(function)):
            inner = getattr(function, "__wrapped__", None)
            name = function.__qualname__ if inner is None else function.__code__.co_name
            contents = contents_of(function).items()
            settings = {k: v for k, v in contents if is_plain(v) or callable(v)}
            return [home_of(function), name, *self._all([inner, settings], place)]
        values, name = values_named(function), function.__name__
        paths = names_filled(function) | {f"{name}.{path}" for path in filled}
        filled = {name for name in paths & values.keys() if not is_code(values[name])}
        gaps = dict.fromkeys(filled, "calls fill it")
        gaps |= {name: "is not there" for name, value in values.items() if value is None}
        self.gaps |= {f"{name!r} of {place} ({gaps[name]})": None for name in sorted(gaps)}
        names = attributes_read_by(function)
        settings = {
            name: self.describe(value, f"{name!r} of {place}", names, below(paths, name))
            for name, value in sorted(values.items())
            if name not in filled and not is_builtin_name(value)
        }
        defaults = self._all([function.__defaults__, function.__kwdefaults__], place)
        code = describe_code(function.__code__)
        return ["function", function.__name__, code, *defaults, settings]

    def _all(self, values: Sequence[Any], place: str) -> list[Any]:
        return [self.describe(value, place) for value in values]

    def of_class(
        self,
        kind: type,
        place: str,
        beside: Set[str] = frozenset(),
        filled: Set[str] = frozenset(),
    ) -> Any:
        """Return a class's description: its name, and the code of what is the user's own in it.

        Args:
            kind: the class.
            place: says where it stands, for messages.
            beside: names of methods that change no result.
            filled: names of what is filled by other calls than those of its objects.
        """
        filled = filled | self.filled(kind)
        if is_of_library(kind.__module__):
            patches = [
                [name, self.describe(value, f"{kind.__name__}.{name}")]
                for name, value in patches_of(kind, beside | filled)
            ]
            return [f"{kind.__module__}.{kind.__qualname__}", *patches]
        members = {
            name: self.describe(value, f"{kind.__name__}.{name}")
            for name, value in self._kept(members_of(kind, beside), kind.__name__, filled).items()
        }
        bases = [self.describe(base, place) for base in kind.__bases__ if base is not object]
        return ["class", kind.__name__, members, bases]

    def _of_python_module(
        self, module: types.ModuleType, place: str, names: Set[str], filled: Set[str]
    ) -> Any:
        if is_of_library(module.__name__):
            return ["module", module.__name__]
        key = id(module), frozenset(names), filled
        if key not in self._known:
            self._known[key] = module, "as above"  # for modules that name each other
            named = {name: vars(module)[name] for name in sorted(names) if name in vars(module)}
            filled = {name for name in filled if not isinstance(named.get(name), types.ModuleType)}
            content = {
                name: self.describe(value, f"{module.__name__}.{name}", names, below(filled, name))
                for name, value in self._kept(named, module.__name__, filled).items()
                if not isinstance(value, types.ModuleType) or is_code(value)
            }
            self._known[key] = module, content
        return self._known[key][1]

    # --- objects -------------------------------------------------------------------------------

    def _of_object(self, value: Any, place: str, filled: Set[str]) -> Any:
        kind = type(value)
        if is_tokenizer(value):
            return self._of_tokenizer(value, place, filled)
        if is_configuration(value):
            own = [] if is_of_library(kind.__module__) else [self.describe(kind, place)]
            settings = self._kept(stable_config(value.to_dict()), place, filled)
            return ["configuration", class_name(value), settings, *own]
        if kind.__module__.startswith("PIL.") and is_picture(value):
            contents = [value.tobytes(), *palette_of(value)]
            digests = [hashlib.sha256(content).hexdigest() for content in contents]
            return ["image", value.mode, value.size, *digests]
        if is_beside_results(value):
            return ["by name", kind.__qualname__]
        if isinstance(value, torch.jit.ScriptFunction):
            return ["script", value.code]
        if kind is object:
            return ["object"]
        names = [getattr(value, "__module__", None), getattr(value, "__qualname__", None)]
        if callable(value) and isinstance(names[1], str):  # a built-in function, or one wrapped
            owner = getattr(value, "__self__", None)
            owner = None if isinstance(owner, types.ModuleType) else owner
            return ["built-in", *names, *self._all([owner, function_inside(value)], place)]
        fields = self._fields(value, place, filled)
        if fields is None:
            self.gaps[f"{place} (a {class_name(value)})"] = None
            return ["unknown", class_name(value)]
        return ["object", self.describe(kind, place, filled=filled), fields]

    def _of_tokenizer(self, value: Any, place: str, filled: Set[str]) -> Any:
        filled = filled | {name.removesuffix("_id") for name in filled}  # pad_token_id
        self._kept({"chat_template": None, **value.special_tokens_map}, place, filled)
        parts: list[Any] = [fingerprint_tokenizer(value, filled)]
        settings, own = tokenizer_settings(value), own_attributes(value)
        if settings:
            parts.append(self._kept(settings, place, filled))
        if own:
            parts += self._all([type(value), self._kept(own, place, filled)], place)
        return ["tokenizer", *parts]

    def _fields(self, value: Any, place: str, filled: Set[str]) -> Any:
        """The description of an object's attributes; None where it has none that can be read."""
        kind, attributes = type(value), state_of(value)
        if not isinstance(attributes, dict):
            return attributes and self._all(attributes, place)
        by_calls = self.filled(kind)
        if is_of_library(kind.__module__):  # which knows what it keeps
            attributes = {k: v for k, v in attributes.items() if k not in by_calls}
        filled, computed = filled | by_calls, cached_properties(kind)
        return {
            name: self.describe(attribute, f"{place}.{name}", filled=below(filled, name))
            for name, attribute in sorted(self._kept(attributes, place, filled).items())
            if name not in computed
        }
