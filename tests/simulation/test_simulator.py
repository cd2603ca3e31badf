"""The simulator: that it drives the gateway's own scheduler, and that time, faults and figures are as they would be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from img_serving.domain.jobs import Batch
from img_serving.domain.tenants import Tenant
from img_serving.policy.balancing import STRATEGIES, Strategy
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.retry import RetryOptions
from img_serving.policy.scheduler import Scheduler
from img_serving.simulation import (
    Arrival,
    Client,
    Fault,
    Kind,
    Noise,
    Report,
    Sender,
    SimulatedEndpoint,
    Status,
    Terms,
    TooMuch,
    Workload,
    burst,
    poisson,
    simulate,
    trace,
)

UNIT = Kind(1000, 1000, 5)  # 10 megapixel-steps
STILL = Noise("none")
ONE = SimulatedEndpoint("one")  # 1 s a picture


def arriving(*times: float, kind: Kind = UNIT) -> Workload:
    return trace((kind,), [Arrival(at, 0) for at in times], noise=STILL, rng=Random(1))


def run(fleet: SimulatedEndpoint | Sequence[SimulatedEndpoint], load: Workload, **options: Any) -> Report:
    faults = options.pop("faults", ())
    fleet = [fleet] if isinstance(fleet, SimulatedEndpoint) else fleet
    return simulate(fleet, load, Terms(**options), faults=faults, rng=Random(1))


def statuses(report: Report) -> list[Status]:
    return [Status(one) for one in report.status]


# the scheduler is the real one


def test_every_decision_is_the_real_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("submit", "next_batches", "finish"):
        real = getattr(Scheduler, name)

        def spy(self: Scheduler, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            assert type(self) is Scheduler
            called.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Scheduler, name, spy)
    run(ONE, arriving(0))
    assert called == ["submit", "next_batches", "finish", "next_batches"]


def test_a_schedule_that_is_never_made_leaves_the_jobs_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "next_batches", lambda *_: [])
    assert statuses(run(ONE, arriving(0))) == [Status.PENDING]


def test_it_asks_again_when_the_scheduler_wants_to_be_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Scheduler.next_batches

    def lingering(self: Scheduler, now: float) -> list[Batch]:
        return real(self, now) if now >= 3 else []

    monkeypatch.setattr(Scheduler, "next_batches", lingering)
    monkeypatch.setattr(Scheduler, "wakes_at", lambda self, now: 3.0)
    report = run(ONE, arriving(0))
    assert (list(report.started), list(report.finished)) == ([3], [4])


def test_a_scheduler_that_wants_to_be_woken_for_nothing_cannot_keep_it_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img_serving.simulation.simulator._MOST_FRUITLESS", 1000)
    monkeypatch.setattr(Scheduler, "next_batches", lambda *_: [])
    monkeypatch.setattr(Scheduler, "wakes_at", lambda _, now: 0.0)
    assert statuses(run(ONE, arriving(0))) == [Status.PENDING]


# time


def test_jobs_wait_in_line_and_take_the_time_of_their_cost() -> None:
    report = run(ONE, arriving(0, 0.5, 0.5, 9))
    assert list(report.started) == pytest.approx([0, 1, 2, 9])
    assert list(report.finished) == pytest.approx([1, 2, 3, 10])
    assert list(report.waits()) == pytest.approx([0, 0.5, 1.5, 0])
    assert list(report.latencies()) == pytest.approx([1, 1.5, 2.5, 1])
    assert (report.makespan, report.images, report.calls) == (10, 4, 4)
    assert report.utilisation == pytest.approx(0.4)


def test_a_job_of_several_pictures_is_done_with_its_last() -> None:
    report = run(SimulatedEndpoint("two", slots=2), arriving(0, kind=Kind(1000, 1000, 5, images=3)))
    assert (report.images, report.calls, list(report.finished)) == (3, 3, [2])


def test_tasks_that_travel_together_share_the_overhead() -> None:
    one = SimulatedEndpoint("one", overhead_seconds=2, max_batch_size=4)
    report = run(one, arriving(*[0.0] * 9))
    assert [round(end) for end in report.finished] == [3, 9, 9, 9, 9, 15, 15, 15, 15]
    assert report.calls == 3
    assert report.mean_batch == 3


def test_another_model_takes_the_time_to_load_it() -> None:
    kinds = (Kind(1000, 1000, 5, model="a"), Kind(1000, 1000, 5, model="b"))
    load = trace(kinds, [Arrival(0, 0), Arrival(20, 0), Arrival(40, 1), Arrival(60, 0)], noise=STILL, rng=Random(1))
    report = run(SimulatedEndpoint("one", models=("a", "b"), load_seconds=5), load)
    assert list(report.latencies()) == pytest.approx([6, 1, 6, 6])
    assert report.endpoints[0].model_loads == 3


def test_noise_is_the_tasks_own_whatever_the_strategy() -> None:
    load = poisson((UNIT,), 1e-6, count=50, rng=Random(1))  # nobody ever waits
    pair = (ONE, SimulatedEndpoint("two"))
    taken = [list(run(pair, load, strategy=strategy).latencies()) for strategy in STRATEGIES]
    assert all(one == pytest.approx(list(load.noise)) for one in taken)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_seed_gives_the_same_report_again(strategy: Strategy) -> None:
    fleet = [SimulatedEndpoint(f"e{place}", speed=4 + place, max_batch_size=3) for place in range(3)]

    def once() -> dict[str, Any]:
        load = poisson((UNIT, Kind(images=2)), 2, count=200, rng=Random(5))
        faults = (Fault("e0", 10, 30, "down"), Fault("e1", 5, 90, "errors", 0.2))
        return run(fleet, load, strategy=strategy, faults=faults, deadline_seconds=60, max_tasks=100).plain()

    assert once() == once()


# limits


def test_what_does_not_fit_in_the_queue_is_refused() -> None:
    report = run(ONE, arriving(0, 0, 0, 0, 0), max_tasks=2)
    assert statuses(report).count(Status.REFUSED) == 2
    assert report.refusals == {"queue_full": 2}
    assert report.count(Status.SUCCEEDED) == 3


def test_a_deadline_ends_those_who_wait_and_closes_the_calls_that_nobody_wants() -> None:
    report = run(SimulatedEndpoint("one", speed=1), arriving(0, 1), deadline_seconds=7)
    assert statuses(report) == [Status.EXPIRED, Status.EXPIRED]
    assert report.finished[0] == pytest.approx(7, abs=0.11)
    assert report.endpoints[0].busy_seconds == pytest.approx(8, abs=0.3)  # both calls were cut


def test_the_longest_wait_ends_those_who_did_not_start() -> None:
    report = run(SimulatedEndpoint("one"), arriving(0, 0, 0, 0), max_wait_seconds=1.5)
    assert [one is Status.EXPIRED for one in statuses(report)] == [False, False, True, True]
    assert report.finished[3] == pytest.approx(1.5, abs=0.11)


def test_a_model_that_nobody_has_is_told_before_anything_runs() -> None:
    with pytest.raises(Exception, match="sd15"):
        run(SimulatedEndpoint("one", models=("sdxl",)), arriving(0, kind=Kind(model="sd15")))


# faults


def test_a_refused_connection_is_tried_elsewhere() -> None:
    fleet = (SimulatedEndpoint("a"), SimulatedEndpoint("b", speed=5))
    report = run(fleet, arriving(*range(10)), faults=[Fault("a", 0, 100, "down")], strategy="round_robin")
    assert report.count(Status.SUCCEEDED) == 10
    assert report.endpoints[1].images == 10


def test_what_runs_when_an_endpoint_goes_down_is_cut_and_tried_elsewhere() -> None:
    fleet = (SimulatedEndpoint("a"), SimulatedEndpoint("b", tier=1))
    report = run(fleet, arriving(0), faults=[Fault("a", 0.5, 100, "down")])
    assert list(report.latencies()) == pytest.approx([1.5])
    assert (report.endpoints[0].failures, report.endpoints[0].busy_seconds) == (1, 0.5)


def test_a_call_that_hangs_costs_the_time_out_and_is_tried_elsewhere() -> None:
    fleet = (SimulatedEndpoint("a", timeout_seconds=20), SimulatedEndpoint("b", tier=1))
    report = run(fleet, arriving(1), faults=[Fault("a", 0.5, 100, "hang")])
    assert list(report.latencies()) == pytest.approx([21], abs=0.2)


def test_a_call_over_its_time_out_fails_without_any_fault() -> None:
    report = run(SimulatedEndpoint("a", timeout_seconds=0.5), arriving(0))
    assert statuses(report) == [Status.FAILED]
    assert report.failures == 1


def test_an_outage_of_everybody_fails_jobs_and_ends() -> None:
    report = run(ONE, arriving(*range(20)), faults=[Fault("one", 5, 10_000, "down")])
    assert report.count(Status.SUCCEEDED) in range(4, 6)
    assert report.count(Status.PENDING) == 0


def test_an_endpoint_that_comes_back_is_used_again() -> None:
    load = arriving(*range(0, 300, 3))
    report = run(ONE, load, faults=[Fault("one", 50, 60, "down")], deadline_seconds=600)
    assert statuses(report)[40:] == [Status.SUCCEEDED] * 60


def test_a_slow_endpoint_takes_longer() -> None:
    report = run(ONE, arriving(0, 10, 20), faults=[Fault("one", 5, 15, "slow", 4)])
    assert list(report.latencies()) == pytest.approx([1, 4, 1])


# tenants and clients


def test_a_client_sends_the_next_when_the_last_is_answered() -> None:
    load = Workload(kinds=(UNIT,), clients=(Client(0, count=4, start=2, think_seconds=0.5),))
    report = run(ONE, load)
    assert list(report.submitted) == pytest.approx([2, 3.5, 5, 6.5])
    assert list(report.waits()) == [0] * 4


def test_a_client_sends_none_after_its_end() -> None:
    report = run(ONE, Workload(kinds=(UNIT,), clients=(Client(0, until=3.5),)))
    assert list(report.submitted) == pytest.approx([0, 1, 2, 3])


def test_clients_and_arrivals_meet_in_one_queue() -> None:
    senders = (Sender(Tenant("crowd"), kinds=(0,)), Sender(Tenant("one"), share=0, kinds=(1,)))
    kinds = (UNIT, Kind(1000, 1000, 10, images=2))
    crowd = burst(kinds, 20, senders=senders, noise=STILL, rng=Random(1))
    report = run((ONE, SimulatedEndpoint("two")), replace(crowd, clients=(Client(1, count=5),)))
    assert report.count(Status.SUCCEEDED) == report.jobs == 25
    assert report.tenant.count(1) == 5
    assert report.images == 20 + 5 * 2
    assert sum(one.busy_seconds for one in report.endpoints) == pytest.approx(20 * 1 + 10 * 2)


def test_fairness_is_measured_while_all_wait() -> None:
    senders = tuple(Sender(Tenant(name)) for name in "ab")
    report = run(ONE, burst((UNIT,), 200, senders=senders, noise=STILL, rng=Random(1)))
    assert 0.5 <= report.fairness() <= 1
    assert 0 < sum(report.served_while_all_wait) <= 200 * 10
    assert math.isnan(run(ONE, arriving(0, 0)).fairness())


def test_progress_runs_from_nothing_to_all() -> None:
    told: list[float] = []
    load = poisson((UNIT,), 0.5, count=10_000, rng=Random(1))
    simulate((ONE,), load, Terms(), rng=Random(1), watch=told.append)
    assert told == sorted(told)
    assert 0 < told[0] < 0.5 < told[-1] <= 1


def test_endpoints_of_one_group_never_draw_at_the_same_time() -> None:
    alone = run([SimulatedEndpoint("a", models=("m",)), SimulatedEndpoint("b", models=("m",))], burst_of_models(8))
    grouped = [SimulatedEndpoint(name, models=("m",), exclusive_group="gpu") for name in "ab"]
    assert run(grouped, burst_of_models(8)).makespan == pytest.approx(2 * alone.makespan)


def burst_of_models(count: int) -> Workload:
    return burst((replace(UNIT, model="m"),), count, noise=STILL, rng=Random(1))


@pytest.mark.parametrize(("factor", "longest"), [(None, 21.0), (2.0, 4.0)])
def test_slow_calls_of_cheap_endpoints_are_hedged(factor: float | None, longest: float) -> None:
    two = [SimulatedEndpoint(name, cheap=True) for name in "ab"]
    load = arriving(*range(0, 40, 4))
    slow = Fault("a", 19.0, 30.0, "slow", 20.0)
    report = run(two, load, strategy="round_robin", retry=RetryOptions(hedge_after_factor=factor), faults=[slow])
    assert max(report.latencies()) <= longest
    assert report.count(Status.SUCCEEDED) == 10


def test_what_else_the_scheduler_is_told_counts_too() -> None:
    tight = SchedulerOptions(max_work=25)
    report = run(ONE, burst((UNIT,), 5, noise=STILL, rng=Random(1)), base=tight)
    assert (report.count(Status.REFUSED), report.refusals) == (2, {"queue_full": 2})


def test_clients_that_ask_without_end_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img_serving.simulation.simulator.MAX_TASKS", 100)
    eager = Workload((UNIT,), (Sender(Tenant("eager")),), clients=(Client(0, count=None, until=1e9),))
    with pytest.raises(TooMuch, match="more than the 100 pictures"):
        run(SimulatedEndpoint("quick", speed=1e6), eager)
