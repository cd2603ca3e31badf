"""What the scheduling options do, seen from outside: requests in, calls at the backends and replies out, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from tests.support.asgi import Client, Reply
from tests.support.gateways import Harness, running, scripted
from tests.support.virtual_time import run_virtual


def key(name: str, **more: Any) -> str:
    import json

    lines = [f"{field} = {json.dumps(value)}" for field, value in more.items()]
    return "\n".join(["[[auth.api_keys]]", f'name = "{name}"', f'key = "sk-{name}"', *lines]) + "\n"


def as_key(gateway: Harness, name: str) -> Client:
    return Client(gateway.gateway.app, f"sk-{name}")


def one_slot(name: str = "one", **more: Any) -> str:
    """A backend that draws one picture at a time, in a second."""
    return scripted(name, **{"latency_seconds": 1, "max_concurrency": 1, "max_batch_size": 1, **more})


async def later(seconds: float, ask: Callable[[], Awaitable[Reply]]) -> Reply:
    await asyncio.sleep(seconds)
    return await ask()


def prompts(gateway: Harness, backend: str = "one", index: int = 0) -> list[list[str]]:
    """What each call to a backend was asked for."""
    return [[item.prompt for item in call.items] for call in gateway.adapter(backend, index).calls]


async def learn(gateway: Harness, **fields: Any) -> None:
    """Let the endpoint's speed be measured."""
    assert (await gateway.client.draw(**fields)).status == 200


def loop_time() -> float:
    return asyncio.get_running_loop().time()


# whose turn it is


def test_a_key_of_higher_priority_goes_first() -> None:
    async def main() -> None:
        toml = key("low") + key("high", priority=1) + one_slot()
        async with running(toml) as gateway:
            low, high = as_key(gateway, "low"), as_key(gateway, "high")
            await asyncio.gather(
                low.draw(prompt="running"),
                later(0.1, lambda: low.draw(prompt="low 1")),
                later(0.2, lambda: low.draw(prompt="low 2")),
                later(0.3, lambda: high.draw(prompt="high")),
            )
            assert prompts(gateway) == [["running"], ["high"], ["low 1"], ["low 2"]]

    run_virtual(main())


@pytest.mark.parametrize(("ageing", "place"), [(3, 4), (0, 9)])
def test_ageing_seconds_bring_up_what_has_waited_long(ageing: float, place: int) -> None:
    async def main() -> None:
        toml = f"[queue]\nageing_seconds = {ageing}\n" + key("low") + key("high", priority=1) + one_slot()
        async with running(toml) as gateway:
            low, high = as_key(gateway, "low"), as_key(gateway, "high")
            stream = [later(0.05 + 0.9 * at, partial(high.draw, prompt=f"high {at}")) for at in range(9)]
            await asyncio.gather(high.draw(prompt="running"), later(0.01, lambda: low.draw(prompt="low")), *stream)
            drawn = [call[0] for call in prompts(gateway)]
            assert place - 1 <= drawn.index("low") <= place + 1

    run_virtual(main())


def test_keys_share_an_endpoint_by_their_weights() -> None:
    async def main() -> None:
        toml = key("single") + key("triple", weight=3) + one_slot()
        async with running(toml) as gateway:
            single, triple = as_key(gateway, "single"), as_key(gateway, "triple")
            draws = [client.draw(prompt=name) for name, client in (("s", single), ("t", triple)) for _ in range(20)]
            await asyncio.gather(*draws)
            first = [call[0] for call in prompts(gateway)][:20]
            assert first.count("t") == pytest.approx(15, abs=1)

    run_virtual(main())


def test_one_picture_does_not_stand_behind_somebody_elses_many() -> None:
    async def main() -> None:
        async with running(key("many") + key("one") + one_slot()) as gateway:
            many, one = as_key(gateway, "many"), as_key(gateway, "one")
            started = loop_time()
            flood = asyncio.gather(*(many.draw(prompt="many", n=10) for _ in range(5)))
            reply = await later(0.5, lambda: one.draw(prompt="one"))
            assert reply.status == 200
            assert loop_time() - started == pytest.approx(2, abs=0.2)  # the rest of one picture, and its own
            flood.cancel()

    run_virtual(main())


