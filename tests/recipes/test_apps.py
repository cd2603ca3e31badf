"""The requests that Open WebUI, SillyTavern and LibreChat make, set up as in docs/recipes, and what they read of the answers.

The requests are facts about the applications: Open WebUI 0.12.4, SillyTavern 1.19.0, LibreChat 0.8.2. The first two themselves
are in `test_apps_for_real`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2 as httpx
import pytest
from PIL import Image
from tests.support.programs import Program, openai_client, serving
from tests.support.recipe_apps import CONFIG, KEY, SILLYTAVERN_BODY, picture

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with serving(tmp_path_factory.mktemp("gateway"), CONFIG) as program:
        program.key = KEY
        yield program


@pytest.fixture(scope="module")
def web(gateway: Program) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", size, "teal").save(kept, "PNG")
    return kept.getvalue()


def basic(user: str = "app", key: str = KEY) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


class TestOpenWebUI:
    """`IMAGE_GENERATION_ENGINE=openai`, and `automatic1111`."""

    BEARER = {"Authorization": f"Bearer {KEY}"}  # noqa: RUF012 - never changed

    @pytest.mark.parametrize(
        ("model", "more"),
        [("painter", {"response_format": "b64_json", "size": "96x64"}), ("gpt-image-1", {"size": "auto"})],
    )
    def test_its_pictures_come_inline_for_it_fetches_no_private_url(
        self, web: httpx.Client, model: str, more: dict[str, Any]
    ) -> None:
        body = {"model": model, "prompt": "a fox", "n": 2, **more}
        reply = web.post("/v1/images/generations?api-version=2026-01-01", headers=self.BEARER, json=body)
        assert reply.status_code == 200
        for one in reply.json()["data"]:
            assert "url" not in one
            assert picture(one["b64_json"]).format == "PNG"

    def test_the_admins_parameters_are_merged_into_the_body(self, web: httpx.Client) -> None:
        params = {"seed": 7, "steps": 12, "negative_prompt": "a hen", "quality": "high"}
        body = {"model": "painter", "prompt": "a fox", "n": 1, "size": "64x64", "response_format": "b64_json", **params}
        first, second = [web.post("/v1/images/generations", headers=self.BEARER, json=body).json() for _ in range(2)]
        assert first["data"][0]["seed"] == 7
        assert first["data"] == second["data"]

    def test_what_it_shows_of_a_refusal_is_the_reason_phrase(self, web: httpx.Client) -> None:
        body = {"model": "none-such", "prompt": "a fox", "n": 1, "size": "64x64", "response_format": "b64_json"}
        unknown = web.post("/v1/images/generations", headers=self.BEARER, json=body)
        assert (unknown.status_code, unknown.reason_phrase) == (404, "Not Found")
        refused = web.post("/v1/images/generations", headers={"Authorization": "Bearer sk-wrong"}, json=body)
        assert (refused.status_code, refused.reason_phrase) == (401, "Unauthorized")

    @pytest.mark.parametrize("names", [["image"], ["image[]", "image[]"]])
    def test_its_edits_are_forms_without_a_mask(self, web: httpx.Client, names: list[str]) -> None:
        fields = {"model": "painter", "prompt": "at night", "response_format": "b64_json"}
        files = [(name, ("image.png", png(), "image/png")) for name in names]
        reply = web.post("/v1/images/edits", headers=self.BEARER, data=fields, files=files)
        assert reply.status_code == 200, reply.text
        assert picture(reply.json()["data"][0]["b64_json"]).size == (64, 64)

    def test_its_a1111_engine_echoes_all_options_with_another_checkpoint(self, web: httpx.Client) -> None:
        models = web.get("/sdapi/v1/sd-models", headers=basic()).json()
        assert {(one["title"], one["model_name"]) for one in models} >= {("painter", "painter"), ("second", "second")}
        options = web.get("/sdapi/v1/options", headers=basic()).json()
        for checkpoint in ("second", options["sd_model_checkpoint"]):
            changed = {**options, "sd_model_checkpoint": checkpoint}
            assert web.post("/sdapi/v1/options", headers=basic(), json=changed).status_code == 200
            assert web.get("/sdapi/v1/options", headers=basic()).json()["sd_model_checkpoint"] == checkpoint
        body = {"prompt": "a fox", "batch_size": 2, "width": 64, "height": 48, "steps": 50, "negative_prompt": "a hen"}
        drawn = web.post("/sdapi/v1/txt2img", headers=basic(), json=body).json()
        assert [picture(one).size for one in drawn["images"]] == [(64, 48)] * 2
        assert isinstance(drawn["info"], str)

    def test_it_sends_an_empty_header_where_no_password_is_set(self, web: httpx.Client, tmp_path: Path) -> None:
        assert web.get("/sdapi/v1/options", headers={"authorization": ""}).status_code == 401
        with serving(tmp_path, "[auth]\nenabled = false\n") as program:
            assert httpx.get(f"{program.url}/sdapi/v1/options", headers={"authorization": ""}).status_code == 200


class TestSillyTavern:
    """The sources "Stable Diffusion Web UI (AUTOMATIC1111)" and "stable-diffusion.cpp"."""

    def test_the_lists_that_it_asks_for_are_there(self, web: httpx.Client) -> None:
        read = {
            path: web.get(f"/sdapi/v1/{path}", headers=basic("silly")).json()
            for path in ("samplers", "schedulers", "upscalers", "latent-upscale-modes")
        }
        assert all(isinstance(one["name"], str) for entries in read.values() for one in entries)
        assert [one["model_name"] for one in web.get("/sdapi/v1/sd-vae", headers=basic("silly")).json()] == []
        assert web.get("/sdapi/v1/sd-models", headers=basic("silly")).json()[0]["title"]

    def test_it_need_not_wait_for_a_model_to_load(self, web: httpx.Client) -> None:
        chosen = web.post("/sdapi/v1/options", headers=basic("silly"), json={"sd_model_checkpoint": "painter"})
        assert chosen.status_code == 200
        progress = web.get("/sdapi/v1/progress", headers=basic("silly")).json()
        assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)

    def test_its_request_draws_with_fields_of_its_own_in_it(self, web: httpx.Client) -> None:
        assert "forge_preset" not in web.get("/sdapi/v1/options", headers=basic("silly")).json()
        reply = web.post("/sdapi/v1/txt2img", headers=basic("silly"), json=SILLYTAVERN_BODY)
        assert reply.status_code == 200
        assert picture(reply.json()["images"][0]).size == (64, 96)
        assert web.post("/sdapi/v1/interrupt", headers=basic("silly")).status_code == 200

    def test_the_other_source_sends_no_key(self, web: httpx.Client, tmp_path: Path) -> None:
        assert web.options("/v1/images/generations").is_success
        assert web.get("/v1/models").status_code == 401
        with serving(tmp_path, "[auth]\nenabled = false\n") as program:
            (model,) = httpx.get(f"{program.url}/v1/models").json()["data"]
            body = {"model": model["id"], "prompt": "a fox", "width": 64, "height": 48, "steps": 20, "cfg_scale": 7}
            body |= {"batch_size": 1, "sampler_name": "euler_a", "scheduler": "discrete"}
            drawn = httpx.post(f"{program.url}/sdapi/v1/txt2img", json=body, timeout=60).json()
            assert picture(drawn["images"][0]).size == (64, 48)


class TestLibreChat:
    """The tools DALL-E-3, OpenAI Image Tools and Stable Diffusion."""

    def test_dalle3_reads_a_url_and_fetches_it_without_a_key(self, gateway: Program) -> None:
        with openai_client(gateway) as client:
            drawn = client.images.generate(
                model="dall-e-3", prompt="a fox", quality="standard", style="vivid", size="1024x1024", n=1
            )
        url = drawn.data[0].url
        assert url.startswith(gateway.url)
        assert url.endswith(".png")
        fetched = httpx.get(url)
        assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/png")

    def test_the_image_tool_reads_base64_that_it_does_not_ask_for(self, gateway: Program) -> None:
        asked: dict[str, Any] = {"prompt": "a fox", "n": 1, "background": "auto", "output_format": "png"}
        with openai_client(gateway) as client:
            drawn = client.images.generate(model="gpt-image-1", quality="auto", size="auto", **asked)
            assert picture(drawn.data[0].b64_json).size == (64, 64)
            # under any other name a URL is the answer, which it takes for none
            assert (
                client.images.generate(model="painter", quality="auto", size="auto", **asked).data[0].b64_json is None
            )

    def test_the_image_tool_edits_with_a_list_of_pictures(self, web: httpx.Client) -> None:
        fields = {"model": "gpt-image-1", "prompt": "at night", "quality": "auto", "size": "auto"}
        files = [("image[]", ("in.png", png(), "image/png"))]
        reply = web.post("/v1/images/edits", headers={"Authorization": f"Bearer {KEY}"}, data=fields, files=files)
        assert picture(reply.json()["data"][0]["b64_json"]).size == (64, 64)

    def test_stable_diffusion_has_the_key_in_its_url(self, gateway: Program) -> None:
        parts = urlsplit(gateway.url)
        url = urlunsplit(parts._replace(netloc=f"librechat:{KEY}@{parts.netloc}"))
        body = {
            "prompt": "a fox",
            "negative_prompt": "a hen",
            "cfg_scale": 4.5,
            "steps": 22,
            "width": 1024,
            "height": 1024,
        }
        drawn = httpx.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=60).json()
        info = json.loads(drawn["info"])
        assert (info["width"], info["height"]) == picture(drawn["images"][0]).size == (1024, 1024)
        assert info["infotexts"][0].split("\n")[-1].startswith("Steps: 22, CFG scale: 4.5, Seed: ")
