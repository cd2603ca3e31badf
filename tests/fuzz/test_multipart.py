"""Forms that no client library would write, and bodies that are not as long, or as quick, as they say.

The application does not read forms with a library, so what libraries have been caught at is tried on it: names that are paths,
heads that smuggle, parameters in every encoding (RFC 2231, RFC 5987), delimiters that nearly are some.
"""

from __future__ import annotations

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.edge import ADMIN, MARK, UPLOAD_BYTES, Edge, EdgeReply, fuzzing, head, multipart
from tests.support.hostile_pictures import ihdr, png, rows

from img_serving.api.multipart import Form, read_form
from img_serving.domain.errors import InvalidRequest

pytestmark = pytest.mark.smoke

GOOD = png(ihdr(32, 32), rows(32, 32))
PATHS = ("/v1/images/edits", "/v1/images/variations", "/v1/images/generations", "/v1/jobs")

ELSEWHERE = [
    f"../../{MARK}",
    f"/tmp/{MARK}",  # noqa: S108 - nothing is to be there
    f"..\\..\\{MARK}.png",
    f"C:\\{MARK}",
    f"....//....//{MARK}",
    f"%2e%2e%2f{MARK}",
    f"{MARK}\x00.png",
    f"file:///tmp/{MARK}",
    f"|touch /tmp/{MARK}",
    f"$(touch /tmp/{MARK})",
    f"`touch /tmp/{MARK}`",
    f"~/{MARK}",
    f"generated_images/{MARK}.png",
    f"data/{MARK}",
    f"{MARK}" * 200,
    ".",
    "..",
    "",
    "/",
    "/etc/passwd",
    "image[__proto__]",
    "image[constructor][prototype]",
    "\u202e" + MARK,
    "그림.png",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]
"""Names of files and of fields that lead somewhere else."""


def send(
    target: Edge, body: bytes, kind: str | bytes = "multipart/form-data; boundary=x-boundary", path: str = PATHS[0]
) -> EdgeReply:
    return target.ask("POST", path, body, headers={"Content-Type": kind})


def part(head_of_part: bytes, content: bytes = GOOD) -> bytes:
    return b"--x-boundary\r\n" + head_of_part + b"\r\n\r\n" + content + b"\r\n"


PROMPT = part(b'Content-Disposition: form-data; name="prompt"', b"a fox")
IMAGE = part(b'Content-Disposition: form-data; name="image"; filename="a.png"')
END = b"--x-boundary--\r\n"


# names


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda one: ascii(one[:40]))
def test_a_name_that_leads_elsewhere_leads_nowhere(target: Edge, name: str) -> None:
    """Of a file it is not read, of a field it is nobody's."""
    raw = name.encode()
    file = part(b'Content-Disposition: form-data; name="image"; filename="' + raw + b'"')
    assert send(target, PROMPT + file + END).status == 200
    encoded = "".join(f"%{byte:02x}" for byte in raw).encode()
    file = part(b"Content-Disposition: form-data; name=image; filename*=UTF-8''" + encoded)
    assert send(target, PROMPT + file + END).status == 200
    for field in (b'name="' + raw + b'"', b"name*=UTF-8''" + encoded):
        for file_of in (b"", b'; filename="a.png"'):
            body = PROMPT + IMAGE + part(b"Content-Disposition: form-data; " + field + file_of) + END
            assert send(target, body).status in {200, 400}
    target.check_files()


