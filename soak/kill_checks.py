"""What is looked at when all is settled after the kills: jobs, keys, pictures, upstream's count, webhooks, and the disk."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calls import Caller, NoAnswer, Reply
from load import SIDE, TERMINAL, Order
from programs import Gateway, Said, SoakError, Upstreams
from receiver import Receiver, by_job
from report import Finding, none_of

from img_serving.backends.scripted import picture
from img_serving.storage.local_disk import is_name

PAGE = 100
_AT_ONCE = 8
_PNG = re.compile(rb"\x89PNG\r\n\x1a\n")
_PNG_AS_BASE64 = re.compile(rb"iVBORw0KGgo")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Settled:
    """The world after the load: every job that the gateway knows, by its id, and what two replays of each key brought."""

    orders: Sequence[Order]
    records: Mapping[str, Record]
    replays: Mapping[str, tuple[Reply, Reply]]
    found_by_key: Mapping[str, Sequence[str]]

    def job_of(self, order: Order) -> Record | None:
        """The job of an order: by its id where the client has one, else by the request id."""
        if order.job_id is not None:
            return self.records.get(order.job_id)
        return next((one for one in self.records.values() if one.get("request_id") == order.tag), None)

    def by_tag(self) -> dict[str, list[Record]]:
        """Jobs of each tag."""
        found: dict[str, list[Record]] = {}
        for record in self.records.values():
            found.setdefault(str(record.get("request_id")), []).append(record)
        return found


# ------------------------------------------------------------------------------------------------------------- settling


async def jobs_of(caller: Caller) -> list[Record]:
    """Every job in the gateway's list, page by page.

    Raises:
        SoakError: the list cannot be read.
    """
    found: list[Record] = []
    after = ""
    while True:
        reply = await caller.get(f"/v1/jobs?limit={PAGE}{after}")
        if reply.status != 200:
            raise SoakError(f"GET /v1/jobs is {reply}")
        page = reply.json
        found += page["data"]
        if not page["has_more"]:
            return found
        after = f"&after={page['last_id']}"


async def settle(caller: Caller, upstreams: Upstreams, patience_seconds: float) -> list[Record]:
    """Wait until no job is under way, and no picture being drawn; the list as it then is, or when patience ends."""
    until = asyncio.get_running_loop().time() + patience_seconds
    while True:
        jobs = await jobs_of(caller)
        is_quiet = all(one["status"] in TERMINAL for one in jobs) and not upstreams.drawing
        if is_quiet or asyncio.get_running_loop().time() > until:
            return jobs
        await asyncio.sleep(0.3)


async def settled(caller: Caller, orders: Sequence[Order], listed: Sequence[Record]) -> Settled:
    """Ask for every job, and replay every key twice."""
    records: dict[str, Record] = {}
    replays: dict[str, tuple[Reply, Reply]] = {}
    found: dict[str, list[str]] = {}

    async def look(job_id: str) -> None:
        reply = await caller.get(f"/v1/jobs/{job_id}")
        if reply.status == 200:
            records[job_id] = reply.json

    async def replay(order: Order) -> None:
        assert order.key is not None
        path, body, headers = order.request()
        with contextlib.suppress(NoAnswer):
            first, second = [await caller.call("POST", path, body, headers) for _ in range(2)]
            replays[order.key] = first, second
            jobs = await caller.get(f"/v1/jobs?idempotency_key={order.key}")
            found[order.key] = [one["id"] for one in jobs.json["data"]]

    ids = {str(one["id"]) for one in listed} | {order.job_id for order in orders if order.job_id is not None}
    await _some_at_a_time(look, ids)
    await _some_at_a_time(replay, [order for order in orders if order.key is not None and order.is_accepted])
    return Settled(orders, records, replays, found)


async def _some_at_a_time(work: Callable[[Any], Any], of: Iterable[Any]) -> None:
    left = iter(list(of))

    async def go_on() -> None:
        for one in left:
            await work(one)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(go_on())


# ----------------------------------------------------------------------------------------------------------------- jobs


def job_findings(world: Settled) -> list[Finding]:
    """Nothing that was promised is lost, nothing is there twice, and what is over stays over."""
    accepted = [order for order in world.orders if order.is_accepted]
    lost = [_told(order, "is not known") for order in accepted if world.job_of(order) is None]
    for order in accepted:
        record = world.job_of(order)
        if record is not None and record["status"] not in TERMINAL:
            lost.append(_told(order, f"is still {record['status']}"))
        elif record is not None and order.job_id is not None:
            order.see(record)
    twice = [
        f"{tag}: {', '.join(str(one['id']) for one in jobs)}"
        for tag, jobs in world.by_tag().items()
        if len(jobs) > 1 or tag not in {order.tag for order in world.orders}
    ]
    faults = [fault for order in world.orders for fault in order.faults]
    halves = [
        f"{one['id']}: {one['status']}, result {one.get('result') is not None}, error {one.get('error')}"
        for one in world.records.values()
        if one["status"] in TERMINAL and not _is_whole(one)
    ]
    return [
        none_of("accepted jobs that are lost", lost, f"{len(accepted):,}"),
        none_of("requests with more than one job, or jobs that nobody asked for", twice, f"{len(world.records):,}"),
        none_of("answers that clients may hold against it (a finished job changed, a 404, …)", faults, "all"),
        none_of("finished jobs with not exactly the result or the error that they should have", halves, "all"),
    ]


def _is_whole(record: Record) -> bool:
    status, result, error = record["status"], record.get("result"), record.get("error")
    if status == "succeeded":
        return result is not None and error is None and len(result["data"]) == record["n"]
    return result is None and (error is not None or status == "cancelled")


def _told(order: Order, what: str) -> str:
    return f"{order.tag} ({order.way}, {order.model}, job {order.job_id}, key {order.key}) {what}"


def key_findings(world: Settled) -> list[Finding]:
    """Each key has one job, and one answer for ever."""
    keyed = [order for order in world.orders if order.key is not None and order.is_accepted]
    wrong, others = [], []
    for order in keyed:
        assert order.key is not None
        found = world.found_by_key.get(order.key, ())
        if len(found) != 1:
            others.append(_told(order, f"finds {len(found)} jobs by its key"))
        if order.key not in world.replays:
            wrong.append(_told(order, "got no answer to a replay"))
            continue
        first, second = world.replays[order.key]
        pairs = [(first, second)] if order.answer is None else [(order.answer, first), (first, second)]
        for one, other in pairs:
            if order.is_plain and (one.status, one.body) != (other.status, other.body):
                wrong.append(_told(order, f"was answered {one} and then {other}"))
        if not order.is_plain and {_id_in(first), _id_in(second)} != {order.job_id}:
            wrong.append(_told(order, f"became {_id_in(first)} and {_id_in(second)}"))
    return [
        none_of("keys whose replay is not the same", wrong, f"{len(keyed):,} keys, {2 * len(keyed):,} replays"),
        none_of("keys by which not exactly one job is found", others, f"{len(keyed):,}"),
    ]


def _id_in(reply: Reply) -> str | None:
    try:
        found = reply.json.get("id")
    except ValueError:
        return None
    return None if found is None else str(found)


# ------------------------------------------------------------------------------------------------------------- pictures


def picture_findings(world: Settled, directory: Path) -> list[Finding]:
    """Each picture of a result is there, and no other."""
    names = {path.name for path in directory.iterdir()}
    pictures = {name for name in names if is_name(name)}
    named: collections.Counter[str] = collections.Counter()
    inline: collections.Counter[str] = collections.Counter()
    for record in world.records.values():
        for one in (record.get("result") or {}).get("data", ()):
            if one.get("url"):
                named[str(one["url"]).rpartition("/")[2]] += 1
            elif one.get("b64_json"):
                inline[hashlib.sha256(base64.b64decode(one["b64_json"])).hexdigest()] += 1
    missing = [f"{name} is named by a result and not there" for name in named if name not in pictures]
    shared = [f"{name} is named by {count} results" for name, count in named.items() if count > 1]
    owners = _owners(world.orders)
    orphans = []
    for name in sorted(pictures - set(named)):
        digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        inline[digest] -= 1  # the picture of a result that is handed out inline may be kept as a file
        if inline[digest] < 0:
            orphans.append(f"{name}, drawn for {owners.get(digest, 'nobody')}")
    cut = [name for name in names if name.endswith(".part")]
    return [
        none_of(
            "pictures that a result names and that are missing, or that two name",
            [*missing, *shared],
            f"{len(named):,}",
        ),
        none_of("pictures on the disk that no result names", orphans, f"{len(pictures):,}"),
        Finding("files of pictures that were cut while being written (swept after an hour)", str(len(cut))),
    ]


def _owners(orders: Iterable[Order]) -> dict[str, str]:
    """Tags by the digest of the pictures that are drawn for them."""
    return {
        hashlib.sha256(
            picture(order.tag, 1 + index, SIDE, SIDE)
        ).hexdigest(): f"{order.tag} ({order.way}, {order.model})"
        for order in orders
        for index in range(order.n)
    }


# ------------------------------------------------------------------------------------------------------------- upstream


def upstream_findings(world: Settled, said: Sequence[Said], paid: str) -> list[Finding]:
    """What was drawn beyond one set a job, by server; where somebody pays that is nothing."""
    wanted = {order.tag: order for order in world.orders}
    drawn: collections.Counter[str] = collections.Counter()
    extra: dict[str, list[str]] = {}
    for one in sorted(said, key=lambda one: one.at):
        if one.event != "drawn":
            continue
        before = drawn[one.tag]
        drawn[one.tag] += one.pictures
        order = wanted.get(one.tag)
        beyond = min(one.pictures, max(0, before + one.pictures - (order.n if order is not None else 0)))
        if beyond:
            extra.setdefault(one.server, []).append(f"{one.tag}: {beyond} more than wanted")
    by_server = collections.Counter({one.server: 0 for one in said})
    for one in said:
        by_server[one.server] += one.pictures
    jobs = world.by_tag()
    homeless = [tag for tag in drawn if tag not in jobs]
    unasked = [
        f"{one['id']} ({tag}) succeeded with {drawn[tag]} pictures drawn for its {one['n']}"
        for tag, records in jobs.items()
        for one in records
        if one["status"] == "succeeded" and drawn[tag] < one["n"]
    ]
    findings = []
    for server in sorted(by_server):
        name = f"pictures drawn once more than wanted, {server}"
        offenders = extra.get(server, [])
        if server == paid:
            findings.append(none_of(f"{name} (somebody pays: never)", offenders, f"{by_server[server]:,}"))
        else:
            findings.append(Finding(name, f"{len(offenders)} of {by_server[server]:,}", "told", None, offenders))
    findings.append(none_of("tags drawn for that no job has", homeless, f"{len(drawn):,}"))
    findings.append(none_of("jobs that succeeded with fewer pictures drawn than they have", unasked, "all"))
    return [*findings, *_failures(world, paid)]


def _failures(world: Settled, paid: str) -> list[Finding]:
    """Jobs that failed although nothing was wrong with them: only where somebody pays, and only as `outcome_unknown`."""
    unknown, wrong = 0, []
    orders = {order.tag: order for order in world.orders}
    for record in world.records.values():
        order = orders.get(str(record.get("request_id")))
        code = (record.get("error") or {}).get("code")
        if record["status"] not in {"failed", "expired"} or order is None or order.tag.startswith("refuse-"):
            continue
        if code == "outcome_unknown" and order.model == paid:
            unknown += 1
        else:
            wrong.append(f"{_told(order, record['status'])}, attempts {record.get('attempts')}: {record.get('error')}")
    return [
        Finding("jobs that failed as outcome_unknown where somebody pays", f"{unknown:,}", "told"),
        none_of("other jobs that failed, though nobody refused them", wrong, f"{len(world.records):,}"),
    ]


# ------------------------------------------------------------------------------------------------------------- webhooks


def hooked(records: Iterable[Record]) -> list[Record]:
    """Finished jobs that somebody is to be called for."""
    return [one for one in records if one.get("webhook_url") and one["status"] in TERMINAL]


def webhook_findings(world: Settled, receiver: Receiver) -> list[Finding]:
    """Each is delivered at least once, always as the same event, and says how the job ended."""
    jobs = hooked(world.records.values())
    came = by_job(receiver.deliveries)
    delivered = receiver.delivered()
    missing = [f"{one['id']} ({one.get('request_id')}): {one['status']}" for one in jobs if one["id"] not in delivered]
    wanted = [order for order in world.orders if order.hook is not None and world.job_of(order) is not None]
    missing += [_told(order, "has lost its webhook_url") for order in wanted if not _keeps_hook(world, order)]
    wrong = []
    for record in jobs:
        events = {(one.event_id, one.type) for one in came.get(record["id"], ())}
        if len(events) > 1 or any(kind != f"job.{record['status']}" or not event for event, kind in events):
            wrong.append(f"{record['id']}, {record['status']}: {sorted(events)}")
    strangers = [job_id for job_id in came if job_id not in {one["id"] for one in jobs}]
    unsigned = [one.event_id for one in receiver.deliveries if not one.is_signed]
    repeated = sum(sum(one.accepted for one in each) > 1 for each in came.values())
    return [
        none_of("webhooks that were never delivered", missing, f"{len(jobs):,}"),
        none_of("jobs with not exactly one event, or another than its end", wrong, f"{len(came):,}"),
        none_of("webhooks for jobs that should have none", strangers, f"{len(came):,}"),
        none_of("deliveries without a right signature, or that are no event", [*unsigned, *receiver.strange], "all"),
        Finding("webhooks that were delivered more than once after a good answer", f"{repeated:,}", "told"),
    ]


def _keeps_hook(world: Settled, order: Order) -> bool:
    record = world.job_of(order)
    return record is not None and record.get("webhook_url") == order.hook


# ----------------------------------------------------------------------------------------------------------------- disk


def disk_findings(world: Settled, gateway: Gateway) -> list[Finding]:
    """When the gateway is stopped: no inputs of finished jobs anywhere in its data, and no files that nobody knows."""
    edits = [order for order in world.orders if order.is_edit]
    left = [f"{order.tag}: its input is in {where}" for order, where in _inputs_in(gateway.data, edits)]
    files = sorted(str(path.relative_to(gateway.data)) for path in gateway.data.rglob("*") if path.is_file())
    odd = [name for name in files if name.endswith((".part", ".tmp", "-journal")) or "/" in name]
    trouble = gateway.trouble()
    return [
        none_of("inputs of finished edits that are still in the data directory", left, f"{len(edits):,}"),
        none_of("files in the data directory that should be gone", odd, ", ".join(files)),
        none_of("bad lines in the log", trouble, "all"),
    ]


def _inputs_in(data: Path, edits: Sequence[Order]) -> list[tuple[Order, str]]:
    """Edits whose input is found in a cell of a table, as bytes or as base64, or in a file that is no database."""
    places: list[tuple[str, bytes]] = []
    for path in sorted(data.rglob("*")):
        if not path.is_file() or path.name.endswith(("-wal", "-shm")):
            continue
        content = path.read_bytes()
        places += _cells(path) if content.startswith(b"SQLite format 3\0") else [(path.name, content)]
    owners = {order.input_picture(): order for order in edits}
    length = len(next(iter(owners), b""))  # that of all: they differ in their colours only
    text_length = len(base64.b64encode(bytes(length)))
    found: list[tuple[bytes, str]] = []
    for where, content in places:
        found += [(content[at : at + length], where) for at in _starts(_PNG, content)]
        texts = [content[at : at + text_length] for at in _starts(_PNG_AS_BASE64, content)]
        found += [(_decoded(text), where) for text in texts]
    return [(owners[png], where) for png, where in found if png in owners]


def _starts(pattern: re.Pattern[bytes], content: bytes) -> list[int]:
    return [match.start() for match in pattern.finditer(content)]


def _decoded(text: bytes) -> bytes:
    with contextlib.suppress(ValueError):
        return base64.b64decode(text)
    return b""


def _cells(path: Path) -> list[tuple[str, bytes]]:
    """Every cell of every table that holds bytes or text."""
    found: list[tuple[str, bytes]] = []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            where = f"{path.name}, table {table}"
            cells = (cell for row in connection.execute(f'SELECT * FROM "{table}"') for cell in row)
            found += [(where, _bytes(cell)) for cell in cells if isinstance(cell, (bytes, str))]
    return found


def _bytes(cell: bytes | str) -> bytes:
    return cell.encode() if isinstance(cell, str) else cell
