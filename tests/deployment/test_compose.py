"""compose.yaml means what its page says: it is valid, its names fit each other, and what it mounts and runs is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from img_serving.cli import _parser
from img_serving.config import Config, backend_from_mapping, load
from img_serving.worker.options import DEFAULT_PORT

yaml: Any = pytest.importorskip("yaml", reason="NO PYYAML: pip install pyyaml")
ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose.yaml"
TEXT = FILE.read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGES = [ROOT / "docs" / "deployment" / name for name in ("compose.md", "compose.ko.md")]
PROFILES = {
    None: {"gateway"},
    "worker": {"worker", "worker-backend"},
    "comfyui": {"comfyui", "comfyui-backend"},
    "monitoring": {"prometheus", "grafana"},
}
OURS = {"gateway", "worker", "worker-backend", "comfyui-backend"}
KEEPERS = {"worker-backend": "worker", "comfyui-backend": "comfyui"}
VARIABLES = set(re.findall(r"\$\{(\w+)", "".join(line.partition(" #")[0] + "\n" for line in TEXT.splitlines())))


def in_default_case(text: str) -> str:
    """With every variable at its default."""
    return re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda found: found[1] or "", text)


def volumes_of(service: str) -> list[list[str]]:
    return [in_default_case(one).split(":") for one in SERVICES[service].get("volumes", [])]


def gateway_volumes() -> list[str]:
    (declared,) = re.findall(r"^VOLUME (\[.*/app/config.*\])$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(declared))


def seconds(text: str) -> int:
    number, unit = int(text[:-1]), text[-1]
    return number * {"s": 1, "m": 60}[unit]


def test_it_keeps_to_the_published_schema() -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("NO CHECK-JSONSCHEMA: pip install check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_a_real_compose_resolves_it(profile: str | None) -> None:
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if (
        shutil.which(compose[0]) is None
        or subprocess.run([*compose, "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("NO DOCKER COMPOSE")
    chosen = [] if profile is None else ["--profile", profile]
    command = [*compose, "--env-file", "/dev/null", "-f", str(FILE), *chosen, "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout)["services"]
    assert set(resolved) == PROFILES[None] | PROFILES[profile]
    assert resolved["gateway"]["environment"]["IMG_SERVING__AUTH__API_KEYS"] is None, "unset, it is not even empty"


def test_there_are_the_services_of_each_profile_and_no_others() -> None:
    for profile, names in PROFILES.items():
        found = {name for name, one in SERVICES.items() if one.get("profiles", [None]) == [profile]}
        assert found == names
    assert set().union(*PROFILES.values()) == set(SERVICES)


def test_what_runs_without_a_profile_depends_on_none() -> None:
    assert "depends_on" not in SERVICES["gateway"]
    for name, one in SERVICES.items():
        for other in one.get("depends_on", []):
            assert SERVICES[other].get("profiles") in (None, one["profiles"]), name


def test_no_variable_is_required() -> None:
    """Compose asks for a required one (`:?`) whatever profile it stands in."""
    assert ":?" not in TEXT
    assert "${" in TEXT


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_comes_back_is_let_finish_and_gains_no_privilege(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert "network_mode" not in service
    assert seconds(service["stop_grace_period"]) >= 15
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"comfyui"}))
def test_what_needs_no_root_has_none_of_it_and_cannot_write_but_where_it_should(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    passing = {one.partition(":")[0] for one in service["tmpfs"]}
    kept = {target for _, target, *_ in volumes_of(name)}
    assert "/tmp" in passing  # noqa: S108 - the container's own
    assert passing - {"/tmp"} <= set(gateway_volumes()) - kept  # noqa: S108 - the container's own
    if SERVICES[name]["image"] == SERVICES["gateway"]["image"]:
        assert set(gateway_volumes()) <= passing | kept, "what is neither becomes a volume without a name"


def test_the_gateway_is_stopped_after_it_has_drained() -> None:
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) > Config().server.drain_timeout_seconds + 5


def test_every_bind_mount_is_in_the_repository_and_read_only() -> None:
    for name in SERVICES:
        for source, target, *mode in volumes_of(name):
            if source.startswith("."):
                assert mode == ["ro"], (name, target)
                assert source == "./models" or (ROOT / source).exists(), (name, source)


def test_every_named_volume_is_declared_and_used() -> None:
    used = {source for name in SERVICES for source, *_ in volumes_of(name) if not source.startswith(".")}
    assert used == set(COMPOSE["volumes"])


def test_the_gateways_volumes_are_those_of_its_image() -> None:
    assert {target for _, target, *_ in volumes_of("gateway")} == set(gateway_volumes())
    assert {"data": "/app/data", "pictures": "/app/generated_images"}.items() <= {
        source: target for source, target, *_ in volumes_of("gateway")
    }.items()
    config = Config()
    assert f"/app/{config.server.data_dir}" == "/app/data"
    assert f"/app/{config.storage.dir}" == "/app/generated_images"


def test_images_are_built_from_targets_and_arguments_that_the_dockerfile_has() -> None:
    for name in ("gateway", "worker"):
        build = SERVICES[name]["build"]
        assert re.search(rf"^FROM .* AS {build['target']}$", DOCKERFILE, re.MULTILINE)
        for argument in build.get("args", {}):
            assert re.search(rf"^ARG {argument}\b", DOCKERFILE, re.MULTILINE), argument


def test_the_companions_run_the_gateways_image() -> None:
    for name in KEEPERS:
        assert SERVICES[name]["image"] == SERVICES["gateway"]["image"]
        assert "build" not in SERVICES[name]


def test_images_of_others_are_of_a_version() -> None:
    for name in set(SERVICES) - OURS:
        tag = in_default_case(SERVICES[name]["image"]).rpartition(":")[2]
        assert re.search(r"\d", tag), name
        assert tag != "latest"


def test_only_the_gateway_is_reached_from_other_machines() -> None:
    for name, one in SERVICES.items():
        for port in one.get("ports", []):
            assert name == "gateway" or port.startswith("127.0.0.1:")
    assert in_default_case(SERVICES["gateway"]["ports"][0]) == f"8080:{Config().server.port}"


def test_settings_in_the_environment_are_settings(tmp_path: Path) -> None:
    values = {
        "IMG_SERVING__SERVER__PUBLIC_URL": "https://images.example.com",
        "IMG_SERVING__AUTH__API_KEYS": "sk-one,sk-two",
        "IMG_SERVING__BACKENDS": '[{"name": "a", "protocol": "a1111", "endpoints": ["http://a:7860"]}]',
        "IMG_SERVING__LOGGING__LEVEL": "debug",
    }
    named = {name: value for name, value in SERVICES["gateway"]["environment"].items() if "__" in name}
    assert set(named) == set(values)
    assert set(named.values()) == {None}, "a value here would take the place of the file's, and so would an empty one"
    config = load(ROOT / "config" / "default.toml", values).config
    assert [key.key for key in config.auth.key_list()] == ["sk-one", "sk-two"]
    assert config.backends[0].name == "a"
    assert (config.server.public_url, config.logging.level) == ("https://images.example.com", "debug")


def test_no_container_gets_the_whole_env_file_of_the_project() -> None:
    """It holds the access token of an image registry, which is nobody's business in there."""
    for name, one in SERVICES.items():
        files = one.get("env_file", [])
        assert name == "gateway" or not files
        assert [file["path"] for file in files] in ([], ["config/.env"])
        assert all(file["required"] is False for file in files)
    assert not {name for name in VARIABLES if "HUB" in name}
    assert not {name for one in SERVICES.values() for name in one.get("environment", {}) if "HUB" in name}


