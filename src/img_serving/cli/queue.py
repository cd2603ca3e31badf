"""`img-serving queue`: what waits in a running gateway, for whom and for how long, once or again and again."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from img_serving.cli.endings import OK, CommandFailed, printable
from img_serving.cli.usage import Commands, add_gateway_options, seconds_above_zero

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from img_serving.api.queue import QueuedEndpointRecord, QueueReply
    from img_serving.cli.client import Client

MOST_JOBS = 15
"""Jobs shown at most, those that are next; `--json` has more."""

BAR_CELLS = 10
WIDE = 120
"""Columns of a terminal that has room for bars."""

EXAMPLES = """\
examples:
  img-serving queue             what waits now
  img-serving queue --watch     … and again every two seconds, until Ctrl-C
  img-serving queue --json      everything, as the gateway answers
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser("queue", help="show what waits, for whom and how long", epilog=EXAMPLES)
    parser.add_argument(
        "--watch",
        nargs="?",
        type=seconds_above_zero,
        const=2.0,
        metavar="SECONDS",
        help="look again and again (default: every 2 seconds)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, exactly as the gateway answers")
    add_gateway_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and show.

    Raises:
        CommandFailed: the gateway does not answer, or refuses (the queue is for admin keys).
    """
    from img_serving.cli.client import connect

    client = connect(args)
    if args.json and args.watch is None:
        print(json.dumps(client.call("GET", "/v1/queue").json(), indent=2, ensure_ascii=False))
        return OK
    if args.json:
        while True:  # one line a look, for programs
            print(json.dumps(client.call("GET", "/v1/queue").json(), ensure_ascii=False), flush=True)
            time.sleep(args.watch)

    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut or folded for a file or a pipe
    if args.watch is None:
        console.print(page_of(_look(client), wide=console.width >= WIDE))
        return OK
    wide = console.width >= WIDE
    page = page_of(_look(client), wide=wide)  # what is wrong at the first look will be at the next
    if not console.is_terminal:
        while True:
            console.print(page)
            time.sleep(args.watch)
            page = _next_page(client, wide=wide)
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(page, refresh=True)
            time.sleep(args.watch)
            page = _next_page(client, wide=wide)


def _next_page(client: Client, *, wide: bool) -> RenderableType:
    """The queue, or what is wrong for the moment: a gateway that is started anew comes back."""
    from rich.text import Text

    try:
        return page_of(_look(client), wide=wide)
    except CommandFailed as failure:
        return Text(f"{failure} (looking again)", "red")


def _look(client: Client) -> QueueReply:
    import msgspec

    from img_serving.api.queue import QueueReply

    try:
        return msgspec.json.decode(client.call("GET", "/v1/queue").body, type=QueueReply)
    except msgspec.DecodeError as error:
        raise CommandFailed(f"the answer is not a queue ({error}): is there an img-serving gateway?") from error


def page_of(queue: QueueReply, *, wide: bool = True) -> RenderableType:
    """The queue for people; `wide`: there is room for bars. Texts that come from elsewhere are never read as markup."""
    from rich.console import Group
    from rich.text import Text

    state = "stopping" if queue.draining else "taking work"
    head = (
        f"{queue.depth:,} waiting, {queue.running:,} calls in flight, {queue.jobs_total:,} jobs; "
        f"oldest {_time(queue.oldest_seconds)}; {queue.work:,.0f} megapixel-steps; {state}"
    )
    parts: list[RenderableType] = [Text(head, "bold"), Text(), _backends(queue)]
    if len(queue.backends) > 1 and queue.depth:
        parts.append(Text("a picture counts for every backend that could draw it", "dim"))
    if queue.tenants:
        parts += [Text(), _tenants(queue)]
    parts += [Text(), _endpoints(queue.endpoints, wide=wide)]
    parts += [
        Text(printable(f"{one.backend} {one.url}: {one.last_error[:100]}"), "dim")
        for one in queue.endpoints
        if one.last_error
    ]
    if queue.jobs:
        parts += [Text(), _jobs(queue)]
        more = queue.jobs_total - min(len(queue.jobs), MOST_JOBS)
        if more:
            parts.append(Text(f"… and {more:,} more", "dim"))
    return Group(*parts)


def _backends(queue: QueueReply) -> Table:
    table = _table("BACKEND", "WAITING", "RUNNING", "OLDEST", "A NEW REQUEST WAITS")
    for one in queue.backends:
        _row(table, one.name, f"{one.depth:,}", f"{one.running:,}", _time(one.oldest_seconds), _time(one.eta_seconds))
    return table


def _tenants(queue: QueueReply) -> Table:
    table = _table("TENANT", "PRIORITY", "WEIGHT", "WAITING", "RUNNING", "OLDEST", "ITS LAST STARTS IN")
    for one in queue.tenants:
        running = f"{one.running:,}" + ("" if one.max_running is None else f"/{one.max_running:,}")
        _row(
            table,
            one.name,
            str(one.priority),
            f"{one.weight:g}",
            f"{one.depth:,}",
            running,
            _time(one.oldest_seconds),
            _time(one.eta_seconds),
        )
    return table


def _endpoints(endpoints: list[QueuedEndpointRecord], *, wide: bool) -> Table:
    table = _table("ENDPOINT", "SLOTS", *[""] * wide, "STATE", "S/MP-STEP", "S/CALL", "CALLS", "FAILED")
    for one in endpoints:
        busy = round(BAR_CELLS * one.in_flight / max(1, one.max_concurrency))
        _row(
            table,
            f"{one.backend} {one.url}",
            f"{one.in_flight}/{one.max_concurrency}",
            *["█" * busy + "░" * (BAR_CELLS - busy)] * wide,
            _state(one),
            "?" if one.seconds_per_unit is None else f"{one.seconds_per_unit:.3g}",
            "?" if one.overhead_seconds is None else f"{one.overhead_seconds:.2g}",
            f"{one.calls:,}",
            f"{one.failures:,}",
        )
    return table


def _state(one: QueuedEndpointRecord) -> str:
    words: list[str] = [one.health]
    if one.breaker != "closed":
        words.append(f"breaker {one.breaker.replace('_', ' ')}")
    if one.suspect:
        words.append("suspect (silent)")
    if one.loaded_model:
        words.append(f"has {one.loaded_model}")
    if one.exclusive_group:
        words.append(f"shares {one.exclusive_group}")
    return ", ".join(words)


def _jobs(queue: QueueReply) -> Table:
    table = _table("JOB", "TENANT", "STATUS", "PICTURES", "BEFORE IT", "AGE", "STARTS IN", "DONE IN")
    first = sorted(queue.jobs, key=lambda job: (job.status != "running", job.position))
    for one in first[:MOST_JOBS]:
        _row(
            table,
            one.id,
            one.tenant,
            one.status,
            str(one.n),
            f"{one.position:,}",
            _time(one.age_seconds),
            _time(one.wait_seconds),
            _time(one.eta_seconds),
        )
    return table


_TEXTS = frozenset({"BACKEND", "TENANT", "ENDPOINT", "JOB", "STATE"})
"""Columns of words: these are folded where the terminal is narrow, numbers are not."""


def _table(*names: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        # an address is only folded where it has to be
        table.add_column(
            name, overflow="fold", no_wrap=name not in _TEXTS, min_width=28 if name == "ENDPOINT" else None
        )
    return table


def _row(table: Table, *values: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(printable(value), "bold" if not at else "") for at, value in enumerate(values)))


def _time(seconds: float | None) -> str:
    """A duration as people say it; `?` where nobody knows."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
