"""The simulator: stands where the dispatcher stands and drives the real scheduler, in virtual time, event by event.

As the dispatcher, it asks for batches after everything that happens. Ten times a second it looks at deadlines and after
endpoints that may be wedged or well again, but only while there could be any. Nothing is simplified on the scheduler's
side: what it decides here for these arrivals, it decides in the gateway.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from math import inf, isnan, nan
from random import Random
from typing import Any, Final

from img_serving.domain.errors import GatewayError
from img_serving.domain.images import Artifact
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job, JobStatus
from img_serving.policy.endpoint import ExclusiveGroup
from img_serving.simulation.faults import CUT, RECOVERY_SECONDS, TIMED_OUT, Fault, FaultPlan
from img_serving.simulation.fleet import SimulatedEndpoint, Terms, endpoint_state, new_scheduler, routes_of
from img_serving.simulation.report import EndpointFigures, Report, Status
from img_serving.simulation.workload import MAX_TASKS, TooMuch, Workload

Watch = Callable[[float], None]
"""Told now and then how far the work is, from 0 to 1."""

TICK_SECONDS: Final = 0.1
"""How often the gateway looks at deadlines, and at whether an endpoint may be used again."""

_SOON_SECONDS: Final = 0.001
"""When a timer goes off that should have long since: no loop is faster."""

_DONE, _ASK, _CHECK, _CUT = range(4)
_PICTURE = Artifact("image/png", 1, 1, None, data=b"")
_ENDS: Final = {
    JobStatus.SUCCEEDED: Status.SUCCEEDED,
    JobStatus.EXPIRED: Status.EXPIRED,
    JobStatus.FAILED: Status.FAILED,
    JobStatus.CANCELLED: Status.FAILED,
}
_PENDING: Final = int(Status.PENDING)
_MOST_FRUITLESS: Final = 200_000
"""Looks in a row at which nobody came and no call ended before the rest is given up: hours of virtual time."""


def simulate(
    fleet: Sequence[SimulatedEndpoint],
    workload: Workload,
    terms: Terms,
    *,
    faults: Iterable[Fault] = (),
    rng: Random,
    watch: Watch | None = None,
) -> Report:
    """Run a workload through a fleet until the last job is resolved.

    `rng` is what the scheduler draws from, and by what faults strike; noise and arrivals are the workload's own, so the
    same task takes the same time on the same endpoint whatever the strategy.

    Raises:
        GatewayError: no endpoint could ever serve one of the workload's kinds.
        ValueError: a fault is of an endpoint that there is not.
        TooMuch: clients ask for more than is simulated at a time.
    """
    return _Run(fleet, workload, terms, faults, rng).to_the_end(watch)


class _Run:
    """One simulation under way."""

    def __init__(
        self,
        fleet: Sequence[SimulatedEndpoint],
        workload: Workload,
        terms: Terms,
        faults: Iterable[Fault],
        rng: Random,
    ) -> None:
        self._fleet = tuple(fleet)
        self._workload = workload
        self._terms = terms
        self._rng = rng
        self._faults = FaultPlan(self._fleet, faults)
        self._requests = [kind.request() for kind in workload.kinds]
        self._costs = [kind.cost for kind in workload.kinds]
        self._routes = routes_of(self._fleet, self._requests, terms.routing)
        self._scheduler = new_scheduler(terms, rng)
        groups: dict[str, ExclusiveGroup] = {}
        self._states = [endpoint_state(number, one, terms, rng, groups) for number, one in enumerate(self._fleet)]
        for state in self._states:
            self._scheduler.add_endpoint(state)
        senders = workload.senders
        self._report = Report(
            strategy=terms.strategy,
            tenants=tuple(sender.tenant.name for sender in senders),
            weights=tuple(sender.tenant.weight for sender in senders),
            endpoints=[EndpointFigures(endpoint.name, endpoint.slots) for endpoint in self._fleet],
            served_while_all_wait=[0.0] * len(senders),
        )
        # By job, beside the report's columns: its kind, and the place of its first picture in the columns of pictures.
        self._kind = array("H")
        self._first = array("L")
        # By picture: its noise, and whether it was ever begun. Jobs of clients add theirs at the end as they come.
        self._noise = array("d", workload.noise)
        self._begun = bytearray(len(workload.noise))
        self._arrived_images = 0
        self._waiting = [0] * len(senders)
        """By sender: pictures that were never begun."""
        self._idle_senders = len(senders)
        """Senders of whom nothing waits: while there are none, what is served tells how fair that is."""
        self._loaded: list[str | None] = [None] * len(self._fleet)
        self._running: dict[Batch, None] = {}
        self._stopped: set[Batch] = set()
        """Batches that ended before their time: their event is to be skipped."""
        self._events: list[tuple[float, int, int, Any]] = []
        self._number = 0
        self._oldest = 0
        self._clients: dict[int, int] = {}
        """Which client waits for which job."""
        seed = workload.client_seed
        # what one client asks for must not depend on when the others are answered
        self._client_rngs = [Random(seed + place) for place in range(len(workload.clients))]  # noqa: S311 - no secret
        self._asked = [0] * len(workload.clients)
        self._flaky = self._faults.any or any(endpoint.timeout_seconds is not None for endpoint in self._fleet)
        self._hedges = terms.retry.hedge_after_factor is not None and any(endpoint.cheap for endpoint in self._fleet)
        self._restless_until = 0.0
        """Some call failed lately: endpoints may come back without anything else happening."""
        self._ok: list[Ended] = [
            Ended(results=(_PICTURE,) * size) for size in range(max(one.max_batch_size for one in self._fleet) + 1)
        ]

    # the loop

    def to_the_end(self, watch: Watch | None) -> Report:
        """Event after event."""
        self._prepare()
        events = self._events
        arrivals = self._workload.at
        count = len(arrivals)
        samples = self._report.samples
        scheduler = self._scheduler
        arrived = fruitless = steps = 0
        next_arrival = arrivals[0] if count else inf
        timer = inf
        now = 0.0
        while True:
            steps += 1
            if watch is not None and not steps & 4095:
                watch(self._share_done(count, now))
            next_event = events[0][0] if events else inf
            fruitless += 1
            if next_arrival < next_event and next_arrival <= timer:
                now = next_arrival
                self._submit(self._workload.sender[arrived], self._workload.kind[arrived], now)
                arrived += 1
                next_arrival = arrivals[arrived] if arrived < count else inf
                fruitless = 0
            elif next_event <= timer:
                if next_event == inf:
                    break
                now, _, what, about = heappop(events)
                self._handle(what, about, now)
                if what == _DONE:
                    fruitless = 0
            else:
                now = timer
                self._look(now)
            for batch in scheduler.next_batches(now):
                self._start(batch, now)
            if fruitless > _MOST_FRUITLESS:
                break
            timer = self._next_look(now)
            if now >= samples.next_at:
                samples.take(now, scheduler.queued, scheduler.running)
        samples.take(now, scheduler.queued, scheduler.running)
        return self._report

    def _prepare(self) -> None:
        for place, client in enumerate(self._workload.clients):
            self._push(client.start, _ASK, place)
        for at, number in self._faults.cuts():
            self._push(at, _CUT, number)
        for number in range(len(self._fleet)):
            if self._faults.troubled(number):
                self._push(0.0, _CHECK, number)

    def _share_done(self, count: int, now: float) -> float:
        shares = [(self._report.jobs - self._scheduler.queued) / count] if count else []
        shares += [
            self._asked[place] / client.count if client.count else now / (client.until or inf)
            for place, client in enumerate(self._workload.clients)
        ]
        return max(0.0, min(shares, default=1.0))

    def _handle(self, what: int, about: Any, now: float) -> None:
        if what == _DONE:
            batch, ended = about
            if self._stopped and batch in self._stopped:
                self._stopped.remove(batch)
            else:
                self._finish(batch, ended, now)
        elif what == _ASK:
            self._ask(about, now)
        elif what == _CHECK:
            self._check(about, now)
        else:
            for batch in [one for one in self._running if one.endpoint_id == about]:
                self._stop(batch, CUT, now)

    def _push(self, at: float, what: int, about: Any) -> None:
        self._number += 1
        heappush(self._events, (at, self._number, what, about))

    def _next_look(self, now: float) -> float:
        """When to ask the scheduler again although nothing happens until then."""
        scheduler = self._scheduler
        wake = scheduler.wakes_at(now)
        timer = inf if wake is None else wake
        if (
            (self._flaky or self._hedges)
            and now + TICK_SECONDS < timer
            and (scheduler.queued or scheduler.running)
            and (self._hedges or now < self._restless_until or self._faults.in_effect(now))
        ):
            timer = now + TICK_SECONDS
        terms = self._terms
        if terms.deadline_seconds is not None or terms.max_wait_seconds is not None:
            timer = min(timer, max(self._next_deadline(), now + TICK_SECONDS))
        return timer if timer > now else now + _SOON_SECONDS

    def _next_deadline(self) -> float:
        """The first moment at which a job that is not resolved could be late."""
        status = self._report.status
        oldest, jobs = self._oldest, len(status)
        while oldest < jobs and status[oldest] != _PENDING:
            oldest += 1
        self._oldest = oldest
        if oldest == jobs:
            return inf
        terms = self._terms
        first = self._report.submitted[oldest] + terms.patience
        if terms.max_wait_seconds is not None:
            started = self._report.started
            for place in range(oldest, jobs):
                if status[place] == _PENDING and isnan(started[place]):
                    return min(first, self._report.submitted[place] + terms.max_wait_seconds)
        return first

    # a job's life

    def _submit(self, sender: int, kind: int, now: float) -> int:
        report = self._report
        place = len(report.status)
        request = self._requests[kind]
        count = request.n
        first = self._arrived_images
        self._arrived_images = first + count
        report.tenant.append(sender)
        report.status.append(_PENDING)
        report.submitted.append(now)
        report.started.append(nan)
        report.finished.append(nan)
        self._kind.append(kind)
        self._first.append(first)
        job = Job(
            str(place),
            request,
            self._routes[kind],
            self._workload.senders[sender].tenant,
            now,
            now + self._terms.patience,
        )
        try:
            self._scheduler.submit(job)
        except GatewayError as refusal:
            code = refusal.code or type(refusal).__name__
            report.refusals[code] = report.refusals.get(code, 0) + 1
            report.status[place] = Status.REFUSED
            report.finished[place] = now
            report.last_second = now
            return place
        if not self._waiting[sender]:
            self._idle_senders -= 1
        self._waiting[sender] += count
        return place

    def _start(self, batch: Batch, now: float) -> None:
        tasks = batch.tasks
        size = len(tasks)
        number = batch.endpoint_id
        endpoint = self._fleet[number]
        head = tasks[0]
        place = int(head.job.id)
        cost = self._costs[self._kind[place]] * size
        self._begin(batch, cost, now)
        figures = self._report.endpoints[number]
        figures.calls += 1
        figures.images += size
        # The whole call is as fast or slow as its first picture would have been alone.
        seconds = endpoint.seconds_of(cost) * self._noise[self._first[place] + head.index]
        if endpoint.load_seconds and self._loaded[number] != batch.model:
            self._loaded[number] = batch.model
            figures.model_loads += 1
            seconds += endpoint.load_seconds
        ended = self._ok[size]
        if self._flaky:
            seconds, failed = self._faults.ending(number, endpoint, seconds, now, self._rng)
            if endpoint.timeout_seconds is not None and seconds > endpoint.timeout_seconds:
                seconds, failed = endpoint.timeout_seconds, TIMED_OUT
            if failed is not None:
                ended = failed
        self._running[batch] = None
        self._number += 1
        heappush(self._events, (now + seconds, self._number, _DONE, (batch, ended)))

    def _begin(self, batch: Batch, cost: float, now: float) -> None:
        """Note who was begun, and for whom while all were waiting."""
        report = self._report
        all_wait = not self._idle_senders
        each = cost / len(batch.tasks)
        for task in batch.tasks:
            place = int(task.job.id)
            picture = self._first[place] + task.index
            if self._begun[picture]:
                continue
            self._begun[picture] = 1
            sender = report.tenant[place]
            self._no_longer_waits(sender)
            if all_wait:
                report.served_while_all_wait[sender] += each
                report.images_while_all_wait += 1
            if isnan(report.started[place]):
                report.started[place] = now

    def _no_longer_waits(self, sender: int) -> None:
        self._waiting[sender] -= 1
        if not self._waiting[sender]:
            self._idle_senders += 1

    def _finish(self, batch: Batch, ended: Ended, now: float) -> None:
        del self._running[batch]
        figures = self._report.endpoints[batch.endpoint_id]
        figures.busy_seconds += now - batch.started_at
        if ended.results is None and not ended.is_cancelled:
            figures.failures += 1
            self._restless_until = now + RECOVERY_SECONDS
        self._settle(self._scheduler.finish(batch, ended, now), now)

    def _settle(self, jobs: list[Job], now: float) -> None:
        """Note what was resolved; calls that nobody wants any more are closed."""
        report = self._report
        for job in jobs:
            place = int(job.id)
            report.finished[place] = now
            report.last_second = now
            report.status[place] = _ENDS[job.status]
            if job.status is JobStatus.SUCCEEDED:
                report.images += len(job.tasks)
                # a job and its tasks hold each other: let go here, a million of them need no garbage collector
                job.tasks = []
            else:
                self._forget_waiting(place, len(job.tasks))
            if self._clients:
                self._answer(place, now)
        for batch in self._scheduler.unwanted():
            self._stop(batch, CANCELLED, now)

    def _forget_waiting(self, place: int, count: int) -> None:
        first = self._first[place]
        for picture in range(first, first + count):
            if not self._begun[picture]:
                self._begun[picture] = 1
                self._no_longer_waits(self._report.tenant[place])

    def _stop(self, batch: Batch, ended: Ended, now: float) -> None:
        """A call ends before its time."""
        if batch in self._running:
            self._stopped.add(batch)
            self._finish(batch, ended, now)

    def _look(self, now: float) -> None:
        """What the gateway does ten times a second."""
        if self._flaky or self._hedges:
            for batch in self._scheduler.look_after(now):
                self._start(batch, now)
        terms = self._terms
        if terms.deadline_seconds is not None or terms.max_wait_seconds is not None:
            self._settle(self._scheduler.expire(now), now)

    # clients, and health checks

    def _ask(self, place: int, now: float) -> None:
        client = self._workload.clients[place]
        if (client.count is not None and self._asked[place] >= client.count) or (
            client.until is not None and now >= client.until
        ):
            return
        if len(self._noise) >= MAX_TASKS:
            raise TooMuch(f"clients ask for more than the {MAX_TASKS:,} pictures that one simulation takes")
        self._asked[place] += 1
        rng = self._client_rngs[place]
        kind = self._workload.draw_kind(client.sender, rng)
        # pictures of clients have their columns behind those of the arrivals that are still to come
        arrived, self._arrived_images = self._arrived_images, len(self._noise)
        for _ in range(self._requests[kind].n):
            self._noise.append(self._workload.noise_of_clients.draw(rng))
            self._begun.append(0)
        job = self._submit(client.sender, kind, now)
        self._arrived_images = arrived
        if self._report.status[job] == Status.REFUSED:
            self._push(now + max(1.0, client.think_seconds), _ASK, place)
        else:
            self._clients[job] = place

    def _answer(self, job: int, now: float) -> None:
        place = self._clients.pop(job, None)
        if place is not None:
            self._push(now + self._workload.clients[place].think_seconds, _ASK, place)

    def _check(self, number: int, now: float) -> None:
        """One health check, and the next one while there is anything to be checked for."""
        well = self._faults.answers(number, now)
        self._scheduler.set_endpoint_state(number, now, healthy=well, detail="" if well else "no answer")
        if self._is_over():
            return
        self._push(now + self._states[number].health.next_check_in(self._rng), _CHECK, number)

    def _is_over(self) -> bool:
        """Whether nothing is left to come: health checks alone must not keep a simulation going."""
        more = len(self._report.status) < len(self._workload.at) or self._scheduler.queued or self._running
        return not more and not any(what == _ASK for _, _, what, _ in self._events)
