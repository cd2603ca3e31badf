"""The model behind a worker: whether it is ready, what it can do, who draws and who waits."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from img_serving.backends.http import prompts_of
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, NotFound, QueueFull
from img_serving.domain.images import Artifact, Call, ImageRequest, Item, ItemFailure, Progress
from img_serving.engines.engine import Engine
from img_serving.engines.runner import EngineRunner, words_of
from img_serving.worker.checking import checked
from img_serving.worker.counts import Counts, memory_of
from img_serving.worker.options import WorkerOptions

log = logging.getLogger("img_serving.worker")

WARM_UP_SIDE: Final = 512
WARM_UP_STEPS: Final = 2
MAX_WAIT_SECONDS: Final = 60.0
MAX_PIXELS: Final = 64 * 1024 * 1024
"""Of a picture, where the engine sets no bound of its own: no typing error may take all memory."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the model is: `share` from 0 to 1, what it does now, and why it will not get ready (""): it may."""

    share: float = 0.0
    doing: str = "starting"
    failed: str = ""


class Workshop:
    """One engine with its threads, its queue and its counts. Everything but `load` belongs to the loop's thread."""

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        options: WorkerOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.counts = Counts()
        self.loading: Loading | None = Loading()
        """None: ready."""
        self.drawing = 0
        """Calls that the engine draws now."""
        self._clock = clock
        self._runner = EngineRunner(engine_factory, threads=options.slots)
        self._capabilities = Capabilities()
        self._seated = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __repr__(self) -> str:
        state = self.loading.doing if self.loading is not None else "ready"
        return f"<Workshop {self.options.model}: {state}, {self.drawing} drawn, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot."""
        return max(0, self._runner.in_flight - self.drawing)

    @property
    def in_flight(self) -> int:
        """Calls that are drawn, wait, or are being sent."""
        return self._seated

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do within the worker's own limits."""
        return self._capabilities

    async def load(self, tell: Callable[[Loading], None]) -> None:
        """Load and warm up, in a thread. `tell` is told, on the loop, how far it is.

        Raises:
            AttemptError: the engine could not be loaded, and why.
        """
        loop = asyncio.get_running_loop()
        began = self._clock()

        def note(share: float, doing: str) -> None:
            self.loading = Loading(min(max(share, 0.0), 1.0), doing)
            tell(self.loading)

        def on_load(share: float, doing: str) -> None:
            loop.call_soon_threadsafe(note, share, doing)

        try:
            await self._runner.loaded(on_load)
            self._capabilities = self._limited(checked(await self._runner.capabilities()))
        except AttemptError as error:
            self.loading = Loading(doing="failed", failed=error.message)
            raise
        if self.options.warm_up:
            note(1.0, "warming up")
            await self._warm_up()
        self.counts.load_seconds = self._clock() - began
        self.loading = None

    @contextmanager
    def seat(self) -> Iterator[bool]:
        """A place for one call, from its first byte to its last; False: there is none."""
        if self._seated >= self.options.slots + self.options.queue_size:
            yield False
            return
        self._seated += 1
        self._is_empty.clear()
        try:
            yield True
        finally:
            self._seated -= 1
            if not self._seated:
                self._is_empty.set()

    async def emptied(self) -> None:
        """Wait until nobody has a seat."""
        await self._is_empty.wait()

    def full(self) -> QueueFull:
        """What those are told who get no seat."""
        wait = min(MAX_WAIT_SECONDS, max(0.1, self.counts.mean_draw_seconds))
        return QueueFull(f"{self._seated} calls are drawn or wait already", retry_after_seconds=wait)

    def admit(self, call: Call) -> None:
        """Look whether a call can be drawn here.

        Raises:
            InvalidRequest: it asks for what the model cannot do.
            NotFound: it asks for another model.
        """
        can, options = self._capabilities, self.options
        if call.model not in {None, options.model} and not options.any_model:
            raise NotFound(f"this worker serves the model {options.model!r}", code="model_not_found", param="model")
        request = call.request
        if request.operation not in can.operations:
            raise InvalidRequest(f"this model does no {request.operation}", param="operation")
        refusal = can.sizes.refusal(call.width, call.height)
        if refusal is None and can.sizes.fit(call.width, call.height) != (call.width, call.height):
            refusal = f"both sides are multiples of {can.sizes.multiple}, not {call.width}x{call.height}"
        if refusal is None and call.width * call.height > MAX_PIXELS:
            refusal = f"{call.width}x{call.height} is over {MAX_PIXELS} pixels"
        if refusal is not None:
            raise InvalidRequest(refusal, param="size")
        if request.steps is not None and not 1 <= request.steps <= (can.max_steps or request.steps):
            most = f" to {can.max_steps}" if can.max_steps else " on"
            raise InvalidRequest(f"steps are from 1{most}, not {request.steps}", param="num_inference_steps")
        for name, asked, known in (
            ("sampler", request.sampler, can.samplers),
            ("scheduler", request.scheduler, can.schedulers),
        ):
            if asked is not None and known is not None and known.find(asked) is None:
                raise InvalidRequest(f"there is no {name} {asked[:80]!r}; {known.hint(asked)}", param=name)
        for item in call.items:
            if item.mask is not None and not can.masks:
                raise InvalidRequest("this model cannot use a mask", param="mask")

    async def draw(
        self, call: Call, on_progress: Callable[[Progress], None], on_start: Callable[[], None]
    ) -> list[Artifact | ItemFailure]:
        """Draw a call that was admitted; it waits for a slot first. Cancelling stops the engine at its next step.

        Raises:
            AttemptError: the engine failed.
            BackendRefusal: the engine cannot draw what is asked for.
        """
        counts, clock = self.counts, self._clock
        arrived = clock()
        stepped = started = 0.0
        steps = 0

        def starts() -> None:
            nonlocal stepped, started
            if ended:
                return  # its news was on the way when the call was cancelled
            stepped = started = clock()
            self.drawing += 1
            counts.queue_seconds.observe(started - arrived)
            on_start()

        def progress(news: Progress) -> None:
            nonlocal stepped, steps
            if news.done > steps:  # previews of one step come each on its own
                now = clock()
                counts.step_seconds.observe((now - stepped) / (news.done - steps))
                stepped, steps = now, news.done
            on_progress(news)

        ended = False
        outcome = "cancelled"
        try:
            results = await self._runner.draw(call, progress, starts)
            outcome = "ok"
        except BackendRefusal:
            outcome = "refused"
            raise
        except AttemptError as error:
            outcome = "failed"
            _log_failure(error, call)
            raise
        finally:
            ended = True
            counts.calls.add(outcome)
            if started:
                self.drawing -= 1
                counts.drawn(clock() - started)
        drawn = [one for one in results if isinstance(one, Artifact)]
        counts.pictures.add(str(len(call.items)), by=len(drawn))
        counts.output_bytes.add(by=sum(len(one.data or b"") for one in drawn))
        counts.input_bytes.add(by=sum(len(image.data) for item in call.items for image in item.images))
        return results

    def render_metrics(self) -> bytes:
        """Prometheus text."""
        share = 1.0 if self.loading is None else self.loading.share
        return self.counts.render(
            {
                "worker_ready": ("Whether the model is loaded.", float(self.loading is None)),
                "worker_loading_share": ("How far the model is loaded, from 0 to 1.", share),
                "worker_load_seconds": ("Seconds that loading and warming up took.", self.counts.load_seconds),
                "worker_slots": ("Calls drawn at the same time.", self.options.slots),
                "worker_drawing": ("Calls that the engine draws now.", self.drawing),
                "worker_waiting": ("Calls that wait for a slot.", self.waiting),
                **(memory_of(self._runner.engine) if self._runner.engine is not None else {}),
            }
        )

    def close(self) -> None:
        """Stop what still draws at its next step, and end the threads."""
        self._runner.close()

    def _limited(self, can: Capabilities) -> Capabilities:
        most = self.options.max_batch_size
        return replace(
            can,
            max_batch_size=can.max_batch_size if most is None else min(can.max_batch_size, most),
            max_concurrency=self.options.slots,
            any_model=self.options.any_model,
        )

    async def _warm_up(self) -> None:
        call = warm_up_call(self._capabilities)
        try:
            await self._runner.draw(call, lambda _: None)
        except (AttemptError, BackendRefusal) as error:
            log.warning("warming up failed, and so may the first request: %s", error)


