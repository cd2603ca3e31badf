"""The dashboard and the alerts ask for what there is: held against real programs, and evaluated by a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.programs import free_port
from tests.support.traffic import SECONDS, Driven, driven, samples_of

from img_serving.telemetry.metrics import Metrics
from img_serving.worker.counts import memory_of

yaml: Any = pytest.importorskip("yaml", reason="NO PYYAML: pip install pyyaml")
DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/img-serving.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]

NEVER_HERE = {
    "img_serving_hedges_total",
    "img_serving_internal_errors_total",
    "img_serving_worker_device_memory_used_bytes",
    "img_serving_worker_device_memory_total_bytes",
}
"""Metrics that the traffic of these tests does not bring about: an engine of a GPU, a slow endpoint, a fault of ours."""

EMPTY_WHEN_WELL = ("img_serving_worker_loading_share",)
"""Shown only while something is not as it should be."""

ANY = "(any)"
"""Stands for a label's values where they are not ours to say."""

PROMETHEUS_OWN = {"up": (), "ALERTS": ("alertname", "alertstate", "backend", "endpoint")}

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="NO PROMETHEUS: apt install prometheus"
)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="NO PROMTOOL: apt install prometheus")


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    where: str
    expr: str
    legend: str = ""

    def __str__(self) -> str:
        return self.where

    @property
    def filled_in(self) -> str:
        """With the variables as Grafana puts them in when everything is chosen."""
        return re.sub(r"\$(job|instance|backend|worker)\b", ".*", self.expr).replace("$__rate_interval", "1m")


def queries() -> Iterator[Query]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield Query(f"{panel['title']} ({target['refId']})", target["expr"], target["legendFormat"])


def marks() -> Iterator[Query]:
    for one in DASHBOARD["annotations"]["list"]:
        if "expr" in one:
            yield Query(f"annotation {one['name']}", one["expr"], one["textFormat"])


def rules() -> Iterator[Query]:
    for rule in RULES:
        yield Query(f"alert {rule['alert']}", rule["expr"])


EVERY = [*queries(), *marks(), *rules()]


# the file itself


