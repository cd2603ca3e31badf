"""The procedural painter: draws skies, landscapes, seas, cities and space from the words, with no model behind them.

It is honest about what it is: a small lexicon (English and Korean) turns words into scenes, lights, colours and styles;
a word it does not know still bends colour and form, always in the same way. Every random number comes from BLAKE2b and
from the raw PCG64 stream, and the arithmetic keeps to operations that IEEE 754 rounds exactly (no sine, no power), so
equal inputs give equal bytes. All fields are float32.

How a picture comes about:
    words -> `Scene` (what is there, and in which colours)
    steps -> `_Latent` (a flow that folds the noise, detail that grows, grain that fades): small, whatever the picture
    both  -> `_Canvas` (backdrop at reduced resolution; ridges, lights and water at full resolution, in bands of rows
             that stay in the processor's cache, so memory is the finished picture plus little)

Coordinates: `X` and `Y` are centred and in units of the shorter side, so a scene is the same at every size; `v` is the
height in the picture, from 0 (top) to 1 (bottom).
"""

# Fields are changed in place while looping over their three channels, and drawing takes coordinates in the usual order.
# ruff: noqa: PLW2901, PLR0917

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from colorsys import hsv_to_rgb, rgb_to_hsv
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import blake2b
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import SEED_LIMIT, Call
from img_serving.engines.engine import GenerationCancelled, IsCancelled, OnStep
from img_serving.media.png import encode_png

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:

    class _Numpy:
        """Stands in for numpy until its first use, which puts the real one here: start-up does not pay for it."""

        def __getattr__(self, name: str) -> Any:
            globals()["np"] = numpy = import_module("numpy")
            return getattr(numpy, name)

    np = _Numpy()

MODEL = "procedural"
MIN_SIDE, MAX_SIDE, MAX_PIXELS = 16, 4096, 2048 * 2048
DEFAULT_STEPS, MAX_STEPS = 20, 1000
DEFAULT_GUIDANCE = 7.0

Colour = tuple[float, float, float]
Preview = Callable[[int, "Array"], None]
"""Given the number of steps done and a small uint8 picture [h, w, 3] of how it looks by then."""


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LEXICON: dict[str, str] = {
    # colours
    "red": "red crimson scarlet ruby cherry 빨간 빨강 빨갛 붉은 붉게 적색 진홍 다홍 autumn maple 단풍",
    "orange": "orange amber tangerine copper 주황 주홍 오렌지 autumn 가을 단풍",
    "yellow": "yellow lemon 노란 노랑 노랗 황색 레몬 개나리 유채",
    "gold": "gold golden honey 금색 금빛 황금 골드",
    "green": "green emerald jade lime olive 초록 녹색 연두 푸른숲 에메랄드 청록",
    "cyan": "cyan teal turquoise aqua 청록 하늘색 옥색 민트 mint",
    "blue": "blue azure navy sapphire cobalt indigo 파란 파랑 파랗 푸른 푸르 남색 청색 쪽빛",
    "purple": "purple violet lavender lilac magenta 보라 자주 자주색 라벤더 lavenders",
    "pink": "pink rose blush sakura 분홍 핑크 장미 벚꽃 연분홍",
    "white": "white ivory pearl 하얀 하양 하얗 흰 흰색 백색 순백",
    "black": "black ebony obsidian 검은 검정 까만 까맣 흑색",
    "brown": "brown sepia chocolate bronze 갈색 밤색 고동색 세피아",
    "grey": "grey gray silver 회색 은색 은빛 잿빛",
    # times of day
    "day": "day daylight noon midday daytime sunny summer 낮 한낮 대낮 정오 여름 맑은",
    "dawn": "dawn sunrise morning daybreak 새벽 일출 아침 여명 해돋이 동틀 봄날",
    "sunset": "sunset sundown evening 노을 석양 일몰 저녁 해질 저녁노을 황혼",
    "dusk": "dusk twilight gloaming 땅거미 어스름 해거름 박명",
    "night": "night midnight nocturnal nighttime moonlit moonlight starry 밤 한밤 야경 야간 심야 밤하늘 달밤 달빛 별빛",
    # places
    "sea": "sea ocean seascape coast beach shore waves wave lagoon island bay 바다 대양 해변 바닷가 해안 파도 섬 물결",
    "lake": "lake river pond water reflection reflections fjord lakeside 호수 강 강가 연못 물 물가 반영 호숫가",
    "beach": "beach shore seashore 해변 바닷가 모래사장",
    "mountain": "mountain mount alps alpine peak peaks cliff fjord himalaya everest 산 산맥 봉우리 설산 산봉우리 절벽 알프스",
    "hills": "hill countryside valley field fields landscape 언덕 들판 골짜기 계곡 초원 시골 풍경",
    "forest": "forest woods woodland tree trees pine jungle taiga 숲 나무 소나무 침엽수 밀림 정글 산림",
    "city": "city town skyline cityscape urban skyscraper metropolis cyberpunk seoul tokyo "
    "도시 시내 서울 빌딩 고층 마천루 야경 도심",
    "desert": "desert dune sahara sand 사막 모래 모래언덕 사구 사하라",
    "flower": "flower floral blossom bloom tulip daisy garden meadow poppy rose lavender sakura "
    "꽃 꽃밭 벚꽃 장미 튤립 정원 들꽃 코스모스 라벤더 개나리 유채",
    "sky": "sky skies heaven 하늘 창공 밤하늘",
    "space": "space nebula galaxy cosmos cosmic universe outer interstellar 우주 은하 성운 은하계 갤럭시",
    "planet": "planet saturn jupiter mars ringed 행성 토성 목성 화성",
    "abstract": "abstract marble fluid swirl pattern silk ink psychedelic 추상 추상화 대리석 무늬 소용돌이 패턴",
    # lights and weather
    "sun": "sun sunlight sunshine 태양 햇살 햇빛 해",
    "moon": "moon moonlit moonlight crescent lunar 달 보름달 달빛 달밤 초승달 반달",
    "stars": "star starry starlight constellation milkyway 별 별빛 별들 별자리 은하수 별이",
    "aurora": "aurora borealis northern-lights 오로라 극광",
    "clouds": "cloud cloudy overcast cumulus storm stormy 구름 먹구름 뭉게구름 흐린 폭풍",
    "mist": "mist misty fog foggy haze hazy 안개 물안개 연무 아지랑이",
    "snow": "snow snowy winter ice frozen glacier blizzard 눈 눈밭 눈꽃 겨울 설산 설경 얼음 빙하 눈보라",
    "fireflies": "firefly fireflies lantern lanterns magical 반딧불 반딧불이 등불 풍등",
    # moods and styles
    "minimal": "minimal minimalist minimalism simple clean 미니멀 단순한 간결한 심플",
    "watercolor": "watercolor watercolour aquarelle 수채화 수채",
    "neon": "neon synthwave cyberpunk retrowave vaporwave 네온 사이버펑크",
    "pastel": "pastel soft gentle 파스텔 부드러운 은은한",
    "dark": "dark gloomy moody gothic noir 어두운 어둡 음산한 캄캄한",
    "vivid": "vivid vibrant colorful colourful saturated 선명한 화려한 강렬한",
    "mono": "monochrome noir greyscale grayscale 흑백 모노크롬 수묵화 수묵",
    "dreamy": "dreamy dream ethereal fantasy magical surreal 몽환 몽환적 꿈 꿈같은 환상",
    "vintage": "vintage retro nostalgic 빈티지 레트로 옛날",
}
"""What the painter understands: a sense, and the words (English stems, Korean stems) that carry it."""

HUES: dict[str, Colour] = {
    "red": (0.86, 0.11, 0.13),
    "orange": (0.96, 0.48, 0.12),
    "yellow": (0.98, 0.84, 0.20),
    "gold": (0.92, 0.68, 0.26),
    "green": (0.14, 0.62, 0.28),
    "cyan": (0.12, 0.72, 0.74),
    "blue": (0.13, 0.34, 0.86),
    "purple": (0.50, 0.20, 0.78),
    "pink": (0.96, 0.48, 0.66),
    "white": (0.95, 0.96, 0.98),
    "black": (0.05, 0.05, 0.07),
    "brown": (0.45, 0.28, 0.17),
    "grey": (0.50, 0.52, 0.55),
}
TIMES = ("day", "dawn", "sunset", "dusk", "night")
PLACES = ("sea", "lake", "mountain", "hills", "forest", "city", "desert", "flower", "sky", "space", "abstract")
STYLES = ("minimal", "watercolor", "neon", "pastel", "dark", "vivid", "mono", "dreamy", "vintage")

_ENDINGS = """
    이 가 은 는 을 를 의 에 에서 와 과 도 로 으로 에는 에게 위 위에 위의 위로 속 속의 속에
    아래 들 들이 들의 빛 색 색의 빛의 이다 있는 까지 부터
    처럼 같은 앞 앞의 뒤 옆 옆의 사이 가득한 인 한 게 고 진 적 적인 풍 풍의
"""
_PARTICLES = frozenset(_ENDINGS.split())
_LOOKALIKES = frozenset(("눈물", "눈빛", "해물", "산물"))
"""Made of known syllables, but about something else: tears, a gaze, seafood, a product."""
_SMALL_WORDS = """
    a an the of in on at by with and or over under to from is are it its as for into near very beautiful
    그 저 및 아주 매우
"""
_STOP_WORDS = frozenset(_SMALL_WORDS.split())
_WORD = re.compile(r"[^\W_]+")
_HANGUL = re.compile(r"[가-힣]")


def _normalise(text: str) -> str:
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


def _senses(word: str) -> tuple[str, ...]:
    """What a word means to the painter; empty if nothing.

    English words may carry a plural or an adjective's ending. Korean words are stems with particles behind them, or
    several stems run together (밤바다): a one-syllable stem counts only where all of the word is understood, because 달 is
    the moon and 달리는 is running.
    """
    stems = _stems()
    if word in stems:
        return stems[word]
    if not _HANGUL.search(word):
        for ending in ("s", "es", "y", "ish", "lit", "side", "scape"):
            if word.endswith(ending) and word[: -len(ending)] in stems:
                return stems[word[: -len(ending)]]
        return ()
    if word in _LOOKALIKES:
        return ()
    found: tuple[str, ...] = ()
    rest, all_long = word, True
    while rest and rest not in _PARTICLES:
        stem = next((rest[:length] for length in range(min(6, len(rest)), 0, -1) if rest[:length] in stems), "")
        if not stem:
            return found if all_long else ()
        found += stems[stem]
        all_long = all_long and len(stem) > 1
        rest = rest[len(stem) :]
    return found


def _key(*parts: object) -> bytes:
    """A stable 16-byte name for a stream of random numbers."""
    return blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _chance(*parts: object) -> float:
    """A random number in [0, 1) that belongs to these parts: named draws do not depend on the order of drawing."""
    return int.from_bytes(_key(*parts)[:6], "little") / 2**48


