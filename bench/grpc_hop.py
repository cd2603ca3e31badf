"""What a picture costs on its way from a worker to the gateway's adapter, beside a bare gRPC call that carries as much.

Both ends are counted: the CPU time of the serving process and that of the calling one. Turns alternate, so that what else
this machine does meets both alike; the ratios are what counts. With `--check` the exit status is 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OUT = Path(__file__).parent / "out"
TARGET = 1.5
"""CPU of the hop, at most so many times that of the bare call (1.5 MB, one at a time)."""
METHOD = "/bench.Bare/Fetch"
TICKS = os.sysconf("SC_CLK_TCK")


def picture_of(size_bytes: int) -> bytes:
    """A PNG of about so many bytes: noise, which does not compress."""
    import numpy as np

    from img_serving.media.png import encode_png

    side = round((size_bytes / 3) ** 0.5)
    noise = np.frombuffer(random.Random(7).randbytes(side * side * 3), np.uint8)
    return encode_png(noise.reshape(side, side, 3))


# ---------------------------------------------------------------------------------------------------------------- servers


class Canned:
    """An engine that has drawn already."""

    def __init__(self, size_bytes: int) -> None:
        self._picture = picture_of(size_bytes)

    def load(self) -> None:
        """Nothing to do."""

    def capabilities(self):
        from img_serving.domain.capabilities import Capabilities

        return Capabilities(max_batch_size=8, honours=frozenset({"seed", "size"}))

    def generate(self, batch, on_step):
        on_step(1, 1)
        return [self._picture] * len(batch.items)


async def serve_worker(size_bytes: int) -> None:
    from img_serving.transport.allocator import tune_allocator
    from img_serving.worker.options import WorkerOptions
    from img_serving.worker.program import serve

    def announce(line: str) -> None:
        if " listens on " in line:
            print(line.partition(" listens on ")[2].split(maxsplit=1)[0].rpartition(":")[2], flush=True)

    tune_allocator()  # as `img-serving worker` does
    options = WorkerOptions(port=0, slots=1, queue_size=1000, warm_up=False)
    await serve(lambda: Canned(size_bytes), options, announce=announce)


async def serve_bare(size_bytes: int) -> None:
    import grpc
    import grpc.aio

    from img_serving.wire.v1 import generation_pb2 as pb

    picture = picture_of(size_bytes)

    async def fetch(request, context):
        return pb.Picture(media_type="image/png", data=picture)

    handler = grpc.unary_unary_rpc_method_handler(
        fetch, pb.GenerateRequest.FromString, lambda reply: reply.SerializeToString()
    )
    big = 256 * 1024 * 1024
    server = grpc.aio.server(options=[("grpc.max_send_message_length", big)])
    service, _, method = METHOD.strip("/").partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextlib.contextmanager
def started(kind: str, size_bytes: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """One of the two servers in a process of its own, and its port."""
    command = [sys.executable, __file__, "--serve", kind, "--bytes", str(size_bytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process
    finally:
        process.terminate()
        process.wait(10)


# ---------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Turn:
    """One turn of one way: microseconds and milliseconds a call."""

    way: str
    at_once: int
    calls: int
    cpu_us: float
    wall_ms: float


def cpu_of(pid: int) -> float:
    """User and system seconds of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def take_turn(way: str, call: Callable[[], Awaitable[None]], pid: int, at_once: int, seconds: float) -> Turn:
    """Call for so long, `at_once` at a time."""
    calls = 0
    began = time.perf_counter()
    before = own_cpu() + cpu_of(pid)

    async def caller() -> None:
        nonlocal calls
        while time.perf_counter() - began < seconds:
            await call()
            calls += 1

    await asyncio.gather(*(caller() for _ in range(at_once)))
    used = own_cpu() + cpu_of(pid) - before
    return Turn(way, at_once, calls, used / calls * 1e6, (time.perf_counter() - began) / calls * 1e3)


