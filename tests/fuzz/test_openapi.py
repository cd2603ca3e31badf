"""Everything that our own OpenAPI description allows, and what it does not, is asked of the real program.

schemathesis makes the requests from the description, good and bad ones of every operation and media type, and holds the answers
against it: statuses, media types, bodies, headers, methods that are not there, keys that are missing, bad values that pass.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
)
from tests.support.edge import ADMIN, Edge, EdgeReply, fuzzing

from img_serving import __version__
from img_serving.api.openapi import document

pytestmark = pytest.mark.smoke

MEMORY = 128 << 20
"""Bytes that hundreds of small requests may add, with the backends that they add and the jobs that are remembered."""

schema = schemathesis.openapi.from_dict(document(__version__))


@schema.hook
def map_body(context: Any, body: Any) -> Any:
    """Backends that a test adds are on this machine, at a port where nobody listens."""
    if context.operation.path == "/v1/backends" and isinstance(body, dict) and isinstance(body.get("endpoints"), list):
        body = {**body, "endpoints": [_nowhere(one) for one in body["endpoints"]]}
    return body


def _nowhere(endpoint: Any) -> Any:
    if isinstance(endpoint, dict) and isinstance(endpoint.get("url"), str):
        return {**endpoint, "url": "http://127.0.0.1:9"}
    return "http://127.0.0.1:9" if isinstance(endpoint, str) else endpoint


@pytest.fixture(scope="module")
def known(target: Edge) -> dict[str, str]:
    """What there is, by the path and the name that stands in it; a job is over, and its event cannot be delivered."""
    body = {"prompt": "x", "model": "script"}
    made = target.json(
        "/v1/jobs", {"operation": "generation", "body": body, "webhook_url": "https://receiver.invalid/hook"}
    )
    job = json.loads(made.body)["id"]
    target.ask("GET", f"/v1/jobs/{job}/events")
    (event,) = json.loads(target.ask("GET", f"/v1/webhooks?job_id={job}").body)["data"]
    drawn = json.loads(target.json("/v1/images/generations", {**body, "response_format": "url"}).body)
    return {
        "/v1/jobs/{id}": job,
        "/v1/jobs/{id}/events": job,
        "/v1/webhooks/{event_id}": event["id"],
        "/v1/webhooks/{event_id}/redeliver": event["id"],
        "/v1/models/{id}": "script",
        "/v1/backends/{name}": "spare",
        "/images/{name}": drawn["data"][0]["url"].rpartition("/")[2],
    }


def test_what_is_served_is_what_is_tested(target: Edge) -> None:
    served = target.ask("GET", "/openapi.json", key=None)
    assert json.loads(served.body) == json.loads(json.dumps(document(__version__)))


def _call(target: Edge, case: Any) -> tuple[Any, EdgeReply]:
    response = case.call(base_url=target.program.url, headers={"Authorization": f"Bearer {ADMIN}"})
    headers = {name.lower(): ", ".join(values) for name, values in response.headers.items()}
    reply = EdgeReply(response.status_code, headers, response.content, response.elapsed)
    target.check(reply)
    _explains(reply)
    target.check_memory(MEMORY, f"{case.method} {case.path}")
    if (case.method, case.path, reply.status) == ("POST", "/v1/backends", 201):
        # the next example begins with what there was
        assert target.ask("DELETE", f"/v1/backends/{json.loads(reply.body)['name']}").status == 200
    return response, reply


def _explains(reply: EdgeReply) -> None:
    """Whoever is refused is told which field it was, unless the body as a whole is none."""
    if reply.status == 400 and reply.body:
        error = reply.error
        whole = ("invalid_json", "invalid_multipart")
        is_told = error["param"] is not None or error["code"] in whole
        assert is_told or error["message"].startswith(("the body ", "the query ")), error


def _not_asked(case: Any, reply: EdgeReply, *, is_replaced: bool = False) -> list[Any]:
    """The checks of schemathesis that do not hold here, and why."""
    # what an operator allows (steps, pixels, pictures), what fits together (a mask and its picture, a protocol and its options)
    # and what a size or a URL is, no schema says: a good request may be refused. `_explains` asks that it is told why
    found: list[Any] = [positive_data_acceptance]
    if is_replaced or "" in (case.query or {}).values():
        # a bad value was replaced by a good one; or it is `?status=`, which forms send of a field that nobody filled in
        found.append(negative_data_rejection)
    if reply.headers.get("content-type") == "text/event-stream":
        # OpenAPI 3.1 can only call a stream a string, and schemathesis holds that against each event: `_is_stream` looks
        found.append(response_schema_conformance)
        _is_stream(reply)
    return found


def _is_stream(reply: EdgeReply) -> None:
    """Frames of named events with JSON, the last one ended too."""
    *frames, rest = reply.body.decode().split("\n\n")
    assert rest == ""
    assert frames
    for one in frames:
        lines = dict(line.partition(": ")[::2] for line in one.split("\n") if not line.startswith(":"))
        assert not lines or (lines["event"] and isinstance(json.loads(lines["data"]), dict)), one


@schema.parametrize()
@fuzzing(6)
def test_any_request(target: Edge, known: dict[str, str], case: Any) -> None:
    response, reply = _call(target, case)
    case.validate_response(response, excluded_checks=_not_asked(case, reply))
    if case.path in known:
        if case.path == "/v1/backends/{name}":
            target.json("/v1/backends", {"name": "spare", "protocol": "scripted"})
        (variable,) = case.path_parameters
        case.path_parameters[variable] = known[case.path]
        response, reply = _call(target, case)
        case.validate_response(response, excluded_checks=_not_asked(case, reply, is_replaced=True))
