"""The applications themselves against the real program: their own servers, asked as their pages ask them.

`scripts/recipe-apps` installs them. SillyTavern 1.19.0 (npm), Open WebUI 0.12.4 (Python).
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image
from tests.support.programs import Program, free_port, serving, to_an_end
from tests.support.recipe_apps import CONFIG, KEY, SILLYTAVERN_BODY, picture

pytestmark = pytest.mark.smoke

SILLYTAVERN = os.environ.get("IMG_SERVING_SILLYTAVERN")
OPEN_WEBUI = os.environ.get("IMG_SERVING_OPEN_WEBUI")

START_SECONDS = 480.0
"""An application compiles its pages, or makes its database, at its first start."""

needs_sillytavern = pytest.mark.skipif(
    SILLYTAVERN is None, reason="NO SILLYTAVERN: run scripts/recipe-apps, or set IMG_SERVING_SILLYTAVERN to its folder"
)
needs_open_webui = pytest.mark.skipif(
    OPEN_WEBUI is None,
    reason="NO OPEN WEBUI: run scripts/recipe-apps open-webui, or set IMG_SERVING_OPEN_WEBUI to its program",
)

_PAGE_BODY = {name: value for name, value in SILLYTAVERN_BODY.items() if name not in {"url", "auth"}}

HANGS = """
[[backends]]
name = "hangs"
protocol = "scripted"
models = ["hangs"]
[backends.scripted]
sequence = ["hang"]
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with serving(tmp_path_factory.mktemp("gateway"), CONFIG + HANGS) as program:
        program.key = KEY
        yield program


