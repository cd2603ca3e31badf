"""Reads the fenced blocks of a page, so that tests run what readers paste."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language ("" where none is said) and its text, with the line feed at its end."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in its order."""
    return [Block(*found) for found in _FENCE.findall(page.read_text(encoding="utf-8"))]


def block_with(page: Path, words: str, language: str = "") -> str:
    """The text of the one block of the page (of that language, where one is said) that has `words` in it."""
    (text,) = [one.text for one in blocks_of(page) if words in one.text and language in {"", one.language}]
    return text


def korean_of(page: Path) -> Path:
    """The same page in Korean."""
    return page.with_suffix(".ko.md")


def program_of(page: Path, language: str) -> str:
    """All blocks of that language, one after the other: where a page says so, they are one program."""
    return "\n".join(one.text for one in blocks_of(page) if one.language == language)
