"""How work ends before its time in the fault bench: clients that leave, and a gateway that is told to stop."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults_fleet import Fleet, Server
from faults_gateway import BackendPlan, Gateway, running
from faults_load import Answer, Client, Pending, problem_of

LEAVERS = 20
BATCH_SECONDS = 0.4
_DRAIN_SECONDS = 4.0


@dataclass(frozen=True)
class Finding:
    """One measured fact and what it should have been."""

    name: str
    value: str
    target: str
    met: bool


async def leaving(gateway: Gateway, key: str, hung: Server, shared: Server) -> list[Finding]:
    """Clients that leave: one that is alone with its call, one of two that share a batch, and both of them."""
    client = Client(gateway.port, key, "alone")
    delays = []
    for index in range(LEAVERS):
        pending = await client.send(f"leaver-{index}", seed=index)
        await hung.call_of(pending.request_id)
        await asyncio.sleep(0.05)
        left_at = pending.leave()
        call = await hung.call_of(pending.request_id, over=True)
        delays.append(1e3 * ((call.ended_at or 0.0) - left_at) if call.left else float("inf"))
    median = statistics.median(delays)
    findings = [
        Finding(
            "a client leaves → its upstream call is closed",
            f"{median:.1f} ms median, {max(delays):.1f} ms at most, of {LEAVERS}",
            "median ≤ 100 ms",
            median <= 100,
        ),
        *await _leaving_together(Client(gateway.port, key, "shared"), shared),
    ]
    await asyncio.sleep(1)
    metrics = await gateway.metrics()
    held = {name: metrics.total(name) for name in ("slots_in_use", "batches_running", "queue_depth")}
    told = ", ".join(f"{name} {value:g}" for name, value in held.items())
    trouble, _ = gateway.news()
    trouble += ["internal errors"] if metrics.total("internal_errors_total") else []
    findings.append(
        Finding(
            "after all of them have left", "; ".join([told, *trouble]), "all 0", not (any(held.values()) or trouble)
        )
    )
    return findings


async def _leaving_together(client: Client, server: Server) -> list[Finding]:
    """Two requests with consecutive seeds share a call while the only slot is taken; then one leaves, or both."""
    findings = []
    first, second, call = await _shared_call(client, server, 100)
    first.leave()
    reply = await second.reply()
    second.leave()
    problem = problem_of(reply, 111)
    findings.append(
        Finding(
            "one of two in a batch leaves",
            f"batch of {call.pictures}; the call {'was closed' if call.left else 'went on'}; the other got "
            + (problem or "its picture"),
            "the other gets its picture",
            call.pictures == 2 and not call.left and not problem,
        )
    )
    first, second, call = await _shared_call(client, server, 200)
    first.leave()
    left_at = second.leave()
    call = await server.call_of(first.request_id, over=True)
    took = 1e3 * ((call.ended_at or 0.0) - left_at)
    findings.append(
        Finding(
            "both leave",
            f"batch of {call.pictures}; the call " + (f"was closed after {took:.1f} ms" if call.left else "went on"),
            "≤ 100 ms",
            call.pictures == 2 and call.left and took <= 100,
        )
    )
    return findings


async def _shared_call(client: Client, server: Server, seed: int):
    """Send one request to take the slot and two that wait behind it; returns those two and their common call, just begun."""
    blocker = await client.send(f"shared-{seed}", seed=seed)
    await server.call_of(blocker.request_id)
    waiting: list[Pending] = []
    for index in (10, 11):
        waiting.append(await client.send(f"shared-{seed + index}", seed=seed + index))
        await asyncio.sleep(0.03)
    await blocker.reply()
    blocker.leave()
    call = await server.call_of(waiting[0].request_id)
    await asyncio.sleep(0.05)
    return waiting[0], waiting[1], call


async def stopping(directory: Path, key: str, fleet: Fleet, core: int) -> list[Finding]:
    """SIGTERM with running and waiting work, and a second SIGTERM with work that never ends."""
    slow, hung = await fleet.add([{"latency_seconds": 0.5}, {"sequence": ["hang"]}])
    plan = BackendPlan("stopped", "openai", [slow], max_concurrency=4)
    async with running(directory / "in-order", key, [plan], core=core, drain_seconds=_DRAIN_SECONDS) as gateway:
        answers, ran, seconds, status = await _stopped(gateway, key, slow, 48)
        trouble, _ = gateway.news()
    answered = [answer for answer in answers if answer.status in {200, 503}]
    finished = [answer for answer in answers if answer.request_id in ran and answer.is_right]
    findings = [
        Finding(
            "SIGTERM with 4 running, 44 waiting",
            f"{_tally(answers)}; of {len(ran)} that ran {len(finished)} were finished",
            "all get 200 or 503, those that ran 200",
            len(answered) == len(answers) and len(finished) == len(ran),
        ),
        Finding(
            f"… and the end (drain time {_DRAIN_SECONDS:g} s)",
            "; ".join([f"after {seconds:.2f} s, status {status}", *trouble]),
            f"≤ {_DRAIN_SECONDS + 0.5:g} s, status 0",
            seconds <= _DRAIN_SECONDS + 0.5 and status == 0 and not trouble,
        ),
    ]
    plan = BackendPlan("stopped", "openai", [hung], max_concurrency=4, timeout_ms=60_000)
    async with running(directory / "at-once", key, [plan], core=core) as gateway:
        answers, _, seconds, status = await _stopped(gateway, key, hung, 8, again_after=0.5)
        trouble, _ = gateway.news()
    findings.append(
        Finding(
            "a second SIGTERM, 4 hanging, 4 waiting",
            "; ".join([f"ended after {seconds:.2f} s, status {status}; {_tally(answers)}", *trouble]),
            "< 1 s, status 0",
            seconds < 1 and status == 0 and not trouble,
        )
    )
    return findings


async def _stopped(
    gateway: Gateway, key: str, server: Server, count: int, *, again_after: float | None = None
) -> tuple[Sequence[Answer], set[str], float, int]:
    """Ask `count` times at once and stop the gateway a moment later: the answers, who ran then, how long, what status."""
    client = Client(gateway.port, key, "stopped")
    asked = [asyncio.create_task(client.draw()) for _ in range(count)]
    await asyncio.sleep(0.3)  # the first four are under way, and none of them is done
    ran = {call.request_id for call in server.calls if call.ended_at is None}
    seconds, status = await gateway.stop(again_after=again_after)
    answers = await asyncio.gather(*asked)
    client.close()
    return answers, ran, seconds, status


def _tally(answers: Sequence[Answer]) -> str:
    counts: dict[str, int] = {}
    for answer in answers:
        what = str(answer.status) if answer.status else answer.problem.partition(":")[0]
        counts[what] = counts.get(what, 0) + 1
    return ", ".join(f"{count} × {what}" for what, count in sorted(counts.items()))