@contextmanager
def started(command: list[str], directory: Path, url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Run an application until the block ends; it is there when `url` answers."""
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(url):
                told = (directory / "log.txt").read_text()[-2000:]
                assert process.poll() is None, told
                assert time.monotonic() < until, told
                time.sleep(0.5)
            yield
        finally:
            to_an_end(process, seconds=30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


# SillyTavern


class SillyTavern:
    """Its server, spoken to as its page does: with a session and a token."""

    def __init__(self, url: str, gateway: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        self._client.headers["X-CSRF-Token"] = self._client.get("/csrf-token").json()["token"]
        self._gateway = gateway

    def ask(self, path: str, *, key: str = KEY, **body: Any) -> httpx.Response:
        """One call of its page."""
        return self._client.post(f"/api/sd/{path}", json={"url": self._gateway, "auth": f"silly:{key}", **body})

    def ask_and_leave(self, path: str, **body: Any) -> None:
        """One call whose answer nobody waits for any more."""
        asked = {"url": self._gateway, "auth": f"silly:{KEY}", **body}
        with pytest.raises(httpx.ReadTimeout):
            self._client.post(f"/api/sd/{path}", json=asked, timeout=httpx.Timeout(60, read=5))

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def sillytavern(gateway: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SillyTavern]:
    directory, port = tmp_path_factory.mktemp("sillytavern"), free_port()
    command = ["node", f"{SILLYTAVERN}/server.js", "--port", str(port), "--browserLaunchEnabled", "false"]
    command += ["--configPath", str(directory / "config.yaml"), "--dataRoot", str(directory / "data")]
    url = f"http://127.0.0.1:{port}"
    with started(command, directory, f"{url}/csrf-token", {}):
        application = SillyTavern(url, gateway.url)
        yield application
        application.close()


@needs_sillytavern
def test_sillytavern_connects_and_fills_its_lists(sillytavern: SillyTavern) -> None:
    assert sillytavern.ask("ping").status_code == 200
    assert sillytavern.ask("ping", key="sk-wrong").status_code == 500
    assert {"value": "second", "text": "second"} in sillytavern.ask("models").json()
    assert sillytavern.ask("samplers").json()[0] == "Automatic"
    assert sillytavern.ask("schedulers").json()[0] == "Automatic"
    assert sillytavern.ask("upscalers").json() == ["None"]
    assert sillytavern.ask("vaes").json() == []


@needs_sillytavern
def test_sillytavern_draws_with_the_model_that_was_chosen(sillytavern: SillyTavern) -> None:
    for model in ("second", "painter"):
        assert sillytavern.ask("set-model", model=model).status_code == 200
        assert sillytavern.ask("get-model").text == model
        drawn = sillytavern.ask("generate", **_PAGE_BODY)
        assert drawn.status_code == 200
        assert picture(drawn.json()["images"][0]).size == (64, 96)
        assert f"Model: {model}" in drawn.json()["info"]


@needs_sillytavern
def test_sillytavern_stops_what_its_user_stops(sillytavern: SillyTavern, gateway: Program) -> None:
    def departures() -> int:
        told = httpx.get(f"{gateway.url}/metrics").text
        lines = [one for one in told.splitlines() if one.startswith("img_serving_client_disconnects_total")]
        return int(float(lines[0].split()[-1])) if lines else 0

    assert sillytavern.ask("set-model", model="hangs").status_code == 200
    before = departures()
    sillytavern.ask_and_leave("generate", **_PAGE_BODY)
    until = time.monotonic() + 30
    while departures() == before:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert sillytavern.ask("set-model", model="painter").status_code == 200


@needs_sillytavern
def test_sillytavern_s_other_source_finds_the_gateway(sillytavern: SillyTavern) -> None:
    assert sillytavern.ask("sdcpp/ping").status_code == 200
    # it sends no key: a gateway that wants one is of no use to it
    assert sillytavern.ask("sdcpp/models").status_code == 500


# Open WebUI


class OpenWebUI:
    """Its server, spoken to as its page does, by an administrator."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        person = {"name": "me", "email": "me@example.com", "password": "Recipe-2026-trial", "profile_image_url": ""}
        token = self._client.post("/api/v1/auths/signup", json=person).json()["token"]
        self._client.headers["Authorization"] = f"Bearer {token}"

    def ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """One call of its page."""
        return self._client.post(f"/api/v1/images/{path}", json=body)

    def set(self, **settings: Any) -> None:
        """What Admin Panel > Settings > Images saves."""
        config = self._client.get("/api/v1/images/config").json()
        assert self.ask("config/update", {**config, **settings}).status_code == 200

    def pictures(self, reply: httpx.Response) -> list[Image.Image]:
        """The pictures that it has stored."""
        assert reply.status_code == 200, reply.text
        kept = [self._client.get(one["url"]) for one in reply.json()]
        return [Image.open(io.BytesIO(one.content)) for one in kept]

    def models(self) -> list[str]:
        """The ids in its list."""
        return [one["id"] for one in self._client.get("/api/v1/images/models").json()]

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def open_webui(gateway: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenWebUI]:
    """Set up by the variables of docs/recipes/open-webui.md."""
    assert OPEN_WEBUI is not None
    directory, port = tmp_path_factory.mktemp("open-webui"), free_port()
    environment = {
        "ENABLE_IMAGE_GENERATION": "true",
        "IMAGE_GENERATION_ENGINE": "openai",
        "IMAGES_OPENAI_API_BASE_URL": f"{gateway.url}/v1",
        "IMAGES_OPENAI_API_KEY": KEY,
        "IMAGE_GENERATION_MODEL": "painter",
        "IMAGE_SIZE": "96x64",
        "IMAGES_OPENAI_PARAMS": '{"seed": 7, "output_format": "webp"}',
        "ENABLE_IMAGE_EDIT": "true",
        "IMAGE_EDIT_ENGINE": "openai",
        "IMAGES_EDIT_OPENAI_API_BASE_URL": f"{gateway.url}/v1",
        "IMAGES_EDIT_OPENAI_API_KEY": KEY,
        "IMAGE_EDIT_MODEL": "painter",
        "IMAGE_EDIT_SIZE": "96x64",
        # nothing is fetched from elsewhere
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",
        "ENABLE_OPENAI_API": "false",
        "ENABLE_OLLAMA_API": "false",
        "DATA_DIR": str(directory / "data"),
        "WEBUI_SECRET_KEY": base64.b64encode(os.urandom(16)).decode(),
    }
    (directory / "data").mkdir()
    url = f"http://127.0.0.1:{port}"
    command = [OPEN_WEBUI, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with started(command, directory, f"{url}/health", environment):
        application = OpenWebUI(url)
        yield application
        application.close()


@needs_open_webui
def test_open_webui_draws_as_its_variables_say(open_webui: OpenWebUI) -> None:
    (one,) = open_webui.pictures(open_webui.ask("generations", {"prompt": "a fox"}))
    assert (one.format, one.size) == ("WEBP", (96, 64))
    both = open_webui.pictures(open_webui.ask("generations", {"prompt": "a fox", "n": 2, "size": "64x64"}))
    assert [one.size for one in both] == [(64, 64)] * 2


@needs_open_webui
def test_open_webui_edits_one_picture_and_several(open_webui: OpenWebUI) -> None:
    drawn = open_webui.ask("generations", {"prompt": "a fox"}).json()[0]["url"]
    for pictures in (drawn, [drawn, drawn]):
        (one,) = open_webui.pictures(open_webui.ask("edit", {"image": pictures, "prompt": "at night"}))
        assert one.size == (96, 64)


@needs_open_webui
def test_open_webui_draws_with_a_name_of_openai_s(open_webui: OpenWebUI) -> None:
    open_webui.set(IMAGE_GENERATION_MODEL="gpt-image-1", IMAGE_SIZE="auto", IMAGES_OPENAI_API_PARAMS={})
    (one,) = open_webui.pictures(open_webui.ask("generations", {"prompt": "a fox"}))
    assert one.size == (64, 64)


@needs_open_webui
@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({"IMAGE_GENERATION_MODEL": "none-such"}, "Not Found"),
        ({"IMAGES_OPENAI_API_KEY": "sk-wrong"}, "Unauthorized"),
        ({"IMAGES_OPENAI_API_PARAMS": {"seed": "x"}}, "Bad Request"),
        ({"IMAGES_OPENAI_API_PARAMS": {"response_format": "url"}}, "Something went wrong"),
    ],
)
def test_open_webui_shows_of_a_failure_what_the_page_says(
    open_webui: OpenWebUI, setting: dict[str, Any], shown: str
) -> None:
    right = {"IMAGE_GENERATION_MODEL": "painter", "IMAGES_OPENAI_API_KEY": KEY, "IMAGES_OPENAI_API_PARAMS": {}}
    open_webui.set(IMAGE_GENERATION_ENGINE="openai", IMAGE_SIZE="64x64", **{**right, **setting})
    reply = open_webui.ask("generations", {"prompt": "a fox"})
    assert reply.status_code == 400
    assert shown in reply.json()["detail"]


@needs_open_webui
def test_open_webui_s_a1111_engine_lists_models_and_switches(open_webui: OpenWebUI, gateway: Program) -> None:
    open_webui.set(
        IMAGE_GENERATION_ENGINE="automatic1111",
        AUTOMATIC1111_BASE_URL=gateway.url,
        AUTOMATIC1111_API_AUTH=f"open-webui:{KEY}",
        AUTOMATIC1111_PARAMS={"seed": 5},
        IMAGE_GENERATION_MODEL="second",
        IMAGE_SIZE="96x64",
        IMAGE_STEPS=20,
    )
    assert {"painter", "second"} <= set(open_webui.models())
    for model in ("second", "painter"):
        drawn = open_webui.pictures(open_webui.ask("generations", {"prompt": "a fox", "model": model, "n": 2}))
        assert [(one.format, one.size) for one in drawn] == [("PNG", (96, 64))] * 2
        options = httpx.get(f"{gateway.url}/sdapi/v1/options", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert options["sd_model_checkpoint"] == model
    open_webui.set(AUTOMATIC1111_PARAMS={"steps": 9999})
    refused = open_webui.ask("generations", {"prompt": "a fox"})
    assert (refused.status_code, refused.json()["detail"]) == (400, "Something went wrong :/")
