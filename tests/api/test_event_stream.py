"""The heartbeats of a stream."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.gateways import running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.api.event_stream import COMMENT


@pytest.mark.parametrize(
    "script", [{}, {"steps": 100}, {"steps": 100, "previews": True}], ids=["", "steps", "previews"]
)
def test_a_stream_without_news_has_its_heartbeats_whatever_the_engine_reports(script: dict[str, Any]) -> None:
    """Steps are no news to a stream, and previews none where nobody wants them."""

    async def main() -> bytes:
        async with running(scripted("one", latency_seconds=50, **script)) as gateway:
            body: bytes = (await gateway.client.draw(stream=True, size="64x64")).body
            return body

    assert run_virtual(main()).count(COMMENT) == 1 + (50 - 5) // 15