DISPOSITIONS = [
    b"form-data; name*=us\x00ascii''image; filename=a",
    b"form-data; name*=idna''image; filename=a",
    b"form-data; name*=undefined''image; filename=a",
    b"form-data; name*=punycode''-; filename=a",
    b"form-data; name*=unicode_escape''\\ud800; filename=a",
    b"form-data; name*=raw_unicode_escape''\\Uffffffff; filename=a",
    b"form-data; name*=utf-7''+2AA-; filename=a",
    b"form-data; name*=utf-16''%00; filename=a",
    b"form-data; name*=zlib_codec''x; filename=a",
    b"form-data; name*=rot13''vzntr; filename=a",
    b"form-data; name*=mbcs''image; filename=a",
    b"form-data; name*=" + b"x" * 5000 + b"''image; filename=a",
    b"form-data; name*='''''''''; filename=a",
    b"form-data; name*; filename*; name*0; name*0*",
    b"form-data; name*0=im; name*1=age; filename=a",
    b"form-data; name*1=age; name*0=im; filename=a",
    b"form-data; name*0*=UTF-8''im; name*1*=%61ge; filename=a",
    b"form-data; name*" + b"9" * 5000 + b"=image; filename=a",
    b"form-data; name*0*=x'y'z; name*" + b"1" * 4400 + b"*=q; filename=a",
    b"form-data; name*-1=image; filename=a",
    b"form-data; name*\xd9\xa1=image; filename=a",
    b'form-data; name="image"; name="mask"; filename="a"; filename="b"',
    b'form-data; NAME="image"; FILENAME="a"',
    b'FORM-DATA; name="image"; filename="a"',
    b'form-data; name="image; filename=a',
    b'form-data; name="ima\\"ge"; filename="a"',
    b"form-data; name=image; filename=",
    b"form-data;;;;; name=image; filename=a;;;;",
    b"form-data; =image; filename=a",
    b"form-data; name=; filename=a",
    b"form-data" + b"; x=y" * 1500 + b"; name=image; filename=a",
    b"form-data" + b";" * 8000 + b"name=image",
    b'form-data; name="' + b'";' * 3000,
    b'form-data; x="' + b";" * 8000,
    b'form-data; name="image"; filename="=?utf-8?b?Li4vLi4v?="',
    b'attachment; name="image"; filename="a"',
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("disposition", DISPOSITIONS, ids=lambda one: ascii(one[:60]))
def test_a_disposition_in_any_encoding(target: Edge, disposition: bytes) -> None:
    reply = send(target, PROMPT + part(b"Content-Disposition: " + disposition) + END)
    assert reply.status in {200, 400}
    assert reply.seconds < 5
    kind = b"multipart/form-data; " + disposition.partition(b";")[2].replace(b"name", b"boundary")
    if not set(kind) & {0, 0x0A, 0x0D}:
        assert send(target, PROMPT + IMAGE + END, kind).status in {200, 400}


@pytest.mark.parametrize(
    "parameters",
    [
        b'; x="' + b";" * 60_000,
        b";" * 60_000,
        b'; x="' + b'";' * 30_000,
        b"; x=y" * 12_000,
        b"; " + b"x" * 60_000,
        b";" + b" " * 60_000,
        b"; x" + b" =" * 30_000,
        b';x="\\"' * 10_000,
        b';x="y\\' * 10_000,
        b"; x*=utf-8''" + b"%41" * 20_000,
    ],
    ids=lambda one: ascii(one[:12]),
)
def test_a_header_is_read_in_one_pass(parameters: bytes) -> None:
    """A reader that starts again at every semicolon takes seconds for as long a header as there may be."""
    began = time.process_time()
    form = read_form(PROMPT + END, b"multipart/form-data; boundary=x-boundary" + parameters)
    assert form.fields == {"prompt": "a fox"}
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (b'name="a.b"', "a.b"),
        (b"name=a", "a"),
        (b' NAME = "a" ', "a"),
        (b'name="a\\b"', "ab"),
        (b'x="; name=no"; name=a', "a"),
        (b"name*=UTF-8''%61%62", "ab"),
        (b"name*=iso-8859-1'en'a", "a"),
        (b"name*=utf-8''%ff; name=a", "a"),
        (b"name*=utf-16''a; name=a", "a"),
        (b"name*=a; name=b", "b"),
        (b"name=a; name=b", "a"),
        (b'name="a"b; x', "a"),
        (b"name; =b; name=a", "a"),
    ],
)
def test_what_a_disposition_names(told: bytes, name: str) -> None:
    assert read_form(
        part(b"Content-Disposition: form-data; " + told, b"1") + END, b"multipart/form-data; boundary=x-boundary"
    ).fields == {name: "1"}


