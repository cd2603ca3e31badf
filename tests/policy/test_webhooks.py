"""The rules of webhooks: when a call is made again, what answers mean, how it is signed, which URLs may be named."""

from __future__ import annotations

import base64
import hashlib
import hmac
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img_serving.domain.errors import InvalidRequest
from img_serving.policy.webhooks import (
    DELAYS_SECONDS,
    check_webhook_url,
    heeded_retry_after,
    meaning_of,
    next_try_at,
    parse_secrets,
    sign,
    signed_headers,
    written_secret,
)

HOUR = 3600.0
DAY = 24 * HOUR


def calls_of_a_day(seed: int = 7, retry_after: float = 0.0) -> list[float]:
    """When a receiver that never takes it is called: seconds since the event."""
    rng, now, made = Random(seed), 0.0, [0.0]
    while True:
        following = next_try_at(len(made), 0.0, now, max_age_seconds=DAY, rng=rng, at_least_seconds=retry_after)
        if following is None:
            return made
        assert following > now
        now = following
        made.append(now)


def test_calls_come_quickly_at_first_and_then_every_two_hours_for_a_day():
    made = calls_of_a_day()
    between = [later - earlier for earlier, later in pairwise(made)]
    assert [round(one) for one in between[:3]] != [5, 30, 120]  # jitter
    for delay, nominal in zip(between[:-1], [*DELAYS_SECONDS, *[7200.0] * 20], strict=False):
        assert 0.75 * nominal <= delay <= 1.25 * nominal
    assert 15 <= len(made) <= 22


def test_the_last_call_is_made_when_the_time_is_over_and_none_afterwards():
    assert calls_of_a_day()[-1] == DAY
    assert next_try_at(9, 0.0, DAY, max_age_seconds=DAY, rng=Random(1)) is None
    assert next_try_at(9, 0.0, DAY + 99, max_age_seconds=DAY, rng=Random(1)) is None


def test_two_events_that_failed_together_do_not_come_back_together():
    assert calls_of_a_day(seed=1)[1:-1] != calls_of_a_day(seed=2)[1:-1]


def test_a_receivers_own_wait_is_the_least():
    assert next_try_at(1, 0.0, 100.0, max_age_seconds=DAY, rng=Random(1), at_least_seconds=600.0) == 700.0
    later = next_try_at(7, 0.0, 100.0, max_age_seconds=DAY, rng=Random(1), at_least_seconds=600.0)
    assert later is not None
    assert later > 700.0


@given(st.integers(1, 1000), st.floats(0, 2 * DAY), st.floats(0, 10 * DAY))
def test_the_next_call_is_never_in_the_past_nor_after_the_end(attempts, now, retry_after):
    following = next_try_at(attempts, 0.0, now, max_age_seconds=DAY, rng=Random(attempts), at_least_seconds=retry_after)
    assert (following is None) == (now >= DAY)
    assert following is None or now < following <= DAY


@pytest.mark.parametrize(
    ("status", "meaning"),
    [(200, "delivered"), (202, "delivered"), (204, "delivered"), (299, "delivered"), (410, "gone")]
    + [(status, "again") for status in (101, 300, 301, 302, 307, 308, 400, 401, 404, 409, 429, 500, 502, 503, 504)],
)
def test_what_an_answer_means(status, meaning):
    assert meaning_of(status) == meaning


@pytest.mark.parametrize(
    ("status", "said", "heeded"),
    [
        (429, 30.0, 30.0),
        (503, 30.0, 30.0),
        (500, 30.0, 0.0),
        (404, 30.0, 0.0),
        (429, None, 0.0),
        (429, -5.0, 0.0),
        (503, 1e9, HOUR),
    ],
)
def test_a_receivers_wait_is_heeded_within_bounds(status, said, heeded):
    assert heeded_retry_after(status, said) == heeded


# secrets and signatures

PLAIN = "a plain secret of 32 characters!"
KEY = bytes(range(32))


def test_a_secret_is_plain_text_or_base64_with_its_prefix():
    assert parse_secrets(PLAIN) == (PLAIN.encode(),)
    assert parse_secrets("whsec_" + base64.b64encode(KEY).decode()) == (KEY,)
    assert parse_secrets("whsec_" + base64.b64encode(KEY).decode().rstrip("=")) == (KEY,)
    assert parse_secrets("비밀" * 4) == (("비밀" * 4).encode(),)


def test_several_secrets_stand_side_by_side_while_one_replaces_another():
    assert parse_secrets(f"{PLAIN} , {written_secret(KEY)}") == (PLAIN.encode(), KEY)


