"""The scene: decides from words, seed and guidance what a picture shows, before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.colours import Colour
from img_serving.engines.procedural.lexicon import HOMES, HUES, PLACES, STYLES, TIMES
from img_serving.engines.procedural.limits import DEFAULT_GUIDANCE
from img_serving.engines.procedural.palette import palette
from img_serving.engines.procedural.words import Reading, read

_GROUNDED = {"mountain", "sea", "lake", "forest", "city", "desert", "hills", "flower"}
"""Places with a sky over them: together with space, it is their sky that is full of stars."""

_HORIZONS = {"sea": 0.54, "desert": 0.52, "flower": 0.50, "city": 0.74, "sky": 0.86}
_LIGHT_HEIGHTS = {"day": 0.30, "dawn": 0.72, "sunset": 0.80, "dusk": 0.96, "night": 0.38}
_STARS = {"night": 0.75, "dusk": 0.22, "space": 1.0}


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows, as decided by words, seed and guidance; nothing in it depends on size or steps.

    `place` is the main place, `places` all of them. `horizon` is a height `v`; `light` the sun's or moon's place (X in
    shorter sides from the middle, v). Amounts (`stars`, `clouds` …) go from 0 to 1. `avoided` names hues to keep out.
    `force` is how strongly words drive: 1.0 at the default guidance. `key` starts every random stream of the picture.
    """

    key: str
    place: str
    places: frozenset[str]
    time: str
    styles: frozenset[str]
    colours: dict[str, Colour]
    avoided: tuple[str, ...]
    force: float
    horizon: float
    light: tuple[float, float]
    sun: bool
    moon: bool
    stars: float
    clouds: float
    aurora: float
    mist: float
    snow: float
    fireflies: bool
    planet: bool
    beach: bool
    lighthouse: bool
    rough: float
    drift: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def water(self) -> bool:
        """Whether the lower part is water."""
        return bool(self.places & {"sea", "lake"})


@dataclass(frozen=True, slots=True)
class _Draws:
    """The draws of one scene: those that the words rule together with the seed, and those of the seed alone."""

    reading: Reading
    seed: int

    def spread(self, name: str) -> float:
        """A draw of the words' own, -0.5 to 0.5."""
        return chance(name, self.reading.text, self.reading.against, self.seed) - 0.5

    def base(self, name: str) -> float:
        """A draw that only the seed rules, 0 to 1."""
        return chance(name, self.seed)


def compose(prompt: str, negative_prompt: str | None, seed: int, guidance: float) -> Scene:
    """Read the words: what is there, in which light and in which colours.

    The seed rules forms and positions, the words what the forms are; every word the lexicon does not know leans colour and
    composition a little, in its own direction.
    """
    reading = read(prompt, negative_prompt)
    unwanted, draws = reading.unwanted, _Draws(reading, seed)
    force = 2.0 * guidance / (guidance + DEFAULT_GUIDANCE)
    places, wanted = _places(reading)
    place = places[0]
    time = "space" if place == "space" else _time(reading.senses, wanted, unwanted, f"{seed}:{reading.text}")
    styles = frozenset(style for style in STYLES if style in wanted)
    horizon = _horizon(places, draws)
    sun, moon = _sun_and_moon(time, wanted, unwanted, draws)
    stars = 0.0 if "stars" in unwanted else 1.0 if "stars" in wanted else _STARS.get(time, 0.0)
    return Scene(
        key=f"{seed}",
        place=place,
        places=frozenset(places),
        time=time,
        styles=styles,
        colours=palette(reading, time, styles, force, seed),
        avoided=tuple(name for name in HUES if name in unwanted),
        force=force,
        horizon=horizon,
        light=_light(time, horizon, draws),
        sun=sun,
        moon=moon,
        stars=stars,
        clouds=0.0 if "clouds" in unwanted else _clouds(time, wanted, styles, draws),
        aurora=1.0 if "aurora" in wanted else 0.0,
        mist=0.0 if "mist" in unwanted else 1.0 if "mist" in wanted else 0.35 + 0.3 * draws.base("mist"),
        snow=1.0 if "snow" in wanted else 0.0 if "snow" in unwanted else 0.35 * (draws.base("snow") > 0.4),
        fireflies="fireflies" in wanted,
        planet="planet" in wanted or (place == "space" and "planet" not in unwanted and draws.base("planet") < 0.6),
        beach="beach" in wanted,
        lighthouse="lighthouse" in wanted,
        rough=0.85 + 0.5 * draws.base("rough") + 0.3 * draws.spread("rough"),
        drift=(draws.spread("drift x") * 0.9, draws.spread("drift y") * 0.9),
    )


