"""Requests that start from pictures: URLs, variations, fingerprints, and files that mean harm."""

from __future__ import annotations

import asyncio
import io
import json
import resource
import struct
import zlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import numpy as np
import pybase64
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support.asgi import Reply
from tests.support.gateways import Harness, running

from img_serving.api import inputs
from img_serving.api.edits import PicturesOperation
from img_serving.api.generation import Bounds
from img_serving.api.inputs import PicturesRequest, read_pictures_request
from img_serving.backends.scripted import picture
from img_serving.domain.errors import InvalidRequest, QueueFull, UnsupportedMediaType
from img_serving.transport.fetch import FetchFailed, SafeFetcher, UrlFetcher

BOUNDS = Bounds(10, 1_000_000, 200, 1000, "b64_json", allow_file=False, max_upload_bytes=2_000_000)
START = picture("start", 1, 64, 48)
OTHER = picture("other", 2, 64, 48)
_MASK = io.BytesIO()
Image.new("RGBA", (64, 48), (0, 0, 0, 90)).save(_MASK, "PNG")
MASK = _MASK.getvalue()
NAMED = "https://pictures.example/a.png?signature=secret-signature"
FORM = b"multipart/form-data; boundary=x-boundary"
Part = tuple[str, bytes, str | None]


def form(*parts: Part, boundary: str = "x-boundary") -> bytes:
    body = b""
    for name, content, file in parts:
        named = f'; filename="{file}"' if file is not None else ""
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode()


def text(data: bytes) -> str:
    return pybase64.b64encode(data).decode()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{text(data)}"


class Web:
    """A fetcher that has pictures by URL, or errors, and remembers what was asked and how many at once."""

    def __init__(self, pages: dict[str, bytes | Exception] | None = None) -> None:
        self.pages = pages or {}
        self.asked: list[tuple[str, float, int]] = []
        self.at_once = self.most_at_once = 0
        self.gate: asyncio.Event | None = None

    async def __call__(self, url: str, timeout_seconds: float, max_bytes: int) -> bytes:
        self.asked.append((url, timeout_seconds, max_bytes))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.gate is not None:
                await self.gate.wait()
            page = self.pages.get(url, START)
            if isinstance(page, Exception):
                raise page
            return page
        finally:
            self.at_once -= 1


def read(
    raw: bytes | dict[str, Any],
    operation: PicturesOperation = "edit",
    kind: bytes | None = b"application/json",
    fetch: UrlFetcher | None = None,
    bounds: Bounds = BOUNDS,
    **more: Any,
) -> PicturesRequest:
    body = json.dumps(raw).encode() if isinstance(raw, dict) else raw
    return asyncio.run(read_pictures_request(operation, body, kind, bounds, fetch, **more))


def refused(*args: Any, **more: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(*args, **more)
    return caught.value


# what comes out


def test_an_edit_comes_out_with_its_pictures_and_its_words() -> None:
    asked = {
        "prompt": "a fox",
        "image": [url_of(START), text(OTHER)],
        "mask": url_of(MASK),
        "n": 2,
        "odd": 1,
        "stream": True,
    }
    got = read({**asked, "response_format": "url", "partial_images": 2})
    request = got.request
    assert (request.operation, request.prompt, request.n, request.previews) == ("edit", "a fox", 2, 2)
    assert [one.data for one in request.images] == [START, OTHER]
    assert request.mask is not None
    assert request.mask.data == MASK
    assert "odd" in request.given
    assert (got.response_format, got.body.stream, got.body.partial_images) == ("url", True, 2)
    assert len(got.fingerprint) == 32
    kept = msgspec.to_builtins(got.body)
    assert (kept["image"], kept["images"], kept["mask"]) == (None, None, None), "a picture is not held twice"


def test_a_black_and_white_mask_becomes_one_that_is_transparent_where_it_was_white() -> None:
    for mode, kind in (("L", "PNG"), ("RGB", "JPEG"), ("1", "PNG"), ("P", "PNG")):
        painted = Image.new("L", (64, 48), 0)
        painted.paste(255, (0, 0, 32, 48))
        out = io.BytesIO()
        painted.convert(mode).save(out, kind)
        mask = read({"prompt": "x", "image": url_of(START), "mask": text(out.getvalue())}).request.mask
        assert mask is not None
        assert (mask.media_type, mask.width, mask.height) == ("image/png", 64, 48)
        alpha = Image.open(io.BytesIO(mask.data)).convert("RGBA").getchannel("A")
        assert (alpha.getpixel((5, 5)), alpha.getpixel((60, 5))) == (0, 255), (mode, kind)


def test_neither_form_nor_json_is_an_unsupported_type() -> None:
    with pytest.raises(UnsupportedMediaType):
        read(b"x", kind=b"text/plain")
    assert read({"prompt": "x", "image": url_of(START)}, kind=None).request.images


# variations


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (form(("image", START, "a.png"), ("n", b"2", None), ("seed", b"7", None), ("strength", b"0.3", None)), FORM),
        ({"image": url_of(START), "n": 2, "seed": 7, "strength": 0.3}, b"application/json"),
        ({"images": [{"image_url": url_of(START)}], "n": 2, "seed": 7, "denoise": 0.3}, b"application/json"),
    ],
)
def test_a_variation_is_one_picture_and_no_words(raw: Any, kind: bytes) -> None:
    request = read(raw, "variation", kind).request
    assert (request.operation, request.prompt, request.n, request.seed) == ("variation", "", 2, 7)
    assert (request.strength, [one.data for one in request.images], request.mask) == (0.3, [START], None)
    assert {"seed", "strength"} <= request.given


