"""The input pictures of durable jobs: on disk while a job waits, in memory while a backend reads them.

A queue of edits must not fill the memory, and what a job starts from has to be there after a restart.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from msgspec import structs

from img_serving.domain.errors import GatewayError
from img_serving.domain.images import EXTENSIONS, Call, ImageRequest, InputImage
from img_serving.domain.stored import StoredJob
from img_serving.gateway.delivery import ResultGone
from img_serving.ports import ArtifactStore


class InputSpool:
    """Moves input pictures between a request and the disk."""

    def __init__(self, store: ArtifactStore) -> None:
        """`store` has nothing else in it: what no job names is removed by `sweep`."""
        self._store = store

    async def put(self, request: ImageRequest) -> ImageRequest:
        """The request with its input pictures on disk instead of in memory.

        Raises:
            StorageFailed: they could not be stored; then none is.
        """
        if not request.images:
            return request
        names: list[str] = []
        try:
            images = [await self._to_disk(one, names) for one in request.images]
            mask = None if request.mask is None else await self._to_disk(request.mask, names)
        except BaseException:
            for name in names:
                await self._store.delete(name)
            raise
        return structs.replace(request, images=tuple(images), mask=mask)

    async def filled(self, call: Call) -> Call:
        """The call with the bytes of its input pictures.

        Raises:
            ResultGone: one is not there any more.
        """
        if not any(one.spooled for item in call.items for one in _inputs(item.images, item.mask)):
            return call
        read: dict[str, InputImage] = {}
        items = []
        for item in call.items:
            for one in _inputs(item.images, item.mask):
                if one.spooled is not None and one.spooled not in read:
                    read[one.spooled] = await self._read(one)
            images = tuple(read.get(one.spooled or "", one) for one in item.images)
            mask = item.mask if item.mask is None else read.get(item.mask.spooled or "", item.mask)
            items.append(structs.replace(item, images=images, mask=mask))
        request = structs.replace(call.request, images=items[0].images, mask=items[0].mask)
        return structs.replace(call, items=tuple(items), request=request)

    async def forget(self, stored: StoredJob) -> None:
        """A job needs its input no more. What cannot be removed now is found by `sweep` at the next start."""
        with suppress(GatewayError):
            for name in stored.spooled:
                await self._store.delete(name)

    async def sweep(self, wanted: Collection[str]) -> None:
        """Remove what is not `wanted`: a crash came between a picture and its job."""
        for name in await self._store.names():
            if name not in wanted:
                await self._store.delete(name)

    async def _to_disk(self, one: InputImage, names: list[str]) -> InputImage:
        stored = await self._store.put(one.data, EXTENSIONS[one.media_type])
        names.append(stored.name)
        return structs.replace(one, data=b"", spooled=stored.name, spooled_bytes=stored.size_bytes)

    async def _read(self, one: InputImage) -> InputImage:
        found = None if one.spooled is None else await self._store.find(one.spooled)
        if found is None:
            raise ResultGone("an input picture of this job is not there any more", code="input_lost")
        data = b"".join([chunk async for chunk in self._store.read(found.name, 0, found.size_bytes)])
        return structs.replace(one, data=data, spooled=None, spooled_bytes=0)


def _inputs(images: tuple[InputImage, ...], mask: InputImage | None) -> tuple[InputImage, ...]:
    return images if mask is None else (*images, mask)
