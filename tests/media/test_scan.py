"""Scan + skeleton: what it gives is what a JSON parser would have given, whatever the document."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.media.scan import split_images_json, split_string_list_json

TRICKS = st.sampled_from(
    [
        "b64_json", "images", '"b64_json":"', '"b64_json": "x', '\\"', "\\", '"', "\\\\", '"images":["',
        "a/b+c==", ",", "][", "0", "1",
        '{"b64_json":"AAAA"}', "\u2028", "é\U0001f98a", "\ud800", "", ":", "\n",
    ]
)  # fmt: skip
TEXTS = TRICKS | st.text(max_size=12) | st.lists(TRICKS, max_size=4).map("".join)
KEYS = st.sampled_from(["b64_json", "images", "url"]) | TEXTS
LEAVES = st.none() | st.booleans() | st.integers() | TEXTS
DOCUMENTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


def written(document, style) -> bytes:
    """The document as JSON, in one of the ways that servers write it. Lone surrogates exist only as escapes."""
    ascii_only, separators, indent, slashes = style
    text = json.dumps(document, ensure_ascii=ascii_only, separators=separators, indent=indent)
    if slashes:
        text = text.replace("/", "\\/")
    return text.encode("utf-8", "surrogatepass")


STYLES = st.tuples(
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :\r\n ")]),
    st.sampled_from([None, 2]),
    st.booleans(),
)


def without_surrogates(value):
    if isinstance(value, str):
        return value.replace("\ud800", "")
    if isinstance(value, list):
        return [without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(one) for key, one in value.items()}
    return value


def text_of(payload: memoryview) -> str:
    return bytes(payload).decode()


def put_back_images(value, payloads):
    if isinstance(value, list):
        return [put_back_images(one, payloads) for one in value]
    if isinstance(value, dict):
        return {
            key: text_of(payloads[int(one)])
            if key == "b64_json" and isinstance(one, str)
            else put_back_images(one, payloads)
            for key, one in value.items()
        }
    return value


def put_back_lists(value, payloads):
    """Leading strings of every list under `images` are indexes, as the docstring says."""
    if isinstance(value, list):
        return [put_back_lists(one, payloads) for one in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, one in value.items():
        if key == "images" and isinstance(one, list):
            leading = next((at for at, part in enumerate(one) if not isinstance(part, str)), len(one))
            result[key] = [text_of(payloads[int(part)]) for part in one[:leading]]
            result[key] += [put_back_lists(part, payloads) for part in one[leading:]]
        else:
            result[key] = put_back_lists(one, payloads)
    return result


@settings(deadline=None)
@given(DOCUMENTS.map(without_surrogates), STYLES)
def test_skeleton_and_payloads_together_are_the_document(document, style):
    body = written(document, style)
    skeleton, payloads = split_images_json(body)
    assert put_back_images(json.loads(skeleton), payloads) == json.loads(body)


@settings(deadline=None)
@given(DOCUMENTS.map(without_surrogates), STYLES)
def test_lists_of_strings_come_back_too(document, style):
    body = written(document, style)
    skeleton, payloads = split_string_list_json(bytearray(body))
    assert put_back_lists(json.loads(skeleton), payloads) == json.loads(body)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('"\\b64_json:[]{},u0062/ ', max_size=60).map(str.encode))
def test_what_is_no_json_is_refused_by_scan_or_parser(body):
    """Whatever the scan makes of a broken document, it is not made whole, but for what base64 itself refuses."""
    try:
        msgspec.json.decode(body)
    except ValueError:
        pass
    else:
        return
    for split in (split_images_json, split_string_list_json):
        try:
            skeleton, payloads = split(body)
            msgspec.json.decode(skeleton)
        except ValueError:
            continue
        assert any(set(bytes(payload)) - set(range(0x20, 0x7F)) for payload in payloads)


def test_a_payload_is_a_view_of_the_body():
    body = b'{"created": 1, "data": [{"b64_json": "QUJD", "url": null}, {"b64_json":"REVG"}]}'
    skeleton, payloads = split_images_json(body)
    assert json.loads(skeleton)["data"] == [{"b64_json": "0", "url": None}, {"b64_json": "1"}]
    assert [bytes(one) for one in payloads] == [b"QUJD", b"REVG"]
    assert all(one.obj is body for one in payloads)


def test_escapes_in_payload_and_key_are_undone():
    body = b'{"b64\\u005fjson": "QU\\/D\\u0041", "prompt": "\\"b64_json\\": \\"no"}'
    skeleton, payloads = split_images_json(body)
    assert [bytes(one) for one in payloads] == [b"QU/DA"]
    assert json.loads(skeleton)["prompt"] == '"b64_json": "no'


def test_only_leading_strings_of_a_list_are_cut():
    skeleton, payloads = split_string_list_json(b'{"images": ["a", "b", null, "c"], "x": ["images", "y"]}')
    assert json.loads(skeleton) == {"images": ["0", "1", None, "c"], "x": ["images", "y"]}
    assert len(payloads) == 2


@pytest.mark.parametrize("body", [b'{"b64_json": "QUJD', b'"', b'{"b64_json":"QU\\', b'{"b64_json":"\\x"}', b'"\\"'])
def test_a_string_without_end_or_meaning_is_a_value_error(body):
    with pytest.raises(ValueError, match=r"."):
        split_images_json(body)


def test_a_document_of_nothing_but_strings_does_not_hold_up_the_loop():
    with pytest.raises(ValueError, match="more than"):
        split_images_json(b'["",' + b'"",' * 200_000 + b'""]')


def test_backslashes_by_the_million_take_no_memory_or_time_to_speak_of():
    body = b'{"p":"' + b"\\\\" * 1_000_000 + b'","b64_json":"QUJD"}'
    _, payloads = split_images_json(body)
    assert bytes(payloads[0]) == b"QUJD"
