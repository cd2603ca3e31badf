"""The names that an engine knows (samplers, schedulers, models), found however a client spells them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

_NOISE = re.compile(r"[\s_./\\:()-]+")


SEARCHED = 500
"""Names among which a slip is looked for: comparing takes its time."""

SHOWN_CHARS = 80


def shown(name: str) -> str:
    """A name from elsewhere as a message may have it: of bounded length, and nothing in it that commands a terminal."""
    text = "".join(char if char.isprintable() else "?" for char in name[: SHOWN_CHARS + 1])
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


class Vocabulary:
    """A closed list of names. Engines take any name in silence and draw with another: so it is looked up here first.

    Case, blanks, dashes, underscores, dots, slashes and brackets do not matter, as `Euler a`, `euler_a` and `EULER-A` are one
    sampler everywhere; `+` does. Two vocabularies of the same names and aliases are equal.
    """

    __slots__ = ("_by_key", "names", "spellings")

    def __init__(self, names: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        """`aliases` maps another spelling to one of `names`; a name's own spelling always wins over an alias."""
        self.names = tuple(dict.fromkeys(names))
        self.spellings = (*self.names, *(aliases or {}))
        self._by_key: dict[str, str] = {}
        for name in self.names:
            self._by_key.setdefault(_key(name), name)
        for alias, name in (aliases or {}).items():
            self._by_key.setdefault(_key(alias), name)

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self.names)} names>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.names, self._by_key) == (other.names, other._by_key)

    __hash__ = None  # type: ignore[assignment] # compared by value, never a key

    def find(self, name: str) -> str | None:
        """The engine's own spelling; None if it has nothing of that name."""
        return name if name in self.names else self._by_key.get(_key(name))

    def is_own(self, name: str) -> bool:
        """Whether it is one of the names themselves, however spelled, and no alias."""
        found = self.find(name)
        return found is not None and _key(found) == _key(name)

    @staticmethod
    def matches(name: str, other: str) -> bool:
        """Whether two spellings are of the same name."""
        return _key(name) == _key(other)

    def hint(self, name: str, count: int = 3) -> str:
        """For a message about an unknown `name`: what it may be a slip of, the likeliest first, or how the list begins."""
        own = {_key(one): one for one in self.names[:SEARCHED]}  # not the aliases: there can be thousands
        near = difflib.get_close_matches(_key(name)[:80], list(own), count, cutoff=0.5)
        if near:
            return f"the nearest it has: {', '.join(shown(own[key]) for key in near)}"
        first = ", ".join(shown(name) for name in self.names[: 2 * count])
        return f"it has: {first}{', …' if len(self.names) > 2 * count else ''}"


def _key(name: str) -> str:
    return _NOISE.sub("", name).casefold()
