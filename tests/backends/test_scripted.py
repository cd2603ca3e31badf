"""The scripted fakes do what their script says, and refuse scripts that say nothing."""

from __future__ import annotations

import asyncio
import json

import pytest
from msgspec import structs
from PIL import Image

from img_serving.backends.scripted import STEPS, ScriptedBackend, picture
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Call, ImageRequest, Item, ItemFailure, Progress
from img_serving.media.sniff import dimensions


def call_of(count: int = 1, prompt: str = "a fox") -> Call:
    items = tuple(Item(prompt, None, 5 + index) for index in range(count))
    return Call(ImageRequest(prompt, seed=5, n=count), None, 64, 48, items, 5.0)


async def told(backend: ScriptedBackend, call: Call | None = None) -> str:
    try:
        results = await backend.generate(call or call_of(), lambda progress: None)
    except AttemptError as error:
        return f"{error.outcome}" + (f" {error.busy_seconds}" if error.busy_seconds is not None else "")
    except BackendRefusal as refusal:
        return refusal.error.code or ""
    return " ".join("failed" if isinstance(one, ItemFailure) else f"{one.width}x{one.height}" for one in results)


def run_of(script, calls: int) -> list[str]:
    async def main():
        backend = ScriptedBackend(script)
        return [await told(backend) for _ in range(calls)]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("step", "result"),
    [
        ("ok", "64x48"), ("fail", "failed"), ("refuse", "invalid_value"), ("refuse_content", "moderation_blocked"),
        ("busy", "not_started 2.5"), ("unknown", "unknown"), ("not_started", "not_started"), ("bad_size", "32x24"),
        ("fail_midway", "failed"),
    ],
)  # fmt: skip
def test_a_step_does_what_it_is_called(step, result):
    assert run_of({"sequence": [step], "busy_seconds": 2.5}, 1) == [result]
    assert step in STEPS


def test_one_picture_of_a_batch_can_fail_alone():
    backend = ScriptedBackend({"sequence": ["partial"]})
    assert asyncio.run(told(backend, call_of(3))) == "64x48 64x48 failed"


def test_a_sequence_begins_again_or_its_last_step_stays():
    ok, failed = "64x48", str(Outcome.FAILED)
    assert run_of({"sequence": ["fail", "ok"]}, 4) == [failed, ok, failed, ok]
    assert run_of({"sequence": ["fail", "ok"], "repeat": "last"}, 4) == [failed, ok, ok, ok]


def test_chance_is_the_same_each_time():
    first = run_of({"fail_rate": 0.5, "random_seed": 3}, 40)
    assert first == run_of({"fail_rate": 0.5, "random_seed": 3}, 40)
    assert 5 < first.count("failed") < 35
    assert first != run_of({"fail_rate": 0.5, "random_seed": 4}, 40)


def test_latency_is_spread_over_the_steps_reported():
    async def main():
        reports: list[Progress] = []
        backend = ScriptedBackend({"latency_seconds": 0.01, "latency_jitter_seconds": 0.01, "steps": 4})
        started = asyncio.get_running_loop().time()
        await backend.generate(call_of(), reports.append)
        return reports, asyncio.get_running_loop().time() - started, backend.capabilities.progress

    reports, took, progress = asyncio.run(main())
    assert reports == [Progress(done, 4) for done in range(1, 5)]
    assert took >= 0.01
    assert progress


def reports_of(script, call: Call) -> list[Progress]:
    reports: list[Progress] = []
    backend = ScriptedBackend(script)
    try:
        asyncio.run(backend.generate(call, reports.append))
    except AttemptError:
        reports.append(Progress(-1, -1))
    return reports


def test_a_call_can_fail_after_half_of_its_steps():
    assert reports_of({"sequence": ["fail_midway"], "steps": 5}, call_of()) == [
        Progress(1, 5), Progress(2, 5), Progress(3, 5), Progress(-1, -1)
    ]  # fmt: skip


def test_each_step_shows_every_picture_to_who_wants_previews():
    script = {"steps": 2, "previews": True}
    reports = reports_of(script, structs.replace(call_of(2), previews=True))
    shown = [one.preview for one in reports if one.preview is not None]
    assert [(one.done, one.preview and one.preview.index) for one in reports] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({one.data for one in shown}) == 4
    assert {dimensions(one.data) for one in shown} == {(16, 12)}
    assert reports == reports_of(script, structs.replace(call_of(2), previews=True))


def test_who_wants_no_previews_is_told_of_steps_only():
    assert reports_of({"steps": 2, "previews": True}, call_of(2)) == [Progress(1, 2), Progress(2, 2)]


def test_a_call_that_hangs_is_ended_by_cancelling_and_counted():
    async def main():
        backend = ScriptedBackend({"sequence": ["hang"]})
        task = asyncio.create_task(told(backend))
        await asyncio.sleep(0)
        assert "1 in flight" in repr(backend)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return backend

    backend = asyncio.run(main())
    assert (backend.in_flight, backend.cancelled, len(backend.calls)) == (0, 1, 1)


