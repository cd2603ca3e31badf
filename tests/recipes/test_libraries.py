"""The programs of the recipes, as they stand on the pages, run with the real libraries against the real gateway."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.clients.rehearsal import KEY, UNBREAKABLE, backend, environment
from tests.recipes.pages import DOCS, block_with, program_of
from tests.support.official_clients import VARIABLE, need_clients
from tests.support.programs import Program, free_port, serving, to_an_end

need_clients()
pytestmark = pytest.mark.smoke

PROGRAM_SECONDS = 300.0
"""LiteLLM alone takes half a minute to be imported for the first time, on a machine that has other things to do."""

PROXY_KEY = "sk-litellm"
"""As the page's configuration says."""

HIDDEN = (
    "OPENAI_", "LITELLM_", "LANGCHAIN_", "LANGSMITH_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHON", "NODE_",
)  # fmt: skip
LIGHTHOUSE: dict[str, Any] = {
    "prompt": "a lighthouse at sunset", "size": "768x512",
    "seed": 7, "negative_prompt": "clouds", "num_inference_steps": 12,
}  # fmt: skip
"""What most pages ask for first, in the gateway's own words."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """As it is shipped: the built-in painter draws."""
    with serving(tmp_path_factory.mktemp("gateway"), environment=environment()) as program:
        program.key = KEY
        yield program


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended well."""

    directory: Path
    said: str

    def picture(self, name: str) -> bytes:
        """One that it has written."""
        return (self.directory / name).read_bytes()

    def sizes(self) -> dict[str, tuple[int, int]]:
        """All that it has written, by name, in pixels."""
        return {path.name: size_of(path.read_bytes()) for path in sorted(self.directory.glob("*.png"))}


def interpreter(client: str) -> Path:
    """Of the environment that `scripts/official-clients` has made; the test is skipped where there is none, saying why."""
    folder = Path(os.environ[VARIABLE])
    if not (folder / client).exists():
        # neither here nor known to be missing: the script broke, which must not pass for a skip
        pytest.skip(f"{client} is not here: {(folder / f'{client}.missing').read_text().strip()}")
    return folder / client


def recipe(name: str) -> Path:
    """A page: in English, for the code is the same in Korean (`test_pages.py`)."""
    return DOCS / "recipes" / f"{name}.md"


def surroundings(page: Path, gateway: Program) -> dict[str, str]:
    """The environment that a reader has after the page's `export` lines."""
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith(HIDDEN)}
    exported = dict(re.findall(r"^export (\w+)=(\S+)", program_of(page, "sh"), re.MULTILINE))
    return {**own, **exported, "IMG_SERVING_URL": gateway.url, "IMG_SERVING_API_KEY": KEY}


