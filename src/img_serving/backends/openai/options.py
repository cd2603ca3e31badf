"""The operator's table `[backends.openai]`: which dialect a server speaks, and what this one does otherwise."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, get_args

import msgspec
from msgspec import Meta

from img_serving.backends.openai.presets import PRESETS, AskedFormat, Edits, Parameters, Preset, SizeStyle
from img_serving.backends.options import read_options
from img_serving.domain.capabilities import PARAMETERS, SizeRule

AUTO: Final = "auto"

_OURS: Final = frozenset(
    {"prompt", "n", "model", "size", "width", "height", "response_format", "stream", "partial_images", "batch_count"}
    | {"image", "image[]", "image_url", "file", "mask", "mask_image", "kwargs"}
)
"""Fields that the adapter itself writes, or that would go round the gateway's own limits."""

_TAKEN: Final = (
    _OURS | PARAMETERS | {path.partition(".")[0] for preset in PRESETS.values() for path in preset.parameters.values()}
)
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", re.ASCII)


class OpenAIOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.openai]`. What is None or empty is the preset's own.

    Attributes:
        preset: a family, or "auto": found out from the host, else from what the health check sees.
        parameters: the server's own names for canonical ones; "" for what it does not have, which is then reported as ignored.
        size: how the size travels.
        response_format: what is asked for; "" asks for nothing.
        always_seed: send a seed even where the client gave none.
        max_n: pictures in one call.
        sizes: the only sizes that it draws.
        edits: whether edits are sent to it.
        variations: whether variations are sent to it, to its `/images/variations`.
        stream: whether it shows unfinished pictures.
        extra: constant fields of every body.
    """

    preset: str = AUTO
    parameters: dict[str, str] = {}
    size: str | None = None
    response_format: str | None = None
    always_seed: bool | None = None
    max_n: Annotated[int, Meta(ge=1, le=1000)] | None = None
    sizes: tuple[str, ...] = ()
    edits: bool | None = None
    variations: bool | None = None
    stream: bool | None = None
    extra: dict[str, Any] = {}

    def over(self, preset: Preset) -> Preset:
        """`preset`, and its models, with what the operator said on top."""
        given: dict[str, Any] = {
            "size": self.size,
            "response_format": self.response_format,
            "always_seed": self.always_seed,
            "max_n": self.max_n,
            "sizes": SizeRule(choices=tuple(_sides(size) for size in self.sizes)) if self.sizes else None,
            "stream": self.stream,
        }
        return replace(
            preset,
            parameters=self._renamed(preset.parameters),
            edits=self._edits_over(preset.edits),
            variations=self._variations_over(preset.variations),
            extra={**preset.extra, **self.extra},
            models=tuple((pattern, self.over(one)) for pattern, one in preset.models),
            **{name: value for name, value in given.items() if value is not None},
        )

    def _renamed(self, parameters: Parameters) -> Parameters:
        """The preset's names with the operator's on top, who has no place for what would be written over."""
        own = [theirs for theirs in self.parameters.values() if theirs]
        kept = {
            name: theirs
            for name, theirs in parameters.items()
            if name not in self.parameters and not any(_collide(theirs, one) for one in own)
        }
        return kept | {name: theirs for name, theirs in self.parameters.items() if theirs}

    def _edits_over(self, edits: Edits | None) -> Edits | None:
        if self.edits is False:
            return None
        if edits is None:
            return Edits() if self.edits else None
        return edits if edits.parameters is None else replace(edits, parameters=self._renamed(edits.parameters))

    def _variations_over(self, variations: Parameters | None) -> Parameters | None:
        if self.variations is False:
            return None
        if variations is None:
            return {} if self.variations else None
        return self._renamed(variations)


def read_openai_options(table: Mapping[str, Any]) -> OpenAIOptions:
    """The table, checked.

    Raises:
        ValueError: naming the option, what is wrong with it, and the nearest that would be right.
    """
    options = read_options(OpenAIOptions, table)
    _one_of("preset", options.preset, (AUTO, *PRESETS))
    if options.size is not None:
        _one_of("size", options.size, get_args(SizeStyle))
    if options.response_format is not None:
        _one_of("response_format", options.response_format, get_args(AskedFormat))
    for name, theirs in options.parameters.items():
        _check_parameter(name, theirs)
    _check_all_different(options.parameters)
    for index, size in enumerate(options.sizes):
        if not _SIZE.fullmatch(size):
            raise ValueError(f'sizes[{index}]: must be WIDTHxHEIGHT in pixels, for example "1024x1024"')
    for name in options.extra:
        if name.partition(".")[0] in _TAKEN | {theirs.partition(".")[0] for theirs in options.parameters.values()}:
            raise ValueError(f"extra.{name}: the gateway writes this field itself; `extra` may only add others")
    return options


def _check_parameter(name: str, theirs: str) -> None:
    known = PARAMETERS - {"size"}
    if name not in known:
        hint = "; how the size travels is the option `size`" if name == "size" else ""
        raise ValueError(f"parameters.{name}: unknown parameter{_near(name, known)}{hint}")
    if not theirs:
        return
    if not _PATH.fullmatch(theirs):
        raise ValueError(f'parameters.{name}: must be a field such as "steps", a path such as "a.b", or "" for none')
    if theirs.partition(".")[0] in _OURS:
        raise ValueError(f"parameters.{name}: the gateway writes the field {theirs!r} itself")


def _check_all_different(parameters: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, theirs in parameters.items():
        for other, whose in seen.items():
            if theirs and _collide(theirs, other):
                raise ValueError(f"parameters.{name}: {theirs!r} is where parameters.{whose} goes already ({other!r})")
        if theirs:
            seen[theirs] = name


def _collide(one: str, other: str) -> bool:
    """Whether two places in a body are the same, or one is inside the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _one_of(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        names: Callable[[str], str] = lambda name: name or '""'  # noqa: E731 - said in two places
        raise ValueError(
            f"{option}: there is no {value!r}{_near(value, known)} (known: {', '.join(map(names, known))})"
        )


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _sides(size: str) -> tuple[int, int]:
    width, height = size.split("x")
    return int(width), int(height)