async def measure(size_bytes: int, rounds: int, seconds: float, at_once: tuple[int, ...]) -> list[Turn]:
    import grpc
    import grpc.aio

    from img_serving.backends.grpc import GrpcBackend
    from img_serving.engines.engine import call_of
    from img_serving.wire.v1 import generation_pb2 as pb

    expected = len(picture_of(size_bytes))
    with started("bare", size_bytes) as (bare_port, bare_server), started("worker", size_bytes) as (port, worker):
        big = 256 * 1024 * 1024
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{bare_port}", [("grpc.max_receive_message_length", big)])
        fetch = channel.unary_unary(METHOD, pb.GenerateRequest.SerializeToString, pb.Picture.FromString)
        backend = GrpcBackend(f"http://127.0.0.1:{port}")
        while not (await backend.check(5.0)).healthy:  # noqa: ASYNC110 - it says so nowhere else
            await asyncio.sleep(0.05)
        request = pb.GenerateRequest(width=512, height=512, items=[pb.Item(prompt="a fox", seed=1)])
        drawing = call_of("a fox", seed=1)

        async def bare() -> None:
            reply = await fetch(request)
            assert len(reply.data) == expected

        async def hop() -> None:
            (artifact,) = await backend.generate(drawing, lambda _: None)
            assert len(artifact.data) == expected

        ways = (("bare", bare, bare_server.pid), ("hop", hop, worker.pid))
        turns: list[Turn] = []
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("the gRPC hop", total=(rounds + 1) * len(at_once) * 2)
            for round_ in range(rounds + 1):
                for many in at_once:
                    for way, call, pid in ways if round_ % 2 else ways[::-1]:
                        turn = await take_turn(way, call, pid, many, seconds if round_ else seconds / 4)
                        if round_:  # the first one warms up
                            turns.append(turn)
                        bar.advance(task)
        await backend.close()
        await channel.close()
    return turns


# ----------------------------------------------------------------------------------------------------------------- report


def report(turns: list[Turn], size_bytes: int, at_once: tuple[int, ...], console: Console) -> dict[int, float]:
    """Print medians and ratios; the CPU ratio by calls at once."""
    table = Table(title=f"A picture of {size_bytes / 1e6:.1f} MB from a worker to the adapter, beside a bare gRPC call")
    for heading in ("calls at once", "bare: CPU µs", "hop: CPU µs", "hop ÷ bare, CPU", "at most", "hop ÷ bare, time"):
        table.add_column(heading, justify="right")
    found: dict[int, float] = {}
    for many in at_once:
        pairs = [([one for one in turns if one.at_once == many and one.way == way]) for way in ("bare", "hop")]
        cpu = [ours.cpu_us / bare.cpu_us for bare, ours in zip(*pairs, strict=True)]
        wall = [ours.wall_ms / bare.wall_ms for bare, ours in zip(*pairs, strict=True)]
        found[many] = statistics.median(cpu)
        table.add_row(
            str(many),
            *(f"{statistics.median(one.cpu_us for one in turns_):,.0f}" for turns_ in pairs),
            f"{statistics.median(cpu):.2f} [{min(cpu):.2f}–{max(cpu):.2f}]",
            f"{TARGET}" if many == 1 else "",
            f"{statistics.median(wall):.2f}",
        )
    console.print(table)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_500_000, help="size of the picture (default 1.5 MB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    parser.add_argument("--serve", choices=("bare", "worker"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run((serve_worker if args.serve == "worker" else serve_bare)(args.bytes))
        return 0
    from img_serving.transport.allocator import tune_allocator

    tune_allocator()  # as `img-serving serve` does; the bare call gains as well
    at_once = (1, 8)
    turns = uvloop.run(measure(args.bytes, args.rounds, args.seconds, at_once))
    console = Console()
    ratios = report(turns, args.bytes, at_once, console)
    OUT.mkdir(exist_ok=True)
    path = OUT / f"grpc-hop-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps([asdict(turn) for turn in turns], indent=1))
    met = ratios[1] <= TARGET
    console.print(
        f"all figures: {path}; verdict: {ratios[1]:.2f}× a bare call ({'within' if met else 'OVER'} {TARGET}×)"
    )
    return 0 if met or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