HEADS = [
    b"content-disposition : form-data; name=image; filename=a",
    b"Content-Disposition: form-data;\r\n name=image;\r\n\tfilename=a",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Disposition: form-data; name=prompt",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Length: 4294967296",
    b"Content-Disposition: form-data; name=image; filename=a\r\nTransfer-Encoding: chunked",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Transfer-Encoding: base64",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Encoding: gzip",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Type: multipart/mixed; boundary=inner",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Type: message/rfc822",
    b"Content-Disposition: form-data; name=image; filename=a\r\nContent-Type: text/html; charset=utf-7",
    b"Content-Disposition: form-data; name=image; filename=a\r\nX: \x00\x01\x02",
    b"Content-Disposition: form-data; name=image; filename=a\nX-Injected: yes",
    b"Content-Disposition: form-data; name=image; filename=a\rX-Injected: yes",
    b"Content-Disposition: form-data; name=image; filename=a" + b"\r\nX: y" * 900,
    b"Content-Disposition: form-data; name=image; filename=a\r\nX: " + b"y" * 7000,
    b"Content-Disposition: form-data; name=image; filename=a\r\nX: " + b"y" * 9000,
    b": no name\r\nContent-Disposition: form-data; name=image; filename=a",
    b"no colon\r\nContent-Disposition: form-data; name=image; filename=a",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Disposition: form-data; name=image; filename=a",
]


@pytest.mark.parametrize("head_of_part", HEADS, ids=lambda one: ascii(one[-60:]))
def test_a_head_that_means_something_elsewhere(target: Edge, head_of_part: bytes) -> None:
    reply = send(target, PROMPT + part(head_of_part) + END)
    assert reply.status in {200, 400}
    assert "x-injected" not in reply.headers


@pytest.mark.parametrize(
    "name",
    [b"prompt\r\nX-Injected: yes", b"n\r\n\r\nHTTP/1.1 200 OK", b"a\nb", b"x" * 200, b"\xff", b"a\x00b"],
    ids=ascii,
)
def test_what_a_client_names_adds_no_header(target: Edge, name: bytes) -> None:
    """Unknown fields are told of in a header."""
    body = PROMPT + IMAGE + part(b'Content-Disposition: form-data; name="' + name + b'"', b"1") + END
    reply = send(target, body)
    assert reply.status in {200, 400}
    assert "x-injected" not in reply.headers
    odd = name.decode("latin-1")
    reply = target.json("/v1/images/generations", {"prompt": "x", "model": "script", odd: 1})
    assert reply.status in {200, 400}
    assert "x-injected" not in reply.headers


# shapes


BOUNDARIES = [
    b"",
    b'""',
    b"x" * 70,
    b"x" * 71,
    b"x" * 5000,
    b"-",
    b"--",
    b"a b",
    b"a ",
    b'"a b"',
    b'"a;b"',
    b"(((((",
    b"(a+)+$",
    b".*",
    b"\\",
    b"'",
    b"a\xffb",
    b"x-boundary; boundary=other",
    b"=x",
    b'"x-boundary',
    b"x-boundary\t",
    b"X-BOUNDARY",
    b"x-boundary--",
    b"x-bound",
]


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=lambda one: ascii(one[:40]))
def test_any_boundary(target: Edge, boundary: bytes) -> None:
    body = (PROMPT + IMAGE + END).replace(b"x-boundary", boundary.strip(b'"'))
    for path in PATHS:
        reply = send(target, body, b"multipart/form-data; boundary=" + boundary, path)
        assert reply.status in {200, 400, 415}
    for kind in (
        b"multipart/form-data",
        b"multipart/mixed; boundary=x-boundary",
        b"multipart/",
        b"multipart/form-data;;;boundary",
    ):
        assert send(target, PROMPT + IMAGE + END, kind).status in {400, 415}