def warm_up_call(can: Capabilities) -> Call:
    """A picture that any model of these capabilities can draw, of its usual size and with few steps."""
    width, height = can.default_size or (WARM_UP_SIDE, WARM_UP_SIDE)
    if can.sizes.refusal(width, height) is not None:
        side = can.sizes.max_side or WARM_UP_SIDE
        width, height = can.sizes.choices[0] if can.sizes.choices else (side, side)
    width, height = can.sizes.fit(width, height)
    steps = min(WARM_UP_STEPS, can.max_steps or WARM_UP_STEPS)
    request = ImageRequest("warm up", width=width, height=height, steps=steps)
    return Call(request, None, width, height, (Item("warm up", None, 0),), timeout_seconds=600.0)


def _quotes(words: str, call: Call) -> bool:
    """Whether words may have been taken from a prompt: any but the shortest of its words is in them, however spelt."""
    once = words.replace("\\\\", "\\")  # a KeyError writes its words as `repr` does
    spelt = {form.casefold() for form in (words, once, _composed(words))}
    for prompt in filter(None, prompts_of(call)):
        for word in _WORD.findall(_composed(prompt).casefold()):
            forms = (word, ascii(word)[1:-1], repr(word.encode())[2:-1])  # as it is, and as `repr` writes it
            if len(word) >= (3 if word.isascii() else 1) and any(form in one for form in forms for one in spelt):
                return True
    return False


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _log_failure(error: AttemptError, call: Call) -> None:
    """With where it happened; what it says only where nothing in it may be from a prompt, which is the client's."""
    cause = error.__cause__
    fields = {"request_id": call.request_id, "items": len(call.items), "size": f"{call.width}x{call.height}"}
    if cause is None:
        log.error("%s", error.message, extra={"fields": fields})
        return
    where = "".join(traceback.format_tb(cause.__traceback__))
    words = words_of(cause)
    words = f"{type(cause).__name__}: " + ("(its words may quote a prompt)" if _quotes(words, call) else words)
    log.error("%s: %s\n%s", error.message, words, where, extra={"fields": fields})
