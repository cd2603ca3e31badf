"""Server-sent events as OpenAI's clients read them: frames, comments that keep a connection open, and the image events.

Every frame has an `event` line and ends with a blank line, an error is nested under `error`, and nothing but comments fills
the pauses: other forms are lost or taken for something else by one client library or another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import msgspec

from img_serving.api.errors import error_detail
from img_serving.api.exchange import Headers, Reply
from img_serving.domain.errors import GatewayError
from img_serving.domain.images import FORMATS, Artifact, ImageRequest
from img_serving.gateway.delivery import effective_quality
from img_serving.gateway.live import LiveJob, News, PartialNews, PictureNews

Piece = bytes | memoryview

COMMENT = b": keep-alive\n\n"
JOIN_BYTES = 64 * 1024
"""Up to here a frame is one piece."""

_END = b"}\n\n"

_PREFIXES = {"generation": "image_generation", "edit": "image_edit", "variation": "image_variation"}
_encode = msgspec.json.Encoder().encode

NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""Nothing here is counted in tokens; clients expect the field."""


def reply_of(frames: AsyncIterator[Piece], headers: Headers | None = None) -> Reply:
    """A reply that is a stream of events. No proxy may hold it back (`x-accel-buffering` is nginx's word for that)."""
    own: Headers = [(b"cache-control", b"no-cache, no-transform"), (b"x-accel-buffering", b"no")]
    return Reply(200, media_type=b"text/event-stream", headers=[*own, *(headers or [])], stream=frames)


def frame(event: str, data: bytes, event_id: int | None = None) -> bytes:
    """One event; `data` is JSON, which has no line breaks."""
    number = b"" if event_id is None else b"id: %d\n" % event_id
    return b"event: %b\n%bdata: %b\n\n" % (event.encode(), number, data)


def error_frame(error: GatewayError) -> bytes:
    """What went wrong after the head was out."""
    return frame("error", _encode({"type": "error", "error": error_detail(error)}))


async def follow(live: LiveJob, heartbeat_seconds: float) -> AsyncIterator[News | None]:
    """Everything that happens to a job's pictures, from the first on; None where nothing has for a while. Ends with the job."""
    loop = asyncio.get_running_loop()
    read = 0
    silent_until = loop.time() + heartbeat_seconds
    while True:
        version = live.version
        while read < len(live.news):
            read += 1
            yield live.news[read - 1]
            silent_until = loop.time() + heartbeat_seconds
        if live.is_over:
            return
        try:
            # until a point in time: steps that nothing is told of must not put the heartbeat off
            async with asyncio.timeout_at(silent_until):
                await live.changed(version)
        except TimeoutError:
            yield None
            silent_until = loop.time() + heartbeat_seconds


async def image_events(live: LiveJob, heartbeat_seconds: float) -> AsyncIterator[Piece]:
    """The frames of a job, as OpenAI's API streams them; an error is the last of them."""
    request = live.job.request
    if not live.news:
        yield COMMENT  # some proxies pass a head on only with the first byte behind it
    async for news in follow(live, heartbeat_seconds):
        for piece in (COMMENT,) if news is None else news_pieces(request, news):
            yield piece
    if live.error is not None:
        yield error_frame(live.error)


async def finished_events(request: ImageRequest, artifacts: list[Artifact]) -> AsyncIterator[Piece]:
    """The frames of a job that was over before anybody asked."""
    for index, artifact in enumerate(artifacts):
        for piece in news_pieces(request, PictureNews(index, artifact)):
            yield piece


def news_pieces(request: ImageRequest, news: News, event_id: int | None = None) -> Iterator[Piece]:
    """What happened, as a frame in pieces: pictures are megabytes, and many followers may be told of one at once."""
    event, said = _partial(request, news) if isinstance(news, PartialNews) else _completed(request, news)
    head = frame(event, _encode(said), event_id)[: -len(_END)] + b',"b64_json":"'
    encoded = news.encoded()  # held until it is sent
    if len(encoded.text) <= JOIN_BYTES:
        yield b"".join((head, encoded.text, b'"', _END))
        return
    yield head
    yield encoded.text
    yield b'"' + _END


def _partial(request: ImageRequest, news: PartialNews) -> tuple[str, dict[str, object]]:
    """An unfinished picture: `output_format` is that of the preview itself, `size` that of the picture it will be."""
    event = f"{_PREFIXES[request.operation]}.partial_image"
    width, height = news.size or (request.width, request.height)
    return event, {
        "type": event,
        "created_at": int(time.time()),
        "size": "auto" if width is None else f"{width}x{height}",
        "quality": effective_quality(request.quality),
        "background": request.background or "auto",
        "output_format": FORMATS[news.preview.media_type],
        "partial_image_index": news.number,
        "image_index": news.index,
    }


def _completed(request: ImageRequest, news: PictureNews) -> tuple[str, dict[str, object]]:
    """A finished picture."""
    artifact = news.artifact
    event = f"{_PREFIXES[request.operation]}.completed"
    said: dict[str, object] = {
        "type": event,
        "created_at": int(time.time()),
        "size": f"{artifact.width}x{artifact.height}",
        "quality": effective_quality(request.quality),
        "background": "transparent" if request.background == "transparent" else "opaque",
        "output_format": FORMATS[artifact.media_type],
        "usage": NO_USAGE,
        "image_index": news.index,
    }
    if artifact.seed is not None:
        said["seed"] = artifact.seed
    if artifact.revised_prompt is not None:
        said["revised_prompt"] = artifact.revised_prompt
    return event, said
