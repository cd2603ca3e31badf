"""Errors reach the user as the library's own classes, with all that the server said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from tests.clients.rehearsal import KEY, PICTURE, USER_KEY, backend, environment, limited_key
from tests.support.official_clients import OfficialClient, Raised, need_clients, picture_file
from tests.support.programs import Program, serving

need_clients()
pytestmark = pytest.mark.smoke

ONCE = {"max_retries": 0}


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Its deadline passes before its only backend answers."""
    config = "[queue]\nrequest_timeout_seconds = 0.5\n" + backend("hangs", sequence=["hang"])
    with serving(tmp_path_factory.mktemp("hurried"), config, environment=environment()) as program:
        yield program


def error_of(client: OfficialClient, program: Program, key: str = KEY, **arguments: Any) -> Raised:
    """What a generation raises, which is known by its request id."""
    given = {"prompt": "x", "model": "org/steady", **PICTURE, **arguments}
    told = client.call("generate", f"{program.url}/v1", key, options=ONCE, **given)
    assert len(told.attempts) == 1
    assert told.error.request_id == told.attempts[0].headers["x-request-id"]
    return told.error


class Fault(NamedTuple):
    """The library's class, and what the server said."""

    name: str
    status: int
    code: str
    param: str | None = None
    kind: str = "invalid_request_error"

    def check(self, error: Raised) -> None:
        """That is what was raised."""
        assert {self.name, "APIError"} <= set(error.classes)
        told = (error.status, error.type, error.code, error.param)
        assert told == (self.status, self.kind, self.code, self.param)
        assert str(self.status) in error.message


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"size": "9x"}, Fault("BadRequestError", 400, "invalid_value", "size")),
        ({"n": 0}, Fault("BadRequestError", 400, "invalid_value", "n")),
        ({"model": "refuses"}, Fault("BadRequestError", 400, "invalid_value", "prompt")),
        (
            {"model": "moderates"},
            Fault("BadRequestError", 400, "moderation_blocked", kind="image_generation_user_error"),
        ),
        ({"key": "sk-wrong"}, Fault("AuthenticationError", 401, "invalid_api_key")),
        ({"key": USER_KEY, "model": "fails"}, Fault("PermissionDeniedError", 403, "model_not_allowed", "model")),
        ({"model": "none"}, Fault("NotFoundError", 404, "model_not_found", "model")),
        ({"prompt": "x" * 20_000}, Fault("APIError", 413, "payload_too_large")),
        ({"model": "fails"}, Fault("InternalServerError", 502, "backend_failed", kind="server_error")),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Fault) else next(iter(value)),
)
def test_a_status_is_a_class(
    client: OfficialClient, rehearsal: Program, arguments: dict[str, Any], fault: Fault
) -> None:
    fault.check(error_of(client, rehearsal, **arguments))


def test_over_a_limit_is_a_rate_limit_error(client: OfficialClient, rehearsal: Program) -> None:
    key = limited_key(client.name)
    told = [
        client.call("generate", f"{rehearsal.url}/v1", key, options=ONCE, model="blind", prompt="x", **PICTURE)
        for _ in range(8)
    ]
    refused = [one for one in told if one.raised is not None]
    assert refused
    for one in refused:
        Fault("RateLimitError", 429, "rate_limit_exceeded", kind="requests").check(one.error)
        assert one.error.request_id
        assert 1 <= int(one.attempts[0].headers["retry-after"]) <= 59


def test_a_deadline_that_passes_is_a_server_error(client: OfficialClient, hurried: Program) -> None:
    error = error_of(client, hurried, model="hangs")
    Fault("InternalServerError", 504, "deadline_exceeded", kind="server_error").check(error)


def test_an_upload_that_is_too_large_is_said_so(client: OfficialClient, rehearsal: Program) -> None:
    told = client.call(
        "edit", f"{rehearsal.url}/v1", KEY, options=ONCE,
        model="org/steady", prompt="x", image=picture_file(bytes(300_000)),
    )  # fmt: skip
    Fault("APIError", 413, "payload_too_large").check(told.error)


@pytest.mark.parametrize(
    ("path", "key", "fault"),
    [
        ("/images/generations", KEY, Fault("APIError", 405, "method_not_allowed")),
        ("/nowhere", KEY, Fault("NotFoundError", 404, "unknown_path")),
        ("/backends", USER_KEY, Fault("PermissionDeniedError", 403, "permission_denied")),
    ],
    ids=["405", "404", "403"],
)
def test_the_frameworks_own_errors_are_of_the_same_shape(
    client: OfficialClient, rehearsal: Program, path: str, key: str, fault: Fault
) -> None:
    fault.check(client.call("get", f"{rehearsal.url}/v1", key, options=ONCE, path=path).error)


def test_a_server_that_is_not_there_is_a_connection_error(client: OfficialClient) -> None:
    told = client.call("generate", "http://127.0.0.1:1/v1", KEY, options=ONCE, model="x", prompt="x")
    assert "APIConnectionError" in told.error.classes
