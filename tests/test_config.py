"""The settings: closed, typed, documented, and silent about secrets."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.config import (
    NOT_YET,
    Auth,
    BackendConfig,
    Config,
    ConfigError,
    EndpointConfig,
    EndpointEntry,
    KeyConfig,
    KeyLimit,
    Limit,
    Webhooks,
    backend_from_mapping,
    backend_to_mapping,
    describe,
    find_config_file,
    load,
)
from img_serving.config.moved import MOVED
from img_serving.config.problems import Problem
from img_serving.config.section import Section, fields_of, table_in

SECTIONS = [table for field in fields_of(Config) if (table := table_in(field.type)) is not None]
TABLES: list[type[Section]] = [Config, BackendConfig, KeyConfig, *SECTIONS]
KEYS = sorted({field.encode_name for table in TABLES for field in fields_of(table)})
DEFAULT_FILE = Path(__file__).parents[1] / "config" / "default.toml"

SEED_SAMPLE = """
[server]
host = "0.0.0.0"
port = 8080

[auth]
enabled = true
api_keys = ["your-api-key"]

[rate_limit]
enabled = true
requests_per_second = 100
burst_size = 200

[[backends]]
name = "stable-diffusion"
protocol = "http"
endpoints = ["http://localhost:7860"]
health_check_path = "/health"
health_check_interval_secs = 30
timeout_ms = 60000
weight = 1
enabled = true
"""

BACKEND = {"name": "sd", "endpoints": ["http://localhost:7860"]}


@pytest.fixture
def from_text(tmp_path):
    """Loads TOML text as a file named `settings.toml`."""

    def load_text(text, environ=None):
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return load(path, environ or {})

    return load_text


def problems_of(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return {problem.path: problem.message for problem in caught.value.problems}


def backend_problems(**keys):
    return problems_of(backend_from_mapping, {**BACKEND, **keys})


def environment(**keys):
    """`server__port=1` is IMG_SERVING__SERVER__PORT=1."""
    return {f"IMG_SERVING__{key.upper()}": value for key, value in keys.items()}


class TestDefaults:
    def test_nothing_said_is_the_defaults(self):
        loaded = load(None, {})
        assert loaded.config == Config()
        assert loaded.source is None
        assert loaded.notes == ()

    @pytest.mark.parametrize(
        ("section", "values"),
        [
            (
                "server",
                {
                    "host": "0.0.0.0",
                    "port": 8080,
                    "public_url": None,
                    "trusted_proxies": (),
                    "data_dir": "data",
                    "max_body_bytes": 1048576,
                    "max_upload_bytes": 67108864,
                    "keepalive_after_seconds": 50,
                    "drain_timeout_seconds": 15,
                    "cors_allow_origins": (),
                },
            ),
            ("auth", {"enabled": True, "api_keys": (), "metrics_public": True}),
            (
                "rate_limit",
                {"enabled": True, "requests_per_second": 100, "burst_size": 200, "global": None, "address": None},
            ),
            (
                "routing",
                {
                    "strategy": "round_robin",
                    "default_backend": None,
                    "aliases": {},
                    "unknown_model": "reject",
                    "affinity_seconds": 15,
                    "tier_overflow_seconds": None,
                    "slow_start_seconds": 30,
                    "panic_mode": True,
                },
            ),
            (
                "queue",
                {
                    "max_tasks": 1000,
                    "max_work": None,
                    "max_wait_seconds": None,
                    "ageing_seconds": 60,
                    "request_timeout_seconds": 600,
                    "coalesce": False,
                },
            ),
            ("retry", {"max_attempts": 3, "budget_ratio": 0.2, "hedge_after_factor": None}),
            (
                "breaker",
                {
                    "consecutive_failures": 5,
                    "consecutive_timeouts": 2,
                    "error_share": 0.5,
                    "window_seconds": 30,
                    "min_calls": 10,
                    "open_seconds": 5,
                    "max_open_seconds": 60,
                },
            ),
            (
                "limits",
                {
                    "max_n": 10,
                    "max_pixels": 16777216,
                    "max_steps": 200,
                    "max_prompt_chars": 32000,
                    "fetch_image_urls": False,
                },
            ),
            (
                "storage",
                {
                    "dir": "generated_images",
                    "ttl_hours": 24,
                    "max_bytes": 0,
                    "signed_urls": False,
                    "strip_metadata": False,
                },
            ),
            ("response", {"default_format": "url", "allow_file": False}),
            ("logging", {"level": "info", "format": None, "prompts": False}),
            (
                "jobs",
                {
                    "cancel_on_disconnect": True,
                    "disconnect_grace_seconds": 2,
                    "result_ttl_hours": 24,
                    "max_age_hours": 24,
                },
            ),
            ("webhooks", {"enabled": True, "secret": None, "max_age_hours": 24, "allow_private_addresses": False}),
        ],
    )
    def test_every_section_has_the_keys_and_defaults_of_the_interface(self, section, values):
        table = getattr(Config(), section)
        assert {field.encode_name: getattr(table, field.name) for field in fields_of(table.__class__)} == values

    def test_a_backend_has_the_keys_and_defaults_of_the_interface(self):
        backend = BackendConfig(name="a")
        unset = {field.encode_name for field in fields_of(BackendConfig) if getattr(backend, field.name) is None}
        assert unset == {
            *("max_concurrency", "max_batch_size", "max_batch_pixels", "exclusive_group", "retry_unknown"),
            *("api_key", "username", "password", "ca_file"),
            *("health_check_path", "default_size", "openai", "a1111", "comfyui", "grpc", "kserve", "scripted"),
        }
        assert {name: value for name, value in msgspec.structs.asdict(backend).items() if name not in unset} == {
            "name": "a",
            "protocol": "http",
            "endpoints": (),
            "models": (),
            "enabled": True,
            "weight": 1,
            "tier": 0,
            "timeout_ms": 60000,
            "max_wait_ms": 0,
            "cut_through": False,
            "headers": {},
            "tls_verify": True,
            "health_check_interval_secs": 30,
            "health_check_rise": 1,
            "health_check_fall": 2,
            "cheap": False,
            "shared": False,
        }

    def test_settings_do_not_change(self):
        with pytest.raises(AttributeError):
            Config().server.port = 1  # type: ignore[misc]

    def test_the_first_sample_ever_published_still_loads(self, from_text):
        loaded = from_text(SEED_SAMPLE)
        assert loaded.notes == ()
        assert loaded.config.auth.api_keys == ("your-api-key",)
        (backend,) = loaded.config.backends
        assert backend.endpoint_list() == (EndpointConfig("http://localhost:7860", 1, None),)
        assert backend.health_check_path == "/health"


class TestShippedFile:
    def test_it_is_what_the_code_describes(self):
        assert DEFAULT_FILE.read_text(encoding="utf-8") == describe()

    def test_it_loads_as_the_defaults_and_has_nothing_to_note(self):
        loaded = load(DEFAULT_FILE, {})
        assert loaded.config == Config()
        assert loaded.notes == ()

    def test_every_key_stands_in_it_with_a_line_about_it(self):
        lines = describe().splitlines()
        tables: list[type[Section]] = [*TABLES[1:], Limit]
        for table in tables:
            for field in fields_of(table):
                if table_in(field.type) is Limit:
                    assert f"#[rate_limit.{field.encode_name}]" in lines
                    continue
                places = [at for at, line in enumerate(lines) if line.lstrip("#").startswith(f"{field.encode_name} = ")]
                assert places, field.encode_name
                assert all(lines[at - 1].startswith("# ") for at in places)

    def test_every_example_in_it_is_a_setting_that_works(self, from_text):
        """Its switched-off lines, switched on: table by table, since some exclude each other."""
        skipped = ("#comfyui =", "#grpc =", "#kserve =", "#openai =", "#a1111 =", "#scripted =", "#api_key =")
        lines = [line for line in describe().splitlines() if not line.startswith(("# ", *skipped, "api_keys ="))]
        text = "\n".join(line.removeprefix("#") for line in lines)
        variables = dict.fromkeys(("TEAM_A_KEY", "WEBHOOK_SECRET", "UPSTREAM_PASSWORD"), "s3cret")
        variables["WEBHOOK_SECRET"] *= 4
        config = from_text(text, variables).config
        assert config.backends[0].password == "s3cret"
        assert config.auth.api_keys[0].rate_limit == KeyLimit(requests_per_second=10, burst_size=20)


class TestWebhooks:
    @pytest.mark.parametrize(
        ("secret", "said"),
        [("tooshort", "has 8 bytes"), ("whsec_AAAA", "has 3 bytes after whsec_"), ("whsec_!", "not base64")],
    )
    def test_a_secret_that_protects_nothing_stops_the_start(self, from_text, secret, said):
        with pytest.raises(ConfigError) as caught:
            from_text(f'[webhooks]\nsecret = "{secret}"')
        assert "webhooks.secret" in str(caught.value)
        assert said in str(caught.value)
        assert secret not in str(caught.value)

    def test_several_secrets_may_stand_side_by_side(self, from_text):
        assert from_text(f'[webhooks]\nsecret = "{"a" * 24},{"b" * 24}"').config.webhooks.secret is not None

    KEY = '[[auth.api_keys]]\nname = "a"\nkey = "k"\nrole = "admin"\nwebhook_url = "{}"\n'

    def test_a_key_has_a_receiver_of_its_own(self, from_text):
        (key,) = from_text(self.KEY.format("https://hooks.example.com/s3cret")).config.auth.key_list()
        assert key.tenant().webhook_url == "https://hooks.example.com/s3cret"
        assert "s3cret" not in repr(key)

    @pytest.mark.parametrize("url", ["ftp://hooks.example.com", "http://10.0.0.5/", "https://me:pw@hooks.example.com/"])
    def test_a_receiver_that_can_never_be_called_stops_the_start(self, from_text, url):
        with pytest.raises(ConfigError, match=r"auth\.api_keys\[0\]\.webhook_url"):
            from_text(self.KEY.format(url))

    def test_a_receiver_in_a_private_network_is_fine_where_those_are_allowed(self, from_text):
        text = self.KEY.format("http://10.0.0.5/") + "[webhooks]\nallow_private_addresses = true"
        assert from_text(text).config.auth.key_list()[0].webhook_url == "http://10.0.0.5/"


class TestFileChoice:
    def test_the_command_line_wins_then_the_variable_then_the_default_place(self, tmp_path):
        (tmp_path / "config").mkdir()
        for name in ("a.toml", "b.toml", "config/default.toml"):
            (tmp_path / name).touch()
        environ = {"IMG_SERVING_CONFIG": "b.toml"}
        assert find_config_file("a.toml", environ, tmp_path) == tmp_path / "a.toml"
        assert find_config_file(None, environ, tmp_path) == tmp_path / "b.toml"
        assert find_config_file(None, {}, tmp_path) == tmp_path / "config" / "default.toml"
        assert find_config_file(None, {"IMG_SERVING_CONFIG": ""}, tmp_path) == tmp_path / "config" / "default.toml"

    def test_without_any_file_there_is_none(self, tmp_path):
        (tmp_path / "config").mkdir()
        assert find_config_file(None, {}, tmp_path) is None

    @pytest.mark.parametrize(
        ("cli", "environ", "source"),
        [
            ("no.toml", {}, "--config"),
            ("", {}, "--config"),
            (None, {"IMG_SERVING_CONFIG": "no.toml"}, "IMG_SERVING_CONFIG"),
        ],
    )
    def test_a_named_file_that_is_not_there_stops_the_start(self, tmp_path, cli, environ, source):
        with pytest.raises(ConfigError, match=source):
            find_config_file(cli, environ, tmp_path)

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: Is a directory \(from /.*\)"):
            load(tmp_path, {})

    def test_a_file_without_end_is_said_once(self):
        with pytest.raises(ConfigError) as told:
            load(Path("/dev/zero"), {})
        assert str(told.value).count("/dev/zero") == 1
        assert "has more than 16 MiB" in str(told.value)

    def test_a_syntax_error_says_where(self, from_text):
        with pytest.raises(ConfigError, match=r"line 2, column 8: Invalid value \(from .*settings\.toml\)"):
            from_text("[server]\nport = = 1\n")

    @pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, 'a = "'])
    def test_any_broken_file_is_a_config_error(self, from_text, text):
        with pytest.raises(ConfigError, match=r"settings\.toml"):
            from_text(text)

    def test_other_encodings_are_refused_and_a_byte_order_mark_is_not(self, tmp_path):
        path = tmp_path / "settings.toml"
        path.write_bytes(b"\xef\xbb\xbf[server]\nport = 1\n")
        assert load(path, {}).config.server.port == 1
        path.write_bytes("[server]\nhost = 'é'".encode("latin-1"))
        with pytest.raises(ConfigError, match="not UTF-8"):
            load(path, {})


class TestClosed:
    @pytest.mark.parametrize(
        ("text", "path", "hint"),
        [
            ("[server]\nprot = 1", "server.prot", "did you mean `port`?"),
            ("[sever]\nport = 1", "sever", "did you mean `server`?"),
            ("port = 1", "port", "did you mean `server.port`?"),
            ("[rate_limit.global]\nburst = 1", "rate_limit.global.burst", "did you mean `burst_size`?"),
            ("[retry]\nzzz = 1", "retry.zzz", "known here: max_attempts, budget_ratio, hedge_after_factor"),
            ('[[auth.api_keys]]\nname="a"\nkey="k"\nrol="user"', "auth.api_keys[0].rol", "did you mean `role`?"),
            (
                '[[backends]]\nname="a"\nendpoints=[{url="http://a", wieght=1}]',
                "backends[0].endpoints[0].wieght",
                "did you mean `weight`?",
            ),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_one_that_was_meant(self, from_text, text, path, hint):
        assert problems_of(from_text, text) == {path: f"unknown key; {hint}"}

    def test_everything_that_is_wrong_is_said_at_once(self, from_text):
        found = problems_of(
            from_text,
            '[server]\nprot = 1\nport = 70000\nhost = 5\n[queue]\nmax_tasks = "x"\n[[backends]]\nweight = 0\n',
        )
        assert list(found) == [
            "server.prot",
            "server.host",
            "server.port",
            "queue.max_tasks",
            "backends[0].name",
            "backends[0].weight",
        ]

    def test_the_error_reads_as_lines_with_path_reason_and_file(self, from_text, tmp_path):
        with pytest.raises(ConfigError) as caught:
            from_text("[server]\nport = 70000\n[queue]\nmax_tasks = 0\n")
        assert str(caught.value) == (
            "configuration: 2 problems\n"
            f"  server.port: 70000 is not a whole number from 0 to 65535 (from {tmp_path}/settings.toml)\n"
            f"  queue.max_tasks: 0 is not a whole number, 1 or more (from {tmp_path}/settings.toml)"
        )

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("server = 1", "server", "1 is not a table"),
            ("[server]\nport = true", "server.port", "true is not a whole number from 0 to 65535"),
            ("[server]\nport = -1", "server.port", "-1 is not a whole number from 0 to 65535"),
            ('[server]\nport = "80"', "server.port", '"80" is not a whole number from 0 to 65535'),
            ('[server]\nhost = ""', "server.host", '"" is not a string that is not empty'),
            ("[auth]\nenabled = 1", "auth.enabled", "1 is not true or false"),
            ("[retry]\nbudget_ratio = nan", "retry.budget_ratio", "nan is not a number from 0 to 1"),
            ("[storage]\nttl_hours = inf", "storage.ttl_hours", "inf is not a number, 0 or more"),
            (
                "[storage]\nmax_bytes = 1" + "0" * 30,
                "storage.max_bytes",
                "a number that large is not a whole number, 0 or more",
            ),
            ("[queue]\nmax_wait_seconds = 0", "queue.max_wait_seconds", "0 is not a number above 0"),
            ("[server]\ndata_dir = 2020-01-01", "server.data_dir", "2020-01-01 is not a string that is not empty"),
            (
                '[logging]\nlevel = "inof"',
                "logging.level",
                '"inof" is not one of "debug", "error", "info", "warning"; did you mean `info`?',
            ),
            ('[server]\ntrusted_proxies = "a"', "server.trusted_proxies", None),
            ('[server]\ntrusted_proxies = ["10.0.0.1", "proxy"]', "server.trusted_proxies[1]", None),
            ('[server]\ncors_allow_origins = ["http://a/b"]', "server.cors_allow_origins[0]", None),
            ('[server]\npublic_url = "images.example.com"', "server.public_url", None),
            ('[routing.aliases]\na = "a"', "routing.aliases.a", "is an alias of itself"),
            ("[routing.aliases]\na = 1", "routing.aliases.a", "1 is not a string that is not empty"),
            ('[response]\ndefault_format = "file"', "response.default_format", None),
            ('backends = ["a"]', "backends[0]", None),
        ],
    )
    def test_a_wrong_value_is_refused_with_what_would_be_right(self, from_text, text, path, message):
        found = problems_of(from_text, text)
        assert list(found) == [path]
        assert message is None or found[path] == message

    @pytest.mark.parametrize(
        "text", ["[server]\nport = 0", "[storage]\nttl_hours = 0.5", "[queue]\nmax_wait_seconds = 3"]
    )
    def test_the_edges_are_allowed(self, from_text, text):
        assert from_text(text).config != Config()

    def test_networks_and_origins_that_are_right(self, from_text):
        text = '[server]\ntrusted_proxies = ["10.0.0.1", "fd00::/8"]\ncors_allow_origins = ["*", "https://a.b:8443"]'
        assert from_text(text).config.server.trusted_proxies == ("10.0.0.1", "fd00::/8")


class TestMoved:
    """Keys of another gateway's files: the error says where their meaning went."""

    @pytest.mark.parametrize(
        ("text", "path", "hint"),
        [
            ('[storage]\nbase_path="x"', "storage.base_path", "write `storage.dir`"),
            (
                '[storage]\nurl_prefix="x"',
                "storage.url_prefix",
                "write `server.public_url`, without the /images at its end",
            ),
            ("[queue]\nmax_size=1", "queue.max_size", "write `queue.max_tasks`"),
            ("[rate_limit.per_client]\nburst_size=1", "rate_limit.per_client", "`rate_limit.requests_per_second` and"),
            ('version="1.0"', "version", "files have no version: leave it out"),
            (
                '[[backends]]\nname="a"\nendpoints=["http://a"]\nhealth_check={path="/ok"}',
                "backends[0].health_check",
                "write `health_check_path` and `health_check_interval_secs`",
            ),
        ],
    )
    def test_a_key_of_another_gateway_is_refused_with_where_it_went(self, from_text, text, path, hint):
        found = problems_of(from_text, text)
        assert list(found) == [path]
        assert found[path].startswith(f"unknown key; {hint}")

    def test_a_variable_is_told_the_same(self):
        with pytest.raises(ConfigError) as caught:
            load(None, environment(storage__base_path="x"))
        assert caught.value.problems == (
            Problem("storage.base_path", "unknown key; write `storage.dir`", "IMG_SERVING__STORAGE__BASE_PATH"),
        )

    def test_a_backend_of_the_api_is_told_the_same(self):
        (message,) = backend_problems(name="a", endpoints=["http://a"], backend_type="image").values()
        assert message.startswith("unknown key; every backend here draws pictures: leave it out")

    def test_none_of_them_is_a_key_here_and_what_they_point_to_is(self):
        tables = {table.__name__: table for table in TABLES}
        for name, moved in MOVED.items():
            own = {field.encode_name for field in fields_of(tables[name])}
            assert not own & set(moved)
            for hint in moved.values():
                for word in re.findall(r"`([a-z_.]+)`", hint):
                    assert set(word.split(".")) <= set(KEYS)

    def test_variables_and_files_of_the_other_gateway_are_noted_and_not_read(self, tmp_path, from_text):
        (tmp_path / "gateway.yaml").write_text("server: {port: 1}")
        loaded = from_text("", {"GEN_GATEWAY__SERVER__PORT": "1", "GEN_GATEWAY_API_KEY": "sk-hidden"})
        assert loaded.config == Config()
        assert loaded.notes == (
            "GEN_GATEWAY__SERVER__PORT: not read; variables here begin with IMG_SERVING__",
            f"{tmp_path}/gateway.yaml: not read; the configuration is one TOML file",
        )

    def test_without_a_file_they_are_looked_for_where_ours_would_be(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load(None, {}).notes == ()
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "backends.yaml").write_text("backends: {}")
        assert load(None, {}).notes == ("config/backends.yaml: not read; the configuration is one TOML file",)

    @pytest.mark.parametrize("text", ["server:\n  port: 1\n", "[server"])
    def test_a_yaml_file_is_told_from_a_broken_one(self, tmp_path, text):
        path = tmp_path / "gateway.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match="is YAML by its name, and the configuration is TOML"):
            load(path, {})


