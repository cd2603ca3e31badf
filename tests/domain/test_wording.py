"""Reasons of the validator in words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from img_serving.domain.wording import in_words


class Sample(msgspec.Struct, forbid_unknown_fields=True):
    whole: Annotated[int, Meta(ge=1, le=9)] | None = None
    number: Annotated[float, Meta(ge=0.5, lt=1)] | None = None
    text: Annotated[str, Meta(min_length=1, max_length=3)] | None = None
    things: Annotated[list[int], Meta(max_length=2)] | None = None
    word: Literal["up", "down"] | None = None
    flag: bool = False


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"whole": "x"}, "must be a whole number, not a string"),
        ({"whole": 0}, "must be at least 1"),
        ({"whole": 10}, "must be at most 9"),
        ({"number": 0.1}, "must be at least 0.5"),
        ({"number": 2}, "must be less than 1"),
        ({"text": ""}, "must have at least 1 character"),
        ({"text": "four"}, "must have at most 3 characters"),
        ({"things": [1, 2, 3]}, "must have at most 2 items"),
        ({"things": {}}, "must be a list, not an object"),
        ({"word": "sideways"}, "'sideways' is none of up, down"),
        ({"flag": 1}, "must be true or false, not a whole number"),
        ({"other": 1}, "object contains unknown field `other`"),
    ],
)
def test_what_is_wrong_is_said_as_what_would_be_right(value: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(value, Sample)
    assert in_words(str(refused.value).partition(" - at ")[0], ("up", "down")) == words
