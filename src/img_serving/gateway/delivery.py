"""Delivery: what finished pictures become for the client, stored, inlined or written to a path, after the slot is free."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import pybase64

from img_serving.domain.errors import AllAttemptsFailed, GatewayError, NotFound, StorageFailed
from img_serving.domain.images import EXTENSIONS, FORMATS, MEDIA_TYPES, Artifact, ImageRequest
from img_serving.domain.jobs import Job
from img_serving.domain.stored import ResponseFormat, StoredJob, StoredPicture, StoredResult
from img_serving.media.payload import artifact_from_bytes, base64_text, raw_bytes
from img_serving.media.strip import strip_metadata
from img_serving.media.transcode import transcode
from img_serving.ports import ArtifactStore
from img_serving.telemetry.metrics import Metrics

TRANSCODE_THREADS = 2
"""Bounds how many decoded pictures are in memory at once; Pillow lets go of the interpreter while it encodes PNG and WebP."""

_quoted = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an image reply in parts (never joined: pictures are big), and what its headers tell."""

    parts: tuple[bytes | memoryview, ...]
    ignored: tuple[str, ...] = ()
    """Parameters that the client set and that were not honoured, sorted."""


class ResultGone(GatewayError):
    """The job succeeded, and its pictures are not kept any more."""

    kind = "invalid_request_error"
    default_code = "result_expired"
    status = 410


