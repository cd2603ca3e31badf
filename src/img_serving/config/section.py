"""What every table of the settings shares: closed, frozen, documented, and silent about its secrets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import inspect

from img_serving.config.problems import KeyPath

Finding = tuple[KeyPath, str]
"""A problem as a table sees it: the path below itself, and the reason."""

SECRET = {"secret": True}
"""Marks a key (`Meta(extra=SECRET)`) whose value is never shown: not in `repr`, not in an error."""

MASK = "***"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the settings."""

    def findings(self) -> Iterator[Finding]:
        """What is impossible about the values although each has the right type."""
        yield from ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Every key with its value, or a mask for a secret one (`rich` reads this)."""
        values = [(field, getattr(self, field.name)) for field in fields_of(type(self))]
        return [(field.name, masked(value) if is_secret(field) else value) for field, value in values]


class _Masked:
    """Stands for a secret in a `repr`."""

    def __repr__(self) -> str:
        return MASK


def masked(value: Any) -> Any:
    """`value` with every string and number in it hidden; names of keys stay, and so does "there is none"."""
    if value is None or value == () or isinstance(value, Section):
        return value
    if isinstance(value, Mapping):
        return dict.fromkeys(value, _Masked())
    if isinstance(value, tuple | list):
        return tuple(masked(item) for item in value)
    return _Masked()


@lru_cache(maxsize=64)
def described_as(table: type[Section]) -> inspect.StructType:
    """A table as msgspec sees it."""
    described = inspect.type_info(table)
    if not isinstance(described, inspect.StructType):  # pragma: no cover - a Section is always one
        raise TypeError(table)
    return described


def fields_of(table: type[Section]) -> tuple[inspect.Field, ...]:
    """The keys of a table with their types, constraints and documentation."""
    return described_as(table).fields


def bare(described: inspect.Type) -> inspect.Type:
    """The type without its documentation."""
    while isinstance(described, inspect.Metadata):
        described = described.type
    return described


def alternatives(described: inspect.Type) -> tuple[inspect.Type, ...]:
    """The types that a value may have, `None` included where the key may be unset."""
    described = bare(described)
    if isinstance(described, inspect.UnionType):
        return tuple(bare(one) for one in described.types)
    return (described,)


def table_in(described: inspect.Type) -> type[Section] | None:
    """The table that a value may be, or None."""
    for one in alternatives(described):
        if isinstance(one, inspect.StructType) and issubclass(one.cls, Section):
            return one.cls
    return None


def list_in(described: inspect.Type) -> inspect.VarTupleType | None:
    """The list that a value may be, or None."""
    return next((one for one in alternatives(described) if isinstance(one, inspect.VarTupleType)), None)


def is_optional(described: inspect.Type) -> bool:
    """Whether the key may be unset."""
    return any(isinstance(one, inspect.NoneType) for one in alternatives(described))


def is_secret(field: inspect.Field) -> bool:
    """Whether the value of the key must never be shown."""
    return isinstance(field.type, inspect.Metadata) and bool((field.type.extra or {}).get("secret"))


def documentation_of(field: inspect.Field) -> tuple[str, tuple[Any, ...]]:
    """The description of a key, and its examples."""
    schema = (field.type.extra_json_schema if isinstance(field.type, inspect.Metadata) else None) or {}
    return schema.get("description", ""), tuple(schema.get("examples", ()))


def default_of(field: inspect.Field) -> Any:
    """The default of a key; `msgspec.NODEFAULT` where it must be given."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
