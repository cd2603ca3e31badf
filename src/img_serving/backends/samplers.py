"""Samplers and noise schedules under the names that different engines' users give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from img_serving.domain.vocabulary import Vocabulary

MOST_PAIRS = 20_000
"""A server with more samplers and schedules than any has does not get their product."""


def samplers_with_schedules(
    samplers: Iterable[str], aliases: Mapping[str, str], schedules: Vocabulary | None
) -> Vocabulary:
    """The samplers, also found by the older names that carry a schedule at their end, such as `DPM++ 2M Karras`."""
    known = tuple(samplers)
    spelled = dict(aliases)
    if schedules is not None and (len(known) + len(aliases)) * len(schedules.spellings) <= MOST_PAIRS:
        spellings = [*((name, name) for name in known), *aliases.items()]
        for schedule in schedules.spellings:
            for spelling, name in spellings:
                spelled.setdefault(f"{spelling} {schedule}", name)
    return Vocabulary(known, spelled)


def sampler_and_schedule(
    sampler: str | None, schedule: str | None, samplers: Vocabulary | None, schedules: Vocabulary | None
) -> tuple[str | None, str | None]:
    """The engine's own names for what was asked for; a schedule at the end of a sampler's name counts where none is given.

    What is not known stays as it was: routing has refused it where the lists are known.
    """
    own_schedule = schedule if schedule is None or schedules is None else schedules.find(schedule) or schedule
    if sampler is None or samplers is None:
        return sampler, own_schedule
    own_sampler = samplers.find(sampler)
    if own_sampler is None:
        return sampler, own_schedule
    if own_schedule is None and schedules is not None and not samplers.is_own(sampler):
        own_schedule = next(
            (
                schedules.find(spelling)
                for spelling in sorted(schedules.spellings, key=len, reverse=True)
                if samplers.matches(sampler, f"{own_sampler} {spelling}")
                or (
                    # the sampler in front of it may itself be under another name
                    samplers.matches(sampler[-len(spelling) :], spelling)
                    and samplers.find(sampler[: -len(spelling)]) == own_sampler
                )
            ),
            None,
        )
    return own_sampler, own_schedule
