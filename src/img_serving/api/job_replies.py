"""The reply to a job that was taken: 202, the record, and where to look for it."""

from __future__ import annotations

import msgspec

from img_serving.api.asked import wants_async
from img_serving.api.exchange import Exchange, Headers, Reply
from img_serving.api.services import Services
from img_serving.gateway.jobs import Taken


async def accepted_reply(services: Services, exchange: Exchange, taken: Taken) -> Reply:
    """202 with the job's record; for a known idempotency key that of the job that it stands for."""
    stored, live = taken.stored, taken.live
    headers: Headers = [(b"location", f"/v1/jobs/{stored.id}".encode()), (b"x-job-id", stored.id.encode())]
    if wants_async(exchange):
        headers.append((b"preference-applied", b"respond-async"))
    if taken.replayed:
        headers.append((b"idempotent-replayed", b"true"))
    if live is not None:
        exchange.job = live.job
    record = await services.records.full(stored, live)
    return Reply(202, (msgspec.json.encode(record),), headers=headers)
