"""The reading of a protocol's own table (`[backends.comfyui]`): closed, and every fault named by its option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from img_serving.domain.wording import in_words

Kind = TypeVar("Kind", bound=msgspec.Struct)


def read_options(kind: type[Kind], table: Mapping[str, Any]) -> Kind:
    """The table as a `kind`, which forbids unknown fields.

    Raises:
        ValueError: naming the option, and for an unknown one the nearest that is known.
    """
    known = kind.__struct_fields__
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{name}: unknown option" + (f"; did you mean {near[0]}?" if near else f" (known: {', '.join(known)})")
            )
    for name, value in table.items():
        try:
            # one at a time, so that the message can name the option
            msgspec.convert({name: value}, kind)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at ")
            where = path.strip("`").removeprefix("$.").removeprefix("$") or name
            raise ValueError(f"{where}: {in_words(reason, _words(kind, where))}") from None
    return msgspec.convert(dict(table), kind)


def _words(kind: type[msgspec.Struct], name: str) -> list[str]:
    """The words that an option takes, where it takes certain ones only."""
    described = inspect.type_info(kind)
    fields = described.fields if isinstance(described, inspect.StructType) else ()
    kinds = next((one.type for one in fields if one.encode_name == name), None)
    some = kinds.types if isinstance(kinds, inspect.UnionType) else (kinds,)
    return [str(word) for one in some if isinstance(one, inspect.LiteralType) for word in one.values]
