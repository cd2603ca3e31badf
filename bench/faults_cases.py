"""The faults themselves: what is done to which servers under load, and what the gateway made of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from faults_fleet import Server, UpstreamCall, calls_since
from faults_gateway import Gateway, Metrics
from faults_load import Answer, Client, percentile

Act = Callable[[Sequence[Server]], AbstractAsyncContextManager[None]]

MOST_CALLS_A_REQUEST = 1.05
# A breaker takes some failures to open: in a shorter case they alone are more than one call in twenty.
CALLS_JUDGED_FROM_SECONDS = 30.0
# The gateway's pool for one endpoint (img_serving.transport.http).
_MOST_IDLE = 64
_QUIET_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_TOLD_ERRORS = 10


# --------------------------------------------------------------------------------------------------------------- faults


@contextlib.asynccontextmanager
async def nothing(servers: Sequence[Server]) -> AsyncIterator[None]:
    yield


@contextlib.asynccontextmanager
async def kill(servers: Sequence[Server]) -> AsyncIterator[None]:
    for server in servers:
        server.shoot()
    for server in servers:
        await server.kill()
    yield
    for server in servers:
        await server.start()


@contextlib.asynccontextmanager
async def hang(servers: Sequence[Server]) -> AsyncIterator[None]:
    """The first server answers health checks and nothing else; the others are stopped as a whole."""
    await servers[0].follow(sequence=["hang"])
    for server in servers[1:]:
        server.freeze()
    yield
    for server in servers[1:]:
        server.thaw()
    await servers[0].follow()


@contextlib.asynccontextmanager
async def shut(servers: Sequence[Server]) -> AsyncIterator[None]:
    for server in servers:
        await server.shut()
    yield
    for server in servers:
        await server.open()


@contextlib.asynccontextmanager
async def flap(servers: Sequence[Server]) -> AsyncIterator[None]:
    async def forever() -> None:
        while True:
            for server in servers:
                await server.shut()
            await asyncio.sleep(1)
            for server in servers:
                await server.open()
            await asyncio.sleep(1)

    flapping = asyncio.create_task(forever())
    yield
    flapping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flapping
    for server in servers:
        await server.shut()
        await server.open()


def scripted(**script: object) -> Act:
    @contextlib.asynccontextmanager
    async def act(servers: Sequence[Server]) -> AsyncIterator[None]:
        for server in servers:
            await server.follow(**script)
        yield
        for server in servers:
            await server.follow()

    return act


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with some servers for a part of the time; `begins` and `ends` are shares of it."""

    name: str
    text: str
    act: Act
    servers: int = 2
    begins: float = 0.15
    ends: float = 0.6


