"""Keys that other programs' configurations have, and what to write here instead.

A configuration is closed, so a file that was written for another gateway stops the start. Where the key is a well-known one,
the error says where its meaning went. The keys are those of gen-serving-gateway, earlier generative-img-serving
(`src/config/settings.rs`, `config/*.toml` and `config/*.yaml` at v0.1.0 and v0.4.1), and `base_dir`, which people write for
`base_path`. docs/recipes/rust-configuration.md has them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

MOVED: Final[Mapping[str, Mapping[str, str]]] = {
    "Config": {
        "api": "the paths of the API are fixed: leave it out",
        "version": "files have no version: leave it out",
        "defaults": "there are no defaults for all backends: each [[backends]] table says its own",
        "metrics": "/metrics is always there, `auth.metrics_public` says for whom: leave it out",
        "cors": "write `server.cors_allow_origins`",
    },
    "Server": {"tls": "TLS belongs to the proxy before the gateway: leave it out, and set `server.trusted_proxies`"},
    "Auth": {
        "methods": "a key comes as `Authorization: Bearer`: leave it out",
        "bypass_paths": "/health, /livez, /readyz and /images are open, /metrics by `auth.metrics_public`: leave it out",
    },
    "RateLimit": {
        "per_client": "`rate_limit.requests_per_second` and `burst_size` count each key, `rate_limit.address` each address",
        "per_model": "limits are for keys, not models: leave it out",
    },
    "Queue": {
        "enabled": "there is always a queue: leave it out",
        "max_size": "write `queue.max_tasks`",
        "timeout_secs": "write `queue.max_wait_seconds`, and for the whole request `queue.request_timeout_seconds`",
        "batching": "write `max_batch_size` and `max_wait_ms` in the [[backends]] table",
    },
    "Routing": {
        "default_strategy": "write `routing.strategy`",
        "model_mappings": "a backend says what it serves with `models`, other names are `routing.aliases`",
        "fallbacks": "give the backend that stands in a higher `tier`, and both the same `models`",
    },
    "Storage": {
        "base_path": "write `storage.dir`",
        "base_dir": "write `storage.dir`",
        "url_prefix": "write `server.public_url`, without the /images at its end",
        "cleanup": "write `storage.ttl_hours`",
    },
    "Logging": {"output": "the log goes to stderr: leave it out"},
    "BackendConfig": {
        "type": "every backend here draws pictures: leave it out (text needs a gateway of its own)",
        "backend_type": "every backend here draws pictures: leave it out (text needs a gateway of its own)",
        "auth": "write `api_key`, `headers`, or `username` and `password`",
        "health_check": "write `health_check_path` and `health_check_interval_secs`",
        "load_balancer": "write `weight` here and `routing.strategy` for all",
        "capabilities": "what it can do is found out: leave it out",
        "generation": "write `models` and `default_size`",
    },
}
"""By the table of the settings (the class's name) and the unknown key in it: what to do."""

FOREIGN_PREFIX: Final = "GEN_GATEWAY__"
"""The other gateway's settings in the environment; those of its first name began with `IMG_SERVING__`, as ours do."""

FOREIGN_FILES: Final = ("gateway.yaml", "backends.yaml")
"""What it reads in the configuration's directory."""


def moved_to(table: str, key: str) -> str | None:
    """What to do about the unknown `key` of the settings' class `table`, or None where nobody knows it."""
    return MOVED.get(table, {}).get(key)


def foreign_notes(environ: Mapping[str, str], directory: Path) -> Iterator[str]:
    """What is there for the other gateway, and does nothing here. No value of a variable is repeated."""
    variables = sorted(name for name in environ if name.startswith(FOREIGN_PREFIX))
    if variables:
        yield f"{', '.join(variables)}: not read; variables here begin with IMG_SERVING__"
    for file in (directory / name for name in FOREIGN_FILES):
        try:
            is_there = file.is_file()
        except OSError:  # somewhere that we may not look
            is_there = False
        if is_there:
            yield f"{file}: not read; the configuration is one TOML file"