def test_git_never_sees_the_gateways_secrets() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("NO GIT CHECKOUT")
    ignored = subprocess.run(["git", "check-ignore", "-q", "config/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_what_it_runs_is_a_command_of_the_program(name: str) -> None:
    service = SERVICES[name]
    words = shlex.split(in_default_case(service.get("command", "serve")))
    assert service.get("entrypoint", ["img-serving"]) == ["img-serving"]
    assert callable(_parser().parse_args(words).run)


def test_the_gateways_health_check_is_a_command_of_the_program() -> None:
    kind, program, *words = SERVICES["gateway"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "img-serving")
    assert callable(_parser().parse_args(words).run)


@pytest.mark.parametrize(("keeper", "engine"), KEEPERS.items())
def test_a_companion_adds_its_engine_where_that_listens(keeper: str, engine: str) -> None:
    service = SERVICES[keeper]
    (told,) = service["command"]
    backend = backend_from_mapping(json.loads(told))
    (endpoint,) = backend.endpoints
    host, port = re.sub(r"^\w+://", "", str(endpoint)).split(":")
    assert host == engine
    if engine == "worker":
        arguments = _parser().parse_args(shlex.split(in_default_case(SERVICES["worker"]["command"])))
        assert arguments.port == int(port) == DEFAULT_PORT
        assert arguments.host == "0.0.0.0"
    else:
        assert in_default_case(SERVICES[engine]["ports"][0]).endswith(f":{port}")
    assert service["entrypoint"] == ["python3", "/opt/keep_backend.py"]
    assert ["./deploy/compose/keep_backend.py", "/opt/keep_backend.py", "ro"] in volumes_of(keeper)
    assert service["depends_on"] == {"gateway": {"condition": "service_healthy"}}


def test_companions_look_for_the_key_where_the_gateway_puts_it() -> None:
    place = SERVICES["gateway"]["environment"]["IMG_SERVING_ENV_FILE"]
    assert place.startswith("/app/data/")
    assert f'"{place}"' in (ROOT / "deploy/compose/keep_backend.py").read_text()
    for name in KEEPERS:
        assert ["data", "/app/data", "ro"] in volumes_of(name)


def test_prometheus_asks_where_they_answer() -> None:
    gateway, worker = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert gateway["static_configs"] == [{"targets": [f"gateway:{Config().server.port}"]}]
    (named,) = worker["dns_sd_configs"]
    arguments = _parser().parse_args(shlex.split(in_default_case(SERVICES["worker"]["command"])))
    assert (named["names"], named["port"]) == (["worker"], arguments.metrics_port)
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"


def test_no_dashboard_is_open_to_everybody() -> None:
    said = SERVICES["grafana"]["environment"]
    assert said["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert said["GF_USERS_ALLOW_SIGN_UP"] == "false"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_every_variable_and_every_volume_is_documented(page: Path) -> None:
    text = page.read_text()
    passed_on = {
        name for one in SERVICES.values() for name, value in one.get("environment", {}).items() if value is None
    }
    for name in VARIABLES | passed_on | set(COMPOSE["volumes"]):
        assert f"`{name}`" in text, name
