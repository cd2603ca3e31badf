"""Reads the programs out of the pages of the documentation, so that what readers paste is what tests run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """Fenced text: its language, and what stands between the fences."""

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page in one human language."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def blocks(self) -> list[Block]:
        """All fenced blocks, in their order."""
        return [Block(*found) for found in _FENCED.findall(self.text)]

    def program(self, language: str) -> str:
        """All blocks of a programming language, one after the other: a page is one program of each."""
        return "\n".join(block.code for block in self.blocks if block.language == language)

    def exports(self) -> dict[str, str]:
        """What its shell blocks put into the environment."""
        return dict(re.findall(r"^export (\w+)=(\S+)", self.program("sh"), re.MULTILINE))


def recipe(name: str, suffix: str = "") -> Page:
    """A page of `docs/recipes`; `suffix` is ".ko" for the Korean one."""
    return Page(DOCS / "recipes" / f"{name}{suffix}.md")