class TestKeys:
    def test_a_plain_string_is_an_admin(self):
        (entry,) = Auth(api_keys=("abc",)).key_list()
        assert (entry.name, entry.key, entry.role) == ("admin-1", "abc", "admin")

    def test_a_table_refines(self, from_text):
        text = """
        [[auth.api_keys]]
        name = "team-a"
        key = "k"
        models = ["sdxl"]
        rate_limit = { requests_per_second = 5 }
        """
        tenant = from_text(text).config.auth.key_list()[0].tenant()
        assert (tenant.name, tenant.role, tenant.rate, tenant.burst) == ("team-a", "user", 5, None)
        assert tenant.models == {"sdxl"}
        assert tenant.backends is None

    @pytest.mark.parametrize(
        ("keys", "path"),
        [
            ('["a", "a"]', "auth.api_keys[1]"),
            ('["a", {name = "admin-1", key = "b"}]', "auth.api_keys[1]"),
            ('[{name = "a b", key = "b"}]', "auth.api_keys[0].name"),
            ('[{name = "a", key = "ü"}]', "auth.api_keys[0].key"),
            ('["a b"]', "auth.api_keys[0]"),
            ('[""]', "auth.api_keys[0]"),
            ("[7]", "auth.api_keys[0]"),
            ('[{name = "a"}]', "auth.api_keys[0].key"),
            ('[{name = "a", key = "k", models = []}]', "auth.api_keys[0].models"),
        ],
    )
    def test_a_key_that_cannot_be_used_is_refused(self, from_text, keys, path):
        assert list(problems_of(from_text, f"[auth]\napi_keys = {keys}")) == [path]


