"""Whether a job may stand in line: there is room for it, and it can be done in time."""

from __future__ import annotations

from img_serving.domain.errors import DeadlineUnreachable, QueueFull, RateLimited
from img_serving.domain.jobs import Job
from img_serving.policy.estimates import Ahead, estimate_of, recent_pace, wait_for_room, wait_seconds
from img_serving.policy.fair_queue import Account
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.placement import Placement


def check_admission(job: Job, account: Account, placement: Placement, queued: int, options: SchedulerOptions) -> None:
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
    _check_deadline(job, account, placement, queued, options)


def _check_deadline(job: Job, account: Account, placement: Placement, queued: int, options: SchedulerOptions) -> None:
    """Who is late because of what stands before it is told so.

    Who has nothing before it may try, and so may who would be late all by itself: that is nobody else's fault, and what is
    foretold of pictures that were never drawn before may be wrong; refused for it, they never would be.
    """
    now = job.submitted_at
    patience = job.deadline - now
    longest = options.max_wait_seconds if options.max_wait_seconds is not None else patience
    pace = recent_pace(placement, job.route, now)
    if pace is None:
        return  # nobody knows, so nobody is refused
    count = len(job.tasks)
    least = pace.least_seconds(job.cost)
    rest = (count - 1) * job.cost / pace.rate(job.cost)
    if account.max_running is not None:
        capped = wait_for_room(account, Ahead(account.waiting, account.work), pace, now)
        done = capped + rest / min(1.0, account.max_running / pace.slots) + least
        if capped and done > patience:
            pictures = "one picture" if account.max_running == 1 else f"{account.max_running} pictures"
            raise RateLimited(
                f"this key may have {pictures} drawn at a time, so this would be done in {done:.0f} s, "
                f"and its deadline is in {patience:g} s",
                code="max_running_reached",
                retry_after_seconds=capped,
            )
    # nearly always there is time enough even behind everybody, on the slowest: then nothing has to be looked at closely
    everybody = Ahead(queued, placement.lines.work)
    own = rest + least
    if own > patience or pace.at_most(everybody, Ahead(count, job.cost * count)) <= min(patience, longest):
        return
    wait = estimate_of(job, placement, now, arriving=True).wait_seconds
    if not wait:
        return
    if wait + own > patience:
        raise DeadlineUnreachable(
            f"with what waits before it, this would be done in {wait + own:.0f} s, and its deadline is in {patience:g} s",
            retry_after_seconds=wait,
        )
    if wait > longest:
        raise DeadlineUnreachable(
            f"with what waits before it, this would start in {wait:.0f} s, and may wait {longest:g} s",
            retry_after_seconds=wait,
        )
