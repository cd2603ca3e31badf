"""What one server with A1111's web API is and has: asked with read-only routes that do not touch the GPU."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Final

import msgspec

from img_serving.backends.samplers import samplers_with_schedules
from img_serving.domain.capabilities import SizeRule
from img_serving.domain.vocabulary import Vocabulary
from img_serving.ports import UpstreamReply

MODELS_PATH: Final = "/sdapi/v1/sd-models"
OPTIONS_PATH: Final = "/sdapi/v1/options"
SAMPLERS_PATH: Final = "/sdapi/v1/samplers"
SCHEDULERS_PATH: Final = "/sdapi/v1/schedulers"
PROGRESS_PATH: Final = "/sdapi/v1/progress?skip_current_image=true"
SDCPP_PATH: Final = "/sdcpp/v1/capabilities"

WEBUI_SIZES: Final = SizeRule(multiple=8, rounding="down", min_side=8, max_side=8192)
"""A1111's latents have an eighth of a side, rounded down (Forge f2.0.1: 100x70 is drawn as 96x64).

It draws any size that it is asked for: 20000x64 took nine minutes and 9 GB. So there is a bound here.
"""

SDCPP_SIZES: Final = SizeRule(multiple=64, rounding="up", max_side=4096)
"""stable-diffusion.cpp's server (97d2990) rounds up (100x70 is drawn as 128x128). It names the bound, and does not keep it."""

SDCPP_STEPS: Final = 100
"""It does that many where more are asked for."""

SDCPP_BATCH: Final = 8
"""It draws that many where more are asked for."""

MAX_NAMES: Final = 5000
"""Of each list: no server has more, and each is looked at at every check."""

Ask = Callable[[str], Awaitable[UpstreamReply]]
"""A GET of a path; raises AttemptError where nobody answers."""


class Checkpoint(msgspec.Struct, frozen=True):
    """One of `/sd-models`. Its title changes once the model was loaded (a hash is added); its name and file do not."""

    title: str | None = None
    model_name: str | None = None
    filename: str | None = None

    @property
    def name(self) -> str | None:
        """What it is called in requests."""
        return self.model_name or self.title

    @property
    def spellings(self) -> tuple[str, ...]:
        """Everything else that people call it: its file with and without a folder and an ending, and its title."""
        file = PureWindowsPath(self.filename or "").name  # takes both kinds of slash apart
        bare_title = (self.title or "").partition(" [")[0]
        return tuple(name for name in (file, PureWindowsPath(file).stem, self.title, bare_title) if name)


class _Named(msgspec.Struct, frozen=True):
    """One of `/samplers` or `/schedulers`."""

    name: str
    label: str | None = None
    aliases: list[str] | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        return tuple(one for one in (self.label, *(self.aliases or ())) if one)


_CHECKPOINTS = msgspec.json.Decoder(list[Checkpoint])
_NAMES = msgspec.json.Decoder(list[_Named])


@dataclass(frozen=True, slots=True)
class A1111Server:
    """One server, as far as it told. `program` and `because` are for people.

    `loaded` is the checkpoint that it holds now, as its options name it; `can_switch`: another one can be asked for.
    `clip_skip` is its own setting.
    """

    program: str = "a server with A1111's web API"
    because: str = ""
    models: Vocabulary | None = None
    samplers: Vocabulary | None = None
    schedulers: Vocabulary | None = None
    sizes: SizeRule = WEBUI_SIZES
    has_progress: bool = False
    has_options: bool = False
    can_switch: bool = True
    is_sdcpp: bool = False
    loaded: str | None = None
    clip_skip: int | None = None
    is_complete: bool = True
    """Whether every question got an answer: those that did not are asked again at the next check."""


