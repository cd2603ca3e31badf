"""Reading: turns a prompt and a negative prompt into the senses that the lexicon knows, word by word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from img_serving.engines.procedural.lexicon import ENGLISH_ENDINGS, LEXICON, LOOKALIKES, PARTICLES

_WORD = re.compile(r"[^\W_]+")
_HANGUL = re.compile(r"[가-힣]")


@dataclass(frozen=True, slots=True)
class Reading:
    """What two texts say to the painter.

    `text` and `against` are the normalised prompt and negative prompt; `words` the prompt's words, each with its senses;
    `senses` those of them that are not `unwanted`, in order.
    """

    text: str
    against: str
    words: Sequence[tuple[str, tuple[str, ...]]]
    senses: Sequence[str]
    unwanted: set[str]


def read(prompt: str, negative_prompt: str | None) -> Reading:
    """Read both texts."""
    text, against = normalise(prompt), normalise(negative_prompt or "")
    words = [(word, senses(word)) for word in _WORD.findall(text)]
    unwanted = {sense for word in _WORD.findall(against) for sense in senses(word)}
    wanted = [sense for _, found in words for sense in found if sense not in unwanted]
    return Reading(text, against, words, wanted, unwanted)


def normalise(text: str) -> str:
    """One spelling for each text: composed (NFKC), without case, single spaces. Composed and decomposed Hangul meet here."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@cache
def _stems() -> dict[str, tuple[str, ...]]:
    """Each word of the lexicon with all its senses."""
    stems: dict[str, tuple[str, ...]] = {}
    for sense, words in LEXICON.items():
        for word in words.split():
            stems[word] = (*stems.get(word, ()), sense)
    return stems


def senses(word: str) -> tuple[str, ...]:
    """What a word means to the painter; empty if nothing.

    English words may carry a plural or an adjective's ending. Korean words are stems with particles behind them, or
    several stems run together (밤바다): a one-syllable stem counts only where all of the word is understood, because 달 is
    the moon and 달리는 is running.
    """
    stems = _stems()
    if word in stems:
        return stems[word]
    if not _HANGUL.search(word):
        for ending in ENGLISH_ENDINGS:
            if word.endswith(ending) and word[: -len(ending)] in stems:
                return stems[word[: -len(ending)]]
        return ()
    if word in LOOKALIKES:
        return ()
    found: tuple[str, ...] = ()
    rest, all_long = word, True
    while rest and rest not in PARTICLES:
        stem = next((rest[:length] for length in range(min(6, len(rest)), 0, -1) if rest[:length] in stems), "")
        if not stem:
            return found if all_long else ()
        found += stems[stem]
        all_long = all_long and len(stem) > 1
        rest = rest[len(stem) :]
    return found
