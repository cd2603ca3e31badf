"""`img-serving simulate`: what a fleet would do under a load, in virtual time, decided by the gateway's own scheduler."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from img_serving.cli.endings import OK, CommandFailed, say
from img_serving.cli.usage import Commands, number, whole

if TYPE_CHECKING:
    from img_serving.cli.simulate_plan import Plan
    from img_serving.simulation import Report

DESCRIPTION = """\
Answer "what if?" before buying hardware: how long do people wait, how busy is each endpoint, what happens when one is down?
The decisions are those of the gateway's own scheduler; only the drawing is imagined, in virtual time, so an hour of traffic
takes a second.

A call of b pictures takes   overhead + b x cost / speed   seconds, give or take the noise. The cost of a picture is width x
height x steps in megapixels, doubled for guidance: 1024x1024 at 30 steps is 63. A speed of 10 draws that in 6.3 seconds.
To find the speed of an endpoint: 63 / the seconds it takes for that picture.
"""

EPILOG = """\
ENDPOINT  NAME:KEY=VALUE,…      speed (10, megapixel-steps/s of each slot), slots (1), batch (1, pictures a call),
                                overhead (0, s a call), count (1, how many alike), weight (1), tier (0), timeout (none, s),
                                linger (0, ms), models (A+B), load (0, s to switch models), shape (items, seeds, request),
                                group (those of one share a GPU), cheap (0; 1 = may be hedged)
MIX       1024x1024x30*4@sdxl:2 width x height x steps * images @model :weight; several with commas
TENANTS   a:weight=2,share=3,b  weight, share (of the arrivals), priority, running (at most), clients (so many, each sends
                                the next request when the last is answered), think (s between)
FAULT     fast@60-120:down      down, fail, hang, errors=SHARE, slow=FACTOR; seconds from-to, without "to" for good
TRACE     CSV with a head, or JSON lines: seconds, size, steps, n, tenant, priority, model (only seconds is a must)
STRATEGY  one of the gateway's, or what binds a job to an endpoint as it comes, as a reverse proxy does: early_round_robin,
          early_least_connections; reference also does, but knows every speed exactly. "all" is all of these

examples:
  img-serving simulate --endpoint a100:speed=40,count=2 --endpoint t4:speed=4,count=6 --load 0.9
  img-serving simulate --endpoint a:speed=20 --endpoint b:speed=5 --rate 0.3 --strategy all --plot strategies.png
  img-serving simulate --endpoint gpu:speed=20,batch=4,overhead=1.5,count=3 --burst 400 --mix 512x512x20:3,1024x1024x30
  img-serving simulate --endpoint gpu:count=4 --load 0.7 --tenants "shop:weight=3,lab,app:clients=5" --duration 2h
  img-serving simulate --endpoint a --endpoint b --rate 0.2 --fail a@600-900:hang --fail b@0-:errors=0.05
  img-serving simulate --config production.toml --speed sd=12+0.8 --speed hosted=60 --trace yesterday.csv
"""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser(
        "simulate", help="plan capacity: what would a fleet do?", description=DESCRIPTION, epilog=EPILOG
    )
    fleet = parser.add_argument_group("the fleet")
    fleet.add_argument("--endpoint", action="append", metavar="ENDPOINT", help="one endpoint; repeat for more")
    fleet.add_argument("--config", metavar="FILE", help="or: backends, queue and retry of a gateway's configuration")
    fleet.add_argument(
        "--speed",
        action="append",
        default=[],
        metavar="NAME=S[+O]",
        help="with --config: speed (and overhead) of a backend or endpoint",
    )
    load = parser.add_argument_group("the load (one of the first four)")
    load.add_argument("--rate", type=number, metavar="R", help="requests a second, by chance")
    load.add_argument(
        "--load", type=number, metavar="L", help="the same as a share of what the fleet can do, such as 0.9"
    )
    load.add_argument("--burst", type=whole(1, 2_000_000), metavar="N", help="so many requests at once")
    load.add_argument("--trace", metavar="FILE", help="requests as they were recorded")
    load.add_argument("--duration", metavar="TIME", help="for how long they come: 600, 10m, 2h (default 1h)")
    load.add_argument("--mix", metavar="MIX", help="what is asked for (default 1024x1024x30)")
    load.add_argument("--tenants", metavar="TENANTS", help="who asks (default: one)")
    load.add_argument(
        "--noise", default="0.2", metavar="NOISE", help="of durations: 0.2, lognormal:0.3, none (default 0.2)"
    )
    load.add_argument("--fail", action="append", default=[], metavar="FAULT", help="what goes wrong; repeat for more")
    policy = parser.add_argument_group("the gateway")
    policy.add_argument(
        "--strategy", metavar="S,…", help="one, several, or all (default: of the configuration, else least_work)"
    )
    policy.add_argument("--queue", type=whole(1), metavar="N", help="tasks that may wait (default 1000)")
    policy.add_argument("--deadline", metavar="TIME", help="a job's deadline from its arrival; 0 = none (default 600)")
    policy.add_argument("--max-wait", metavar="TIME", help="longest wait for a slot (default: the deadline)")
    policy.add_argument("--max-attempts", type=whole(1, 100), metavar="N", help="attempts a task (default 3)")
    shown = parser.add_argument_group("the output")
    shown.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="another one, other luck (default 0)"
    )
    shown.add_argument("--json", action="store_true", help="the figures as JSON")
    shown.add_argument("--plot", metavar="FILE", help="draw latency and queue into a .png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate and show.

    Raises:
        CommandFailed: something that was said cannot be.
    """
    from img_serving.cli.progress import progress
    from img_serving.cli.simulate_plan import Plan

    plan = Plan(args)
    reports: list[Report] = []
    with progress("simulating", quiet=args.json, measured=True) as watch:
        for strategy in plan.strategies:

            def show_share(done: float) -> None:
                watch((len(reports) + done) / len(plan.strategies))

            reports.append(plan.simulate(strategy, show_share))
    notes = plan.notes(reports)
    if args.plot is not None:
        _plot(Path(args.plot), plan, reports)
    if args.json:
        print(json.dumps(plan.plain(reports, notes), ensure_ascii=False, indent=2, allow_nan=False))
        return OK

    from rich.console import Console

    from img_serving.cli.simulate_report import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut or folded for a file or a pipe
    console.print(plan.title(), style="bold", markup=False, soft_wrap=True)
    show(console, plan.fleet, reports)
    if notes:
        console.print()
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if args.plot is not None:
        say(f"drawn into {args.plot}")
    return OK


def _plot(path: Path, plan: Plan, reports: list[Report]) -> None:
    from img_serving.cli.simulate_report import plot

    try:
        plot(path, plan.title(), reports)
    except OSError as error:
        raise CommandFailed(f"--plot: {path} cannot be written: {error.strerror or error}") from error