def test_max_running_is_how_many_pictures_of_a_key_are_drawn_at_a_time() -> None:
    async def main() -> None:
        toml = key("bounded", max_running=2) + scripted("one", latency_seconds=1, batch="single")
        async with running(toml) as gateway:
            bounded = as_key(gateway, "bounded")
            started = loop_time()
            replies = asyncio.gather(bounded.draw(n=4), bounded.draw(n=2))
            await asyncio.sleep(0.5)
            assert gateway.adapter("one").in_flight == 2
            assert (await gateway.client.draw()).status == 200
            assert {one.status for one in await replies} == {200}
            assert loop_time() - started == pytest.approx(3, abs=0.3)

    run_virtual(main())


# how much may wait, and for how long


def test_max_work_bounds_what_waits_by_what_it_costs() -> None:
    async def main() -> None:
        # 512x512, 10 steps, guidance: 5.24 megapixel-steps a picture
        async with running("[queue]\nmax_work = 11\n" + one_slot()) as gateway:
            small = {"size": "512x512", "steps": 10}
            draws = [asyncio.ensure_future(gateway.client.draw(**small)) for _ in range(4)]
            await asyncio.sleep(0.1)
            assert [draw.done() for draw in draws] == [False, False, False, True]
            refused = await draws[-1]
            assert (refused.status, refused.json()["error"]["code"]) == (503, "queue_full")
            assert "10.49 of at most 11 megapixel-steps" in refused.json()["error"]["message"]
            assert float(refused.headers["x-queue-eta-seconds"]) > 0
            assert {one.status for one in await asyncio.gather(*draws[:3])} == {200}

    run_virtual(main())


def test_what_cannot_be_done_in_time_is_refused_at_once_with_the_wait_it_would_have() -> None:
    async def main() -> None:
        async with running("[queue]\nrequest_timeout_seconds = 10\n" + one_slot(latency_seconds=3)) as gateway:
            await learn(gateway)
            draws = [asyncio.ensure_future(gateway.client.draw()) for _ in range(4)]
            await asyncio.sleep(0.1)
            refused = await draws[-1]  # 3 + 3 + 3 + 3 > 10
            assert refused.status == 503
            assert refused.json()["error"]["code"] == "deadline_unreachable"
            assert float(refused.headers["x-queue-eta-seconds"]) == pytest.approx(9, abs=0.5)
            assert 1 <= int(refused.headers["retry-after"]) <= 59
            assert {one.status for one in await asyncio.gather(*draws[:-1])} == {200}

    run_virtual(main())


def test_what_a_keys_own_cap_keeps_from_being_done_in_time_is_429() -> None:
    async def main() -> None:
        toml = "[queue]\nrequest_timeout_seconds = 10\n" + key("bounded", max_running=1)
        async with running(toml + scripted("one", latency_seconds=3, batch="single")) as gateway:
            await learn(gateway)
            bounded = as_key(gateway, "bounded")
            draws = [asyncio.ensure_future(bounded.draw()) for _ in range(4)]
            await asyncio.sleep(0.1)
            refused = await draws[-1]
            assert (refused.status, refused.json()["error"]["code"]) == (429, "max_running_reached")
            assert float(refused.headers["x-queue-eta-seconds"]) == pytest.approx(9, abs=0.5)
            assert (await gateway.client.draw()).status == 200
            assert {one.status for one in await asyncio.gather(*draws[:-1])} == {200}

    run_virtual(main())


def test_work_whose_deadline_passes_in_the_queue_is_504_and_never_starts() -> None:
    async def main() -> None:
        # nobody knows the speed yet, so nobody is refused
        async with running("[queue]\nrequest_timeout_seconds = 4\n" + one_slot(latency_seconds=3)) as gateway:
            replies = await asyncio.gather(*(gateway.client.draw(prompt=str(number)) for number in range(3)))
            assert [one.status for one in replies] == [200, 504, 504]
            assert replies[2].json()["error"]["code"] == "deadline_exceeded"
            assert prompts(gateway) == [["0"], ["1"]]

    run_virtual(main())


