"""The OpenAI adapter: what is sent, what is understood, and what a reply is worth."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pybase64
import pytest
from msgspec.structs import replace

from img_serving.backends.http import Redactor, busy_seconds, complaint_of, error_of
from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.openai.body import request_fields
from img_serving.backends.openai.presets import GENERIC
from img_serving.backends.openai.reply import SMALL_BYTES
from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, Item, ItemFailure
from img_serving.media.payload import raw_bytes
from img_serving.ports import Transport, UpstreamReply
from img_serving.transport.fetch import FetchFailed, SafeFetcher
from img_serving.transport.http import HttpTransport


class FakeTransport:
    """Answers from a list and remembers what it was asked."""

    def __init__(self, *replies: UpstreamReply | AttemptError) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[str, str, dict[str, str], bytes | None]] = []
        self.closed = 0

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        timeout_seconds: float,
        max_body_bytes: int,
        on_event_bytes: Callable[[bytes], None] | None = None,
    ) -> UpstreamReply:
        self.asked.append((method, path, dict(headers), body))
        reply = self.replies.pop(0)
        if isinstance(reply, AttemptError):
            raise reply
        return reply

    async def close(self) -> None:
        self.closed += 1


def call_of(count: int = 1, model: str | None = "m", **request) -> Call:
    asked = ImageRequest("a fox", seed=5, n=count, **request)
    items = tuple(Item("a fox", asked.negative_prompt, 5 + index) for index in range(count))
    return Call(asked, model, 64, 48, items, 5.0)


def answer(*pictures: dict[str, Any]) -> UpstreamReply:
    return UpstreamReply(200, {}, json.dumps({"created": 1, "data": pictures}).encode())


def b64(seed: int = 5) -> str:
    return pybase64.b64encode(picture("a fox", seed, 64, 48)).decode()


def generic(transport: Transport, **settings: Any) -> OpenAIBackend:
    """Told what it speaks, it asks nothing by itself."""
    return OpenAIBackend(transport, options={"preset": "generic"}, **settings)


def request_body(call: Call) -> dict[str, Any]:
    return request_fields(call, GENERIC.of(call.model))[0]


def draw(backend: OpenAIBackend, call: Call):
    return asyncio.run(backend.generate(call, lambda progress: None))


def test_only_what_the_client_gave_is_sent():
    quality = call_of(quality="high", style="vivid", user="u1", given=frozenset({"quality"}))
    assert request_body(quality) == {
        "prompt": "a fox", "n": 1, "size": "64x48", "model": "m", "response_format": "b64_json", "quality": "high",
        "user": "u1",
    }  # fmt: skip


def test_every_parameter_that_is_honoured_arrives_under_its_canonical_name():
    given: dict[str, Any] = {
        "steps": 12, "guidance_scale": 4.5, "quality": "high", "style": "vivid", "background": "opaque", "moderation": "low",
        "sampler": "euler", "scheduler": "karras", "clip_skip": 2, "output_format": "webp", "output_compression": 80,
        "user": "u1", "negative_prompt": "blur",
    }  # fmt: skip
    names = frozenset({"num_inference_steps", "seed", "size", *given} - {"steps"})
    backend = generic(FakeTransport())
    assert backend.capabilities.honours == names
    body = request_body(call_of(**given, seed_given=True, given=names))
    assert body["num_inference_steps"] == 12
    assert body["seed"] == 5
    assert {name: body[name] for name in given if name != "steps"} == {
        name: value for name, value in given.items() if name != "steps"
    }


@pytest.mark.parametrize("model", ["gpt-image-1", "gpt-image-2.6-flare", "chatgpt-image-latest"])
def test_models_that_refuse_response_format_are_not_asked_for_it(model):
    assert "response_format" not in request_body(call_of(model=model))
    assert request_body(call_of(model=f"my-{model}"))["response_format"] == "b64_json"


def test_no_model_and_no_seed_of_ours_are_sent():
    body = request_body(call_of(model=None))
    assert "model" not in body
    assert "seed" not in body


@pytest.mark.parametrize(("base_has_v1", "root"), [(False, "/v1"), (True, "")])
def test_paths_follow_the_base_url(base_has_v1, root):
    transport = FakeTransport(answer({"b64_json": b64()}), UpstreamReply(404))
    backend = generic(transport, base_has_v1=base_has_v1, api_key="sk-1234567", headers=(("X-A", "b"),))
    draw(backend, replace(call_of(), request_id="r", traceparent="00-ab"))
    asyncio.run(backend.check(1.0))
    (_, drawn, headers, _), (_, asked, _, _) = transport.asked
    assert (drawn, asked) == (f"{root}/images/generations", f"{root}/models")
    assert headers["Authorization"] == "Bearer sk-1234567"
    assert (headers["X-A"], headers["X-Request-Id"], headers["traceparent"]) == ("b", "r", "00-ab")


def test_a_big_reply_is_not_copied():
    padding = "x" * SMALL_BYTES
    reply = answer({"b64_json": b64(), "revised_prompt": "a red fox", "seed": 99, "note": padding})
    (artifact,) = draw(generic(FakeTransport(reply)), call_of())
    assert isinstance(artifact, Artifact)
    assert isinstance(artifact.encoded, memoryview)
    assert artifact.encoded.obj is reply.body
    assert (artifact.revised_prompt, artifact.seed) == ("a red fox", 99)


def test_small_and_big_replies_are_read_alike():
    items: list[dict[str, Any]] = [
        {"b64_json": b64(), "seed": 3},
        {"b64_json": ""},
        {"b64_json": b64(), "revised_prompt": "two"},
    ]
    small = draw(generic(FakeTransport(answer(*items))), call_of(3))
    big = draw(generic(FakeTransport(answer(*items, {"note": "x" * SMALL_BYTES}))), call_of(3))
    assert [type(one) for one in small] == [type(one) for one in big] == [Artifact, ItemFailure, Artifact]
    for one, other in zip(small, big, strict=True):
        if isinstance(one, Artifact) and isinstance(other, Artifact):
            assert bytes(one.encoded or b"") == bytes(other.encoded or b"")
            assert (one.seed, one.revised_prompt) == (other.seed, other.revised_prompt)


@pytest.mark.parametrize(
    "odd", [{"seed": "7"}, {"seed": -1}, {"seed": 2**70}, {"seed": True}, {"revised_prompt": ["x"]}]
)
def test_odd_notes_beside_a_picture_do_not_cost_it(odd):
    (artifact,) = draw(generic(FakeTransport(answer({"b64_json": b64(), **odd}))), call_of())
    assert (artifact.seed, artifact.revised_prompt) == (None, None)


def test_missing_and_broken_pictures_beside_good_ones_fail_alone():
    reply = answer({"b64_json": b64()}, {"b64_json": "AAAA"}, {"url": None})
    results = draw(generic(FakeTransport(reply)), call_of(4))
    assert isinstance(results[0], Artifact)
    assert [type(one) for one in results[1:]] == [ItemFailure] * 3
    assert not any(one.refused for one in results[1:])


def test_pictures_beyond_those_asked_for_are_dropped():
    assert len(draw(generic(FakeTransport(answer(*[{"b64_json": b64()}] * 5))), call_of(2))) == 2


def test_several_seeds_of_the_client_do_not_fit_one_call():
    with pytest.raises(AttemptError) as caught:
        draw(generic(FakeTransport()), call_of(2, seed_given=True))
    assert caught.value.outcome is Outcome.NOT_STARTED


# pictures behind URLs


def test_a_url_on_the_upstream_itself_is_fetched_with_its_key():
    async def main():
        async with ScriptedServer({"sequence": ["url"]}) as server:
            headers = (("Authorization", "Bearer sk-1234567"),)
            fetch = SafeFetcher(trusted_url=server.url, headers=headers)
            backend = generic(HttpTransport(server.url), fetch=fetch)
            results = await backend.generate(call_of(2), lambda progress: None)
            await backend.close()
            return results, [one.headers.get("authorization") for one in server.exchanges if one.method == "GET"]

    results, keys = asyncio.run(main())
    assert [raw_bytes(one) for one in results] == [picture("a fox", 42 + index, 64, 48) for index in range(2)]
    assert keys == ["Bearer sk-1234567"] * 2


def test_a_fetch_that_failed_for_now_is_unknown_and_for_good_is_failed():
    for definite, outcome in ((True, Outcome.FAILED), (False, Outcome.UNKNOWN)):

        async def fetch(url, timeout_seconds, max_bytes, definite=definite):
            raise FetchFailed("gone", is_definite=definite)

        with pytest.raises(AttemptError) as caught:
            draw(generic(FakeTransport(answer({"url": "http://x/y"})), fetch=fetch), call_of())
        assert caught.value.outcome is outcome
    with pytest.raises(AttemptError, match="not fetched"):
        draw(generic(FakeTransport(answer({"url": "http://x/y"}))), call_of())


# health


def check(backend):
    return asyncio.run(backend.check(1.0))


@pytest.mark.parametrize(
    ("reply", "healthy", "models"),
    [
        (UpstreamReply(200, {}, b'{"data": [{"id": "a"}, {"id": "b/c"}, {"id": "a"}]}'), True, ("a", "b/c")),
        (UpstreamReply(200, {}, b'{"data": []}'), True, None),
        (UpstreamReply(200, {}, b"<html>"), True, None),
        (UpstreamReply(404), True, None),
        (UpstreamReply(405), True, None),
        (UpstreamReply(501), True, None),
        (UpstreamReply(429), True, None),
        (UpstreamReply(401), False, None),
        (UpstreamReply(403), False, None),
        (UpstreamReply(301), False, None),
        (UpstreamReply(500), False, None),
        (UpstreamReply(503), False, None),
        (AttemptError(Outcome.NOT_STARTED, "refused"), False, None),
    ],
)
def test_the_model_list_speaks_for_health(reply, healthy, models):
    report = check(generic(FakeTransport(reply), api_key="sk-1234567"))
    assert (report.healthy, report.models) == (healthy, models)
    assert report.detail
    assert "sk-1234567" not in report.detail


@pytest.mark.parametrize(
    ("reply", "preset", "doubted"),
    [
        (UpstreamReply(404), "auto", True),
        (UpstreamReply(200, {}, b"<html>"), "auto", True),
        (UpstreamReply(200, {}, b'{"data": []}'), "auto", False),
        (UpstreamReply(404), "generic", False),
    ],
)
def test_that_nothing_shows_what_speaks_there_is_said(reply, preset, doubted):
    report = check(OpenAIBackend(FakeTransport(reply), options={"preset": preset}))
    assert (report.healthy, bool(report.faults)) == (True, doubted)
    assert "address" in "".join(report.faults) or not doubted


def test_a_configured_health_path_decides_and_models_are_still_discovered():
    models = UpstreamReply(200, {}, b'{"data": [{"id": "a"}]}')
    transport = FakeTransport(UpstreamReply(204), models)
    report = check(generic(transport, health_check_path="/healthz"))
    assert (report.healthy, report.models) == (True, ("a",))
    assert transport.asked[0][1] == "/healthz"
    assert check(generic(FakeTransport(UpstreamReply(200), UpstreamReply(500)), health_check_path="/h")).healthy
    assert not check(generic(FakeTransport(UpstreamReply(503)), health_check_path="/healthz")).healthy
    down = AttemptError(Outcome.NOT_STARTED, "refused")
    assert not check(generic(FakeTransport(down), health_check_path="/healthz")).healthy


def test_a_health_path_that_is_not_there_falls_back_and_says_so():
    models = UpstreamReply(200, {}, b'{"data": [{"id": "a"}]}')
    report = check(generic(FakeTransport(UpstreamReply(404), models), health_check_path="/healthz"))
    assert report.healthy
    assert "/healthz is not there" in report.detail


# what error replies mean

NOBODY = Redactor([])


def reply_of(status: int, body: bytes = b"", **headers: str) -> UpstreamReply:
    return UpstreamReply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "bad size", "code": "x"}}', "bad size"),
        (b'{"error": "prompt required"}', "prompt required"),
        (b'{"detail": "no such sampler"}', "no such sampler"),
        (b'{"detail": [{"loc": ["body", "n"], "msg": "too big"}, {"loc": ["body"], "msg": "odd"}]}', "n: too big; odd"),
        (b'{"detail": {"error": {"message": "inner"}}}', "inner"),
        (b'{"detail": {"message": "direct"}}', "direct"),
        (b'{"message": "plain"}', "plain"),
        (b'{"error": "OutOfMemoryError", "detail": "", "errors": "CUDA is full"}', "OutOfMemoryError: CUDA is full"),
        (b'{"error": "server_error", "message": "type must be number"}', "server_error: type must be number"),
        (b'{"object": "error", "message": "flat", "type": "BadRequestError", "code": 400}', "flat"),
        (b'"just text"', "just text"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"<html><head><title>504 Gateway\n Time-out</title></head><script>x()</script></html>", "504 Gateway Time-out"),
        (b"<p>one <b>two</b> &amp; three</p>", "one  two  & three"),
        (b"\xff\xfe\x00", "\ufffd\ufffd"),
        (b"{}", ""), (b"[]", ""), (b"5", ""), (b"null", ""), (b'{"error": {}}', ""), (b'{"error": {"message": 5}}', ""),
        (b'{"detail": [5, {"msg": null}]}', ""), (b"[" * 5000, "[" * 299 + "…"), (b"", ""),
    ],
)  # fmt: skip
def test_a_complaint_is_read_whatever_its_shape(body, message):
    assert " ".join(complaint_of(reply_of(400, body), NOBODY).message.split()) == " ".join(message.split())


def test_a_complaint_is_one_short_line_without_secrets():
    redactor = Redactor(["sk-1234567", "Bearer sk-1234567", "tiny"])
    body = json.dumps(
        {"error": {"message": "key\n sk-1234567 \x00tiny " + "x" * 500, "code": "a b", "param": "sk-1234567"}}
    )
    complaint = complaint_of(reply_of(400, body.encode()), redactor)
    assert complaint.message.startswith("key *** tiny xxx")
    assert len(complaint.message) == 300
    assert (complaint.code, complaint.param) == (None, "***")
    assert "sk-1234567" not in repr(redactor)


def test_what_litellm_writes_for_nothing_is_nothing():
    body = b'{"error": {"message": "m", "type": "None", "param": "None", "code": "400"}}'
    complaint = complaint_of(reply_of(400, body), NOBODY)
    assert (complaint.code, complaint.param, complaint.kind) == (None, None, None)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, b'{"object": "error", "message": "no model", "type": "NotFoundError", "code": 404}', "model_not_found"),
        (404, b'{"error": {"message": "no model", "type": "NotFoundError", "code": 404}}', "model_not_found"),
        (400, b"{\"detail\": \"Model mismatch: request specifies 'a' but server is running 'b'.\"}", "model_not_found"),
        (400, b'{"detail": "[address=1] Model not found, uid: a"}', "model_not_found"),
        (
            400,
            b'{"error": {"message": "litellm.ContentPolicyViolationError: no", "code": "400"}}',
            "moderation_blocked",
        ),
        (400, b'{"error": "invalid params"}', "invalid_value"),
    ],
)
def test_refusals_that_are_only_in_words_keep_their_meaning(status, body, code):
    refusal = error_of(reply_of(status, body), NOBODY)
    assert isinstance(refusal, BackendRefusal)
    assert refusal.error.code == code


def test_a_budget_that_is_spent_is_no_fault_of_the_client():
    body = (
        b'{"error": {"message": "Budget has been exceeded!", "type": "budget_exceeded", "param": null, "code": "400"}}'
    )
    failed = error_of(reply_of(400, body), NOBODY)
    assert isinstance(failed, AttemptError)
    assert failed.outcome is Outcome.FAILED
    assert "quota" in failed.message


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"code": "content_policy_violation"}, "moderation_blocked"),
        (403, {"code": "moderation_blocked"}, "moderation_blocked"),
        (400, {"code": "contentFilter"}, "moderation_blocked"),
        (400, {"code": "BadRequest", "innererror": {"code": "ResponsibleAIPolicyViolation"}}, "moderation_blocked"),
        (400, {"code": "model_not_found"}, "model_not_found"),
        (422, {"code": None}, "invalid_value"),
    ],
)
def test_refusals(status, error, code):
    refusal = error_of(reply_of(status, json.dumps({"error": error}).encode()), NOBODY)
    assert isinstance(refusal, BackendRefusal)
    assert refusal.error.code == code
    assert refusal.error.message


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "billing_hard_limit_reached"}),
        (429, {"type": "insufficient_quota", "message": "you have none"}),
        (402, {"message": "pay"}),
    ],
)
def test_an_empty_account_is_no_pause_and_no_fault_of_the_client(status, error):
    failed = error_of(reply_of(status, json.dumps({"error": error}).encode()), NOBODY)
    assert isinstance(failed, AttemptError)
    assert (failed.outcome, failed.busy_seconds) == (Outcome.FAILED, None)


def test_a_redirect_says_where_to_without_what_may_be_secret():
    failed = error_of(reply_of(308, location="https://x.example/v1?sig=secret"), NOBODY)
    assert "https://x.example/v1" in str(failed)
    assert "secret" not in str(failed)
    assert "user:pw" not in str(error_of(reply_of(302, location="https://user:pw@x.example/"), NOBODY))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 1.0),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "3600"}, 60.0),
        ({"retry-after": "-5"}, 1.0),
        ({"retry-after": "nan"}, 1.0),
        ({"retry-after": "inf"}, 1.0),
        ({"retry-after": "soon"}, 1.0),
        ({"retry-after": "Mon, 02 Mar 2026 10:00:30 GMT"}, 30.0),
        ({"retry-after": "Mon, 02 Mar 2026 09:00:00 GMT"}, 1.0),
        ({"retry-after": "Mon, 02 Mar 2026 10:00:30 GMT", "date": "Mon, 02 Mar 2026 10:00:25 GMT"}, 5.0),
        ({"retry-after": "30", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "4", "retry-after-ms": "x"}, 4.0),
    ],
)
def test_how_long_a_busy_endpoint_is_left_alone(headers, seconds):
    now = datetime(2026, 3, 2, 10, 0, 0, tzinfo=UTC)
    assert busy_seconds(UpstreamReply(503, headers), now) == seconds


def test_a_reply_of_millions_of_small_values_is_refused_unread():
    hostile = UpstreamReply(200, {}, b'{"data":[' + b"{}," * 2_000_000 + b"{}]}")
    with pytest.raises(AttemptError) as caught:
        draw(generic(FakeTransport(hostile)), call_of())
    assert caught.value.outcome is Outcome.FAILED
