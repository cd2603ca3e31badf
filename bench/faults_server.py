"""One scripted upstream in a process of its own: orders come as JSON lines on standard input, what happens leaves the same way.

Every line out is written at once with one system call, so that nothing that was told is lost when the process is killed.
Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from img_serving.backends.scripted_server import ScriptedServer
from img_serving.backends.stub_server import Exchange


def say(**fields: object) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def tell(exchange: Exchange) -> None:
    """A request for pictures came, or is over; health checks are nobody's business here."""
    if exchange.method != "POST":
        return
    if exchange.ended_at is None:
        say(
            event="came",
            call=id(exchange),
            request_id=exchange.headers.get("x-request-id", ""),
            pictures=exchange.json.get("batch_size") or exchange.json.get("n", 1),
            at=exchange.started_at,
        )
    else:
        say(event="over", call=id(exchange), at=exchange.ended_at, left=exchange.disconnected_at is not None)


async def main(port: int, script: str) -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with ScriptedServer(json.loads(script), port=port, tell=tell) as server:
        say(event="done", port=server.port)
        while line := await orders.readline():  # its end: whoever started us is gone
            order = json.loads(line)
            match order["do"]:
                case "follow":
                    server.follow(order["script"])
                case "stop":
                    await server.stop()
                case "start":
                    await server.start()
            server.exchanges.clear()  # they were told of
            say(event="done", port=server.port)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