def test_words_in_a_variation_are_named_as_ignored_and_refused_where_strict() -> None:
    request = read({"image": url_of(START), "prompt": "a fox"}, "variation").request
    assert (request.prompt, "prompt" in request.given) == ("", True)
    error = refused({"image": url_of(START), "prompt": "a fox", "strict": True}, "variation")
    assert (error.param, error.code) == ("prompt", "unknown_parameter")


@pytest.mark.parametrize(
    ("raw", "kind", "param", "words"),
    [
        ({}, None, "image", "image is required"),
        (form(("n", b"1", None)), FORM, "image", "image is required"),
        ({"image": [url_of(START), url_of(OTHER)]}, None, "image", "one picture, not 2"),
        (form(("image[]", START, "a"), ("image[]", START, "b")), FORM, "image", "one picture, not 2"),
        (form(("image", START, "a"), ("mask", MASK, "b")), FORM, "mask", "a variation takes image"),
        ({"image": url_of(START), "mask": url_of(MASK), "strict": True}, None, "mask", "unknown field"),
        ({"image": url_of(START), "n": 11}, None, "n", "at most 10"),
        ({"image": url_of(START), "size": "9x"}, None, "size", "WIDTHxHEIGHT"),
    ],
)
def test_a_variation_that_cannot_be_is_refused_by_the_name_of_its_field(
    raw: Any, kind: bytes | None, param: str, words: str
) -> None:
    error = refused(raw, "variation", kind)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


def test_an_edit_still_needs_its_words() -> None:
    for raw, kind in (({"image": url_of(START)}, None), (form(("image", START, "a")), FORM)):
        assert refused(raw, "edit", kind).code == "missing_required_parameter"
    assert refused({"image": url_of(START), "prompt": "  "}).message == "prompt is empty"


# fingerprints


PARTS: tuple[Part, ...] = (
    ("prompt", b"a fox", None), ("n", b"2", None), ("image[]", START, "a.png"), ("image[]", OTHER, "b.png"),
    ("mask", MASK, "m.png"),
)  # fmt: skip


def of_form(*parts: Part, boundary: str = "x-boundary", operation: PicturesOperation = "edit") -> bytes:
    kind = f"multipart/form-data; boundary={boundary}".encode()
    return read(form(*parts, boundary=boundary), operation, kind).fingerprint


def test_equal_forms_have_one_fingerprint_whatever_their_boundary_and_order() -> None:
    first = of_form(*PARTS)
    assert of_form(*PARTS, boundary="another-boundary") == first
    shuffled = (PARTS[4], PARTS[2], PARTS[1], PARTS[3], PARTS[0])
    assert of_form(*shuffled) == first
    renamed = tuple((name, data, file and "other.bin") for name, data, file in PARTS)
    assert of_form(*renamed) == first, "a file's name says nothing"


