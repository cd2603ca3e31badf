"""A backend that behaves as it is told: shipped, so that users can rehearse failures and tests need no engine."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import pack
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from img_serving.backends.options import read_options
from img_serving.domain.capabilities import PARAMETERS, BatchShape, Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, ContentRefused, InvalidRequest, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, Operation, Preview, Progress
from img_serving.media.payload import artifact_from_bytes
from img_serving.media.png import SIGNATURE
from img_serving.ports import HealthReport, OnProgress

Step = Literal[
    "ok",
    "fail",
    "fail_midway",
    "refuse",
    "refuse_content",
    "hang",
    "busy",
    "unknown",
    "not_started",
    "bad_size",
    "partial",
]
"""What one call does: `fail_midway` fails after half of its steps; `hang` never answers; `bad_size` draws half the size;
`partial` fails the last picture only."""

STEPS: Final = tuple(str(step) for step in get_args(Step))
CALLS_KEPT: Final = 1000

Kind = TypeVar("Kind", bound=msgspec.Struct)

_Seconds = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of `protocol = "scripted"`.

    `sequence` is what the calls do, one after the other; at its end it begins again (`repeat = "cycle"`) or its last step
    stays (`"last"`). `fail_rate` makes that share of the `ok` steps fail. Jitter and chance come from
    `random_seed`, so a run can be repeated. `steps` progress reports are spread over the latency, to which
    `latency_per_picture_seconds` are added for each picture of the call, and `load_seconds` when it wants another model than
    the one before. With `previews`, each step shows an unfinished picture of every item, where they are wanted.
    """

    latency_seconds: _Seconds = 0.0
    latency_jitter_seconds: _Seconds = 0.0
    fail_rate: _Share = 0.0
    random_seed: int = 0
    sequence: tuple[Step, ...] = ("ok",)
    repeat: Literal["cycle", "last"] = "cycle"
    models: tuple[str, ...] = ("scripted",)
    operations: tuple[Operation, ...] = ("generation",)
    healthy: bool = True
    batch: BatchShape = "items"
    max_batch_size: _Count = 4
    max_concurrency: _Count = 32
    busy_seconds: _Seconds = 1.0
    steps: Annotated[int, Meta(ge=0)] = 0
    previews: bool = False
    switches_models: bool = False
    load_seconds: _Seconds = 0.0
    latency_per_picture_seconds: _Seconds = 0.0


