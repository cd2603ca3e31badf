"""One generation of 310 s, in real time, through everything that gives up sooner: Node's fetch, idle proxies, cutting ones.

It judges: the exit status is 0 when every target is met, 1 when one is missed or something went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calls import Arriving, Caller, NoAnswer, Reply, connected, request_bytes
from programs import Gateway, Said, SoakError, Upstreams, backend, head_of_config, new_key, serving, upstreams
from proxies import Proxy
from report import OUT, Finding, console_of, none_of, progress, report, to_an_end
from rich.console import Console

from img_serving.backends.scripted import picture

MODEL, SIDE = "slow", 32
ROUTE = "/v1/images/generations"
FULL_SECONDS, QUICK_SECONDS = 310.0, 24.0
# What the world has, for a generation of 310 s; all of it shrinks with the generation, but for Node's own limit.
BLANK_SECONDS, LEAST_IDLE_SECONDS = 15.0, 17.0  # blanks and comments come so often, however short the generation is
KEEPALIVE_SECONDS, IDLE_SECONDS, CUT_SECONDS, NODE_SECONDS = 50.0, 60.0, 100.0, 300.0
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """The lengths of a run, in seconds."""

    seconds: float

    @property
    def share(self) -> float:
        return self.seconds / FULL_SECONDS

    @property
    def keepalive(self) -> float:
        return round(KEEPALIVE_SECONDS * self.share, 3)

    @property
    def idle(self) -> float:
        return max(LEAST_IDLE_SECONDS, IDLE_SECONDS * self.share)

    @property
    def cut(self) -> float:
        return CUT_SECONDS * self.share

    @property
    def patience(self) -> float:
        return self.seconds + 60


@dataclass(frozen=True)
class Came:
    """What one client got: when the first byte, when the whole, which picture; or why not."""

    status: int
    first_seconds: float
    seconds: float
    picture: str
    error: str = ""

    def is_right(self, tag: str) -> bool:
        return self.status == 200 and base64.b64decode(self.picture) == picture(tag, 1, SIDE, SIDE)

    def __str__(self) -> str:
        if self.error:
            return f"{self.error} after {self.seconds:.1f} s"
        first = f", head after {self.first_seconds:.1f} s" if self.first_seconds else ""
        return f"{self.status} after {self.seconds:.1f} s{first}"


def body_of(tag: str, **more: object) -> dict[str, Any]:
    return {"model": MODEL, "prompt": tag, "size": f"{SIDE}x{SIDE}", "response_format": "b64_json", **more}


def came_of(reply: Reply) -> Came:
    """Raises nothing: an answer of another shape has no picture."""
    try:
        drawn = reply.json["data"][0]["b64_json"]
    except (ValueError, LookupError, TypeError):
        return Came(reply.status, reply.first_seconds, reply.seconds, "", f"no picture in {reply}")
    return Came(reply.status, reply.first_seconds, reply.seconds, drawn)


# -------------------------------------------------------------------------------------------------------------- clients


async def with_program(words: Sequence[str], port: int, key: str, tag: str) -> Came:
    """A client in a process of its own, which ends with us."""
    process = await asyncio.create_subprocess_exec(
        *words, f"http://127.0.0.1:{port}", key, MODEL, tag, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        said, _ = await process.communicate()
        return Came(**json.loads(said))
    except ValueError:
        raise SoakError(f"{words[0]} ended with status {process.returncode} and said {said[:300]!r}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def plainly(caller: Caller, tag: str) -> Came:
    """One POST, and every byte of the answer."""
    begun = time.monotonic()
    try:
        return came_of(await caller.post(ROUTE, body_of(tag)))
    except NoAnswer as error:
        return Came(0, 0, time.monotonic() - begun, "", str(error))


async def streaming(caller: Caller, tag: str) -> tuple[Came, int]:
    """A streaming request: what its last event held, and how many comments came before."""
    begun = time.monotonic()
    try:
        reply = await caller.post(ROUTE, body_of(tag, stream=True))
    except NoAnswer as error:
        return Came(0, 0, time.monotonic() - begun, "", str(error)), 0
    lines = reply.body.decode().split("\n")
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    comments = sum(line.startswith(":") for line in lines)
    if kinds != ["image_generation.completed"] or not reply.body.endswith(b"\n\n"):
        return Came(reply.status, reply.first_seconds, reply.seconds, "", f"a stream of {kinds}: {reply}"), comments
    return Came(reply.status, reply.first_seconds, reply.seconds, events[0]["b64_json"]), comments


@dataclass(frozen=True)
class Fetched:
    """What became of a request that was cut: how it was cut, and the same result in three ways."""

    cut: str
    cut_after: float
    repeated: Reply
    job: dict[str, Any]
    replayed: Reply


async def cut_and_fetched(through: Caller, straight: Caller, tag: str) -> Fetched:
    """Ask with a key through a proxy that cuts, then fetch the result: by the key again, by the list, and once more.

    Raises:
        SoakError: it was not cut, or the job is not found.
        NoAnswer: an answer did not come although nothing cuts it.
    """
    begun = time.monotonic()
    try:
        reply = await through.post(ROUTE, body_of(tag), Idempotency_Key=tag)
        raise SoakError(f"the proxy should have cut, but {reply}")
    except NoAnswer as error:
        why, after = str(error), time.monotonic() - begun
    async with asyncio.TaskGroup() as tasks:
        repeating = tasks.create_task(straight.post(ROUTE, body_of(tag), Idempotency_Key=tag))
        looking = tasks.create_task(found_by_key(straight, tag))
    return Fetched(
        why, after, repeating.result(), looking.result(), await straight.post(ROUTE, body_of(tag), Idempotency_Key=tag)
    )


async def found_by_key(caller: Caller, tag: str) -> dict[str, Any]:
    """The finished job of a key. Raises SoakError where there is not exactly one."""
    while True:
        listed = (await caller.get(f"/v1/jobs?idempotency_key={tag}")).json.get("data", ())
        if len(listed) != 1:
            raise SoakError(f"GET /v1/jobs?idempotency_key={tag} finds {len(listed)} jobs")
        if listed[0]["status"] not in {"queued", "running"}:
            return dict((await caller.get(f"/v1/jobs/{listed[0]['id']}")).json)
        await asyncio.sleep(0.5)


async def blanks(caller: Caller, tag: str) -> list[float]:
    """When each piece of a plain answer arrived, in seconds: the head, every blank, and the document."""
    begun = time.monotonic()
    document = json.dumps(body_of(tag)).encode()
    headers = {"Authorization": f"Bearer {caller.key}", "Content-Type": "application/json", "Connection": "close"}
    arriving, times = Arriving(), []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(caller.patience_seconds), connected(caller.port) as (reader, writer):
            writer.write(request_bytes("POST", ROUTE, headers, document))
            while not arriving.is_complete and (data := await reader.read(64 * 1024)):
                arriving.parser.feed_data(data)
                times.append(round(time.monotonic() - begun, 2))
    return times


# ----------------------------------------------------------------------------------------------------------------- soak


def configuration(key: str, port: int, keepalive_seconds: float) -> str:
    head = head_of_config(key, "[server]", f"keepalive_after_seconds = {keepalive_seconds:g}")
    return head + backend(MODEL, port, [MODEL], timeout_ms=600_000, max_concurrency=64)


@contextlib.asynccontextmanager
async def stage(plan: Plan, directory: Path) -> AsyncIterator[tuple[Upstreams, Gateway, Gateway]]:
    """The slow server, the gateway, and one with the keep-alive off: what breaks there, the keep-alive prevents here."""
    key = new_key()
    async with (
        upstreams({MODEL: (plan.seconds, plan.seconds)}, 1) as upstream,
        serving(directory / "gateway", configuration(key, upstream.ports[MODEL], plan.keepalive), key) as gateway,
        serving(directory / "silent", configuration(key, upstream.ports[MODEL], 0), key) as silent,
    ):
        yield upstream, gateway, silent


async def soak(plan: Plan, directory: Path, say: Callable[[str], None]) -> tuple[list[Finding], dict[str, object]]:
    """Everybody at the same time; the findings, and figures for the file."""
    node = shutil.which("node")
    async with (
        asyncio.timeout(plan.patience + 30),
        stage(plan, directory) as (upstream, gateway, silent),
        Proxy(gateway.port, idle_seconds=plan.idle) as idle,
        Proxy(silent.port, idle_seconds=plan.idle) as idle_silent,
        Proxy(gateway.port, most_seconds=plan.cut) as cutting,
    ):
        straight = replace(gateway.caller, patience_seconds=plan.patience)
        through = replace(straight, port=idle.port)
        say(f"a generation of {plan.seconds:g} s for everybody")
        async with asyncio.TaskGroup() as tasks:
            fetch = [node or "", str(_HERE / "ask_fetch.mjs")]
            with_openai = [sys.executable, str(_HERE / "ask_openai.py")]
            a = tasks.create_task(with_program(fetch, gateway.port, gateway.key, "a")) if node else None
            b = tasks.create_task(plainly(through, "b"))
            c = tasks.create_task(with_program(with_openai, gateway.port, gateway.key, "c"))
            d = tasks.create_task(cut_and_fetched(replace(straight, port=cutting.port), straight, "d"))
            e = tasks.create_task(streaming(through, "e"))
            pieces = tasks.create_task(blanks(straight, "pieces"))
            silent_b = tasks.create_task(plainly(replace(through, port=idle_silent.port), "silent b"))
            wanted = node and plan.seconds > NODE_SECONDS
            silent_a = tasks.create_task(with_program(fetch, silent.port, silent.key, "silent a")) if wanted else None
        streamed, comments = e.result()
        findings = [
            arrived("a: Node's fetch (gives up 300 s without a head)", "a", a.result())
            if a is not None
            else Finding("a: Node's fetch", "no Node on this machine", "told"),
            arrived(f"b: through a proxy that cuts after {plan.idle:.3g} s without a byte", "b", b.result()),
            arrived("c: the official Python client", "c", c.result()),
            *fetched(plan, d.result()),
            arrived(f"e: streaming, through the proxy of b, {comments} comments", "e", streamed),
            broken("without the keep-alive: b", silent_b.result()),
            broken("without the keep-alive: a", silent_a.result())
            if silent_a is not None
            else Finding("without the keep-alive: a", "needs --seconds of more than 300, and Node", "told"),
            paced(plan, pieces.result()),
            *once_each(upstream.said, ["a", "b", "c", "d", "e"] if a is not None else ["b", "c", "d", "e"]),
            none_of("bad lines in the log", [*gateway.trouble(), *silent.trouble()], "all"),
            Finding("exit status at SIGTERM", str(status := await gateway.stop()), "0", status == 0),
        ]
    clients = {
        name: asdict(each.result()) for name, each in (("b", b), ("c", c), ("without the keep-alive: b", silent_b))
    }
    return findings, {"plan": asdict(plan), "pieces_seconds": pieces.result(), "clients": clients}


def arrived(name: str, tag: str, came: Came) -> Finding:
    """The very picture, whole."""
    return Finding(name, str(came), "its picture", came.is_right(tag), [] if came.is_right(tag) else [str(came)])


def paced(plan: Plan, times: Sequence[float]) -> Finding:
    """The head when it is due, and never a longer pause than between two blanks."""
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    head, longest = times[0] if times else 0.0, max(pauses, default=plan.seconds)
    target = f"{plan.keepalive:.3g} s, ≤ {BLANK_SECONDS:g} s"
    is_right = abs(head - plan.keepalive) < 1 and longest < BLANK_SECONDS + 1 and times[-1] >= plan.seconds
    return Finding("a plain answer: its head, its longest pause", f"{head:.1f} s, {longest:.1f} s", target, is_right)


def broken(name: str, came: Came) -> Finding:
    """What shows that the test can fail."""
    return Finding(name, str(came), "cut", not came.picture)


def fetched(plan: Plan, found: Fetched) -> list[Finding]:
    """Cut, and yet nothing lost: the same result by the key, by the list, and by the key once more."""
    came = came_of(found.repeated)
    same = found.replayed.body.strip() == found.repeated.body.strip()
    is_marked = found.replayed.headers.get("idempotent-replayed") == "true"
    result = found.job.get("result")
    by_list = bool(came.picture) and result == json.loads(found.repeated.body)
    soon = found.replayed.seconds < 2
    return [
        Finding(
            "d: through a proxy that cuts", f"{found.cut} after {found.cut_after:.1f} s", f"{plan.cut:.3g} s", True
        ),
        arrived("d: the same request again, with its Idempotency-Key", "d", came),
        Finding("d: GET /v1/jobs?idempotency_key=", str(found.job.get("status")), "the same result", by_list),
        Finding(
            "d: and once more",
            f"{'the same body' if same else str(found.replayed)} after {found.replayed.seconds:.2f} s",
            "the same body, marked as replayed, at once",
            same and is_marked and soon,
        ),
    ]


def once_each(said: Sequence[Said], tags: Sequence[str]) -> list[Finding]:
    """Each was drawn once, whatever its client went through."""
    drawn = {tag: sum(one.pictures for one in said if one.event == "drawn" and one.tag == tag) for tag in tags}
    asked = {tag: sum(one.event == "asked" and one.tag == tag for one in said) for tag in tags}
    wrong = [
        f"{tag}: asked {asked[tag]} times, drew {drawn[tag]}" for tag in tags if (asked[tag], drawn[tag]) != (1, 1)
    ]
    return [none_of("requests that were not drawn exactly once", wrong, str(len(tags)))]


# -------------------------------------------------------------------------------------------------------------- program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="of the generation (default 310)")
    parser.add_argument("--quick", action="store_true", help="24 s, and nothing that takes Node's 300 s")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON file goes (default soak/out)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = QUICK_SECONDS
    if not 20 <= options.seconds <= 580:
        parser.error("--seconds is 20 to 580")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    plan = Plan(options.seconds)

    async def all_of_it(directory: Path) -> tuple[list[Finding], dict[str, object]]:
        with progress(plan.seconds + 5) as say:
            return await soak(plan, directory, say)

    with tempfile.TemporaryDirectory(prefix="img-serving-soak-") as name:
        findings, figures = asyncio.run(all_of_it(Path(name)))
    return report(console, "long_generation", findings, figures, out=options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = console_of()
    return to_an_end(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