# batches


@pytest.mark.parametrize(("wait_ms", "calls"), [(0, [1, 1]), (200, [2])])
def test_max_wait_ms_is_how_long_a_call_lingers_for_company(wait_ms: int, calls: list[int]) -> None:
    async def main() -> None:
        toml = scripted("one", latency_seconds=1, max_batch_size=4, max_concurrency=2, backend__max_wait_ms=wait_ms)
        async with running(toml) as gateway:
            started = loop_time()
            await asyncio.gather(gateway.client.draw(), later(0.05, gateway.client.draw))
            assert [len(call) for call in prompts(gateway)] == calls
            assert loop_time() - started == pytest.approx(1.2 if wait_ms else 1.05, abs=0.02)

    run_virtual(main())


def test_a_call_that_is_full_does_not_linger() -> None:
    async def main() -> None:
        toml = scripted("one", latency_seconds=1, max_batch_size=2, backend__max_wait_ms=500)
        async with running(toml) as gateway:
            started = loop_time()
            await asyncio.gather(gateway.client.draw(), gateway.client.draw())
            assert loop_time() - started == pytest.approx(1, abs=0.05)
            assert [len(call) for call in prompts(gateway)] == [2]

    run_virtual(main())


def test_max_batch_pixels_bounds_a_call() -> None:
    async def main() -> None:
        toml = scripted("one", max_batch_size=8, max_concurrency=1, backend__max_batch_pixels=300_000)
        async with running(toml) as gateway:
            await gateway.client.draw(n=4, size="256x512")
            assert [len(call) for call in prompts(gateway)] == [2, 2]
            await gateway.client.draw(n=2, size="1024x1024")
            assert [len(call) for call in prompts(gateway)][2:] == [1, 1]

    run_virtual(main())


def test_an_attempts_time_out_scales_with_its_batch() -> None:
    async def main() -> None:
        toml = scripted(
            "one", latency_per_picture_seconds=0.9, max_batch_size=4, max_concurrency=1, backend__timeout_ms=1000
        )
        async with running(toml) as gateway:
            assert (await gateway.client.draw(n=4)).status == 200
            assert [len(call) for call in prompts(gateway)] == [4]

    run_virtual(main())


def test_a_batch_that_fails_on_the_only_endpoint_is_asked_for_again_one_by_one() -> None:
    async def main() -> None:
        steps = ["ok", "fail", "ok", "fail", "ok"]
        toml = scripted("one", latency_seconds=1, max_batch_size=3, max_concurrency=1, sequence=steps, repeat="last")
        async with running(toml) as gateway:
            before = asyncio.ensure_future(gateway.client.draw(prompt="before"))
            await asyncio.sleep(0.1)
            replies = await asyncio.gather(*(gateway.client.draw(prompt=name) for name in ("a", "poison", "b")))
            assert prompts(gateway) == [["before"], ["a", "poison", "b"], ["a"], ["poison"], ["b"]]
            assert [one.status for one in replies] == [200, 502, 200]
            assert [one.headers["x-attempts"] for one in replies] == ["2", "2", "2"]
            assert (await before).status == 200

    run_virtual(main())


def test_when_one_of_a_shared_call_leaves_it_goes_on_for_the_other() -> None:
    async def main() -> None:
        async with running(scripted("one", latency_seconds=1, max_batch_size=2, max_concurrency=1)) as gateway:
            running_one = asyncio.ensure_future(gateway.client.draw())
            await asyncio.sleep(0.1)
            gone = asyncio.Event()
            leaver = asyncio.ensure_future(
                gateway.client.request("POST", "/v1/images/generations", body={"prompt": "leaves"}, leave=gone)
            )
            stayer = asyncio.ensure_future(gateway.client.draw(prompt="stays"))
            await asyncio.sleep(1.5)
            assert prompts(gateway)[1] == ["leaves", "stays"]
            gone.set()
            await leaver
            assert (await stayer).status == 200
            assert gateway.adapter("one").cancelled == 0
            assert (await running_one).status == 200

    run_virtual(main())


# where it goes


