"""`/sdapi/v1/*`: what A1111's clients send and read, over the same way that other requests go."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.api.test_engines import backend, known
from tests.support.fake_a1111 import FakeA1111
from tests.support.gateways import ADMIN, Harness, running, scripted
from tests.support.programs import serving
from tests.support.virtual_time import run_virtual

from img_serving.api.a1111_facade import MAX_SELECTIONS, A1111Facade
from img_serving.api.a1111_shapes import TextToImage, key_of_basic, to_generation, told_of
from img_serving.backends.detection import detect
from img_serving.domain.images import ImageRequest
from img_serving.transport.http import HttpTransport

ONE = scripted("one", models=["tiny", "small"])
LISTS = ("sd-models", "samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-vae", "sd-modules")
READ = ("options", "progress", *LISTS)
USERS = """
[[auth.api_keys]]
name = "kim"
key = "sk-kim"
models = ["small"]
[[auth.api_keys]]
name = "lee"
key = "sk-lee"
"""


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


async def draw(gateway: Harness, **body: Any) -> Any:
    return await gateway.client.post("/sdapi/v1/txt2img", {"prompt": "a fox", "width": 32, "height": 16, **body})


def test_a_picture_is_the_one_that_the_other_route_draws() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            theirs = await draw(gateway, seed=7, batch_size=2, n_iter=2)
            assert theirs.status == 200
            assert theirs.headers["x-backend"] == "one"
            ours = await gateway.client.post(
                "/v1/images/generations",
                {"prompt": "a fox", "size": "32x16", "seed": 7, "n": 4, "response_format": "b64_json"},
            )
            assert theirs.json()["images"] == [one["b64_json"] for one in ours.json()["data"]]

    run_virtual(main())


def test_info_is_json_text_with_what_was_made() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            asked = {"negative_prompt": "a hen", "steps": 22, "cfg_scale": 4.5, "seed": 41, "batch_size": 2}
            reply = (await draw(gateway, **asked, override_settings={"sd_model_checkpoint": "small"})).json()
            info = json.loads(reply["info"])
            assert (info["seed"], info["all_seeds"], info["width"], info["height"]) == (41, [41, 42], 32, 16)
            assert info["sd_model_name"] == "small"
            facts = "Steps: 22, CFG scale: 4.5, Seed: 42, Size: 32x16, Model: small"
            assert info["infotexts"][1].split("\n") == ["a fox", "Negative prompt: a hen", facts]
            assert reply["parameters"] == {key: info[key] for key in reply["parameters"]}

    run_virtual(main())


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_is_refused(scale: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await draw(gateway, cfg_scale=scale)
            assert (reply.status, "cfg_scale" in reply.json()["detail"]) == (400, True)

    run_virtual(main())


def test_a_choice_of_nothing_forgets_the_one_before() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            for name in ("small", "Automatic"):
                await gateway.client.post("/sdapi/v1/options", {"sd_model_checkpoint": name})
            reply = await draw(gateway)
            assert (reply.status, json.loads(reply.json()["info"])["sd_model_name"]) == (200, "one")

    run_virtual(main())


def test_pictures_go_on_as_they_are_whatever_is_told_beside_them() -> None:
    picture = memoryview(b"iVBORw0KGgo=" * 1000)
    frame = (b'{"created":1,"data":[{"b64_json":"', b'","seed":3,"revised_prompt":"%s"}],"size":"8x8"}' % (b"w" * 5000))
    told = told_of((frame[0], picture, frame[1]), ImageRequest(operation="generation", prompt="x", seed=3), "m")
    assert any(part is picture for part in told)
    assert json.loads(b"".join(told))["images"] == [bytes(picture).decode()]


def test_a_seed_that_nobody_gave_is_told() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            first, second = [(await draw(gateway, seed=seed)).json() for seed in (-1, None)]
            assert first["images"] != second["images"]
            again = await draw(gateway, seed=json.loads(first["info"])["seed"])
            assert again.json()["images"] == first["images"]

    run_virtual(main())


def test_fields_that_change_the_picture_and_are_not_honoured_are_named() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            plain = {"enable_hr": False, "styles": [], "restore_faces": None, "save_images": True, "url": "http://x"}
            assert "x-img-serving-ignored" not in (await draw(gateway, **plain)).headers
            told = (await draw(gateway, enable_hr=True, alwayson_scripts={"ADetailer": {}})).headers
            assert told["x-img-serving-ignored"] == "alwayson_scripts, enable_hr"

    run_virtual(main())


@pytest.mark.parametrize("unsaid", ["", "Automatic", "N/A", "automatic", None])
def test_a_choice_that_nobody_made_is_left_to_the_backend(unsaid: str | None) -> None:
    body = TextToImage(
        prompt="x", sampler_name=unsaid, scheduler=unsaid, model=unsaid, clip_skip=1, negative_prompt="", seed=-5
    )
    said = json.loads(to_generation(body, b"{}", None))
    assert set(said) == {"prompt", "n", "response_format", "output_format"}


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({}, "chosen"),
        ({"model": "own"}, "own"),
        ({"override_settings": {"sd_model_checkpoint": "over"}, "model": "own"}, "over"),
        ({"override_settings": {"sd_vae": "x"}}, "chosen"),
    ],
)
def test_the_model_is_the_nearest_that_is_named(body: dict[str, Any], model: str) -> None:
    import msgspec

    read = msgspec.convert({"prompt": "x", **body}, TextToImage)
    assert json.loads(to_generation(read, b"{}", "chosen"))["model"] == model


def test_a_checkpoint_is_chosen_for_a_key_and_no_other() -> None:
    async def main() -> None:
        async with running(ONE + USERS) as gateway:
            options = "/sdapi/v1/options"
            before = (await gateway.nobody.get(options, headers=basic("x:sk-lee"))).json()
            assert before["sd_model_checkpoint"] == "tiny"
            # as Open WebUI does it: all that was read, with another checkpoint
            body = {**before, "sd_model_checkpoint": "small"}
            chosen = await gateway.nobody.request("POST", options, body=body, headers=basic("x:sk-lee"))
            assert (chosen.status, chosen.json()) == (200, None)
            other = await gateway.nobody.request("POST", options, body={"sd_vae": "y"}, headers=basic("x:sk-lee"))
            assert other.status == 200
            after = (await gateway.nobody.get(options, headers=basic("x:sk-lee"))).json()
            assert after["sd_model_checkpoint"] == "small"
            assert (await gateway.client.get(options)).json()["sd_model_checkpoint"] == "tiny"
            drawn = await gateway.nobody.request(
                "POST", "/sdapi/v1/txt2img", body={"prompt": "x", "width": 16, "height": 16}, headers=basic("x:sk-lee")
            )
            assert json.loads(drawn.json()["info"])["sd_model_name"] == "small"
            gone = await gateway.nobody.request(
                "POST", options, body={"sd_model_checkpoint": ""}, headers=basic("x:sk-lee")
            )
            assert gone.status == 200
            assert (await gateway.nobody.get(options, headers=basic("x:sk-lee"))).json() == before

    run_virtual(main())


def test_choices_are_remembered_of_so_many_keys_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SELECTIONS >= 100
    monkeypatch.setattr("img_serving.api.a1111_facade.MAX_SELECTIONS", 1)

    async def main() -> None:
        async with running(ONE + USERS) as gateway:
            for key in ("x:sk-lee", f"x:{ADMIN}"):
                body = {"sd_model_checkpoint": "small"}
                await gateway.nobody.request("POST", "/sdapi/v1/options", body=body, headers=basic(key))
            told = [
                (await gateway.nobody.get("/sdapi/v1/options", headers=basic(key))).json()["sd_model_checkpoint"]
                for key in ("x:sk-lee", f"x:{ADMIN}")
            ]
            assert told == ["tiny", "small"]

    run_virtual(main())


def test_a_key_sees_and_gets_its_own_models_only() -> None:
    async def main() -> None:
        async with running(ONE + USERS) as gateway:
            models = (await gateway.nobody.get("/sdapi/v1/sd-models", headers=basic("kim:sk-kim"))).json()
            assert [(one["title"], one["model_name"]) for one in models] == [("small", "small")]
            options = (await gateway.nobody.get("/sdapi/v1/options", headers=basic("kim:sk-kim"))).json()
            assert options["sd_model_checkpoint"] == "small"
            refused = await gateway.nobody.request(
                "POST", "/sdapi/v1/txt2img", body={"prompt": "x", "model": "tiny"}, headers=basic("kim:sk-kim")
            )
            assert refused.status == 403

    run_virtual(main())


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"Basic " + base64.b64encode(b"me:sk-1"), b"sk-1"),
        (b"basic " + base64.b64encode(b"me:sk:1"), b"sk:1"),
        (b"Basic " + base64.b64encode(b"sk-1"), b"sk-1"),
        (b"Basic " + base64.b64encode(b"sk-1:"), b"sk-1"),
        (b"Basic " + base64.b64encode(b":"), b""),
        (b"Basic ?", b""),
        (b"Basic ", b""),
        (b"Bearer sk-1", b""),
    ],
)
def test_a_key_is_a_password_or_a_name_without_one(value: bytes, key: bytes) -> None:
    assert key_of_basic(value) == key


@pytest.mark.parametrize("path", [*READ, "txt2img", "interrupt"])
def test_no_route_is_open(path: str) -> None:
    method = "GET" if path in READ else "POST"

    async def main() -> None:
        async with running(ONE) as gateway:
            for headers in ({}, {"Authorization": ""}, basic("me:sk-wrong"), {"Authorization": "Basic ???"}):
                reply = await gateway.nobody.request(method, f"/sdapi/v1/{path}", headers=headers)
                assert reply.status == 401
                assert reply.json()["error"] == "invalid_api_key"
                # a browser that is asked for a password keeps it, and sends it for whoever asks
                assert reply.headers["www-authenticate"].startswith("Bearer")
            for headers in (
                basic(f"me:{ADMIN}"),
                basic(ADMIN),
                {"Authorization": f"Bearer {ADMIN}"},
                {"X-API-Key": ADMIN},
            ):
                reply = await gateway.nobody.request(method, f"/sdapi/v1/{path}", headers=headers)
                assert reply.status != 401, headers

    run_virtual(main())


def test_a_password_opens_these_routes_only() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            assert (await gateway.nobody.get("/v1/models", headers=basic(f"me:{ADMIN}"))).status == 401
            assert (await gateway.nobody.get("/v1/sdapi/v1/options", headers=basic(f"me:{ADMIN}"))).status == 200

    run_virtual(main())


def test_without_keys_an_empty_authorization_is_fine() -> None:
    async def main() -> None:
        async with running(ONE + "[auth]\nenabled = false\n") as gateway:
            for path in READ:
                assert (await gateway.nobody.get(f"/sdapi/v1/{path}", headers={"Authorization": ""})).status == 200

    run_virtual(main())


@pytest.mark.parametrize(
    ("body", "status", "error", "named"),
    [
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        (
            {"prompt": "x", "override_settings": {"sd_model_checkpoint": "none-such"}},
            404,
            "model_not_found",
            "none-such",
        ),
        ({"prompt": "x", "batch_size": 4, "n_iter": 3}, 400, "invalid_value", "12"),
        ({"prompt": "x", "batch_size": 1_000_000, "n_iter": 2}, 400, "invalid_value", "batch_size"),
        ({"prompt": "x", "width": 0, "height": 16}, 400, "invalid_value", "width"),
        ({"prompt": "x", "steps": 9999}, 400, "invalid_value", "steps"),
        ({"prompt": "x", "steps": "many"}, 400, "invalid_type", "steps"),
        ([], 400, "invalid_type", "object"),
    ],
)
def test_a_refusal_has_the_shape_that_these_clients_read(body: Any, status: int, error: str, named: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post("/sdapi/v1/txt2img", body)
            assert (reply.status, reply.json()["error"]) == (status, error)
            assert set(reply.json()) == {"error", "detail", "body", "errors"}
            assert named in reply.json()["detail"]
            assert reply.json()["errors"] == reply.json()["detail"]
            assert reply.headers["x-request-id"]

    run_virtual(main())


def test_what_is_not_there_says_so_in_that_shape_too() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            for method, path, status in (("POST", "img2img", 404), ("GET", "txt2img", 405), ("POST", "samplers", 405)):
                reply = await gateway.client.request(method, f"/sdapi/v1/{path}", body={})
                assert (reply.status, set(reply.json())) == (status, {"error", "detail", "body", "errors"})

    run_virtual(main())


def test_a_checkpoint_has_a_name_of_a_name_s_length() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post("/sdapi/v1/options", {"sd_model_checkpoint": "x" * 257})
            assert (reply.status, reply.json()["error"]) == (400, "invalid_value")

    run_virtual(main())


def test_numbers_may_come_as_text() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await draw(gateway, width="32", height="16", steps="5", cfg_scale="7")
            assert (reply.status, reply.json()["parameters"]["steps"]) == (200, 5)

    run_virtual(main())


def test_lists_begin_with_what_leaves_the_choice_to_the_backend() -> None:
    async def main() -> None:
        async with FakeA1111() as server, running(backend("forge", server)) as gateway:
            await known(gateway, "forge")
            lists = {name: (await gateway.client.get(f"/sdapi/v1/{name}")).json() for name in LISTS}
            samplers = [one["name"] for one in lists["samplers"]]
            assert samplers[0] == "Automatic"
            assert {"Euler a", "DPM++ 2M"} <= set(samplers)
            schedulers = [one["name"] for one in lists["schedulers"]]
            assert [schedulers[0], len(schedulers)] == ["Automatic", len({one.lower() for one in schedulers})]
            assert len(schedulers) > 1
            assert [one["name"] for one in lists["upscalers"]] == ["None"]
            assert lists["sd-vae"] == lists["sd-modules"] == lists["latent-upscale-modes"] == []
            drawn = await draw(gateway, width=64, height=64, sampler_name="Euler a", scheduler="Automatic")
            assert drawn.status == 200
            assert server.posts[-1].json["sampler_name"] == "Euler a"

    asyncio.run(main())


def test_progress_is_idle_and_an_interrupt_ends_nothing() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            told = (await gateway.client.get("/sdapi/v1/progress")).json()
            assert (told["progress"], told["state"]["job_count"]) == (0.0, 0)
            assert (await gateway.client.post("/sdapi/v1/interrupt", None)).status == 200

    run_virtual(main())


def test_a_client_that_leaves_cancels_its_picture() -> None:
    async def main() -> None:
        async with running(scripted("a", sequence=["hang"])) as gateway:
            leave = asyncio.Event()
            body = {"prompt": "x", "width": 16, "height": 16}
            asking = asyncio.create_task(gateway.client.post("/sdapi/v1/txt2img", body, leave=leave))
            await asyncio.sleep(1)
            assert gateway.adapter("a").in_flight == 1
            leave.set()
            await asyncio.sleep(0.1)
            assert gateway.adapter("a").in_flight == 0
            assert (await asking).status == 0

    run_virtual(main())


def test_a_picture_that_takes_long_is_kept_waiting_for_with_blanks() -> None:
    async def main() -> None:
        async with running(scripted("a", latency_seconds=80, backend__timeout_ms=600_000)) as gateway:
            reply = await draw(gateway)
            assert reply.status == 200
            assert reply.body.startswith(b" ")
            assert len(reply.json()["images"]) == 1

    run_virtual(main())


def test_every_handler_says_which_route_it_is() -> None:
    for name, handler in vars(A1111Facade).items():
        if not name.startswith("_") and name != "nothing":
            assert "/sdapi/v1/" in (handler.__doc__ or ""), name


@pytest.mark.smoke
def test_a_gateway_before_this_one_takes_it_for_what_it_is(tmp_path: Path) -> None:
    """`protocol = "http"` finds OpenAI's API, which says more than A1111's, with a key and without any."""

    async def found(url: str, key: str) -> str:
        transport = HttpTransport(url)
        try:
            return (await detect(transport, (("authorization", f"Bearer {key}"),), 10.0)).protocol
        finally:
            await transport.close()

    for number, toml in enumerate(('[auth]\napi_keys = ["sk-1"]\n', "[auth]\nenabled = false\n")):
        with serving(tmp_path / str(number), toml) as program:
            assert asyncio.run(found(program.url, "sk-1")) == "openai"
            assert asyncio.run(found(program.url, "")) == "openai"


@pytest.mark.smoke
def test_over_a_socket_it_is_a_picture(tmp_path: Path) -> None:
    import urllib.request

    with serving(tmp_path, '[auth]\napi_keys = ["sk-1"]\n') as program:
        body = json.dumps({"prompt": "a fox", "width": 64, "height": 48}).encode()
        headers = {"Content-Type": "application/json", **basic("me:sk-1")}
        request = urllib.request.Request(f"{program.url}/sdapi/v1/txt2img", body, headers)  # noqa: S310 - our own program
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - the same
            told = json.load(reply)
    with Image.open(io.BytesIO(base64.b64decode(told["images"][0]))) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 48))
