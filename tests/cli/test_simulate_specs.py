"""The short texts of `simulate`: what they mean, and that a wrong one is told with what would be right."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.cli import simulate_trace
from img_serving.cli.endings import MISUSED, CommandFailed
from img_serving.cli.simulate_specs import (
    SpecFault,
    read_endpoint,
    read_faults,
    read_fleet,
    read_mix,
    read_noise,
    read_speeds,
    read_tenants,
    seconds_of,
)
from img_serving.cli.simulate_trace import read_trace
from img_serving.domain.tenants import Tenant
from img_serving.simulation import Client, Fault, Kind, Noise, SimulatedEndpoint

steady = settings(deadline=None, derandomize=True)


def refusal(call: object, *args: object) -> str:
    with pytest.raises(CommandFailed) as caught:
        call(*args)  # type: ignore[operator]
    assert caught.value.exit_code == MISUSED
    return str(caught.value)


# endpoints


def test_an_endpoint_has_defaults() -> None:
    assert read_endpoint("gpu") == [SimulatedEndpoint("gpu", speed=10, slots=1, backend="gpu", batch="single")]


def test_every_key_of_an_endpoint_has_its_effect() -> None:
    text = "a: speed=2, slots=3, batch=4, overhead=1.5, weight=2, tier=1, models=x+y, load=9, timeout=60, linger=50"
    text += ", group=gpu-0, cheap=1"
    assert read_endpoint(text) == [
        SimulatedEndpoint(
            "a",
            backend="a",
            speed=2,
            slots=3,
            max_batch_size=4,
            batch="items",
            overhead_seconds=1.5,
            weight=2,
            tier=1,
            models=("x", "y"),
            load_seconds=9,
            timeout_seconds=60,
            max_wait_ms=50,
            exclusive_group="gpu-0",
            cheap=True,
        )
    ]
    assert read_endpoint("a:batch=4,shape=seeds")[0].batch == "seeds"


def test_several_alike_are_numbered_and_one_backend() -> None:
    assert [(one.name, one.group) for one in read_endpoint("t4:count=2")] == [("t4-1", "t4"), ("t4-2", "t4")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast:sped=2", "there is no key `sped`: did you mean `speed`?"),
        ("fast:speed=quick", "speed must be a number, not 'quick'"),
        ("fast:speed=0", "speed must be 1e-06 to 1e+09"),
        ("fast:speed=nan", "speed must be"),
        ("fast:slots=1.5", "slots must be a whole number"),
        ("fast:slots=9999", "slots must be 1 to 1024"),
        ("fast:speed", "'speed' is not KEY=VALUE; the keys of an endpoint are speed, slots"),
        ("fast:speed=1,speed=2", "`speed` is given twice"),
        ("fast:shape=item", "did you mean `items`?"),
        ("f st", "a name of an endpoint is 1 to 64"),
        (":speed=1", "a name of an endpoint is 1 to 64"),
        ("fast:count=1001", "count must be 1 to 1000"),
        ("a" * 5000, "a name of an endpoint"),
    ],
)
def test_a_wrong_endpoint_is_told_with_what_would_be_right(text: str, said: str) -> None:
    told = refusal(read_fleet, [text])
    assert told.startswith("--endpoint ")
    assert said in told
    assert len(told) < 500


def test_two_endpoints_of_a_name_are_refused_and_too_many_too() -> None:
    assert "a:count=2" in refusal(read_fleet, ["a", "a"])
    assert "1000" in refusal(read_fleet, ["a:count=1000", "b"])


def test_speeds_are_of_a_backend_or_an_endpoint() -> None:
    fleet = read_endpoint("sd:count=2")
    assert read_speeds(["sd=12+0.8", "sd-2=3"], fleet) == {"sd": (12, 0.8), "sd-2": (3, 0)}
    assert "did you mean `sd-1`?" in refusal(read_speeds, ["sd1=1"], fleet)
    assert "NAME=SPEED" in refusal(read_speeds, ["sd"], fleet)


# mixes, noise, times


def test_a_mix_has_sizes_steps_images_models_and_weights() -> None:
    assert read_mix("512x768x20:3, 1024x1024x30*4@sdxl:0.5,8x8x1") == (
        Kind(512, 768, 20, 1, None, 3),
        Kind(1024, 1024, 30, 4, "sdxl", 0.5),
        Kind(8, 8, 1),
    )


@pytest.mark.parametrize("text", ["", "512x512", "0x512x20", "512x512x0", "512x512x20*0", "512x512x20:-1", "99999x1x1"])
def test_a_wrong_mix_is_refused(text: str) -> None:
    assert refusal(read_mix, text).startswith("--mix ")


def test_noise_is_uniform_lognormal_or_none() -> None:
    assert read_noise("0.2") == read_noise("uniform:0.2") == Noise("uniform", 0.2)
    assert read_noise("lognormal:0.3") == Noise("lognormal", 0.3)
    assert read_noise("none").shape == "none"
    assert "did you mean `uniform`?" in refusal(read_noise, "unifrom:0.2")
    assert "0 to 0.99" in refusal(read_noise, "1.5")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400)])
def test_times_may_have_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1", "1e9", "inf", "1y"])
def test_times_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SpecFault):
        seconds_of(text)


# tenants


def test_tenants_have_shares_weights_and_priorities() -> None:
    senders, clients = read_tenants("a:weight=2,share=3,b,c:priority=5,running=4", {}, 100)
    assert [(one.tenant, one.share) for one in senders] == [
        (Tenant("a", weight=2), 3),
        (Tenant("b"), 1),
        (Tenant("c", priority=5, max_running=4), 1),
    ]
    assert clients == ()


def test_clients_send_by_themselves_until_the_end() -> None:
    senders, clients = read_tenants("a,b:clients=2,think=3", {}, 100)
    assert [one.share for one in senders] == [1, 0]
    assert clients == (Client(1, until=100, think_seconds=3),) * 2


def test_what_a_tenant_leaves_out_is_that_of_the_configured_key() -> None:
    known = {"a": Tenant("a", priority=7, weight=3, max_running=2)}
    senders, _ = read_tenants("a:weight=5", known, None)
    assert senders[0].tenant == Tenant("a", priority=7, weight=5, max_running=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:wieght=2", "did you mean `weight`?"),
        ("weight=2", "stands before any tenant"),
        ("a,a", "given twice"),
        ("a:clients=1,share=2", "no `share`"),
        ("a:think=2", "`think` is the pause"),
        ("a:weight=0", "weight must be"),
    ],
)
def test_a_wrong_tenant_is_told_with_what_would_be_right(text: str, said: str) -> None:
    assert said in refusal(read_tenants, text, {}, 100)


def test_clients_without_an_end_are_refused() -> None:
    assert "--duration" in refusal(read_tenants, "a:clients=1", {}, None)


# faults

FLEET = [SimulatedEndpoint("fast"), SimulatedEndpoint("slow")]


def test_faults_have_a_name_a_time_a_kind_and_sometimes_an_amount() -> None:
    texts = ["fast@60-120:down", "slow@0-:errors=0.2", "fast@1.5-2:slow=3"]
    assert read_faults(texts, FLEET) == [
        Fault("fast", 60, 120, "down"),
        Fault("slow", 0, math.inf, "errors", 0.2),
        Fault("fast", 1.5, 2, "slow", 3),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fats@0-1:down", "did you mean `fast`?"),
        ("fast@0-1:dwon", "did you mean `down`?"),
        ("fast:down", "NAME@START-END:KIND"),
        ("fast@2-1:down", "ends after it starts"),
        ("fast@0-1:errors", "errors=SHARE"),
        ("fast@0-1:errors=2", "0 to 1"),
        ("fast@0-1:down=2", "without an amount"),
        ("fast@0-1e9:down", "NAME@START-END:KIND"),
        ("fast@1.2.3-4:down", "the start must be a number"),
    ],
)
def test_a_wrong_fault_is_told_with_what_would_be_right(text: str, said: str) -> None:
    assert said in refusal(read_faults, [text], FLEET)


# traces


def test_a_trace_is_csv_with_a_head(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("seconds,size,steps,n,tenant,priority,model\n1.5,512x768,20,2,shop,5,sdxl\n\n0,,,,,,\n")
    read = read_trace(str(path), {"shop": Tenant("shop", weight=4, priority=1)})
    assert read.kinds == (Kind(512, 768, 20, 2, "sdxl"), Kind(1024, 1024, 30))
    assert [sender.tenant for sender in read.senders] == [Tenant("shop", weight=4, priority=5), Tenant("anonymous")]
    assert [(one.at, one.kind, one.sender) for one in read.arrivals] == [(1.5, 0, 0), (0, 1, 1)]


def test_a_trace_is_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"seconds": 1, "size": "512x512", "n": 2}, {"seconds": 2.5, "steps": 4, "tenant": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_trace(str(path), {})
    assert read.kinds == (Kind(512, 512, 30, 2), Kind(1024, 1024, 4))
    assert [one.at for one in read.arrivals] == [1, 2.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the column `seconds` is missing"),
        ("size\n1x1\n", "the column `seconds` is missing"),
        ("seconds,stesp\n1,2\n", "line 1: there is no column `stesp`: did you mean `steps`?"),
        ("seconds\n", "has no arrivals"),
        ("seconds\n1\n-2\n", "line 3: seconds must be"),
        ("seconds,n\n1,1\n2,5000\n", "line 3: the number of images must be 1 to 100"),
        ("seconds\n1,2,3\n", "line 2: it has 3 values for 1 columns"),
        ("seconds,size\n1,axb\n", "line 2: the width must be a whole number"),
        ("seconds,tenant\n1,a b\n", "line 2: a name of a tenant"),
        ('{"seconds": 1}\nnonsense\n', "line 2: it is not a JSON object"),
        ('{"seconds": 1}\n[1]\n', "line 2: it is not a JSON object"),
        ('{"secnods": 1}\n', "did you mean `seconds`?"),
        ('{"seconds": [1]}\n', "line 1: seconds must be a number"),
    ],
)
def test_a_wrong_trace_is_told_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert said in refusal(read_trace, str(path), {})


def test_a_trace_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_trace, "MOST_TRACE_BYTES", 2**20)
    assert "more than 1 MiB" in refusal(read_trace, "/dev/zero", {})


def test_a_trace_that_is_no_text_or_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(read_trace, str(path), {})
    assert "cannot be read" in refusal(read_trace, str(tmp_path / "none"), {})


@steady
@given(st.text(alphabet="abx0159.,:=@*+- \n\x00é", max_size=40))
def test_any_text_is_understood_or_refused(text: str) -> None:
    for read in (
        lambda: read_fleet([text]),
        lambda: read_mix(text),
        lambda: read_tenants(text, {}, 1),
        lambda: read_noise(text),
        lambda: read_faults([text], FLEET),
        lambda: read_speeds([text], FLEET),
    ):
        with suppress(CommandFailed):
            read()