# ── The scene ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_ROLES = ("top", "mid", "low", "horizon", "glow", "lit", "shade", "far", "near", "water")
_TIME_COLOURS: dict[str, tuple[str, ...]] = {
    # in the order of _ROLES: the sky from its top to the horizon, light, cloud in light and shade, land far and near, water
    "day": ("2263b5", "5b9bdb", "a9d0ee", "e6f1f2", "fff4d8", "ffffff", "9fb4d0", "8fb0c4", "1f4238", "2a6f8f"),
    "dawn": ("3a5fa8", "8f93d6", "f7a9a8", "ffdca8", "ffedc2", "ffd3bd", "8b7fc0", "a58cc0", "232a52", "5f83b8"),
    "sunset": ("2b2359", "8d3b74", "f0744f", "ffc46b", "ffd98f", "ff9a6b", "6a3569", "9a5072", "1b0f2a", "5a3a63"),
    "dusk": ("131a47", "3d3b82", "a3659b", "f2a58c", "ffc9a3", "c184a8", "2f2d66", "5c5590", "0f1230", "333a70"),
    "night": ("050a1f", "0d1c42", "1c3763", "35598a", "dfeaff", "5b79a6", "142446", "274468", "050b18", "10284a"),
    "neon": ("0b0224", "2c0750", "a3137f", "ff4f9a", "ffb03b", "ff5fc4", "35105f", "4d1d86", "070114", "2b0a55"),
    "space": ("03030c", "070718", "0a0a22", "0d0d2b", "fff1dc", "7d6bd0", "17103a", "2c2352", "06050f", "10103a"),
}
_EXTRA_COLOURS = {
    "flower": "ef5f8a",
    "flower2": "ffd166",
    "aurora": "3df0a2",
    "aurora2": "9a5cff",
    "moon": "f6f1de",
    "sun": "fff3cf",
    "window": "ffd58a",
    "window2": "9fd8ff",
    "sand": "e8b878",
    "snow": "f3f7ff",
    "leaf": "2f6b3a",
    "planet": "d99a6c",
}
_TARGETS = {
    # which colour roles a colour word reaches when it stands before one of these nouns
    "sky": ("top", "mid", "low", "lit"),
    "sea": ("water",),
    "lake": ("water",),
    "mountain": ("far", "near"),
    "hills": ("far", "near", "leaf"),
    "forest": ("far", "near", "leaf"),
    "city": ("window", "window2", "near"),
    "desert": ("sand", "far", "near"),
    "flower": ("flower", "flower2"),
    "moon": ("moon", "glow"),
    "sun": ("sun", "glow", "horizon"),
    "stars": ("glow",),
    "aurora": ("aurora", "aurora2"),
    "clouds": ("lit", "shade"),
    "planet": ("planet",),
    "space": ("lit", "shade", "mid"),
    "sunset": ("low", "horizon", "glow", "lit"),
    "dawn": ("low", "horizon", "glow", "lit"),
    "night": ("top", "mid"),
}


_PAINTED = (
    "mid",
    "low",
    "far",
    "lit",
    "horizon",
    "near",
    "top",
    "glow",
    "water",
    "shade",
    "flower",
    "leaf",
    "sand",
    "aurora",
)
"""The roles that colour words without a noun share, so ordered that neighbours in a picture take different colours."""
_LEANING = (("top", "mid", "water"), ("low", "glow", "lit", "horizon"), ("far", "near", "leaf", "shade"))
"""What a word outside the lexicon leans: one of these groups."""


