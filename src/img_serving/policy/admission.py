"""Whether a job may stand in line: there is room for it, and it can be done in time."""

from __future__ import annotations

from img_serving.domain.errors import DeadlineUnreachable, QueueFull, RateLimited
from img_serving.domain.jobs import Job
from img_serving.policy.estimates import estimate_of, recent_pace, wait_by_cap, wait_seconds
from img_serving.policy.fair_queue import Share
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.placement import Placement


def check_admission(job: Job, share: Share, placement: Placement, queued: int, options: SchedulerOptions) -> None:
    """Refuse a job that does not fit, or that could only fail later.

    Raises:
        QueueFull: as many tasks, or as much work, wait as may.
        RateLimited: its tenant's own cap keeps it from being done in time.
        DeadlineUnreachable: what stands before it keeps it from being done in time.
    """
    now = job.submitted_at
    count = len(job.tasks)
    if queued + count > options.max_tasks:
        raise QueueFull(
            f"the queue holds {queued} of at most {options.max_tasks} tasks; {count} more do not fit",
            retry_after_seconds=wait_seconds(placement, job.route, now),
        )
    waiting = placement.lines.work
    if options.max_work is not None and queued and waiting + job.cost * count > options.max_work:
        raise QueueFull(
            f"the queue holds {waiting:.4g} of at most {options.max_work:g} megapixel-steps of work; "
            f"{job.cost * count:.4g} more do not fit",
            retry_after_seconds=wait_seconds(placement, job.route, now),
        )
    if queued or (share.max_running is not None and share.room <= 0):
        _check_deadline(job, share, placement, options)


def _check_deadline(job: Job, share: Share, placement: Placement, options: SchedulerOptions) -> None:
    now = job.submitted_at
    patience = job.deadline - now
    longest = options.max_wait_seconds if options.max_wait_seconds is not None else patience
    pace = recent_pace(placement, job, now)
    if pace is None:
        return  # nobody knows, so nobody is refused
    capped = wait_by_cap(job, share, pace, now)
    # nearly always there is time enough even behind everybody: then nothing has to be looked at closely
    worst = pace.through(placement.lines.work) + (len(job.tasks) - 1) * job.cost / pace.rate + pace.one(job.cost)
    if worst <= min(patience, longest) and capped <= patience:
        return
    estimate = estimate_of(job, placement, now, arriving=True)
    if estimate.wait_seconds is None or estimate.eta_seconds is None:
        return
    if capped > patience:
        raise RateLimited(
            f"this key may have {share.max_running} pictures drawn at a time, so this would be done in {capped:.0f} s, "
            f"and its deadline is in {patience:g} s",
            code="max_running_reached",
            retry_after_seconds=estimate.wait_seconds,
        )
    if estimate.eta_seconds > patience:
        raise DeadlineUnreachable(
            f"with what waits before it, this would be done in {estimate.eta_seconds:.0f} s, "
            f"and its deadline is in {patience:g} s",
            retry_after_seconds=estimate.wait_seconds,
        )
    if estimate.wait_seconds > longest:
        raise DeadlineUnreachable(
            f"with what waits before it, this would start in {estimate.wait_seconds:.0f} s, and may wait {longest:g} s",
            retry_after_seconds=estimate.wait_seconds,
        )