def test_least_work_waits_for_a_faster_endpoint_and_lets_others_pass() -> None:
    async def main() -> None:
        toml = (
            '[routing]\nstrategy = "least_work"\n'
            + one_slot("fast", models=["m"], latency_seconds=1)
            + one_slot("slow", models=["m"], latency_seconds=10)
        )
        async with running(toml) as gateway:
            await learn(gateway, backend="fast")
            await learn(gateway, backend="slow")
            replies = await asyncio.gather(*(gateway.client.draw(model="m") for _ in range(4)))
            assert [one.headers["x-backend"] for one in replies] == ["fast"] * 4

    run_virtual(main())


@pytest.mark.parametrize(("affinity", "loads"), [(15, 2), (0, 4)])
def test_affinity_keeps_work_where_its_model_is_loaded(affinity: float, loads: int) -> None:
    async def main() -> None:
        toml = f"[routing]\naffinity_seconds = {affinity}\n" + one_slot(
            models=["a", "b"], switches_models=True, load_seconds=2
        )
        async with running(toml) as gateway:
            started = loop_time()
            draws = [later(0.1 * at, partial(gateway.client.draw, model=model)) for at, model in enumerate("aabab")]
            await asyncio.gather(*draws)
            assert loop_time() - started == pytest.approx(5 + 2 * loads, abs=0.5)

    run_virtual(main())


def test_affinity_does_not_starve_the_other_model() -> None:
    async def main() -> None:
        toml = "[routing]\naffinity_seconds = 5\n" + one_slot(models=["a", "b"], switches_models=True, load_seconds=2)
        async with running(toml) as gateway:
            stream = [later(0.9 * at, lambda: gateway.client.draw(model="a")) for at in range(20)]
            others = asyncio.gather(*stream)
            reply = await later(1.5, lambda: gateway.client.draw(model="b"))
            assert reply.status == 200
            assert (
                int(reply.headers["x-queue-ms"]) < 9000
            )  # the pictures before it, five seconds, and the one that is drawn
            await others

    run_virtual(main())


@pytest.mark.parametrize(("overflow", "helped"), [("", False), ("tier_overflow_seconds = 2\n", True)])
def test_the_next_tier_helps_when_this_one_would_take_too_long(overflow: str, helped: bool) -> None:
    async def main() -> None:
        toml = (
            "[routing]\n"
            + overflow
            + one_slot("first", models=["m"])
            + one_slot("second", models=["m"], backend__tier=1)
        )
        async with running(toml) as gateway:
            await learn(gateway, backend="first")
            replies = await asyncio.gather(*(gateway.client.draw(model="m") for _ in range(8)))
            assert ("second" in {one.headers["x-backend"] for one in replies}) is helped

    run_virtual(main())


def test_backends_of_one_exclusive_group_take_turns() -> None:
    async def main() -> None:
        toml = "".join(
            scripted(name, latency_seconds=1, batch="single", max_concurrency=2, backend__exclusive_group="gpu")
            for name in ("a", "b")
        )
        async with running(toml) as gateway:
            draws = [gateway.client.draw(backend=name) for name in ("a", "b") for _ in range(6)]
            overlaps = 0

            async def watch() -> None:
                nonlocal overlaps
                while True:
                    overlaps += bool(gateway.adapter("a").in_flight and gateway.adapter("b").in_flight)
                    await asyncio.sleep(0.1)

            watcher = asyncio.ensure_future(watch())
            started = loop_time()
            replies = await asyncio.gather(*draws)
            watcher.cancel()
            assert {one.status for one in replies} == {200}
            assert overlaps == 0
            assert loop_time() - started == pytest.approx(6, abs=0.5)
            waits = [max(int(one.headers["x-queue-ms"]) for one in replies[at : at + 6]) for at in (0, 6)]
            assert max(waits) < 6000

    run_virtual(main())


