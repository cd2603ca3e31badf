"""Who goes next: in order inside a tenant, by weight between tenants, by priority and age between levels, under caps."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import job

from img_serving.domain.jobs import Task
from img_serving.domain.tenants import Tenant
from img_serving.policy.fair_queue import FairQueue, urgencies
from img_serving.policy.lines import Lines

steady = settings(deadline=None, derandomize=True)


def empty() -> Lines:
    return Lines(lambda backends: backends)


class Queue:
    """The tasks of one route with the books of their tenants, as the scheduler keeps them."""

    def __init__(self, lines: Lines | None = None, model: str = "m") -> None:
        """Those of several models on the same `lines` stand for the same backend."""
        self.lines = empty() if lines is None else lines
        self.model = model

    @property
    def queue(self) -> FairQueue:
        line = self.lines.find(job(model=self.model).route)
        return FairQueue() if line is None else line.queue

    def push(self, tenant: Tenant, *, cost: int = 10, n: int = 1, now: float = 0.0) -> list[Task]:
        asked = job(tenant=tenant, cost=cost, n=n, now=now, model=self.model)
        asked.cost = float(cost)
        self.lines.enter(asked, self.lines.account(tenant))
        return asked.tasks

    def remove(self, task: Task) -> None:
        self.lines.leave(task)

    def serve(self, urgency: Any = None) -> Task | None:
        task = self.queue.head(urgency)
        if task is None:
            return None
        line = self.lines.find(task.job.route)
        assert line is not None
        self.lines.serve(line, task)
        if task.job.tenant.max_running is not None:
            self.lines.account(task.job.tenant).started(task)
        return task

    def end(self, task: Task) -> None:
        self.lines.account(task.job.tenant).ended(task)

    def served(self, count: int) -> str:
        """The names of the next so many tenants."""
        return "".join(task.job.tenant.name for _ in range(count) if (task := self.serve()) is not None)


A, B, C = Tenant("a"), Tenant("b"), Tenant("c")


def test_the_tasks_of_one_tenant_go_in_the_order_they_came():
    one = Queue()
    tasks = one.push(A, n=3) + one.push(A)
    assert list(one.queue.order()) == tasks
    assert [one.serve() for _ in range(5)] == [*tasks, None]


def test_tenants_of_equal_weight_take_turns_however_much_each_has():
    one = Queue()
    one.push(A, n=50)
    one.push(B, n=3)
    one.push(C, n=3)
    assert sorted(one.served(9)) == sorted("abcabcabc")
    assert one.served(3) == "aaa"


def test_a_weight_of_three_gets_three_times_as_much():
    one = Queue()
    one.push(Tenant("x", weight=3.0), n=90)
    one.push(B, n=90)
    assert Counter(one.served(80)) == {"x": 60, "b": 20}


def test_what_counts_is_the_cost_and_not_the_number():
    one = Queue()
    one.push(A, n=90, cost=40)
    one.push(B, n=90, cost=10)
    assert Counter(one.served(50)) == {"a": 10, "b": 40}


def test_who_was_away_has_saved_nothing_up():
    one = Queue()
    one.push(A, n=100)
    one.served(50)
    one.push(B, n=100)
    assert Counter(one.served(20)) == {"a": 10, "b": 10}


def test_who_comes_back_at_once_does_not_escape_what_it_has_had():
    one = Queue()
    one.push(A, n=100)
    one.push(B, cost=1000)
    one.served(2)
    one.push(B, cost=10)
    assert one.served(20) == "a" * 20


def test_a_tenants_turn_for_one_model_counts_for_all_on_the_same_backends():
    lines = empty()
    first, second = Queue(lines, "x"), Queue(lines, "y")
    first.push(A, n=10)
    second.push(A, n=10)
    second.push(B, n=10)
    first.served(5)
    assert second.served(5) == "bbbbb"


def test_a_change_of_the_cap_is_heard_of():
    lines = empty()
    account = lines.account(Tenant("a", max_running=1))
    assert lines.account(Tenant("a", max_running=3)) is account
    assert (account.max_running, account.room) == (3, 3)


# priorities


def test_a_higher_priority_goes_first():
    one = Queue()
    one.push(A, n=2)
    one.push(Tenant("x", priority=1), n=2)
    assert one.served(4) == "xxaa"
    assert [level.priority for level in one.queue.levels] == []


def test_a_priority_counts_one_more_for_each_whole_age_of_its_oldest():
    one = Queue()
    one.push(A, n=2, now=0.0)
    one.push(Tenant("x", priority=2), n=2, now=100.0)
    assert urgencies([one.queue], 119.0, 60.0) == {0: 1.0, 2: 2.0}
    assert urgencies([one.queue], 120.0, 60.0) == {0: 2.0, 2: 2.0}
    assert urgencies([one.queue], 180.0, 60.0) == {0: 3.0, 2: 3.0}
    urgency = urgencies([one.queue], 220.0, 10.0)
    assert urgency == {0: 22.0, 2: 14.0}
    task = one.serve(urgency)
    assert task is not None
    assert task.job.tenant is A


def test_between_a_priority_that_has_aged_and_one_that_is_higher_by_itself_the_older_goes_first():
    one = Queue()
    one.push(A, now=0.0)
    one.push(Tenant("x", priority=1), now=60.0)
    task = one.serve(urgencies([one.queue], 60.0, 60.0))
    assert task is not None
    assert task.job.tenant is A


@pytest.mark.parametrize("ageing_seconds", [0.0, 60.0])
def test_without_ageing_or_with_one_priority_there_is_no_urgency(ageing_seconds):
    one = Queue()
    one.push(A, now=0.0)
    assert urgencies([one.queue], 1e6, ageing_seconds) is None
    one.push(Tenant("x", priority=1), now=0.0)
    assert (urgencies([one.queue], 1e6, ageing_seconds) is None) == (not ageing_seconds)


def test_ages_are_one_figure_for_all_queues():
    lines = empty()
    first, second = Queue(lines, "x"), Queue(lines, "y")
    first.push(A, now=0.0)
    second.push(A, now=500.0)
    second.push(Tenant("x", priority=1), now=500.0)
    assert urgencies([first.queue, second.queue], 500.0, 100.0) == {0: 5.0, 1: 1.0}


def test_the_oldest_is_whoever_still_stands_there():
    one = Queue()
    first, second = one.push(A, now=1.0) + one.push(B, now=2.0)
    assert one.queue.oldest() is first
    one.remove(first)
    assert one.queue.oldest() is second
    one.remove(second)
    assert one.queue.oldest() is None


def test_queues_are_ranked_by_urgency_then_by_the_clocks_then_by_arrival():
    lines = empty()
    early, late, other, high = (Queue(lines, model) for model in ("early", "late", "other", "high"))
    late.push(A, now=2.0)
    early.push(A, now=1.0)
    high.push(Tenant("x", priority=1), now=9.0)
    other.push(B, now=5.0)
    other.served(1)
    other.push(B, now=6.0)
    ranked = sorted((early, late, other, high), key=lambda one: one.queue.rank())
    assert [one.model for one in ranked] == ["high", "early", "late", "other"]
    assert FairQueue().rank() > other.queue.rank()


# caps


def test_a_tenant_at_its_cap_stands_aside_until_one_of_its_own_ends():
    capped = Tenant("x", max_running=2)
    one = Queue()
    one.push(capped, n=4)
    one.push(A, n=2)
    running = [task for task in (one.serve() for _ in range(6)) if task is not None]
    assert Counter(task.job.tenant.name for task in running) == {"x": 2, "a": 2}
    assert one.queue.head() is None
    one.end(next(task for task in running if task.job.tenant is capped))
    assert one.served(2) == "x"


def test_a_cap_holds_over_all_queues():
    capped = Tenant("x", max_running=1)
    lines = empty()
    first, second = Queue(lines, "x"), Queue(lines, "y")
    first.push(capped)
    second.push(capped)
    running = first.serve()
    assert running is not None
    assert second.queue.head() is None
    first.end(running)
    assert second.queue.head() is not None


def test_the_order_has_no_more_of_a_capped_tenant_than_may_run():
    one = Queue()
    one.push(Tenant("x", max_running=2), n=5)
    one.push(A, n=1)
    assert Counter(task.job.tenant.name for task in one.queue.order()) == {"x": 2, "a": 1}


# books


def test_leaving_from_anywhere_keeps_number_and_work_right():
    one = Queue()
    tasks = one.push(A, n=3, cost=5) + one.push(B, n=2, cost=7)
    one.remove(tasks[1])
    one.remove(tasks[4])
    assert (len(one.queue), one.queue.work) == (3, 17.0)
    assert set(one.queue.order()) == {tasks[0], tasks[2], tasks[3]}
    for task in (tasks[0], tasks[2], tasks[3]):
        one.remove(task)
    assert (len(one.queue), one.queue.work, one.queue.levels) == (0, 0.0, ())
    assert [(account.waiting, account.work) for account in one.lines.accounts] == [(0, 0.0), (0, 0.0)]
    assert (list(one.lines), one.lines.work) == ([], 0.0)


PUSHES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=25)
TENANTS = (
    Tenant("a"),
    Tenant("b", weight=3.0),
    Tenant("c", max_running=3),
    Tenant("d", priority=1),
)


@steady
@given(PUSHES, st.integers(0, 20), st.integers(0, 2**32))
def test_the_order_foretells_who_will_be_served(pushes, ahead, seed):
    one, rng = Queue(), Random(seed)
    waiting: list[Task] = []
    for which, cost, n in pushes:
        waiting += one.push(TENANTS[which], cost=cost, n=n)
        if rng.random() < 0.3:
            one.remove(waiting.pop(rng.randrange(len(waiting))))
        if rng.random() < 0.2 and (task := one.serve()) is not None:
            waiting.remove(task)
    foretold = list(one.queue.order())
    served = [task for task in (one.serve() for _ in range(len(one.queue))) if task is not None]
    assert served == foretold


def test_who_had_much_of_other_backends_does_not_wait_for_that():
    lines = empty()
    for _ in range(50):
        asked = job("elsewhere", tenant=A)
        asked.cost = 10.0
        lines.enter(asked, lines.account(A))
        line = lines.find(asked.route)
        assert line is not None
        lines.serve(line, asked.tasks[0])
    one = Queue(lines)
    one.push(B, n=20)
    one.push(A, n=20)
    assert Counter(one.served(10)) == {"a": 5, "b": 5}


def test_what_caps_hold_back_may_not_run():
    one = Queue()
    one.push(Tenant("x", max_running=2), n=5, cost=10)
    one.push(A, n=3, cost=7)
    assert one.queue.may_run() == (5, 41.0)


def test_who_is_held_back_by_a_cap_does_not_age():
    one = Queue()
    capped = Tenant("x", max_running=1)
    one.push(capped, n=2, now=0.0)
    assert one.serve() is not None
    one.push(A, now=90.0)
    one.push(Tenant("high", priority=1), now=90.0)
    assert urgencies([one.queue], 100.0, 10.0) == {0: 1.0, 1: 2.0}


@steady
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 100), min_size=2, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_tenants_who_always_have_work_drift_apart_by_no_more_than_a_task_each(weights, costs, seed):
    """The bound of start-time fair queueing: per weight, the largest task of the one and of the other."""
    one, rng = Queue(), Random(seed)
    tenants = [Tenant(str(number), weight=weight) for number, weight in enumerate(weights)]
    had = dict.fromkeys(range(len(weights)), 0.0)
    for tenant in tenants:
        one.push(tenant, cost=rng.choice(costs))
        one.push(tenant, cost=rng.choice(costs))
    for _ in range(100):
        task = one.serve()
        assert task is not None
        had[int(task.job.tenant.name)] += task.job.cost
        one.push(task.job.tenant, cost=rng.choice(costs))
        for i, weight in enumerate(weights):
            for j, other in enumerate(weights):
                bound = max(costs) / weight + max(costs) / other
                assert abs(had[i] / weight - had[j] / other) <= bound + 1e-9
