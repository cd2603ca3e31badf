"""What a worker counts: calls, batches, steps, the queue, the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from img_serving.telemetry.metrics import Counter, Histogram, Labels, render

_RECENT: Final = 0.2
"""Weight of the newest call in the mean that estimates are made of."""


class Counts:
    """One instance a worker. Written on the loop's thread, read on any."""

    def __init__(self) -> None:
        self.calls = Counter("worker_calls_total", "Calls by how they ended.", "outcome")
        self.pictures = Counter("worker_pictures_total", "Pictures drawn, by the size of their batch.", "batch")
        self.input_bytes = Counter("worker_input_image_bytes_total", "Bytes of input images.")
        self.output_bytes = Counter("worker_picture_bytes_total", "Bytes of pictures sent.")
        self.queue_seconds = Histogram("worker_queue_seconds", "Seconds that calls waited for a slot.")
        self.draw_seconds = Histogram("worker_draw_seconds", "Seconds that the engine drew, by call.")
        self.step_seconds = Histogram("worker_step_seconds", "Seconds between two steps of the engine.")
        self.load_seconds = 0.0
        self.mean_draw_seconds = 0.0
        """Of the calls so far, the newest counting most; 0 before the first."""

    def drawn(self, seconds: float) -> None:
        """A call was drawn in so many seconds."""
        self.draw_seconds.observe(seconds)
        before = self.mean_draw_seconds
        self.mean_draw_seconds = seconds if not before else before + _RECENT * (seconds - before)

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> bytes:
        """Prometheus text of everything; `gauges`: value and help by name."""
        metrics = [one for one in vars(self).values() if isinstance(one, (Counter, Histogram))]
        values: list[tuple[str, str, Mapping[Labels, float]]] = [
            (name, text, {(): value}) for name, (text, value) in gauges.items()
        ]
        return render(metrics, values)


def memory_of(engine: Any) -> dict[str, tuple[str, float]]:
    """The gauges of the device's memory, where the engine tells (`statistics()`)."""
    statistics: Callable[[], Any] | None = getattr(engine, "statistics", None)
    if statistics is None:
        return {}
    told = statistics()
    found: dict[str, tuple[str, float]] = {}
    for name, text in (
        ("memory_used_bytes", "Bytes of the device's memory in use."),
        ("memory_total_bytes", "Bytes of the device's memory."),
    ):
        value = getattr(told, name, None)
        if isinstance(value, (int, float)):
            found[f"worker_device_{name}"] = (text, float(value))
    return found