@pytest.mark.parametrize(
    "parts",
    [
        (PARTS[0], PARTS[1], PARTS[3], PARTS[2], PARTS[4]),
        (("prompt", b"a dog", None), *PARTS[1:]),
        PARTS[:4],
        (*PARTS, ("odd", b"1", None)),
        (*PARTS[:2], ("image[]", START, "a.png"), ("image[]", MASK, "b.png"), ("mask", OTHER, "m.png")),
    ],
    ids=["order of pictures", "words", "no mask", "an unknown field", "picture and mask swapped"],
)
def test_forms_that_differ_have_fingerprints_that_differ(parts: Sequence[Part]) -> None:
    assert of_form(*parts) != of_form(*PARTS)


def test_equal_json_has_one_fingerprint_whatever_its_order_and_white_space() -> None:
    body = {"prompt": "a fox", "n": 2, "image": [url_of(START), text(OTHER)], "extra": {"b": 1, "a": [1, 2]}}
    first = read(body).fingerprint
    turned = {"extra": {"a": [1, 2], "b": 1}, "image": [text(START), url_of(OTHER)], "n": 2, "prompt": "a fox"}
    assert read(json.dumps(turned, indent=3).encode()).fingerprint == first
    for change in ({"n": 3}, {"image": [url_of(OTHER), url_of(START)]}, {"extra": 1}, {"mask": url_of(MASK)}):
        assert read({**body, **change}).fingerprint != first


def test_the_operation_is_part_of_it() -> None:
    parts: Sequence[Part] = (("image", START, "a"), ("prompt", b"x", None))
    assert of_form(*parts) != of_form(*parts, operation="variation")


def test_a_picture_behind_a_url_is_the_url() -> None:
    """What is there may change; the request is the same."""
    one = read({"prompt": "x", "image": NAMED}, fetch=Web()).fingerprint
    assert read({"prompt": "x", "image": NAMED}, fetch=Web({NAMED: OTHER})).fingerprint == one
    assert read({"prompt": "x", "image": NAMED + "2"}, fetch=Web()).fingerprint != one
    assert read({"prompt": "x", "image": url_of(START)}).fingerprint != one


# pictures behind URLs


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"image": NAMED}, "image"),
        ({"images": [{"image_url": url_of(START)}, {"image_url": NAMED}]}, "image"),
        ({"image": url_of(START), "mask": {"image_url": NAMED}}, "mask"),
    ],
)
def test_urls_are_refused_where_the_operator_does_not_allow_them(body: dict[str, Any], param: str) -> None:
    error = refused({"prompt": "x", **body})
    assert (error.status, error.param, error.code) == (400, param, "unsupported")
    assert "limits.fetch_image_urls" in error.message
    assert "secret" not in error.message


def test_pictures_and_the_mask_are_fetched_and_keep_their_order() -> None:
    web = Web({"http://a.example/1": OTHER, "HTTPS://b.example/2": MASK})
    images = [{"image_url": "http://a.example/1"}, {"image_url": url_of(START)}]
    held: list[int] = []
    got = read({"prompt": "x", "images": images, "mask": "HTTPS://b.example/2"}, fetch=web, hold=held.append)
    assert [one.data for one in got.request.images] == [OTHER, START]
    assert got.request.mask is not None
    assert got.request.mask.data == MASK
    assert {seconds for _, seconds, _ in web.asked} == {20.0}
    assert sorted(held) == sorted([len(OTHER), len(MASK)])


def test_at_most_four_are_fetched_at_once_and_what_fails_stops_the_others() -> None:
    async def main() -> None:
        web = Web()
        web.gate = asyncio.Event()
        urls = [f"http://a.example/{number}" for number in range(9)]
        body = json.dumps({"prompt": "x", "image": urls}).encode()
        reading = asyncio.create_task(read_pictures_request("edit", body, None, BOUNDS, web))
        while len(web.asked) < 4:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
        web.pages[urls[0]] = FetchFailed("it did not come in time", is_definite=False)
        assert web.at_once == 4
        web.gate.set()
        with pytest.raises(InvalidRequest, match="picture 1 could not be fetched: it did not come in time"):
            await reading
        assert web.most_at_once == 4
        assert web.at_once == 0

    asyncio.run(main())


