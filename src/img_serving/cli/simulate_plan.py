"""What the options of `simulate` amount to: fleet, workload, terms and strategies, run one by one, and what is to be said."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

from img_serving.cli.configuration import read_configuration
from img_serving.cli.endings import MISUSED, CommandFailed, printable
from img_serving.cli.simulate_specs import (
    SpecFault,
    fleet_of,
    misused,
    read_faults,
    read_fleet,
    read_mix,
    read_noise,
    read_speeds,
    read_tenants,
    seconds_of,
)
from img_serving.cli.simulate_trace import read_trace
from img_serving.config import Config
from img_serving.config.problems import instead_of
from img_serving.domain.errors import GatewayError, QueueFull
from img_serving.domain.jobs import Route
from img_serving.domain.tenants import Tenant
from img_serving.gateway.options import breaker_options, routing_options, scheduler_options
from img_serving.policy.balancing import STRATEGIES
from img_serving.policy.circuit_breaker import BreakerOptions
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.routing import RoutingOptions
from img_serving.simulation import (
    EARLY_RULES,
    Kind,
    Noise,
    Report,
    SimulatedEndpoint,
    Status,
    Terms,
    TooMuch,
    Workload,
    burst,
    load_of,
    poisson,
    routes_of,
    simulate,
    simulate_early,
    trace,
)

ARRIVALS_FOR_A_RATE: Final = 20
"""A recording of fewer arrivals has no rate that could be too high."""

IMAGES_FOR_FAIRNESS: Final = 50
"""Pictures a tenant, begun while all wait, from which on shares can be told from luck."""

ALL: Final = (*STRATEGIES, *EARLY_RULES)


def _check_one_load(args: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("rate", "load", "burst", "trace") if getattr(args, name) is not None]
    if len(given) > 1:
        raise CommandFailed(f"{' and '.join(given)} both say how much is asked for: give one of them", MISUSED)
    if args.plot is not None and Path(args.plot).suffix.lower() != ".png":
        raise CommandFailed(f"--plot {printable(args.plot)!r}: the name must end in .png", MISUSED)


class Plan:
    """What the options amount to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.seed: int = args.seed
        self._said: list[str] = []
        _check_one_load(args)
        config = self._config(args)
        self.fleet = self._fleet(args, config)
        self.terms = self._terms(args, config)
        known = {} if config is None else {key.name: key.tenant() for key in config.auth.key_list()}
        noise = read_noise(args.noise)
        duration = self._time("--duration", args.duration)
        self._duration = 3600.0 if duration is None else duration
        if not self._duration:
            raise CommandFailed("--duration must be above 0", MISUSED)
        if args.trace is not None and (args.mix is not None or args.tenants is not None or duration is not None):
            raise CommandFailed(
                "--trace says who asks for what and when: leave --mix, --tenants and --duration out", MISUSED
            )
        try:
            self.workload = self._workload(args, known, noise, duration)
        except ValueError as error:  # more than one simulation takes
            raise CommandFailed(f"{error}: ask for less", MISUSED) from None
        except GatewayError as error:
            raise CommandFailed(f"no endpoint could serve the mix: {error.message}", MISUSED) from None
        self.faults = read_faults(args.fail, self.fleet)
        self.strategies = self._strategies(args, config)

    # reading

    @staticmethod
    def _config(args: argparse.Namespace) -> Config | None:
        if args.config is not None and args.endpoint:
            raise CommandFailed("--config and --endpoint both say what the fleet is: give one of them", MISUSED)
        if args.config is None and not args.endpoint:
            raise CommandFailed(
                "say what the fleet is: --endpoint gpu:speed=10,count=2, or --config FILE with --speed NAME=10", MISUSED
            )
        if args.config is None and args.speed:
            raise CommandFailed("--speed goes with --config; with --endpoint write NAME:speed=…", MISUSED)
        return read_configuration(args.config).config if args.config is not None else None

    def _fleet(self, args: argparse.Namespace, config: Config | None) -> list[SimulatedEndpoint]:
        if config is None:
            return read_fleet(args.endpoint)
        fleet = fleet_of(config)
        speeds = read_speeds(args.speed, fleet)
        unknown = sorted({one.group for one in fleet if one.name not in speeds and one.group not in speeds})
        if unknown:
            self._said.append(
                f"no --speed for {', '.join(unknown)}: taken to be {fleet[0].speed:g} megapixel-steps a second"
            )
        timed = []
        for endpoint in fleet:
            speed, overhead = speeds.get(endpoint.name) or speeds.get(endpoint.group) or (endpoint.speed, 0.0)
            timed.append(replace(endpoint, speed=speed, overhead_seconds=overhead))
        return timed

    def _terms(self, args: argparse.Namespace, config: Config | None) -> Terms:
        deadline = self._time("--deadline", args.deadline)
        max_wait = self._time("--max-wait", args.max_wait)
        if max_wait == 0:
            raise CommandFailed("--max-wait must be above 0; leave it out for no bound", MISUSED)
        if config is None:
            base, patience, breaker, routing = SchedulerOptions(), 600.0, BreakerOptions(), RoutingOptions()
        else:
            base, patience = scheduler_options(config), config.queue.request_timeout_seconds
            breaker, routing = breaker_options(config), routing_options(config)
        retry = base.retry if args.max_attempts is None else replace(base.retry, max_attempts=args.max_attempts)
        return Terms(
            base=base,
            max_tasks=args.queue or base.max_tasks,
            deadline_seconds=(patience if deadline is None else deadline) or None,
            max_wait_seconds=base.max_wait_seconds if max_wait is None else max_wait,
            retry=retry,
            breaker=breaker,
            routing=routing,
        )

    @staticmethod
    def _time(option: str, text: str | None) -> float | None:
        if text is None:
            return None
        try:
            return seconds_of(text)
        except SpecFault as fault:
            raise misused(option, text, fault) from None

    def _workload(
        self, args: argparse.Namespace, known: dict[str, Tenant], noise: Noise, duration: float | None
    ) -> Workload:
        rng = Random(self.seed)  # noqa: S311 - a seed that gives the same again is the point
        self.rate: float | None = None
        if args.trace is not None:
            read = read_trace(args.trace, known)
            self._what = f"{len(read.arrivals):,} requests of {args.trace}"
            return self._routed(trace(read.kinds, read.arrivals, senders=read.senders, noise=noise, rng=rng))
        kinds = read_mix(args.mix or "1024x1024x30")
        # a burst has no end of its own, so nobody else may go on for ever beside it
        until = duration if args.burst is not None else self._duration
        senders, clients = read_tenants(args.tenants, known, until)
        waiting = f"{len(clients):,} client{'' if len(clients) == 1 else 's'} that wait for their answers"
        if args.burst is None and args.rate is None and args.load is None:
            if not clients or any(sender.share for sender in senders):
                raise CommandFailed("say how much is asked for: --rate, --load, --burst or --trace", MISUSED)
            self._what = f"{waiting}, for {self._duration:g} s"
            empty = Workload(kinds, senders, clients=clients, noise_of_clients=noise, client_seed=rng.getrandbits(64))
            return self._routed(empty)
        if not any(sender.share for sender in senders):
            raise CommandFailed("every tenant has clients and none has a share of the arrivals: name one more", MISUSED)
        if args.burst is not None:
            load = burst(kinds, args.burst, senders=senders, noise=noise, rng=rng)
            self._what = f"{args.burst:,} requests at once"
        else:
            routes = routes_of(self.fleet, [kind.request() for kind in kinds], self.terms.routing)
            self.rate = args.rate if args.rate is not None else args.load / self._unit_load(kinds, routes)
            if not self.rate:
                raise CommandFailed("--rate and --load must be above 0", MISUSED)
            load = poisson(kinds, self.rate, seconds=self._duration, senders=senders, noise=noise, rng=rng)
            self._what = f"{self.rate:.4g} requests/s for {self._duration:g} s ({len(load.at):,} requests)"
        if clients:
            self._what += f", and {waiting}"
        return self._routed(replace(load, clients=clients))

    def _routed(self, load: Workload) -> Workload:
        """The same, once it is sure that every kind has an endpoint.

        Raises:
            CommandFailed: the mix leaves open which model is meant.
            GatewayError: nobody has a model.
        """
        named = sorted({model for endpoint in self.fleet for model in endpoint.models})
        if named and any(kind.model is None for kind in load.kinds) and self.terms.routing.default_backend is None:
            self._said.append(
                f"requests without a model go to the backend {self.fleet[0].group} alone, as in the gateway; "
                f"@MODEL in the mix names one ({', '.join(named[:5])})"
            )
        routes_of(self.fleet, [kind.request() for kind in load.kinds], self.terms.routing)
        return load

    def _unit_load(self, kinds: Sequence[Kind], routes: Sequence[Route]) -> float:
        """The share of the fleet that one request a second takes."""
        total = sum(kind.weight for kind in kinds)
        return load_of(self.fleet, kinds, routes, [kind.weight / total for kind in kinds]).utilisation

    def _strategies(self, args: argparse.Namespace, config: Config | None) -> list[str]:
        default = config.routing.strategy if config is not None else "least_work"
        names = [name.strip() for name in (args.strategy or default).split(",")]
        refusal = self._why_not_early()
        if names == ["all"]:
            if refusal is not None:
                self._said.append(f"{', '.join(EARLY_RULES)} are left out: they know no {refusal}")
            return [*STRATEGIES, *(EARLY_RULES if refusal is None else ())]
        for name in names:
            if name not in ALL:
                raise CommandFailed(
                    f"--strategy: there is no strategy {printable(name[:60])!r}: {instead_of(name, (*ALL, 'all'))}",
                    MISUSED,
                )
            if name in EARLY_RULES and refusal is not None:
                raise CommandFailed(f"--strategy {name} knows no {refusal}: leave them or it out", MISUSED)
        return list(dict.fromkeys(names))

    def _why_not_early(self) -> str | None:
        if self.faults or any(endpoint.timeout_seconds is not None for endpoint in self.fleet):
            return "faults and time-outs"
        if any(endpoint.max_batch_size > 1 for endpoint in self.fleet):
            return "batches"
        if self.workload.clients:
            return "clients that wait for their answers"
        if any(endpoint.models or endpoint.tier for endpoint in self.fleet):
            return "models and tiers"
        return None

    # running

    def simulate(self, strategy: str, watch: Callable[[float], None]) -> Report:
        """One strategy."""
        if strategy in EARLY_RULES:
            report = simulate_early(self.fleet, self.workload, strategy)
            watch(1.0)
            return report
        rng = Random(self.seed)  # noqa: S311 - as above
        terms = replace(self.terms, strategy=strategy)  # type: ignore[arg-type]
        try:
            return simulate(self.fleet, self.workload, terms, faults=self.faults, rng=rng, watch=watch)
        except TooMuch as error:
            raise CommandFailed(f"{error}: ask for less, or let them think for longer", MISUSED) from None

    # telling

    def title(self) -> str:
        """The fleet and the load, in a line."""
        slots = sum(endpoint.slots for endpoint in self.fleet)
        count = len(self.fleet)
        return printable(
            f"{count} endpoint{'' if count == 1 else 's'} ({slots} slot{'' if slots == 1 else 's'}), {self._what}"
        )

    def utilisation(self) -> float | None:
        """How much of what the fleet can do the arrivals ask for; None where they have no rate."""
        load = self.workload
        span = load.at[-1] - load.at[0] if len(load.at) > 1 else 0.0
        if self.rate is None and (span <= 0 or load.clients):
            return None
        if self.rate is not None:
            rates = self._rates()
        else:
            counts = [0] * len(load.kinds)
            for kind in load.kind:
                counts[kind] += 1
            rates = [count / span for count in counts]
        routes = routes_of(self.fleet, [kind.request() for kind in load.kinds], self.terms.routing)
        found = load_of(self.fleet, load.kinds, routes, rates)
        self._bottleneck = found.bottleneck
        return found.utilisation

    def _rates(self) -> list[float]:
        total = sum(kind.weight for kind in self.workload.kinds)
        return [(self.rate or 0.0) * kind.weight / total for kind in self.workload.kinds]

    def notes(self, reports: list[Report]) -> list[str]:
        """What should not be overlooked."""
        notes = list(self._said)
        asked = self.utilisation()
        if self.rate is None and len(self.workload.at) < ARRIVALS_FOR_A_RATE:
            asked = None
        if asked is not None and asked >= 1:
            where = "the fleet" if len(self._bottleneck) == len(self.fleet) else ", ".join(self._bottleneck[:8])
            notes.insert(
                0,
                f"arrivals exceed what {where} can do: utilisation {asked:.0%}; the queue grows without bound, "
                "until requests are refused or expire. The figures depend on how long it goes on",
            )
        elif asked is not None and asked > 0.95:
            notes.insert(0, f"utilisation {asked:.0%}: this close to the limit, waits are long and depend on luck")
        elif asked is not None:
            others = "; clients come on top" if self.workload.clients else ""
            notes.append(f"the arrivals are {asked:.0%} of what the fleet can do{others}")
        for code in sorted({code for report in reports for code in report.refusals}):
            most = max(report.refusals.get(code, 0) for report in reports)
            reason = f"{self.terms.max_tasks:,} tasks may wait (--queue)" if code == QueueFull.default_code else code
            notes.append(f"up to {most:,} requests were refused as they came: {reason.replace('_', ' ')}")
        expired = max(report.count(Status.EXPIRED) for report in reports)
        if expired:
            limit = self.terms.max_wait_seconds or self.terms.deadline_seconds or 0.0
            notes.append(
                f"up to {expired:,} requests waited too long and expired (after {limit:g} s): --deadline, --max-wait"
            )
        failed = max(report.count(Status.FAILED) for report in reports)
        if failed:
            notes.append(f"up to {failed:,} requests failed: their attempts were used up, or nobody was left to try")
        tenants = len(self.workload.senders)
        together = min((one.images_while_all_wait for one in reports if one.strategy in STRATEGIES), default=0)
        if tenants > 1 and together < IMAGES_FOR_FAIRNESS * tenants:
            notes.append(
                f"only {together:,} pictures were begun while all tenants had something waiting: the fairness index says little"
            )
        return [printable(note) for note in notes]

    def plain(self, reports: list[Report], notes: list[str]) -> dict[str, Any]:
        """All of it for JSON."""
        asked = self.utilisation()
        return {
            "seed": self.seed,
            "endpoints": len(self.fleet),
            "slots": sum(endpoint.slots for endpoint in self.fleet),
            "load": {
                "what": self._what,
                "requests_per_second": self.rate,
                "utilisation": None if asked is None else round(asked, 6),
            },
            "notes": notes,
            "results": [report.plain() for report in reports],
        }
