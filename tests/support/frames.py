"""Reads a stream of server-sent events as strictly as the strictest client does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Frame:
    event: str
    data: dict[str, Any]
    id: str | None = None


def frames_of(body: bytes) -> list[Frame]:
    """The events of a whole stream; comments are dropped. What no client could read is an AssertionError."""
    text = body.decode()
    assert text.endswith("\n\n"), text[-80:]
    found: list[Frame] = []
    for block in text[:-2].split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            if line.startswith(":"):
                continue
            name, colon, value = line.partition(": ")
            assert colon, line
            assert name in {"event", "data", "id"}, line
            assert name not in fields, block
            fields[name] = value
        if fields:
            assert {"event", "data"} <= fields.keys(), block[:200]
            found.append(Frame(fields["event"], json.loads(fields["data"]), fields.get("id")))
    return found


def comments_of(body: bytes) -> int:
    """How many comments a stream has."""
    return sum(line.startswith(b":") for line in body.split(b"\n"))