class ScriptedBackend:
    """Implements the port in memory. `calls` and `cancelled` are for tests to look at."""

    def __init__(self, script: Mapping[str, Any] | None = None) -> None:
        """Take the options of `Script`.

        Raises:
            ValueError: an unknown option, naming the nearest known one, or an impossible value.
        """
        self.script = read_script(Script, script or {})
        if self.script.previews and not self.script.steps:
            raise ValueError("previews: are shown at steps, so it needs `steps` too")
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.count = 0
        self.cancelled = 0
        self.in_flight = 0
        self.healthy = self.script.healthy
        self._loaded: str | None = None
        self._random = random.Random(self.script.random_seed)  # noqa: S311 - chance to rehearse with, not to hide behind

    def __repr__(self) -> str:
        return f"<ScriptedBackend: {self.count} calls, {self.in_flight} in flight>"

    @property
    def protocol(self) -> str:
        """Always `scripted`."""
        return "scripted"

    @property
    def capabilities(self) -> Capabilities:
        """As the script says; every parameter is taken, none changes the picture but prompt, seed and size."""
        script = self.script
        return Capabilities(
            operations=frozenset(script.operations),
            batch=script.batch,
            max_batch_size=script.max_batch_size,
            max_concurrency=script.max_concurrency,
            honours=PARAMETERS - {"output_format", "output_compression"},
            max_images=16,
            masks=True,
            progress=script.steps > 0,
            previews=script.previews,
            switches_models=script.switches_models,
        )

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Do the sequence's next step.

        Raises:
            AttemptError: the step says so.
            BackendRefusal: the step says so.
        """
        step = self._next_step()
        self.calls.append(call)
        self.in_flight += 1
        try:
            await self._wait(step, call, on_progress)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        return self._outcome(step, call)

    async def check(self, timeout_seconds: float) -> HealthReport:  # noqa: ARG002 - nobody has to be asked
        """As the script, or the test that set `healthy`, says."""
        detail = "as scripted" if self.healthy else "unhealthy, as scripted"
        return HealthReport(healthy=self.healthy, detail=detail, models=self.script.models)

    async def close(self) -> None:
        """Nothing is held."""

    def _next_step(self) -> Step:
        script = self.script
        last = len(script.sequence) - 1
        index = self.count % (last + 1) if script.repeat == "cycle" else min(self.count, last)
        self.count += 1
        step = script.sequence[index]
        # chance is asked at every call, so that adding a step to the sequence does not change the others' luck
        unlucky = self._random.random() < script.fail_rate
        return "fail" if step == "ok" and unlucky else step

    async def _wait(self, step: Step, call: Call, on_progress: OnProgress) -> None:
        if step == "hang":
            await asyncio.get_running_loop().create_future()
        script = self.script
        if script.load_seconds and call.model != self._loaded:
            await asyncio.sleep(script.load_seconds)
        self._loaded = call.model
        latency = script.latency_seconds + script.latency_jitter_seconds * self._random.random()
        latency += script.latency_per_picture_seconds * len(call.items)
        parts = max(1, script.steps)
        for done in range(1, parts + 1):
            if latency:
                await asyncio.sleep(latency / parts)
            for preview in self._previews(call, done):
                on_progress(Progress(done, script.steps, preview))
            if step == "fail_midway" and done * 2 >= parts:
                raise AttemptError(Outcome.FAILED, "failed half-way, as scripted")

    def _previews(self, call: Call, done: int) -> Sequence[Preview | None]:
        """What is told of one step: None is progress without a picture."""
        if not self.script.previews or not call.previews:
            return (None,) if self.script.steps else ()
        width, height = (max(1, side // 4) for side in (call.width, call.height))
        share = done / self.script.steps  # all pictures at once
        return [
            Preview(picture(f"{item.prompt}, step {done}", item.seed, width, height), "image/png", index, share)
            for index, item in enumerate(call.items)
        ]

    def _outcome(self, step: Step, call: Call) -> list[Artifact | ItemFailure]:
        if step == "fail":
            raise AttemptError(Outcome.FAILED, "failed, as scripted")
        if step == "unknown":
            raise AttemptError(Outcome.UNKNOWN, "cut off, as scripted")
        if step == "not_started":
            raise AttemptError(Outcome.NOT_STARTED, "not started, as scripted")
        if step == "busy":
            raise AttemptError(Outcome.NOT_STARTED, "busy, as scripted", busy_seconds=self.script.busy_seconds)
        if step == "refuse":
            raise BackendRefusal(InvalidRequest("refused, as scripted", param="prompt"))
        if step == "refuse_content":
            raise BackendRefusal(ContentRefused("content refused, as scripted"))
        half = 2 if step == "bad_size" else 1
        width, height = max(1, call.width // half), max(1, call.height // half)
        results: list[Artifact | ItemFailure] = [
            artifact_from_bytes(picture(item.prompt, item.seed, width, height), item.seed) for item in call.items
        ]
        if step == "partial":
            results[-1] = ItemFailure("this one failed, as scripted")
        return results


def read_script(kind: type[Kind], script: Mapping[str, Any]) -> Kind:
    """Check a script against its options. Raises ValueError naming the option at fault."""
    try:
        read = read_options(kind, script)
    except ValueError as error:
        if str(error).startswith("sequence") and "Invalid enum value" in str(error):
            raise ValueError(f"{error}; a step is one of {', '.join(STEPS)}") from None
        raise
    if script.get("sequence", STEPS) in ((), []):
        raise ValueError("sequence: it needs at least one step")
    return read


def picture(prompt: str, seed: int, width: int, height: int) -> bytes:
    """A small PNG of four colours that depend on prompt and seed: equal arguments give equal bytes."""
    colours = blake2b(f"{seed}\0{prompt}".encode(), digest_size=12).digest()
    header = pack(">II", width, height) + bytes((2, 3, 0, 0, 0))  # two bits a pixel, of a palette
    chunks: Iterable[tuple[bytes, bytes]] = (
        (b"IHDR", header),
        (b"PLTE", colours),
        (b"IDAT", _stripes(width, height)),
        (b"IEND", b""),
    )
    parts = [SIGNATURE]
    for kind, content in chunks:
        parts += (pack(">I", len(content)), kind, content, pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


@lru_cache(maxsize=32)
def _stripes(width: int, height: int) -> bytes:
    """The pixels, which depend on the size alone: four columns of colour in turn."""
    row = b"\0" + b"\x1b" * ((width + 3) // 4)
    return zlib.compress(row * height, 6)