class TestEndpoints:
    @pytest.mark.parametrize(
        ("written", "base"),
        [
            ("http://a:7860", "http://a:7860"),
            ("http://a:7860/", "http://a:7860"),
            ("https://a/v1", "https://a"),
            ("https://a/v1/", "https://a"),
            ("https://a/openai/v1", "https://a/openai"),
            ("https://a/openai/", "https://a/openai"),
            ("https://a/xv1", "https://a/xv1"),
            ("http://[::1]:80/v1", "http://[::1]:80"),
        ],
    )
    def test_a_slash_or_v1_at_the_end_goes_and_a_prefix_stays(self, written, base):
        backend = backend_from_mapping({"name": "a", "endpoints": [written]})
        assert backend.endpoint_list()[0].url == base

    def test_an_endpoint_overrides_its_backend(self):
        backend = backend_from_mapping(
            {
                "name": "a",
                "weight": 2,
                "max_concurrency": 4,
                "endpoints": ["http://a", {"url": "http://b", "weight": 3, "max_concurrency": 1}],
            }
        )
        assert backend.endpoint_list() == (EndpointConfig("http://a", 2, 4), EndpointConfig("http://b", 3, 1))
        assert backend.endpoints[1] == EndpointEntry(url="http://b", weight=3, max_concurrency=1)

    @pytest.mark.parametrize(
        "url",
        [
            *("localhost:7860", "ftp://a", "http:a", "http://", "http:///x", "//a", "/", "grpc://a:1"),
            *("http://a:0", "http://a:99999", "http://a:x", "http://a:", "http://[::1", "http://a?", "http://a/#"),
            *("http://a b", "http://a\n", "http://a\x00", "http://ä", "http://a\\b", "http://a/?key=1"),
        ],
    )
    def test_what_is_no_address_is_refused(self, url):
        assert list(backend_problems(endpoints=[url])) == ["endpoints[0]"]

    def test_a_password_in_the_address_is_refused_without_repeating_it(self):
        found = backend_problems(endpoints=[{"url": "http://me:hunter2@a"}])
        assert "`username` and `password`" in found["endpoints[0].url"]
        assert "hunter2" not in str(found)

    def test_protocols_that_draw_by_themselves_have_none(self):
        for protocol in ("builtin", "scripted"):
            assert backend_from_mapping({"name": "a", "protocol": protocol}).endpoint_list() == ()
            assert "endpoints" in backend_problems(protocol=protocol)
        assert list(problems_of(backend_from_mapping, {"name": "a", "protocol": "openai"})) == ["endpoints"]


