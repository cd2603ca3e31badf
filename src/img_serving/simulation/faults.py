"""What goes wrong with an endpoint, from when to when, and what that makes of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from img_serving.domain.errors import Outcome
from img_serving.domain.jobs import Ended
from img_serving.simulation.fleet import SimulatedEndpoint

FaultKind = Literal["down", "fail", "hang", "errors", "slow"]
"""`down`: refuses connections, and cuts what runs. `fail`: answers every call with an error. `hang`: never answers.
`errors`: a share of the calls fails at its end. `slow`: calls take a multiple of their time."""

FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

ANSWER_SECONDS = 0.01
"""How long it takes to hear that a connection was refused, or a call failed at once."""

RECOVERY_SECONDS = 120.0
"""How long after a fault breakers and health checks may still keep an endpoint out."""

HANG_SECONDS = 60.0
"""When a call that hangs is given up where the endpoint has no time-out of its own: the gateway's default."""

DOWN = Ended(outcome=Outcome.NOT_STARTED, message="connection refused")
CUT = Ended(outcome=Outcome.UNKNOWN, message="the connection was cut")
BROKEN = Ended(outcome=Outcome.FAILED, message="it answered with an error")
TIMED_OUT = Ended(outcome=Outcome.UNKNOWN, message="no answer within the time-out", timed_out=True)


@dataclass(frozen=True, slots=True)
class Fault:
    """One trouble of one endpoint, from `start` to `end` in seconds; the share of `errors`, the factor of `slow`."""

    endpoint: str
    start: float
    end: float
    kind: FaultKind
    amount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a fault ends after it starts: {self.start:g} to {self.end:g} s is not possible")
        if self.kind == "errors" and not 0 <= self.amount <= 1:
            raise ValueError(f"the share of calls that fail is 0 to 1, not {self.amount:g}")
        if self.kind == "slow" and not self.amount > 0:
            raise ValueError(f"the factor of a slow endpoint is above 0, not {self.amount:g}")


class FaultPlan:
    """The faults of a whole fleet, looked up by the endpoint's place in it."""

    def __init__(self, fleet: Sequence[SimulatedEndpoint], faults: Iterable[Fault]) -> None:
        """A fault is of an endpoint by its name, or of all endpoints of a backend by its name.

        Raises:
            ValueError: there is no such endpoint.
        """
        self._of: list[list[Fault]] = [[] for _ in fleet]
        for fault in faults:
            struck = [number for number, one in enumerate(fleet) if fault.endpoint in {one.name, one.group}]
            if not struck:
                known = ", ".join(one.name for one in fleet)
                raise ValueError(f"there is no endpoint {fault.endpoint!r} to fail (known: {known})")
            for number in struck:
                self._of[number].append(fault)
        self.any = any(self._of)

    def in_effect(self, now: float) -> bool:
        """Whether anything strikes, or struck so lately that an endpoint may not be back yet."""
        return any(fault.start <= now < fault.end + RECOVERY_SECONDS for faults in self._of for fault in faults)

    def troubled(self, number: int) -> bool:
        """Whether that endpoint has any."""
        return bool(self._of[number])

    def answers(self, number: int, now: float) -> bool:
        """Whether a health check would find it well."""
        return not any(fault.start <= now < fault.end and fault.kind in {"down", "hang"} for fault in self._of[number])

    def cuts(self) -> list[tuple[float, int]]:
        """When the running calls of which endpoint are cut."""
        return [
            (fault.start, number) for number, faults in enumerate(self._of) for fault in faults if fault.kind == "down"
        ]

    def ending(
        self, number: int, endpoint: SimulatedEndpoint, seconds: float, now: float, rng: Random
    ) -> tuple[float, Ended | None]:
        """What becomes of a call that would have taken `seconds`: how long it takes, and how it fails, or None."""
        ended: Ended | None = None
        for fault in self._of[number]:
            if not fault.start <= now < fault.end:
                continue
            if fault.kind == "down":
                return ANSWER_SECONDS, DOWN
            if fault.kind == "fail":
                return ANSWER_SECONDS, BROKEN
            if fault.kind == "hang":
                return endpoint.timeout_seconds or HANG_SECONDS, TIMED_OUT
            if fault.kind == "slow":
                seconds *= fault.amount
            elif rng.random() < fault.amount:
                ended = BROKEN
        return seconds, ended
