"""Forms: what goes in comes out at another's parser, whatever is in it."""

from __future__ import annotations

import email.parser
import email.policy

from hypothesis import given
from hypothesis import strategies as st

from img_serving.backends.multipart import FilePart, encode_form


def parsed(body: bytes, content_type: str) -> list[tuple[str, str | None, str, bytes]]:
    head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    found = []
    for part in message.iter_parts():
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        name = str(part.get_param("name", header="content-disposition"))
        found.append((name, part.get_filename(), part.get_content_type(), data))
    return found


def test_fields_come_before_files_and_files_keep_their_type():
    picture = FilePart("image[]", "image-0.png", "image/png", b"\x89PNG\r\n--x\r\n")
    body, content_type = encode_form([("prompt", "여우"), ("n", "2")], [picture, picture])
    assert parsed(body, content_type) == [
        ("prompt", None, "text/plain", "여우".encode()),
        ("n", None, "text/plain", b"2"),
        ("image[]", "image-0.png", "image/png", picture.data),
        ("image[]", "image-0.png", "image/png", picture.data),
    ]


@given(value=st.text(st.characters(codec="utf-8"), max_size=50), data=st.binary(max_size=100))
def test_no_content_breaks_out_of_its_part(value, data):
    body, content_type = encode_form([("prompt", value)], [FilePart("image", "a.png", "image/png", data)])
    boundary = content_type.partition("boundary=")[2].encode()
    assert body.count(b"--" + boundary) == 3
    assert b"\r\n\r\n" + value.encode() + b"\r\n--" in body
    assert b"\r\n\r\n" + data + b"\r\n--" in body


def test_no_name_breaks_out_of_its_line():
    body, content_type = encode_form([('a"\r\nX-Evil: 1\r\n\r\n', "v")], [FilePart('b"', 'c"\n.png', "image/png", b"")])
    assert b"X-Evil: 1\r\n" not in body
    assert len(parsed(body, content_type)) == 2


def test_each_form_has_a_boundary_of_its_own():
    assert encode_form([("a", "b")], [])[1] != encode_form([("a", "b")], [])[1]
