"""`simulate`: what it says of a fleet under a load, and of one that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from img_serving.cli import main

Out = pytest.CaptureFixture[str]

PAIR = ("--endpoint", "a:speed=20", "--endpoint", "b:speed=5")


def figures(capsys: Out, *words: str) -> dict[str, Any]:
    assert main(["simulate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: Out, *words: str) -> str:
    assert main(["simulate", *words]) == 2
    return capsys.readouterr().err


# what it tells


def test_one_strategy_is_told_in_depth(capsys: Out) -> None:
    words = (
        "--load",
        "0.8",
        "--duration",
        "10m",
        "--tenants",
        "shop:weight=2,lab",
        "--mix",
        "512x512x20:2,1024x1024x30",
    )
    assert main(["simulate", *PAIR, *words]) == 0
    out = capsys.readouterr().out
    for text in ("2 endpoints (2 slots)", "least_work", "LATENCY", "FAIRNESS", "ENDPOINT", "shop", "lab", "█"):
        assert text in out
    assert "the arrivals are 80% of what the fleet can do" in out


def test_all_strategies_stand_side_by_side(capsys: Out) -> None:
    assert main(["simulate", *PAIR, "--rate", "0.3", "--duration", "600", "--strategy", "all"]) == 0
    out = capsys.readouterr().out
    for name in ("round_robin", "least_work", "peak_ewma", "reference", "early_round_robin", "early_least_connections"):
        assert name in out
    assert "QUEUE OVER TIME" in out


def test_the_json_has_every_figure(capsys: Out) -> None:
    found = figures(capsys, *PAIR, "--burst", "50", "--strategy", "least_work,random", "--seed", "7")
    assert found["seed"] == 7
    assert [one["strategy"] for one in found["results"]] == ["least_work", "random"]
    for one in found["results"]:
        assert (one["succeeded"], one["images"], one["calls"]) == (50, 50, 50)
        assert one["latency_seconds"]["p50"] <= one["latency_seconds"]["p99"] <= one["makespan_seconds"]
        assert [endpoint["name"] for endpoint in one["endpoints"]] == ["a", "b"]


def test_a_seed_gives_the_same_again_and_another_seed_other_luck(capsys: Out) -> None:
    words = (*PAIR, "--rate", "0.3", "--duration", "600")
    assert figures(capsys, *words) == figures(capsys, *words)
    assert figures(capsys, *words)["results"] != figures(capsys, *words, "--seed", "1")["results"]


def test_arrivals_that_exceed_the_fleet_are_told(capsys: Out) -> None:
    assert main(["simulate", *PAIR, "--load", "1.3", "--duration", "600"]) == 0
    assert "arrivals exceed what the fleet can do: utilisation 130%; the queue grows without bound" in (
        capsys.readouterr().out
    )


def test_the_part_of_the_fleet_that_is_too_small_is_named(capsys: Out) -> None:
    fleet = ("--endpoint", "a:models=x,speed=100", "--endpoint", "b:models=y")
    words = ("--mix", "1024x1024x30@x,1024x1024x30@y", "--rate", "0.5", "--duration", "600")
    assert "arrivals exceed what b can do" in " ".join(figures(capsys, *fleet, *words)["notes"])


def test_a_load_is_a_rate_for_this_fleet(capsys: Out) -> None:
    found = figures(capsys, *PAIR, "--load", "0.5", "--duration", "60")
    assert found["load"]["requests_per_second"] == pytest.approx(0.5 * 25 / (1024 * 1024 * 60 / 1e6))
    assert found["load"]["utilisation"] == pytest.approx(0.5)


def test_progress_and_results_do_not_mix(capsys: Out) -> None:
    main(["simulate", *PAIR, "--burst", "5"])
    assert capsys.readouterr().err == ""


# every option has its effect


def test_noise_changes_durations(capsys: Out) -> None:
    one = ("--endpoint", "a", "--rate", "0.001", "--duration", "1d")
    still = figures(capsys, *one, "--noise", "none")["results"][0]["latency_seconds"]
    assert still["p50"] == pytest.approx(1024 * 1024 * 60 / 1e6 / 10)
    assert figures(capsys, *one)["results"][0]["latency_seconds"]["p99"] > still["p50"] * 1.1


def test_a_full_queue_refuses_and_says_so(capsys: Out) -> None:
    found = figures(capsys, *PAIR, "--burst", "50", "--queue", "10")
    assert found["results"][0]["refused"] == 38
    assert found["results"][0]["refusals"] == {"queue_full": 38}
    assert any("refused as they came: 10 tasks may wait (--queue)" in note for note in found["notes"])


def test_a_terminal_of_80_columns_holds_every_column(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = ("--rate", "0.3", "--duration", "600", "--fail", "a@0-:errors=0.3", "--queue", "1", "--tenants", "a,b")
    assert main(["simulate", *PAIR, *words, "--strategy", "all", "--max-attempts", "1"]) == 0
    out = capsys.readouterr().out
    assert "weighted_round_robin" in out
    assert "…" not in out


def test_deadlines_and_waits_expire(capsys: Out) -> None:
    for words in (("--deadline", "30"), ("--max-wait", "30")):
        found = figures(capsys, *PAIR, "--burst", "50", *words)
        lost = found["results"][0]["expired"] + found["results"][0]["refused"]
        assert 20 < lost < 50
    assert figures(capsys, *PAIR, "--burst", "50", "--deadline", "0")["results"][0]["succeeded"] == 50


def test_failures_are_tried_again_up_to_max_attempts(capsys: Out) -> None:
    words = (*PAIR, "--rate", "0.1", "--duration", "1h", "--fail", "a@0-:errors=0.5", "--strategy", "round_robin")
    again = figures(capsys, *words)["results"][0]
    once = figures(capsys, *words, "--max-attempts", "1")["results"][0]
    assert again["failed_calls"] > 0
    assert again["failed"] < once["failed"]


def test_clients_wait_for_their_answers(capsys: Out) -> None:
    words = ("--endpoint", "a", "--tenants", "app:clients=2,think=1", "--duration", "100", "--noise", "none")
    found = figures(capsys, *words)["results"][0]
    assert found["tenants"][0]["wait_seconds"]["most"] < 7
    assert 12 <= found["succeeded"] <= 18


def test_batches_share_their_overhead(capsys: Out) -> None:
    words = ("--burst", "40", "--noise", "none")
    single = figures(capsys, "--endpoint", "a:overhead=5", *words)["results"][0]
    batched = figures(capsys, "--endpoint", "a:overhead=5,batch=4", *words)["results"][0]
    assert batched["mean_batch"] > 3
    assert batched["makespan_seconds"] < single["makespan_seconds"]


def test_a_trace_is_replayed(capsys: Out, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("seconds,size,steps,tenant\n0,512x512,20,a\n0,1024x1024,30,b\n100,512x512,20,a\n")
    found = figures(capsys, "--endpoint", "a", "--trace", "t.csv", "--noise", "none")
    assert "3 requests of t.csv" in found["load"]["what"]
    assert [one["jobs"] for one in found["results"][0]["tenants"]] == [2, 1]
    assert found["load"]["utilisation"] == pytest.approx((2 * 10.48576 + 62.91456) / 10 / 100, rel=1e-3)


def test_a_configuration_gives_the_fleet_and_the_terms(capsys: Out, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        """
        [auth]
        api_keys = [{ name = "shop", key = "sk-a-secret", weight = 3 }]
        [routing]
        strategy = "least_connections"
        [queue]
        max_tasks = 7
        request_timeout_seconds = 1000
        [[backends]]
        name = "sd"
        protocol = "a1111"
        endpoints = ["http://gpu-1:7860", "http://gpu-2:7860"]
        max_batch_size = 3
        [[backends]]
        name = "off"
        protocol = "openai"
        endpoints = ["http://other"]
        enabled = false
        """
    )
    words = ("--config", "c.toml", "--burst", "40", "--tenants", "shop")
    found = figures(capsys, *words, "--speed", "sd=12+0.5", "--speed", "sd-2=24")
    (result,) = found["results"]
    assert (result["strategy"], result["refused"]) == ("least_connections", 31)
    assert [one["name"] for one in result["endpoints"]] == ["sd-1", "sd-2"]
    assert result["tenants"][0]["weight"] == 3
    assert not any("no --speed" in note for note in found["notes"])
    assert any("no --speed for sd" in note for note in figures(capsys, *words)["notes"])


def test_the_plot_is_a_png(capsys: Out, tmp_path: Path) -> None:
    words = (*PAIR, "--rate", "0.3", "--duration", "600", "--strategy", "all", "--plot", "p.png")
    assert main(["simulate", *words]) == 0
    assert "drawn into p.png" in capsys.readouterr().err
    with Image.open(tmp_path / "p.png") as drawn:
        assert drawn.width == 1240
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


# what cannot be


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--endpoint gpu:speed=10,count=2, or --config FILE"),
        (PAIR, "--rate, --load, --burst or --trace"),
        ((*PAIR, "--rate", "1", "--burst", "2"), "--rate and --burst both say"),
        ((*PAIR, "--rate", "0"), "above 0"),
        ((*PAIR, "--rate", "1", "--duration", "0"), "above 0"),
        ((*PAIR, "--rate", "1e5", "--duration", "100d"), "more than the 2,000,000"),
        ((*PAIR, "--rate", "1", "--strategy", "least_wrok"), "did you mean `least_work`?"),
        ((*PAIR, "--rate", "1", "--strategy", "reference", "--fail", "a@0-1:down"), "reference knows no faults"),
        ((*PAIR, "--rate", "1", "--config", "x.toml"), "give one of them"),
        ((*PAIR, "--rate", "1", "--speed", "a=1"), "--speed goes with --config"),
        ((*PAIR, "--rate", "1", "--plot", "x.jpg"), "must end in .png"),
        ((*PAIR, "--trace", "x.csv", "--mix", "8x8x1"), "leave --mix, --tenants and --duration out"),
        ((*PAIR, "--rate", "1", "--tenants", "a:clients=1"), "none has a share"),
        ((*PAIR, "--burst", "5", "--tenants", "a,b:clients=1"), "--duration"),
        ((*PAIR, "--rate", "1", "--max-wait", "0"), "--max-wait must be above 0"),
        (("--endpoint", "a:models=x", "--rate", "1", "--mix", "8x8x1@y"), "no endpoint could serve the mix"),
        (("--config", "none.toml", "--rate", "1"), "none.toml"),
    ],
)
def test_what_cannot_be_is_told_with_what_would_be_right(capsys: Out, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(capsys, *words)


def test_a_plot_that_cannot_be_written_is_an_error(capsys: Out) -> None:
    assert main(["simulate", *PAIR, "--burst", "2", "--plot", "none/x.png"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_hostile_names_do_not_command_the_terminal(capsys: Out, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("seconds\n0\n")
    (tmp_path / "\x1b[31mt.csv").write_text("seconds\n0\n")
    assert main(["simulate", "--endpoint", "a", "--trace", "\x1b[31mt.csv"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in refusal(capsys, "--endpoint", "a:\x1b[31m=1", "--rate", "1")
