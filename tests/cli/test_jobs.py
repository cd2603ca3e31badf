"""`jobs`: listed, looked at, followed to the end through cut connections, and cancelled."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from tests.support.programs import Program, free_port, serving

from img_serving.api import jobs as api
from img_serving.cli import following, jobs, main
from img_serving.cli.client import Client
from img_serving.cli.following import left
from img_serving.cli.job_words import SeenJob, brief, place, read_record, state
from img_serving.domain.jobs import JobStatus
from img_serving.gateway.job_records import JobRecord

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]
URLS = ["http://g/images/1.png", "http://g/images/2.png"]
CREATED = 1674087231.5


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def record(**more: Any) -> dict[str, Any]:
    whole = {
        "object": "job",
        "id": "job_0123456789abcdef01234567",
        "operation": "generation",
        "status": "running",
        "model": "[bold]sdxl",
        "n": 2,
        "position": 0,
        "eta_seconds": 12.4,
        "progress": 0.45,
        "attempts": 1,
        "backend": "sd",
        "created_at": CREATED,
        "started_at": CREATED + 1,
        "finished_at": None,
        "expires_at": None,
        "request_id": "req_1",
        "idempotency_key": None,
        "webhook_url": None,
        "waiting_for": None,
        "result": None,
        "error": None,
    }
    return {**whole, **more}


def succeeded(**more: Any) -> dict[str, Any]:
    result = {"created": 1, "data": [{"url": url, "seed": 1} for url in URLS]}
    over = {"status": "succeeded", "progress": 1.0, "position": None, "eta_seconds": None, "result": result}
    return record(**{**over, "finished_at": CREATED + 9, "expires_at": CREATED + 86400, **more})


def failed(**more: Any) -> dict[str, Any]:
    error = {"message": "every attempt failed", "type": "server_error", "param": None, "code": "all_attempts_failed"}
    return succeeded(**{"status": "failed", "progress": 0.0, "result": None, "error": error, **more})


def read(fields: dict[str, Any]) -> SeenJob:
    return read_record(json.dumps(fields).encode())


def listed(*records: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    ids = [one["id"] for one in records] or [None]
    return {"object": "list", "data": list(records), "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}


def event(event_id: int, fields: dict[str, Any], name: str | None = None) -> bytes:
    name = name or f"job.{fields['status']}"
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), event_id, json.dumps(fields).encode())


def stream(gateway: StubGateway, *events: bytes, cut: bool = False) -> None:
    """The next answer; `cut`: its connection ends before its body does."""
    gateway.answer(200, b"".join(events), content_type="text/event-stream; charset=utf-8")
    if cut:
        gateway.replies[-1][2]["Content-Length"] = "1000000"


def no_such_job(gateway: StubGateway) -> None:
    error = {"message": "there is no such job", "type": "invalid_request_error", "param": None, "code": "job_not_found"}
    gateway.answer(404, {"error": error})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between two connections, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


# words


def test_what_can_be_asked_for_is_what_the_gateway_knows() -> None:
    assert tuple(JobStatus) == jobs.STATUSES
    assert api.OPERATIONS == jobs.OPERATIONS
    assert {*SeenJob.__struct_fields__, "object"} == set(JobRecord.__struct_fields__)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.4, "0s"), (59.4, "59s"), (60, "1m"), (3599, "60m"), (3600, "1h"), (86400, "24h"), (259200, "3d")],
)
def test_a_duration_is_told_in_its_greatest_unit(seconds: float, text: str) -> None:
    assert brief(seconds) == text


@pytest.mark.parametrize(
    ("fields", "short", "long"),
    [
        (record(), "45% ~12s", "running, on sd"),
        (record(eta_seconds=None, backend=None, attempts=3), "45%", "running, attempt 3"),
        (record(status="queued", position=2, eta_seconds=125.0), "#3 ~2m", "queued, #3 in line"),
        (record(status="queued", position=None, eta_seconds=None), "waits", "queued, for a backend"),
        (succeeded(attempts=2), "100%", "succeeded"),
        (failed(), "-", "failed"),
    ],
)
def test_where_a_job_stands_is_told_shortly_and_at_length(fields: dict[str, Any], short: str, long: str) -> None:
    assert place(read(fields)) == short
    assert state(read(fields)) == long


def test_an_estimate_that_has_passed_is_no_promise() -> None:
    assert left(12.4) == "~12s left"
    assert left(-3.0) == "any moment"


# list


def test_jobs_are_listed(gateway: StubGateway, capsys: Out) -> None:
    waiting = record(id="job_2", status="queued", position=2, eta_seconds=125.0, model=None, created_at=time.time() - 5)
    gateway.answer(200, listed(waiting, record(), has_more=True))
    assert main(["jobs", "list", "--api-key", "sk-mine"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["JOB", "STATUS", "OPERATION", "MODEL", "N", "PROGRESS", "AGE"]
    assert lines[2][:-1] == ["job_2", "queued", "generation", "-", "2", "#3", "~2m"]
    assert lines[2][-1] in {"5s", "6s", "7s"}
    assert lines[3][:-1] == [record()["id"], "running", "generation", "[bold]sdxl", "2", "45%", "~12s"]
    assert "--after job_0123456789abcdef01234567" in out
    assert (gateway.asked[0].method, gateway.asked[0].path) == ("GET", "/v1/jobs?limit=20")
    assert gateway.asked[0].headers["authorization"] == "Bearer sk-mine"


def test_the_table_fits_into_80_columns_with_whole_ids() -> None:
    longest = {"model": "an-organisation/a-model-with-a-long-name", "created_at": CREATED - 86400 * 40, "n": 10}
    rows = [read(succeeded(**longest)), read(record(**longest, status="queued", position=122, eta_seconds=3599.0))]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(jobs.table_of(rows, CREATED, wide=False))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(record()["id"] in line for line in lines) == 2
    for text in ("succeeded", "generation", "#123 ~60m", "40d"):
        assert text in capture.get()


@pytest.mark.parametrize(
    ("options", "query", "said"),
    [
        ([], "limit=20", "no jobs\n"),
        (["--status", "failed"], "status=failed&limit=20", "no such jobs\n"),
        (["--operation", "edit", "--limit", "5"], "operation=edit&limit=5", "no such jobs\n"),
        (["--after", "job 1"], "limit=20&after=job+1", "no such jobs\n"),
    ],
)
def test_what_is_listed_can_be_chosen(
    gateway: StubGateway, capsys: Out, options: list[str], query: str, said: str
) -> None:
    gateway.answer(200, listed())
    assert main(["jobs", "list", *options]) == 0
    assert capsys.readouterr().out == said
    assert gateway.asked[0].path == f"/v1/jobs?{query}"


@pytest.mark.parametrize("options", [["--status", "done"], ["--operation", "paint"], ["--limit", "0"]])
def test_what_no_gateway_knows_is_wrong_usage(options: list[str], capsys: Out) -> None:
    assert main(["jobs", "list", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_json_is_what_the_gateway_answered(gateway: StubGateway, capsys: Out) -> None:
    for words, answer in ((["list"], listed(record())), (["show", "job_1"], succeeded())):
        gateway.replies.clear()
        gateway.answer(200, answer)
        assert main(["jobs", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize("words", [["list"], ["show", "job_1"], ["cancel", "job_1"], ["follow", "job_1"]])
def test_what_is_no_job_is_told(gateway: StubGateway, capsys: Out, words: list[str]) -> None:
    gateway.answer(200, {"hello": "world"})
    assert main(["jobs", *words]) == 1
    assert "is there an img-serving gateway?" in capsys.readouterr().err


# show


def test_a_job_is_shown_with_everything_and_its_urls_one_a_line(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, succeeded(idempotency_key="order-1042", webhook_url="https://hooks.test/done"))
    assert main(["jobs", "show", "job 1/2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["pictures", *URLS]
    told = {line[:16].strip(): line[16:] for line in lines[:-3]}
    assert told.pop("created").startswith("2023-01-19 00:13:51Z (")
    assert told == {
        "job": "job_0123456789abcdef01234567",
        "status": "succeeded",
        "operation": "generation",
        "model": "[bold]sdxl",
        "pictures asked": "2",
        "progress": "100%",
        "backend": "sd",
        "attempts": "1",
        "started": "2023-01-19 00:13:52Z",
        "finished": "2023-01-19 00:14:00Z",
        "kept until": "2023-01-20 00:13:51Z",
        "request": "req_1",
        "idempotency key": "order-1042",
        "webhook": "https://hooks.test/done",
    }
    assert gateway.asked[0].path == "/v1/jobs/job%201%2F2"


def test_what_went_wrong_and_what_is_left_to_do_are_shown(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, failed())
    gateway.answer(200, record(status="queued", position=4))
    gateway.answer(200, succeeded(result={"data": [{"b64_json": "AAAA"}]}))
    gateway.answer(200, succeeded(result={"data": 3}))
    assert main(["jobs", "show", "job_1"]) == 0
    assert "every attempt failed (all_attempts_failed)" in capsys.readouterr().out
    assert main(["jobs", "show", "job_1"]) == 0
    out = capsys.readouterr().out
    assert "queued, #5 in line" in out
    assert "in about 12s" in out
    assert main(["jobs", "show", "job_1"]) == 0
    assert capsys.readouterr().out.endswith("pictures\n(base64: --json shows it)\n")
    assert main(["jobs", "show", "job_1"]) == 1
    assert "not a job" in capsys.readouterr().err


# cancel


def test_cancelling_tells_what_became_of_it(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, record(status="cancelled", position=None))
    gateway.answer(200, succeeded())
    gateway.answer(200, record(status="queued"))
    assert main(["jobs", "cancel", "job_1"]) == 0
    assert capsys.readouterr().out == "job_1 is cancelled\n"
    assert main(["jobs", "cancel", "job_1"]) == 0
    assert "job_1 was over before: it is succeeded" in capsys.readouterr().out
    assert main(["jobs", "cancel", "job_1"]) == 1
    assert "job_1 is still queued" in capsys.readouterr().err
    assert {(one.method, one.path) for one in gateway.asked} == {("DELETE", "/v1/jobs/job_1")}


@pytest.mark.parametrize("action", ["show", "cancel", "follow"])
def test_a_job_that_is_not_there_is_explained(gateway: StubGateway, capsys: Out, action: str) -> None:
    no_such_job(gateway)
    assert main(["jobs", action, "job_1"]) == 1
    err = capsys.readouterr().err
    assert "there is no job job_1 for this key: it is another key's, or its time is over" in err
    assert "jobs list" in err


def test_a_page_that_is_not_there_is_no_missing_job(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(404, b"<html>not here</html>")
    assert main(["jobs", "show", "job_1"]) == 1
    err = capsys.readouterr().err
    assert "is there an img-serving gateway" in err
    assert "another key's" not in err


# follow


def test_a_job_is_followed_to_its_end(gateway: StubGateway, capsys: Out) -> None:
    picture = b'event: image_generation.completed\nid: 4\ndata: {"b64_json":"AAAA"}\n\n'
    events = [
        event(1, record(status="queued", position=2)),
        b": keep-alive\n\n",
        event(2, record(progress=0.0)),
        event(3, record(), "job.progress"),
        picture,
        event(5, succeeded()),
    ]
    stream(gateway, *events)
    assert main(["jobs", "follow", "job_1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == URLS
    assert captured.err.splitlines() == ["job_1: queued, #3 in line", "job_1: running, on sd"]
    assert gateway.asked[0].path == "/v1/jobs/job_1/events"
    assert gateway.asked[0].headers["accept"] == "text/event-stream"
    assert "last-event-id" not in gateway.asked[0].headers


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (failed(), "job_1 is failed: every attempt failed (all_attempts_failed)"),
        (failed(status="expired"), "job_1 is expired: every attempt failed"),
        (failed(status="cancelled", error=None), "job_1 is cancelled\n"),
        (failed(status="succeeded"), "job_1 succeeded, but its pictures cannot be had: every attempt failed"),
    ],
)
def test_an_end_without_pictures_is_a_failure(
    gateway: StubGateway, capsys: Out, end: dict[str, Any], message: str
) -> None:
    stream(gateway, event(1, end))
    assert main(["jobs", "follow", "job_1"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("result", "message"),
    [({"data": [{"b64_json": "AAAA"}]}, "came as base64"), (None, "are not kept")],
)
def test_pictures_that_have_no_address_are_told(
    gateway: StubGateway, capsys: Out, result: dict[str, Any] | None, message: str
) -> None:
    stream(gateway, event(1, succeeded(result=result)))
    assert main(["jobs", "follow", "job_1"]) == 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("cut", [True, False])
def test_after_a_cut_it_goes_on_behind_what_came_whole(
    gateway: StubGateway, capsys: Out, pauses: list[float], cut: bool
) -> None:
    half = event(9, record(progress=0.9), "job.progress")[:-2]
    stream(gateway, event(7, record()), half, cut=cut)
    stream(gateway, b": keep-alive\n\n", cut=cut)
    gateway.refuse(503, "the gateway starts")
    stream(gateway, event(10, succeeded()))
    assert main(["jobs", "follow", "job_1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == URLS
    assert "connection lost, trying again" in captured.err
    assert [one.headers.get("last-event-id") for one in gateway.asked] == [None, "7", "7", "7"]
    assert pauses == list(following.PAUSES[:3])


def test_it_comes_back_a_bounded_number_of_times(gateway: StubGateway, capsys: Out, pauses: list[float]) -> None:
    stream(gateway, event(7, record()), cut=True)
    assert main(["jobs", "follow", "job_1"]) == 1
    err = capsys.readouterr().err
    assert "job_1 cannot be followed" in err
    assert "closed the connection" in err
    assert "tries again" in err
    assert pauses == list(following.PAUSES)
    assert len(gateway.asked) == len(following.PAUSES) + 1


def test_a_connection_that_lasted_begins_the_row_anew(
    gateway: StubGateway, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LASTING_SECONDS", 0.0)
    for number in range(20):
        stream(gateway, event(number, record()), cut=True)
    stream(gateway, event(20, succeeded()))
    assert main(["jobs", "follow", "job_1"]) == 0
    assert pauses == [following.PAUSES[0]] * 20


def test_what_is_wrong_at_the_first_connection_is_told_at_once(
    gateway: StubGateway, capsys: Out, pauses: list[float]
) -> None:
    gateway.refuse(503, "the gateway is stopping")
    assert main(["jobs", "follow", "job_1"]) == 1
    assert "the gateway is stopping" in capsys.readouterr().err
    assert main(["jobs", "follow", "job_1", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "is the gateway running?" in capsys.readouterr().err
    assert pauses == []


def test_a_refusal_that_stays_ends_it(gateway: StubGateway, capsys: Out, pauses: list[float]) -> None:
    stream(gateway, event(7, record()))
    gateway.refuse(401, "that API key is not known here")
    assert main(["jobs", "follow", "job_1"]) == 1
    assert "not known here" in capsys.readouterr().err
    assert len(pauses) == 1


def test_a_plain_request_is_said_to_have_no_events(gateway: StubGateway, capsys: Out) -> None:
    no_such_job(gateway)
    gateway.answer(200, record())
    assert main(["jobs", "follow", "job_1"]) == 1
    assert "job_1 is a plain request, which has no events" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_running_and_says_so(
    gateway: StubGateway, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    stream(gateway, event(7, record()))
    assert main(["jobs", "follow", "job_1"]) == 130
    assert "job_1 goes on: `img-serving jobs follow job_1` watches it again" in capsys.readouterr().err
    assert [one.method for one in gateway.asked] == ["GET"]


def test_a_sign_of_life_is_when_the_place_in_line_is_asked_for(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [event(1, record(status="queued", position=4)), b": keep-alive\n\n", event(2, succeeded())]

    def listen(client: Client, path: str, last_event_id: str) -> Iterator[bytes]:
        yield from pieces

    class Answered:
        body = json.dumps(record(status="queued", position=1)).encode()

    asked: list[str] = []

    def call(client: Client, method: str, path: str) -> Answered:
        asked.append(f"{method} {path}")
        return Answered()

    monkeypatch.setattr(Client, "listen", listen)
    monkeypatch.setattr(Client, "call", call)
    assert main(["jobs", "follow", "job_1"]) == 0
    assert asked == ["GET /v1/jobs/job_1"]
    assert capsys.readouterr().err.splitlines() == ["job_1: queued, #5 in line", "job_1: queued, #2 in line"]


def test_a_terminal_sees_a_bar_that_never_runs_back(
    gateway: StubGateway, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    first = record(backend="[red]sd\x1b]0;title\x07")
    again = record(progress=0.1, attempts=2, eta_seconds=None)
    for told in ([first], [first, again], [first, None]):  # the last of each is what stays on the screen for a moment
        with following.shown("job_1") as tell:
            for one in told:
                tell(None if one is None else read(one))
    shown = terminal.getvalue()
    assert "running, on [red]sd\\x1b]0;title\\x07" in shown
    assert "~12s left" in shown
    assert "attempt 2" in shown
    assert "connection lost, trying again" in shown
    assert "45%" in shown
    assert "10%" not in shown
    assert "\x1b]0;" not in shown
    stream(gateway, event(1, succeeded()))
    assert main(["jobs", "follow", "job_1"]) == 0
    assert capsys.readouterr().out.splitlines() == URLS


@pytest.mark.parametrize("words", [["list"], ["show", "job_1"], ["cancel", "job_1"], ["follow", "job_1"]])
def test_what_a_server_says_cannot_command_the_terminal(gateway: StubGateway, capsys: Out, words: list[str]) -> None:
    evil = "\x1b]0;title\x07\nok"
    result = {"data": [{"url": f"http://g/{evil}"}]}
    named = {"id": evil, "model": evil, "backend": evil, "request_id": evil, "idempotency_key": evil}
    whole = succeeded(**named, webhook_url=evil, result=result)
    running = record(**named)
    wrong = failed(error={"message": evil, "type": evil, "param": None, "code": evil})
    if words[0] == "follow":
        stream(gateway, event(1, running), event(2, whole))
        stream(gateway, event(1, wrong))
    else:
        for one in (whole, wrong):
            gateway.answer(200, listed(one, has_more=True) if words[0] == "list" else one)
    main(["jobs", *words])
    main(["jobs", *words])
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err
    assert "\x07" not in captured.out + captured.err
    if words[0] != "list":
        assert not any(line == "ok" for line in (captured.out + captured.err).splitlines())


# against the real program

CONFIG = """
[auth]
api_keys = ["sk-test", "sk-other"]
[[backends]]
name = "slow"
protocol = "scripted"
max_concurrency = 1
[backends.scripted]
latency_seconds = 1.5
max_batch_size = 1
steps = 10
models = ["slow"]
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with serving(tmp_path_factory.mktemp("gateway"), CONFIG) as running:
        yield running