@pytest.mark.parametrize("field", ["image", "mask"])
def test_what_could_not_be_fetched_names_the_field_and_the_reason_and_no_secret(field: str) -> None:
    web = Web({NAMED: FetchFailed("pictures.example answered HTTP 404")})
    error = refused({"prompt": "x", "image": url_of(START), field: NAMED}, fetch=web)
    assert (error.status, error.param, error.code) == (400, field, "invalid_image_url")
    assert error.message.endswith("could not be fetched: pictures.example answered HTTP 404")
    assert "secret" not in error.message


def test_what_is_fetched_is_bounded_each_and_together() -> None:
    web = Web()
    read({"prompt": "x", "image": NAMED}, fetch=web)
    assert web.asked[0][2] == 2_000_000, "of what all of them may be"
    tight = Bounds(10, 1_000_000, 200, 1000, "b64_json", allow_file=False, max_upload_bytes=len(START) + 10)
    error = refused({"prompt": "x", "image": [NAMED, NAMED + "2"]}, fetch=web, bounds=tight)
    assert "together" in error.message
    huge = Bounds(10, 1_000_000, 200, 1000, "b64_json", allow_file=False, max_upload_bytes=10**9)
    web.asked.clear()
    read({"prompt": "x", "image": NAMED}, fetch=web, bounds=huge)
    assert web.asked[0][2] == inputs.MAX_IMAGE_BYTES == 50 * 1024 * 1024


def test_what_is_fetched_counts_among_the_uploads() -> None:
    def full(_: int) -> None:
        raise QueueFull("too many uploads are being worked on")

    with pytest.raises(QueueFull):
        read({"prompt": "x", "image": NAMED}, fetch=Web(), hold=full)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "http://[::1]/a.png", "http://localhost/a.png", "http://169.254.169.254/latest",
            "http://10.0.0.1/", "http://user:secret@8.8.8.8/", "http://[::ffff:127.0.0.1]/a", "http://0/", "http://2130706433/"],
)  # fmt: skip
def test_nothing_inside_is_ever_fetched(url: str) -> None:
    error = refused({"prompt": "x", "image": url + "?token=secret-token"}, fetch=SafeFetcher())
    assert (error.status, error.code) == (400, "invalid_image_url")
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "url", ["ftp://a.example/x.png", "file:///etc/passwd", "gopher://x", "//a.example/x", "javascript:1"]
)
def test_other_schemes_are_no_urls_here(url: str) -> None:
    assert "bad base64" in refused({"prompt": "x", "image": url}, fetch=Web()).message


def test_nothing_is_fetched_for_a_request_that_is_wrong_anyway() -> None:
    web = Web()
    for body in ({"n": 99}, {"size": "9x"}, {"image": [NAMED] * 17}, {"strict": True, "odd": 1}):
        refused({"prompt": "x", "image": NAMED, **body}, fetch=web)
    assert web.asked == []


# the whole way


def through(act: Callable[[Harness], Coroutine[Any, Any, Any]], more: str = "") -> Any:
    async def main() -> Any:
        async with running(f"[rate_limit]\nenabled = false\n{more}\n") as gateway:
            return await act(gateway)

    return asyncio.run(main())


async def post(gateway: Harness, route: str, *parts: Part) -> Reply:
    return await gateway.client.request(
        "POST", f"/v1/images/{route}", raw=form(*parts), headers={"content-type": FORM.decode()}
    )


def drawn(reply: Reply, index: int = 0) -> np.ndarray:
    assert reply.status == 200, reply.body
    return np.asarray(
        Image.open(io.BytesIO(pybase64.b64decode(reply.json()["data"][index]["b64_json"]))).convert("RGB")
    )


