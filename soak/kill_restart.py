"""Kill the real gateway under load, again and again, start it on the same port and data, and see whether anything is lost.

It judges: the exit status is 0 when every target is met, 1 when one is missed or something went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kill_checks import (
    Settled,
    disk_findings,
    hooked,
    job_findings,
    jobs_of,
    key_findings,
    picture_findings,
    settle,
    settled,
    upstream_findings,
    webhook_findings,
)
from load import WAYS, Clients
from programs import Gateway, Upstreams, backend, head_of_config, new_key, serving, upstreams
from receiver import Receiver, secret_text
from report import OUT, Finding, console_of, percentile, progress, report, to_an_end
from rich.console import Console

PAID = "paid"
SERVERS = {"free-1": (0.05, 0.4), "free-2": (0.05, 0.4), PAID: (0.05, 0.4)}
MODELS = {"free": 2.0, PAID: 1.0}
# Every fifth kill hits a gateway that has not come up yet, and is about to take up what the one before left.
_EARLY_EVERY = 5
_SETTLE_SECONDS, _WEBHOOK_SECONDS = 60.0, 90.0


@dataclass
class Kills:
    """What was done to the gateway."""

    gaps_seconds: list[float] = field(default_factory=list)
    early: int = 0
    ready_seconds: list[float] = field(default_factory=list)
    drawing: list[int] = field(default_factory=list)
    """Pictures that were being drawn upstream at each kill: one that interrupts nothing proves nothing."""


def configuration(key: str, ports: dict[str, int], secret: bytes) -> str:
    """Two backends that may draw twice, and one where somebody pays."""
    head = head_of_config(
        key,
        "[queue]",
        "max_tasks = 5000",
        "[webhooks]",
        f'secret = "{secret_text(secret)}"',
        "allow_private_addresses = true",
    )
    backends = [
        backend(name, ports[name], ["free"], max_concurrency=4, retry_unknown=True) for name in ("free-1", "free-2")
    ]
    paid = backend(PAID, ports[PAID], [PAID], max_concurrency=4, api_key="sk-upstream")
    return "\n".join([head, *backends, paid])


async def kill_again_and_again(
    gateway: Gateway, upstream: Upstreams, options: argparse.Namespace, rng: random.Random, say: Callable[[str], None]
) -> Kills:
    """Kill and start as often as asked; it is up and ready at the end."""
    kills = Kills()
    is_ready = True
    for number in range(1, options.kills + 1):
        gap = rng.uniform(0.2, options.gap)
        say(f"kill {number} of {options.kills}")
        await asyncio.sleep(gap)
        kills.gaps_seconds.append(round(gap, 3))
        kills.early += not is_ready
        kills.drawing.append(upstream.drawing)
        await gateway.kill()
        begun = time.monotonic()
        await gateway.spawn()
        is_ready = number == options.kills or number % _EARLY_EVERY != _EARLY_EVERY - 2
        if is_ready:
            await gateway.ready()
            kills.ready_seconds.append(round(time.monotonic() - begun, 3))
    return kills


async def soak(
    options: argparse.Namespace, directory: Path, say: Callable[[str], None]
) -> tuple[list[Finding], dict[str, object]]:
    """One whole run: the findings, and figures for the file."""
    rng = random.Random(options.seed)
    key, secret = new_key(), secrets.token_bytes(32)
    begun = time.monotonic()
    async with (
        asyncio.timeout(options.seconds),
        upstreams(SERVERS, options.seed) as upstream,
        Receiver(secret, options.failing, 1 if options.quick else 2, random.Random(options.seed)) as receiver,
        serving(directory / "gateway", configuration(key, upstream.ports, secret), key) as gateway,
    ):
        receiver_url = f"http://127.0.0.1:{receiver.port}/hook"
        clients = Clients(gateway.caller, receiver_url, MODELS, rng, f"s{options.seed}")
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(clients.run(options.clients))
            kills = await kill_again_and_again(gateway, upstream, options, rng, say)
            await asyncio.sleep(1)
            clients.stopping.set()
            say("the clients come to an end")
            await loading
        say("what is under way comes to an end")
        listed = await settle(gateway.caller, upstream, _SETTLE_SECONDS)
        say("every job is asked for, every key replayed")
        world = await settled(gateway.caller, clients.orders, listed)
        say("webhooks")
        waited = await webhooks_delivered(world, receiver)
        replayed = len(await jobs_of(gateway.caller)) - len(listed)
        status = await gateway.stop()
        say("looking at the disk")
        findings = [
            *kill_findings(kills, clients, status),
            *job_findings(world),
            *key_findings(world),
            Finding("jobs that replays made", str(replayed), "0", replayed == 0),
            *upstream_findings(world, upstream.said, PAID),
            *picture_findings(world, gateway.pictures),
            *webhook_findings(world, receiver),
            *disk_findings(world, gateway),
        ]
    figures = {
        "seed": options.seed,
        "clients": options.clients,
        "took_seconds": round(time.monotonic() - begun, 1),
        "webhooks_waited_seconds": round(waited, 1),
        "deliveries": len(receiver.deliveries),
        "jobs": {status: sum(one["status"] == status for one in world.records.values()) for status in statuses(world)},
        "ways": {way: sum(one.way == way and one.is_accepted for one in clients.orders) for way in WAYS},
        "kills": asdict(kills),
    }
    return findings, figures


def statuses(world: Settled) -> list[str]:
    return sorted({str(one["status"]) for one in world.records.values()})


async def webhooks_delivered(world: Settled, receiver: Receiver) -> float:
    """Wait until each has come, or patience ends; the seconds that took."""
    wanted = {str(one["id"]) for one in hooked(world.records.values())}
    begun = time.monotonic()
    with suppress(TimeoutError):
        async with asyncio.timeout(_WEBHOOK_SECONDS):
            while not wanted <= receiver.delivered():  # noqa: ASYNC110 - it is asked seldom, and never long
                await asyncio.sleep(0.2)
    waited = time.monotonic() - begun
    await asyncio.sleep(0.5)  # a second delivery of the last ones would be on its way now
    return waited


def kill_findings(kills: Kills, clients: Clients, status: int) -> list[Finding]:
    """What was done, so that nobody takes a run for a proof that interrupted nothing."""
    busy = sum(drawing > 0 for drawing in kills.drawing)
    ready = f"p50 {percentile(kills.ready_seconds, 0.5):.2f} s, at most {max(kills.ready_seconds):.2f} s"
    orders, unanswered = len(clients.orders), clients.unanswered
    enough = 2 * busy >= len(kills.drawing)
    return [
        Finding(
            "kills, with pictures being drawn",
            f"{len(kills.drawing)}, {busy}; {kills.early} before it was up",
            "half",
            enough,
        ),
        Finding("from a start to ready", ready, "told"),
        Finding(
            "asked for; calls that a kill cut or refused; polls",
            f"{orders:,}; {unanswered:,}; {clients.polls:,}",
            "told",
        ),
        Finding("exit status at SIGTERM", str(status), "0", status == 0),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="default 50")
    parser.add_argument(
        "--gap", type=float, default=3.0, help="most seconds between two kills (default 3; at least 0.2)"
    )
    parser.add_argument("--clients", type=int, default=16, help="default 16")
    parser.add_argument("--failing", type=float, default=0.1, help="share of webhooks that get a 500 (default 0.1)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of all chance; default: any")
    parser.add_argument("--seconds", type=float, default=600.0, help="give up after so long (default 600)")
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON file goes (default soak/out)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and leave everything: log, data, pictures")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kills = 8
    if not 1 <= options.kills <= 1000 or not 0.2 < options.gap <= 60 or not 1 <= options.clients <= 100:
        parser.error("--kills is 1 to 1000, --gap more than 0.2 and at most 60, --clients 1 to 100")
    if not 0 <= options.failing <= 0.5:
        parser.error("--failing is 0 to 0.5")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    console.print(f"seed {options.seed}: {options.kills} kills, {options.clients} clients")

    async def all_of_it(directory: Path) -> tuple[list[Finding], dict[str, object]]:
        with progress(options.kills * (options.gap / 2 + 1.5) + 15) as say:
            return await soak(options, directory, say)

    with tempfile.TemporaryDirectory(prefix="img-serving-soak-") as name:
        findings, figures = asyncio.run(all_of_it(options.keep or Path(name)))
    return report(console, "kill_restart", findings, figures, out=options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = console_of()
    return to_an_end(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
