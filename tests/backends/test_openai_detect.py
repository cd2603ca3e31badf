"""Finding out which dialect a server speaks: marks that are there, none that are guessed, and nothing drawn for it."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.fake_openai import FakeOpenAI
from tests.support.openai_calls import draw

from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.openai.detect import by_host
from img_serving.ports import UpstreamReply
from img_serving.transport.http import HttpTransport


@pytest.mark.parametrize(
    ("url", "family"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com/openai", "openai"),
        ("https://api.together.xyz", "together"),
        ("https://api.together.ai", "together"),
        ("http://localhost:8080", None),
        ("https://openai.example.com", None),
        ("https://notapi.openai.com.evil.example", None),
        ("", None),
    ],
)
def test_a_host_that_is_known_says_it_all(url, family):
    found = by_host(url)
    assert (found.family if found else None) == family


@pytest.mark.parametrize(
    ("flavour", "found"),
    [
        ("vllm-omni", "vllm-omni (its models are owned by vllm)"),
        ("sglang", "sglang (its models are owned by sglang)"),
        ("localai", "localai (GET /system answered as LocalAI does)"),
        ("sdcpp", "sdcpp (GET /sdcpp/v1/capabilities answered)"),
        ("litellm", "litellm (its replies have x-litellm headers)"),
        ("together", "together (its list of models is a bare one, with types)"),
        ("xinference", "xinference (its models are owned by xinference)"),
        ("openai", "generic (nothing tells it from others)"),
    ],
)
def test_a_server_is_known_by_its_marks_and_says_which(flavour, found):
    result = draw(FakeOpenAI(flavour))
    assert result.report is not None
    assert result.report.found == found
    assert found in repr(result.backend)
    assert not result.server.posts


class Listing:
    """A transport whose server has these replies by path; 404 elsewhere."""

    def __init__(self, **replies: UpstreamReply) -> None:
        self.replies = {"/" + path.replace("__", "/"): reply for path, reply in replies.items()}
        self.asked: list[str] = []

    async def request(
        self, method, path, *, headers=(), body=None, timeout_seconds, max_body_bytes, on_event_bytes=None
    ) -> UpstreamReply:
        self.asked.append(path)
        return self.replies.get(path, UpstreamReply(404))

    async def close(self) -> None:
        pass


def models(text: bytes, **headers: str) -> UpstreamReply:
    return UpstreamReply(200, {name.replace("_", "-"): value for name, value in headers.items()}, text)


@pytest.mark.parametrize(
    ("listed", "extra", "family"),
    [
        (b'{"data": [{"id": "a", "owned_by": "local"}]}', {}, "generic"),
        (b'{"data": [{"id": "sd-cpp-local", "owned_by": "local"}]}', {}, "sdcpp"),
        (b'{"data": [{"id": "a", "owned_by": "local"}]}', {"sdcpp__v1__capabilities": b'{"samplers": []}'}, "sdcpp"),
        (b'{"data": [{"id": "a"}]}', {}, "generic"),
        (b'{"data": [{"id": "a"}]}', {"system": b'["backends", "loaded_models"]'}, "generic"),
        (b'{"data": [{"id": "a"}]}', {"system": b"not json"}, "generic"),
        (b'{"data": [{"id": "a", "owned_by": "vllm"}, {"id": "b", "owned_by": "sglang"}]}', {}, "generic"),
        (b'{"data": [{"id": "a", "owned_by": ["odd"], "created": "x"}]}', {}, "generic"),
        (b'{"data": [{"id": "a", "created": 1677610602, "owned_by": "openai"}]}', {}, "litellm"),
        (b'[{"id": "a", "type": "image"}]', {}, "together"),
        (b'[{"id": "a"}]', {}, "generic"),
        (b'{"data": []}', {}, "generic"),
        (b"<html>", {}, "generic"),
    ],
)
def test_only_a_clear_mark_counts(listed, extra, family):
    transport = Listing(v1__models=models(listed), **{path: models(body) for path, body in extra.items()})
    backend = OpenAIBackend(transport)
    report = asyncio.run(backend.check(1.0))
    assert report.healthy
    assert report.found.partition(" ")[0] == family


def test_questions_are_asked_once_for_each_list_of_models():
    transport = Listing(v1__models=models(b'{"data": [{"id": "a"}]}'))
    backend = OpenAIBackend(transport)

    async def main() -> None:
        await backend.check(1.0)
        await backend.check(1.0)
        transport.replies["/v1/models"] = models(b'{"data": [{"id": "b", "owned_by": "sglang"}]}')
        report = await backend.check(1.0)
        assert report.found.startswith("sglang")

    asyncio.run(main())
    assert transport.asked == ["/v1/models", "/system", "/v1/models", "/v1/models"]


def test_names_that_were_not_told_are_asked_for_again():
    transport = Listing(v1__models=models(b'{"data": [{"id": "sd-cpp-local"}]}'))
    transport.replies["/sdcpp/v1/capabilities"] = UpstreamReply(503)
    backend = OpenAIBackend(transport)

    async def main() -> None:
        await backend.check(1.0)
        assert backend.capabilities.samplers is None
        transport.replies["/sdcpp/v1/capabilities"] = models(b'{"samplers": ["euler_a"], "schedulers": []}')
        await backend.check(1.0)

    asyncio.run(main())
    assert backend.capabilities.samplers is not None
    assert backend.capabilities.samplers.find("Euler A") == "euler_a"


def test_it_is_found_out_again_after_it_was_down():
    async def main() -> list[str]:
        found = []
        server = FakeOpenAI("sglang", models=("m",))
        async with server:
            backend = OpenAIBackend(HttpTransport(server.url))
            found.append((await backend.check(2.0)).found)
            await server.stop()
            assert not (await backend.check(2.0)).healthy
            server.flavour = "vllm-omni"
            await server.start()
            found.append((await backend.check(2.0)).found)
            await backend.close()
        return [one.partition(" ")[0] for one in found]

    assert asyncio.run(main()) == ["sglang", "vllm-omni"]


def test_capabilities_are_the_same_object_until_something_changes():
    transport = Listing(v1__models=models(b'{"data": [{"id": "a"}]}'))
    backend = OpenAIBackend(transport)

    async def main() -> None:
        await backend.check(1.0)
        before = backend.capabilities
        await backend.check(1.0)
        assert backend.capabilities is before

    asyncio.run(main())