class TestBackends:
    @pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "a" * 65, "a\n"])
    def test_names_are_short_and_plain(self, name):
        assert list(backend_problems(name=name)) == ["name"]

    def test_two_of_one_name_are_refused(self, from_text):
        text = '[[backends]]\nname = "a"\nprotocol = "builtin"\n' * 2
        assert problems_of(from_text, text) == {"backends[1].name": '"a" is already the name of backends[0]'}

    @pytest.mark.parametrize("protocol", ["grpc", "kserve"])
    def test_what_speaks_grpc_has_no_health_page(self, protocol):
        found = backend_problems(protocol=protocol, endpoints=["grpc://a:1"], health_check_path="/health")
        assert "has no paths" in found["health_check_path"]

    def test_grpc_addresses_have_schemes_of_their_own(self):
        for url in ("grpc://a:1", "grpcs://a:1", "http://a:1"):
            assert backend_from_mapping({"name": "own", "protocol": "grpc", "endpoints": [url]}).endpoints == (url,)
        assert list(backend_problems(protocol="openai", endpoints=["grpc://a:1"])) == ["endpoints[0]"]

    def test_an_unknown_protocol_gets_the_nearest(self):
        assert "did you mean `openai`?" in backend_problems(protocol="open-ai")["protocol"]

    def test_a_protocol_table_is_for_its_own_protocol(self):
        backend = backend_from_mapping({"name": "a", "protocol": "scripted", "scripted": {"script": [{"ok": 1}]}})
        assert backend.options() == {"script": [{"ok": 1}]}
        assert backend_from_mapping(BACKEND).options() == {}
        assert list(backend_problems(protocol="openai", a1111={})) == ["a1111"]

    @pytest.mark.parametrize("value", [float("nan"), date(2020, 1, 1), 2**70, b"x", {1: 2}])
    def test_a_protocol_table_holds_what_json_can(self, value):
        assert backend_problems(protocol="openai", openai={"a": [value]})

    def test_a_protocol_table_is_not_bottomless(self):
        deep: dict[str, object] = {}
        for _ in range(5000):
            deep = {"a": deep}
        assert "nested" in str(backend_problems(protocol="openai", openai=deep))

    @pytest.mark.parametrize(
        ("keys", "path"),
        [
            ({"username": "me"}, "password"),
            ({"password": "x"}, "username"),
            ({"username": "a:b", "password": "x"}, "username"),
            ({"username": "a", "password": "x", "api_key": "k"}, "api_key"),
            ({"username": "a", "password": "x\n"}, "password"),
            ({"api_key": "a b"}, "api_key"),
            ({"headers": {"X-A": "a\r\nB: c"}}, "headers.X-A"),
            ({"headers": {"X-A": 5}}, "headers.X-A"),
            ({"headers": {"a b": "c"}}, "headers"),
            ({"headers": {"Content-Length": "5"}}, "headers.Content-Length"),
            ({"health_check_path": "health"}, "health_check_path"),
            ({"health_check_path": "/he alth"}, "health_check_path"),
            ({"default_size": "9x"}, "default_size"),
            ({"default_size": "0x9"}, "default_size"),
            ({"timeout_ms": 0}, "timeout_ms"),
            ({"weight": 0}, "weight"),
            ({"tier": -1}, "tier"),
            ({"max_concurrency": 0}, "max_concurrency"),
            ({"health_check_interval_secs": 0}, "health_check_interval_secs"),
            ({"models": [""]}, "models[0]"),
        ],
    )
    def test_what_cannot_be_is_refused(self, keys, path):
        assert list(backend_problems(**keys)) == [path]

    def test_a_default_size_within_the_limits(self, from_text):
        text = '[limits]\nmax_pixels = 100\n[[backends]]\nname = "a"\nprotocol = "builtin"\ndefault_size = "11x10"'
        assert list(problems_of(from_text, text)) == ["backends[0].default_size"]
        assert BackendConfig(name="a", default_size="640x480").default_dimensions() == (640, 480)
        assert BackendConfig(name="a").default_dimensions() == (1024, 1024)

    def test_unknown_outcomes_are_retried_unless_somebody_pays_or_the_operator_says_so(self):
        assert BackendConfig(name="a").retries_unknown()
        assert not BackendConfig(name="a", api_key="k").retries_unknown()
        assert BackendConfig(name="a", api_key="k", retry_unknown=True).retries_unknown()
        assert not BackendConfig(name="a", retry_unknown=False).retries_unknown()

    def test_null_means_unset(self):
        assert backend_from_mapping({**BACKEND, "api_key": None}).api_key is None
        assert list(backend_problems(timeout_ms=None)) == ["timeout_ms"]

    def test_paths_stand_below_where(self):
        found = problems_of(backend_from_mapping, {"name": "a", "weigth": 1}, "backends[2]")
        assert found == {"backends[2].weigth": "unknown key; did you mean `weight`?"}
        assert list(problems_of(backend_from_mapping, [], "body")) == ["body"]

    def test_it_survives_being_stored_with_its_secrets(self):
        backend = backend_from_mapping(
            {
                **BACKEND,
                "protocol": "openai",
                "api_key": "k",
                "headers": {"X-A": "b"},
                "openai": {"deep": [1, {"a": None}]},
                "endpoints": ["http://a", {"url": "http://b", "weight": 2}],
            }
        )
        stored = json.loads(json.dumps(backend_to_mapping(backend)))
        assert stored["api_key"] == "k"
        assert stored["endpoints"] == ["http://a", {"url": "http://b", "weight": 2}]
        assert backend_from_mapping(stored) == backend


