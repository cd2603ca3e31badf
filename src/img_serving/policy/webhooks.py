"""The rules of webhooks: when a call is made again, what an answer means, how it is signed, and which URLs may be named.

Signatures and secrets are those of the Standard Webhooks specification 1.0.0 (standardwebhooks.com).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from random import Random
from typing import Final, Literal
from urllib.parse import urlsplit

from img_serving.domain.errors import InvalidRequest
from img_serving.policy.public_addresses import is_public_address

DELAYS_SECONDS: Final = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
"""What lies between a failed call and the next one; the last stands for all that follow."""

JITTER: Final = 0.25
"""A delay is up to this share shorter or longer: what failed together does not come back together."""

MAX_RETRY_AFTER_SECONDS: Final = 3600.0
"""How far a receiver's own Retry-After is followed."""

MIN_SECRET_BYTES: Final = 24
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - how secrets are written, not one
MAX_URL_CHARS: Final = 2048

Answer = Literal["delivered", "gone", "again"]

_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")


def meaning_of(status: int) -> Answer:
    """What the receiver's HTTP status says: 2xx took it, 410 wants no more of it, everything else is tried again.

    Redirects are "again" too: they are never followed, and the address may be right by then.
    """
    if 200 <= status < 300:
        return "delivered"
    return "gone" if status == 410 else "again"


def heeded_retry_after(status: int, retry_after_seconds: float | None) -> float:
    """How long the receiver asks to be left alone, within bounds: counts with 429 and 503 only; 0 where it does not ask."""
    if retry_after_seconds is None or status not in {429, 503}:
        return 0.0
    return min(max(0.0, retry_after_seconds), MAX_RETRY_AFTER_SECONDS)


def next_try_at(
    attempts: int, since: float, now: float, *, max_age_seconds: float, rng: Random, at_least_seconds: float = 0.0
) -> float | None:
    """When to call again after the `attempts`-th call (1 is the first) failed; None: never, its time is over.

    The last call of all is made when `max_age_seconds` have passed since `since`. Times are Unix seconds.
    """
    deadline = since + max_age_seconds
    if now >= deadline:
        return None
    delay = DELAYS_SECONDS[min(attempts, len(DELAYS_SECONDS)) - 1] * rng.uniform(1 - JITTER, 1 + JITTER)
    return min(now + max(delay, at_least_seconds), deadline)


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """The keys that `webhooks.secret` names: several, with commas between them, while one replaces another.

    Each is `whsec_` and base64, or plain text, whose UTF-8 bytes are the key.

    Raises:
        ValueError: one cannot be used; the message says why, and does not quote it.
    """
    return tuple(_parse_secret(one.strip()) for one in text.split(","))


def _parse_secret(text: str) -> bytes:
    if not text.startswith(SECRET_PREFIX):
        key = text.encode()
        if len(key) < MIN_SECRET_BYTES:
            raise ValueError(
                f"has {len(key)} bytes: a secret has {MIN_SECRET_BYTES} or more, or is {SECRET_PREFIX} and base64 "
                "(leave it out and one is made at the first start)"
            )
        return key
    encoded = text.removeprefix(SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"is not base64 after {SECRET_PREFIX}") from None
    if len(key) < MIN_SECRET_BYTES:
        raise ValueError(
            f"has {len(key)} bytes after {SECRET_PREFIX}, decoded: a secret has {MIN_SECRET_BYTES} or more"
        )
    return key


def written_secret(key: bytes) -> str:
    """A key as receivers' libraries take it: `whsec_` and base64."""
    return SECRET_PREFIX + base64.b64encode(key).decode()


def sign(secret: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """One signature: `v1,` and base64 of HMAC-SHA256 over id, timestamp (Unix seconds) and body, with dots between them."""
    content = b".".join((event_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode()


def signed_headers(secrets: Sequence[bytes], event_id: str, timestamp: int, body: bytes) -> list[tuple[str, str]]:
    """The three headers of a call; signed with every secret, so that a receiver may have either while they change."""
    return [
        ("webhook-id", event_id),
        ("webhook-timestamp", str(timestamp)),
        ("webhook-signature", " ".join(sign(one, event_id, timestamp, body) for one in secrets)),
    ]


def check_webhook_url(url: str, *, allow_private: bool) -> None:
    """Refuse what can never be called. Names are resolved when a call is made, and their addresses are checked then.

    Raises:
        InvalidRequest: with param `webhook_url`; the message does not quote the URL, which may hold a password.
    """
    fault = fault_of_webhook_url(url, allow_private=allow_private)
    if fault is not None:
        raise InvalidRequest(f"webhook_url {fault}", param="webhook_url")


def fault_of_webhook_url(url: str, *, allow_private: bool) -> str | None:
    """Why `url` cannot be called, or None. The answer never repeats the URL."""
    if len(url) > MAX_URL_CHARS:
        return f"has {len(url)} characters: at most {MAX_URL_CHARS} are taken"
    if not all("!" <= char <= "~" for char in url) or "\\" in url:
        return "has a blank, a control character, a backslash or a letter outside ASCII: write a host as xn--…, a path as %XX"
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "is not a URL: the host or the port is malformed (ports are 1 to 65535)"
    if parts.scheme not in {"http", "https"} or not url.lower().startswith(f"{parts.scheme}://"):
        return "must begin with https:// or http://"
    if "@" in parts.netloc:
        return "has a user name or password in it: put a token into its path or query, or verify the signature"
    if not host:
        return "has no host"
    if port == 0 or parts.netloc.endswith(":"):
        return "has no usable port: ports are 1 to 65535"
    return _fault_of_host(host, is_literal="[" in parts.netloc, allow_private=allow_private)


def _fault_of_host(host: str, *, is_literal: bool, allow_private: bool) -> str | None:
    """`is_literal`: it stood in brackets, so it is an IPv6 address or nothing."""
    if is_literal or _NUMERIC.fullmatch(host.rpartition(".")[2]):
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            # 127.1, 0x7f.1 and 2130706433 are loopback to many resolvers
            return "has a host that is neither a name nor an address: write addresses as 192.0.2.1 or [2001:db8::1]"
        is_private = not is_public_address(str(address))
    elif _HOST.fullmatch(host):
        is_private = host == "localhost" or host.endswith(".localhost")
    else:
        return "has a host that cannot be resolved"
    if is_private and not allow_private:
        return (
            "is not a public address: this gateway does not call into private networks, "
            "unless the operator sets webhooks.allow_private_addresses"
        )
    return None
