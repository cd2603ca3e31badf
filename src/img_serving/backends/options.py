"""The reading of a protocol's own table (`[backends.comfyui]`): closed, and every fault named by its option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

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
            raise ValueError(f"{where}: {reason}") from None
    return msgspec.convert(dict(table), kind)
