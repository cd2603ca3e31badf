"""The official Python client against the real program."""

from __future__ import annotations

import base64
import urllib.request
from typing import Any

import openai
import pytest
from tests.support.programs import Program, openai_client

pytestmark = pytest.mark.smoke


@pytest.fixture
def client(shared_program: Program) -> Any:
    with openai_client(shared_program) as client:
        yield client


def test_it_draws_as_base64(client: Any) -> None:
    reply = client.images.generate(model="gpt-image-1", prompt="a lighthouse", size="64x64")
    assert base64.b64decode(reply.data[0].b64_json).startswith(b"\x89PNG")
    assert reply.created > 1_700_000_000
    assert reply.size == "64x64"
    assert reply.output_format == "png"
    assert reply._request_id


def test_it_draws_as_url(client: Any) -> None:
    reply = client.images.generate(
        model="dall-e-3", prompt="a lighthouse", size="64x64", response_format="url", n=2, quality="hd", style="vivid"
    )
    assert len(reply.data) == 2
    for one in reply.data:
        with urllib.request.urlopen(one.url, timeout=10) as picture:  # noqa: S310 - our own URL
            assert picture.headers["content-type"] == "image/png"


def test_extensions_travel_in_extra_body(client: Any) -> None:
    extra = {"seed": 7, "negative_prompt": "red", "num_inference_steps": 3, "guidance_scale": 4.5}
    first = client.images.generate(
        model="procedural", prompt="x", size="64x64", response_format="b64_json", extra_body=extra
    )
    again = client.images.generate(
        model="procedural", prompt="x", size="64x64", response_format="b64_json", extra_body=extra
    )
    assert first.data[0].b64_json == again.data[0].b64_json
    assert first.data[0].seed == 7


def test_it_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["procedural"]
    assert client.models.retrieve("procedural").owned_by == "procedural"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


def test_without_v1_in_the_base_url_it_works_too(shared_program: Program) -> None:
    with openai.OpenAI(base_url=shared_program.url, api_key=shared_program.key) as client:
        assert client.images.generate(prompt="x", model="procedural", size="32x32").data


def test_errors_are_of_the_right_class(client: Any, shared_program: Program) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="procedural", prompt="x", size="9x")
    assert bad.value.param == "size"
    assert bad.value.request_id
    with (
        openai_client(shared_program, api_key="sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.images.generate(model="procedural", prompt="x")
    assert refused.value.code == "invalid_api_key"
