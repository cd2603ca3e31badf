"""The pictures of one call, put together from the events of its stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import Artifact, Item, ItemFailure
from img_serving.media.payload import artifact_from_bytes
from img_serving.wire.v1 import generation_pb2 as pb

MAX_PICTURE_BYTES: Final = 256 * 1024 * 1024
MAX_PARTS: Final = 65_536
"""Chunks of one picture: 256 of them are enough for the largest, but a worker may take smaller ones."""

MAX_WRAPPING_BYTES: Final = 4096
MAX_TEXT_CHARS: Final = 32_000


class Assembly:
    """Takes events as they come; each picture is proven as soon as its last byte is here, and then held once."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._results: list[Artifact | ItemFailure | None] = [None] * len(items)
        self._growing: dict[int, _Growing] = {}

    def picture(self, picture: pb.Picture, data: bytes | memoryview) -> None:
        """A picture, or its beginning.

        Raises:
            AttemptError: `FAILED`: it belongs to no item, or is no good picture.
        """
        index = self._open(picture.index)
        size = picture.size_bytes or len(data)
        if size > MAX_PICTURE_BYTES:
            raise AttemptError(Outcome.FAILED, f"a picture of {size} bytes is over the limit of {MAX_PICTURE_BYTES}")
        growing = self._growing[index] = _Growing(picture, size)
        self._add(index, growing, data)

    def chunk(self, index: int, data: bytes | memoryview) -> None:
        """The next bytes of a picture that has begun.

        Raises:
            AttemptError: `FAILED`: it has not, or has ended, or is no good picture.
        """
        growing = self._growing.get(index)
        if growing is None:
            raise AttemptError(Outcome.FAILED, f"bytes came for item {index}, which has no picture under way")
        self._add(index, growing, data)

    def error(self, error: pb.ItemError, message: str) -> None:
        """An item failed; `message` is safe to show.

        Raises:
            AttemptError: `FAILED`: it belongs to no item.
        """
        index = self._open(error.index)
        self._results[index] = ItemFailure(message or "the worker could not draw it", refused=error.refused)

    def finished(self) -> list[Artifact | ItemFailure]:
        """One result each, in order.

        Raises:
            AttemptError: `FAILED`: some are missing.
        """
        results = [one for one in self._results if one is not None]
        for index, growing in self._growing.items():
            raise AttemptError(
                Outcome.FAILED, f"the picture of item {index} is {growing.missing} bytes shorter than the worker said"
            )
        if len(results) < len(self._results):
            raise AttemptError(
                Outcome.FAILED,
                f"the worker sent {len(results)} of {len(self._results)} pictures and said that it was done",
            )
        return results

    def _open(self, index: int) -> int:
        if index >= len(self._results) or self._results[index] is not None or index in self._growing:
            raise AttemptError(Outcome.FAILED, f"the worker sent a second picture for item {index}, or one too many")
        return index

    def _add(self, index: int, growing: _Growing, data: bytes | memoryview) -> None:
        if (
            isinstance(data, memoryview)
            and isinstance(data.obj, bytes)
            and len(data.obj) - len(data) > MAX_WRAPPING_BYTES
        ):
            data = bytes(data)  # else all that it came in would be held
        growing.parts.append(data)
        if len(growing.parts) > MAX_PARTS:
            raise AttemptError(Outcome.FAILED, f"the picture of item {index} comes in more than {MAX_PARTS} parts")
        growing.missing -= len(data)
        if growing.missing < 0:
            raise AttemptError(Outcome.FAILED, f"the picture of item {index} is longer than the worker said")
        if growing.missing:
            return
        del self._growing[index]
        head, parts = growing.head, growing.parts
        whole = b"".join(parts)  # not copied where it is one `bytes` already
        parts.clear()
        try:
            artifact = artifact_from_bytes(
                whole,
                head.seed if head.HasField("seed") and head.seed >= 0 else self._items[index].seed,
                head.revised_prompt[:MAX_TEXT_CHARS] if head.HasField("revised_prompt") else None,
            )
        except ValueError as error:
            raise AttemptError(Outcome.FAILED, f"the worker's picture is no use: {error}") from None
        if head.ignored:
            artifact = Artifact(
                media_type=artifact.media_type,
                width=artifact.width,
                height=artifact.height,
                seed=artifact.seed,
                data=artifact.data,
                revised_prompt=artifact.revised_prompt,
                ignored=tuple(head.ignored),
            )
        self._results[index] = artifact


class _Growing:
    """A picture under way: what was said of it, the bytes so far, and how many are missing."""

    __slots__ = ("head", "missing", "parts")

    def __init__(self, picture: pb.Picture, size: int) -> None:
        self.head = picture
        self.parts: list[bytes | memoryview] = []
        self.missing = size