FAULTS = (
    Fault("kill", "SIGKILL, later started again", kill),
    Fault("hang", "accepts, never answers", hang),
    Fault("500s", "answers 500", scripted(sequence=["500"])),
    Fault("slow", "answers after 1 s, in drips", scripted(sequence=["drip"], latency_seconds=1.0, drip_seconds=0.01)),
    Fault("truncated", "half of a picture's base64", scripted(sequence=["truncated_base64"])),
    Fault("length", "Content-Length too long, then closed", scripted(sequence=["long_length"])),
    Fault("refused", "nobody listens", shut),
    Fault("flapping", "1 s up, 1 s down", flap),
    Fault("nine", "9 of 10 killed", kill, servers=9, ends=1.0),
)
HEALTHY = Fault("none", "all is well", nothing, servers=0)


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass
class CaseFigures:
    """What one case came to. Seconds `out_after` and `back_after` are None where that did not happen, or was not seen."""

    name: str
    text: str
    seconds: float
    requests: int = 0
    errors: int = 0
    errors_before_out: int = 0
    upstream_calls: int = 0
    gateway_attempts: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    """What the gateway's log says of attempts that went wrong, and how often."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    p99_fault_ms: float = 0.0
    out_after: float | None = None
    back_after: float | None = None
    sockets: str = ""
    leaks: list[str] = field(default_factory=list)
    told_errors: list[dict[str, object]] = field(default_factory=list)

    @property
    def calls_per_request(self) -> float:
        return self.upstream_calls / max(1, self.requests)

    @property
    def attempts_per_request(self) -> float:
        return self.gateway_attempts / max(1, self.requests)

    @property
    def misses(self) -> list[str]:
        """Targets that were not reached, in words."""
        found = []
        # Of nine dead servers only what comes after their breakers have opened is held against the gateway.
        errors = self.errors - self.errors_before_out if self.name == "nine" else self.errors
        if self.name == "nine" and self.out_after is None:
            found.append("the dead endpoints were never all out of use")
        if errors:
            found.append(f"{errors} errors")
        if self.seconds >= CALLS_JUDGED_FROM_SECONDS:
            for what, value in (("calls", self.calls_per_request), ("attempts", self.attempts_per_request)):
                if value > MOST_CALLS_A_REQUEST:
                    found.append(f"{value:.3f} {what} a request")
        return found + self.leaks


@dataclass
class Stage:
    """What the cases share: the gateway, its fleet, and how it is loaded."""

    gateway: Gateway
    servers: Sequence[Server]
    client: Client
    per_second: float
    ports: Sequence[int]
    other_files: int = 0
    """Open files of the gateway besides its connections, when all was well."""

    async def settle(self, limit_seconds: float) -> bool:
        """Ask a little until every endpoint is in use again, so that a case begins with a whole fleet."""
        deadline = time.monotonic() + limit_seconds
        while not _all_in_use(await self.gateway.metrics(), self.servers):
            if time.monotonic() > deadline:
                return False
            await self.client.load(10, 20.0)
        return True


async def run_case(stage: Stage, fault: Fault, first: int, seconds: float) -> CaseFigures:
    """Load the gateway for some seconds while the fault comes and goes; `first` is the number of the first server it hits."""
    count = len(stage.servers)
    targets = [stage.servers[(first + index) % count] for index in range(fault.servers)]
    before = await stage.gateway.metrics()
    begun = time.monotonic()
    load = asyncio.create_task(stage.client.load(round(stage.per_second * seconds), stage.per_second))
    watch = _Watch(stage, targets)
    watching = asyncio.create_task(watch.look())
    try:
        await asyncio.sleep(fault.begins * seconds)
        watch.fault_began = time.monotonic()
        async with fault.act(targets):
            await asyncio.sleep((fault.ends - fault.begins) * seconds)
            if fault.ends >= 1:
                await load
            else:
                watch.fault_ended = time.monotonic()
        answers = await load
    finally:
        for task in (load, watching):
            task.cancel()
        await asyncio.gather(load, watching, return_exceptions=True)
    stage.client.close()
    await asyncio.sleep(_QUIET_SECONDS)
    after = await stage.gateway.metrics()
    calls = calls_since(stage.servers, begun)
    figures = CaseFigures(fault.name, fault.text, seconds, requests=len(answers), upstream_calls=len(calls))
    figures.gateway_attempts = round(
        after.total("attempts_total", backend="fleet") - before.total("attempts_total", backend="fleet")
    )
    _judge_answers(figures, answers, watch)
    trouble, figures.outcomes = stage.gateway.news()
    figures.leaks = await _leaks(stage, after, figures) + trouble
    internal = after.total("internal_errors_total") - before.total("internal_errors_total")
    figures.leaks += [f"{internal:g} internal errors"] if internal else []
    figures.told_errors = _timelines(stage, answers, calls, watch)
    return figures


class _Watch:
    """Looks at the gateway's own view of the endpoints that are hit: when they went out of use, and when they were back."""

    def __init__(self, stage: Stage, targets: Sequence[Server]) -> None:
        self._stage = stage
        self._targets = targets
        self.fault_began = float("inf")
        self.fault_ended = float("inf")
        self.out_at: float | None = None
        self.back_at: float | None = None

    async def look(self) -> None:
        while self._targets:
            await asyncio.sleep(_LOOK_SECONDS)
            metrics = await self._stage.gateway.metrics()
            now = time.monotonic()
            if now > self.fault_began and self.out_at is None:
                if not any(_is_in_use(metrics, server) for server in self._targets):
                    self.out_at = now
            elif now > self.fault_ended and self.back_at is None and _all_in_use(metrics, self._targets):
                self.back_at = now


