"""Pictures that lie, through every way in: what they cost is bounded by what is sent, never by what they say."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import pybase64
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.edge import MAX_PIXELS, UPLOAD_BYTES, Edge, EdgeReply, fuzzing, multipart
from tests.support.hostile_pictures import Hostile, corpus, gradient, ihdr, png, riff, rows, saved, turned_jpeg

from img_serving.domain.images import InputImage
from img_serving.media.intake import MAX_FILL_BYTES, MAX_SCANS, take_in

pytestmark = pytest.mark.smoke

MEMORY = 8 * UPLOAD_BYTES + 16 * 4 * MAX_PIXELS
"""Bytes that all of these requests, one after another, may add to what the program has once it is warm: the largest body as it
came, as text, as bytes and as what is made of it (8 times is generous), and the largest picture with four channels
through the steps of its work. 48 MiB, of which less than half is seen; what is sent here says that it needs gigabytes."""

SECONDS = 10.0
"""For one request on a busy machine. The slowest takes about one; what its file says would take minutes."""

GOOD = png(ihdr(32, 32), rows(32, 32))
HOSTILE = corpus()
Way = Callable[[Edge, bytes], EdgeReply]


def edit_form(target: Edge, data: bytes, file: str = "a.png", mask: bytes | None = None, **fields: str) -> EdgeReply:
    parts: list[tuple[str, bytes, str | None]] = [("prompt", b"a fox", None), ("image", data, file)]
    parts += [(name, text.encode(), None) for name, text in fields.items()]
    if mask is not None:
        parts.append(("mask", mask, "mask.png"))
    body, kind = multipart(parts)
    return target.ask("POST", "/v1/images/edits", body, headers={"Content-Type": kind})


def variation_form(target: Edge, data: bytes) -> EdgeReply:
    body, kind = multipart([("image", data, "a.jpg")])
    return target.ask("POST", "/v1/images/variations", body, headers={"Content-Type": kind})


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + pybase64.b64encode(data).decode()


def edit_json(target: Edge, data: bytes) -> EdgeReply:
    return target.json("/v1/images/edits", {"prompt": "a fox", "images": [{"image_url": url_of(data)}]})


def variation_json(target: Edge, data: bytes) -> EdgeReply:
    return target.json("/v1/images/variations", {"image": url_of(data, "image/webp")})


def mask_form(target: Edge, data: bytes) -> EdgeReply:
    return edit_form(target, GOOD, mask=data)


def job(target: Edge, data: bytes) -> EdgeReply:
    """Made, and followed to its end: what an engine makes of a picture is seen there."""
    body = {"prompt": "a fox", "image": url_of(data, "text/html")}
    reply = target.json("/v1/jobs", {"operation": "edit", "body": body})
    if reply.status == 202:
        events = target.ask("GET", f"{reply.headers['location']}/events")
        assert b"\nevent: job." in b"\n" + events.body
        assert b"internal_error" not in events.body, events.body[-2000:]
    return reply


WAYS: dict[str, Way] = {
    "an edit's form": edit_form,
    "an edit's JSON": edit_json,
    "a variation's form": variation_form,
    "a variation's JSON": variation_json,
    "a mask": mask_form,
    "a job": job,
}


def judge(target: Edge, one: Hostile, reply: EdgeReply, way: str) -> None:
    what = f"{one.name} as {way}: {reply.status} {reply.body[:300]!r}"
    assert reply.seconds < SECONDS, f"{reply.seconds:.1f} s for {what}"
    target.check_memory(MEMORY, what)
    if way == "a mask":
        return  # most are of another size than the picture
    if one.verdict == "refused":
        assert reply.status == 400, what
        assert reply.error["param"] == "image", what
    elif one.verdict == "taken":
        assert reply.status in {200, 202}, what
    else:
        assert reply.status in {200, 202, 400, 422}, what


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_picture_says_of_itself(target: Edge, way: str) -> None:
    """No 500, no memory and no time but for what was sent; and what is right in an odd way is taken."""
    for one in HOSTILE:
        judge(target, one, WAYS[way](target, one.data), way)


def test_the_bounds_of_a_jpeg_are_told(target: Edge) -> None:
    reasons = {
        one.name: WAYS["an edit's form"](target, one.data).body for one in HOSTILE if one.name.startswith("jpeg")
    }
    assert f"more than {MAX_SCANS} scans".encode() in reasons["jpeg, scans without end"]
    assert f"more than {MAX_FILL_BYTES} fill bytes".encode() in reasons["jpeg, a megabyte of fill bytes"]


@pytest.mark.parametrize(("count", "status"), [(16, 200), (17, 400)])
def test_sixteen_pictures_are_as_many_as_an_edit_takes(target: Edge, count: int, status: int) -> None:
    body, kind = multipart([("prompt", b"x", None), *[("image[]", GOOD, "a.png")] * count])
    form = target.ask("POST", "/v1/images/edits", body, headers={"Content-Type": kind})
    listed = target.json("/v1/images/edits", {"prompt": "x", "images": [{"image_url": url_of(GOOD)}] * count})
    assert (form.status, listed.status) == (status, status)


@pytest.mark.parametrize("size", [(31, 32), (64, 64), (1, 1)])
def test_a_mask_of_another_size_is_refused(target: Edge, size: tuple[int, int]) -> None:
    reply = edit_form(target, GOOD, mask=png(ihdr(*size), rows(*size)))
    assert (reply.status, reply.error["param"]) == (400, "mask")


@pytest.mark.parametrize("file", ["a.exe", "a.svg", "../../fuzzmark.png", "a.png\\x00.php", "", "CON", "a" * 3000])
def test_nothing_is_believed_of_a_name(target: Edge, file: str) -> None:
    assert edit_form(target, GOOD, file).status == 200
    assert edit_form(target, b"<svg/>", file).status == 400


@pytest.mark.parametrize("kind", ["image/svg+xml", "text/html", "", "image/png;x=y", "image/" + "x" * 5000])
def test_nothing_is_believed_of_a_media_type(target: Edge, kind: str) -> None:
    reply = target.json("/v1/images/edits", {"prompt": "x", "image": url_of(GOOD, kind)})
    assert reply.status in {200, 400}
    assert target.json("/v1/images/edits", {"prompt": "x", "image": url_of(b"<svg/>", "image/png")}).status == 400


@pytest.mark.parametrize(
    "size", ["1x65535", "99999999999999999999x1", "0x0", "-1x-1", "60000x60000", "1e9x1e9", "٣٢x٣٢", "x"]
)
@pytest.mark.parametrize("path", ["edits", "variations"])
def test_sizes_that_cannot_be_asked_for(target: Edge, size: str, path: str) -> None:
    body, kind = multipart([("prompt", b"x", None), ("size", size.encode(), None), ("image", GOOD, "a.png")])
    assert target.ask("POST", f"/v1/images/{path}", body, headers={"Content-Type": kind}).status == 400
    target.check_memory(MEMORY, size)


URLS = [
    "file:///etc/passwd", "http://127.0.0.1:1/", "http://169.254.169.254/latest/meta-data", "HTTPS://example.invalid/a",
    "ftp://example.invalid/a", "javascript:alert(1)", "data:", "data:,", "data:image/png", "data:image/png;base64,",
    "data:image/png;base64,====", "data:image/png;base64," + "A" * 5, "data:image/png,%89PNG", "\x00", "/etc/passwd",
    "data:image/png;base64,\u0661", "http://" + "a" * 10_000, "{}", "%2e%2e%2f", "blob:null/1", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=ascii)
def test_urls_that_hold_no_picture(target: Edge, url: str) -> None:
    """Nobody fetches them, and no file of this machine is read."""
    for value in (
        {"image": url},
        {"images": [{"image_url": url}]},
        {"image": [url]},
        {"image": url_of(GOOD), "mask": url},
    ):
        reply = target.json("/v1/images/edits", {"prompt": "x", **value})
        assert reply.status == 400
        assert b"root:" not in reply.body
        assert target.json("/v1/jobs", {"operation": "edit", "body": {"prompt": "x", **value}}).status == 400


# flipped

_SEEDS = (
    png(ihdr(32, 32), rows(32, 32)),
    turned_jpeg(saved("JPEG")),
    turned_jpeg(saved("JPEG", progressive=True)),
    saved("WEBP"),
    riff((b"VP8X", b"\x0a\0\0\0\x0f\0\0\x0f\0\0"), (b"VP8L", saved("WEBP", gradient(16, 16), lossless=True)[20:])),
    next(one.data for one in HOSTILE if one.name == "png, EXIF says 3"),
    next(one.data for one in HOSTILE if one.name == "webp, frames outside of it"),
)


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A picture with some bytes changed, taken out or put in; of a PNG with its checksums put right, or nobody reads on."""
    data = bytearray(draw(st.sampled_from(_SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat"]))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            data[at : at + 4] = draw(
                st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
            )
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            data[at:at] = data[at : at + 64] * draw(st.integers(1, 8))
        if len(data) < 8:
            break
    return _with_checksums(bytes(data))


def _with_checksums(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(out):
        stop = at + 12 + int.from_bytes(out[at : at + 4], "big")
        if stop > len(out):
            break
        out[stop - 4 : stop] = zlib.crc32(out[at + 4 : stop - 4]).to_bytes(4, "big")
        at = stop
    return bytes(out)


@fuzzing(400)
@given(bent())
def test_a_bent_picture_is_taken_or_refused(data: bytes) -> None:
    """Nothing but a ValueError comes of it, and what is taken is what it says."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of what it forgives
        try:
            taken = take_in(data, max_pixels=MAX_PIXELS, max_bytes=UPLOAD_BYTES)
        except ValueError:
            return
    assert isinstance(taken, InputImage)
    assert 0 < taken.width * taken.height <= MAX_PIXELS
    assert len(taken.data) <= max(len(data), 64 + 5 * taken.width * taken.height)


@fuzzing(60)
@given(bent(), st.sampled_from(sorted(WAYS)))
def test_a_bent_picture_through_every_way_in(target: Edge, data: bytes, way: str) -> None:
    judge(target, Hostile("a bent picture", data, "either"), WAYS[way](target, data), way)


# what a body holds beside its pictures

_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(url_of(GOOD)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@fuzzing(80)
@given(
    st.sampled_from(["edits", "variations"]),
    st.dictionaries(
        st.sampled_from(["images", "image", "mask", "strength", "denoise", "n", "size", "stream", "seed", "file_id", "extra"]),
        _VALUES,
        max_size=5,
    ),
)  # fmt: skip
def test_any_value_where_a_picture_belongs(target: Edge, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "x", "image": url_of(GOOD), **fields}
    reply = target.ask(
        "POST", f"/v1/images/{path}", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert reply.status in {200, 400}, reply


@pytest.mark.parametrize("depth", [100, 10_000, 100_000])
def test_a_body_that_is_very_deep(target: Edge, depth: int) -> None:
    for inner in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
        raw = b'{"prompt": "x", "image": "' + url_of(GOOD).encode() + b'", "extra": ' + inner + b"}"
        reply = target.ask("POST", "/v1/images/edits", raw, headers={"Content-Type": "application/json"})
        assert reply.status in {200, 400}
        wrapped = b'{"operation": "edit", "body": ' + raw + b"}"
        reply = target.ask("POST", "/v1/jobs", wrapped, headers={"Content-Type": "application/json"})
        assert reply.status in {202, 400}


def test_an_upload_over_the_limit_is_refused_before_it_is_kept(target: Edge) -> None:
    body, kind = multipart([("prompt", b"x", None), ("image", bytes(UPLOAD_BYTES + 1), "a.png")])
    reply = target.request("POST", "/v1/images/edits", body, headers={"Content-Type": kind})
    assert reply.status in {0, 413}  # the connection may be reset while the rest is still being sent
    target.check_memory(MEMORY)