def _rgb(text: str) -> Colour:
    """A colour from six hex digits, each channel from 0 to 1."""
    return (int(text[0:2], 16) / 255, int(text[2:4], 16) / 255, int(text[4:6], 16) / 255)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` (0 to 1) of the second colour in the first."""
    return (
        first[0] + (second[0] - first[0]) * share,
        first[1] + (second[1] - first[1]) * share,
        first[2] + (second[2] - first[2]) * share,
    )


def _light_of(colour: Colour) -> float:
    """Luma (Rec. 601), 0 to 1."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _tint(colour: Colour, towards: Colour, strength: float) -> Colour:
    """Towards another hue; brightness follows only halfway, so that a red night is still a night."""
    here, there = _light_of(colour), max(_light_of(towards), 0.02)
    wanted = 0.62 * here + 0.38 * there
    if wanted <= there:
        tinted = _mix((0.0, 0.0, 0.0), towards, wanted / there)
    else:
        tinted = _mix(towards, (1.0, 1.0, 1.0), (wanted - there) / (1.0 - there + 1e-6) * 0.8)
    return _mix(colour, tinted, strength)


def _turn(colour: Colour, turns: float, saturation: float = 1.0) -> Colour:
    """Rotate the hue by a share of the circle and scale the saturation."""
    hue, old, value = rgb_to_hsv(*colour)
    return hsv_to_rgb((hue + turns) % 1.0, min(1.0, old * saturation), value)


def _distance(first: Colour, second: Colour) -> float:
    """How far apart two hues are, as a share of the circle with its sign, -0.5 to 0.5."""
    return (rgb_to_hsv(*first)[0] - rgb_to_hsv(*second)[0] + 0.5) % 1.0 - 0.5


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
    rough: float
    drift: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def water(self) -> bool:
        """Whether the lower part is water."""
        return bool(self.places & {"sea", "lake"})


def compose(prompt: str, negative_prompt: str | None, seed: int, guidance: float) -> Scene:
    """Read the words: what is there, in which light and in which colours.

    The seed rules forms and positions, the words what the forms are; every word the lexicon does not know leans colour and
    composition a little, in its own direction.
    """
    text, against = _normalise(prompt), _normalise(negative_prompt or "")
    force = 2.0 * guidance / (guidance + DEFAULT_GUIDANCE)
    words = [(word, _senses(word)) for word in _WORD.findall(text)]
    unwanted = {sense for word in _WORD.findall(against) for sense in _senses(word)}
    senses = [sense for _, found in words for sense in found if sense not in unwanted]
    wanted = frozenset(senses)
    key = f"{seed}"

    places = [sense for sense in senses if sense in PLACES]
    if "planet" in wanted and not places:
        places = ["space"]
    if not places or (set(places) == {"sky"} and "sky" in places):
        places = _default_places(text, wanted, unwanted, only_sky=bool(places))
    place = places[0]
    if "space" in places and set(places) & {"mountain", "sea", "lake", "forest", "city", "desert", "hills", "flower"}:
        wanted |= {"stars", "night"} if not wanted & set(TIMES) else {"stars"}
        places = [one for one in places if one != "space"]
        place = places[0]
    time = _time(senses, wanted, unwanted, f"{seed}:{text}")
    if place == "space":
        time = "space"

    def spread(name: str) -> float:
        """A draw of the words' own, -0.5 to 0.5."""
        return _chance(name, text, against, seed) - 0.5

    def base(name: str) -> float:
        """A draw that only the seed rules."""
        return _chance(name, seed)

    horizon = {"sea": 0.54, "desert": 0.52, "flower": 0.50, "city": 0.74, "sky": 0.86}.get(place, 0.62)
    if set(places) & {"sea", "lake"}:
        horizon = 0.58 if len(set(places)) > 1 else 0.54
    horizon += 0.05 * (base("horizon") - 0.5) + 0.03 * spread("horizon")
    dark = time in {"night", "dusk", "space"}
    moon = "moon" in wanted or (
        time == "night" and "moon" not in unwanted and "aurora" not in wanted and base("moon") < 0.45
    )
    sun = (not moon and not dark and "sun" not in unwanted) or ("sun" in wanted and time != "night")
    side = (base("light x") - 0.5) * 0.72 + 0.16 * spread("light x")
    height = {"day": 0.30, "dawn": 0.72, "sunset": 0.80, "dusk": 0.96, "night": 0.38}.get(time, 0.35)
    height += 0.14 * (base("light y") - 0.5) + 0.08 * spread("light y")
    styles = frozenset(style for style in STYLES if style in wanted)
    stars = {"night": 0.75, "dusk": 0.22, "space": 1.0}.get(time, 0.0)
    stars = 0.0 if "stars" in unwanted else 1.0 if "stars" in wanted else stars
    clouds = 0.30 + 0.40 * base("clouds") + 0.2 * spread("clouds")
    clouds = 0.95 if "clouds" in wanted else clouds * (0.45 if time == "night" else 1.0)
    if "minimal" in styles:
        clouds *= 0.25
    return Scene(
        key=key,
        place=place,
        places=frozenset(places),
        time=time,
        styles=styles,
        colours=_palette(words, unwanted, against, text, time, styles, force, seed),
        avoided=tuple(name for name in HUES if name in unwanted),
        force=force,
        horizon=horizon,
        light=(side, horizon * height),
        sun=sun and "sun" not in unwanted,
        moon=moon and "moon" not in unwanted,
        stars=stars,
        clouds=0.0 if "clouds" in unwanted else clouds,
        aurora=1.0 if "aurora" in wanted else 0.0,
        mist=0.0 if "mist" in unwanted else 1.0 if "mist" in wanted else 0.35 + 0.3 * base("mist"),
        snow=1.0 if "snow" in wanted else 0.0 if "snow" in unwanted else 0.35 * (base("snow") > 0.4),
        fireflies="fireflies" in wanted,
        planet="planet" in wanted or (place == "space" and "planet" not in unwanted and base("planet") < 0.6),
        beach="beach" in wanted,
        rough=0.85 + 0.5 * base("rough") + 0.3 * spread("rough"),
        drift=(spread("drift x") * 0.9, spread("drift y") * 0.9),
    )


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
            ["abstract"],
            ["sea"],
            ["hills", "forest"],
            ["abstract"],
            ["desert"],
            ["mountain"],
        ]
    allowed = [choice for choice in choices if not unwanted & set(choice)]
    allowed = allowed or [[place] for place in PLACES if place not in unwanted] or [["abstract"]]
    return allowed[int(_chance("place", text) * len(allowed))]


def _time(senses: Sequence[str], wanted: Iterable[str], unwanted: set[str], key: str) -> str:
    """The time of day: the first that is named, else one that fits what is named, else any."""
    named = [sense for sense in senses if sense in TIMES]
    if named:
        return named[0]
    if {"moon", "stars", "aurora", "fireflies"} & set(wanted) and "night" not in unwanted:
        return "night"
    likely = ["sunset", "day", "dawn", "sunset", "dusk", "day"] if "dark" not in wanted else ["dusk", "night"]
    allowed = [time for time in likely if time not in unwanted] or [time for time in TIMES if time not in unwanted]
    return allowed[int(_chance("time", key) * len(allowed))] if allowed else "day"


def _palette(
    words: Sequence[tuple[str, tuple[str, ...]]],
    unwanted: set[str],
    against: str,
    text: str,
    time: str,
    styles: frozenset[str],
    force: float,
    seed: int,
) -> dict[str, Colour]:
    """The colour of every role: the time's, leaned by words, turned away from what is unwanted, graded by guidance."""
    names = _TIME_COLOURS["neon" if "neon" in styles and time != "space" else time]
    colours = {role: _rgb(code) for role, code in zip(_ROLES, names, strict=True)}
    colours |= {role: _rgb(code) for role, code in _EXTRA_COLOURS.items()}
    if "neon" in styles:
        colours |= {"window": _rgb("ff5fd2"), "window2": _rgb("3df2ff"), "sand": _rgb("5a1d86"), "leaf": _rgb("35107a")}
    if time == "space":  # every nebula has two colours of its own
        hue = _chance("nebula", seed, text)
        colours["lit"] = hsv_to_rgb(hue, 0.62, 0.95)
        colours["shade"] = hsv_to_rgb((hue + 0.22 + 0.3 * _chance("nebula 2", seed)) % 1.0, 0.75, 0.55)
        colours["planet"] = hsv_to_rgb((hue + 0.45) % 1.0, 0.45, 0.9)
    dim = {"night": 0.05, "dusk": 0.58, "sunset": 0.75, "dawn": 0.85, "neon": 0.4}.get(time, 1.0)
    for role in ("flower", "flower2", "sand", "snow", "leaf"):  # what is lit by the sky takes the sky's colour
        light = 0.28 + 0.72 * max(dim, 0.45 if role == "snow" else 0.0)
        lit = _mix((0.0, 0.0, 0.0), colours[role], light)
        colours[role] = _mix(
            lit, colours["lit" if role == "snow" else "mid"], (0.55 if role == "snow" else 0.22) * (1.1 - dim)
        )

    turn = 0.05 * (_chance("turn", text) - 0.5) + 0.05 * (_chance("turn", seed) - 0.5)
    if against:
        turn += math.copysign(0.018 + 0.03 * _chance("away", against), _chance("side", against) - 0.5)
    colours = {role: _turn(colour, turn) for role, colour in colours.items()}

    strength = min(1.0, 0.85 * force)
    loose: list[str] = []
    for index, (word, found) in enumerate(words):
        noun = _noun_near(words, index)
        for name in (sense for sense in found if sense in HUES and sense not in unwanted):
            if noun is None:
                loose.append(name)
            for role in _TARGETS[noun] if noun else ():
                colours[role] = _tint(colours[role], HUES[name], strength)
        if not found and word not in _STOP_WORDS:
            lean = hsv_to_rgb(_chance("hue", word), 0.75, 0.85)
            share = min(0.6, 0.30 * force) / (1.0 + 0.12 * index)
            for role in _LEANING[int(_chance("role", word) * len(_LEANING))]:
                colours[role] = _turn(colours[role], _distance(lean, colours[role]) * share, 1.0 + 0.3 * share)
    for number, role in enumerate(_PAINTED if loose else ()):  # several colours share the roles, they do not mix to mud
        name = loose[number % len(loose)]
        colours[role] = _tint(colours[role], HUES[name], strength * 0.85)
    return {role: _grade(colour, unwanted, styles, force) for role, colour in colours.items()}


def _noun_near(words: Sequence[tuple[str, tuple[str, ...]]], index: int) -> str | None:
    """What a colour word at `index` colours: the first known thing of its own or the next two words, else the one before."""
    for _, found in (*words[index : index + 3], *words[max(0, index - 1) : index]):  # "red sea", and "하늘은 빨갛게"
        for sense in found:
            if sense in _TARGETS:
                return sense
    return None


def _grade(colour: Colour, unwanted: set[str], styles: frozenset[str], force: float) -> Colour:
    """One colour after unwanted hues, styles and guidance."""
    for name in unwanted & HUES.keys():
        if name in {"white", "black", "grey", "brown"}:
            continue
        apart = _distance(colour, HUES[name])
        if abs(apart) < 0.12:
            colour = _turn(colour, math.copysign(0.17 - abs(apart), apart), 0.85)
    saturation = 0.30 + 0.70 * force
    light = _light_of(colour)
    if "vivid" in styles:
        saturation *= 1.3
    if "mono" in styles:
        saturation = 0.0
    colour = _mix((light, light, light), colour, saturation)
    if "pastel" in styles or "watercolor" in styles:
        colour = _mix(colour, _mix((1.0, 0.98, 0.97), colour, 0.25), 0.52)
    if "dreamy" in styles:
        colour = _mix(colour, (0.86, 0.72, 0.92), 0.16)
    if "vintage" in styles:
        light = _light_of(colour)
        colour = _mix(colour, (0.10 + 0.88 * light, 0.08 + 0.78 * light, 0.10 + 0.58 * light), 0.6)
    if "dark" in styles:
        colour = _mix(colour, (0.01, 0.01, 0.03), 0.48)
    return (min(1.0, max(0.0, colour[0])), min(1.0, max(0.0, colour[1])), min(1.0, max(0.0, colour[2])))


# ── Noise ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _draws(key: bytes, count: int) -> Array:
    """Random numbers, float32 [count] in [0, 1): 16 bits each of the raw PCG64 stream, which numpy promises to keep."""
    raw = np.random.PCG64(int.from_bytes(key, "little")).random_raw((count + 3) // 4)
    return np.asarray(raw, "<u8").view("<u2")[:count] * np.float32(1 / 65536)


def _lattice(key: bytes, size: int) -> Array:
    """White noise, [size, size] in [-1, 1)."""
    grid = _draws(key, size * size).reshape(size, size)
    grid *= 2.0
    grid -= 1.0
    return grid


def _double(grid: Array) -> Array:
    """Twice the size by the quadratic B-spline (weights 3/4 and 1/4), wrapping around."""
    for axis in (0, 1):
        shape = list(grid.shape)
        shape[axis] *= 2
        out = np.empty(shape, np.float32)
        own = grid * np.float32(0.75)
        grid = grid * np.float32(0.25)
        even, odd = (out[0::2], out[1::2]) if axis == 0 else (out[:, 0::2], out[:, 1::2])
        np.add(own, np.roll(grid, 1, axis), out=even)
        np.add(own, np.roll(grid, -1, axis), out=odd)
        grid = out
    return grid


def _tile(key: str, size: int, detail: float, *, gain: float = 0.55, coarsest: int = 4) -> Array:
    """Fractal noise that wraps around, [size, size], about -1 to 1.

    Each octave has a stream of its own: a larger tile is the same noise with more detail. `detail` (0 to 1) says how many
    octaves are there yet.
    """
    grid = _lattice(_key(key, coarsest), coarsest)
    amplitude, octave = 1.0, 0
    while grid.shape[0] < size:
        grid = _double(grid)
        amplitude *= gain
        octave += 1
        weight = min(1.0, max(0.0, detail * 8.0 + 1.0 - octave))
        if weight:
            noise = _lattice(_key(key, grid.shape[0]), grid.shape[0])
            noise *= amplitude * weight
            grid += noise
    grid *= 1.15
    return grid


def _sample(tile: Array, u: Array, v: Array) -> Array:
    """The tile at (u, v), any shape, in units of the tile, wrapping around; bilinear."""
    size = tile.shape[0]
    x, y = u * np.float32(size), v * np.float32(size)
    left, top = np.floor(x), np.floor(y)
    x -= left
    y -= top
    column, row = left.astype(np.intp), top.astype(np.intp)
    column &= size - 1
    row &= size - 1
    row *= size
    beside = (column + 1) & (size - 1)
    below = (row + size) & (size * size - 1)
    flat = tile.reshape(-1)
    upper, lower = flat.take(row + column, mode="clip"), flat.take(below + column, mode="clip")
    upper += (flat.take(row + beside, mode="clip") - upper) * x
    lower += (flat.take(below + beside, mode="clip") - lower) * x
    lower -= upper
    lower *= y
    upper += lower
    return upper


def _stretch(tile: Array, u: Array, v: Array) -> Array:
    """The wrapped tile on a grid of columns u [w] and rows v [h]: [h, w]. Separable, so cheaper than `_sample`."""
    return _lerp(_lerp(tile, v * np.float32(tile.shape[0]), 0), u * np.float32(tile.shape[1]), 1)


def _lerp(grid: Array, at: Array, axis: int) -> Array:
    """Linear interpolation at positions `at` (in cells) along an axis, wrapping around."""
    size = grid.shape[axis]
    low = np.floor(at)
    share = (at - low).astype(np.float32)
    index = low.astype(np.intp) % size
    if axis == 0:
        share = share[:, None]
    first: Array = grid.take(index, axis, mode="clip")
    second = grid.take((index + 1) % size, axis, mode="clip")
    second -= first
    second *= share
    first += second
    return first


def _profile(key: str, x: Array, detail: float, *, octaves: int = 7, ridged: bool = False, gain: float = 0.5) -> Array:
    """A line of hills over x [w], about -1 to 1 (ridged: 0 to 1, with sharp tops). One unit of x is one large hill."""
    total = np.zeros_like(x)
    weight: Array | float = 1.0
    amplitude = 1.0
    for octave in range(octaves):
        share = min(1.0, max(0.0, detail * octaves + 1.0 - octave))
        if not share:
            break
        lattice = _draws(_key(key, octave), 256)
        at = x * np.float32(2**octave) + np.float32(17.3 * octave + 64.0)
        low = np.floor(at)
        part = at - low
        if not ridged:
            part = part * part * (3.0 - 2.0 * part)
        index = low.astype(np.intp) & 255
        first = lattice.take(index)
        value = first + (lattice.take((index + 1) & 255) - first) * part
        value = value * 2.0 - 1.0
        if ridged:
            value = 1.0 - np.abs(value)
            value *= value * weight
            weight = np.minimum(value * 1.6, 1.0)
        total += value * np.float32(amplitude * share)
        amplitude *= gain
    return total * np.float32(0.6)


def _smooth(low: float, high: float, x: Array) -> Array:
    """0 below `low`, 1 above `high`, an S between; a new array."""
    t: Array = (x - np.float32(low)) * np.float32(1.0 / (high - low))
    np.clip(t, 0.0, 1.0, out=t)
    smooth: Array = t * t * (3.0 - 2.0 * t)
    return smooth


# ── Steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Latent:
    """What the steps refine, 64 x 64 whatever the size of the picture.

    Each step carries every point a little further along a flow (so clouds curl and nebulae fold), lets finer octaves in
    and takes grain away. A picture of few steps is soft and grainy; one of many is folded, detailed and clean.
    """

    SIZE = 64

    def __init__(self, scene: Scene, steps: int) -> None:
        potential = _tile(f"{scene.key}:flow", self.SIZE, 0.5, gain=0.42, coarsest=4)
        across = np.roll(potential, -1, 0) - np.roll(potential, 1, 0)
        down = np.roll(potential, 1, 1) - np.roll(potential, -1, 1)
        self.velocity = (across, down)  # the curl of a potential: nothing is compressed, only stirred
        cells = (np.arange(self.SIZE, dtype=np.float32) + np.float32(0.5)) / np.float32(self.SIZE)
        self.home = (
            np.broadcast_to(cells, (self.SIZE, self.SIZE)),
            np.broadcast_to(cells[:, None], (self.SIZE, self.SIZE)),
        )
        self.warp = (np.zeros_like(potential), np.zeros_like(potential))
        self.stride = 0.64 / (steps + 12.0)
        self.done = 0

    def advance(self) -> None:
        """One step."""
        u, v = self.home[0] + self.warp[0], self.home[1] + self.warp[1]
        for warp, velocity in zip(self.warp, self.velocity, strict=True):
            moved = _sample(velocity, u, v)
            moved *= np.float32(self.stride)
            warp += moved
        self.done += 1

    @property
    def detail(self) -> float:
        """How many octaves are there, 0 to 1."""
        return self.done / (self.done + 5.0)

    @property
    def grain(self) -> float:
        """How much noise is left."""
        return 0.36 / (self.done * (1.0 + self.done / 30.0))


# ── The canvas ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One range of land, in front of what was drawn before.

    `crest` [w]: its outline, in rows. Colours run from `top` to `foot` within `span` rows below the outline. `relief` is
    how strongly the ground's light and shadow show; `snow` how far below the highest top (rows) snow lies; `rim` whether
    the outline glows. `face` [w]: how much of the ground below lies in shadow. `windows`: per column the share of the
    pixel that is window and the window's number, then the pitch in pixels and a draw for each window.
    """

    crest: Array
    top: Colour
    foot: Colour
    span: float
    relief: float = 0.0
    snow: float = 0.0
    rim: float = 0.0
    face: Array | None = None
    windows: tuple[Array, Array, float, Array] | None = None

    def covers(self, first: int) -> bool:
        """Whether nothing behind it shows from row `first` on."""
        return float(self.crest.max()) + 1.0 <= first


class _Canvas:
    """One picture of a scene in one state of its latent, at one size. Thrown away after `paint`."""

    def __init__(self, scene: Scene, latent: _Latent, width: int, height: int) -> None:
        self.scene, self.latent = scene, latent
        self.width, self.height, self.side = width, height, min(width, height)
        self.detail = latent.detail
        self.x = self._axis(width, width)
        self.y = self._axis(height, height)
        self.v = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height)
        # the backdrop has no hard edges: a quarter of a million points are enough for any size
        coarse = max(1.0, math.sqrt(width * height / 270_000))
        self.columns, self.rows = max(4, round(width / coarse)), max(4, round(height / coarse))
        self.gx, self.gy = self._axis(self.columns, width), self._axis(self.rows, height)
        self.gv = (np.arange(self.rows, dtype=np.float32) + np.float32(0.5)) / np.float32(self.rows)
        self.tile_size = 512 if self.side > 400 else 256 if self.side > 160 else 128
        self.horizon = min(height, max(1, round(scene.horizon * height)))
        self.ringed = _chance("ring", scene.key) < 0.6
        self.open = scene.place in {"space", "abstract", "sky"} and len(scene.places) == 1

    def _axis(self, count: int, extent: int) -> Array:
        """Centred coordinates in units of the shorter side, for `count` points over `extent` pixels."""
        points = np.arange(count, dtype=np.float32) + np.float32(0.5 - count / 2)
        return points * np.float32(extent / count / self.side)

    def _tile(self, name: str, **how: Any) -> Array:
        return _tile(f"{self.scene.key}:{name}", self.tile_size, self.detail, **how)

    def paint(self) -> Array:
        """Draw: uint8 [height, width, 3]."""
        scene = self.scene
        image = np.empty((self.height, self.width, 3), np.uint8)
        backdrop = self._widen(self._backdrop())
        layers, fronts = self._land()
        relief = self._relief() if any(layer.relief or layer.snow for layer in layers + fronts) else None
        waves = self._waves() if scene.water else None
        stars = self._stars()
        noise = _draws(_key(scene.key, "dither"), 256 * 256).reshape(256, 256)
        self.dither = np.tile(noise, (1, self.width // 256 + 1))[:, : self.width]
        self.paper = self._paper() if "watercolor" in scene.styles else None
        self.residue = self._residue()
        if scene.planet:
            lines = np.linspace(-4.0, 4.0, 1024, dtype=np.float32)
            self.belts = _profile(f"{scene.key}:belts", lines, self.detail, octaves=5, gain=0.7)
            self.swirl = _tile(f"{scene.key}:swirl", 128, self.detail)

        step = max(8, min(128, 65536 // self.width))
        edges = {*range(0, self.height, step), self.height}
        if waves is not None:
            edges.add(self.horizon)  # water mirrors finished rows: no band may have both
        for first, last in pairwise(sorted(edges)):
            if waves is not None and first >= self.horizon:
                planes = self._water(image, waves, first, last)
                self._compose(planes, fronts, relief, first, last)
            else:
                planes = self._compose_all(
                    backdrop, layers + ([] if waves is not None else fronts), relief, stars, first, last
                )
            self._finish(planes, image, first, last)
        self._sprinkle(image)
        return image

    # the backdrop

    def _backdrop(self) -> Array:
        """The sky, or all of an open picture: [3, rows, columns]."""
        if self.scene.place == "abstract" and self.open:
            return self._abstract()
        share = 1.0 if self.open else self.scene.horizon
        rows = min(self.rows, math.ceil(self.rows * share) + 2)
        if self.scene.time == "space":
            return self._nebula(rows)
        return self._sky(rows)

    def _warped(self, rows: int, scale: float) -> tuple[Array, Array]:
        """The latent's displacement on the backdrop's grid: two of [rows, columns]."""
        u, v = self.gx * np.float32(0.5) + np.float32(0.5), self.gy[:rows] * np.float32(0.5) + np.float32(0.5)
        first, second = (_stretch(warp, u, v) for warp in self.latent.warp)
        first *= np.float32(scale)
        second *= np.float32(scale)
        return first, second

    def _gradient(self, at: Array, stops: Sequence[tuple[float, Colour]]) -> Array:
        """Colours along `at` [n]: [3, n, 1]."""
        places = [place for place, _ in stops]
        planes = [np.interp(at, places, [colour[channel] for _, colour in stops]) for channel in range(3)]
        return np.stack(planes).astype(np.float32)[:, :, None]

    def _sky(self, rows: int) -> Array:
        scene, colours = self.scene, self.scene.colours
        t = self.gv[:rows] / np.float32(scene.horizon)
        stops = [(0.0, colours["top"]), (0.42, colours["mid"]), (0.80, colours["low"]), (1.0, colours["horizon"])]
        planes = np.repeat(self._gradient(t, stops), self.columns, axis=2)
        x, y = self.gx[None, :], self.gv[:rows, None]
        down = np.float32(self.height / self.side)
        dx, dy = x - np.float32(scene.light[0]), (y - np.float32(scene.light[1])) * down
        if scene.sun or scene.moon or scene.time in {"dawn", "sunset", "dusk"}:
            distance = dx * dx
            distance = distance * np.float32(0.45) + dy * dy
            wide = 0.10 if not scene.moon else 0.02
            glow = np.float32(wide) / (distance + np.float32(wide))
            near = np.float32(0.0035) / (distance + np.float32(0.0035))
            power = 0.62 if scene.sun else 0.34
            glow *= glow
            glow *= np.float32(power)
            glow += near * np.float32(0.5 if scene.sun else 0.38 if scene.moon else 0.0)
            np.minimum(glow, 1.0, out=glow)
            for plane, channel in zip(planes, colours["glow"], strict=True):
                plane += (np.float32(channel) - plane) * glow
        if scene.stars > 0.5 and scene.time == "night" and scene.clouds < 0.9:
            self._milky_way(planes, x, y)
        if scene.clouds > 0.05:
            self._clouds(planes, rows, dx, dy)
        if scene.aurora:
            self._aurora(planes, y)
        return planes

    def _clouds(self, planes: Array, rows: int, dx: Array, dy: Array) -> None:
        """A deck of clouds in perspective, lit from where the light is."""
        scene, colours = self.scene, self.scene.colours
        t = np.minimum(self.gv[:rows, None] / np.float32(scene.horizon), np.float32(1.0))
        depth = 1.0 / (1.16 - t)
        warp_x, warp_y = self._warped(rows, 0.8)
        u = self.gx[None, :] * (depth * np.float32(0.20)) + np.float32(scene.drift[0])
        u += warp_x
        v = warp_y
        v += depth * np.float32(0.42) + np.float32(scene.drift[1])
        density = _sample(self._tile("cloud", gain=0.56), u, v)
        edge = 0.30 - 0.95 * scene.clouds
        cover = _smooth(edge, edge + 0.70, density)
        slope_x, slope_y = np.zeros_like(density), np.zeros_like(density)
        fine = np.float32(self.rows / 512 * 2.2)
        np.subtract(density[:, 2:], density[:, :-2], out=slope_x[:, 1:-1])
        np.subtract(density[2:], density[:-2], out=slope_y[1:-1])
        # towards the light, from each point; the square root keeps it a direction
        reach = np.sqrt(dx * dx + dy * dy) + np.float32(0.15)
        lit = slope_x * dx
        lit += slope_y * dy
        lit *= fine * np.float32(1.6)
        lit /= reach
        lit += np.float32(0.56)
        lit -= density * np.float32(0.30)
        near = np.float32(0.10) / (dx * dx + dy * dy + np.float32(0.10))
        lit += near * np.float32(0.35)
        np.clip(lit, 0.0, 1.0, out=lit)
        cover *= np.float32(0.90) - t * t * np.float32(0.45)
        for plane, light, shade in zip(planes, colours["lit"], colours["shade"], strict=True):
            colour = lit * np.float32(light - shade)
            colour += np.float32(shade)
            colour -= plane
            colour *= cover
            plane += colour

    def _milky_way(self, planes: Array, x: Array, y: Array) -> None:
        scene = self.scene
        lean = np.float32(0.6 + 0.6 * _chance("lean", scene.key))
        rows = planes.shape[1]
        grain = _stretch(self._tile("dust", gain=0.62), self.gx * np.float32(0.8), self.gy[:rows] * np.float32(0.8))
        across = (x * lean + (y - np.float32(0.28)) * np.float32(1.3)) + grain * np.float32(0.10)
        band = np.float32(0.018) / (across * across + np.float32(0.018))
        band *= band
        band *= np.clip(grain * np.float32(0.55) + np.float32(0.62), 0.0, 1.2)
        for plane, channel in zip(planes, (0.30, 0.34, 0.50), strict=True):
            plane += band * np.float32(channel * scene.stars)

    def _aurora(self, planes: Array, y: Array) -> None:
        """Three curtains: sharp below, fading upwards, with rays along the field lines."""
        scene, colours = self.scene, self.scene.colours
        for curtain in range(3):
            name = f"{scene.key}:aurora{curtain}"
            line = _profile(name, self.gx * np.float32(0.9) + np.float32(scene.drift[0]), min(0.45, self.detail))
            rays = _profile(
                name + "rays", self.gx * np.float32(5.0) + line * np.float32(2.0), self.detail, gain=0.75, octaves=5
            )
            low = np.float32(scene.horizon * (0.46 + 0.17 * curtain)) + line * np.float32(0.17)
            above = low[None, :] - y
            tall = np.float32(scene.horizon) * (np.float32(0.52) + rays * np.float32(0.22))
            fade = 1.0 - above / tall[None, :]
            np.clip(fade, 0.0, 1.0, out=fade)
            fade *= fade
            fade *= np.clip(above * np.float32(38.0) + np.float32(0.6), 0.0, 1.0)
            fade *= np.clip(rays * np.float32(0.75) + np.float32(0.62), 0.05, 1.3)[None, :]
            fade *= np.float32(0.95 - 0.2 * curtain)
            turn = np.clip(above * np.float32(2.6), 0.0, 1.0)
            for plane, foot, crown in zip(planes, colours["aurora"], colours["aurora2"], strict=True):
                shine = turn * np.float32(crown - foot)
                shine += np.float32(foot)
                shine *= fade
                plane += shine * (1.0 - plane)

    def _nebula(self, rows: int) -> Array:
        """Two gases and the dust before them."""
        scene, colours = self.scene, self.scene.colours
        stops = [(0.0, colours["top"]), (0.5, colours["mid"]), (1.0, colours["low"])]
        planes = np.repeat(self._gradient(self.gv[:rows], stops), self.columns, axis=2)
        warp_x, warp_y = self._warped(rows, 2.6)
        u = warp_x + self.gx[None, :] * np.float32(0.55) + np.float32(scene.drift[0])
        v = warp_y + self.gy[:rows, None] * np.float32(0.55) + np.float32(scene.drift[1])
        gas = self._tile("gas", gain=0.58, coarsest=2)
        first = _sample(gas, u, v)
        v += first * np.float32(0.08)
        second = _sample(gas, v + np.float32(0.37), u * np.float32(1.2))
        folds = 1.0 - np.abs(second + first * np.float32(0.3)) * np.float32(1.5)
        np.clip(folds, 0.0, 1.0, out=folds)
        folds *= folds
        lean = np.float32(_chance("lean", scene.key) - 0.5) * 2
        across = self.gx[None, :] * lean + self.gy[:rows, None] + first * np.float32(0.25)
        band = np.float32(0.16) / (across * across + np.float32(0.16))
        body = _smooth(-0.55, 1.0, first)
        body *= band
        filaments = folds * band
        core = body * body * body
        dust = 1.0 - np.clip(second * np.float32(1.3) - np.float32(0.25), 0.0, 0.85)
        for plane, light, shade, hot in zip(planes, colours["lit"], colours["shade"], (1.0, 0.92, 0.85), strict=True):
            shine = body * np.float32(shade * 1.15)
            shine += filaments * np.float32(light * 0.55)
            shine *= dust
            shine += core * np.float32(hot * 0.9)
            plane += shine * (1.0 - plane)
        return planes

    def _abstract(self) -> Array:
        """Folded silk: noise displaced by noise, coloured along its height and lit from one side."""
        scene, colours = self.scene, self.scene.colours
        warp_x, warp_y = self._warped(self.rows, 2.4)
        scale = np.float32(0.40 * scene.rough)
        u = warp_x + self.gx[None, :] * scale + np.float32(scene.drift[0])
        v = warp_y + self.gy[:, None] * scale + np.float32(scene.drift[1])
        cloth = self._tile("cloth", gain=0.40, coarsest=2)
        first = _sample(cloth, u, v)
        u += first * np.float32(0.16)
        v -= first * np.float32(0.12)
        value = _sample(cloth, v + np.float32(0.41), u)
        value *= np.float32(0.75)
        value += first * np.float32(0.45)
        order = ("top", "mid", "low", "glow", "shade", "lit", "near", "low", "water", "top")
        ramp = self._gradient(
            np.arange(1024, dtype=np.float32) / np.float32(1024),
            [(place / (len(order) - 1), colours[role]) for place, role in enumerate(order)],
        )[:, :, 0]
        index = ((value * np.float32(0.95 + 0.25 * scene.force) + np.float32(scene.drift[0] + 4.0)) * 1024).astype(
            np.intp
        ) & 1023
        slope = np.zeros_like(value)
        np.subtract(value[1:, 1:], value[:-1, :-1], out=slope[1:, 1:])
        slope *= np.float32(self.rows / 512 * 13.0)
        np.clip(slope, -0.75, 0.75, out=slope)
        shine = np.maximum(slope - np.float32(0.22), 0.0)
        shine *= shine
        slope *= np.float32(0.55)
        slope += 1.0
        planes = np.empty((3, self.rows, self.columns), np.float32)
        for plane, channel in zip(planes, ramp, strict=True):
            channel.take(index, out=plane, mode="clip")
            plane *= slope
            plane += shine
        return planes

    def _widen(self, planes: Array) -> tuple[Array, Array, Array]:
        """The backdrop at full width, and for each row of the picture the row below which it lies and by how much."""
        at = (np.arange(self.width, dtype=np.float32) + np.float32(0.5)) * np.float32(
            self.columns / self.width
        ) - np.float32(0.5)
        np.clip(at, 0.0, self.columns - 1.0, out=at)
        left = np.minimum(at.astype(np.intp), self.columns - 2)
        share = at - left.astype(np.float32)
        wide = planes.take(left, 2, mode="clip")
        for plane, narrow in zip(wide, planes, strict=True):
            beside = narrow.take(left + 1, 1, mode="clip")
            beside -= plane
            beside *= share
            plane += beside
        down = (np.arange(self.height, dtype=np.float32) + np.float32(0.5)) * np.float32(
            self.rows / self.height
        ) - np.float32(0.5)
        np.clip(down, 0.0, planes.shape[1] - 1.0, out=down)
        row = np.minimum(down.astype(np.intp), planes.shape[1] - 2)
        return wide, row, (down - row.astype(np.float32))[:, None]

    # land

    def _land(self) -> tuple[list[_Layer], list[_Layer]]:
        """The ranges from far to near, and those that stand before the water."""
        scene = self.scene
        if self.open and scene.place != "sky":
            return [], []
        layers: list[_Layer] = []
        fronts: list[_Layer] = []
        flat = "minimal" in scene.styles
        if "mountain" in scene.places:
            layers += self._mountains(3 if flat else 4 if len(scene.places) > 1 else 5)
        if "desert" in scene.places:
            layers += self._dunes()
        if scene.places & {"hills", "flower"}:
            layers += self._hills()
        if "city" in scene.places:
            layers += self._skyline()
        if "forest" in scene.places:
            layers += self._woods(2 if scene.water or flat else 4)
        if not layers and (not scene.water or _chance("island", scene.key) < 0.6):
            layers += self._coast()
        if scene.water and scene.beach:
            fronts += self._sand()
        elif scene.water and scene.places & {"forest", "mountain"} and not flat:
            fronts += self._shore()
        return layers, fronts

    def _depths(self, count: int, first: float, last: float) -> list[tuple[float, float]]:
        """For each range: nearness (0 to 1), and the height `v` of its foot."""
        last = min(last, self.scene.horizon + 0.004) if self.scene.water else last
        first = min(first, last)
        return [(i / max(1, count - 1), first + (last - first) * (i / max(1, count - 1)) ** 2) for i in range(count)]

    def _layer(self, crest: Array, near: float, *, span: float, colour: str = "", **more: Any) -> _Layer:
        """A range with its outline in `v`; the farther, the more it takes the colour of the air."""
        scene, colours = self.scene, self.scene.colours
        top = _mix(colours["far"], colours[colour or "near"], near)
        air = _mix(colours["horizon"], colours["low"], 0.35)
        if scene.snow >= 1.0 and not more.get("windows"):
            top = _mix(top, colours["snow"], 0.62)
        top = _mix(top, air, 0.30 * (1.0 - near))
        foot = _mix(top, air, (0.25 + 0.6 * scene.mist) * (1.0 - 0.80 * near))
        rim = 0.9 if "neon" in scene.styles else 0.0
        return _Layer(crest * np.float32(self.height), top, foot, span * self.height, rim=rim, **more)

    def _mountains(self, count: int) -> list[_Layer]:
        scene = self.scene
        layers = []
        alone = scene.places <= {"mountain", "sky"}
        for i, (near, foot) in enumerate(
            self._depths(count, scene.horizon - 0.05, 0.97 if alone else scene.horizon + 0.05)
        ):
            x = self.x * np.float32(1.5 + 0.5 * near) + np.float32(scene.drift[0] * (0.4 + near) + 3.1 * i)
            peaks = _profile(
                f"{scene.key}:range{i}", x, self.detail, octaves=8, ridged=True, gain=0.46 * min(1.15, scene.rough)
            )
            lone = 1.0 / (
                1.0 + (self.x - np.float32(0.55 * (_chance("peak", scene.key, i) - 0.5))) ** 2 * np.float32(3.0)
            )
            tall = (0.50 - 0.30 * near) * (0.80 if scene.water else 1.0) * (1.0 if alone else 0.9)
            crest = np.float32(foot) - peaks * (np.float32(0.45) + lone * np.float32(0.65)) * np.float32(tall)
            snow = (0.62 if scene.snow >= 1.0 else 0.40 if scene.snow and near < 0.6 else 0.0) * (
                foot - float(crest.min())
            )
            layers.append(
                self._layer(
                    crest,
                    near,
                    span=0.30 - 0.08 * near,
                    relief=0.0 if "minimal" in scene.styles else 0.07 + 0.07 * near,
                    snow=snow * self.height,
                )
            )
        return layers

    def _dunes(self) -> list[_Layer]:
        scene, layers = self.scene, []
        for i, (near, foot) in enumerate(self._depths(5, scene.horizon + 0.01, 0.93)):
            x = self.x * np.float32(1.5 - 0.5 * near) + np.float32(scene.drift[0] + 5.3 * i)
            swell = _profile(f"{scene.key}:dune{i}", x, min(0.3, self.detail), octaves=2, gain=0.25)
            edge = _profile(f"{scene.key}:edge{i}", x + swell * np.float32(0.25), 0.2, octaves=1, ridged=True)
            crest = np.float32(foot) - swell * np.float32(0.03) - edge * np.float32(0.11 + 0.15 * near)
            layer = self._layer(crest, 0.25 + 0.75 * near, span=0.16 + 0.16 * near, colour="sand", relief=0.07)
            slope = np.gradient(crest).astype(np.float32) * np.float32(
                self.side * (1.0 if scene.light[0] > 0 else -1.0)
            )
            face = _smooth(-0.05, 0.25, -slope)
            top = _mix(layer.top, scene.colours["glow"], 0.35 * (1.0 - near))
            shadow = _mix(scene.colours["sand"], scene.colours["near"], 0.30 + 0.42 * near)
            layers.append(
                replace(layer, top=_mix(top, scene.colours["sand"], 0.6), foot=shadow, face=face * np.float32(0.9))
            )
        return layers

    def _hills(self) -> list[_Layer]:
        scene, layers = self.scene, []
        for i, (near, foot) in enumerate(self._depths(5, scene.horizon, 0.86)):
            x = self.x * np.float32(1.25 - 0.5 * near) + np.float32(scene.drift[0] + 2.7 * i)
            swell = _profile(f"{scene.key}:hill{i}", x, min(0.42, self.detail), octaves=5, gain=0.36)
            crest = np.float32(foot) - swell * np.float32(0.075)
            if i >= 3:
                crest -= self._spikes(f"grass{i}", 700, 0.012 + 0.02 * near, 0.22, serrated=False)
            layers.append(self._layer(crest, near, span=0.26, colour="leaf", relief=0.07 + 0.08 * near))
        return layers

    def _woods(self, count: int) -> list[_Layer]:
        scene, layers = self.scene, []
        for i, (near, foot) in enumerate(self._depths(count, scene.horizon + 0.02, 1.02)):
            x = self.x * np.float32(1.1) + np.float32(scene.drift[0] + 1.9 * i)
            ground = _profile(f"{scene.key}:wood{i}", x, min(0.4, self.detail), octaves=4)
            trees = self._spikes(
                f"tree{i}", round(90 - 44 * near), 0.07 + 0.17 * near * (0.5 if scene.water else 1.0), 0.17
            )
            crest = np.float32(foot) - ground * np.float32(0.05) - trees
            layers.append(self._layer(crest, near, span=0.17 + 0.05 * near, relief=0.10 if near < 0.9 else 0.0))
        return layers

    def _spikes(self, name: str, count: int, tall: float, slim: float, *, serrated: bool = True) -> Array:
        """Trees (or grass) as a height over each column, in `v`: `count` to a shorter side, each at most `tall`."""
        count = max(3, round(count * self.width / self.side))
        draws = _draws(_key(self.scene.key, name), 2 * 4096).reshape(2, 4096)
        heights = np.zeros(self.width, np.float32)
        for tree in range(count):
            # placed from the middle outwards, so that a wider picture has the same trees and more at its sides
            slot = (tree + 1) // 2 * (1 if tree % 2 else -1)
            jitter, size = float(draws[0, tree % 4096]), float(draws[1, tree % 4096])
            middle = self.width / 2 + (slot + jitter * 1.6 - 0.8) / count * self.width
            height = tall * (0.45 + 0.55 * size)
            half = height * slim * self.height
            first, last = max(0, math.floor(middle - half)), min(self.width, math.ceil(middle + half) + 1)
            if last <= first or half < 0.2:
                continue
            away = np.abs(np.arange(first, last, dtype=np.float32) + np.float32(0.5 - middle)) / np.float32(half)
            shape = 1.0 - away
            if serrated:
                twigs = away * np.float32(7.0) + np.float32(size)
                shape += (twigs - np.floor(twigs) - np.float32(0.5)) * np.float32(0.20 * min(1.0, self.detail * 1.5))
            np.maximum(heights[first:last], shape * np.float32(height), out=heights[first:last])
        return heights

    def _skyline(self) -> list[_Layer]:
        scene, layers = self.scene, []
        for i, (near, foot) in enumerate(self._depths(3, scene.horizon + 0.01, 1.0)):
            pitch = 0.0105 + 0.004 * near
            crest = np.full(self.width, foot + 0.02, np.float32)
            cover, number = np.zeros(self.width, np.float32), np.zeros(self.width, np.intp)
            draws = _draws(_key(scene.key, "city", i), 4096)
            extent = self.width / self.side / 2
            for side in (1, -1):
                at, block = 0.0 if side > 0 else -0.001, 0
                while abs(at) < extent and block < 400:
                    wide = pitch * (4 + int(float(draws[(block * 3 + 700 * (side > 0)) % 4096]) * (6 + 3 * near)))
                    size = float(draws[(block * 3 + 1 + 700 * (side > 0)) % 4096])
                    crowd = 1.0 / (1.0 + 2.2 * (at - scene.light[0] * 0.5) ** 2)
                    tall = (0.07 + 0.36 * size * size * crowd) * (1.0 - 0.35 * near)
                    left, right = (at, at + wide * 0.94) if side > 0 else (at - wide * 0.94, at)
                    first, last = round((left + extent) * self.side), round((right + extent) * self.side)
                    first, last = max(0, first), min(self.width, last)
                    if last > first:
                        crest[first:last] = foot - tall
                        if size > 0.8 and last - first > 4:  # a mast
                            mast = (first + last) // 2
                            crest[mast : mast + max(1, self.side // 700)] = foot - tall * 1.16
                        inside = (self.x[first:last] - np.float32(left)) / np.float32(pitch)
                        whole = np.floor(inside)
                        cover[first:last] = self._coverage(inside - whole, pitch)
                        number[first:last] = whole.astype(np.intp) + 37 * block + 11 * (side > 0)
                    at += side * wide
                    block += 1
            lit = _draws(_key(scene.key, "windows", i), 256 * 256).reshape(256, 256)
            windows = (cover, number, pitch * self.side, lit) if i else None
            layers.append(self._layer(crest, near, span=0.40, windows=windows))
        return layers

    def _coverage(self, at: Array, pitch: float) -> Array:
        """How much of a pixel is window, where a window is the middle half of each pitch."""
        soft = 1.0 / max(1.0, pitch * self.side)
        return np.clip((0.27 - np.abs(at - np.float32(0.5))) / np.float32(soft) + np.float32(0.5), 0.0, 1.0)

    def _coast(self) -> list[_Layer]:
        scene, layers = self.scene, []
        for i, (near, foot) in enumerate(self._depths(2, scene.horizon - 0.004, 0.95)):
            x = self.x * np.float32(0.8) + np.float32(scene.drift[0] + 7.7 * i)
            swell = _profile(f"{scene.key}:coast{i}", x, self.detail, octaves=7, gain=0.42)
            crest = np.float32(foot + 0.015) - np.maximum(swell - np.float32(0.12), np.float32(-0.2)) * np.float32(0.10)
            layers.append(self._layer(crest, 0.25 + 0.3 * near, span=0.10))
        return layers

    def _sand(self) -> list[_Layer]:
        scene = self.scene
        curve = _profile(f"{scene.key}:beach", self.x * np.float32(0.8), min(0.4, self.detail), octaves=4, gain=0.3)
        lean = np.float32(0.16 if scene.light[0] < 0 else -0.16)
        crest = np.float32(0.85) - curve * np.float32(0.07) - self.x * lean + self.x * self.x * np.float32(0.22)
        foam = self._layer(crest - np.float32(0.012), 0.9, span=0.02, colour="snow")
        foam = replace(foam, top=_mix(foam.top, scene.colours["horizon"], 0.5), foot=scene.colours["sand"], rim=0.0)
        sand = self._layer(crest, 0.9, span=0.22, colour="sand", relief=0.10)
        dry = _mix(scene.colours["sand"], scene.colours["glow"], 0.15)
        return [foam, replace(sand, top=_mix(scene.colours["sand"], scene.colours["near"], 0.4), foot=dry)]

    def _shore(self) -> list[_Layer]:
        """Dark firs at both sides of the foreground: a frame."""
        scene = self.scene
        out = np.abs(self.x * np.float32(2.0 * self.side / self.width) + np.float32(scene.light[0] * 0.5))
        bank = _smooth(0.25, 1.2, out) * np.float32(0.22)
        trees = self._spikes("frame", 46, 0.20, 0.16) * _smooth(0.35, 0.75, out)
        rough = _profile(f"{scene.key}:bank", self.x * np.float32(2.0), self.detail, octaves=7) * np.float32(0.02)
        crest = np.float32(1.06) - bank - trees - rough
        return [replace(self._layer(crest, 1.0, span=0.5), foot=_mix(scene.colours["near"], (0.0, 0.0, 0.0), 0.4))]

    def _relief(self) -> Array:
        """Light and shadow of the ground, [tile, width], to be read with rows wrapping around."""
        tile = self._tile("relief", gain=0.52, coarsest=8)
        ridges = np.abs(tile)
        step = max(1, self.tile_size // 128)
        slope = ridges - np.roll(ridges, (step, step if self.scene.light[0] < 0 else -step), (0, 1))
        slope *= np.float32(2.6)
        np.clip(slope, -1.0, 1.0, out=slope)
        return _lerp(slope, (self.x + np.float32(8.0)) * np.float32(0.9 * self.tile_size), 1)

    def _relief_rows(self, relief: Array, first: int, last: int, shift: int) -> Array:
        at = (self.y[first:last] + np.float32(8.0 + 0.37 * shift)) * np.float32(0.9 * self.tile_size)
        return _lerp(relief, at, 0)

    # bands of rows

    def _compose_all(
        self,
        backdrop: tuple[Array, Array, Array],
        layers: list[_Layer],
        relief: Array | None,
        stars: tuple[Array, ...] | None,
        first: int,
        last: int,
    ) -> Array:
        planes = np.zeros((3, last - first, self.width), np.float32)
        if not any(layer.covers(first) for layer in layers):
            wide, row, share = backdrop
            for plane, source in zip(planes, wide, strict=True):
                upper = source.take(row[first:last], 0, mode="clip")
                np.subtract(source.take(row[first:last] + 1, 0, mode="clip"), upper, out=plane)
                plane *= share[first:last]
                plane += upper
            if stars is not None:
                self._shine(planes, stars, first, last)
            self._bodies(planes, first, last)
        self._compose(planes, layers, relief, first, last)
        return planes

    def _compose(self, planes: Array, layers: list[_Layer], relief: Array | None, first: int, last: int) -> None:
        start = max((i for i, layer in enumerate(layers) if layer.covers(first)), default=0)
        y = np.arange(first, last, dtype=np.float32)[:, None] + np.float32(0.5)
        for number in range(start, len(layers)):
            layer = layers[number]
            if float(layer.crest.min()) > last + 1:
                continue
            below = y - layer.crest
            mask = np.clip(below + np.float32(0.5), 0.0, 1.0)
            t = below * np.float32(1.0 / layer.span)
            np.clip(t, 0.0, 1.0, out=t)
            light = None
            if relief is not None and (layer.relief or layer.snow):
                light = self._relief_rows(relief, first, last, number)
            snow = None
            if layer.snow and light is not None:
                snow = (np.float32(layer.crest.min() + layer.snow) - y) * np.float32(
                    1.0 / layer.snow
                ) - below * np.float32(
                    0.9 / layer.snow,
                )
                snow = light * np.float32(0.85) + snow
                snow *= np.float32(3.0)
                np.clip(snow, 0.0, 0.95, out=snow)
                shade = light * np.float32(0.22) + np.float32(0.80)
            face = None if layer.face is None else self._face(layer.face, below, t)
            lamps = self._lamps(layer, below, first, last)
            if layer.rim:
                rim = np.clip(1.0 - np.abs(below) * np.float32(380.0 / self.height), 0.0, 1.0)
            for plane, top, foot, white, lamp, warm, neon in zip(
                planes,
                layer.top,
                layer.foot,
                self.scene.colours["snow"],
                self.scene.colours["window"],
                self.scene.colours["window2"],
                self.scene.colours["window2" if number % 2 else "window"],
                strict=True,
            ):
                colour = t * np.float32(foot - top)
                colour += np.float32(top)
                if face is not None:
                    colour += (np.float32(foot * 0.8) - colour) * face
                if light is not None and layer.relief:
                    colour *= light * np.float32(layer.relief) + 1.0
                if snow is not None:
                    colour += (shade * np.float32(white) - colour) * snow
                if lamps is not None:
                    colour += (np.float32(lamp) - colour) * lamps[0]
                    colour += (np.float32(warm) - colour) * lamps[1]
                if layer.rim:
                    colour += (np.float32(neon) - colour) * rim
                colour -= plane
                colour *= mask
                plane += colour

    def _face(self, face: Array, below: Array, t: Array) -> Array:
        """Shadow on the ground of this band: from the outline it runs down at a slant, away from the light, and fades."""
        slant = 1.1 if self.scene.light[0] > 0 else -1.1
        at = np.arange(self.width, dtype=np.float32) + np.maximum(below, 0.0) * np.float32(slant)
        np.clip(at, 0.0, self.width - 1.0, out=at)
        shadow = face.take(at.astype(np.intp), mode="clip")
        shadow *= 1.0 - t
        return shadow

    def _lamps(self, layer: _Layer, below: Array, first: int, last: int) -> tuple[Array, Array] | None:
        """Lit windows of two colours in this band; by day few."""
        if layer.windows is None:
            return None
        cover, number, pitch, lit = layer.windows
        at = np.arange(first, last, dtype=np.float32) / np.float32(pitch * 1.25)
        whole = np.floor(at)
        down = self._coverage(at - whole, pitch / self.side)[:, None]
        chance = lit.take((whole.astype(np.intp) & 255), 0).take(number & 255, 1)
        share = {"night": 0.48, "dusk": 0.50, "sunset": 0.30, "dawn": 0.20}.get(self.scene.time, 0.12)
        if "neon" in self.scene.styles:
            share = 0.5
        pane = down * cover
        pane *= np.clip((below - np.float32(pitch * 0.8)), 0.0, 1.0)
        pane *= np.clip(1.5 - below * np.float32(2.2 / self.height), 0.25, 1.0)
        first_kind = pane * (chance < np.float32(share * 0.75))
        return first_kind, pane * (chance > np.float32(1.0 - share * 0.25))

    def _stars(self) -> tuple[Array, ...] | None:
        """Row, column, brightness and warmth of each star, in order of rows."""
        scene = self.scene
        if not scene.stars:
            return None
        wide = self.width * self.height / self.side**2
        count = min(6000, int((1500 if scene.time == "space" else 900) * scene.stars * wide))
        draws = _draws(_key(scene.key, "stars"), 4 * 6000).reshape(6000, 4)[:count]
        down = draws[:, 0] * np.float32(1.0 if self.open else scene.horizon)
        order = np.argsort(down, kind="stable")
        draws, down = draws[order], down[order]
        bright = draws[:, 2] * draws[:, 2]
        bright = bright * bright * np.float32(1.1) + np.float32(0.13)
        if not self.open:
            bright = bright * np.clip(np.float32(1.15) - down / np.float32(scene.horizon), 0.1, 1.0)
        return down * np.float32(self.height), draws[:, 1] * np.float32(self.width), bright, draws[:, 3]

    def _shine(self, planes: Array, stars: tuple[Array, ...], first: int, last: int) -> None:
        rows, columns, bright, warm = stars
        unit = max(1.0, self.side / 1000)
        reach = math.ceil(2.2 * unit - 0.5)
        low, high = np.searchsorted(rows, [first - reach, last + reach])
        if high <= low:
            return
        y, x = rows[low:high], columns[low:high]
        row, column = np.floor(y), np.floor(x)
        dy, dx = row + np.float32(0.5) - y, column + np.float32(0.5) - x
        row, column = row.astype(np.intp) - first, column.astype(np.intp)
        size = (bright[low:high] * np.float32(1.5) + np.float32(0.35)) * np.float32(unit * unit)
        power = np.minimum(bright[low:high] * np.float32(min(1.0, 0.5 + self.side / 1024)), np.float32(1.3))
        tints: tuple[Array, ...] = (
            power * (np.float32(0.80) + warm[low:high] * np.float32(0.2)),
            power * np.float32(0.9),
        )
        tints = (*tints, power * (np.float32(1.05) - warm[low:high] * np.float32(0.3)))
        for j in range(-reach, reach + 1):
            for i in range(-reach, reach + 1):
                distance = (dy + np.float32(j)) ** 2 + (dx + np.float32(i)) ** 2
                shine = np.clip(1.0 - distance / (size * np.float32(2.4)), 0.0, 1.0)
                shine *= shine
                inside = (
                    (row + j >= 0)
                    & (row + j < last - first)
                    & (column + i >= 0)
                    & (column + i < self.width)
                    & (shine > 0)
                )
                if not inside.any():
                    continue
                where = (row[inside] + j, column[inside] + i)
                for plane, tint in zip(planes, tints, strict=True):
                    plane[where] += tint[inside] * shine[inside]

    def _bodies(self, planes: Array, first: int, last: int) -> None:
        """Sun, moon and planet where they reach into this band."""
        scene = self.scene
        x, v = scene.light
        if scene.place == "abstract" and self.open:
            return
        if scene.sun or scene.moon:
            big = "minimal" in scene.styles or "neon" in scene.styles
            radius = (0.105 if big else 0.036) if scene.sun else 0.058 if not big else 0.085
            self._disc(
                planes, first, last, x, (v - 0.5) * self.height / self.side, radius, "sun" if scene.sun else "moon"
            )
        if scene.planet:
            side = -1.0 if scene.light[0] > 0 else 1.0
            self._disc(
                planes, first, last, side * 0.24 + scene.drift[0] * 0.2, scene.drift[1] * 0.2 - 0.02, 0.21, "planet"
            )

    def _disc(self, planes: Array, first: int, last: int, x: float, y: float, radius: float, kind: str) -> None:
        reach = radius * (1.05 if kind != "planet" else 2.1 if self.ringed else 1.25) + 2 / self.side
        top, bottom = np.searchsorted(self.y[first:last], [y - reach, y + reach])
        left, right = np.searchsorted(self.x, [x - reach, x + reach])
        if bottom <= top or right <= left:
            return
        dx = (self.x[left:right] - np.float32(x))[None, :] / np.float32(radius)
        dy = (self.y[first + top : first + bottom] - np.float32(y))[:, None] / np.float32(radius)
        square = dx * dx + dy * dy
        far = np.sqrt(square)
        mask = np.clip((1.0 - far) * np.float32(radius * self.side) + np.float32(0.5), 0.0, 1.0)
        area = planes[:, top:bottom, left:right]
        colour = self.scene.colours[kind]
        if kind == "planet":
            self._planet(area, dx, dy, square, mask, colour)
            return
        if kind == "moon":
            marks = _stretch(
                _tile(f"{self.scene.key}:maria", 64, self.detail, gain=0.5),
                dx[0] * np.float32(0.21),
                dy[:, 0] * np.float32(0.21),
            )
            marks = np.clip(marks * np.float32(0.16) + np.float32(0.93), 0.72, 1.0)
            if _chance("crescent", self.scene.key) < 0.4:
                bite = np.sqrt((dx - np.float32(0.42)) ** 2 + (dy + np.float32(0.16)) ** 2)
                mask *= np.clip((bite - np.float32(0.95)) * np.float32(radius * self.side) * np.float32(0.7), 0.0, 1.0)
            for plane, channel in zip(area, colour, strict=True):
                plane += (marks * np.float32(channel) - plane) * mask
            return
        if "neon" in self.scene.styles:  # the striped sun of the style
            stripe = dy * np.float32(5.0)
            mask = mask * np.clip((stripe - np.floor(stripe) - np.clip(dy * np.float32(0.55), 0.0, 0.6)) * 12, 0.0, 1.0)
            fade = np.clip(dy * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
            for plane, upper, lower in zip(area, self.scene.colours["glow"], self.scene.colours["low"], strict=True):
                plane += (np.float32(upper) + fade * np.float32(lower - upper) - plane) * mask
            return
        for plane, channel in zip(area, colour, strict=True):
            plane += (np.float32(channel) - plane) * mask

    def _planet(self, area: Array, dx: Array, dy: Array, square: Array, mask: Array, colour: Colour) -> None:
        """A banded sphere, lit from the side, with air at its rim and perhaps a ring."""
        scene = self.scene
        depth = np.sqrt(np.maximum(1.0 - square, 0.0))
        side = np.float32(0.75 if scene.light[0] > 0 else -0.75)
        light = dx * side - dy * np.float32(0.35) + depth * np.float32(0.5)
        np.clip(light * np.float32(1.25), 0.02, 1.0, out=light)
        belts = dy + dx * np.float32(0.25)
        swirl = _stretch(self.swirl, dx[0] * np.float32(0.2), dy[:, 0] * np.float32(0.6))
        at = ((belts + swirl * np.float32(0.06)) * np.float32(300.0) + np.float32(512.0)).astype(np.intp)
        tone = self.belts.take(at, mode="clip")
        tone *= np.float32(0.38)
        tone += np.float32(0.80)
        tone *= light
        rim = np.clip(np.float32(1.22) - np.sqrt(square), 0.0, 0.22) * np.float32(1 / 0.22)
        rim *= rim
        rim *= (1.0 - mask) * np.clip(dx * side - dy * np.float32(0.35) + np.float32(0.45), 0.0, 1.0) * np.float32(0.5)
        ring = None
        if self.ringed:
            tilt = dy * np.float32(4.2) + dx * np.float32(1.25)
            far = np.sqrt(dx * dx + tilt * tilt)
            grooves = self.belts.take((far * np.float32(420.0)).astype(np.intp) & 1023) * np.float32(0.5) + np.float32(
                0.65
            )
            ring = np.clip((far - np.float32(1.28)) * 14, 0.0, 1.0) * np.clip((np.float32(2.05) - far) * 14, 0.0, 1.0)
            ring *= np.clip(grooves, 0.1, 1.0)
            ring *= 1.0 - mask * (tilt < 0)
            ring *= np.float32(0.75)
        pale = _mix(colour, (1.0, 0.95, 0.86), 0.55)
        for plane, channel, air, dusty in zip(area, colour, _mix(colour, (0.6, 0.8, 1.0), 0.6), pale, strict=True):
            plane += (tone * np.float32(channel) - plane) * mask
            plane += rim * np.float32(air)
            if ring is not None:
                plane += (np.float32(dusty * 0.9) - plane) * ring

    # water

    def _waves(self) -> Array:
        """Height of the water's surface below the horizon, [rows below, columns], about -1 to 1."""
        rows = self.height - self.horizon
        depth = (np.arange(rows, dtype=np.float32) + np.float32(0.5)) / np.float32(self.height)
        far = 1.0 / (depth + np.float32(0.035))
        calm = "lake" in self.scene.places and "sea" not in self.scene.places
        tile = self._tile("waves", gain=0.72 if not calm else 0.6, coarsest=16)
        u = self.gx[None, :] * (far[:, None] * np.float32(0.075)) + np.float32(self.scene.drift[0])
        v = np.broadcast_to(far[:, None] * np.float32(0.34), u.shape)
        return _sample(tile, u, v + np.float32(self.scene.drift[1]))

    def _water(self, image: Array, waves: Array, first: int, last: int) -> Array:
        """The mirror of the finished rows above, broken by waves, with the light's path on it."""
        scene, colours = self.scene, self.scene.colours
        rows = np.arange(first - self.horizon, last - self.horizon)
        depth = (rows.astype(np.float32) + np.float32(0.5)) / np.float32(self.height)
        at = np.clip(
            (np.arange(self.width, dtype=np.float32) + np.float32(0.5)) * np.float32(self.columns / self.width), 0, None
        )
        wave = _lerp(waves[rows[0] : rows[-1] + 1], np.minimum(at - np.float32(0.5), np.float32(self.columns - 1)), 1)
        calm = "lake" in scene.places and "sea" not in scene.places
        rough = (0.30 if calm else 0.85) * (0.35 + depth * np.float32(2.2))
        mirror = np.float32(self.horizon - 1) - rows.astype(np.float32) * np.float32(0.97)
        source = wave * (rough * np.float32(0.075 * self.height))[:, None]
        source += mirror[:, None]
        np.clip(source, 0.0, self.horizon - 1, out=source)
        index = source.astype(np.intp)
        index *= self.width
        index += np.arange(self.width)
        seen = image.reshape(-1, 3).take(index, 0, mode="clip")
        deep = np.clip(np.float32(0.16 if calm else 0.26) + depth * np.float32(0.75), 0.0, 0.72)[:, None]
        crest = np.clip(wave, -0.8, 1.0)
        path: Array | None = None
        if scene.sun or scene.moon:
            wide = np.float32(0.035) + depth * np.float32(0.30)
            away = (self.x[None, :] - np.float32(scene.light[0])) / wide[:, None]
            path = 1.0 / (1.0 + away * away)
            path *= path
            path *= np.clip(wave * np.float32(2.6) + np.float32(0.05), 0.0, 1.0)
            path *= np.float32(0.9 if scene.sun else 0.6)
        planes = np.empty((3, last - first, self.width), np.float32)
        for channel, (plane, water, sky, glow) in enumerate(
            zip(planes, colours["water"], colours["low"], colours["glow"], strict=True),
        ):
            np.multiply(seen[..., channel], np.float32(0.93 / 255), out=plane)
            plane += (np.float32(water * 0.8) - plane) * deep
            plane += crest * (np.float32(0.05 + 0.10 * sky) * (rough + np.float32(0.2)))[:, None]
            if path is not None:
                plane += (np.float32(glow) - plane) * path
        return planes

    # finish

    def _paper(self) -> Array:
        """The grain of watercolour paper, [256, width], around 1."""
        tile = _tile("paper", 256, 1.0, gain=0.85, coarsest=32)
        columns = (np.arange(self.width, dtype=np.float32) * np.float32(1024 / self.side)).astype(np.intp) & 255
        return 1.0 + tile.take(columns, 1) * np.float32(0.035)

    def _residue(self) -> Array | None:
        """Colour noise that the steps have not taken away yet, [3, 64, width]."""
        strength = self.latent.grain
        if strength < 0.002:
            return None
        noise = [_lattice(_key(self.scene.key, "residue", channel), 64) for channel in range(3)]
        wide = (self.x + np.float32(8.0)) * np.float32(64)
        return np.stack([_lerp(grid, wide, 1) * np.float32(strength) for grid in noise])

    def _finish(self, planes: Array, image: Array, first: int, last: int) -> None:
        """Guidance, what is avoided, paper and dither; then to bytes."""
        scene = self.scene
        if self.residue is not None:
            at = (self.y[first:last] + np.float32(8.0)) * np.float32(64)
            for plane, grid in zip(planes, self.residue, strict=True):
                plane += _lerp(grid, at, 0)
        for name in scene.avoided:
            _avoid(planes, name)
        if self.paper is not None:
            self._wash(planes, self.paper, first, last)
        contrast = (0.80 + 0.20 * scene.force) * (0.82 + 0.22 * self.detail)  # the haze lifts with the steps
        edge = np.float32(1.0) - (self.y[first:last] * np.float32(self.side / self.height)) ** 2 * np.float32(0.42)
        column = np.float32(1.0) - (self.x * np.float32(self.side / self.width)) ** 2 * np.float32(0.42)
        vignette = edge[:, None] * column if self.paper is None else None
        dither = self.dither.take(np.arange(first, last) & 255, 0, mode="clip")
        dither += np.float32(255.0 * 0.5 * (1.0 - contrast))
        for channel, plane in enumerate(planes):
            if vignette is not None:
                plane *= vignette
            plane *= np.float32(255.0 * contrast)
            plane += dither
            np.clip(plane, 0.0, 255.0, out=plane)
            np.copyto(image[first:last, :, channel], plane, casting="unsafe")

    def _wash(self, planes: Array, paper: Array, first: int, last: int) -> None:
        """Pigment on paper: grain, and a ragged white border."""
        grain = paper.take((self.v[first:last] * np.float32(self.height / self.side * 1024)).astype(np.intp) & 255, 0)
        half_x, half_y = self.width / self.side / 2, self.height / self.side / 2
        ragged = _profile(f"{self.scene.key}:border", self.x * np.float32(4.0), 0.8) * np.float32(0.02)
        sides = _profile(f"{self.scene.key}:sides", self.y[first:last] * np.float32(4.0), 0.8) * np.float32(0.02)
        inside = np.minimum(
            (np.float32(half_x) - np.abs(self.x))[None, :] + sides[:, None],
            (np.float32(half_y) - np.abs(self.y[first:last]))[:, None] + ragged[None, :],
        )
        inside += (grain - 1.0) * np.float32(0.25)
        ink = _smooth(0.035, 0.06, inside)
        pool = np.clip(1.0 - np.abs(inside - np.float32(0.062)) * 45, 0.0, 1.0) * np.float32(0.14)
        for plane, white in zip(planes, (0.985, 0.975, 0.955), strict=True):
            plane *= grain - pool
            plane -= np.float32(white)
            plane *= ink
            plane += np.float32(white)

    # what lies on top of everything

    def _sprinkle(self, image: Array) -> None:
        """Flowers, fireflies and falling snow."""
        scene = self.scene
        if "flower" in scene.places:
            self._flowers(image)
        if scene.fireflies:
            draws = _draws(_key(scene.key, "fireflies"), 3 * 70).reshape(70, 3)
            for x, y, size in draws.tolist():
                radius = max(1.5, (0.004 + 0.016 * size**3) * self.side)
                place = (x * self.width, (0.45 + 0.52 * y) * self.height)
                self._stamp(image, *place, radius * 3, (1.0, 0.86, 0.45), partial(_dot, core=0.33))
        if scene.snow >= 1.0 and "minimal" not in scene.styles:
            draws = _draws(_key(scene.key, "flakes"), 3 * 260).reshape(260, 3)
            for x, y, size in draws.tolist():
                radius = max(1.0, (0.0016 + 0.0065 * size**4) * self.side)
                soft = 0.75 if size < 0.8 else 0.4
                self._stamp(
                    image,
                    x * self.width,
                    y * self.height,
                    radius,
                    (1.0, 1.0, 1.0),
                    partial(_dot, core=1.0, strength=soft),
                )

    def _flowers(self, image: Array) -> None:
        scene, colours = self.scene, self.scene.colours
        start = scene.horizon + 0.07
        draws = _draws(_key(scene.key, "flowers"), 4 * 420).reshape(420, 4)
        draws = draws[np.argsort(draws[:, 1], kind="stable")]
        for x, down, kind, size in draws.tolist():
            near = down * down
            radius = (0.004 + 0.034 * near * (0.6 + 0.6 * size)) * self.side
            if radius < 0.7:
                continue
            base = colours["flower" if kind < 0.68 else "flower2"]
            colour = _mix(_mix(base, (1.0, 1.0, 1.0), 0.30 * size), colours["horizon"], 0.35 * (1.0 - near))
            y = (start + (1.0 - start) * near) * self.height
            petals = 5 if kind < 0.68 else 6
            self._stamp(image, x * self.width, y, radius, colour, partial(_bloom, petals=petals, turn=size))
            if radius > 5.0:  # smaller ones have no room for a heart
                heart = _mix(colours["flower2"], colours["near"], 0.25)
                self._stamp(image, x * self.width, y, radius * 0.30, heart, partial(_dot, core=1.0, strength=1.6))

    def _stamp(
        self,
        image: Array,
        x: float,
        y: float,
        radius: float,
        colour: Colour,
        shape: Callable[[Array, Array], tuple[Array, Array | None]],
    ) -> None:
        """Mix a small shape into the picture: from coordinates (-1 to 1) it makes coverage, and perhaps a brightness."""
        left, right = max(0, math.floor(x - radius)), min(self.width, math.ceil(x + radius) + 1)
        top, bottom = max(0, math.floor(y - radius)), min(self.height, math.ceil(y + radius) + 1)
        if right <= left or bottom <= top:
            return
        dx = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(radius)
        dy = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)) / np.float32(radius)
        cover, tone = shape(dx[None, :], dy[:, None])
        shown = _kept(colour, self.scene.avoided) if self.scene.avoided else colour
        area = image[top:bottom, left:right]
        for channel, value in enumerate(shown):
            below = area[..., channel]
            mixed = np.float32(value * 255.0) - below if tone is None else tone * np.float32(value * 255.0) - below
            mixed *= cover
            mixed += below
            np.copyto(below, mixed, casting="unsafe")


def _dot(dx: Array, dy: Array, core: float, strength: float = 1.0) -> tuple[Array, None]:
    """A soft light."""
    square = dx * dx + dy * dy
    edge = np.clip(1.0 - square, 0.0, 1.0)
    edge *= edge
    edge *= np.float32(core * core * 1.25 * strength) / (square + np.float32(core * core))
    return np.minimum(edge, np.float32(1.0)), None


def _bloom(dx: Array, dy: Array, petals: int, turn: float) -> tuple[Array, Array]:
    """A flower seen a little from the side: petals follow the real part of z**n, so no sine is needed."""
    across, along = (1.0 - 2.0 * turn) * 0.5, 0.6 + 0.4 * turn
    dy = dy * np.float32(1.25)
    x, y = dx * np.float32(along) - dy * np.float32(across), dy * np.float32(along) + dx * np.float32(across)
    far = np.sqrt(x * x + y * y + np.float32(1e-6))
    x /= far
    y /= far
    real, imaginary = x * x - y * y, x * y * 2.0
    if petals == 6:  # z**6 = (z**2)**3
        x, y = real, imaginary
    real, imaginary = real * real - imaginary * imaginary, real * imaginary * 2.0
    real = real * x - imaginary * y  # z**5 = z**4 * z
    wide = math.sqrt(along * along + 0.25)
    room = real * np.float32(0.24 * wide)
    room += np.float32(0.70 * wide)
    room -= far
    room *= 6.0
    tone = np.clip(room * np.float32(0.5) + np.float32(0.55), 0.72, 1.0)  # a darker rim
    room += np.float32(0.3)
    return np.clip(room, 0.0, 1.0), tone


def _avoid(planes: Array, name: str) -> None:
    """Take a hue out of pixels [3, h, w], in place."""
    red, green, blue = planes
    zero = np.float32(0.0)
    if name in {"red", "pink"}:
        red -= np.maximum(red - np.maximum(green, blue), zero) * np.float32(0.92)
    elif name == "green":
        green -= np.maximum(green - np.maximum(red, blue), zero) * np.float32(0.92)
    elif name == "blue":
        blue -= np.maximum(blue - np.maximum(red, green), zero) * np.float32(0.92)
    elif name in {"yellow", "orange", "gold", "brown"}:
        blue += np.maximum(np.minimum(red, green) - blue, zero) * np.float32(0.85)
    elif name == "purple":
        green += np.maximum(np.minimum(red, blue) - green, zero) * np.float32(0.85)
    elif name == "cyan":
        red += np.maximum(np.minimum(green, blue) - red, zero) * np.float32(0.85)
    elif name == "white":
        planes -= np.maximum(planes - np.float32(0.62), zero) * np.float32(0.8)
    elif name == "black":
        planes += np.maximum(np.float32(0.38) - planes, zero) * np.float32(0.7)


def _kept(colour: Colour, avoided: tuple[str, ...]) -> Colour:
    """A colour without what is avoided."""
    plane = np.array(colour, np.float32).reshape(3, 1, 1)
    for name in avoided:
        _avoid(plane, name)
    return (float(plane[0, 0, 0]), float(plane[1, 0, 0]), float(plane[2, 0, 0]))


# ── Painting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def paint(
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    guidance: float | None,
    steps: int | None,
    width: int,
    height: int,
    on_step: OnStep | None = None,
    is_cancelled: IsCancelled | None = None,
    preview: Preview | None = None,
) -> Array:
    """Draw one picture: uint8 [height, width, 3]. Equal arguments give equal pixels.

    Args:
        prompt: any text in any language; composed and decomposed Unicode are the same.
        negative_prompt: words to keep out; None and "" are the same.
        seed: from 0 to 2**63, exclusive.
        guidance: how strongly words drive and how rich colours are, 0 to 100; None means 7.
        steps: how far the picture is refined, 1 to 1000; None means 20.
        width: pixels, 16 to 4096; width x height is at most 2048 x 2048.
        height: pixels, likewise.
        on_step: told (done, total) after every step.
        is_cancelled: asked before every step and before the picture is drawn at full size.
        preview: given (done, small picture) after every step; only then previews are drawn (longer side 128 pixels).

    Raises:
        GenerationCancelled: `is_cancelled()` was true.
        ValueError: size, seed, guidance or steps out of range.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    _check(seed, guidance, steps, width, height)
    scene = compose(prompt, negative_prompt, seed, guidance)
    latent = _Latent(scene, steps)
    shrink = 128 / max(width, height)
    small = (max(16, round(width * shrink)), max(16, round(height * shrink)))
    for done in range(1, steps + 1):
        _stop_if(is_cancelled)
        latent.advance()
        if preview is not None:
            preview(done, _Canvas(scene, latent, *small).paint())
        if done == steps:  # the last step is done when the picture is there
            _stop_if(is_cancelled)
            picture = _Canvas(scene, latent, width, height).paint()
        if on_step is not None:
            on_step(done, steps)
    return picture


def _check(seed: int, guidance: float, steps: int, width: int, height: int) -> None:
    """Refuse what cannot be drawn, by ValueError."""
    if not (min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(
            f"the size must be from {MIN_SIDE} to {MAX_SIDE} pixels a side and at most {MAX_PIXELS} pixels in all, "
            f"not {width}x{height}",
        )
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"the seed must be from 0 to 2**63 - 1, not {seed}")
    if not 0.0 <= guidance <= 100.0:
        raise ValueError(f"the guidance scale must be from 0 to 100, not {guidance}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"the number of steps must be from 1 to {MAX_STEPS}, not {steps}")


def _stop_if(is_cancelled: IsCancelled | None) -> None:
    if is_cancelled is not None and is_cancelled():
        raise GenerationCancelled("cancelled at a step boundary")


def _count_from(before: int, total: int, on_step: OnStep, done: int, _: int) -> None:
    """Report one picture's step as a step of its batch."""
    on_step(before + done, total)


class ProceduralEngine:
    """The painter as an engine: needs no model, no GPU and no network."""

    def load(self) -> None:
        """Import numpy and the encoder, and draw one small picture, so that the first real one is not the slow one."""
        encode_png(paint("warm up", None, 0, None, 1, 64, 64))

    def capabilities(self) -> Capabilities:
        """Each picture of a batch has its own words and seed; sizes as `paint` takes them."""
        return Capabilities(
            batch="items",
            max_batch_size=8,
            max_concurrency=2,
            honours=frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size"}),
            max_pixels=MAX_PIXELS,
            min_side=MIN_SIDE,
            max_side=MAX_SIDE,
            progress=True,
        )

    def generate(self, batch: Call, on_step: OnStep, is_cancelled: IsCancelled) -> list[bytes]:
        """Draw `batch.items` one after the other: PNG bytes, in order. Progress counts the steps of all of them.

        Raises:
            GenerationCancelled: `is_cancelled()` was true at a step boundary.
            ValueError: size, seed, guidance or steps out of range.
        """
        request = batch.request
        steps = DEFAULT_STEPS if request.steps is None else request.steps
        total = steps * len(batch.items)
        pictures: list[bytes] = []
        for number, item in enumerate(batch.items):
            before = number * steps
            pixels = paint(
                item.prompt,
                item.negative_prompt,
                item.seed,
                request.guidance_scale,
                steps,
                batch.width,
                batch.height,
                on_step=partial(_count_from, before, total, on_step),
                is_cancelled=is_cancelled,
            )
            pictures.append(encode_png(pixels))
        return pictures
