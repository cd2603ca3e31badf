"""The open jobs, and which of them are late."""

from __future__ import annotations

from collections.abc import Collection

from img_serving.domain.jobs import Job


class OpenJobs:
    """The jobs that are not resolved yet, in the order of their arrival.

    Nearly all may take equally long, so that their deadlines come in their order: they are kept by how long they may take, and
    only the heads are asked who is late. So asking costs nothing while nobody is, however many wait.
    """

    __slots__ = ("_by_id", "_by_patience")

    def __init__(self) -> None:
        self._by_id: dict[str, Job] = {}
        self._by_patience: dict[float, dict[str, Job]] = {}

    @property
    def all(self) -> Collection[Job]:
        """Every one of them."""
        return self._by_id.values()

    def add(self, job: Job) -> None:
        """A job was taken."""
        self._by_id[job.id] = job
        patience = _patience(job)
        jobs = self._by_patience.get(patience)
        if jobs is None:
            jobs = self._by_patience[patience] = {}
        jobs[job.id] = job

    def remove(self, job: Job) -> None:
        """It is resolved."""
        del self._by_id[job.id]
        patience = _patience(job)
        jobs = self._by_patience[patience]
        del jobs[job.id]
        if not jobs:
            del self._by_patience[patience]

    def late(self, now: float) -> list[Job]:
        """Those whose deadline has passed."""
        found: list[Job] = []
        for jobs in self._by_patience.values():
            for job in jobs.values():
                if now < job.deadline:
                    break
                found.append(job)
        return found


def _patience(job: Job) -> float:
    """How long a job may take, to the millisecond."""
    return round(job.deadline - job.submitted_at, 3)
