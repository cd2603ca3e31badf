"""`/v1/webhooks`: what became of the events of jobs that ended, and sending one again."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

from img_serving.api.exchange import Exchange, Reply
from img_serving.api.queries import choice_of, limit_of
from img_serving.gateway.webhooks import WebhookDeliverer
from img_serving.ports import StoredWebhook, WebhookState

STATES: Final[tuple[WebhookState, ...]] = get_args(WebhookState)


class WebhookRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One event. Times in Unix seconds; `next_at` null: it is not tried again; `last_error` "" where nothing was wrong."""

    object: Literal["webhook"] = "webhook"
    id: str
    type: str
    job_id: str
    tenant: str
    url: str
    state: WebhookState
    attempts: int
    created_at: float
    next_at: float | None
    delivered_at: float | None
    last_error: str


class WebhookList(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `GET /v1/webhooks`, newest first. `after=<last_id>` gets what follows, where `has_more` says so."""

    object: Literal["list"] = "list"
    data: list[WebhookRecord]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Webhooks:
    """Handlers of the webhook routes."""

    def __init__(self, deliverer: WebhookDeliverer) -> None:
        self._deliverer = deliverer

    async def list(self, exchange: Exchange) -> Reply:
        """`GET /v1/webhooks?state=&job_id=&limit=&after=`."""
        query = exchange.query
        limit = limit_of(query)
        found = await self._deliverer.find(
            state=choice_of(query, "state", STATES),
            job_id=query.get("job_id") or None,
            limit=limit + 1,
            after=query.get("after") or None,
        )
        page = [_record(one) for one in found[:limit]]
        reply = WebhookList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )
        return Reply(200, (msgspec.json.encode(reply),))

    async def get(self, exchange: Exchange) -> Reply:
        """`GET /v1/webhooks/{event_id}`."""
        found = await self._deliverer.get(exchange.variables["event_id"])
        return Reply(200, (msgspec.json.encode(_record(found)),))

    async def redeliver(self, exchange: Exchange) -> Reply:
        """`POST /v1/webhooks/{event_id}/redeliver`: 202, it is on its way."""
        queued = await self._deliverer.redeliver(exchange.variables["event_id"])
        return Reply(202, (msgspec.json.encode(_record(queued)),))


def _record(one: StoredWebhook) -> WebhookRecord:
    return WebhookRecord(
        id=one.event_id,
        type=one.type,
        job_id=one.job_id,
        tenant=one.tenant,
        url=one.url,
        state=one.state,
        attempts=one.attempts,
        created_at=one.created_at,
        next_at=one.next_at,
        delivered_at=one.delivered_at,
        last_error=one.last_error,
    )