def _is_in_use(metrics: Metrics, server: Server) -> bool:
    return bool(metrics.of_endpoint("endpoint_usable", server.url)) and not metrics.of_endpoint(
        "breaker_state", server.url
    )


def _all_in_use(metrics: Metrics, servers: Sequence[Server]) -> bool:
    return all(_is_in_use(metrics, server) for server in servers)


def _judge_answers(figures: CaseFigures, answers: Sequence[Answer], watch: _Watch) -> None:
    wrong = [answer for answer in answers if not answer.is_right]
    figures.errors = len(wrong)
    out_at = watch.out_at if watch.out_at is not None else float("inf")
    figures.errors_before_out = sum(answer.due_at < out_at for answer in wrong)
    took = [answer.seconds * 1e3 for answer in answers]
    during = [answer.seconds * 1e3 for answer in answers if watch.fault_began <= answer.due_at < watch.fault_ended]
    figures.p50_ms, figures.p99_ms = percentile(took, 0.5), percentile(took, 0.99)
    figures.p99_fault_ms = percentile(during, 0.99)
    if watch.out_at is not None:
        figures.out_after = watch.out_at - watch.fault_began
        if watch.back_at is not None:
            figures.back_after = watch.back_at - watch.fault_ended


async def _leaks(stage: Stage, metrics: Metrics, figures: CaseFigures) -> list[str]:
    """What is still held by a gateway that has nothing to do."""
    found = [
        f"{name} {metrics.total(name):g}"
        for name in ("slots_in_use", "batches_running", "queue_depth")
        if metrics.total(name)
    ]
    sockets = stage.gateway.sockets(stage.ports)
    for _ in range(10):
        if not sockets.clients and not sockets.left_open and sockets.other <= stage.other_files:
            break
        await asyncio.sleep(0.1)  # a health check, or our own question, may be on its way
        sockets = stage.gateway.sockets(stage.ports)
    figures.sockets = str(sockets)
    if sockets.clients:
        found.append(f"{sockets.clients} client sockets")
    if sockets.left_open:
        found.append(f"{sockets.left_open} sockets that their peer has closed")
    if sockets.other > stage.other_files:
        found.append(f"{sockets.other - stage.other_files} more open files than at the start")
    for server in stage.servers:
        # what was ever needed at once may be kept, and one more for health checks
        most = min(_MOST_IDLE, _most_at_once(server.calls)) + 1
        if sockets.upstream.get(server.port, 0) > most:
            found.append(
                f"{sockets.upstream[server.port]} sockets to server {server.number}, of which {most} explained"
            )
    return found


def _most_at_once(calls: Sequence[UpstreamCall]) -> int:
    moments = [(call.started_at, 1) for call in calls]
    moments += [(call.ended_at, -1) for call in calls if call.ended_at is not None]
    now = most = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most


def _timelines(
    stage: Stage, answers: Sequence[Answer], calls: Sequence[UpstreamCall], watch: _Watch
) -> list[dict[str, object]]:
    """What became of the first requests that went wrong, as their client, the servers and the gateway's log saw it."""
    wrong = [answer for answer in answers if not answer.is_right][:_TOLD_ERRORS]
    if not wrong:
        return []
    log = stage.gateway.lines_of({answer.request_id for answer in wrong})
    return [
        {
            "request": answer.request_id,
            "seconds_after_fault": round(answer.due_at - watch.fault_began, 2),
            "status": answer.status,
            "problem": answer.problem,
            "took_seconds": round(answer.seconds, 2),
            "attempts": answer.attempts,
            "upstream": [
                f"+{call.started_at - answer.due_at:.2f} s {call}"
                for call in calls
                if call.request_id == answer.request_id
            ],
            "log": log.get(answer.request_id, []),
        }
        for answer in wrong
    ]
