"""Calls for tests of the OpenAI adapter, and one run of them against a fake server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from img_serving.backends.openai import OpenAIBackend
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, Progress
from img_serving.ports import HealthReport
from img_serving.transport.fetch import SafeFetcher
from img_serving.transport.http import HttpTransport
from tests.support.fake_openai import FakeOpenAI

PROMPT = "a quiet harbour"


def call_of(
    *seeds: int,
    prompt: str = PROMPT,
    model: str | None = None,
    size: tuple[int, int] | None = (64, 64),
    shape: tuple[int, int] = (64, 64),
    previews: bool = False,
    timeout_seconds: float = 10.0,
    **request: Any,
) -> Call:
    """A call for one picture a seed; whatever else is given counts as the client's own. `size` None: it asked for none."""
    seeds = seeds or (5,)
    names = {"steps": "num_inference_steps"}
    own = {name for name in request if name not in {"operation", "images", "mask", "seed_given", "previews"}}
    given = {names.get(name, name) for name in own}
    given |= {"seed"} if request.get("seed_given") else set()
    width, height = size if size is not None else (None, None)
    asked = ImageRequest(
        prompt, seed=seeds[0], n=len(seeds), width=width, height=height, given=frozenset(given), **request
    )
    items = tuple(Item(prompt, asked.negative_prompt, seed) for seed in seeds)
    wide, high = size or shape
    return Call(asked, model, wide, high, items, timeout_seconds, request_id="req-1", previews=previews)


def picture_of(
    colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (64, 64), kind: str = "PNG"
) -> InputImage:
    """An input picture."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    media: Any = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}[kind]
    return InputImage(out.getvalue(), media, *size)


def mask_of(size: tuple[int, int] = (64, 64)) -> InputImage:
    """A mask that lets the left half be painted, said as OpenAI says it: transparent there."""
    picture = Image.new("RGBA", size, (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return InputImage(out.getvalue(), "image/png", *size)


class Drawn:
    """What became of a run: the pictures, what was told on the way, and the server to look at."""

    def __init__(self, server: FakeOpenAI, backend: OpenAIBackend, report: HealthReport | None) -> None:
        self.server = server
        self.backend = backend
        self.report = report
        self.progress: list[Progress] = []
        self.results: list[Any] = []

    @property
    def artifacts(self) -> list[Artifact]:
        """The pictures; none may have failed."""
        assert all(isinstance(one, Artifact) for one in self.results), self.results
        return self.results


def draw(
    server: FakeOpenAI, call: Call | None = None, options: Mapping[str, Any] | None = None, *, check: bool = True
) -> Drawn:
    """Check the server, and draw `call` there if there is one."""

    async def main() -> Drawn:
        async with server:
            fetch = SafeFetcher(trusted_url=server.url)
            backend = OpenAIBackend(HttpTransport(server.url), options=options, url=server.url, fetch=fetch)
            try:
                drawn = Drawn(server, backend, await backend.check(5.0) if check else None)
                if call is not None:
                    drawn.results = list(await backend.generate(call, drawn.progress.append))
                return drawn
            finally:
                await backend.close()

    return asyncio.run(main())