def made(url: str, **fields: Any) -> str:
    body = {"operation": "generation", "body": {"prompt": "a fox", "size": "64x64", "model": "slow", **fields}}
    return str(Client(url, "sk-test").call("POST", "/v1/jobs", body).json()["id"])


def command(url: str, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "IMG_SERVING_URL": url, "IMG_SERVING_API_KEY": "sk-test"}
    return subprocess.Popen(
        [sys.executable, "-m", "img_serving", "jobs", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.smoke
def test_the_real_gateway_s_jobs_are_listed_followed_shown_and_cancelled(
    program: Program, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMG_SERVING_URL", program.url)
    monkeypatch.setenv("IMG_SERVING_API_KEY", "sk-test")
    first, second = made(program.url, n=2), made(program.url)
    assert main(["jobs", "list", "--status", "queued"]) == 0
    out = capsys.readouterr().out
    assert second in out
    assert first not in out
    assert main(["jobs", "cancel", second]) == 0
    assert main(["jobs", "follow", second]) == 1
    assert capsys.readouterr().out == f"{second} is cancelled\n"
    assert main(["jobs", "follow", first]) == 0
    captured = capsys.readouterr()
    urls = captured.out.splitlines()
    assert len(urls) == 2
    assert all(url.startswith(f"{program.url}/images/") for url in urls)
    assert f"{first}: running, on slow" in captured.err
    assert main(["jobs", "show", first]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == ["pictures", *urls]
    assert main(["jobs", "follow", first]) == 0
    assert capsys.readouterr().out.splitlines() == urls
    assert main(["jobs", "show", first, "--api-key", "sk-other"]) == 1
    assert "another key's" in capsys.readouterr().err


@pytest.mark.smoke
def test_ctrl_c_at_the_real_gateway_leaves_the_job_running(program: Program, capsys: Out) -> None:
    job = made(program.url, n=8)
    with command(program.url, "follow", job) as follower:
        assert follower.stderr is not None
        assert "running" in follower.stderr.readline()
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=20)
        assert follower.returncode == 130
    assert f"{job} goes on" in err
    given = ["--url", program.url, "--api-key", "sk-test"]
    assert main(["jobs", "show", job, *given]) == 0
    assert "running, on slow" in capsys.readouterr().out
    assert main(["jobs", "cancel", job, *given]) == 0


@pytest.mark.smoke
def test_a_gateway_that_dies_and_comes_back_is_followed_on(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, CONFIG, port=port) as first:
        job = made(first.url, n=2)
        with command(first.url, "follow", job) as follower:
            assert follower.stderr is not None
            assert "running" in follower.stderr.readline()
            first.stop(signal.SIGKILL)
            assert "connection lost" in follower.stderr.readline()
            with serving(tmp_path, CONFIG, port=port):
                out, err = follower.communicate(timeout=40)
    assert follower.returncode == 0, err
    assert len(out.splitlines()) == 2
