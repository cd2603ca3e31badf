"""What a validator complains about, in words for people who do not know its types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_KINDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "object": "an object",
    "array": "a list",
    "null": "null",
}
_MISTYPED: Final = re.compile(r"Expected `([a-z| ]+)`, got `([a-z]+)`")
_OUT_OF_RANGE: Final = re.compile(r"Expected `(?:int|float)` (<=|>=|<|>) (\S+)")
_LENGTH: Final = re.compile(r"Expected `(str|array)` of length (<=|>=) (\d+)")
_COMPARED: Final = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than"}


def in_words(reason: str, choices: Sequence[str] = ()) -> str:
    """A reason of msgspec's as what the value has to be; one that is not known here as it is.

    `choices` are the words that are allowed.
    """
    if mistyped := _MISTYPED.fullmatch(reason):
        wanted, got = mistyped.groups()
        kinds = [_KINDS.get(one, one) for one in wanted.split(" | ") if one != "null"]
        return f"must be {' or '.join(kinds)}, not {_KINDS.get(got, got)}"
    if out := _OUT_OF_RANGE.fullmatch(reason):
        return f"must be {_COMPARED[out[1]]} {out[2].removesuffix('.0')}"
    if length := _LENGTH.fullmatch(reason):
        kind, compared, count = length.groups()
        things = ("character" if kind == "str" else "item") + "s"[: count != "1"]
        return f"must have {_COMPARED[compared]} {count} {things}"
    if reason.startswith("Invalid enum value ") and choices:
        return f"{reason.removeprefix('Invalid enum value ')} is none of {', '.join(choices)}"
    return f"{reason[:1].lower()}{reason[1:]}"
