"""`[backends.openai]`: each option changes what is sent or promised, and a wrong one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.fake_openai import FakeOpenAI
from tests.support.openai_calls import call_of, draw, mask_of, picture_of

from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.openai.body import request_fields
from img_serving.backends.openai.options import read_openai_options
from img_serving.backends.openai.presets import GENERIC, OPENAI, PRESETS, SDCPP, XINFERENCE
from img_serving.config import BackendConfig
from img_serving.main import make_adapter


def fields(options: dict[str, Any], preset=GENERIC, **request: Any) -> dict[str, Any]:
    call = call_of(7, **request)
    return request_fields(call, read_openai_options(options).over(preset).of(call.model))[0]


def able(options: dict[str, Any], preset=GENERIC):
    return read_openai_options(options).over(preset).capabilities()


@pytest.mark.parametrize("family", PRESETS)
def test_preset_names_a_family(family):
    result = draw(FakeOpenAI("openai"), None, {"preset": family})
    assert result.report is not None
    assert result.report.found == f"{family} (as configured)"
    assert result.backend.capabilities.honours == PRESETS[family].capabilities().honours


def test_auto_finds_out():
    assert draw(FakeOpenAI("sglang"), None, {"preset": "auto"}).report == draw(FakeOpenAI("sglang")).report


def test_parameters_get_the_servers_own_names_and_leave_out_what_it_has_not():
    options = {"parameters": {"num_inference_steps": "sample_steps", "guidance_scale": "", "clip_skip": "engine.skip"}}
    body = fields(options, steps=9, guidance_scale=2.0, clip_skip=2)
    assert (body["sample_steps"], body["engine"]) == (9, {"skip": 2})
    assert not {"num_inference_steps", "guidance_scale", "clip_skip"} & set(body)
    assert "guidance_scale" not in able(options).honours
    assert {"num_inference_steps", "clip_skip"} <= able(options).honours


def test_a_parameter_of_ones_own_goes_where_the_family_puts_such():
    distilled = {"parameters": {"guidance_scale": "sample_params.guidance.distilled_guidance"}}
    prompt = fields(distilled, SDCPP, guidance_scale=3.5)["prompt"]
    assert '"guidance": {"distilled_guidance": 3.5}' in prompt
    assert "txt_cfg" not in prompt
    kwargs = fields({"parameters": {"sampler": "sampler_name"}}, XINFERENCE, sampler="euler")["kwargs"]
    assert json.loads(kwargs) == {"sampler_name": "euler"}


@pytest.mark.parametrize(
    ("size", "sent"),
    [
        ("size", {"size": "128x64"}),
        ("star", {"size": "128*64"}),
        ("width_height", {"width": 128, "height": 64}),
    ],
)
def test_size_says_how_it_travels(size, sent):
    body = fields({"size": size}, size=(128, 64))
    assert {name: body[name] for name in ("size", "width", "height") if name in body} == sent


@pytest.mark.parametrize("asked", ["b64_json", "base64", "url", ""])
def test_response_format_is_what_is_asked_for(asked):
    assert fields({"response_format": asked}).get("response_format", "") == asked


def test_pictures_that_were_asked_for_as_urls_are_fetched():
    (artifact,) = draw(FakeOpenAI("localai"), call_of(7, model="stablediffusion"), {"response_format": "url"}).artifacts
    assert artifact.data is not None


def test_always_seed_sends_one_that_the_client_did_not_give():
    assert fields({"always_seed": True})["seed"] == 7
    assert "seed" not in fields({"always_seed": False})
    assert "sd_cpp_extra_args" not in fields({"always_seed": False}, SDCPP)["prompt"]


def test_max_n_bounds_a_call():
    assert able({"max_n": 3}).max_batch_size == 3
    assert able({}).max_batch_size == 10


def test_sizes_are_the_only_ones_there_are():
    sizes = able({"sizes": ["512x512", "768x512"]}).sizes
    assert sizes.choices == ((512, 512), (768, 512))
    assert sizes.refusal(640, 640)


@pytest.mark.parametrize(("preset", "value"), [(GENERIC, True), (SDCPP, False)])
def test_edits_are_sent_or_not_as_the_operator_says(preset, value):
    assert ("edit" in able({"edits": value}, preset).operations) is value
    assert ("edit" in able({}, preset).operations) is not value


@pytest.mark.parametrize(("preset", "value"), [(GENERIC, True), (PRESETS["openai"].of("dall-e-2"), False)])
def test_variations_are_sent_or_not_as_the_operator_says(preset, value):
    assert ("variation" in able({"variations": value}, preset).operations) is value
    assert ("variation" in able({}, preset).operations) is not value


def test_edits_of_an_unknown_server_are_openais_form():
    call = call_of(7, operation="edit", images=(picture_of(),), mask=mask_of(), strength=0.5, negative_prompt="blur")
    server = FakeOpenAI("sdcpp")
    options = {"preset": "generic", "edits": True}
    result = draw(server, call, options)
    assert result.backend.capabilities.masks
    assert "strength" in result.backend.capabilities.honoured("edit")
    assert set(server.last["files"]) == {"image", "mask"}


def test_stream_says_that_unfinished_pictures_can_be_had():
    assert able({"stream": True}).previews
    assert not able({"stream": False}, OPENAI.of("gpt-image-1")).previews


def test_extra_fields_go_into_every_body():
    extra = {"extra": {"safety": False, "nested": {"a": [1]}}}
    body = fields(extra)
    assert (body["safety"], body["nested"]) == (False, {"a": [1]})
    assert json.loads(fields(extra, XINFERENCE)["kwargs"])["safety"] is False
    assert '"safety": false' in fields(extra, SDCPP)["prompt"]
    server = FakeOpenAI("sdcpp")
    draw(server, call_of(7), {"extra": {"vae_tiling_params": {"enabled": True}}})
    assert server.last["notes"]["vae_tiling_params"] == {"enabled": True}


def test_what_the_operator_says_holds_for_models_that_differ_too():
    preset = read_openai_options({"max_n": 2, "extra": {"x": 1}, "parameters": {"user": "end_user"}}).over(OPENAI)
    for model in ("dall-e-2", "gpt-image-1", "gpt-image-2", "any"):
        one = preset.of(model)
        assert (one.max_n, one.extra, one.parameters["user"]) == (2, {"x": 1}, "end_user")
        assert one.edits is not None
        assert one.edits.parameters is not None
        assert one.edits.parameters["user"] == "end_user"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"presett": "auto"}, "presett: unknown option; did you mean preset?"),
        ({"preset": "vllm_omni"}, "preset: there is no 'vllm_omni'; did you mean vllm-omni?"),
        ({"preset": 5}, "preset: "),
        ({"size": "sizes"}, "size: there is no 'sizes'; did you mean size?"),
        ({"response_format": "b64_jsn"}, "response_format: there is no 'b64_jsn'; did you mean b64_json?"),
        ({"max_n": 0}, "max_n: "),
        ({"max_n": "3"}, "max_n: "),
        ({"sizes": ["512x512", "512*512"]}, r"sizes\[1\]: must be WIDTHxHEIGHT"),
        ({"edits": "yes"}, "edits: "),
        ({"parameters": {"step": "steps"}}, "parameters.step: unknown parameter"),
        ({"parameters": {"guidance": "cfg"}}, "did you mean guidance_scale"),
        ({"parameters": {"size": "sz"}}, "the option `size`"),
        ({"parameters": {"seed": "a b"}}, "parameters.seed: must be a field"),
        ({"parameters": {"seed": "prompt"}}, "the gateway writes the field 'prompt' itself"),
        ({"parameters": {"seed": "width"}}, "the gateway writes"),
        ({"parameters": {"seed": "x", "user": "x"}}, "parameters.user: 'x' is where parameters.seed goes"),
        ({"extra": {"n": 5}}, "extra.n: the gateway writes this field itself"),
        ({"extra": {"sample_params": {}}}, "extra.sample_params: the gateway writes"),
        ({"extra": {"batch_count": 9}}, "extra.batch_count: the gateway writes"),
        ({"extra": {"mine": 1}, "parameters": {"seed": "mine"}}, "extra.mine: the gateway writes"),
    ],
)
def test_a_wrong_option_is_named_with_the_nearest_right_one(options, said):
    with pytest.raises(ValueError, match=said):
        OpenAIBackend(None, options=options)  # type: ignore[arg-type]


def test_the_table_of_the_configuration_reaches_the_adapter():
    config = BackendConfig(
        name="a", protocol="openai", endpoints=("http://127.0.0.1:1/v1",), openai={"preset": "sdcpp", "max_n": 2}
    )
    (endpoint,) = config.endpoint_list()
    assert make_adapter(config, endpoint).capabilities.max_batch_size == 2
    bad = BackendConfig(name="a", protocol="openai", endpoints=("http://127.0.0.1:1",), openai={"preset": "x"})
    with pytest.raises(ValueError, match="preset: there is no 'x'"):
        make_adapter(bad, endpoint)


def test_a_known_host_needs_no_option():
    config = BackendConfig(name="a", protocol="openai", endpoints=("https://api.together.xyz/v1",))
    (endpoint,) = config.endpoint_list()
    assert make_adapter(config, endpoint).capabilities.max_batch_size == 4