B64: Part = ("response_format", b"b64_json", None)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_the_built_in_painter_edits_under_a_mask_and_keeps_the_rest_to_the_last_bit() -> None:
    start = Image.effect_noise((96, 64), 80).convert("RGB")
    mask = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (20, 10, 60, 50))

    async def act(gateway: Harness) -> None:
        parts: tuple[Part, ...] = (
            ("prompt", b"sunset", None),
            ("image", saved(start), "a"),
            ("mask", saved(mask), "m"),
            B64,
        )
        reply = await post(gateway, "edits", *parts, ("seed", b"5", None), ("n", b"2", None))
        keep = np.asarray(mask)[..., 3] == 255
        for index in (0, 1):
            assert np.array_equal(drawn(reply, index)[keep], np.asarray(start)[keep])
        assert not np.array_equal(drawn(reply, 0), drawn(reply, 1))
        again = await post(gateway, "edits", *parts, ("seed", b"6", None))
        assert again.json()["data"][0]["b64_json"] == reply.json()["data"][1]["b64_json"], "picture i has seed + i"
        assert "x-img-serving-ignored" not in reply.headers

    through(act)


@pytest.mark.parametrize("path", ["/v1/images/variations", "/images/variations"])
def test_variations_are_drawn(path: str) -> None:
    async def act(gateway: Harness) -> None:
        body = {"image": url_of(START), "n": 2, "seed": 3, "size": "80x80", "response_format": "b64_json"}
        reply = await gateway.client.post(path, body)
        assert reply.json()["size"] == "80x80"
        assert not np.array_equal(drawn(reply, 0), drawn(reply, 1))
        assert [one["seed"] for one in reply.json()["data"]] == [3, 4]
        worded = await gateway.client.post(path, {**body, "prompt": "a fox"})
        assert worded.headers["x-img-serving-ignored"] == "prompt"
        assert worded.json()["data"] == reply.json()["data"]

    through(act)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_the_official_client_makes_variations() -> None:
    import httpx2 as httpx
    import openai

    async def act(gateway: Harness) -> None:
        transport = httpx.ASGITransport(app=gateway.gateway.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(api_key="sk-admin-key", base_url="http://gateway.test/v1", http_client=http)
            made = await client.images.create_variation(
                image=START, n=2, size="256x256", model="dall-e-2", response_format="b64_json"
            )
            assert made.data is not None
            assert len({one.b64_json for one in made.data}) == 2

    through(act)


def test_a_backend_without_variations_says_so() -> None:
    async def act(gateway: Harness) -> None:
        reply = await gateway.client.post("/v1/images/variations", {"image": url_of(START)})
        assert (reply.status, reply.error["param"]) == (400, "model")
        assert "sketch: it cannot do the operation 'variation'" in reply.error["message"]

    through(act, '[[backends]]\nname = "sketch"\nprotocol = "scripted"')


def test_urls_are_fetched_where_the_operator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web({"https://pictures.example/1": OTHER})
    monkeypatch.setattr(inputs, "SafeFetcher", lambda **_: web)

    async def act(gateway: Harness) -> Reply:
        body = {"prompt": "x", "image": "https://pictures.example/1", "strength": 0, "response_format": "b64_json"}
        return await gateway.client.post("/v1/images/edits", body)

    reply = through(act, "[limits]\nfetch_image_urls = true")
    assert np.array_equal(drawn(reply), np.asarray(Image.open(io.BytesIO(OTHER)).convert("RGB")))
    assert through(act).status == 400


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claimed(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body + chunk(b"IEND", b"")


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (60 * number, 0, 0)) for number in range(4)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=9)


def lying() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (64, 32), (200, 40, 40)), "JPEG", exif=exif)


GOOD = {
    "one pixel": (saved(Image.new("RGB", (1, 1))), "32x32"),
    "grey and alpha": (saved(Image.new("LA", (40, 30), (9, 200))), None),
    "16 bits": (saved(Image.new("I;16", (40, 30), 40_000)), None),
    "cmyk": (saved(Image.new("CMYK", (40, 30), (9, 200, 30, 4)), "JPEG"), None),
    "palette": (saved(Image.new("P", (40, 30), 3)), None),
    "turned by exif": (lying(), None),
    "animated png": (moving("PNG"), None),
    "animated webp": (moving("WEBP"), None),
    "with a tail": (START + b"<html>" * 1000, None),
    "a picture in a picture": (saved(Image.new("RGB", (40, 30)), "JPEG") + START, None),
    "the largest": (saved(Image.new("L", (4096, 4096), 9)), "64x64"),
}
BAD = {
    "a bomb by its head": claimed(60_000, 60_000),
    "a bomb of many pixels": claimed(16_000, 16_000, pixels=bytes(1_000_000)),
    "pixels without end": claimed(64, 64, pixels=bytes(50_000_000)),
    "no pixels": claimed(64, 64),
    "a text bomb": claimed(
        64, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(60_000_000), 9)), pixels=bytes(64 * 193)
    ),
    "a profile bomb": claimed(
        64, 64, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(60_000_000), 9)), pixels=bytes(64 * 193)
    ),
    "cut short": START[:-9],
    "a damaged one": START[:60] + bytes([START[60] ^ 1]) + START[61:],
    "a cut jpeg": saved(Image.effect_noise((90, 90), 60), "JPEG")[:-40],
    "html": b"<html>",
    "nothing": b"",
    "gif": saved(Image.new("P", (9, 9)), "GIF"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
}


