"""`webhooks`: the secret, what became of events, and sending one again."""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from rich.console import Console

from img_serving.api.webhooks import WebhookRecord
from img_serving.cli import main
from img_serving.cli.webhooks import page_of
from img_serving.config import Config
from img_serving.policy.webhooks import written_secret
from img_serving.state.sqlite import SqliteState
from img_serving.state.webhook_secret import webhook_secrets

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]


def event(**more: Any) -> dict[str, Any]:
    record = {
        "object": "webhook",
        "id": "evt_1",
        "type": "job.failed",
        "job_id": "job_1",
        "tenant": "한국팀",
        "url": "https://hooks.test/[bold]done",
        "state": "pending",
        "attempts": 3,
        "created_at": 1674087231.5,
        "next_at": 1674087290.0,
        "delivered_at": None,
        "last_error": "the receiver answered HTTP 500",
    }
    return {**record, **more}


def listed(*events: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    ids = [one["id"] for one in events] or [None]
    return {"object": "list", "data": list(events), "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}


# the secret


def test_the_secret_that_was_made_is_printed_while_the_gateway_has_the_file_open(capsys: Out) -> None:
    async def started() -> bytes:
        state = SqliteState(Path("data") / "img-serving.db")
        (key,) = await webhook_secrets(Config(), state)
        assert await asyncio.to_thread(main, ["webhooks", "secret"]) == 0
        await state.close()
        return key

    key = asyncio.run(started())
    assert main(["webhooks", "secret"]) == 0
    assert capsys.readouterr().out == f"{written_secret(key)}\n" * 2


def test_secrets_of_the_configuration_are_printed_as_libraries_take_them(
    capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'[webhooks]\nsecret = "{"a" * 24},{written_secret(b"b" * 24)}"\n')
    assert main(["webhooks", "secret", "--config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [written_secret(b"a" * 24), written_secret(b"b" * 24)]
    assert not (tmp_path / "data").exists()


def test_without_a_first_start_there_is_no_secret(capsys: Out, tmp_path: Path) -> None:
    assert main(["webhooks", "secret"]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path / "data" / "img-serving.db") in told  # whoever is in another directory sees where was looked
    assert "made when the gateway starts for the first time" in told
    assert "in the directory where the gateway runs" in told
    assert not (tmp_path / "data").exists()


def test_a_state_that_cannot_be_read_is_told(capsys: Out) -> None:
    Path("data").mkdir()
    (Path("data") / "img-serving.db").write_bytes(b"my diary, not a database\n" * 100)
    assert main(["webhooks", "secret"]) == 1
    assert "cannot be read" in capsys.readouterr().err


# events


def test_events_are_shown(gateway: StubGateway, capsys: Out) -> None:
    delivered = event(id="evt_2", state="delivered", next_at=None, last_error="", attempts=1)
    gateway.answer(200, listed(event(), delivered, has_more=True))
    assert main(["webhooks", "list"]) == 0
    out = capsys.readouterr().out
    for text in (
        "evt_1",
        "job.failed",
        "pending",
        "2023-01-19 00:13:51Z",
        "2023-01-19 00:14:50Z",
        "https://hooks.test/[bold]done",
        "the receiver answered HTTP 500",
        "delivered",
        "--after evt_2",
    ):
        assert text in out
    assert (gateway.asked[0].method, gateway.asked[0].path) == ("GET", "/v1/webhooks?limit=20")


def test_a_terminal_of_80_columns_shows_whole_ids_and_what_went_wrong() -> None:
    ids = [f"evt_{number:024x}" for number in range(2)]
    url = f"https://[2001:db8::1]:8443/{'token' * 30}"
    events = msgspec.convert(
        [event(id=ids[0], url=url, last_error="[bold]HTTP 500"), event(id=ids[1], type="job.succeeded", last_error="")],
        list[WebhookRecord],
    )
    text = StringIO()
    Console(file=text, width=80).print(page_of(events, wide=False))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["EVENT", "JOB", "STATE", "TRIES", "RECEIVER"]
    assert lines[2].split() == [ids[0], "failed", "pending", "3", "[2001:db8::1]:8443"]
    assert lines[3].split() == [ids[1], "succeeded", "pending", "3", "hooks.test"]
    assert lines[4:] == ["", f"{ids[0]}: [bold]HTTP 500", "everything of each: --json"]


def test_a_receiver_with_a_long_name_is_shortened_not_folded() -> None:
    (one,) = msgspec.convert([event(url=f"https://{'long-' * 20}name.test/", last_error="")], list[WebhookRecord])
    text = StringIO()
    Console(file=text, width=80).print(page_of([one], wide=False))
    assert [line.endswith("…") for line in text.getvalue().splitlines()] == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "query"),
    [
        (["--failed"], "state=failed&limit=20"),
        (["--pending", "--limit", "5"], "state=pending&limit=5"),
        (["--job", "job 1", "--after", "evt_9"], "job_id=job+1&limit=20&after=evt_9"),
    ],
)
def test_what_is_shown_can_be_chosen(gateway: StubGateway, capsys: Out, options: list[str], query: str) -> None:
    gateway.answer(200, listed())
    assert main(["webhooks", "list", *options]) == 0
    assert capsys.readouterr().out == "no events\n"
    assert gateway.asked[0].path == f"/v1/webhooks?{query}"


def test_json_is_what_the_gateway_answered(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listed(event()))
    assert main(["webhooks", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == listed(event())


def test_failed_and_pending_exclude_each_other(capsys: Out) -> None:
    assert main(["webhooks", "list", "--failed", "--pending"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_what_is_no_list_is_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, {"hello": "world"})
    assert main(["webhooks", "list"]) == 1
    assert "is there an img-serving gateway?" in capsys.readouterr().err


def test_an_event_is_sent_again(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(202, event())
    assert main(["webhooks", "redeliver", "evt_1"]) == 0
    assert capsys.readouterr().out == "evt_1 is sent again\n"
    assert [(one.method, one.path) for one in gateway.asked] == [("POST", "/v1/webhooks/evt_1/redeliver")]


def test_the_events_of_a_job_are_sent_again(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listed(event(id="evt_1"), event(id="evt_2")))
    gateway.answer(202, event())
    assert main(["webhooks", "redeliver", "job_1"]) == 0
    assert [(one.method, one.path) for one in gateway.asked] == [
        ("GET", "/v1/webhooks?job_id=job_1&limit=100"),
        ("POST", "/v1/webhooks/evt_1/redeliver"),
        ("POST", "/v1/webhooks/evt_2/redeliver"),
    ]
    assert capsys.readouterr().out == "evt_1 is sent again\nevt_2 is sent again\n"


def test_a_job_without_events_and_an_unknown_event_are_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listed())
    gateway.refuse(404, "there is no webhook event evt_1")
    assert main(["webhooks", "redeliver", "job_1"]) == 1
    assert "no event of job_1" in capsys.readouterr().err
    assert main(["webhooks", "redeliver", "evt_1"]) == 1
    assert "there is no webhook event evt_1" in capsys.readouterr().err
