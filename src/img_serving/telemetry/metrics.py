"""What the gateway counts: plain counters and histograms, rendered as Prometheus text when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number by label values that only grows."""

    __slots__ = ("help", "label_names", "name", "values")

    def __init__(self, name: str, text: str, *label_names: str) -> None:
        """`name` as Prometheus wants it, without prefix."""
        self.name = name
        self.help = text
        self.label_names = label_names
        self.values: dict[tuple[str, ...], float] = {} if label_names else {(): 0}

    def add(self, *label_values: str, by: float = 1) -> None:
        """Count `by` more for these label values."""
        self.values[label_values] = self.values.get(label_values, 0) + by

    def total(self) -> float:
        """The sum over all label values."""
        return sum(self.values.values())


class Histogram:
    """Seconds by label values, in fixed buckets."""

    __slots__ = ("help", "label_names", "name", "values")

    def __init__(self, name: str, text: str, *label_names: str) -> None:
        """`name` as Prometheus wants it, without prefix."""
        self.name = name
        self.help = text
        self.label_names = label_names
        self.values: dict[tuple[str, ...], list[float]] = {}

    def observe(self, seconds: float, *label_values: str) -> None:
        """Count one duration."""
        row = self.values.get(label_values)
        if row is None:
            # one cell a bucket, one for what is over the last, one for the sum
            row = self.values[label_values] = [0.0] * (len(SECONDS_BUCKETS) + 2)
        row[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        row[-1] += seconds


class Metrics:
    """Everything that the gateway counts. One instance a process; whoever counts holds it."""

    def __init__(self) -> None:
        self.requests = Counter("requests_total", "HTTP requests by route and status.", "route", "method", "status")
        self.stage_seconds = Histogram(
            "stage_seconds", "Seconds by stage of an image request: queue, attempt, deliver, total.", "stage"
        )
        self.attempts = Counter("attempts_total", "Calls to endpoints by how they ended.", "backend", "outcome")
        self.hedges = Counter("hedges_total", "Second calls made beside a slow one, by backend.", "backend")
        self.batch_sizes = Counter(
            "batched_pictures_total", "Pictures by the size of the call they shared.", "backend", "size"
        )
        self.queue_refusals = Counter(
            "queue_refusals_total", "Requests that were not let into the queue, by reason.", "reason"
        )
        self.breaker_openings = Counter(
            "breaker_openings_total", "Times that a circuit breaker opened.", "backend", "endpoint"
        )
        self.jobs = Counter("jobs_total", "Image jobs by how they ended.", "status")
        self.durable_jobs = Counter(
            "durable_jobs_total",
            "Durable jobs: taken, replayed (a known key), recovered (after a restart), unknown (how it ended).",
            "event",
        )
        self.kept_open = Counter("kept_open_total", "Plain replies whose head went out before their job was done.")
        self.pictures = Counter("pictures_total", "Pictures made, by backend.", "backend")
        self.wrong_size = Counter(
            "wrong_size_total", "Pictures delivered in another size than was asked for.", "backend"
        )
        self.transcoded = Counter("transcoded_total", "Pictures re-encoded because another format was asked for.", "to")
        self.bytes_out = Counter("response_bytes_total", "Bytes of response bodies.")
        self.bytes_in = Counter("request_bytes_total", "Bytes of request bodies read.")
        self.rate_limited = Counter("rate_limited_total", "Calls refused by a rate limit.", "scope")
        self.auth_failures = Counter("auth_failures_total", "Calls refused for their key.")
        self.artifacts = Counter("artifacts_total", "Artifacts by what happened: stored, served, swept.", "event")
        self.artifact_bytes = Counter("artifact_bytes_total", "Bytes of artifacts stored.")
        self.storage_failures = Counter("storage_failures_total", "Artifacts that could not be stored.")
        self.disconnects = Counter("client_disconnects_total", "Clients that left before their answer.")
        self.webhooks = Counter(
            "webhooks_total", "Calls to webhooks: delivered, failed (each try), given_up (each event).", "outcome"
        )
        self.internal_errors = Counter("internal_errors_total", "Unexpected exceptions; each one is logged.", "where")

    def render(self, gauges: Iterable[tuple[str, str, Mapping[Labels, float]]]) -> bytes:
        """The Prometheus text (0.0.4) of all counters, followed by `gauges`: (name, help, values by labels)."""
        return render(vars(self).values(), gauges)


def render(metrics: Iterable[object], gauges: Iterable[tuple[str, str, Mapping[Labels, float]]]) -> bytes:
    """The Prometheus text (0.0.4) of counters and histograms, followed by `gauges`: (name, help, values by labels)."""
    lines: list[str] = []
    for metric in metrics:
        if isinstance(metric, Counter):
            _head(lines, metric.name, metric.help, "counter")
            for label_values, value in metric.values.items():
                labels = tuple(zip(metric.label_names, label_values, strict=True))
                lines.append(f"img_serving_{metric.name}{_labels(labels)} {_number(value)}")
        elif isinstance(metric, Histogram):
            _head(lines, metric.name, metric.help, "histogram")
            for label_values, row in metric.values.items():
                _histogram(lines, metric.name, tuple(zip(metric.label_names, label_values, strict=True)), row)
    for name, text, values in gauges:
        _head(lines, name, text, "gauge")
        lines.extend(f"img_serving_{name}{_labels(labels)} {_number(value)}" for labels, value in values.items())
    return ("\n".join(lines) + "\n").encode()


def _histogram(lines: list[str], name: str, labels: Labels, row: list[float]) -> None:
    running = 0.0
    for bound, count in zip((*SECONDS_BUCKETS, float("inf")), row, strict=False):
        running += count
        edge = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f"img_serving_{name}_bucket{_labels((*labels, ('le', edge)))} {_number(running)}")
    lines.append(f"img_serving_{name}_sum{_labels(labels)} {row[-1]:.6f}")
    lines.append(f"img_serving_{name}_count{_labels(labels)} {_number(running)}")


def _head(lines: list[str], name: str, text: str, kind: str) -> None:
    lines.append(f"# HELP img_serving_{name} {text}")
    lines.append(f"# TYPE img_serving_{name} {kind}")


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
