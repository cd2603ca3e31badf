"""What is wrong with a configuration: one problem a key, all of them in one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""Where a key stands: `("backends", 0, "timeout_ms")` is written `backends[0].timeout_ms`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    `path` is the key (`backends[0].timeout_ms`; empty for a whole file), `message` the reason and what would be right,
    `source` the file or the environment variable that it came from (empty where nobody knows). None of them holds a secret.
    """

    path: str
    message: str
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        source = f" (from {self.source})" if self.source else ""
        return f"{where}{self.message}{source}"


class ConfigError(ValueError):
    """A configuration that cannot be used. `problems` has everything that was found wrong, in the order of the keys."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"configuration: {self.problems[0]}"
        return "\n".join(
            [f"configuration: {len(self.problems)} problems", *(f"  {problem}" for problem in self.problems)]
        )


def path_text(path: KeyPath) -> str:
    """The written form of a path: dots between names, indexes in brackets."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that was probably meant, or None."""
    close = difflib.get_close_matches(word.lower()[:100], list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def instead_of(word: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown `word`: the nearest known one, else all of them."""
    options = list(known)
    near = nearest(word, options)
    return f"did you mean `{near}`?" if near else f"known here: {', '.join(options)}"