def test_slow_start_gives_a_recovered_endpoint_its_slots_little_by_little() -> None:
    async def in_flight_after(slow_start: float, seconds: float, *, alone: bool = False) -> int:
        toml = f"[routing]\nslow_start_seconds = {slow_start}\n" + "".join(
            scripted(
                name,
                models=["m"],
                latency_seconds=1000,
                batch="single",
                max_concurrency=10,
                backend__timeout_ms=10**7,
                backend__health_check_interval_secs=1,
            )
            for name in (["back"] if alone else ["back", "full"])
        )
        async with running(toml) as gateway:
            adapter = gateway.adapter("back")
            adapter.healthy = False
            await asyncio.sleep(5)
            draws = [asyncio.ensure_future(gateway.client.draw(backend="full")) for _ in range(0 if alone else 10)]
            await asyncio.sleep(1)
            adapter.healthy = True
            await asyncio.sleep(10)
            ready_at = gateway.endpoint("back").ramp_ends - slow_start
            draws += [asyncio.ensure_future(gateway.client.draw(model="m")) for _ in range(10)]
            await asyncio.sleep(max(0.2, ready_at + seconds - loop_time()))
            count = int(adapter.in_flight)
            for draw in draws:
                draw.cancel()
            await asyncio.gather(*draws, return_exceptions=True)
            return count

    assert run_virtual(in_flight_after(0, 1)) == 10
    assert run_virtual(in_flight_after(100, 50.5)) == 6
    assert run_virtual(in_flight_after(100, 100.5)) == 10
    # nobody else is there: it cannot be spared
    assert run_virtual(in_flight_after(100, 50.5, alone=True)) == 10


def test_a_good_health_check_lets_a_broken_endpoint_be_tried_at_once() -> None:
    async def main() -> None:
        toml = "[breaker]\nopen_seconds = 50\n" + scripted(
            "one", sequence=["fail"] * 5 + ["ok"], repeat="last", backend__health_check_interval_secs=1
        )
        async with running("[routing]\npanic_mode = false\n" + toml) as gateway:
            adapter = gateway.adapter("one")
            adapter.healthy = False
            await asyncio.sleep(0.1)
            gateway.endpoint("one").health.record(ok=True, detail="")
            for _ in range(5):
                assert (await gateway.client.draw()).status == 502
            await asyncio.sleep(5)  # the checks notice that it is down
            adapter.healthy = True
            started = loop_time()
            assert (await gateway.client.draw()).status == 200
            assert loop_time() - started < 10

    run_virtual(main())


def test_least_work_does_not_wait_for_slots_that_a_recovered_endpoint_may_not_use_yet() -> None:
    async def main() -> None:
        toml = '[routing]\nstrategy = "least_work"\nslow_start_seconds = 1000\n' + "".join(
            scripted(
                name,
                models=["m"],
                latency_seconds=seconds,
                batch="single",
                max_concurrency=10,
                backend__health_check_interval_secs=1,
            )
            for name, seconds in (("fast", 10), ("slow", 12))
        )
        async with running(toml) as gateway:
            await asyncio.gather(learn(gateway, backend="fast"), learn(gateway, backend="slow"))
            gateway.adapter("fast").healthy = False
            await asyncio.sleep(5)
            gateway.adapter("fast").healthy = True
            await asyncio.sleep(5)
            replies = await asyncio.gather(*(gateway.client.draw(model="m") for _ in range(6)))
            assert [one.headers["x-backend"] for one in replies].count("slow") == 5
            assert {one.headers["x-queue-ms"] for one in replies} == {"0"}

    run_virtual(main())


# who is left alone


@pytest.mark.parametrize(("panic", "status"), [(True, 503), (False, 200)])
def test_without_panic_mode_requests_wait_for_an_endpoint_to_recover(panic: bool, status: int) -> None:
    async def main() -> None:
        toml = f"[routing]\npanic_mode = {str(panic).lower()}\n[breaker]\nopen_seconds = 4\n"
        toml += scripted("one", sequence=["fail"] * (6 if panic else 5) + ["ok"], repeat="last", batch="single")
        async with running(toml) as gateway:
            for _ in range(5):
                assert (await gateway.client.draw()).status == 502
            started = loop_time()
            reply = await gateway.client.draw()
            assert reply.status == status
            waited = loop_time() - started
            assert waited < 0.1 if panic else 3 < waited < 6

    run_virtual(main())


