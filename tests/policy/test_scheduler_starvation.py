"""Nobody waits for ever: a bound on every wait, and one on how far two tenants that always have work can drift apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import VirtualFleet, endpoint, job

from img_serving.domain.jobs import Batch, Job
from img_serving.domain.tenants import Tenant
from img_serving.policy.balancing import STRATEGIES
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup

steady = settings(deadline=None, derandomize=True, max_examples=25)

AGEING = 20.0
AFFINITY = 15.0
LINGER = 1.0
COSTS = (2, 10)
UNIT = 0.1
"""Seconds a megapixel-step of every endpoint."""
SWITCH = 10.0
TENANTS = (
    Tenant("a"),
    Tenant("b"),
    Tenant("heavy", weight=4.0),
    Tenant("important", priority=2),
    Tenant("capped", max_running=2),
)


@dataclass(frozen=True)
class Client:
    tenant: Tenant
    backend: str
    model: str
    cost: int
    pictures: int


@dataclass
class Fleet:
    """What hypothesis chose: endpoints of one backend, some with other engines on their GPUs, and who asks for what."""

    strategy: str
    slots: list[int]
    switches: bool
    grouped: bool
    lingers: bool
    seed: int
    jobs: list[Job] = field(default_factory=list)

    def build(self) -> VirtualFleet:
        gpu = ExclusiveGroup("gpu") if self.grouped else None
        endpoints: list[EndpointState] = [
            endpoint(
                number,
                "a",
                speed=UNIT,
                slots=slots,
                switches=self.switches,
                shape="items" if self.lingers else "single",
                size=2 if self.lingers else 1,
                linger_seconds=LINGER if self.lingers else 0.0,
                group=gpu if number == 0 else None,
            )
            for number, slots in enumerate(self.slots)
        ]
        if gpu is not None:
            endpoints.append(endpoint(len(endpoints), "b", speed=UNIT, switches=self.switches, group=gpu))
        return VirtualFleet(
            *endpoints, strategy=self.strategy, max_tasks=10**6, ageing_seconds=AGEING, affinity_seconds=AFFINITY
        )

    def client(self, rng: Random) -> Client:
        """Somebody who asks for the same again and again."""
        backend = "b" if self.grouped and rng.random() < 0.3 else "a"
        return Client(rng.choice(TENANTS), backend, rng.choice(("x", "y")), rng.choice(COSTS), rng.choice((1, 1, 3)))

    def ask(self, client: Client, now: float) -> Job:
        one = job(
            client.backend, tenant=client.tenant, cost=client.cost, n=client.pictures, model=client.model, now=now
        )
        self.jobs.append(one)
        return one


FLEETS = st.builds(
    Fleet,
    strategy=st.sampled_from(sorted(STRATEGIES)),
    slots=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    switches=st.booleans(),
    grouped=st.booleans(),
    lingers=st.booleans(),
    seed=st.integers(0, 2**32),
)


def longest_call(fleet: Fleet) -> float:
    return max(COSTS) * UNIT * (2 if fleet.lingers else 1) + (SWITCH if fleet.switches else 0.0)


@steady
@given(FLEETS, st.integers(3, 8))
def test_every_job_starts_within_a_bound_whatever_is_asked_for(chosen, depth):
    """So many clients, each of whom asks again as soon as it has its pictures.

    Others pass a task by priority until it has aged by two, and by model for `AFFINITY`. From then on it is its tenant's share
    that counts: while it and the k tasks of its tenant before it are served, others are served at most by their weights to its
    own, and one task more each. One slot alone works that off, each call as long as can be, and a GPU that changes hands after
    every call doubles it.
    """
    fleet, rng = chosen.build(), Random(chosen.seed)
    if chosen.switches:
        fleet.seconds = lambda batch: UNIT * batch.cost + SWITCH * batch.loads_model
    before: dict[str, int] = {}
    whose: dict[str, Client] = {}
    weights = sum(tenant.weight for tenant in TENANTS)

    def ask(client: Client) -> None:
        one = chosen.ask(client, fleet.now)
        mine = [task for each in fleet.scheduler.jobs if each.tenant is one.tenant for task in each.tasks]
        before[one.id] = sum(not task.started for task in mine)
        whose[one.id] = client
        fleet.scheduler.submit(one)

    def again(batch: Batch) -> None:
        for asked in dict.fromkeys(task.job for task in batch.tasks):
            if asked.is_over:
                ask(whose.pop(asked.id))

    fleet.after_each = again
    for _ in range(depth):
        ask(chosen.client(rng))
    fleet.pump()
    fleet.run(900.0 if chosen.switches else 300.0)
    for one in chosen.jobs:
        waited = (one.started_at if one.started_at is not None else fleet.now) - one.submitted_at
        calls = (before[one.id] + 1) * weights / one.tenant.weight + len(TENANTS)
        assert waited <= 2 * AGEING + AFFINITY + LINGER + 2 * calls * longest_call(chosen)


@steady
@given(FLEETS)
def test_two_tenants_that_always_have_work_are_served_alike(chosen):
    """By start-time fair queueing they differ by a task each at most; a batch and the slots of one pass may add as many again.

    Alike is by work: one of them asks for small pictures, the other for big ones.

    With one model: who waits for an engine that has its own is passed over, as long as nobody waits for `AFFINITY`.
    """
    chosen.switches = False
    fleet, rng = chosen.build(), Random(chosen.seed)
    costs = {"a": max(COSTS), "b": min(COSTS)}
    had = {"a": 0.0, "b": 0.0}
    seen, widest = 0, 0.0

    def ask(tenant: Tenant) -> None:
        fleet.scheduler.submit(job("a", tenant=tenant, cost=costs[tenant.name], now=fleet.now))

    def again(batch: Batch) -> None:
        nonlocal seen, widest
        for begun in fleet.started[seen:]:
            for task in begun.tasks:
                had[task.job.tenant.name] += task.job.cost
        seen = len(fleet.started)
        widest = max(widest, abs(had["a"] - had["b"]))
        for task in batch.tasks:
            ask(task.job.tenant)

    fleet.after_each = again
    for _ in range(40):
        for tenant in rng.sample(TENANTS[:2], 2):
            ask(tenant)
    fleet.pump()
    fleet.run(60.0)
    assert widest <= max(COSTS) * (2 + 2 * sum(chosen.slots) * (2 if chosen.lingers else 1))
    assert sum(had.values()) > 20 * max(COSTS)