async def learn(ask: Ask) -> A1111Server:
    """Ask the server what it is and has. What it does not answer stays unknown.

    Raises:
        AttemptError: nobody answers at all.
    """
    failed: list[str] = []

    async def told(path: str) -> UpstreamReply:
        reply = await ask(path)
        if reply.status >= 500 or reply.status == 429:
            failed.append(path)
        return reply

    options = _json(await told(OPTIONS_PATH))
    models = read_models(await told(MODELS_PATH))
    schedulers = _names(await told(SCHEDULERS_PATH))
    samplers = _names(await told(SAMPLERS_PATH))
    progress = _json(await told(PROGRESS_PATH))
    has_progress = isinstance(progress, dict) and "progress" in progress
    program, because, sizes = "a server with A1111's web API", "", WEBUI_SIZES
    can_switch = True
    known_options = options if isinstance(options, dict) else {}
    if not has_progress and isinstance(_json(await told(SDCPP_PATH)), dict):
        program, because, sizes, can_switch = "stable-diffusion.cpp", f"GET {SDCPP_PATH} answers", SDCPP_SIZES, False
    elif any(name.startswith("forge_") for name in known_options):
        program, because = "Forge", f"GET {OPTIONS_PATH} has its settings"
    elif "sd_backend" in known_options or "sd_model_dict" in known_options:
        program, because = "SD.Next", f"GET {OPTIONS_PATH} has its settings"
    elif has_progress and known_options:
        program, because = "AUTOMATIC1111", f"GET {OPTIONS_PATH} and {PROGRESS_PATH.partition('?')[0]} answer"
    loaded = known_options.get("sd_model_checkpoint")
    schedules = None if schedulers is None else Vocabulary(*_spelled(schedulers))
    return A1111Server(
        program=program,
        because=because,
        models=models,
        samplers=None if samplers is None else samplers_with_schedules(*_spelled(samplers), schedules),
        schedulers=schedules,
        sizes=sizes,
        has_progress=has_progress,
        has_options=bool(known_options),
        can_switch=can_switch,
        is_sdcpp=not can_switch,
        loaded=loaded if isinstance(loaded, str) else None,
        is_complete=not failed,
        clip_skip=_whole(known_options.get("CLIP_stop_at_last_layers")),
    )


def read_models(reply: UpstreamReply) -> Vocabulary | None:
    """The checkpoints that `/sd-models` names; None where it names none, or cannot be read."""
    if not 200 <= reply.status < 300:
        return None
    try:
        checkpoints = _CHECKPOINTS.decode(reply.body)
    except (ValueError, RecursionError):
        return None
    checkpoints = checkpoints[:MAX_NAMES]
    names = [one.name for one in checkpoints if one.name]
    aliases: dict[str, str] = {}
    for one in checkpoints:
        if one.name:
            for spelling in one.spellings:
                aliases.setdefault(spelling, one.name)
    return Vocabulary(names, aliases) if names else None


def is_model_list(reply: UpstreamReply) -> bool:
    """Whether it is a list of checkpoints, an empty one included."""
    try:
        _CHECKPOINTS.decode(reply.body)
    except (ValueError, RecursionError):
        return False
    return True


def _names(reply: UpstreamReply) -> list[_Named] | None:
    if not 200 <= reply.status < 300:
        return None
    try:
        return _NAMES.decode(reply.body)[:MAX_NAMES] or None
    except (ValueError, RecursionError):
        return None


def _spelled(named: list[_Named]) -> tuple[list[str], dict[str, str]]:
    aliases: dict[str, str] = {}
    for one in named:
        for spelling in one.spellings:
            aliases.setdefault(spelling, one.name)
    return [one.name for one in named], aliases


def _whole(value: Any) -> int | None:
    """A setting that is a whole number, which some servers write as `1.0`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
        return None
    return int(value) if value == int(value) else None


def _json(reply: UpstreamReply) -> Any:
    if not 200 <= reply.status < 300:
        return None
    try:
        return msgspec.json.decode(reply.body)
    except (ValueError, RecursionError):
        return None
