"""Who is asking: the owner of an API key, the unit of rate limits, fairness and accounting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["admin", "user"]


@dataclass(frozen=True, slots=True)
class Tenant:
    """The owner of an API key.

    `models` and `backends` None means "all of them". `rate` (requests a second) and `burst` (requests) None means the
    configured default. `priority`, `weight` and `max_running` are for the scheduler.
    `webhook_url` is called when a job ends that names none itself.
    """

    name: str
    role: Role = "user"
    models: frozenset[str] | None = None
    backends: frozenset[str] | None = None
    rate: float | None = None
    burst: int | None = None
    priority: int = 0
    weight: float = 1.0
    max_running: int | None = None
    webhook_url: str | None = None

    def may_use_backend(self, name: str) -> bool:
        """Whether this tenant's work may go to that backend."""
        return self.backends is None or name in self.backends

    def may_use_model(self, name: str) -> bool:
        """Whether this tenant may ask for that model."""
        return self.models is None or name in self.models


ANONYMOUS = Tenant(name="anonymous", role="admin")
"""Everybody, where authentication is off."""
