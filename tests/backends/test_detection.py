"""Finding out what an endpoint speaks: by read-only questions, once, and again after it was down."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from img_serving.backends.a1111 import A1111Backend
from img_serving.backends.detection import DetectingBackend
from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import Call, ImageRequest, Item
from img_serving.ports import UpstreamReply
from img_serving.transport.http import HttpTransport

CALL = Call(ImageRequest("a fox", seed=5), None, 64, 48, (Item("a fox", None, 5),), 5.0)
QUESTIONS = {"/sdapi/v1/options", "/sdapi/v1/sd-models", "/prompt", "/v1/models"}


@asynccontextmanager
async def detecting(script):
    async with ScriptedServer(script) as server:
        transport = HttpTransport(server.url)
        backend = DetectingBackend({"openai": OpenAIBackend(transport), "a1111": A1111Backend(transport)}, transport)
        try:
            yield backend, server
        finally:
            await backend.close()


def run(script, act):
    async def main():
        async with detecting(script) as (backend, server):
            return await act(backend, server)

    return asyncio.run(main())


async def draw(backend):
    return await backend.generate(CALL, lambda progress: None)


@pytest.mark.parametrize(
    ("script", "protocol"),
    [
        ({"faces": ["openai"]}, "openai"),
        ({"faces": ["a1111"]}, "a1111"),
        ({"faces": ["openai", "a1111"]}, "a1111"),
        ({"faces": ["a1111"], "statuses": {"/sdapi/v1/options": 404}}, "a1111"),
        ({"faces": ["a1111"], "statuses": {"/sdapi/v1/options": 500}}, "a1111"),
        ({"faces": [], "statuses": {"/v1/models": 401}}, "openai"),
        ({"faces": []}, "openai"),
    ],
    ids=["openai", "a1111", "both", "no options", "broken options", "key wanted", "neither"],
)
def test_the_protocol_is_what_the_endpoint_answers_to(script, protocol):
    async def act(backend, server):
        before = backend.protocol, backend.detection
        report = await backend.check(2.0)
        return before, backend.protocol, backend.detection.because, report, server.posts

    before, found, because, report, posts = run(script, act)
    assert before == ("http", None)
    assert found == protocol
    assert because
    assert report.found.endswith(because)
    assert not posts


def test_until_it_is_known_calls_suit_either_protocol():
    async def act(backend, server):
        before = backend.capabilities
        await backend.check(2.0)
        return before, backend.capabilities

    before, after = run({"faces": ["a1111"]}, act)
    assert (before.batch, before.max_batch_size, before.max_concurrency) == ("single", 1, 1)
    assert {"quality", "clip_skip"} <= before.honours
    assert (after.batch, after.max_concurrency) == ("seeds", 1)


def test_it_is_asked_once_however_many_want_to_know():
    async def act(backend, server):
        await asyncio.gather(*(draw(backend) for _ in range(5)), backend.check(2.0))
        await backend.check(2.0)
        return [one.path for one in server.exchanges if one.path == "/sdapi/v1/options"]

    # by us, and by the adapter that it then is
    assert len(run({"faces": ["a1111"]}, act)) == 2


def test_what_answers_neither_is_asked_again_at_the_next_check():
    async def act(backend, server):
        await backend.check(2.0)
        assert backend.protocol == "openai"
        assert "taken for" in backend.detection.because
        server.script = ScriptedServer({"faces": ["a1111"]}).script
        report = await backend.check(2.0)
        return report.healthy, backend.protocol

    assert run({"faces": []}, act) == (True, "a1111")


@pytest.mark.parametrize("notice", ["check", "generate"])
def test_it_is_asked_again_after_it_was_down(notice):
    async def act(backend, server):
        await backend.check(2.0)
        assert backend.protocol == "openai"
        await server.stop()
        if notice == "check":
            assert not (await backend.check(2.0)).healthy
        else:
            with pytest.raises(AttemptError):
                await draw(backend)
        server.script = ScriptedServer({"faces": ["a1111"]}).script
        await server.start()
        assert (await backend.check(2.0)).healthy
        return backend.protocol

    assert run({"faces": ["openai"]}, act) == "a1111"


def test_a_busy_endpoint_is_not_one_that_was_down():
    async def act(backend, server):
        await backend.check(2.0)
        with pytest.raises(AttemptError):
            await draw(backend)
        asked = len(server.exchanges)
        await backend.check(2.0)
        return len(server.exchanges) - asked

    assert run({"faces": ["openai"], "sequence": ["busy"]}, act) == 1


def test_nobody_there_is_unhealthy_and_not_started():
    async def act(backend, server):
        await server.stop()
        report = await backend.check(2.0)
        with pytest.raises(AttemptError) as caught:
            await draw(backend)
        return report.healthy, caught.value.outcome, backend.protocol

    assert run({}, act) == (False, Outcome.NOT_STARTED, "http")


def test_nothing_but_server_errors_decides_nothing():
    async def act(backend, server):
        report = await backend.check(2.0)
        return report.healthy, backend.protocol, {one.path for one in server.exchanges}

    assert run({"check_status": 503}, act) == (False, "http", QUESTIONS)


class Silent:
    """A transport whose server never answers, or asks for a password."""

    def __init__(self, reply: UpstreamReply | None = None) -> None:
        self.reply = reply

    async def request(
        self, method, path, *, headers=(), body=None, timeout_seconds, max_body_bytes, on_event_bytes=None
    ) -> UpstreamReply:
        if self.reply is None:
            await asyncio.get_running_loop().create_future()
        return self.reply or UpstreamReply(500)

    async def close(self) -> None:
        pass


def of(transport: Silent) -> DetectingBackend:
    return DetectingBackend({"openai": OpenAIBackend(transport), "a1111": A1111Backend(transport)}, transport)


def test_no_answer_in_time_is_unhealthy():
    report = asyncio.run(of(Silent()).check(0.02))
    assert not report.healthy
    assert "in time" in report.detail


def test_a_password_prompt_is_a1111s_own():
    backend = of(Silent(UpstreamReply(401, {"www-authenticate": "Basic"})))
    report = asyncio.run(backend.check(1.0))
    assert (report.healthy, backend.protocol) == (False, "a1111")
    assert "password" in repr(backend)


def test_a_cancelled_question_is_asked_by_the_next_who_wants_to_know():
    async def main():
        transport = Silent()
        backend = of(transport)
        first = asyncio.create_task(draw(backend))
        second = asyncio.create_task(backend.check(1.0))
        await asyncio.sleep(0.01)
        first.cancel()
        transport.reply = UpstreamReply(200, {}, b'{"data": [{"id": "a"}]}')
        return await second, backend.protocol

    report, protocol = asyncio.run(main())
    assert report.healthy
    assert protocol == "openai"
