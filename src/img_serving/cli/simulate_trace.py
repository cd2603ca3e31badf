"""The traces that `simulate` reads: recorded arrivals, as CSV with a head or as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from img_serving.cli.endings import MISUSED, CommandFailed, printable
from img_serving.cli.simulate_specs import (
    MOST_KINDS,
    MOST_SECONDS,
    MOST_TENANTS,
    TENANT_NUMBERS,
    Number,
    SpecFault,
    kind_of,
    name_of,
)
from img_serving.config.problems import instead_of
from img_serving.domain.tenants import Tenant
from img_serving.simulation import Arrival, Kind, Sender
from img_serving.simulation.workload import MAX_TASKS

MOST_TRACE_BYTES: Final = 256 * 2**20

TRACE_COLUMNS: Final = ("seconds", "size", "steps", "n", "tenant", "priority", "model")
"""Only `seconds` must be there. JSON lines have the same names as keys."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file of arrivals holds."""

    kinds: tuple[Kind, ...]
    senders: tuple[Sender, ...]
    arrivals: list[Arrival]


def read_trace(path: str, known: Mapping[str, Tenant]) -> Trace:
    """A CSV file with a head, or JSON lines.

    Raises:
        CommandFailed: it cannot be read or used; the message names the line.
    """
    shown = printable(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_TRACE_BYTES + 1)  # a device has no size, and perhaps no end
        if len(content) > MOST_TRACE_BYTES:
            raise CommandFailed(f"--trace: {shown} has more than {MOST_TRACE_BYTES // 2**20} MiB", MISUSED)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CommandFailed(f"--trace: {shown} cannot be read: {error.strerror}", MISUSED) from error
    except UnicodeDecodeError:
        raise CommandFailed(f"--trace: {shown} is not UTF-8 text: it must be CSV or JSON lines", MISUSED) from None
    kinds: dict[tuple[str, ...], int] = {}
    made: list[Kind] = []
    senders: dict[tuple[str, int], int] = {}
    arrivals: list[Arrival] = []
    line = _Place()
    try:
        for row in _json_rows(text, line) if text.lstrip()[:1] == "{" else _csv_rows(text, line):
            if len(arrivals) >= MAX_TASKS:
                raise SpecFault(f"there are more than {MAX_TASKS:,} arrivals")
            at = Number(0, MOST_SECONDS).read("seconds", row.get("seconds", ""))
            size = row.get("size") or "1024x1024"
            width, _, height = size.partition("x")
            key = (width, height, row.get("steps") or "30", row.get("n") or "1", row.get("model", ""))
            if key not in kinds:
                made.append(kind_of((width, height), *key[2:4], key[4] or None))
                kinds[key] = len(kinds)
            base = known.get(row.get("tenant", ""), Tenant(name_of(row.get("tenant") or "anonymous", "a tenant")))
            priority = int(
                TENANT_NUMBERS["priority"].read("priority", row["priority"]) if row.get("priority") else base.priority
            )
            sender = senders.setdefault((base.name, priority), len(senders))
            if len(kinds) > MOST_KINDS or len(senders) > MOST_TENANTS:
                raise SpecFault(f"at most {MOST_KINDS} kinds of requests and {MOST_TENANTS} tenants are simulated")
            arrivals.append(Arrival(at, kinds[key], sender))
    except (SpecFault, csv.Error) as fault:
        raise CommandFailed(f"--trace: {shown}, line {line.number}: {printable(str(fault))}", MISUSED) from None
    if not arrivals:
        raise CommandFailed(f"--trace: {shown} has no arrivals", MISUSED)
    tenants = [
        Tenant(
            name,
            priority=priority,
            weight=known[name].weight if name in known else 1.0,
            max_running=known[name].max_running if name in known else None,
        )
        for name, priority in senders
    ]
    return Trace(tuple(made), tuple(Sender(tenant) for tenant in tenants), arrivals)


@dataclass(slots=True)
class _Place:
    """The line of the trace that is being read."""

    number: int = 1


def _csv_rows(text: str, line: _Place) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.StringIO(text))
    head = [name.strip().lower() for name in next(reader, [])]
    _check_columns(head)
    for row in reader:
        line.number = reader.line_num
        if len(row) > len(head):
            raise SpecFault(f"it has {len(row)} values for {len(head)} columns")
        if row:
            yield dict(zip(head, (value.strip() for value in row), strict=False))


def _json_rows(text: str, line: _Place) -> Iterator[dict[str, str]]:
    checked: set[tuple[str, ...]] = set()
    for line.number, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row: Any = json.loads(content)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise SpecFault("it is not a JSON object")
        names = tuple(row)
        if names not in checked:
            _check_columns(names)
            checked.add(names)
        yield {name: str(value) for name, value in row.items() if value is not None}


def _check_columns(names: Sequence[str]) -> None:
    for name in names:
        if name not in TRACE_COLUMNS:
            raise SpecFault(f"there is no column `{name[:60]}`: {instead_of(name, TRACE_COLUMNS)}")
    if len(set(names)) < len(names):
        raise SpecFault("a column stands there twice")
    if "seconds" not in names:
        raise SpecFault(f"the column `seconds` is missing; a trace has {', '.join(TRACE_COLUMNS)}")