def test_a_written_secret_reads_as_the_same_key():
    assert parse_secrets(written_secret(PLAIN.encode())) == (PLAIN.encode(),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hunter2", "has 7 bytes"),
        ("x" * 23, "has 23 bytes"),
        ("whsec_", "has 0 bytes after whsec_"),
        ("whsec_" + base64.b64encode(b"x" * 23).decode(), "has 23 bytes after whsec_"),
        ("whsec_" + "!" * 40, "not base64"),
        ("whsec_" + "A" * 41, "not base64"),
        ("whsec_" + "é" * 40, "not base64"),
        (f"{PLAIN},", "has 0 bytes"),
        (f"{PLAIN},short", "has 5 bytes"),
    ],
)
def test_a_secret_that_protects_nothing_is_refused_and_never_quoted(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_secrets(text)
    assert "hunter2" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_signature_is_made_as_the_specification_says():
    content = b'evt_1.1674087231.{"type":"job.succeeded"}'
    expected = base64.b64encode(hmac.new(KEY, content, hashlib.sha256).digest()).decode()
    assert sign(KEY, "evt_1", 1674087231, b'{"type":"job.succeeded"}') == f"v1,{expected}"


def test_every_secret_signs():
    headers = dict(signed_headers((KEY, b"x" * 24), "evt_1", 5, b"{}"))
    assert headers == {
        "webhook-id": "evt_1",
        "webhook-timestamp": "5",
        "webhook-signature": f"{sign(KEY, 'evt_1', 5, b'{}')} {sign(b'x' * 24, 'evt_1', 5, b'{}')}",
    }


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/done?token=abc",
        "http://hooks.example.com",
        "HTTPS://Hooks.Example.COM.:8443/a%20b#x",
        "https://93.184.216.34/hook",
        "https://[2606:4700::1111]:8443/hook",
        "https://xn--bcher-kva.example/",
        "https://1password.example/",
        "https://a_b.example/",
    ],
)
def test_public_urls_may_be_named(url):
    check_webhook_url(url, allow_private=False)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "must begin"),
        ("hooks.example.com/done", "must begin"),
        ("ftp://hooks.example.com/", "must begin"),
        ("file:///etc/passwd", "must begin"),
        ("https:hooks.example.com", "must begin"),
        ("https:///done", "no host"),
        ("https://./done", "no host"),
        ("https://user:hunter2@hooks.example.com/", "user name or password"),
        ("https://hooks.example.com:0/", "port"),
        ("https://hooks.example.com:/", "port"),
        ("https://hooks.example.com:99999/", "malformed"),
        ("https://[::1/", "malformed"),
        ("https://hooks example.com/", "blank"),
        ("https://hooks.example.com/\r\nX-Evil: 1", "blank"),
        ("https://hooks.example.com\\@evil/", "backslash"),
        ("https://훅.example/", "outside ASCII"),
        ("https://hooks.example.com/" + "x" * 2048, "at most 2048"),
        ("https://-.example-/", "cannot be resolved"),
        ("https://1.2.3/", "neither a name nor an address"),
    ],
)
@pytest.mark.parametrize("allow_private", [False, True])
def test_urls_that_can_never_be_called_are_refused(url, words, allow_private):
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_webhook_url(url, allow_private=allow_private)
    assert caught.value.param == "webhook_url"
    assert "hunter2" not in caught.value.message


PRIVATE = [
    "http://127.0.0.1:9000/hook", "http://[::1]/", "http://169.254.169.254/latest/meta-data", "http://10.1.2.3/",
    "http://172.16.0.1/", "http://192.168.1.1/", "http://0.0.0.0/", "http://100.64.0.1/", "http://[fd00:ec2::254]/",
    "http://[::ffff:10.0.0.1]/", "http://localhost:9000/", "http://api.localhost/", "http://LOCALHOST./", "http://127.0.0.1./",
]  # fmt: skip


@pytest.mark.parametrize("url", PRIVATE)
def test_private_addresses_are_refused_at_once_unless_the_operator_allows_them(url):
    with pytest.raises(InvalidRequest, match=r"not a public address.*operator sets webhooks\.allow_private_addresses"):
        check_webhook_url(url, allow_private=False)
    check_webhook_url(url, allow_private=True)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "0177.0.0.1", "0x7f000001", "[v1.a]"])
def test_addresses_in_other_spellings_are_refused(host):
    with pytest.raises(InvalidRequest, match=r"neither a name|malformed"):
        check_webhook_url(f"http://{host}/", allow_private=True)