class Delivery:
    """Turns a resolved job's artifacts into the reply that its client asked for."""

    def __init__(
        self,
        store: ArtifactStore,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        strip: bool = False,
    ) -> None:
        """`strip` removes text and other metadata from pictures (their pixels are not touched)."""
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._strip = strip
        self._pool: ThreadPoolExecutor | None = None

    async def answer(
        self,
        job: Job,
        response_format: ResponseFormat,
        base_url: Callable[[], str],
        ignored: tuple[str, ...] = (),
    ) -> Answer:
        """Encode, store or inline every picture of `job`. `ignored` are parameters that were not honoured.

        Raises:
            StorageFailed: a picture could not be stored; its message says what works instead.
        """
        started = self._clock()
        request = job.request
        artifacts = drawn_of(job)
        if request.output_format is not None or self._strip:
            for index, artifact in enumerate(artifacts):
                artifacts[index] = await self._in_format(artifact, request)
        self.count(job, artifacts)
        parts: list[bytes | memoryview] = []
        opening = b'{"created":%d,"data":[{' % int(time.time())
        for artifact in artifacts:
            if response_format == "b64_json":
                parts += (opening + b'"b64_json":"', base64_text(artifact))
                closing = b'"' + _about(artifact)
            else:
                parts.append(opening)
                closing = await self._stored(artifact, response_format, base_url) + _about(artifact)
            opening = closing + b",{"
        first = artifacts[0]
        transparent = request.background == "transparent" and "background" not in ignored
        parts.append(
            closing + _effective(first.width, first.height, request.quality, first.media_type, transparent=transparent)
        )
        self._metrics.stage_seconds.observe(self._clock() - started, "deliver")
        return Answer(tuple(parts), ignored)

    def count(self, job: Job, artifacts: list[Artifact]) -> None:
        """Count what is delivered."""
        backend, request = job.backend or "", job.request
        self._metrics.pictures.add(backend, by=len(artifacts))
        for one in artifacts:
            if request.width and (one.width != request.width or one.height != request.height):
                self._metrics.wrong_size.add(backend)
                break

    async def as_delivered(self, artifact: Artifact, request: ImageRequest) -> Artifact:
        """One picture in the format that was asked for, without what is to be removed from it.

        Raises:
            AllAttemptsFailed: it cannot be decoded.
        """
        return await self._in_format(artifact, request)

    # results that are kept

    async def keep(self, stored: StoredJob, artifacts: list[Artifact], ignored: tuple[str, ...]) -> StoredResult:
        """Store the pictures of a job under names of its own, so that a second try replaces those of the first.

        Raises:
            StorageFailed: one could not be stored; then none is.
        """
        pictures: list[StoredPicture] = []
        try:
            for index, artifact in enumerate(artifacts):
                name = artifact_name(stored.artifact_key, index, EXTENSIONS[artifact.media_type])
                kept = await self._store.put(raw_bytes(artifact), EXTENSIONS[artifact.media_type], name)
                self._metrics.artifacts.add("stored")
                self._metrics.artifact_bytes.add(by=kept.size_bytes)
                pictures.append(
                    StoredPicture(
                        name,
                        artifact.media_type,
                        artifact.width,
                        artifact.height,
                        artifact.seed,
                        artifact.revised_prompt,
                    )
                )
        except StorageFailed as error:
            self._metrics.storage_failures.add()
            for picture in pictures:
                await self._store.delete(picture.name)
            raise StorageFailed(error.message, should_retry=False) from error
        return StoredResult(int(time.time()), tuple(pictures), stored.response_format, stored.base_url, ignored)

    async def found(self, stored: StoredJob) -> StoredResult | None:
        """What a gateway that died had stored for a job: its result, where that is all of it; a part of it is removed.

        What the backend said beside the pictures is lost: a seed is told where the client gave one.
        """
        request, key = stored.request, stored.artifact_key
        pictures: list[StoredPicture] = []
        for index in range(request.n):
            seed = request.seed_of(index) if request.seed_given else None
            names = [artifact_name(key, index, extension) for extension in EXTENSIONS.values()]
            pictures += [await self._picture(name, seed) for name in names if await self._store.find(name) is not None]
        if len(pictures) == request.n:
            return StoredResult(int(time.time()), tuple(pictures), stored.response_format, stored.base_url)
        for picture in pictures:
            await self._store.delete(picture.name)
        return None

    async def _picture(self, name: str, seed: int | None) -> StoredPicture:
        there = artifact_from_bytes(await self._read(name))
        return StoredPicture(name, there.media_type, there.width, there.height, seed)

    async def again(
        self, stored: StoredJob, at_hand: Sequence[Artifact] | None = None, *, inline: bool = True
    ) -> Answer:
        """The answer of a succeeded job: the same bytes each time.

        `at_hand` are its pictures, where they need not be read. Not `inline`: URLs also where base64 was asked for.

        Raises:
            ResultGone: a picture that has to be read is not there any more.
        """
        result = stored.result
        if result is None:
            raise ResultGone("the result of this job is not kept")
        request = stored.request
        parts: list[bytes | memoryview] = []
        opening = b'{"created":%d,"data":[{' % result.created
        for index, picture in enumerate(result.pictures):
            if result.response_format == "b64_json" and inline:
                text = (
                    base64_text(at_hand[index])
                    if at_hand is not None
                    else pybase64.b64encode(await self._read(picture.name))
                )
                parts += (opening + b'"b64_json":"', text)
                closing = b'"' + _about(picture)
            else:
                parts.append(opening)
                if result.response_format == "file":
                    closing = b'"file_path":' + _quoted(self._store.path_of(picture.name))
                else:
                    closing = b'"url":' + _quoted(f"{result.base_url}/images/{picture.name}")
                closing += _about(picture)
            opening = closing + b",{"
        first = result.pictures[0]
        transparent = request.background == "transparent" and "background" not in result.ignored
        parts.append(
            closing + _effective(first.width, first.height, request.quality, first.media_type, transparent=transparent)
        )
        return Answer(tuple(parts), result.ignored)

    async def artifacts_of(self, stored: StoredJob) -> list[Artifact]:
        """The pictures of a succeeded job.

        Raises:
            ResultGone: one is not there any more.
        """
        pictures = stored.result.pictures if stored.result is not None else ()
        return [
            Artifact(
                media_type=one.media_type,
                width=one.width,
                height=one.height,
                seed=one.seed,
                data=await self._read(one.name),
                revised_prompt=one.revised_prompt,
            )
            for one in pictures
        ]

    async def _read(self, name: str) -> bytes:
        found = await self._store.find(name)
        if found is None:
            raise ResultGone("the pictures of this job are not kept any more")
        try:
            return b"".join([chunk async for chunk in self._store.read(name, 0, found.size_bytes)])
        except NotFound:
            raise ResultGone("the pictures of this job are not kept any more") from None

    def close(self) -> None:
        """Give up the codec threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_format(self, artifact: Artifact, request: ImageRequest) -> Artifact:
        wanted = request.output_format
        if wanted is not None and MEDIA_TYPES[wanted] != artifact.media_type:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(TRANSCODE_THREADS, "transcode")
            loop = asyncio.get_running_loop()
            try:
                data = await loop.run_in_executor(
                    self._pool, transcode, raw_bytes(artifact), wanted, request.output_compression
                )
            except ValueError as error:
                raise AllAttemptsFailed(f"the backend's picture is no good: {error}", should_retry=False) from error
            self._metrics.transcoded.add(wanted)
            artifact = artifact_from_bytes(data, artifact.seed, artifact.revised_prompt)
        return self._stripped(artifact) if self._strip else artifact

    @staticmethod
    def _stripped(artifact: Artifact) -> Artifact:
        data = raw_bytes(artifact)
        try:
            clean = strip_metadata(data, artifact.media_type)
        except ValueError as error:
            # what cannot be taken apart cannot be cleaned: handing it on would break the operator's word
            raise AllAttemptsFailed(f"the backend's picture is no good: {error}", should_retry=False) from error
        return artifact if clean is data else artifact_from_bytes(clean, artifact.seed, artifact.revised_prompt)

    async def _stored(self, artifact: Artifact, response_format: ResponseFormat, base_url: Callable[[], str]) -> bytes:
        try:
            stored = await self._store.put(raw_bytes(artifact), EXTENSIONS[artifact.media_type])
        except StorageFailed as error:
            self._metrics.storage_failures.add()
            raise StorageFailed(
                f'{error.message}; response_format "b64_json" needs no storage', should_retry=False
            ) from error
        self._metrics.artifacts.add("stored")
        self._metrics.artifact_bytes.add(by=stored.size_bytes)
        if response_format == "file":
            return b'"file_path":' + _quoted(self._store.path_of(stored.name))
        return b'"url":' + _quoted(f"{base_url()}/images/{stored.name}")


def drawn_of(job: Job) -> list[Artifact]:
    """Take the pictures of a job that has succeeded: who has them holds the only copy from here on."""
    artifacts: list[Artifact] = []
    for task in job.tasks:
        if task.artifact is None:  # a succeeded job has them all
            raise AllAttemptsFailed(f"picture {task.index} is missing", should_retry=False)
        artifacts.append(task.artifact)
        task.artifact = None
    return artifacts


def artifact_name(key: bytes, index: int, extension: str) -> str:
    """The name of a durable job's picture: as unguessable as its key (16 random bytes), and the same at each try."""
    return f"img-{hashlib.sha256(key + b'%d' % index).hexdigest()[:32]}.{extension}"


def _about(artifact: Artifact | StoredPicture) -> bytes:
    seed = b"" if artifact.seed is None else b',"seed":%d' % artifact.seed
    revised = b"" if artifact.revised_prompt is None else b',"revised_prompt":' + _quoted(artifact.revised_prompt)
    return seed + revised + b"}"


def effective_quality(quality: str | None) -> str:
    """The quality that was really used: the API's answer is never `auto`."""
    return {None: "medium", "auto": "medium", "standard": "medium", "hd": "high"}.get(quality, quality or "medium")


@lru_cache(maxsize=256)
def _effective(width: int, height: int, quality: str | None, media_type: str, *, transparent: bool) -> bytes:
    """The end of a reply: what was really made."""
    return b'],"size":"%dx%d","quality":%s,"background":"%s","output_format":"%s"}' % (
        width,
        height,
        _quoted(effective_quality(quality)),
        b"transparent" if transparent else b"opaque",
        FORMATS[media_type].encode(),
    )
