"""Options whose effect no other test shows."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter

import pytest
from tests.support.gateways import config_of, running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.config import BackendConfig, EndpointConfig
from img_serving.main import make_adapter, open_store


@pytest.mark.parametrize(
    ("limit", "fields"),
    [
        ("max_n = 2", {"n": 3}),
        ("max_steps = 5", {"steps": 6}),
        ("max_prompt_chars = 4", {"prompt": "lions"}),
        ("max_pixels = 255", {"size": "16x16"}),
    ],
)
def test_each_limit_bounds_what_it_names(limit: str, fields: dict[str, object]) -> None:
    async def main() -> None:
        one = scripted("one", backend__default_size="8x8")
        asked = {"prompt": "lion", **fields}
        async with running(one) as gateway:
            assert (await gateway.client.draw(**asked)).status == 200
        async with running(f"[limits]\n{limit}\n" + one) as gateway:
            assert (await gateway.client.draw(**asked)).status == 400

    run_virtual(main())


def test_the_strategy_decides_who_draws() -> None:
    async def drawn_with(strategy: str) -> Counter[str]:
        two = scripted("a", models=["m"], backend__weight=3) + scripted("b", models=["m"])
        async with running(f'[routing]\nstrategy = "{strategy}"\n' + two) as gateway:
            replies = [await gateway.client.draw(model="m", size="16x16") for _ in range(40)]
            return Counter(one.headers["x-backend"] for one in replies)

    assert run_virtual(drawn_with("round_robin")) == {"a": 20, "b": 20}
    assert run_virtual(drawn_with("weighted_round_robin")) == {"a": 30, "b": 10}
    by_chance = run_virtual(drawn_with("random"))
    assert 20 < by_chance["a"] < 40


def test_the_health_check_interval_is_how_often_it_is_asked() -> None:
    async def main() -> None:
        toml = scripted("one", backend__health_check_interval_secs=100)
        async with running(toml) as gateway:
            await asyncio.sleep(1)  # the first check is at once
            gateway.adapter("one").healthy = False
            await asyncio.sleep(80)
            assert (await gateway.nobody.get("/health")).json()["status"] == "healthy"
            await asyncio.sleep(40)
            assert (await gateway.nobody.get("/health")).json()["status"] == "unhealthy"

    run_virtual(main())


def test_ttl_hours_is_how_long_pictures_are_kept() -> None:
    store = open_store(config_of("[storage]\nttl_hours = 2\n"))
    assert store._ttl_seconds == 7200
    store.close()
    kept = open_store(config_of("[storage]\nttl_hours = 0\n"))
    assert kept._ttl_seconds is None
    kept.close()


@pytest.mark.parametrize(("verify", "mode"), [(True, ssl.CERT_REQUIRED), (False, ssl.CERT_NONE)])
def test_tls_verify_decides_whether_certificates_are_looked_at(verify: bool, mode: ssl.VerifyMode) -> None:
    config = BackendConfig(name="x", protocol="openai", endpoints=("https://h",), tls_verify=verify)
    adapter = make_adapter(config, EndpointConfig(url="https://h", weight=1, max_concurrency=None))
    assert adapter._transport._ssl_context.verify_mode is mode  # type: ignore[attr-defined]