class TestSecrets:
    def test_no_repr_shows_one(self):
        config = Config(
            auth=Auth(api_keys=("hunter2", KeyConfig(name="a", key="hunter2"))),
            webhooks=Webhooks(secret="hunter2"),
            backends=(
                BackendConfig(
                    name="a",
                    api_key="hunter2",
                    username="me",
                    password="hunter2",
                    headers={"X-Token": "hunter2"},
                    openai={"token": "hunter2"},
                ),
            ),
        )
        for shown in (
            repr(config),
            str(config),
            repr(config.auth),
            f"{config.auth.api_keys[1]}",
            repr(config.backends[0]),
        ):
            assert "hunter2" not in shown
        assert "api_key=***" in repr(config.backends[0])
        assert "headers={'X-Token': ***}" in repr(config.backends[0])
        assert "hunter2" not in str(config.__rich_repr__())
        assert repr(Webhooks()).startswith("Webhooks(enabled=True, secret=None")

    @pytest.mark.parametrize(
        "environ",
        [
            environment(auth__api_keys='["hunter2'),
            environment(auth__api_keys='[["hunter2"]]'),
            environment(auth__api_keys="hunter2,hunter2"),
            environment(webhooks__secret="hunter2", auth__api_keys="hunter2 x"),
            environment(backends='[{"name": "a", "endpoints": ["http://a"], "api_key": ["hunter2"]}]'),
            environment(backends='[{"name": "a", "endpoints": ["http://a"], "headers": "hunter2"}]'),
            environment(backends='[{"name": "a", "endpoints": ["http://a"], "api_key": "hunter2 "}]'),
        ],
    )
    def test_no_error_shows_one(self, environ):
        with pytest.raises(ConfigError) as caught:
            load(None, environ)
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in repr(caught.value)


