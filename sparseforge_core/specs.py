"""Specifications: frozen dataclasses that turn into canonical JSON and back, checked field by field.

A *spec* is anything that may stand inside a recipe. `@spec("kind")` makes the class a frozen, keyword-only
dataclass and registers it, so that a cell file can name its parts by `kind`. `encode` omits fields that equal
their default (so a *new* field keeps old keys); `decode` refuses unknown kinds, unknown fields and wrong types,
each by the path of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, dataclass_transform

from sparseforge_core.errors import RecipeError, SparseForgeError, unknown

T = TypeVar("T")

SPECS: dict[str, type[Any]] = {}
"""Every registered spec class by its kind."""


LARGEST = 2**63 - 1
"""The largest whole number that the databases hold."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(kind: str, *, revision: int = 1) -> Callable[[type[T]], type[T]]:
    """Register the class under `kind`. Bump `revision` when its arithmetic changes: that makes a new recipe."""

    def register(cls: type[T]) -> type[T]:
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if kind in SPECS and SPECS[kind].__qualname__ != made.__qualname__:
            raise RecipeError(f"two specs are called {kind!r}: {SPECS[kind]} and {made}")
        made.kind = kind  # type: ignore[attr-defined]
        made.spec_revision = revision  # type: ignore[attr-defined]
        taken = any(field.name == "revision" for field in dataclasses.fields(made))  # type: ignore[arg-type]
        made.revision_key = "spec_revision" if taken else "revision"  # type: ignore[attr-defined]
        SPECS[kind] = made
        return made

    return register


def is_spec(value: object) -> bool:
    """Whether `value` is an instance of a registered spec."""
    return SPECS.get(getattr(type(value), "kind", "")) is type(value)


def encode(value: Any, *, omit_defaults: bool = True) -> Any:
    """The JSON form of a spec: `{"kind", "revision", fields…}`, keys sorted, tuples as lists.

    A spec that has a field called `revision` (a commit of the hub) has its own under `spec_revision`.

    Raises RecipeError for values that have no exact JSON form (a NaN, an infinity, an unregistered class).
    """
    if is_spec(value):
        fields = {"kind": value.kind, value.revision_key: value.spec_revision}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if not (omit_defaults and _is_default(field, item)):
                fields[field.name] = encode(item, omit_defaults=omit_defaults)
        return dict(sorted(fields.items()))
    if isinstance(value, (tuple, list)):
        return [encode(item, omit_defaults=omit_defaults) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item, omit_defaults=omit_defaults) for key, item in sorted(value.items())}
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"a recipe cannot hold {value}: give a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(f"a recipe cannot hold a {type(value).__name__}: {value!r}")


def decode(data: Any, expected: type[T], path: str = "") -> T:
    """Build the spec that `data` describes and check that it is an `expected`.

    Raises RecipeError naming the path of the first field that is unknown, missing, of a wrong type or refused by
    the spec's own validation.
    """
    value = _decode(data, expected, path or expected.__name__.lower())
    return typing.cast(T, value)


def _is_default(field: dataclasses.Field[Any], item: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return type(item) is type(field.default) and bool(item == field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(item == field.default_factory())
    return False


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(data: Any, expected: Any, path: str) -> Any:
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(data, typing.get_args(expected), path)
    if origin is Literal:
        if data not in typing.get_args(expected):
            raise RecipeError(f"{path}: " + unknown("value", data, map(str, typing.get_args(expected))))
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise RecipeError(f"{path}: expected a list, found {_short(data)}")
        args = typing.get_args(expected)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(item, args[0], f"{path}[{i}]") for i, item in enumerate(data))
        if len(args) != len(data):
            raise RecipeError(f"{path}: expected {len(args)} items, found {len(data)}")
        return tuple(_decode(item, arg, f"{path}[{i}]") for i, (item, arg) in enumerate(zip(data, args, strict=True)))
    if expected in (int, float, str, bool):
        return _scalar(data, expected, path)
    if expected is type(None):
        if data is not None:
            raise RecipeError(f"{path}: expected null, found {_short(data)}")
        return None
    if isinstance(expected, type):
        return _decode_spec(data, expected, path)
    raise RecipeError(f"{path}: no rule to read a {expected}")


def _scalar(data: Any, expected: type[Any], path: str) -> Any:
    fits = type(data) is expected or (expected is float and type(data) is int)
    if expected is int and fits and not -LARGEST <= data <= LARGEST:
        raise RecipeError(f"{path}: expected an int of at most {LARGEST}, found one of {len(str(abs(data)))} digits")
    try:
        if fits and (expected is not float or math.isfinite(data)):
            return expected(data)
    except OverflowError as error:  # a whole number that no float can hold
        raise RecipeError(f"{path}: expected {expected.__name__}, found {_short(data)}") from error
    raise RecipeError(f"{path}: expected {expected.__name__}, found {_short(data)}")


def _decode_union(data: Any, options: tuple[Any, ...], path: str) -> Any:
    if data is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _decode(data, option, path)
        except RecipeError as error:
            failures.append(error)
    raise failures[0]


def _decode_spec(data: Any, expected: type[Any], path: str) -> Any:
    if not isinstance(data, dict) or "kind" not in data:
        raise RecipeError(f"{path}: expected an object with a 'kind', found {_short(data)}")
    cls = SPECS.get(str(data["kind"]))
    fitting = sorted(kind for kind, known in SPECS.items() if issubclass(known, expected))
    if cls is None or not issubclass(cls, expected):
        raise RecipeError(f"{path}: " + unknown("kind", data["kind"], fitting))
    own = cls.revision_key
    if data.get(own, cls.spec_revision) != cls.spec_revision:
        raise RecipeError(
            f"{path}: written for revision {data[own]} of {cls.kind!r}, this code has revision {cls.spec_revision}; "
            "use the code that wrote it or plan the cell anew"
        )
    names = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in names and name not in ("kind", own):
            raise RecipeError(f"{path}: " + unknown(f"field of {cls.kind!r}", name, names))
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {name: _decode(data[name], hints[name], f"{path}.{name}") for name in names if name in data}
    missing = [
        name
        for name, field in names.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{path}: {cls.kind!r} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except SparseForgeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _short(data: Any) -> str:
    text = repr(data)
    return f"{type(data).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