def run(client: str, page: Path, language: str, directory: Path, gateway: Program) -> Ran:
    """Put the blocks of a page into one file and run it."""
    runner = interpreter(client)
    file = directory / {"python": "recipe.py", "js": "recipe.mjs"}[language]
    file.write_text(program_of(page, language))
    if language == "js":
        (directory / "node_modules").symlink_to(runner.resolve().parent / "node_modules")
    done = subprocess.run(
        [str(runner), file.name],
        cwd=directory, env=surroundings(page, gateway), capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Ran(directory, done.stdout)


def size_of(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def ask(url: str, key: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Post JSON."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - our own
        told: dict[str, Any] = json.load(reply)
    return told


def fetch(url: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as reply:  # noqa: S310 - our own
        body: bytes = reply.read()
    return body


def drawn(gateway: Program, **body: Any) -> bytes:
    """What the gateway draws when it is asked without any library."""
    return fetch(ask(f"{gateway.url}/v1/images/generations", KEY, body)["data"][0]["url"])


def statuses(program: Program) -> list[int]:
    """Of all requests for pictures so far. The log is written in order: it is complete up to a request of our own."""
    mark = random.randbytes(8).hex()
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": mark}
    fetch(urllib.request.Request(f"{program.url}/v1/models", headers=headers))  # noqa: S310 - our own
    until = time.monotonic() + PROGRAM_SECONDS
    while mark not in program.log:
        assert time.monotonic() < until, program.log
        time.sleep(0.05)
    lines = [json.loads(line) for line in program.log.splitlines() if line.startswith("{")]
    return [line["status"] for line in lines if line.get("path", "").startswith("/v1/images/")]


@pytest.mark.parametrize("client", ["python-1", "python-2", "python-3"])
def test_openai_python(client: str, gateway: Program, tmp_path: Path) -> None:
    ran = run(client, recipe("openai-python"), "python", tmp_path, gateway)
    assert_the_official_page(ran, gateway)
    assert "400 size req_" in ran.said
    assert "\nTrue\n" in ran.said


@pytest.mark.parametrize("client", ["node-6", "node-7"])
def test_openai_node(client: str, gateway: Program, tmp_path: Path) -> None:
    ran = run(client, recipe("openai-node"), "js", tmp_path, gateway)
    assert_the_official_page(ran, gateway)
    assert "400 size req_" in ran.said
    assert "\ntrue\n" in ran.said


def assert_the_official_page(ran: Ran, gateway: Program) -> None:
    """Both of OpenAI's libraries are told to do the same."""
    assert ran.sizes() == {
        "flowers.png": (512, 512),
        "harbour-0.png": (256, 256), "harbour-1.png": (256, 256), "harbour.png": (512, 512),
        "lighthouse.png": (768, 512), "night.png": (768, 512),
    }  # fmt: skip
    assert ran.picture("lighthouse.png") == drawn(gateway, **LIGHTHOUSE)
    assert ran.picture("flowers.png") == drawn(gateway, prompt="a field of flowers", size="512x512", seed=7)
    assert ran.picture("night.png") != ran.picture("lighthouse.png")
    assert len({ran.picture(name) for name in ("harbour-0.png", "harbour-1.png", "harbour.png")}) == 3
    assert ran.said.startswith(f"7 768x512 {gateway.url}/images/")


def test_langchain_python(gateway: Program, tmp_path: Path) -> None:
    ran = run("langchain", recipe("langchain"), "python", tmp_path, gateway)
    assert ran.sizes() == {"lighthouse.png": (768, 512), "seeded.png": (768, 512)}
    seeded = drawn(gateway, **{**LIGHTHOUSE, "num_inference_steps": None})
    assert ran.picture("seeded.png") == seeded
    assert ran.said.startswith(f"openai_dalle {gateway.url}/images/")


def test_langchain_node(gateway: Program, tmp_path: Path) -> None:
    ran = run("node-recipes", recipe("langchain"), "js", tmp_path, gateway)
    assert ran.sizes() == {"lighthouse.png": (768, 512)}
    assert ran.said.startswith(f"dalle_api_wrapper {gateway.url}/images/")


def test_vercel_ai_sdk(gateway: Program, tmp_path: Path) -> None:
    before = len(statuses(gateway))
    ran = run("node-recipes", recipe("vercel-ai-sdk"), "js", tmp_path, gateway)
    assert ran.sizes() == {
        "crane.png": (256, 256), "harbour.png": (512, 512), "lighthouse.png": (768, 512), "night.png": (768, 512)
    }  # fmt: skip
    assert ran.picture("lighthouse.png") == drawn(gateway, **LIGHTHOUSE)
    assert ran.picture("night.png") != ran.picture("lighthouse.png")
    assert ran.said.startswith("image/png []\ntrue 400 size must be ")
    # four pictures, another that is compared with, and one request that is wrong, which is not made again
    assert sorted(statuses(gateway)[before:]) == [200] * 5 + [400]


def test_litellm(gateway: Program, tmp_path: Path) -> None:
    ran = run("litellm", recipe("litellm"), "python", tmp_path, gateway)
    assert ran.sizes() == {"inline.png": (768, 512), "lighthouse.png": (768, 512), "night.png": (768, 512)}
    assert ran.picture("lighthouse.png") == drawn(gateway, **LIGHTHOUSE)
    assert ran.picture("inline.png") == drawn(gateway, prompt="a lighthouse at sunset", size="768x512", seed=7)
    assert ran.picture("night.png") != ran.picture("lighthouse.png")
    assert "400 litellm.BadRequestError" in ran.said


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A gateway whose backend fails whatever it is asked for."""
    config = UNBREAKABLE + backend("fails", sequence=["fail"])
    with serving(tmp_path_factory.mktemp("broken"), config, environment=environment()) as program:
        yield program


@pytest.fixture(scope="module")
def litellm_proxy(gateway: Program, broken: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of LiteLLM's proxy, started with the page's configuration. Its model "broken" is an addition."""
    page, directory, port = recipe("litellm"), tmp_path_factory.mktemp("litellm"), free_port()
    runner = interpreter("litellm")
    models, others = program_of(page, "yaml").replace("http://localhost:8080", gateway.url).split("router_settings:")
    _, _, model = models.partition("model_list:\n")
    for ours, theirs in (("picture", "broken"), ("openai/procedural", "openai/fails"), (gateway.url, broken.url)):
        assert ours in model
        model = model.replace(ours, theirs)
    (directory / "config.yaml").write_text(f"{models}{model}router_settings:{others}")
    command = [str(runner.resolve().parent / "bin" / "litellm"), "--config", "config.yaml"]
    with (directory / "said.txt").open("w") as said:
        proxy = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=directory, env=surroundings(page, gateway), stdout=said, stderr=said,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health/liveliness", proxy, directory / "said.txt")
        yield url
    finally:
        to_an_end(proxy)


def _wait_for(url: str, process: subprocess.Popen[bytes], said: Path) -> None:
    until = time.monotonic() + PROGRAM_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            fetch(url)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"LiteLLM's proxy did not start: {said.read_text()}")


def test_litellms_proxy_draws(litellm_proxy: str, gateway: Program) -> None:
    reply = ask(f"{litellm_proxy}/v1/images/generations", PROXY_KEY, {"model": "picture", **LIGHTHOUSE})
    assert fetch(reply["data"][0]["url"]) == drawn(gateway, **LIGHTHOUSE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="NO CURL: the page's command is not run")
def test_litellms_proxy_is_asked_as_the_page_says(litellm_proxy: str, gateway: Program) -> None:
    page = recipe("litellm")
    command = block_with(page, "curl").replace("http://127.0.0.1:4000", litellm_proxy)
    done = subprocess.run(
        ["bash", "-c", command], env=surroundings(page, gateway), capture_output=True, text=True, timeout=120, check=True
    )  # fmt: skip
    seeded = {name: LIGHTHOUSE[name] for name in ("prompt", "size", "seed")}
    assert fetch(json.loads(done.stdout)["data"][0]["url"]) == drawn(gateway, **seeded)


def test_litellms_proxy_tells_what_was_wrong(litellm_proxy: str) -> None:
    refused, message = refusal(litellm_proxy, {"model": "picture", "prompt": "x", "size": "9x"})
    assert (refused, "size must be" in message) == (400, True)


def test_litellms_proxy_asks_once(litellm_proxy: str, broken: Program) -> None:
    """By default it asks three times, whatever `x-should-retry` says."""
    refused, message = refusal(litellm_proxy, {"model": "broken", "prompt": "x"})
    assert (refused, "failed, as scripted" in message) == (502, True)
    assert statuses(broken) == [502]


def refusal(url: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """The status and the message of what is refused."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(f"{url}/v1/images/generations", PROXY_KEY, body)
    with closing(raised.value) as reply:
        return reply.code, json.load(reply)["error"]["message"]
