"""How far a picture is, on standard error and only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Watch = Callable[[float], None]
"""Told how far the work is, from 0 to 1."""


@contextmanager
def progress(title: str, *, quiet: bool, measured: bool) -> Iterator[Watch]:
    """A bar for as long as the block runs; gone afterwards. `measured` False: nobody knows how far it is, time passes."""
    if quiet or not sys.stderr.isatty():
        yield _nobody
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
    if measured:
        columns.append(TaskProgressColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(title, total=1.0 if measured else None)
        furthest = 0.0

        def watch(share: float) -> None:
            nonlocal furthest
            furthest = max(furthest, share)  # a retry starts over; a bar that runs back tells nobody anything
            bar.update(task, completed=furthest)

        yield watch if measured else _nobody


def _nobody(share: float) -> None:
    pass
