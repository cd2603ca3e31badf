"""`queue`: what people see of a gateway's queue, and what programs get."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from img_serving.cli import main

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]


def reply(**more: Any) -> dict[str, Any]:
    counts = {"depth": 7, "running": 2, "work": 293.6, "oldest_seconds": 75.2}
    endpoint = {
        "url": "http://gpu:7860",
        "usable": True,
        "health": "up",
        "health_detail": "",
        "breaker": "half_open",
        "max_concurrency": 4,
        "in_flight": 2,
        "weight": 1.0,
        "calls": 1234,
        "failures": 5,
        "latency_seconds": 3.0,
        "last_error": "sd: [bold]HTTP 500[/bold]",
        "backend": "sd",
        "overhead_seconds": 0.5,
        "seconds_per_unit": 0.0712,
        "work": 84.0,
        "suspect": True,
        "loaded_model": "sdxl",
        "exclusive_group": "gpu-0",
    }
    tenant = {**counts, "name": "한국팀", "priority": 1, "weight": 2.0, "max_running": 3, "eta_seconds": 3700.0}
    job = {
        "id": "job_1",
        "tenant": "한국팀",
        "status": "queued",
        "n": 4,
        "position": 3,
        "age_seconds": 1.5,
        "wait_seconds": 12.0,
        "eta_seconds": None,
    }
    whole = {
        **counts,
        "object": "queue",
        "draining": False,
        "backends": [{**counts, "name": "sd", "eta_seconds": 12.0}],
        "tenants": [tenant],
        "endpoints": [endpoint],
        "jobs": [job],
        "jobs_total": 5,
    }
    return {**whole, **more}


def test_it_shows_who_waits_for_how_long_and_what_the_endpoints_do(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, reply())
    assert main(["queue"]) == 0
    out = capsys.readouterr().out
    for text in (
        "7 waiting, 2 calls in flight, 5 jobs; oldest 1 min 15 s; 294 megapixel-steps; taking work",
        "12.0 s",
        "한국팀",
        "2/3",
        "1 h 01 min",
        "sd http://gpu:7860",
        "2/4",
        "█████░░░░░",
        "up, breaker half open, suspect (silent), has sdxl, shares gpu-0",
        "0.0712",
        "1,234",
        "sd: [bold]HTTP 500[/bold]",
        "job_1",
        "?",
    ):
        assert text in out
    assert (gateway.asked[0].method, gateway.asked[0].path) == ("GET", "/v1/queue")


def test_an_empty_queue_is_shown_too(gateway: StubGateway, capsys: Out) -> None:
    empty = {"depth": 0, "running": 0, "work": 0, "oldest_seconds": 0}
    gateway.answer(200, reply(**empty, backends=[], tenants=[], endpoints=[], jobs=[], jobs_total=0, draining=True))
    assert main(["queue"]) == 0
    out = capsys.readouterr().out
    assert "0 waiting" in out
    assert "stopping" in out


def test_the_jobs_that_are_next_are_shown_and_the_others_counted(gateway: StubGateway, capsys: Out) -> None:
    one = reply()["jobs"][0]
    jobs = [{**one, "id": f"job_{number}", "position": 100 - number} for number in range(40)]
    running = {**one, "id": "job_running", "status": "running", "position": 0}
    gateway.answer(200, reply(jobs=[*jobs, running], jobs_total=41))
    assert main(["queue"]) == 0
    out = capsys.readouterr().out
    assert out.index("job_running") < out.index("job_39") < out.index("job_30")
    assert "job_0 " not in out
    assert "… and 26 more" in out


def test_watching_goes_on_when_the_gateway_is_started_anew(
    gateway: StubGateway, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    gateway.answer(200, reply())
    gateway.refuse(503, "the gateway is stopping")
    gateway.answer(200, reply())
    assert main(["queue", "--watch"]) == 130
    out = capsys.readouterr().out
    assert "the gateway is stopping" in out
    assert out.count("7 waiting") == 2


def test_json_is_what_the_gateway_answered(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, reply())
    assert main(["queue", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == reply()


def test_watch_looks_again_until_it_is_interrupted(
    gateway: StubGateway, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    gateway.answer(200, reply())
    assert main(["queue", "--watch", "0.5"]) == 130
    assert waits == [0.5] * 3
    assert capsys.readouterr().out.count("7 waiting") == 3


@pytest.mark.parametrize("text", ["0", "-1", "soon"])
def test_watch_takes_seconds_above_zero(text: str, capsys: Out) -> None:
    assert main(["queue", "--watch", text]) == 2
    assert "--watch" in capsys.readouterr().err


def test_json_without_a_bottom_is_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, b"[" * 100_000)
    assert main(["queue", "--json"]) == 1
    assert "not JSON" in capsys.readouterr().err


def test_what_is_no_queue_is_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, {"hello": "world"})
    assert main(["queue"]) == 1
    assert "is there an img-serving gateway?" in capsys.readouterr().err
    gateway.refuse(403, "this route needs an admin key")
    gateway.replies.pop(0)
    assert main(["queue"]) == 1
    assert "admin key" in capsys.readouterr().err
