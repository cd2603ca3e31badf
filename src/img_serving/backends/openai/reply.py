"""What comes back from a server of OpenAI's Images API: a document with pictures, or a stream of events that ends in one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pybase64

from img_serving.backends.sse import Event, EventReader
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import Preview, Progress
from img_serving.media.scan import SKELETON_BYTES, split_images_json
from img_serving.media.sniff import sniff
from img_serving.ports import OnProgress

SMALL_BYTES: Final = 16 * 1024
"""Up to here a reply is simply decoded: copying its strings costs less than finding where they stand."""


class Picture(msgspec.Struct):
    """One of `data`. What a picture can do without is `Any`: an odd note must not cost a picture that was paid for."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: Any = None
    seed: Any = None


class _Reply(msgspec.Struct):
    data: list[Picture]
    background: Any = None
    quality: Any = None


class _Streamed(msgspec.Struct):
    """The data of an event."""

    type: Any = None
    b64_json: str | None = None
    url: str | None = None
    partial_image_index: Any = None
    error: Any = None
    revised_prompt: Any = None
    seed: Any = None
    background: Any = None
    quality: Any = None


_REPLY = msgspec.json.Decoder(_Reply)
_STREAMED = msgspec.json.Decoder(_Streamed)


class Reply(msgspec.Struct):
    """Pictures whose `b64_json` is an index of `payloads`, and what the server says that it really used."""

    pictures: list[Picture] = []
    payloads: list[memoryview] = []
    background: Any = None
    quality: Any = None


def read_reply(body: bytes | bytearray) -> Reply:
    """The reply's pictures. Raises AttemptError where it is no such reply."""
    try:
        if len(body) <= SMALL_BYTES:
            small = _REPLY.decode(body)
            payloads: list[memoryview] = []
            for picture in small.data:
                if picture.b64_json:
                    payloads.append(memoryview(picture.b64_json.encode()))
                    picture.b64_json = str(len(payloads) - 1)
            return Reply(small.data, payloads, small.background, small.quality)
        skeleton, payloads = split_images_json(body)
        if len(skeleton) > SKELETON_BYTES:
            raise ValueError("what is left without its pictures is too large")
        big = _REPLY.decode(skeleton)
    except (ValueError, RecursionError):
        # what msgspec says would quote the document's paths, not why: the status was 200, so a person has to look
        raise AttemptError(
            Outcome.FAILED, "the backend's reply is no images reply (bad JSON or another shape)"
        ) from None
    return Reply(big.data, payloads, big.background, big.quality)


class StreamedReply:
    """Collects a reply that comes as events: partial pictures are told at once, finished ones are kept.

    `feed` never raises, as a transport's callback must not: what was wrong is in `fault` (safe to show) or in `error`, the data
    of an error event.
    """

    def __init__(self, on_progress: OnProgress, heard: Callable[[], None], limit_bytes: int, *, partials: int) -> None:
        """`heard` is called at every sign of life; an event may have `limit_bytes`; `partials` previews were asked for."""
        self._partials = partials
        self.reply = Reply()
        self.finished = asyncio.Event()
        """The picture is there: what may still come is of no interest."""
        self.error: bytes | None = None
        self.fault: str | None = None
        self._on_progress = on_progress
        self._heard = heard
        self._events = EventReader(limit_bytes)

    def feed(self, piece: bytes) -> None:
        """Take bytes of the stream. They are no sign of life by themselves: a proxy's pings go on while an engine hangs."""
        if self.fault is not None:
            return
        try:
            for event in self._events.feed(piece):
                self._take(event)
        except (ValueError, RecursionError) as error:
            self._spoil(error)

    def finish(self) -> None:
        """The stream has ended."""
        if self.fault is not None:
            return
        try:
            for event in self._events.finish():
                self._take(event)
        except (ValueError, RecursionError) as error:
            self._spoil(error)

    def _spoil(self, error: Exception) -> None:
        said = "no event of the protocol" if isinstance(error, msgspec.DecodeError | RecursionError) else str(error)
        self.fault = f"the backend's stream cannot be read ({said})"

    def _take(self, event: Event) -> None:
        if event.data == b"[DONE]":
            return
        skeleton, payloads = split_images_json(event.data)
        if len(skeleton) > SKELETON_BYTES:
            raise ValueError("an event is too large without its picture")
        try:
            told = _STREAMED.decode(skeleton)
        except (msgspec.DecodeError, RecursionError):
            if event.name == "error":
                self.error = self.error or event.data
            return  # odd words between the pictures are not worth the one that is still to come
        kind = told.type if isinstance(told.type, str) else event.name
        if event.name == "error" or kind == "error" or told.error:
            self.error = self.error or event.data
        elif kind.endswith(".partial_image"):
            self._preview(told, payloads)
        elif kind.endswith(".completed"):
            self._keep(told, payloads)
        # others (a ping, the text of a thinking model) are signs of life and no more

    def _preview(self, told: _Streamed, payloads: list[memoryview]) -> None:
        """A preview that cannot be shown is not worth the picture that is still to come."""
        index = told.partial_image_index if type(told.partial_image_index) is int else 0
        done = max(1, min(index + 1, self._partials))
        self._heard()
        preview = None
        if payloads:
            try:
                data = pybase64.b64decode(payloads[0], validate=True)
            except ValueError:
                data = b""
            media_type = sniff(data)
            # a call is streamed alone, and its partial pictures are spread evenly over the way
            share = done / (self._partials + 1)
            preview = None if media_type is None else Preview(data, media_type, share=share)
        self._on_progress(Progress(done, self._partials + 1, preview))

    def _keep(self, told: _Streamed, payloads: list[memoryview]) -> None:
        reply = self.reply
        encoded = None
        if payloads and told.b64_json:
            reply.payloads.append(payloads[int(told.b64_json)])
            encoded = str(len(reply.payloads) - 1)
        reply.pictures.append(Picture(encoded, told.url, told.revised_prompt, told.seed))
        reply.background, reply.quality = told.background, told.quality
        self._heard()
        self.finished.set()
        self._on_progress(Progress(self._partials + 1, self._partials + 1))