class TestEnvironment:
    @pytest.mark.parametrize(
        ("environ", "read"),
        [
            (environment(server__port="9000"), lambda config: config.server.port == 9000),
            (environment(server__host="::"), lambda config: config.server.host == "::"),
            (environment(retry__budget_ratio="0.5"), lambda config: config.retry.budget_ratio == 0.5),
            (environment(rate_limit__global__burst_size="5"), lambda config: config.rate_limit.global_.burst_size == 5),
            (
                environment(rate_limit__address='{"burst_size": 5}'),
                lambda config: config.rate_limit.address.burst_size == 5,
            ),
            (environment(auth__api_keys="a, b"), lambda config: config.auth.api_keys == ("a", "b")),
            (environment(auth__api_keys='["a,b"]'), lambda config: config.auth.api_keys == ("a,b",)),
            (environment(auth__api_keys=""), lambda config: config.auth.api_keys == ()),
            (
                environment(auth__api_keys__0='{"name": "a", "key": "b"}'),
                lambda config: config.auth.api_keys[0].key == "b",
            ),
            (environment(auth__api_keys__0="b"), lambda config: config.auth.api_keys == ("b",)),
            (environment(routing__aliases='{"a": "b"}'), lambda config: config.routing.aliases == {"a": "b"}),
            (environment(queue__max_wait_seconds=""), lambda config: config.queue.max_wait_seconds is None),
            (environment(server='{"port": 1}', server__host="h"), lambda config: config.server.port == 1),
        ],
    )
    def test_a_variable_sets_its_key(self, environ, read):
        assert read(load(None, environ).config)

    @pytest.mark.parametrize("word", ["true", "1", "yes", "on", "TRUE", "On"])
    def test_words_for_true(self, word):
        assert load(None, environment(logging__prompts=word)).config.logging.prompts is True

    @pytest.mark.parametrize("word", ["false", "0", "no", "off", "False"])
    def test_words_for_false(self, word):
        assert load(None, environment(auth__enabled=word)).config.auth.enabled is False

    def test_it_lies_over_the_file_key_by_key(self, from_text):
        config = from_text(
            SEED_SAMPLE, environment(server__port="1", backends__0__endpoints="http://a,http://b")
        ).config
        assert (config.server.host, config.server.port) == ("0.0.0.0", 1)
        assert config.backends[0].endpoints == ("http://a", "http://b")
        assert config.backends[0].name == "stable-diffusion"

    def test_a_table_as_json_keeps_what_it_does_not_name_and_a_free_one_is_replaced(self, from_text):
        text = '[server]\nport = 1\n[routing.aliases]\na = "b"'
        config = from_text(text, environment(server='{"host": "h"}', routing__aliases='{"c": "d"}')).config
        assert (config.server.host, config.server.port) == ("h", 1)
        assert config.routing.aliases == {"c": "d"}

    def test_the_next_index_adds_to_the_list(self, from_text):
        names = {f"backends__{index}__name": f"b{index}" for index in range(1, 12)}
        protocols = {f"backends__{index}__protocol": "builtin" for index in range(1, 12)}
        config = from_text(SEED_SAMPLE, environment(**names, **protocols)).config
        assert [backend.name for backend in config.backends] == [
            "stable-diffusion",
            *(f"b{index}" for index in range(1, 12)),
        ]

    def test_a_gap_is_refused(self, from_text):
        found = problems_of(from_text, SEED_SAMPLE, environment(backends__2__name="x"))
        assert found == {"backends[2].name": "leaves a gap: the list has 1, so the next index is 1"}

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("SERVER__PROT", "did you mean IMG_SERVING__SERVER__PORT?"),
            ("SERVR__PORT", "did you mean IMG_SERVING__SERVER?"),
            ("BACKENDS__0__ENDPOINT", "did you mean IMG_SERVING__BACKENDS__0__ENDPOINTS?"),
            ("BACKENDS__X__NAME", "is not an index"),
            ("ROUTING__ALIASES__X", "give the whole table as JSON in IMG_SERVING__ROUTING__ALIASES"),
            ("SERVER__PORT__X", "there is nothing below this key"),
            ("", "unknown key"),
        ],
    )
    def test_an_unknown_variable_stops_the_start(self, name, hint):
        with pytest.raises(ConfigError) as caught:
            load(None, {f"IMG_SERVING__{name}": "1"})
        assert hint in str(caught.value)
        assert caught.value.problems[0].source == f"IMG_SERVING__{name}"

    def test_names_with_one_underscore_are_not_settings(self):
        names = ("IMG_SERVING_CONFIG", "IMG_SERVING_API_KEY", "IMG_SERVING_URL", "IMG_SERVING_ENV_FILE", "PATH")
        assert load(None, dict.fromkeys(names, "x")).config == Config()

    @pytest.mark.parametrize(
        ("environ", "path", "source"),
        [
            (environment(server__port="x"), "server.port", "IMG_SERVING__SERVER__PORT"),
            (environment(server='{"port": "x"}'), "server.port", "IMG_SERVING__SERVER"),
            (environment(auth__enabled="maybe"), "auth.enabled", "IMG_SERVING__AUTH__ENABLED"),
            (environment(backends__0__name="x"), "backends[0].endpoints", "IMG_SERVING__BACKENDS__0__NAME"),
            (environment(backends="{"), "backends", "IMG_SERVING__BACKENDS"),
            (environment(server__port__0="1"), "server.port.0", "IMG_SERVING__SERVER__PORT__0"),
            (environment(server='{"port": ' + "9" * 5000 + "}"), "server", "IMG_SERVING__SERVER"),
        ],
    )
    def test_a_wrong_value_names_its_variable(self, environ, path, source):
        with pytest.raises(ConfigError) as caught:
            load(None, environ)
        assert [(problem.path, problem.source) for problem in caught.value.problems] == [(path, source)]

    def test_a_problem_of_the_file_names_the_file_although_there_are_variables(self, from_text):
        with pytest.raises(ConfigError, match=r"server\.host.*settings\.toml"):
            from_text("[server]\nhost = 1", environment(server__port="1"))

    def test_what_the_file_spoiled_cannot_be_refined(self, from_text):
        assert "server" in problems_of(from_text, "server = 1", environment(server__port="1"))