def test_breaker_options_say_when_an_endpoint_is_left_alone() -> None:
    async def failures_at_the_bad_one(breaker: str) -> int:
        toml = f"[breaker]\n{breaker}\n[retry]\nbudget_ratio = 1\n"
        toml += scripted("bad", models=["m"], sequence=["fail"]) + scripted("good", models=["m"])
        async with running(toml) as gateway:
            for _ in range(40):
                assert (await gateway.client.draw(model="m")).status == 200
            return int(gateway.adapter("bad").count)

    assert run_virtual(failures_at_the_bad_one("consecutive_failures = 2")) == 2
    assert run_virtual(failures_at_the_bad_one("consecutive_failures = 7")) == 7
    assert run_virtual(failures_at_the_bad_one("consecutive_failures = 99\nmin_calls = 4")) == 4
    assert run_virtual(failures_at_the_bad_one("consecutive_failures = 99\nmin_calls = 99")) == 40


def test_open_seconds_double_up_to_their_maximum() -> None:
    async def main() -> None:
        toml = (
            "[breaker]\nconsecutive_failures = 1\nopen_seconds = 10\nmax_open_seconds = 25\n[retry]\nbudget_ratio = 1\n"
        )
        toml += scripted("bad", models=["m"], sequence=["fail"]) + scripted("good", models=["m"])
        async with running(toml) as gateway:
            seen, times = 0, []
            for _ in range(1200):
                await gateway.client.draw(model="m")
                if gateway.adapter("bad").count > seen:
                    seen = gateway.adapter("bad").count
                    times.append(loop_time())
                await asyncio.sleep(0.1)
            waits = [after - before for before, after in pairwise(times)]
            assert waits[0] == pytest.approx(10, rel=0.25)
            assert waits[1] == pytest.approx(20, rel=0.25)
            assert waits[2] == pytest.approx(25, rel=0.25)

    run_virtual(main())


def test_an_engine_that_hangs_although_its_health_page_answers_is_ejected() -> None:
    async def main() -> None:
        toml = "".join(
            scripted(
                name, models=["m"], latency_seconds=0.5, sequence=[step], max_concurrency=4, backend__timeout_ms=20_000
            )
            for name, step in (("wedged", "hang"), ("well", "ok"))
        )
        async with running(toml) as gateway:
            replies = await asyncio.gather(
                *(later(1.5 * at, lambda: gateway.client.draw(model="m")) for at in range(40))
            )
            assert {one.status for one in replies} == {200}
            assert (await gateway.nobody.get("/health")).json()["backends"]["unhealthy"] == 1
            wedged = gateway.endpoint("wedged")
            assert wedged.health.health == "up"
            assert wedged.breaker.standing == "open"
            assert "no answer within 20 s" in wedged.last_error
            # four slots hung, and a trial or two after that: not every second request of the minute
            assert gateway.adapter("wedged").count <= 8

    run_virtual(main())


def test_an_engine_that_goes_silent_gets_no_new_work_even_before_its_calls_time_out() -> None:
    async def main() -> None:
        toml = "".join(
            scripted(name, models=["m"], latency_seconds=0.5, sequence=steps, repeat="last", batch="single")
            for name, steps in (("wedged", ["ok"] * 10 + ["hang"]), ("well", ["ok"]))
        )
        async with running(toml) as gateway:
            for _ in range(20):
                assert (await gateway.client.draw(model="m")).status == 200
            draws = [asyncio.ensure_future(later(at, lambda: gateway.client.draw(model="m"))) for at in range(30)]
            await asyncio.sleep(31)
            # 5 s and four times half a second: until then every other request went there
            assert gateway.adapter("wedged").count <= 10 + 5
            queue = (await gateway.client.get("/v1/queue")).json()
            assert [one["suspect"] for one in queue["endpoints"]] == [True, False]
            assert {one.status for one in await asyncio.gather(*draws)} == {200}

    run_virtual(main())