INNER = b"--inner\r\nContent-Disposition: file; filename=a.png\r\n\r\n" + GOOD + b"\r\n--inner--\r\n"
SHAPES = {
    "nothing": b"",
    "the end alone": END,
    "a delimiter alone": b"--x-boundary",
    "no end": PROMPT + IMAGE,
    "half an end": PROMPT + IMAGE + b"--x-boundary-",
    "bare line feeds": (PROMPT + END).replace(b"\r\n", b"\n"),
    "the end twice": PROMPT + IMAGE + END + PROMPT + END,
    "a preamble and an epilogue": b"x" * 1000 + b"\r\n" + PROMPT + IMAGE + END + b"y" * 1000,
    "a part without a head": PROMPT + IMAGE + b"--x-boundary\r\n\r\nx\r\n" + END,
    "a part of nothing": PROMPT + IMAGE + b"--x-boundary\r\n" + END,
    "empty parts": PROMPT + b"--x-boundary\r\n" * 60 + END,
    "as many parts as there may be": PROMPT + IMAGE + part(b"Content-Disposition: form-data; name=x", b"") * 62 + END,
    "one part more": PROMPT + IMAGE + part(b"Content-Disposition: form-data; name=x", b"") * 63 + END,
    "ten thousand parts": PROMPT + IMAGE + part(b"Content-Disposition: form-data; name=x", b"") * 10_000 + END,
    "a megabyte of delimiters": b"--x-boundary\r\n" * 70_000 + END,
    "a megabyte of delimiters that are none": PROMPT + IMAGE[:-2] + b"\r\n--x-boundar" * 80_000 + b"\r\n" + END,
    "delimiters behind blanks": PROMPT + IMAGE + b"--x-boundary" + b" " * 1_000_000 + b"\r\n" + END,
    "a megabyte of line breaks": PROMPT + b"\r\n" * 500_000 + IMAGE + END,
    "a form in a form": PROMPT
    + part(b"Content-Disposition: form-data; name=image\r\nContent-Type: multipart/mixed; boundary=inner", INNER)
    + END,
    "itself": PROMPT + part(b"Content-Disposition: form-data; name=image; filename=a", PROMPT + IMAGE + END) + END,
    "the same field often": PROMPT * 30 + IMAGE + END,
    "a field and a file of one name": PROMPT + IMAGE + part(b"Content-Disposition: form-data; name=image", b"x") + END,
    "a prompt that is a file": part(b"Content-Disposition: form-data; name=prompt; filename=a", b"a fox") + IMAGE + END,
    "a prompt that is no text": part(b"Content-Disposition: form-data; name=prompt", b"\xff\xfe\x00") + IMAGE + END,
    "a prompt that is long": part(b"Content-Disposition: form-data; name=prompt", b"x" * 2001) + IMAGE + END,
    "zeros": bytes(1_000_000),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(target: Edge, shape: str) -> None:
    """What takes a form apart looks at each byte once."""
    for path in PATHS[:2]:
        reply = send(target, SHAPES[shape], path=path)
        assert reply.status in {200, 400}, reply
        assert reply.seconds < 5


def test_every_length_of_a_good_form_but_the_whole_is_refused(target: Edge) -> None:
    whole = PROMPT + IMAGE + END
    for stop in range(0, len(whole) - 2, 7):
        assert send(target, whole[:stop]).status == 400
    assert send(target, whole).status == 200


FIELDS = [
    "prompt",
    "n",
    "size",
    "seed",
    "model",
    "stream",
    "strict",
    "response_format",
    "mask",
    "image",
    "image[]",
    "webhook_url",
    "user",
]
_TOKENS = st.sampled_from(
    [
        b"--x-boundary",
        b"--x-boundary--",
        b"\r\n",
        b"\n",
        b"\r",
        b"Content-Disposition: form-data; name=",
        b'"',
        b";",
        b"filename=",
        b"filename*=UTF-8''",
        b"image",
        b"prompt",
        b"n",
        b"%00",
        b"\x00",
        b"\xff",
        b"=",
        b"*0=",
        b"*",
        b"'",
        b" ",
        b"\t",
        b":",
        b"1",
        PROMPT,
        IMAGE,
        END,
        GOOD,
    ]
)


@fuzzing(400)
@given(st.lists(_TOKENS | st.binary(max_size=12), max_size=40).map(b"".join))
def test_a_body_of_tokens_is_a_form_or_an_error(body: bytes) -> None:
    """In process, where many can be tried: nothing but InvalidRequest."""
    try:
        form = read_form(PROMPT + body, b"multipart/form-data; boundary=x-boundary")
    except InvalidRequest:
        return
    assert isinstance(form, Form)
    assert sum(map(len, form.files.values())) + len(form.fields) <= 64


@fuzzing(400)
@given(st.lists(_TOKENS.filter(lambda one: len(one) < 60) | st.binary(max_size=8), max_size=30).map(b"".join))
def test_a_disposition_of_tokens_is_read_or_refused(disposition: bytes) -> None:
    body = part(b"Content-Disposition: form-data; " + disposition) + END
    for kind in (
        b"multipart/form-data; boundary=x-boundary",
        b"multipart/form-data; boundary=x-boundary; " + disposition,
    ):
        try:
            read_form(body, kind)
        except InvalidRequest:
            continue


@fuzzing(60)
@given(st.lists(_TOKENS | st.binary(max_size=12), max_size=30).map(b"".join), st.sampled_from(PATHS))
def test_a_body_of_tokens_over_sockets(target: Edge, body: bytes, path: str) -> None:
    assert send(target, PROMPT + IMAGE + body, path=path).status in {200, 400, 415}


@fuzzing(100)
@given(
    st.lists(st.tuples(st.sampled_from(FIELDS), st.text(max_size=30) | st.integers().map(str)), max_size=6),
    st.booleans(),
)
def test_any_text_in_any_field(target: Edge, fields: list[tuple[str, str]], variation: bool) -> None:
    parts: list[tuple[str, bytes, str | None]] = [("prompt", b"x", None), ("image", GOOD, "a")]
    parts += [(name, text.encode("utf-8", "surrogatepass"), None) for name, text in fields]
    body, kind = multipart(parts)
    reply = send(target, body, kind, PATHS[variation])
    # 429 and 503 are what the models say that lead to backends which are not there
    assert reply.status in {200, 400, 404}, reply


# bodies that are not what their heads say


def chunked(pieces: list[bytes], kind: str = "multipart/form-data; boundary=x-boundary") -> bytes:
    start = head("POST", PATHS[0], None, {"Content-Type": kind, "Transfer-Encoding": "chunked"})
    return start + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


WHOLE = PROMPT + IMAGE + END


@pytest.mark.parametrize("size", [1, 2, 3, 13, 64, 4096])
def test_chunks_of_any_size(target: Edge, size: int) -> None:
    reply = target.send(chunked([WHOLE[at : at + size] for at in range(0, len(WHOLE), size)]))
    target.check(reply)
    assert reply.status == 200


CHUNKS = [
    b"zz\r\n",
    b"-1\r\n\r\n",
    b"ffffffffffffffffff\r\nx",
    b"7fffffffffffffff\r\nx",
    b"0x5\r\nhello\r\n",
    b"5\nhello\n",
    b"5;" + b"x" * 70_000,
    b"5\r\nhelloworld\r\n",
    b"0\r\nX: y\r\n",
    b"+5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b"\r\n\r\n",
    b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"\x00",
]


@pytest.mark.parametrize("raw", CHUNKS, ids=lambda one: ascii(one[:30]))
def test_chunks_that_are_none(target: Edge, raw: bytes) -> None:
    """An error, or none at all where the client is taken to have left in the middle of its body."""
    start = head(
        "POST", PATHS[0], None, {"Content-Type": "multipart/form-data; boundary=x", "Transfer-Encoding": "chunked"}
    )
    reply = target.send(start + raw, ends=True)
    if reply.status:
        target.check(reply)
        assert 400 <= reply.status < 500


def both(length: bytes, *, more: bytes = b"") -> bytes:
    start = b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + ADMIN.encode() + b"\r\n"
    return (
        start
        + b"Content-Type: multipart/form-data; boundary=x-boundary\r\nContent-Length: "
        + length
        + b"\r\n"
        + more
        + b"\r\n"
    )


LENGTHS = [
    b"-1",
    b"0x10",
    b"1e3",
    b"",
    b" ",
    b"99999999999999999999999999",
    b"18446744073709551616",
    b"9223372036854775807",
    b"+5",
    b"5, 5",
    b"5\x00",
    b"\xd9\xa1",
    b"05",
]


@pytest.mark.parametrize("length", LENGTHS, ids=ascii)
def test_lengths_that_are_none(target: Edge, length: bytes) -> None:
    reply = target.send(both(length) + WHOLE, ends=True)
    if reply.status:
        target.check(reply)
        assert 400 <= reply.status < 500
    target.check_memory(64 << 20)


def test_a_length_that_lies(target: Edge) -> None:
    """Shorter than the body: the rest is another request, and none. Longer: it is waited for, and the client leaves."""
    for length in (0, 1, len(WHOLE) - 30):
        reply = target.send(both(b"%d" % length) + WHOLE, ends=True)
        target.check(reply)
        assert reply.status == 400
    assert target.send(both(b"%d" % (len(WHOLE) + 10)) + WHOLE, ends=True).status in {0, 400}
    for more in (
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 7\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
    ):
        reply = target.send(both(b"%d" % len(WHOLE), more=more) + WHOLE, ends=True)
        assert reply.status in {0, 200, 400}
    target.check_memory(64 << 20)


def test_nothing_is_set_aside_for_what_is_only_announced(target: Edge) -> None:
    """A hundred clients announce the largest body and send none of it."""
    before = target.peak_bytes()
    waiting = []
    for _ in range(100):
        connection = socket.create_connection(("127.0.0.1", target.program.port))
        connection.sendall(both(b"%d" % UPLOAD_BYTES) + PROMPT)
        waiting.append(connection)
    try:
        assert target.ask("GET", "/livez").status == 200
        assert target.peak_bytes() - before < 16 << 20
    finally:
        for connection in waiting:
            connection.close()


@pytest.mark.parametrize("cut", [1, 40, 200, len(WHOLE) // 2])
def test_a_client_that_drips_is_served_when_it_is_done(target: Edge, cut: int) -> None:
    """Head and body in many writes, wherever they are cut."""
    raw = both(b"%d" % len(WHOLE)) + WHOLE
    pieces = [raw[at : at + cut] for at in range(0, len(raw), cut)]
    reply = target.send(pieces)
    target.check(reply)
    assert reply.status == 200


def test_many_drips_hold_up_nobody(target: Edge) -> None:
    """Fifty clients that send a byte now and then, beside one in a hurry."""
    raw = both(b"%d" % len(WHOLE)) + WHOLE
    dripping = [socket.create_connection(("127.0.0.1", target.program.port)) for _ in range(50)]
    try:
        for connection, piece in itertools.product(dripping, (raw[:1], raw[1:9], raw[9:120])):
            connection.sendall(piece)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: send(target, WHOLE), range(8)))
        assert {one.status for one in replies} == {200}
        assert time.monotonic() - began < 10
        for connection in dripping:
            connection.sendall(raw[120:])
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in dripping)
    finally:
        for connection in dripping:
            connection.close()