class TestSubstitution:
    def test_variables_inside_strings_are_replaced_everywhere(self, from_text):
        text = """
        [auth]
        api_keys = ["${KEY}", {name = "a", key = "x-${KEY}-y"}]
        [routing.aliases]
        a = "$${KEY} ${EMPTY}$5 ${KEY}"
        """
        config = from_text(text, {"KEY": "k${KEY}", "EMPTY": ""}).config
        assert config.auth.api_keys[0] == "k${KEY}"
        assert config.auth.api_keys[1].key == "x-k${KEY}-y"
        assert config.routing.aliases["a"] == "${KEY} $5 k${KEY}"

    def test_an_unset_one_stops_the_start_and_is_named_with_its_key(self, from_text):
        with pytest.raises(ConfigError, match=r"auth\.api_keys\[0\]: needs the environment variable NO_SUCH"):
            from_text('[auth]\napi_keys = ["${NO_SUCH}"]')

    @pytest.mark.parametrize("text", ["${}", "${a b}", "${A:-b}", "${A"])
    def test_what_names_no_variable_is_refused(self, from_text, text):
        assert list(problems_of(from_text, f'[server]\nhost = "{text}"', {"A": "b"})) == ["server.host"]

    def test_the_environment_is_taken_as_it_is(self):
        assert load(None, environment(auth__api_keys="${KEY}")).config.auth.api_keys == ("${KEY}",)


