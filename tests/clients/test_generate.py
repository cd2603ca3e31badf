"""Pictures from words: what the libraries return is what was asked for."""

from __future__ import annotations

import base64
import urllib.request

import pytest
from tests.clients.rehearsal import PICTURE
from tests.support.official_clients import OfficialClient, need_clients
from tests.support.programs import Program

PNG = b"\x89PNG"

need_clients()
pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("path", ["/v1", "/v1/", ""])
def test_it_draws_as_base64(client: OfficialClient, gateway: Program, path: str) -> None:
    told = client.call("generate", gateway.url + path, str(gateway.key), model="gpt-image-1", prompt="x", size="64x48")
    assert [base64.b64decode(one["b64_json"])[:4] for one in told.pictures] == [PNG]
    assert told.result["created"] > 1_700_000_000
    assert (told.result["size"], told.result["output_format"]) == ("64x48", "png")
    assert told.statuses == [200]


def test_it_draws_several_as_urls(client: OfficialClient, gateway: Program) -> None:
    told = client.call(
        "generate", f"{gateway.url}/v1", str(gateway.key),
        model="dall-e-3", prompt="x", size="64x64", n=2, quality="hd", style="vivid", response_format="url",
    )  # fmt: skip
    urls = [one["url"] for one in told.pictures]
    assert len(set(urls)) == 2
    for url in urls:
        assert url.startswith(gateway.url)
        with urllib.request.urlopen(url, timeout=10) as picture:  # noqa: S310 - our own
            assert picture.headers["content-type"] == "image/png"
            assert picture.read(4) == PNG


def test_the_same_seed_gives_the_same_pictures(client: OfficialClient, gateway: Program) -> None:
    extensions = {"seed": 7, "negative_prompt": "red", "num_inference_steps": 3, "guidance_scale": 4.5}
    first, again = (
        client.call(
            "generate", f"{gateway.url}/v1", str(gateway.key),
            model="procedural", prompt="x", n=2, extensions=extensions, **PICTURE,
        )
        for _ in range(2)
    )  # fmt: skip
    assert [one["seed"] for one in first.pictures] == [7, 8]
    assert first.pictures == again.pictures
    assert first.pictures[0]["b64_json"] != first.pictures[1]["b64_json"]


def test_nothing_is_null_and_means_the_default(client: OfficialClient, gateway: Program) -> None:
    told = client.call(
        "generate", f"{gateway.url}/v1", str(gateway.key),
        model=None, prompt="x", n=None, size="64x64", quality=None, response_format=None, user=None,
    )  # fmt: skip
    assert len(told.pictures) == 1


def test_the_asynchronous_client_draws_too(python_client: OfficialClient, gateway: Program) -> None:
    told = python_client.call(
        "generate", f"{gateway.url}/v1", str(gateway.key),
        options={"asynchronous": True}, model="gpt-image-1", prompt="x", size="64x64",
    )  # fmt: skip
    assert base64.b64decode(told.pictures[0]["b64_json"])[:4] == PNG


def test_the_library_knows_the_request_by_its_id(client: OfficialClient, gateway: Program) -> None:
    told = client.call("generate", f"{gateway.url}/v1", str(gateway.key), model="procedural", prompt="x", **PICTURE)
    assert told.request_id
    assert told.request_id == told.attempts[0].headers["x-request-id"]


def test_an_id_that_the_caller_gives_is_kept(client: OfficialClient, gateway: Program) -> None:
    told = client.call(
        "generate", f"{gateway.url}/v1", str(gateway.key),
        headers={"X-Request-Id": "mine-1"}, model="procedural", prompt="x", **PICTURE,
    )  # fmt: skip
    assert told.request_id == "mine-1"
