"""A configuration in which models are named after what happens to those who ask for them, and the keys that it knows."""

from __future__ import annotations

from typing import Any

CLIENTS = ("python-1", "python-2", "python-3", "node-4", "node-6", "node-7")
KEY = "sk-clients-admin"
USER_KEY = "sk-clients-user"
PICTURE: dict[str, Any] = {"size": "64x64", "response_format": "b64_json"}
"""What most calls ask for beside prompt and model."""


def limited_key(name: str) -> str:
    """A key of its own for each client: one call at once, and then one a second."""
    return f"sk-clients-limited-{name}"


def environment() -> dict[str, str]:
    """The key, for a server without a configuration."""
    return {"IMG_SERVING__AUTH__API_KEYS": KEY}


def backend(model: str, **script: Any) -> str:
    """A `[[backends]]` table of protocol `scripted` for one model."""
    told = "\n".join(f"{name} = {_toml(value)}" for name, value in script.items())
    name = model.replace("/", "-")
    return f'[[backends]]\nname = "{name}"\nprotocol = "scripted"\nmodels = ["{model}"]\n[backends.scripted]\n{told}\n'


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


UNBREAKABLE = "[breaker]\nconsecutive_failures = 100000\nconsecutive_timeouts = 100000\nmin_calls = 100000\n"
"""Backends that are meant to fail go on being asked."""

LIMITED = "".join(
    f'[[auth.api_keys]]\nname = "{name}"\nkey = "{limited_key(name)}"\n'
    "rate_limit = { requests_per_second = 1, burst_size = 1 }\n"
    for name in CLIENTS
)
OPERATIONS = ("generation", "edit", "variation")

REHEARSAL = "\n".join((
    "[server]\nmax_body_bytes = 16384\nmax_upload_bytes = 262144\n",
    UNBREAKABLE,
    f'[[auth.api_keys]]\nname = "admin"\nkey = "{KEY}"\nrole = "admin"\n',
    f'[[auth.api_keys]]\nname = "user"\nkey = "{USER_KEY}"\nmodels = ["org/steady"]\n',
    LIMITED,
    backend("org/steady", operations=OPERATIONS, steps=4, previews=True),
    backend("fails", operations=OPERATIONS, sequence=["fail"]),
    backend("breaks", operations=OPERATIONS, sequence=["fail_midway"], steps=4, previews=True, latency_seconds=0.2),
    backend("one-breaks", sequence=["partial"], steps=4, previews=True),
    backend("refuses", sequence=["refuse"]),
    backend("moderates", sequence=["refuse_content"]),
    backend("blind", operations=OPERATIONS),
))  # fmt: skip
