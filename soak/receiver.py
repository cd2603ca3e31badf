"""The webhook receiver of a soak: counts what comes by event and by job, and fails a share of the deliveries."""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

from img_serving.backends.stub_server import Answer, Exchange, StubServer


@dataclass(frozen=True)
class Delivery:
    """One call that came. `accepted`: it was answered with 204, otherwise with 500."""

    event_id: str
    job_id: str
    type: str
    accepted: bool
    is_signed: bool
    at: float


class Receiver(StubServer):
    """Keeps every delivery. A share of them is answered with 500, but no event so more than `most_failures` times.

    The gateway waits longer after each failure: without that bound one unlucky event would make a run minutes longer.
    """

    def __init__(self, secret: bytes, fail_share: float, most_failures: int, rng: random.Random) -> None:
        super().__init__()
        self.deliveries: list[Delivery] = []
        self.strange: list[str] = []
        self._secret = secret
        self._fail_share = fail_share
        self._most_failures = most_failures
        self._rng = rng

    async def answer(self, exchange: Exchange) -> Answer:
        """204, or 500."""
        self.exchanges.clear()
        try:
            event = exchange.json
            job_id, kind = event["data"]["id"], event["type"]
        except (ValueError, LookupError, TypeError) as error:
            self.strange.append(f"{error!r}: {exchange.body[:300]!r}")
            return Answer(400, b"")
        event_id = exchange.headers.get("webhook-id", "")
        signed = self._is_signed(exchange)
        failed = sum(one.event_id == event_id and not one.accepted for one in self.deliveries)
        accepted = self._rng.random() >= self._fail_share or failed >= self._most_failures
        self.deliveries.append(Delivery(event_id, job_id, kind, accepted, signed, time.monotonic()))
        return Answer(204 if accepted else 500, b"", {"content-length": "0"})

    def delivered(self) -> set[str]:
        """Jobs of which a delivery was accepted."""
        return {one.job_id for one in self.deliveries if one.accepted}

    def _is_signed(self, exchange: Exchange) -> bool:
        """Whether one of the signatures is right by the rules of Standard Webhooks."""
        fields = exchange.headers
        signed = f"{fields.get('webhook-id', '')}.{fields.get('webhook-timestamp', '')}.".encode() + exchange.body
        right = base64.b64encode(hmac.digest(self._secret, signed, hashlib.sha256)).decode()
        return f"v1,{right}" in fields.get("webhook-signature", "").split()


def by_job(deliveries: Iterable[Delivery]) -> dict[str, list[Delivery]]:
    """Deliveries of each job, in their order."""
    found: dict[str, list[Delivery]] = {}
    for one in deliveries:
        found.setdefault(one.job_id, []).append(one)
    return found


def secret_text(secret: bytes) -> str:
    """A secret as it stands in a configuration."""
    return f"whsec_{base64.b64encode(secret).decode()}"
