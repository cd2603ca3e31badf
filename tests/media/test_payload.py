"""Base64 and bytes of pictures: proven once, held once."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.backends.scripted import picture
from img_serving.domain.images import Artifact
from img_serving.media.payload import artifact_from_base64, artifact_from_bytes, base64_text, raw_bytes

PNG = picture("a fox", 7, 48, 32)
# bytes behind IEND are allowed, and these make every letter of both alphabets turn up
RICH_PNG = PNG + bytes(range(256)) * 4 + b"\xfb\xff\xfe\xff\xbf"
TEXT = base64.b64encode(RICH_PNG)


def test_the_text_is_kept_as_it_is_and_the_bytes_are_dropped():
    body = b'{"b64_json":"' + TEXT + b'"}'
    view = memoryview(body)[13:-2]
    artifact = artifact_from_base64(view, 7, "revised")
    assert artifact.encoded is view
    assert artifact.data is None
    assert (artifact.media_type, artifact.width, artifact.height) == ("image/png", 48, 32)
    assert (artifact.seed, artifact.revised_prompt) == (7, "revised")
    assert raw_bytes(artifact) == RICH_PNG
    assert base64_text(artifact) is view


def test_bytes_are_kept_as_they_are():
    artifact = artifact_from_bytes(PNG, 3)
    assert artifact.data is PNG
    assert artifact.encoded is None
    assert raw_bytes(artifact) is PNG
    assert base64_text(artifact) == base64.b64encode(PNG)
    assert artifact_from_bytes(memoryview(PNG)).data == PNG


@pytest.mark.parametrize("kind", [bytes, memoryview, lambda text: text.decode()], ids=["bytes", "view", "str"])
@pytest.mark.parametrize("prefix", [b"", b"data:image/png;base64,", b"DATA:image/png;charset=x;BASE64,"])
def test_a_data_url_is_its_payload(kind, prefix):
    artifact = artifact_from_base64(kind(prefix + TEXT))
    assert bytes(base64_text(artifact)) == TEXT
    assert artifact.data is None


@pytest.mark.parametrize(
    "text",
    [
        TEXT.rstrip(b"="),
        TEXT + b"\n",
        b"\r\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)),
        base64.urlsafe_b64encode(RICH_PNG),
        base64.urlsafe_b64encode(RICH_PNG).rstrip(b"="),
    ],
    ids=["no padding", "newline", "lines", "url-safe", "url-safe without padding"],
)
def test_text_with_one_meaning_is_decoded_though_it_is_not_canonical(text):
    artifact = artifact_from_base64(text)
    assert artifact.encoded is None
    assert artifact.data == RICH_PNG
    assert base64.b64decode(bytes(base64_text(artifact)), validate=True) == RICH_PNG


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not a picture"),
        (TEXT[:5] + b"!" + TEXT[6:], "bad base64"),
        (TEXT.replace(b"+", b"-", 1), "bad base64"),
        (TEXT[:40] + b"=" + TEXT[41:], "bad base64"),
        (TEXT[: len(PNG) // 4 * 4 + 1], "bad base64"),
        ("b\u00e4se64", "bad base64"),
        (b"data:image/png,notbase64", "bad base64"),
        (b"data:nothing", "bad base64"),
        (base64.b64encode(PNG[:-6]), "cut short"),
        (base64.b64encode(b"GIF89a" * 9), "not a picture"),
    ],
)
def test_the_reason_is_named(text, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        artifact_from_base64(text)


def test_bytes_that_are_no_complete_picture_are_refused():
    with pytest.raises(ValueError, match="cut short"):
        artifact_from_bytes(PNG[:-1])
    with pytest.raises(ValueError, match="not a picture"):
        artifact_from_bytes(b"<html>")


def test_an_artifact_without_a_picture_is_a_mistake():
    empty = Artifact("image/png", 1, 1, None)
    for move in (raw_bytes, base64_text):
        with pytest.raises(ValueError, match="no picture"):
            move(empty)


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100))
def test_anything_else_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"^(bad base64|not a picture|cut short)"):
        artifact_from_base64(text)


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_both_moves_are_each_others_inverse(extra):
    data = PNG + extra
    artifact = artifact_from_base64(base64_text(artifact_from_bytes(data)))
    assert raw_bytes(artifact) == data


def test_a_large_payload_is_held_once():
    body = base64.b64encode(PNG + os.urandom(300_000))
    encoded = artifact_from_base64(memoryview(body)).encoded
    assert isinstance(encoded, memoryview)
    assert encoded.obj is body