def test_the_same_words_seed_and_size_give_the_same_bytes_and_others_do_not():
    assert picture("a", 1, 9, 7) == picture("a", 1, 9, 7)
    assert len({picture("a", 1, 9, 7), picture("b", 1, 9, 7), picture("a", 2, 9, 7), picture("a", 1, 7, 9)}) == 4


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 3), (64, 48), (1024, 1024)])
def test_its_pictures_are_real_and_small(width, height, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture("a", 1, width, height))
    with Image.open(path) as opened:
        opened.load()
        assert opened.size == (width, height)
    assert path.stat().st_size < 3000


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"latency": 1}, "latency: unknown option; did you mean latency_seconds"),
        ({"xyz": 1}, "xyz: unknown option"),
        ({"latency_seconds": -1}, "latency_seconds: "),
        ({"latency_seconds": "1"}, "latency_seconds: "),
        ({"fail_rate": 1.5}, "fail_rate: "),
        ({"sequence": ["explode"]}, r"sequence\[0\]: "),
        ({"sequence": []}, "sequence: "),
        ({"repeat": "twice"}, "repeat: "),
        ({"max_batch_size": 0}, "max_batch_size: "),
        ({"batch": "all"}, "batch: "),
        ({"models": "one"}, "models: "),
        ({"healthy": "yes"}, "healthy: "),
        ({"operations": ["paint"]}, r"operations\[0\]: "),
        ({"previews": True}, "previews: are shown at steps"),
    ],
)
def test_an_impossible_script_is_refused_by_the_name_of_the_option(script, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        ScriptedBackend(script)


def test_options_show_in_capabilities_and_health():
    backend = ScriptedBackend(
        {"models": ["a", "b"], "batch": "seeds", "max_batch_size": 3, "max_concurrency": 2, "healthy": False}
    )
    shown = backend.capabilities
    assert (shown.operations, shown.previews) == (frozenset({"generation"}), False)
    assert (shown.batch, shown.max_batch_size, shown.max_concurrency, shown.progress) == ("seeds", 3, 2, False)
    report = asyncio.run(backend.check(1.0))
    assert (report.healthy, report.models) == (False, ("a", "b"))


# the server


async def ask(port: int, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    reply = await reader.read(65536)
    writer.close()
    return reply


async def until(happened) -> None:
    """Another task's doing, that nothing announces."""
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


POST = b'POST /v1/images/generations HTTP/1.1\r\nContent-Length: 15\r\nX-A: b\r\n\r\n{"prompt": "x"}'


def test_the_server_records_what_it_was_asked():
    async def main():
        async with ScriptedServer({"latency_seconds": 0.02}) as server:
            replies = await asyncio.gather(ask(server.port, POST), ask(server.port, POST))
            return replies, server

    replies, server = asyncio.run(main())
    assert all(reply.startswith(b"HTTP/1.1 200 ") for reply in replies)
    first = server.posts[0]
    assert (first.json, first.headers["x-a"], first.disconnected_at) == ({"prompt": "x"}, "b", None)
    assert first.ended_at - first.started_at > 0.01
    assert (server.max_in_flight, server.in_flight, server.connections) == (2, 0, 2)


def test_the_server_notices_when_a_client_leaves():
    async def main():
        async with ScriptedServer({"sequence": ["hang"]}) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(POST)
            await until(lambda: server.posts)
            left_at = asyncio.get_running_loop().time()
            writer.transport.abort()
            await until(lambda: not server.in_flight)
            return (server.posts[0].disconnected_at or 0.0) - left_at

    assert 0 <= asyncio.run(main()) < 0.1


def test_a_request_that_comes_before_the_answer_to_the_last_is_over_is_answered_next():
    async def main():
        async with ScriptedServer({"latency_seconds": 0.02}) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(POST)
            await until(lambda: server.in_flight)
            writer.write(POST)
            for _ in range(2):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            writer.close()
            return server.posts

    first, second = asyncio.run(main())
    assert (first.disconnected_at, second.disconnected_at) == (None, None)
    assert second.json == {"prompt": "x"}


def test_a_server_starts_again_on_its_port():
    async def main():
        async with ScriptedServer() as server:
            port = server.port
            await server.stop()
            await server.start()
            return port == server.port and (await ask(port, POST)).startswith(b"HTTP/1.1 200 ")

    assert asyncio.run(main())


def test_a_server_follows_another_script_from_its_first_step():
    async def main():
        async with ScriptedServer({"sequence": ["500", "400", "500"]}) as server:
            replies = [await ask(server.port, POST) for _ in range(2)]
            server.follow({"sequence": ["503", "ok"]})
            return [reply[9:12] for reply in replies + [await ask(server.port, POST) for _ in range(2)]], server

    replies, server = asyncio.run(main())
    assert replies == [b"500", b"400", b"503", b"200"]
    with pytest.raises(ValueError, match=r"sequence\[0\]: "):
        server.follow({"sequence": ["nonsense"]})
    assert server.script.sequence == ("503", "ok")


def test_a_server_tells_of_each_request_as_it_comes_and_when_it_is_over():
    heard = []

    async def main():
        async with ScriptedServer({}, tell=lambda exchange: heard.append((exchange.path, exchange.ended_at))) as server:
            await ask(server.port, POST)

    asyncio.run(main())
    (came, not_yet), (over, ended_at) = heard
    assert came == over == "/v1/images/generations"
    assert not_yet is None
    assert ended_at is not None


def test_a_length_that_is_too_long_comes_with_a_whole_document_and_a_closed_connection():
    async def main():
        async with ScriptedServer({"sequence": ["long_length"]}) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(POST)
            reply = await reader.read()  # to the end of the connection
            writer.close()
            return reply

    head, _, body = asyncio.run(main()).partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    assert json.loads(body)["data"]
    assert length > len(body)


def test_a_servers_impossible_script_is_refused_too():
    with pytest.raises(ValueError, match=r"sequence\[0\]: "):
        ScriptedServer({"sequence": ["nonsense"]})