def _places(reading: Reading) -> tuple[list[str], frozenset[str]]:
    """The places, the main one first, and all that is wanted, with what the places bring."""
    wanted = frozenset(reading.senses)
    places = [sense for sense in reading.senses if sense in PLACES]
    if "planet" in wanted and not places:
        places = ["space"]
    if "lighthouse" in wanted and not set(places) & {"sea", "lake", "abstract"} and "sea" not in reading.unwanted:
        places = ["sea", *places]
    if not places or set(places) == {"sky"}:
        homes = (home for sense in reading.senses for home in HOMES.get(sense, ()))
        places += [home for home in homes if home not in reading.unwanted]
    if not places or set(places) == {"sky"}:
        places = _default_places(reading.text, wanted, reading.unwanted, only_sky=bool(places))
    if "space" in places and set(places) & _GROUNDED:
        wanted |= {"stars", "night"} if not wanted & set(TIMES) else {"stars"}
        places = [one for one in places if one != "space"]
    return places, wanted


def _horizon(places: Sequence[str], draws: _Draws) -> float:
    horizon = _HORIZONS.get(places[0], 0.62)
    if set(places) & {"sea", "lake"}:
        horizon = 0.58 if len(set(places)) > 1 else 0.54
    horizon += 0.05 * (draws.base("horizon") - 0.5) + 0.03 * draws.spread("horizon")
    return horizon


def _light(time: str, horizon: float, draws: _Draws) -> tuple[float, float]:
    """Where the sun or the moon stands."""
    side = (draws.base("light x") - 0.5) * 0.72 + 0.16 * draws.spread("light x")
    height = _LIGHT_HEIGHTS.get(time, 0.35)
    height += 0.14 * (draws.base("light y") - 0.5) + 0.08 * draws.spread("light y")
    return (side, horizon * height)


def _sun_and_moon(time: str, wanted: frozenset[str], unwanted: set[str], draws: _Draws) -> tuple[bool, bool]:
    """Which of them is seen."""
    dark = time in {"night", "dusk", "space"}
    moon = "moon" in wanted or (
        time == "night" and "moon" not in unwanted and "aurora" not in wanted and draws.base("moon") < 0.45
    )
    sun = (not moon and not dark and "sun" not in unwanted) or ("sun" in wanted and time != "night")
    return sun and "sun" not in unwanted, moon and "moon" not in unwanted


def _clouds(time: str, wanted: frozenset[str], styles: frozenset[str], draws: _Draws) -> float:
    clouds = 0.30 + 0.40 * draws.base("clouds") + 0.2 * draws.spread("clouds")
    clouds = 0.95 if "clouds" in wanted else clouds * (0.45 if time == "night" else 1.0)
    return clouds * 0.25 if "minimal" in styles else clouds


def _default_places(text: str, wanted: Iterable[str], unwanted: set[str], *, only_sky: bool) -> list[str]:
    """Where no word names a place: the text chooses, so the same words stay in the same place with every seed."""
    if only_sky:
        return ["sky", "hills"] if "hills" not in unwanted else ["sky"]
    if "aurora" in wanted:
        choices = [["mountain", "lake"], ["forest", "lake"], ["mountain"]]
    elif "snow" in wanted:
        choices = [["mountain", "forest"], ["forest"], ["mountain", "lake"]]
    elif "neon" in wanted:
        choices = [["city"], ["mountain"], ["city", "sea"]]
    else:
        choices = [
            ["mountain", "lake"],
            ["sea"],
            ["hills", "forest"],
            ["flower"],
            ["forest", "lake"],
            ["desert"],
            ["mountain"],
            ["hills"],
        ]
    allowed = [choice for choice in choices if not unwanted & set(choice)]
    allowed = allowed or [[place] for place in PLACES if place not in unwanted] or [["abstract"]]
    return allowed[int(chance("place", text) * len(allowed))]


def _time(senses: Sequence[str], wanted: Iterable[str], unwanted: set[str], key: str) -> str:
    """The time of day: the first that is named, else one that fits what is named, else any."""
    named = [sense for sense in senses if sense in TIMES]
    if named:
        return named[0]
    if {"moon", "stars", "aurora", "fireflies"} & set(wanted) and "night" not in unwanted:
        return "night"
    likely = ["sunset", "day", "dawn", "sunset", "dusk", "day"] if "dark" not in wanted else ["dusk", "night"]
    allowed = [time for time in likely if time not in unwanted] or [time for time in TIMES if time not in unwanted]
    return allowed[int(chance("time", key) * len(allowed))] if allowed else "day"
