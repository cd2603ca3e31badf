"""The checks of the kill soak find what they are for: a check that cannot fail proves nothing."""

from __future__ import annotations

import base64
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "soak"
MODULES = ("calls", "kill_checks", "load", "programs", "receiver", "report", "upstreams")


@pytest.fixture(scope="module")
def soak() -> Iterator[SimpleNamespace]:
    """The soak's own modules, which are programs' and no package's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SOAK))
        import kill_checks  # type: ignore[import-not-found]
        import load  # type: ignore[import-not-found]
        import programs  # type: ignore[import-not-found]
        import receiver  # type: ignore[import-not-found]

        try:
            yield SimpleNamespace(checks=kill_checks, load=load, programs=programs, receiver=receiver)
        finally:
            for name in MODULES:
                sys.modules.pop(name, None)


@pytest.fixture
def order(soak: SimpleNamespace) -> Any:
    return soak.load.Order("t-1", "job", "paid", hook="http://127.0.0.1/hook", job_id="job_1")


def record_of(order: Any, **more: Any) -> dict[str, Any]:
    record = {
        "id": "job_1", "status": "succeeded", "request_id": order.tag, "n": 1, "webhook_url": order.hook, "error": None,
        "result": {"data": [{"url": f"http://x/images/img-{'0' * 32}.png"}]},
    }  # fmt: skip
    return record | more


def world_of(soak: SimpleNamespace, order: Any, *records: dict[str, Any], **more: Any) -> Any:
    known = {record["id"]: record for record in records}
    return soak.checks.Settled([order], known, more.get("replays", {}), more.get("found", {}))


def missed(findings: list[Any]) -> list[str]:
    return [detail for each in findings if each.met is False for detail in each.details]


def test_an_accepted_job_that_is_unknown_or_not_over_is_lost(soak: SimpleNamespace, order: Any) -> None:
    check = soak.checks.job_findings
    assert missed(check(world_of(soak, order, record_of(order)))) == []
    assert "is not known" in missed(check(world_of(soak, order)))[0]
    assert "is still queued" in missed(check(world_of(soak, order, record_of(order, status="queued"))))[0]


def test_two_jobs_of_one_request_are_one_too_many(soak: SimpleNamespace, order: Any) -> None:
    twice = world_of(soak, order, record_of(order), record_of(order, id="job_2"))
    assert missed(soak.checks.job_findings(twice)) == ["t-1: job_1, job_2"]


def test_a_finished_job_that_changes_is_held_against_it(soak: SimpleNamespace, order: Any) -> None:
    order.see(record_of(order, status="running"))
    order.see(record_of(order))
    order.see(record_of(order))
    assert order.faults == []
    order.see(record_of(order, status="running"))
    assert "status of a finished job changed" in order.faults[0]
    assert order.faults[0] in missed(soak.checks.job_findings(world_of(soak, order, record_of(order))))


@pytest.mark.parametrize(
    "half", [{"result": None}, {"error": {"code": "x"}}, {"status": "failed", "error": {"code": "x"}}]
)
def test_an_end_with_the_wrong_things_in_it_is_found(soak: SimpleNamespace, order: Any, half: dict[str, Any]) -> None:
    assert missed(soak.checks.job_findings(world_of(soak, order, record_of(order, **half))))


def test_a_replay_of_other_bytes_and_a_key_with_two_jobs_are_found(soak: SimpleNamespace) -> None:
    from calls import Reply  # type: ignore[import-not-found]

    order = soak.load.Order("t-1", "key", "free")
    assert order.key is not None
    order.answer = same = Reply(200, {}, b"{}", 0, 0)
    other = Reply(200, {}, b"{ }", 0, 0)
    record = record_of(order)

    def check(replays: tuple[Any, Any], found: list[str]) -> list[str]:
        return missed(
            soak.checks.key_findings(
                world_of(soak, order, record, replays={order.key: replays}, found={order.key: found})
            )
        )

    assert check((same, same), ["job_1"]) == []
    assert "was answered" in check((same, other), ["job_1"])[0]
    assert "finds 2 jobs" in check((same, same), ["job_1", "job_2"])[0]
    assert "got no answer" in missed(soak.checks.key_findings(world_of(soak, order, record)))[0]


def test_a_picture_that_is_gone_and_one_that_is_nobodys_are_found(
    soak: SimpleNamespace, order: Any, tmp_path: Path
) -> None:
    world = world_of(soak, order, record_of(order))
    assert "not there" in missed(soak.checks.picture_findings(world, tmp_path))[0]
    (tmp_path / f"img-{'0' * 32}.png").write_bytes(b"png")
    (tmp_path / "a-file-of-the-users.png").write_bytes(b"png")
    assert missed(soak.checks.picture_findings(world, tmp_path)) == []
    drawn = soak.load.picture(order.tag, 1, soak.load.SIDE, soak.load.SIDE)
    (tmp_path / f"img-{'1' * 32}.png").write_bytes(drawn)
    assert "drawn for t-1 (job, paid)" in missed(soak.checks.picture_findings(world, tmp_path))[0]


def test_a_picture_of_an_inline_result_may_be_kept_once(soak: SimpleNamespace, order: Any, tmp_path: Path) -> None:
    inline = {"data": [{"b64_json": base64.b64encode(b"png").decode()}]}
    world = world_of(soak, order, record_of(order, result=inline))
    (tmp_path / f"img-{'0' * 32}.png").write_bytes(b"png")
    assert missed(soak.checks.picture_findings(world, tmp_path)) == []
    (tmp_path / f"img-{'1' * 32}.png").write_bytes(b"png")
    assert len(missed(soak.checks.picture_findings(world, tmp_path))) == 1


def test_a_second_drawing_is_told_and_where_somebody_pays_judged(soak: SimpleNamespace, order: Any) -> None:
    said = soak.programs.Said
    world = world_of(soak, order, record_of(order))
    once = [said("asked", "paid", "t-1", 0, 0.0), said("drawn", "paid", "t-1", 1, 0.1)]
    again = said("drawn", "free-1", "t-1", 1, 0.2)
    check = soak.checks.upstream_findings
    assert missed(check(world, once, "paid")) == []
    assert missed(check(world, [*once, again], "paid")) == []
    assert missed(check(world, [*once, again], "free-1")) == ["t-1: 1 more than wanted"]
    assert "succeeded with 0 pictures" in missed(check(world, [], "paid"))[0]
    assert missed(check(world, [*once, said("drawn", "paid", "t-2", 1, 0.3)], "x")) == ["t-2"]


def test_only_where_somebody_pays_may_an_outcome_be_unknown(soak: SimpleNamespace, order: Any) -> None:
    unknown = record_of(order, status="failed", result=None, error={"code": "outcome_unknown"})
    world = world_of(soak, order, unknown)
    assert missed(soak.checks.upstream_findings(world, [], "paid")) == []
    assert "outcome_unknown" in missed(soak.checks.upstream_findings(world, [], "other"))[0]


def test_webhooks_that_are_missing_two_for_one_or_untrue_are_found(soak: SimpleNamespace, order: Any) -> None:
    world = world_of(soak, order, record_of(order))
    came = soak.receiver.Delivery

    def check(*deliveries: Any) -> list[str]:
        receiver = soak.receiver.Receiver(b"", 0, 1, None)
        receiver.deliveries += deliveries
        return missed(soak.checks.webhook_findings(world, receiver))

    failed = came("e1", "job_1", "job.succeeded", False, True, 0.0)
    good = came("e1", "job_1", "job.succeeded", True, True, 1.0)
    assert check(failed, good, good) == []
    assert "job_1" in check(failed)[0]
    assert "e2" in check(good, came("e2", "job_1", "job.succeeded", True, True, 2.0))[0]
    assert "job.failed" in check(good, came("e1", "job_1", "job.failed", True, True, 2.0))[0]
    assert check(good, came("e9", "job_9", "job.succeeded", True, True, 2.0)) == ["job_9"]
    assert check(came("e1", "job_1", "job.succeeded", True, False, 2.0)) == ["e1"]
    forgotten = world_of(soak, order, record_of(order, webhook_url=None))
    assert (
        "lost its webhook_url"
        in missed(soak.checks.webhook_findings(forgotten, soak.receiver.Receiver(b"", 0, 1, None)))[0]
    )


def test_an_input_that_stays_behind_is_found_in_files_and_in_tables(soak: SimpleNamespace, tmp_path: Path) -> None:
    order = soak.load.Order("t-1", "job-edit", "free", job_id="job_1")
    world = world_of(soak, order, record_of(order))
    gateway = SimpleNamespace(data=tmp_path, trouble=list)
    connection = sqlite3.connect(tmp_path / "state.sqlite3")
    connection.execute("CREATE TABLE kept (record BLOB)")
    connection.commit()
    assert missed(soak.checks.disk_findings(world, gateway)) == []
    png = order.input_picture()
    inline = json.dumps({"image": f"data:image/png;base64,{base64.b64encode(png).decode()}"})
    for cell in (b"before" + png + b"after", inline):
        with connection:
            connection.execute("DELETE FROM kept")
            connection.execute("INSERT INTO kept VALUES (?)", (cell,))
        assert "its input is in state.sqlite3, table kept" in missed(soak.checks.disk_findings(world, gateway))[0]
    with connection:
        connection.execute("DELETE FROM kept")
    connection.close()
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "img.png").write_bytes(png)
    found = missed(soak.checks.disk_findings(world, gateway))
    assert found == ["t-1: its input is in img.png", "spool/img.png"]
