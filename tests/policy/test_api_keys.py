"""Who holds which key; no key itself is kept."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.tenants import Tenant
from img_serving.policy.api_keys import KeyRing, digest_of

steady = settings(deadline=None, derandomize=True)

ANN, BOB = Tenant("ann"), Tenant("bob")


def test_a_key_finds_its_owner():
    ring = KeyRing([(digest_of("key-a"), ANN), (digest_of("key-b"), BOB)])
    assert ring.authenticate(b"key-a") is ANN
    assert ring.authenticate(b"key-b") is BOB
    assert len(ring) == 2


def test_an_unknown_or_empty_key_finds_nobody():
    ring = KeyRing([(digest_of("key-a"), ANN)])
    for key in (b"", b"key-", b"key-a ", b"KEY-A", b"\xff\xfe", digest_of("key-a"), digest_of("key-a").hex().encode()):
        assert ring.authenticate(key) is None


def test_an_empty_ring_knows_nobody():
    assert KeyRing([]).authenticate(b"") is None


def test_of_two_equal_keys_the_first_owner_stands():
    assert KeyRing([(digest_of("key"), ANN), (digest_of("key"), BOB)]).authenticate(b"key") is ANN


def test_the_ring_does_not_hold_the_keys():
    ring = KeyRing([(digest_of("very secret"), ANN)])
    assert "very secret" not in repr(vars(ring))


@steady
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_the_digest_is_sha_256_of_the_utf_8_bytes(key):
    assert digest_of(key) == digest_of(key.encode()) == hashlib.sha256(key.encode()).digest()


@steady
@given(st.binary(), st.binary())
def test_only_the_very_same_bytes_open(key, other):
    assert (KeyRing([(digest_of(key), ANN)]).authenticate(other) is ANN) == (key == other)
