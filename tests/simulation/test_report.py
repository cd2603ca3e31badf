"""Reports: percentiles, fairness, and figures that follow from the columns."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.simulation import Report, Status, jain_index, percentile
from img_serving.simulation.report import EndpointFigures, Samples, Spread

steady = settings(deadline=None, derandomize=True)


def test_percentiles_are_interpolated() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([1, 2, 3, 4], 1) == 4
    assert percentile([7], 0.99) == 7
    assert math.isnan(percentile([], 0.5))


@steady
@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_in_order_and_within_bounds(values: list[float]) -> None:
    spread = Spread.of(values)
    assert min(values) <= spread.p50 <= spread.p95 <= spread.p99 <= spread.most == max(values)


def test_the_index_of_fairness_is_one_for_equals_and_1_over_n_for_one_who_has_all() -> None:
    assert jain_index([3, 3, 3]) == pytest.approx(1)
    assert jain_index([1, 0, 0, 0]) == pytest.approx(0.25)
    assert math.isnan(jain_index([0, 0]))


def report() -> Report:
    one = Report("round_robin", ("a", "b"), (1.0, 2.0), [EndpointFigures("e", 2, calls=4, images=6, busy_seconds=12)])
    rows = (
        (0, Status.SUCCEEDED, 1.0, 2.0, 5.0),
        (1, Status.SUCCEEDED, 1.0, 1.0, 3.0),
        (1, Status.REFUSED, 2.0, math.nan, 2.0),
        (0, Status.EXPIRED, 2.0, 4.0, 9.0),
    )
    for tenant, status, submitted, started, finished in rows:
        one.tenant.append(tenant)
        one.status.append(status)
        one.submitted.append(submitted)
        one.started.append(started)
        one.finished.append(finished)
    one.images = 2
    one.last_second = 9.0
    one.served_while_all_wait = [10.0, 20.0]
    return one


def test_waits_are_of_those_who_began_and_latencies_of_those_who_succeeded() -> None:
    one = report()
    assert list(one.waits()) == [1, 0, 2]
    assert list(one.waits(0)) == [1, 2]
    assert list(one.latencies()) == [4, 2]
    assert list(one.latencies(1)) == [2]


def test_throughput_and_utilisation_are_over_the_makespan() -> None:
    one = report()
    assert one.makespan == 8
    assert one.throughput == 2 / 8
    assert one.utilisation == 12 / (2 * 8)
    assert one.mean_batch == 1.5


def test_fairness_is_per_weight() -> None:
    assert report().fairness() == pytest.approx(1)


def test_the_plain_form_is_json_without_nan() -> None:
    plain = report().plain()
    assert (plain["succeeded"], plain["refused"], plain["expired"], plain["failed"]) == (2, 1, 1, 0)
    json.dumps(plain, allow_nan=False)
    json.dumps(Report("x", (), (), []).plain(), allow_nan=False)


def test_samples_stay_few_however_long_it_takes() -> None:
    samples = Samples(interval=1)
    for second in range(100_000):
        if second >= samples.next_at:
            samples.take(second, second, 0)
    assert 256 <= len(samples.times) <= 1024
    assert list(samples.times) == list(samples.waiting)
    assert samples.times[-1] > 99_000
