"""The pages for people who come from somewhere else: what they say to paste is pasted here, and does what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pybase64
import pytest
from tests.recipes.pages import DOCS, block_with, blocks_of, korean_of
from tests.support.fake_a1111 import FakeA1111
from tests.support.programs import Program, serving
from tests.support.threads import in_a_thread

from img_serving.backends.scripted import picture
from img_serving.cli import main
from img_serving.config import ConfigError, Loaded, load

THREE = DOCS / "recipes" / "one-a1111-to-three.md"
RUST = DOCS / "recipes" / "rust-configuration.md"
PAGES = [THREE, RUST]
"""Pages of their own part of the documentation: looked for where that part is there."""

PASSWORD = "long-enough"
SECRETS = {
    "IMG_SERVING_API_KEY": "sk-operator",
    "A1111_PASSWORD": PASSWORD,
    "SHOP_KEY": "sk-shop",
    "NIGHT_KEY": "sk-night",
    "GEN_GATEWAY_API_KEY": "sk-old-key-1",
    "OPENAI_API_KEY": "sk-upstream",
}
WAIT_SECONDS = 60.0


@pytest.fixture(autouse=True)
def _nobodys_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("IMG_SERVING", "GEN_GATEWAY"))]:
        monkeypatch.delenv(name)


def wait_for(happened: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestBothLanguages:
    def test_they_have_the_same_code(self, page: Path) -> None:
        assert blocks_of(page)
        assert blocks_of(korean_of(page)) == blocks_of(page)

    def test_each_links_the_other_at_its_head(self, page: Path) -> None:
        korean = korean_of(page)
        assert f"]({korean.name})" in page.read_text().splitlines()[2]
        assert f"]({page.name})" in korean.read_text().splitlines()[2]

    def test_every_page_that_they_link_is_there(self, page: Path) -> None:
        for one in (page, korean_of(page)):
            for target in re.findall(r"\]\(([^)#:]+\.md)", one.read_text()):
                assert (one.parent / target).is_file(), f"{one.name} links {target}"


def asked(
    url: str, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a reply; the operator's key goes along where `headers` names none."""
    request = urllib.request.Request(  # noqa: S310 - our own
        url + path,
        None if body is None else json.dumps(body).encode(),
        {
            "Content-Type": "application/json",
            **(headers or {"Authorization": f"Bearer {SECRETS['IMG_SERVING_API_KEY']}"}),
        },
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as reply:  # noqa: S310 - our own
            content, status, told = reply.read(), reply.status, reply.headers
    except urllib.error.HTTPError as error:
        content, status, told = error.read(), error.code, error.headers
    try:
        value = json.loads(content)
    except ValueError:
        value = content.decode()
    return status, {name.lower(): text for name, text in told.items()}, value


class Engine(FakeA1111):
    """A server with the page's checkpoint, in a thread of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.checkpoints = {"dreamshaper_8": "dreamshaper_8.safetensors", "sd_xl_base": "sd_xl_base.safetensors"}
        self.loaded = "dreamshaper_8"


class Fleet:
    """Three servers, each of which can be stopped alone."""

    def __init__(self, stack: ExitStack, *, basic: str | None, step_seconds: float) -> None:
        self.engines = [Engine(basic=basic, step_seconds=step_seconds, steps=20) for _ in range(3)]
        self._stacks = [stack.enter_context(ExitStack()) for _ in self.engines]
        for own, engine in zip(self._stacks, self.engines, strict=True):
            own.enter_context(in_a_thread(engine))

    def kill(self, engine: Engine) -> None:
        """Every connection is cut, and it no longer listens."""
        self._stacks[self.engines.index(engine)].close()

    def drawn(self) -> list[int]:
        """How many pictures each has drawn."""
        return [sum(one["batch_size"] for one in engine.drawn) for engine in self.engines]

    def placed(self, text: str, gateway: str = "") -> str:
        """A block of the page with the servers' addresses, and the gateway's."""
        for index, engine in enumerate(self.engines):
            text = text.replace(f"http://gpu-{index + 1}:7860", engine.url)
        return text.replace("http://localhost:8080", gateway).replace("export A1111_PASSWORD=…\n", "")


@contextmanager
def fleet(*, locked: bool = True, step_seconds: float = 0.0) -> Iterator[Fleet]:
    basic = "Basic " + pybase64.b64encode_as_string(f"gateway:{PASSWORD}".encode())
    with ExitStack() as stack:
        yield Fleet(stack, basic=basic if locked else None, step_seconds=step_seconds)


class Reader:
    """Somebody who pastes the page's blocks into a shell, in a directory of their own."""

    def __init__(self, directory: Path, fleet: Fleet, gateway: Program | None = None) -> None:
        if shutil.which("curl") is None:
            pytest.skip("NO CURL: the page's commands cannot be run")
        self.directory = directory
        self.fleet = fleet
        self.url = "" if gateway is None else gateway.url
        programs = directory / "bin"
        programs.mkdir(exist_ok=True)
        program = programs / "img-serving"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m img_serving "$@"\n')
        program.chmod(0o755)
        self.environment = {
            **os.environ, **SECRETS, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200",
            **({"IMG_SERVING_URL": self.url} if self.url else {}),
        }  # fmt: skip

    def start(self, block: str) -> subprocess.Popen[str]:
        text = "set -euo pipefail\n" + self.fleet.placed(block, self.url)
        return subprocess.Popen(
            ["bash", "-c", text], cwd=self.directory, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def paste(self, words: str) -> str:
        """Run the shell block with `words` in it; what it printed."""
        process = self.start(block_with(THREE, words, "sh"))
        out, said = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, said
        return out

    def run_python(self, words: str) -> None:
        """Run the Python block with `words` in it."""
        text = self.fleet.placed(block_with(THREE, words, "python"), self.url)
        subprocess.run(
            [sys.executable, "-c", text], cwd=self.directory, env=self.environment, check=True, timeout=WAIT_SECONDS
        )


def step(number: int) -> str:
    return block_with(THREE, f"# step {number}:", "toml")


@contextmanager
def at_step(number: int, directory: Path, fleet: Fleet) -> Iterator[Reader]:
    """The gateway as it is after that step, and somebody who reads on."""
    with serving(directory, fleet.placed(step(number)), environment=SECRETS) as gateway:
        yield Reader(directory, fleet, gateway)


class TestOneA1111ToThree:
    @pytest.mark.parametrize("number", [1, 3, 4, 5])
    def test_the_configuration_of_each_step_is_right(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "gateway.toml"
        path.write_text(step(number))
        assert main(["check-config", "--config", str(path)]) == 0
        said = capsys.readouterr().out
        assert "note:" not in said
        assert f"a1111 (a1111, {2 if number > 3 else 1} endpoint" in said
        config = load(path, SECRETS).config
        assert config.backends[0].shared is (number == 1)
        assert (config.backends[0].password is None) is (number == 1)
        assert (config.routing.strategy == "least_work") is (number > 3)

    def test_every_toml_block_is_one_of_the_steps(self) -> None:
        written = [one.text for one in blocks_of(THREE) if one.language == "toml"]
        assert written == [step(number) for number in (1, 3, 4, 5)]

    def test_the_keys_are_what_is_said_of_them(self, tmp_path: Path) -> None:
        path = tmp_path / "gateway.toml"
        path.write_text(step(5))
        operator, shop, night = (key.tenant() for key in load(path, SECRETS).config.auth.key_list())
        assert operator.role == "admin"
        assert (shop.role, shop.priority, shop.weight) == ("user", 10, 3)
        assert (night.max_running, night.models, night.rate, night.burst) == (1, frozenset({"dreamshaper_8"}), 2, 20)

    def test_the_probe_prints_a_table_that_can_be_pasted(self, tmp_path: Path) -> None:
        with fleet(locked=False) as open_fleet:
            said = Reader(tmp_path, open_fleet).paste("7860 --no-draw\n")
            assert tomllib.loads(said[said.index("[[backends]]") :])["backends"][0]["protocol"] == "a1111"
            assert "dreamshaper_8" in said
        (tmp_path / "gateway.toml").write_text(step(3))
        with fleet() as locked:
            said = Reader(tmp_path, locked).paste("--password-env")
            assert 'username = "gateway"' in said
            assert "OK: " in said
            assert PASSWORD not in said

    def test_the_same_request_before_and_after_draws_the_same_picture(self, tmp_path: Path) -> None:
        with fleet(locked=False) as servers, at_step(1, tmp_path, servers) as reader:
            reader.paste("/sdapi/v1/txt2img")
            reader.paste('open("after.png"')
            assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()
            before, after = servers.engines[0].drawn
            told = (
                "prompt",
                "negative_prompt",
                "seed",
                "steps",
                "cfg_scale",
                "sampler_name",
                "width",
                "height",
                "model",
            )
            assert {name: after[name] for name in told} == {name: before[name] for name in told}
            assert after["sampler_name"] == "Euler a"

    def test_the_same_in_python_and_an_edit(self, tmp_path: Path) -> None:
        with fleet(locked=False) as servers, at_step(1, tmp_path, servers) as reader:
            reader.run_python("urllib")
            reader.run_python("openai")
            assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()
            (tmp_path / "mask.png").write_bytes(picture("mask", 1, 512, 768))
            said = json.loads(reader.paste("/v1/images/edits"))
            assert said["size"] == "512x768"
            edited = servers.engines[0].drawn[-1]
            assert (edited["denoising_strength"], edited["steps"], len(edited["init_images"])) == (0.6, 20, 1)
            assert edited["mask"]

    def test_three_servers_share_the_work_and_one_is_removed_and_put_back(self, tmp_path: Path) -> None:
        with fleet(step_seconds=0.02) as servers, at_step(4, tmp_path, servers) as reader:
            assert "gpu-3" in reader.paste("img-serving backends add")
            said = reader.paste("for seed in")
            assert sorted(set(said.splitlines())) == ["200 from a1111", "200 from gpu-3"]
            assert sum(servers.drawn()) == 6
            assert all(servers.drawn())  # two of one prompt may travel together, and still there is work for three
            reader.paste("img-serving backends remove")
            assert set(reader.paste("for seed in").splitlines()) == {"200 from a1111"}
            assert "gpu-3" in reader.paste("img-serving backends add")

    def test_what_a_removed_server_draws_is_finished_and_what_waited_goes_elsewhere(self, tmp_path: Path) -> None:
        with fleet(step_seconds=0.05) as servers, at_step(4, tmp_path, servers) as reader:
            reader.paste("img-serving backends add")
            clients = reader.start(block_with(THREE, "for seed in", "sh"))
            last = servers.engines[2]
            wait_for(lambda: last.drawn, "the third server drew nothing")
            reader.paste("img-serving backends remove")
            out, _ = clients.communicate(timeout=WAIT_SECONDS)
            assert [line[:3] for line in out.splitlines()] == ["200"] * 6
            assert "200 from gpu-3" in out
            assert last.interrupts == 0

    def test_a_request_without_a_model_stays_with_the_first_backend(self, tmp_path: Path) -> None:
        with fleet(step_seconds=0.02) as servers, at_step(4, tmp_path, servers) as reader:
            reader.paste("img-serving backends add")
            block = block_with(THREE, "for seed in", "sh").replace('"model": "dreamshaper_8", ', "")
            out, _ = reader.start(block).communicate(timeout=WAIT_SECONDS)
            assert out.splitlines() == ["200 from a1111"] * 6

    def test_a_server_that_dies_while_it_draws_costs_the_client_nothing_but_time(self, tmp_path: Path) -> None:
        with fleet(step_seconds=0.1) as servers, at_step(5, tmp_path, servers) as reader:
            client = reader.start(block_with(THREE, "moved.json", "sh"))
            drawing = servers.engines[:2]
            wait_for(lambda: any(engine.state["sampling_step"] > 1 for engine in drawing), "nobody drew")
            (busy,) = [engine for engine in drawing if engine.in_flight and engine.drawn]
            (other,) = [engine for engine in drawing if engine is not busy]
            servers.kill(busy)
            out, said = client.communicate(timeout=WAIT_SECONDS)
            assert out == "200 from a1111 in 2 attempts\n", said
            assert [one["seed"] for one in other.drawn] == [11] == [one["seed"] for one in busy.drawn]
            assert json.loads((tmp_path / "moved.json").read_text())["data"][0]["seed"] == 11

    def test_it_can_be_watched_and_a_user_may_not(self, tmp_path: Path) -> None:
        with fleet() as servers, at_step(5, tmp_path, servers) as reader:
            assert reader.paste("$SHOP_KEY") == "403\n"
            said = reader.paste("img-serving queue\n")
            assert all(engine.url in said for engine in servers.engines[:2])
            for name in ("queue_depth", "slots_in_use", "endpoint_usable"):
                assert f"\nimg_serving_{name}" in said

    def test_what_a1111_has_and_the_gateway_has_not_is_named(self, tmp_path: Path) -> None:
        with fleet() as servers, at_step(4, tmp_path, servers) as reader:
            fields = {"enable_hr": True, "styles": [], "subseed": 3, "tiling": True}
            body = {"prompt": "x", "model": "dreamshaper_8", "clip_skip": 2, **fields}
            status, headers, _ = asked(reader.url, "/v1/images/generations", body)
            assert status == 200
            assert headers["x-img-serving-ignored"] == ", ".join(sorted(fields))
            (drawn,) = [one for engine in servers.engines for one in engine.drawn]
            assert drawn["clip_skip"] == 2
            assert asked(reader.url, "/v1/images/generations", {**body, "strict": True})[0] == 400
            wrong = {"prompt": "x", "model": "dreamshaper_8", "sampler_name": "Euler ab"}
            status, _, error = asked(reader.url, "/v1/images/generations", wrong)
            assert status == 400
            assert "Euler a" in error["error"]["message"]

    def test_a_backend_of_the_file_is_not_removed_over_the_api(self, tmp_path: Path) -> None:
        with fleet() as servers, at_step(4, tmp_path, servers) as reader:
            process = reader.start("img-serving backends remove a1111")
            _, said = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == 1
            assert "config.toml; remove it there, or set enabled = false" in said

    def test_the_figures_of_the_simulation_are_those_of_the_page(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        told = []
        for one in blocks_of(THREE):
            for line in one.text.splitlines():
                if line.startswith("img-serving simulate"):
                    assert main([*line.split()[1:], "--json"]) == 0
                    told.append(json.loads(capsys.readouterr().out))
        for run, seconds, refuses in zip(told, (20, 9, 438, 16), (False, False, True, False), strict=True):
            (result,) = run["results"]
            assert result["latency_seconds"]["p95"] == pytest.approx(seconds, rel=0.1)
            assert bool(result["refused"]) is refuses
        assert "| 20 s | 438 s" in THREE.read_text()
        assert "| 9 s | 16 s |" in THREE.read_text()


def rust(words: str) -> str:
    """The TOML block of that page with `words` in its first line."""
    return block_with(RUST, f"# {words}", "toml")


class TestRustConfiguration:
    def test_the_old_file_is_refused_with_what_the_page_shows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "default.toml").write_text(rust("before: config/default.toml"))
        assert main(["check-config"]) == 2
        said = capsys.readouterr().err.replace(f"{tmp_path}/", "/app/")
        assert said == block_with(RUST, "4 problems", "text")

    def test_after_the_four_changes_it_means_what_it_meant(self, tmp_path: Path) -> None:
        before = tomllib.loads(rust("before: config/default.toml"))
        loaded = loaded_from(tmp_path, rust("after: config/default.toml\n"))
        assert loaded.notes == ()
        config = loaded.config
        assert (config.server.host, config.server.port) == (before["server"]["host"], before["server"]["port"])
        assert config.auth.api_keys == tuple(before["auth"]["api_keys"])
        assert all(key.role == "admin" for key in config.auth.key_list())
        for limit in (config.rate_limit, config.rate_limit.global_):
            assert limit is not None
            assert (limit.requests_per_second, limit.burst_size) == (50, 100)
        assert config.storage.dir == before["storage"]["base_path"]
        assert f"{config.server.public_url}/images" == before["storage"]["url_prefix"]
        assert (config.logging.level, config.logging.format) == ("warning", "console")
        for old, new in zip(before["backends"], config.backends, strict=True):
            assert (old["name"], old["protocol"], tuple(old["endpoints"]), old["timeout_ms"]) == (
                new.name, new.protocol, new.endpoints, new.timeout_ms,
            )  # fmt: skip

    def test_the_old_yaml_files_are_told_from_ours(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("gateway", "backends"):
            path = tmp_path / f"{name}.yaml"
            path.write_text(block_with(RUST, f"# before: config/{name}.yaml", "yaml"))
            assert main(["check-config", "--config", str(path)]) == 2
            assert "is YAML by its name, and the configuration is TOML" in capsys.readouterr().err

    def test_one_toml_file_in_place_of_two_yaml_files_means_what_they_said(self, tmp_path: Path) -> None:
        yaml = pytest.importorskip("yaml", reason="NO PYYAML: the two old files cannot be read here")
        gateway, old = (
            yaml.safe_load(block_with(RUST, f"# before: config/{name}.yaml", "yaml"))
            for name in ("gateway", "backends")
        )
        loaded = loaded_from(tmp_path, rust("after: config/default.toml, in place of both"))
        assert loaded.notes == ()
        config = loaded.config
        assert config.server.port == gateway["server"]["port"]
        assert list(config.server.cors_allow_origins) == gateway["cors"]["allowed_origins"]
        assert config.auth.api_keys == (*gateway["auth"]["api_keys"], SECRETS["GEN_GATEWAY_API_KEY"])
        for limit, name in ((config.rate_limit, "per_client"), (config.rate_limit.global_, "global")):
            assert limit is not None
            assert {"requests_per_second": limit.requests_per_second, "burst_size": limit.burst_size} == gateway[
                "rate_limit"
            ][name]
        assert config.queue.max_tasks == gateway["queue"]["max_size"]
        assert config.queue.max_wait_seconds == gateway["queue"]["timeout_secs"]
        assert config.storage.dir == gateway["storage"]["base_path"]
        assert config.storage.ttl_hours == gateway["storage"]["cleanup"]["max_age_hours"]
        assert f"{config.server.public_url}/files" == gateway["storage"]["url_prefix"]
        assert config.logging.level == gateway["logging"]["level"]
        assert config.routing.strategy == old["routing"]["default_strategy"]
        assert set(config.routing.aliases) == set(old["routing"]["model_mappings"])
        images = old["backends"]["image"]
        for was, backend in zip(images, config.backends, strict=True):
            assert (was["name"], was["protocol"], was["endpoints"]) == (
                backend.name, backend.protocol, list(backend.endpoints),
            )  # fmt: skip
        first, spare, hosted = config.backends
        assert first.weight == images[0]["load_balancer"]["weight"]
        assert first.health_check_interval_secs == images[0]["health_check"]["interval_secs"]
        batching = gateway["queue"]["batching"]
        assert (first.max_batch_size, first.max_wait_ms) == (batching["max_batch_size"], batching["max_wait_ms"])
        assert (first.tier, spare.tier) == (0, 1)
        assert (hosted.api_key, hosted.models) == (SECRETS["OPENAI_API_KEY"], ("dall-e-3",))

    def test_every_key_of_the_table_is_refused_or_known_here(self, tmp_path: Path) -> None:
        said = RUST.read_text()
        for text, word in {
            "[queue]\nmax_size = 5": "`queue.max_tasks`",
            "[queue]\ntimeout_secs = 5": "`queue.max_wait_seconds`",
            "[storage.cleanup]\nmax_age_hours = 5": "`storage.ttl_hours`",
            '[cors]\nallowed_origins = ["*"]': "`server.cors_allow_origins`",
            '[routing]\ndefault_strategy = "random"': "`routing.strategy`",
        }.items():
            with pytest.raises(ConfigError) as caught:
                loaded_from(tmp_path, text)
            assert word in str(caught.value)
            assert word in said

    def test_the_old_variables_are_named_and_the_older_ones_are_read(self, tmp_path: Path) -> None:
        loaded = loaded_from(tmp_path, "", GEN_GATEWAY__SERVER__PORT="1", IMG_SERVING__SERVER__PORT="15115")
        assert loaded.config.server.port == 15115
        assert loaded.notes == ("GEN_GATEWAY__SERVER__PORT: not read; variables here begin with IMG_SERVING__",)

    def test_with_yaml_files_only_the_painter_draws_and_the_log_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "gateway.yaml").write_text(block_with(RUST, "# before: config/gateway.yaml", "yaml"))
        config = '[auth]\napi_keys = ["${IMG_SERVING_API_KEY}"]\n'
        with serving(tmp_path, config, environment=SECRETS) as gateway:
            status, headers, _ = asked(gateway.url, "/v1/images/generations", {"prompt": "x", "size": "64x64"})
            assert (status, headers["x-backend"]) == (200, "procedural")
            assert "gateway.yaml: not read; the configuration is one TOML file" in gateway.log

    def test_clients_see_what_the_page_says(self, tmp_path: Path) -> None:
        config = '[auth]\napi_keys = ["${IMG_SERVING_API_KEY}"]\n'
        (tmp_path / "generated_images").mkdir()
        old = tmp_path / "generated_images" / "3f2a9c44-7d1e-4000-8000-000000000000.png"
        old.write_bytes(picture("old", 1, 8, 8))
        os.utime(old, (1, 1))
        with serving(tmp_path, config, environment=SECRETS) as gateway:
            key = SECRETS["IMG_SERVING_API_KEY"]
            assert asked(gateway.url, "/v1/models", Authorization=key)[0] == 401
            assert asked(gateway.url, "/v1/models", **{"X-API-Key": key})[0] == 200
            assert asked(gateway.url, "/v1/chat/completions", {"messages": []})[0] == 404
            assert asked(gateway.url, "/swagger-ui")[0] == 404
            assert asked(gateway.url, "/docs")[0] == asked(gateway.url, "/openapi.json")[0] == 200
            assert set(asked(gateway.url, "/health")[2]) == {"status", "version", "backends"}
            assert asked(gateway.url, "/v1/images/generations", {"prompt": "x", "size": "large"})[0] == 400
            listed = asked(gateway.url, "/v1/backends")[2]
            assert listed["object"] == "list"
            assert listed["data"][0]["endpoints"][0]["url"]
            backend = {"name": "new", "protocol": "http", "endpoints": ["http://127.0.0.1:9"]}
            status, _, error = asked(gateway.url, "/v1/backends", {**backend, "backend_type": "image"})
            assert (status, error["error"]["code"]) == (400, "invalid_backend")
            assert asked(gateway.url, "/v1/backends", backend)[0] == 201
            status, _, deleted = asked(gateway.url, "/v1/backends/new", method="DELETE")
            assert (status, deleted["name"], deleted["deleted"]) == (200, "new", True)
            assert asked(gateway.url, f"/images/{old.name}")[0] == 404
        assert old.exists()


def loaded_from(directory: Path, text: str, **environment: str) -> Loaded:
    path = directory / "settings.toml"
    path.write_text(text)
    return load(path, {**SECRETS, **environment})
