"""From plain values to typed settings: every value checked, every problem collected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from msgspec import inspect

from img_serving.config.moved import moved_to
from img_serving.config.problems import ConfigError, KeyPath, Problem, instead_of, path_text
from img_serving.config.section import (
    Section,
    alternatives,
    bare,
    fields_of,
    is_optional,
    is_secret,
    list_in,
    table_in,
)

MAX_DEPTH = 32
"""Tables and lists inside each other at most, in the free tables of a protocol."""

MAX_INTEGER = 2**63 - 1

TableT = TypeVar("TableT", bound=Section)


class _Invalid:
    """What a value that was refused becomes."""


_INVALID: Final = _Invalid()


class Reader:
    """Reads tables, and remembers what was wrong with them in `found`."""

    def __init__(self) -> None:
        self.found: list[tuple[KeyPath, str]] = []

    def refuse(self, path: KeyPath, message: str) -> _Invalid:
        """Remember a problem."""
        self.found.append((path, message))
        return _INVALID

    def table(self, table: type[TableT], value: Any, path: KeyPath) -> TableT | None:
        """`value` as a `table`, or None where anything in it was refused."""
        if not isinstance(value, Mapping):
            self.refuse(path, f"is {kind_of(value)}, not a table")
            return None
        refused_before = len(self.found)
        fields = {field.encode_name: field for field in fields_of(table)}
        for key in value:
            if key not in fields:
                self.refuse((*path, _shown_key(key)), f"unknown key; {_place_for(str(key), table)}")
        read: dict[str, Any] = {}
        for key, field in fields.items():
            if key in value:
                read[field.name] = self.value(field.type, value[key], (*path, key), secret=is_secret(field))
            elif field.required:
                self.refuse((*path, key), f"missing; it must be {expected(field.type)}")
        if len(self.found) > refused_before:
            return None
        settings = table(**read)
        for below, message in settings.findings():
            self.refuse((*path, *below), message)
        return settings if len(self.found) == refused_before else None

    def value(self, described: inspect.Type, value: Any, path: KeyPath, *, secret: bool = False) -> Any:
        """`value` as what `described` wants. The value of a `secret` key is not repeated in the problem."""
        if value is None and is_optional(described):
            return None
        table, items = table_in(described), list_in(described)
        if table is not None and isinstance(value, Mapping):
            return self.table(table, value, path)
        if items is not None and isinstance(value, list | tuple):
            return self._list(items, value, path, secret=secret)
        for one in alternatives(described):
            if isinstance(one, inspect.DictType) and isinstance(value, Mapping):
                return self._free_table(one, value, path, secret=secret)
            if isinstance(one, inspect.AnyType):
                return self._json(value, path)
            if _fits(one, value):
                return value
        shown = kind_of(value) if secret or isinstance(value, Mapping | list | tuple) else _shown(value)
        hint = _literal_hint(described, value)
        return self.refuse(path, f"{shown} is not {expected(described)}{hint}")

    def _list(
        self, items: inspect.VarTupleType, value: list[Any] | tuple[Any, ...], path: KeyPath, *, secret: bool
    ) -> Any:
        if items.min_length and len(value) < items.min_length:
            return self.refuse(path, "an empty list allows nothing: name at least one, or leave the key out")
        return tuple(
            self.value(items.item_type, item, (*path, index), secret=secret) for index, item in enumerate(value)
        )

    def _free_table(self, described: inspect.DictType, value: Mapping[Any, Any], path: KeyPath, *, secret: bool) -> Any:
        read = {}
        for key, item in value.items():
            if isinstance(key, str) and key:
                read[key] = self.value(described.value_type, item, (*path, key), secret=secret)
            else:
                self.refuse(path, "has a key that is empty or no string")
        return read

    def _json(self, value: Any, path: KeyPath, depth: int = 0) -> Any:
        """`value` where it can be stored as JSON: dates and infinities cannot."""
        if depth > MAX_DEPTH:
            return self.refuse(path, f"is nested more than {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                return self.refuse(path, "has a key that is no string")
            return {key: self._json(item, (*path, key), depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._json(item, (*path, index), depth + 1) for index, item in enumerate(value)]
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, int) and abs(value) <= MAX_INTEGER:
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        return self.refuse(
            path, f"is {kind_of(value)}; strings, finite numbers, true, false, lists and tables can stand here"
        )


def read_table(table: type[TableT], value: Any, path: KeyPath = ()) -> TableT:
    """`value` as a `table`.

    Raises:
        ConfigError: with everything that was wrong, in the order in which it was found.
    """
    reader = Reader()
    settings = reader.table(table, value, path)
    if settings is None:
        raise ConfigError(Problem(path_text(where), message) for where, message in reader.found)
    return settings


def expected(described: inspect.Type) -> str:
    """What a value of that type looks like, in words."""
    return " or ".join(_expected_one(one) for one in alternatives(described) if not isinstance(one, inspect.NoneType))


def kind_of(value: Any) -> str:
    """What sort of value that is, without saying which."""
    if isinstance(value, bool):
        return "true or false"
    for kind, name in ((str, "a string"), (int, "a whole number"), (float, "a number"), (Mapping, "a table")):
        if isinstance(value, kind):
            return name
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing" if value is None else "a date or time"


def _fits(one: inspect.Type, value: Any) -> bool:
    match one:
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType():
            return (
                isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER and _in(one, value)
            )
        case inspect.FloatType():
            if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX_INTEGER:
                return False
            return math.isfinite(value) and _in(one, value)
        case inspect.StrType():
            return isinstance(value, str) and len(value) >= (one.min_length or 0)
        case inspect.LiteralType():
            return isinstance(value, str) and value in one.values
    return False


def _in(one: inspect.IntType | inspect.FloatType, value: float) -> bool:
    return (
        (one.gt is None or value > one.gt)
        and (one.ge is None or value >= one.ge)
        and (one.le is None or value <= one.le)
    )


def _expected_one(one: inspect.Type) -> str:
    match one:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_range(one)}"
        case inspect.FloatType():
            return f"a number{_range(one)}"
        case inspect.StrType():
            return "a string that is not empty" if one.min_length else "a string"
        case inspect.LiteralType():
            return "one of " + ", ".join(f'"{value}"' for value in one.values)
        case inspect.VarTupleType():
            return f"a list (of {expected(bare(one.item_type))})"
        case _:
            return "a table"


def _range(one: inspect.IntType | inspect.FloatType) -> str:
    if one.gt is not None:
        return f" above {one.gt:g}" + (f" and up to {one.le:g}" if one.le is not None else "")
    if one.ge is not None:
        return f" from {one.ge:g} to {one.le}" if one.le is not None else f", {one.ge:g} or more"
    return ""


def _literal_hint(described: inspect.Type, value: Any) -> str:
    words = [word for one in alternatives(described) if isinstance(one, inspect.LiteralType) for word in one.values]
    if not words or not isinstance(value, str):
        return ""
    hint = instead_of(value, [str(word) for word in words])
    return f"; {hint}" if hint.startswith("did") else ""


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = f'"{value}"' if value.isprintable() else repr(value)
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        text = "a number that large"
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _shown_key(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else repr(key)[:80]


def _place_for(key: str, table: type[Section]) -> str:
    """Where an unknown key would be right: where another program's key went, the nearest neighbour, or another section."""
    if (moved := moved_to(table.__name__, key)) is not None:
        return moved
    names = [field.encode_name for field in fields_of(table)]
    hint = instead_of(key, names)
    if hint.startswith("did"):
        return hint
    for field in fields_of(table):
        inner = table_in(field.type)
        if inner is not None and any(key == one.encode_name for one in fields_of(inner)):
            return f"did you mean `{field.encode_name}.{key}`?"
    return hint
