"""What is asked for and what comes back: image requests, calls to an endpoint, and pictures.

Frozen msgspec structs: made several times a request, they cost a tenth of what frozen dataclasses do.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Operation = Literal["generation", "edit", "variation"]
OutputFormat = Literal["png", "jpeg", "webp"]
MediaType = Literal["image/png", "image/jpeg", "image/webp"]

MEDIA_TYPES: dict[OutputFormat, MediaType] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXTENSIONS: dict[str, str] = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
FORMATS: dict[str, OutputFormat] = {media: name for name, media in MEDIA_TYPES.items()}

VARIATION_STRENGTH = 0.5
"""How much of its picture a variation changes where nobody says: enough to differ, and not to be another one."""

SEED_LIMIT = 2**63
"""Seeds are whole numbers from 0 to this, exclusive (they travel as int64 in every protocol we speak)."""


class InputImage(msgspec.Struct, frozen=True, gc=False):
    """A picture that a client sent along, sniffed: `width` and `height` in pixels.

    One of a durable job is on disk under `spooled` and has no `data` here: what waits must not fill the memory. A call to a
    backend has the data always.
    """

    data: bytes
    media_type: MediaType
    width: int
    height: int
    spooled: str | None = None
    spooled_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """How large its file is, wherever that is."""
        return self.spooled_bytes if self.spooled is not None else len(self.data)

    def fitted(self, pixels: int) -> tuple[int, int]:
        """Its own size, or where that is more than `pixels`, the largest of the same shape that is not."""
        if self.width * self.height <= pixels:
            return self.width, self.height
        scale = (pixels / (self.width * self.height)) ** 0.5
        return max(1, int(self.width * scale)), max(1, int(self.height * scale))


class ImageRequest(msgspec.Struct, frozen=True, gc=False):
    """What a client asked for, checked and normalised.

    `None` always means "the backend's own default". `width` and `height` (pixels) are given together or not at all.
    `seed` is the seed of image 0; image i has seed + i. `seed_given` tells a client's seed from one that we drew.
    `given` names the optional parameters that the client set: what a backend cannot honour is reported by name.
    `images` are what an edit or a variation starts from; `mask` (a PNG of the first one's size) is transparent where it may
    change it, and `strength` is how much of it may change: 0 nothing, 1 everything. A variation's prompt is empty. `previews`
    is how many unfinished pictures are wanted.
    """

    prompt: str
    operation: Operation = "generation"
    model: str | None = None
    backend: str | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None
    seed: int = 0
    seed_given: bool = False
    steps: int | None = None
    guidance_scale: float | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    sampler: str | None = None
    scheduler: str | None = None
    clip_skip: int | None = None
    output_format: OutputFormat | None = None
    output_compression: int | None = None
    user: str | None = None
    images: tuple[InputImage, ...] = ()
    mask: InputImage | None = None
    strength: float | None = None
    previews: int = 0
    strict: bool = False
    given: frozenset[str] = frozenset()

    def seed_of(self, index: int) -> int:
        """The seed of image `index`: base + index, wrapping below `SEED_LIMIT`."""
        return (self.seed + index) % SEED_LIMIT

    @property
    def usual_strength(self) -> float | None:
        """The strength to draw with: the client's; else a variation has its own, and everything else the engine's (None)."""
        return VARIATION_STRENGTH if self.strength is None and self.operation == "variation" else self.strength


class Item(msgspec.Struct, frozen=True, gc=False):
    """One picture of a call: what may differ between the members of a batch.

    `images` and `mask` are what an edit starts from, as in `ImageRequest`.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    images: tuple[InputImage, ...] = ()
    mask: InputImage | None = None


class Call(msgspec.Struct, frozen=True):
    """One call of a batch to one endpoint.

    `request` carries what all members share (size, steps, guidance …); its prompt, negative prompt, seed and input images are
    those of the first member. `model` is the name to use upstream (None: whatever the engine has). `width` × `height` in
    pixels. `timeout_seconds` is how long one attempt may go without an answer or progress. `previews`: unfinished pictures
    are wanted.
    """

    request: ImageRequest
    model: str | None
    width: int
    height: int
    items: tuple[Item, ...]
    timeout_seconds: float
    request_id: str = ""
    traceparent: str | None = None
    previews: bool = False


class Artifact(msgspec.Struct, frozen=True, gc=False):
    """A finished picture.

    Its bytes are in `data`, or, where the backend sent base64, in `encoded` (standard base64 text, already proven valid):
    the one that is there is the only copy, `media.payload` makes the other when it is needed. `width` and `height` in
    pixels are what the picture really has. `seed` is None where nobody knows it. `ignored` names parameters of the request
    that the engine turned out not to have honoured.
    """

    media_type: MediaType
    width: int
    height: int
    seed: int | None
    data: bytes | None = None
    encoded: bytes | memoryview | None = None
    revised_prompt: str | None = None
    ignored: tuple[str, ...] = ()


class ItemFailure(msgspec.Struct, frozen=True, gc=False):
    """One picture of a batch that failed while its neighbours did not. `refused` marks the request itself as the cause."""

    message: str
    refused: bool = False


class Preview(msgspec.Struct, frozen=True, gc=False):
    """An unfinished picture, as the engine sent it: a JPEG, PNG or WebP of any size. `index`: of which item of the call.

    `share` is how far that one picture is, from 0 to 1; None: nobody knows. It is not the call's: an engine that draws its
    items one after the other is a quarter through a call of four when the first is done.
    """

    data: bytes
    media_type: MediaType
    index: int = 0
    share: float | None = None


class Progress(msgspec.Struct, frozen=True, gc=False):
    """How far a call is: `done` of `total` steps. Any report renews the attempt's time-out."""

    done: int
    total: int
    preview: Preview | None = None
