"""A picture of 90 seconds through every proxy at once, with and without the blanks that keep a reply open.

It takes as long as it says, and no processor: the gateways sleep, the proxies wait, and so do the clients.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.programs import serving
from tests.support.proxies import FILES, SNIPPETS, Answered, Proxy, program_of, proxying

pytestmark = pytest.mark.smoke

SECONDS = 90
KEY = "sk-ninety-seconds"
CONFIG = f"""
[auth]
api_keys = ["{KEY}"]
[server]
%s
[[backends]]
name = "slow"
protocol = "scripted"
timeout_ms = 120000
[backends.scripted]
latency_seconds = {SECONDS}
"""
BODY = {"model": "scripted", "prompt": "a lighthouse", "size": "64x64", "response_format": "b64_json"}

OWN_LIMIT = {"nginx": "        proxy_read_timeout 660s;\n", "haproxy": "    timeout server 660s\n"}
"""The line without which the proxy waits for as long as it does by itself: 60 s, or 50 s in Debian's file. Caddy waits on."""


def ask(proxy: Proxy) -> Answered:
    return proxy.ask("POST", "/v1/images/generations", key=KEY, body=BODY, seconds=300)


def without(name: str) -> str:
    text = (SNIPPETS / FILES[name]).read_text()
    assert OWN_LIMIT[name] in text
    return text.replace(OWN_LIMIT[name], "")


def test_a_picture_of_ninety_seconds_is_not_cut(tmp_path: Path) -> None:
    """Behind each proxy: kept open with blanks from 50 s on, silent to its end, and cut where it has its own limit."""
    names = [name for name in FILES if program_of(name) is not None]
    if not names:
        pytest.skip(f"NO PROXY: none of {', '.join(FILES)} is installed")
    with ExitStack() as stack:
        kept = stack.enter_context(serving(tmp_path / "kept", CONFIG % "# as it is")).port
        silent = stack.enter_context(serving(tmp_path / "silent", CONFIG % "keepalive_after_seconds = 0")).port

        def start(name: str, what: str, port: int, snippet: str | None = None) -> Proxy:
            return stack.enter_context(proxying(name, tmp_path / f"{name}-{what}", port, snippet=snippet))

        proxies: dict[tuple[str, str], Proxy] = {}
        for name in names:
            for what, port in {"kept open": kept, "silent": silent}.items():
                proxies[name, what] = start(name, what.split()[0], port)
            if name in OWN_LIMIT:
                proxies[name, "cut"] = start(name, "limited", silent, without(name))
        with ThreadPoolExecutor(len(proxies)) as threads:
            asked = {run: threads.submit(ask, proxy) for run, proxy in proxies.items()}
            answers = {run: one.result() for run, one in asked.items()}

    for (name, what), answer in answers.items():
        if what == "cut":
            assert answer.status == 504, (name, answer)
            continue
        assert answer.status == 200, (name, what, answer)
        assert answer.json["data"][0]["b64_json"], (name, what)
        assert answer.body.startswith(b" ") == (what == "kept open"), (name, what)