def test_health_check_fall_and_rise_are_how_many_checks_turn_the_verdict() -> None:
    async def main() -> None:
        toml = scripted(
            "one",
            backend__health_check_interval_secs=1,
            backend__health_check_fall=3,
            backend__health_check_rise=2,
        )
        async with running(toml) as gateway:
            await asyncio.sleep(0.1)

            async def checks_until(health: str, *, healthy: bool) -> int:
                gateway.adapter("one").healthy = healthy
                record = gateway.endpoint("one").health
                count, bad, good = 0, record._bad, record._good
                while record.health != health:
                    await asyncio.sleep(0.01)
                    if (record._bad, record._good) != (bad, good):
                        bad, good, count = record._bad, record._good, count + 1
                return count

            assert await checks_until("down", healthy=False) == 3
            assert await checks_until("up", healthy=True) == 2

    run_virtual(main())


@pytest.mark.parametrize(("factor", "seconds"), [("", 20), ("hedge_after_factor = 3", 3.5)])
def test_a_slow_call_to_a_cheap_backend_is_hedged(factor: str, seconds: float) -> None:
    async def main() -> None:
        toml = f"[retry]\n{factor}\n" + "".join(
            scripted(name, models=["m"], batch="single", latency_seconds=0.5, backend__cheap=True)
            for name in ("a", "b")
        )
        async with running(toml) as gateway:
            for _ in range(4):
                assert (await gateway.client.draw(model="m")).status == 200
            slow = gateway.adapter("a")
            slow.script = type(slow.script)(latency_seconds=20, batch="single")
            started = loop_time()
            reply = await gateway.client.draw(model="m")
            assert reply.status == 200
            if factor:
                assert loop_time() - started == pytest.approx(2.1, abs=0.2)  # three times half a second, and half
                assert (reply.headers["x-backend"], reply.headers["x-attempts"]) == ("b", "2")
                await asyncio.sleep(0)
                assert slow.cancelled == 1
                assert "img_serving_hedges_total" in (await gateway.nobody.get("/metrics")).body.decode()
            else:
                assert loop_time() - started == pytest.approx(20)

    run_virtual(main())


# what can be looked at


def test_the_queue_can_be_looked_at_by_admins() -> None:
    async def main() -> None:
        toml = key("team", weight=2, max_running=3) + one_slot(models=["m"])
        async with running(toml) as gateway:
            team = as_key(gateway, "team")
            assert (await team.get("/v1/queue")).status == 403
            assert (await gateway.nobody.get("/v1/queue")).status == 401
            await learn(gateway)
            draws = [asyncio.ensure_future(team.draw(n=2)) for _ in range(3)]
            await asyncio.sleep(0.5)
            queue = (await gateway.client.get("/v1/queue")).json()
            assert (queue["object"], queue["depth"], queue["running"], queue["jobs_total"]) == ("queue", 5, 1, 3)
            assert queue["oldest_seconds"] == 0.5
            (backend,) = queue["backends"]
            assert (backend["name"], backend["depth"], backend["running"]) == ("one", 5, 1)
            assert backend["eta_seconds"] == pytest.approx(5.5, abs=0.2)
            (tenant,) = queue["tenants"]
            assert (tenant["name"], tenant["weight"], tenant["max_running"], tenant["depth"]) == ("team", 2, 3, 5)
            (endpoint,) = queue["endpoints"]
            assert (endpoint["max_concurrency"], endpoint["in_flight"], endpoint["breaker"]) == (1, 1, "closed")
            assert endpoint["seconds_per_unit"] > 0
            positions = [(job["status"], job["position"]) for job in queue["jobs"]]
            assert positions == [("running", 0), ("queued", 1), ("queued", 3)]
            etas = [job["eta_seconds"] for job in queue["jobs"]]
            assert etas == pytest.approx([1.5, 3.5, 5.5], abs=0.3)
            metrics = (await gateway.nobody.get("/metrics")).body.decode()
            assert 'img_serving_tenant_queue_depth{tenant="team"} 5' in metrics
            assert 'img_serving_backend_queue_depth{backend="one"} 5' in metrics
            assert "img_serving_endpoint_seconds_per_unit" in metrics
            assert {one.status for one in await asyncio.gather(*draws)} == {200}

    run_virtual(main())