@pytest.mark.parametrize("route", ["edits", "variations"])
@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_drawn_from(name: str, route: str) -> None:
    data, size = GOOD[name]

    async def act(gateway: Harness) -> None:
        more: tuple[Part, ...] = (("size", size.encode(), None),) if size else ()
        words: tuple[Part, ...] = (("prompt", b"x", None),) if route == "edits" else ()
        reply = await post(gateway, route, ("image", data, "a"), ("steps", b"2", None), *words, *more, B64)
        assert drawn(reply).ndim == 3
        if name == "turned by exif":
            assert reply.json()["size"] == "32x64"

    through(act)


@pytest.mark.parametrize("route", ["edits", "variations"])
def test_a_picture_too_small_to_be_drawn_at_its_size_is_said_to_have_that_fault(route: str) -> None:
    async def act(gateway: Harness) -> None:
        reply = await post(gateway, route, ("image", picture("x", 1, 1, 1), "a"), ("prompt", b"x", None))
        assert (reply.status, reply.error["param"]) == (400, "size")
        assert "not 1x1" in reply.error["message"]

    through(act)


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize("name", BAD)
def test_pictures_that_mean_harm_are_a_400_and_never_reach_an_engine_that_breaks(name: str, field: str) -> None:
    async def act(gateway: Harness) -> None:
        fine: tuple[Part, ...] = (("image", picture("x", 1, 64, 64), "a"),) if field == "mask" else ()
        parts: tuple[Part, ...] = (("prompt", b"x", None), *fine, (field, BAD[name], "b"), ("steps", b"1", None), B64)
        reply = await post(gateway, "edits", *parts)
        if name in {"pixels without end", "a text bomb", "a profile bomb"}:
            # a decoder that stops at the last row, or passes over what it does not show, draws it without harm
            assert reply.status in {200, 400}
        else:
            assert (reply.status, reply.error["param"] in {field, None}) == (400, True), reply.body

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    through(act)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, (
        "of KiB: bounded, whatever is claimed"
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damaged_form_is_answered(data: st.DataObject) -> None:
    whole = bytearray(
        form(("prompt", b"x", None), ("image", START, "a"), ("mask", MASK, "m"), ("steps", b"1", None), B64)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.integers(0, 255))
        else:
            del whole[at : at + data.draw(st.integers(1, 60))]

    async def act(gateway: Harness) -> None:
        route = data.draw(st.sampled_from(["edits", "variations"]))
        headers = {"content-type": FORM.decode()}
        reply = await gateway.client.request("POST", f"/v1/images/{route}", raw=bytes(whole), headers=headers)
        assert reply.status in {200, 400}, reply.body

    through(act)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.just(url_of(START)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image_url", "file_id", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["image", "images", "mask", "strength", "prompt", "n", "denoise", "odd"]), values)
)
def test_any_json_is_answered(fields: dict[str, Any]) -> None:
    raw = json.dumps({"prompt": "x", "image": url_of(START), "steps": 1, "size": "16x16", **fields}).encode()

    async def act(gateway: Harness) -> None:
        for route in ("edits", "variations"):
            headers = {"content-type": "application/json"}
            reply = await gateway.client.request("POST", f"/v1/images/{route}", raw=raw, headers=headers)
            assert reply.status in {200, 400}, reply.body

    through(act)
