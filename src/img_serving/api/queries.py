"""What the query of a list asks for: how many, and which of a closed set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from img_serving.domain.errors import InvalidRequest

USUAL_LIMIT: Final = 20
MOST_LISTED: Final = 100

Choice = TypeVar("Choice", bound=str)


def limit_of(query: Mapping[str, str]) -> int:
    """How many are asked for at most.

    Raises:
        InvalidRequest: that is no number, or none that is allowed.
    """
    text = query.get("limit") or str(USUAL_LIMIT)
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_LISTED:
        return int(text)
    raise InvalidRequest(f"limit must be a whole number from 1 to {MOST_LISTED}", param="limit")


def choice_of(query: Mapping[str, str], name: str, choices: Sequence[Choice]) -> Choice | None:
    """The one that is asked for under this name; None: no matter which.

    Raises:
        InvalidRequest: it is none of them.
    """
    text = query.get(name)
    if not text:
        return None
    found = next((one for one in choices if one == text), None)
    if found is None:
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}", param=name)
    return found