class TestNotes:
    ONE_OF_EACH = """
    [server]
    max_upload_bytes = 5
    keepalive_after_seconds = 5
    [auth]
    api_keys = [{ name = "a", key = "k", priority = 1, weight = 2, max_running = 3 }]
    [storage]
    signed_urls = true
    [jobs]
    disconnect_grace_seconds = 1
    result_ttl_hours = 1
    [[backends]]
    name = "a"
    protocol = "builtin"
    max_wait_ms = 1
    cut_through = true
    """

    def test_every_key_that_does_nothing_yet_is_said_when_it_is_set(self, from_text):
        notes = [note for note in from_text(self.ONE_OF_EACH).notes if "does not act on it yet" in note]
        assert len(notes) == len(NOT_YET) == 2
        assert all("this version does not act on it yet" in note and "settings.toml" in note for note in notes)
        assert any(note.startswith("backends[0].cut_through is set") for note in notes)
        assert not any("hunter2" in note for note in notes)

    def test_from_the_environment_the_variable_is_named(self):
        (note,) = load(None, environment(storage__signed_urls="false")).notes
        assert note.startswith("storage.signed_urls is set (IMG_SERVING__STORAGE__SIGNED_URLS), but")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                '[[auth.api_keys]]\nname = "a"\nkey = "k"\nrole = "admin"\nbackends = ["tpyo"]',
                "no backend here is named tpyo",
            ),
            ('[[auth.api_keys]]\nname = "a"\nkey = "k"', "none is an admin key"),
            ("[retry]\nhedge_after_factor = 3", "no backend is `cheap`"),
            (
                '[[backends]]\nname = "a"\nprotocol = "scripted"\nmax_wait_ms = 5\nmax_batch_size = 1',
                "backends[0].max_wait_ms is set, but its batches hold one picture",
            ),
            ("[queue]\nmax_wait_seconds = 600", "the deadline comes first"),
            (
                "[webhooks]\nenabled = false\n" + TestWebhooks.KEY.format("https://hooks.example.com/"),
                "nothing is called",
            ),
        ],
    )
    def test_settings_that_have_no_effect_together_are_noted(self, from_text, text, said):
        (note,) = from_text(text).notes
        assert said in note

    def test_a_default_backend_that_nobody_defines_yet_is_noted(self, from_text):
        (note,) = from_text(SEED_SAMPLE + '[routing]\ndefault_backend = "stable-difusion"').notes
        assert "did you mean `stable-diffusion`?" in note
        assert load(None, environment(routing__default_backend="procedural")).notes == ()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["http://a", "openai", "http", "url", "${A}", "1x1"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def refused_properly(error, *, sourced=False):
    assert error.problems
    assert str(error)
    assert not sourced or all(problem.source for problem in error.problems)


class TestAnything:
    @settings(deadline=None, max_examples=40)
    @given(data=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
    def test_no_backend_mapping_raises_anything_else(self, data):
        try:
            backend = backend_from_mapping(data)
        except ConfigError as error:
            refused_properly(error)
        else:
            assert backend_from_mapping(backend_to_mapping(backend)) == backend
            assert backend.endpoint_list() is not None

    @settings(deadline=None, max_examples=40)
    @given(
        data=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
        variables=st.dictionaries(st.text(max_size=3), st.text(max_size=5)),
    )
    def test_no_file_raises_anything_else(self, data, variables):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tomllib, "loads", lambda _text: data)
            try:
                loaded = load(DEFAULT_FILE, variables)
            except ConfigError as error:
                refused_properly(error)
            else:
                assert isinstance(loaded.config, Config)
                assert repr(loaded)

    @settings(deadline=None, max_examples=40)
    @given(
        environ=st.dictionaries(
            st.lists(st.sampled_from([key.upper() for key in KEYS] + ["0", "1", "X", ""]), min_size=1, max_size=4).map(
                lambda parts: "__".join(["IMG_SERVING", *parts])
            ),
            st.text(max_size=12) | VALUES.map(lambda value: json.dumps(value, default=str)),
            max_size=5,
        )
    )
    def test_no_environment_raises_anything_else(self, environ):
        try:
            assert load(None, environ).source is None
        except ConfigError as error:
            refused_properly(error, sourced=True)

    @settings(deadline=None, max_examples=100)
    @given(url=st.text(max_size=20) | st.text("htps:/[]@#?.%1 a", max_size=16).map(lambda rest: f"http://{rest}"))
    def test_no_url_raises_anything_else(self, url):
        try:
            (endpoint,) = backend_from_mapping({"name": "a", "endpoints": [url]}).endpoint_list()
        except ConfigError:
            return
        assert endpoint.url.startswith(("http://", "https://"))
        assert not endpoint.url.endswith("/")
