"""What handlers may use: one record, made by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from img_serving.api.origin import Origin
from img_serving.config import Config
from img_serving.gateway.delivery import Delivery
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.job_records import JobRecords
from img_serving.gateway.jobs import Jobs
from img_serving.gateway.pipeline import Pipeline
from img_serving.gateway.registry import Registry
from img_serving.gateway.returns import Returns
from img_serving.gateway.tasks import TaskRegistry
from img_serving.gateway.webhooks import WebhookDeliverer
from img_serving.policy.api_keys import KeyRing
from img_serving.policy.rate_limits import RateLimits
from img_serving.ports import ArtifactStore
from img_serving.telemetry.logs import RequestLog
from img_serving.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of the gateway. `clock` gives seconds that never go back; `unix_clock` and `started_at` are Unix seconds."""

    config: Config
    version: str
    started_at: int
    clock: Callable[[], float]
    unix_clock: Callable[[], float]
    tasks: TaskRegistry
    keys: KeyRing
    limits: RateLimits
    registry: Registry
    dispatcher: Dispatcher
    pipeline: Pipeline
    delivery: Delivery
    jobs: Jobs
    records: JobRecords
    returns: Returns
    webhooks: WebhookDeliverer
    store: ArtifactStore
    metrics: Metrics
    request_log: RequestLog
    origin: Origin