def test_everybody_who_waits_is_answered_when_the_gateway_stops() -> None:
    async def main() -> None:
        async with running(one_slot(latency_seconds=3)) as gateway:
            draws = [asyncio.ensure_future(gateway.client.draw(n=2)) for _ in range(5)]
            await asyncio.sleep(0.1)
            await gateway.gateway.drain(7)
            replies = await asyncio.gather(*draws)
            assert [one.status for one in replies] == [200, 503, 503, 503, 503]
            assert {one.json()["error"]["code"] for one in replies[1:]} == {"draining"}
            assert (await gateway.client.draw()).status == 503

    run_virtual(main())


# what must not be lost


@pytest.mark.parametrize("timeout_ms", [950, 1000, 1050])
def test_a_time_out_and_a_deadline_at_the_same_moment_are_a_deadline(timeout_ms: int) -> None:
    async def main() -> None:
        toml = "[queue]\nrequest_timeout_seconds = 1\n" + scripted(
            "one", sequence=["hang"], backend__timeout_ms=timeout_ms
        )
        async with running(toml) as gateway:
            for _ in range(3):
                reply = await gateway.client.draw()
                assert reply.status in {502, 504}
                assert reply.headers["x-should-retry"] == "false"
                assert reply.json()["error"]["code"] in {"deadline_exceeded", "backend_failed"}

    run_virtual(main())


def test_nobody_waits_for_ever_when_the_scheduler_breaks_on_the_end_of_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(one_slot()) as gateway:
            scheduler = gateway.gateway.dispatcher.scheduler

            def broken(*_: object) -> list[object]:
                raise IndexError("a bug")

            monkeypatch.setattr(scheduler, "finish", broken)
            reply = await gateway.client.draw()
            assert (reply.status, reply.json()["error"]["code"]) == (502, "backend_failed")
            assert "a bug" in caplog.text
            metrics = (await gateway.nobody.get("/metrics")).body.decode()
            assert 'img_serving_internal_errors_total{where="scheduler"} 1' in metrics

    run_virtual(main())


@pytest.mark.parametrize("field", ["model", "backend"])
def test_names_of_models_and_backends_are_not_remembered_by_the_megabyte(field: str) -> None:
    async def main() -> None:
        async with running(one_slot()) as gateway:
            reply = await gateway.client.draw(**{field: "x" * 257})
            assert (reply.status, reply.json()["error"]["param"]) == (400, field)

    run_virtual(main())


def test_a_backend_that_comes_and_goes_under_load_leaves_no_adapter_open() -> None:
    async def main() -> None:
        async with running(one_slot("other")) as gateway:
            closed = 0
            adapters = []
            body = {"name": "x", "protocol": "scripted", "scripted": {"latency_seconds": 1.0, "batch": "single"}}
            draws = []
            for _ in range(5):
                assert (await gateway.client.post("/v1/backends", body)).status == 201
                adapter = gateway.adapter("x")
                adapters.append(adapter)
                close = adapter.close

                async def counted(close: Callable[[], Awaitable[None]] = close) -> None:
                    nonlocal closed
                    closed += 1
                    await close()

                adapter.close = counted
                draws += [asyncio.ensure_future(gateway.client.draw(backend="x")) for _ in range(3)]
                await asyncio.sleep(0.3)
                assert (await gateway.client.request("DELETE", "/v1/backends/x")).status == 200
            await asyncio.sleep(0.75)  # the first ones are over, those of the same name added later are not
            assert closed >= 3
            assert {one.status for one in await asyncio.gather(*draws)} == {200}
            await asyncio.sleep(0.1)
            assert closed == 5
            assert gateway.gateway.registry._leaving == {}

    run_virtual(main())


def test_a_request_waits_for_a_busy_backend_that_is_free_in_time() -> None:
    async def main() -> None:
        async with running(scripted("one", sequence=["busy", "ok"], repeat="last", busy_seconds=7)) as gateway:
            started = loop_time()
            assert (await gateway.client.draw()).status == 200
            assert loop_time() - started == pytest.approx(7, abs=0.2)

    run_virtual(main())
