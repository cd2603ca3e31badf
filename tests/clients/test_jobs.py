"""Jobs through the official libraries: by `Prefer: respond-async` on the plain methods, and by their plain requests."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.clients.rehearsal import KEY
from tests.support.official_clients import OfficialClient, Told, need_clients, picture_file
from tests.support.programs import Program

from img_serving.backends.scripted import picture

need_clients()
pytestmark = pytest.mark.smoke

BODY: dict[str, Any] = {"prompt": "x", "model": "procedural", "size": "64x64"}


def finished(client: OfficialClient, program: Program, job: dict[str, Any]) -> dict[str, Any]:
    """The job's record when it is over."""
    until = time.monotonic() + 30
    while job["status"] in {"queued", "running"}:
        assert time.monotonic() < until, job
        job = client.call("get", f"{program.url}/v1", KEY, path=f"/jobs/{job['id']}").result
    return job


def job_of(told: Told) -> dict[str, Any]:
    assert told.raised is None, told.raised
    assert told.statuses == [202]
    job: dict[str, Any] = told.result
    assert told.attempts[0].headers["location"] == f"/v1/jobs/{job['id']}"
    return job


@pytest.mark.parametrize("more", [{}, {"image": picture_file(picture("a boat", 1, 64, 64))}])
def test_the_plain_methods_make_jobs_where_they_are_asked_to(
    client: OfficialClient, gateway: Program, more: dict[str, Any]
) -> None:
    told = client.call(
        "edit" if more else "generate", f"{gateway.url}/v1", KEY,
        headers={"Prefer": "respond-async"}, response_format="url", **BODY, **more,
    )  # fmt: skip
    job = finished(client, gateway, job_of(told))
    assert (job["status"], job["operation"]) == ("succeeded", "edit" if more else "generation")
    assert [one["url"].startswith(gateway.url) for one in job["result"]["data"]] == [True]


def test_a_job_is_made_and_found(client: OfficialClient, gateway: Program) -> None:
    body = {"operation": "generation", "body": {**BODY, "response_format": "b64_json", "n": 2}}
    job = finished(client, gateway, job_of(client.call("post", f"{gateway.url}/v1", KEY, path="/jobs", body=body)))
    assert len(job["result"]["data"]) == 2
    listed = client.call("get", f"{gateway.url}/v1", KEY, path="/jobs").result["data"]
    assert job["id"] in [one["id"] for one in listed]


def test_a_job_that_nobody_has_is_not_found(client: OfficialClient, gateway: Program) -> None:
    told = client.call("get", f"{gateway.url}/v1", KEY, path="/jobs/job_none", options={"max_retries": 0})
    assert "NotFoundError" in told.error.classes