def test_the_file_is_what_grafana_reads() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"] == "img-serving"
    assert "id" not in DASHBOARD, "a number of one installation"


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        assert place["h"] >= 1
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_no_row_is_empty_and_every_title_is_there_once() -> None:
    kinds = [panel["type"] for panel in DASHBOARD["panels"]]
    assert kinds[0] == "row"
    assert all(after != "row" for before, after in zip(kinds, [*kinds[1:], "row"], strict=True) if before == "row")
    in_row: dict[str, set[str]] = defaultdict(set)
    row = ""
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            assert panel["title"] not in in_row[row]
            in_row[row].add(panel["title"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_says_what_it_is_in_which_unit_and_from_which_source(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in {"none", "s", "percentunit", "reqps", "opm", "Bps", "bytes"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for asked in (panel, *panel["targets"]):
        assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    if len(panel["targets"]) > 1 or panel["type"] != "stat":
        assert all(target["legendFormat"] for target in panel["targets"])


def test_variables_are_defined_and_the_source_is_one_of_them() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    builtin = {name for name in used if name.startswith("__")}
    assert builtin <= {"__rate_interval", "__all"}
    assert used - builtin == set(VARIABLES)


def test_what_is_provisioned_is_where_compose_puts_it() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/img-serving.yml").read_text())["providers"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    grafana = yaml.safe_load((DEPLOY.parent / "compose.yaml").read_text())["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("ImgServing")
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["action"].endswith(".")


@pytest.mark.parametrize("page", ["monitoring.md", "monitoring.ko.md"])
def test_the_page_has_every_alert_with_its_severity_and_names_panels_that_there_are(page: str) -> None:
    text = (DEPLOY.parent / "docs" / "deployment" / page).read_text()
    told = dict(re.findall(r"^\| `(ImgServing\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in RULES}
    titles = " ".join(panel["title"] for panel in DASHBOARD["panels"])
    named = re.findall(r"\*([A-Z0-9][^*|]+?)\*", text)
    assert len(named) > 10
    assert [one for one in named if one not in titles and one != "Scrape interval"] == []


@pytest.mark.smoke
@pytest.mark.parametrize("page", ["monitoring.md", "monitoring.ko.md"])
def test_the_page_names_metrics_and_labels_that_there_are(page: str, known: Known) -> None:
    text = (DEPLOY.parent / "docs" / "deployment" / page).read_text()
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \| ?([^|]*)\|", text, re.MULTILINE)
    assert len(rows) == 14
    for names, labels in rows:
        for name in re.findall(r"`(\w+)`", names):
            there = {one for suffix in ("", "_bucket") for one in known.labels.get(f"img_serving_{name}{suffix}", ())}
            assert there - {"job", "instance", "le"} == set(re.findall(r"`(\w+)`", labels)), name


# against what a scrape finds


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with driven(tmp_path_factory.mktemp("driven")) as running:
        yield running


@dataclass
class Known:
    """What pages have shown: the values of each label by metric, and the words of each metric's help."""

    labels: dict[str, dict[str, set[str]]]
    words: dict[str, set[str]]

    def look_at(self, page: str) -> None:
        for name, labels in samples_of(page):
            for label, value in labels.items():
                self.labels[name][label].add(value)
            self.allow(name)
        for name, told in re.findall(r"^# HELP (\S+) (.*)$", page, re.MULTILINE):
            self.words[name] |= set(re.findall(r"\w+", told))

    def allow(self, name: str, *labels: str) -> None:
        """A metric, with labels of any value; Prometheus gives it its job and instance."""
        for label in (*labels, "job", "instance"):
            self.labels[name][label].add(ANY)

    def fault_of(self, query: Query) -> str | None:
        """What of a query's names is not there; None: all is."""
        there: set[str] = set()
        for name, matchers in selectors(query.expr):
            if name not in self.labels:
                return f"{name} is on no page"
            labels = self.labels[name]
            there |= set(labels)
            for label, operator, value in matchers:
                if label not in labels:
                    return f"{name} has no {label}"
                # a value that is rare may stand in the metric's help alone
                values = labels[label] | self.words.get(name, set())
                pattern = value if "~" in operator else re.escape(value)
                if "$" not in value and ANY not in values and not any(re.fullmatch(pattern, one) for one in values):
                    return f"{label} of {name} is never {value}"
        grouped = grouping(query.expr)
        if not there or not grouped <= there:
            return f"nothing there has {sorted(grouped - there)}"
        aggregates = re.match(r"(sum|max|min|count|histogram_quantile)\b", query.expr)
        unshown = set(re.findall(r"\{\{(\w+)\}\}", query.legend)) - (grouped if aggregates else there)
        return f"the legend's {sorted(unshown)} are not in the result" if unshown else None


@pytest.fixture(scope="module")
def known(traffic: Driven) -> Known:
    """The pages of both programs, looked at until this traffic has brought about whatever is asked for."""
    seen = Known(defaultdict(lambda: defaultdict(set)), defaultdict(set))
    for name, labels in PROMETHEUS_OWN.items():
        seen.allow(name, *labels)
    for metric in vars(Metrics()).values():
        if f"img_serving_{metric.name}" in NEVER_HERE:
            seen.allow(f"img_serving_{metric.name}", *metric.label_names)
    engine = SimpleNamespace(statistics=lambda: SimpleNamespace(memory_used_bytes=1, memory_total_bytes=2))
    for name in memory_of(engine):
        seen.allow(f"img_serving_{name}")
    until = time.monotonic() + SECONDS
    while True:
        seen.look_at(traffic.page())
        if all(seen.fault_of(query) is None for query in EVERY) or time.monotonic() > until:
            return seen
        time.sleep(0.1)


def selectors(expr: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The metrics of an expression, each with its matchers (label, operator, value)."""
    found = re.findall(r"\b((?:img_serving|process)_\w+|up\b|ALERTS\b)(?:\{([^}]*)\})?", expr)
    matchers = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
    return [(name, matchers.findall(inside)) for name, inside in found]


def grouping(expr: str) -> set[str]:
    lists = re.findall(r"\b(?:by|on|group_left|group_right|without|ignoring)\s*\(([^)]*)\)", expr)
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


@pytest.mark.smoke
@pytest.mark.parametrize("query", EVERY, ids=str)
def test_a_query_names_metrics_labels_and_values_that_there_are(query: Query, known: Known) -> None:
    assert known.fault_of(query) is None


@pytest.mark.parametrize(
    "expr",
    [
        "img_serving_no_such_metric",
        'img_serving_queue_depth{backend="steady"}',
        'img_serving_stage_seconds_bucket{stage="draw"}',
        'img_serving_requests_total{status=~"7.."}',
        "sum by (tenant) (img_serving_slots)",
    ],
)
@pytest.mark.smoke
def test_a_query_for_what_is_not_there_is_found_out(expr: str, known: Known) -> None:
    assert known.fault_of(Query("wrong", expr)) is not None


@pytest.mark.smoke
def test_no_metric_is_left_out(known: Known) -> None:
    """What is not worth a place on the dashboard is not worth counting."""
    there = {name for name in known.words if name.startswith("img_serving_")}
    shown = {re.sub(r"_bucket$", "", name) for query in queries() for name, _ in selectors(query.expr)}
    assert there - shown == {"img_serving_batches_running", "img_serving_worker_load_seconds"}


def test_every_alert_and_every_annotation_is_one_that_the_parser_above_understands() -> None:
    for query in EVERY:
        rest = re.sub(r'"[^"]*"', "", query.expr)
        assert rest.count("{") == sum(
            1 for _ in re.finditer(r"(?:img_serving|process)_\w+\{|\bup\{|\bALERTS\{", rest)
        ), query


# with Prometheus


@needs_promtool
def test_promtool_finds_no_fault() -> None:
    config = DEPLOY / "prometheus/prometheus.yml"
    for what in (["config", str(config)], ["rules", str(DEPLOY / "prometheus/alerts.yml")]):
        done = subprocess.run(["promtool", "check", *what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(RULES)} rules found" in done.stdout


@needs_promtool
def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    cases = Path(__file__).parent / "alerts_test.yml"
    done = subprocess.run(
        ["promtool", "test", "rules", cases.name], cwd=cases.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {
        case["alertname"] for test in yaml.safe_load(cases.read_text())["tests"] for case in test["alert_rule_test"]
    }
    assert tried == {rule["alert"] for rule in RULES}


@contextmanager
def prometheus(directory: Path, running: Driven) -> Iterator[Callable[..., Any]]:
    """The real one with the shipped rules, scraping these programs; gives a function that asks its API."""
    worker = urllib.parse.urlsplit(running.worker.metrics_url).netloc
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus/alerts.yml")],
        "scrape_configs": [
            {
                "job_name": PROMETHEUS["scrape_configs"][0]["job_name"],
                "static_configs": [{"targets": [running.program.url.partition("//")[2]]}],
            },
            {"job_name": PROMETHEUS["scrape_configs"][1]["job_name"], "static_configs": [{"targets": [worker]}]},
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as reply:
                told = json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None
        assert told["status"] == "success"
        assert not told.get("warnings"), told["warnings"]
        return told["data"]

    try:
        until = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=SECONDS).close()
                break
            except OSError:
                assert process.poll() is None, (directory / "prometheus.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def may_be_empty(query: Query) -> bool:
    names = {name for name, _ in selectors(query.expr)}
    return bool(names & NEVER_HERE) or (bool(names & set(EMPTY_WHEN_WELL)) and "<" in query.expr)


def eventually(what: Callable[[], Any], wrong: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < until, wrong()
        time.sleep(0.5)


@needs_prometheus
@pytest.mark.smoke
def test_a_real_prometheus_answers_every_query_with_data(tmp_path: Path, traffic: Driven) -> None:
    with prometheus(tmp_path, traffic) as ask:
        left = list(queries())

        def all_there() -> bool:
            nonlocal left
            left = [one for one in left if not ask("query", query=one.filled_in)["result"] and not may_be_empty(one)]
            return not left

        eventually(all_there, lambda: f"no data: {[str(one) for one in left]}")
        for one in marks():
            ask("query", query=one.filled_in)
        for variable in VARIABLES.values():
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
                assert found is not None, variable["name"]
                choices = Query(variable["name"], f"count by ({found[2]}) ({found[1]})").filled_in
                assert ask("query", query=choices)["result"], variable["name"]
        numbers = ask("query", query='img_serving_endpoint_usable{backend="steady"}')["result"]
        assert [one["value"][1] for one in numbers] == ["1"]

        def evaluated() -> list[dict[str, Any]]:
            return [rule for group in ask("rules")["groups"] for rule in group["rules"]]

        eventually(lambda: all(rule["health"] == "ok" for rule in evaluated()), evaluated)
        assert {rule["name"] for rule in evaluated()} == {rule["alert"] for rule in RULES}

        def active() -> set[str]:
            return {rule["name"] for rule in evaluated() if rule["state"] != "inactive"}

        eventually(lambda: "ImgServingRequestsFail" in active(), evaluated)
        assert "ImgServingDown" not in active()
