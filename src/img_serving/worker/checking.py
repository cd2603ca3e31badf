"""Whether what an engine says of itself makes sense: found out when it is loaded, and not by its first callers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any, get_args

from img_serving.domain.capabilities import PARAMETERS, Capabilities, SizeRule
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import Operation, OutputFormat
from img_serving.domain.vocabulary import Vocabulary
from img_serving.media.sniff import SIDE_LIMIT
from img_serving.wire.generation import MAX_ITEMS


def checked(can: object) -> Capabilities:
    """What `capabilities()` returned, if it can be used.

    Raises:
        AttemptError: it cannot; the message names the field, what is wrong, and what would be right.
    """
    fault = _fault_of(can)
    if fault is not None or not isinstance(can, Capabilities):
        raise AttemptError(Outcome.FAILED, f"capabilities() of the engine cannot be used: {fault}")
    return can


def _fault_of(can: object) -> str | None:
    if not isinstance(can, Capabilities):
        return f"it returned {type(can).__name__}, not img_serving.domain.capabilities.Capabilities"
    if not _is_count(can.max_batch_size, MAX_ITEMS):
        return f"max_batch_size is from 1 to {MAX_ITEMS}, not {can.max_batch_size!r}"
    if not _is_count(can.max_images, MAX_ITEMS):
        return f"max_images is from 1 to {MAX_ITEMS}, not {can.max_images!r}"
    if can.max_steps is not None and not _is_count(can.max_steps, 2**31):
        return f"max_steps is a number of steps, or None, not {can.max_steps!r}"
    sizes: object = can.sizes  # people write what they like, whatever the record says
    if not isinstance(sizes, SizeRule):
        return f"sizes is a SizeRule, such as SizeRule(multiple=8, max_side=2048), not {sizes!r}"
    if can.default_size is not None and not _is_size(can.default_size):
        return f"default_size is (width, height) in pixels of 1 to {SIDE_LIMIT}, not {can.default_size!r}"
    for name, words, known in (
        ("operations", can.operations, get_args(Operation)),
        ("honours", can.honours, PARAMETERS),
        ("honours_in_edits", can.honours_in_edits or (), PARAMETERS),
        ("formats", can.formats, get_args(OutputFormat)),
    ):
        fault = _unknown(name, words, known)
        if fault is not None:
            return fault
    lists: tuple[tuple[str, object], ...] = (("samplers", can.samplers), ("schedulers", can.schedulers))
    for name, vocabulary in lists:
        if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
            return f"{name} is a Vocabulary, such as Vocabulary(['Euler', 'DDIM']), not {type(vocabulary).__name__}"
    return None


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and 1 <= value <= most


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_count(side, SIDE_LIMIT) for side in value)


def _unknown(name: str, words: Iterable[Any], known: Collection[str]) -> str | None:
    for word in words:
        if word not in known:
            near = [one for one in sorted(known) if str(word) in one][:1]
            near = near or difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"{name} has {word!r}, which there is not; {hint}(known: {', '.join(sorted(known))})"
    return None
