"""What health checks make of an endpoint: thresholds to rise and fall, and when to ask again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Health(StrEnum):
    """What the checks last said. An endpoint that nobody has asked yet is used like a healthy one."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """How many equal answers in a row turn the verdict, and how often to ask (seconds, ± `jitter` of it)."""

    interval_seconds: float = 30.0
    fall: int = 2
    rise: int = 1
    first_retry_seconds: float = 1.0
    jitter: float = 0.1


class HealthRecord:
    """The verdict on one endpoint, from its checks."""

    __slots__ = ("_bad", "_good", "_options", "detail", "health", "on_change")

    def __init__(self, options: HealthOptions) -> None:
        """Starts as unknown."""
        self._options = options
        self._good = 0
        self._bad = 0
        self.health = Health.UNKNOWN
        self.detail = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the verdict changes."""

    @property
    def is_down(self) -> bool:
        """Whether the checks took it out."""
        return self.health is Health.DOWN

    def record(self, ok: bool, detail: str) -> bool:
        """Note one check; returns whether the verdict changed. The very first answer decides at once."""
        self.detail = detail
        before = self.health
        if ok:
            self._good += 1
            self._bad = 0
            if before is Health.UNKNOWN or self._good >= self._options.rise:
                self.health = Health.UP
        else:
            self._bad += 1
            self._good = 0
            if before is Health.UNKNOWN or self._bad >= self._options.fall:
                self.health = Health.DOWN
        if self.health is before:
            return False
        self.on_change()
        return True

    def next_check_in(self, rng: Random) -> float:
        """Seconds until the next check: the interval, but sooner (1, 2, 4 … s) after bad news, so that recovery is seen."""
        options = self._options
        wait = options.interval_seconds
        if self._bad:
            wait = min(wait, options.first_retry_seconds * 2 ** min(self._bad - 1, 8))
        return wait * (1 + options.jitter * (2 * rng.random() - 1))
