"""The dialects: what each family of servers is asked, in words that it understands, and what it cannot do."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import Any

import msgspec
import pytest
from PIL import Image
from tests.support.fake_openai import DEFAULT_MODELS, FakeOpenAI, drawn
from tests.support.openai_calls import PROMPT, call_of, draw, mask_of, picture_of

from img_serving.backends.openai.body import request_fields
from img_serving.backends.openai.presets import GENERIC, LOCALAI, OPENAI, PRESETS, SDCPP, XINFERENCE
from img_serving.domain.capabilities import PARAMETERS
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.media.payload import raw_bytes

SELF_HOSTED = ("vllm-omni", "sglang", "localai", "sdcpp", "litellm", "together", "xinference")
FLAVOURS = pytest.mark.parametrize("flavour", SELF_HOSTED)


def test_a_family_is_called_what_it_is_found_under():
    assert {name: preset.family for name, preset in PRESETS.items()} == {name: name for name in PRESETS}


@pytest.mark.parametrize("family", PRESETS)
def test_a_family_honours_known_parameters_under_different_names(family):
    preset = PRESETS[family]
    for one in (preset, *(model for _, model in preset.models)):
        assert set(one.parameters) <= PARAMETERS
        assert len(set(one.parameters.values())) == len(one.parameters)
        assert one.capabilities().honours <= PARAMETERS


@FLAVOURS
def test_a_seed_size_and_count_reach_the_engine(flavour):
    model = DEFAULT_MODELS[flavour][0]
    result = draw(FakeOpenAI(flavour), call_of(7, model=model, size=(128, 64), seed_given=True))
    (artifact,) = result.artifacts
    assert result.report is not None
    assert result.report.found.startswith(flavour)
    assert (artifact.width, artifact.height, artifact.seed, artifact.ignored) == (128, 64, 7, ())
    assert result.server.last["prompt"] == PROMPT
    assert list(result.server.last["seeds"]) == [7]


@FLAVOURS
def test_steps_and_the_negative_prompt_reach_the_engine(flavour):
    model = DEFAULT_MODELS[flavour][0]
    result = draw(FakeOpenAI(flavour), call_of(7, model=model, steps=12, negative_prompt="흐린 blur", seed_given=True))
    assert {"num_inference_steps", "negative_prompt", "seed"} <= result.backend.capabilities.honours
    assert (result.server.last["steps"], result.server.last["negative"]) == (12, "흐린 blur")


@pytest.mark.parametrize("flavour", ["vllm-omni", "sglang", "sdcpp", "together", "xinference"])
def test_guidance_reaches_the_engine(flavour):
    server = FakeOpenAI(flavour)
    draw(server, call_of(7, model=DEFAULT_MODELS[flavour][0], guidance_scale=4.5))
    assert 4.5 in server.last["notes"].values()


@FLAVOURS
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_korean_prompt_arrives_as_it_was_written(flavour, form):
    prompt = unicodedata.normalize(form, '한강의 고요한 항구, "따옴표" \\ 그리고 \N{FOX FACE}\n둘째 줄')  # fmt: skip
    result = draw(FakeOpenAI(flavour), call_of(7, prompt=prompt, model=DEFAULT_MODELS[flavour][0]))
    assert result.server.last["prompt"] == prompt


@FLAVOURS
def test_several_pictures_come_from_one_call(flavour):
    model = DEFAULT_MODELS[flavour][0]
    server = FakeOpenAI(flavour)
    assert len(draw(server, call_of(1, 2, 3, model=model)).artifacts) == 3
    assert len(server.posts) == 1


@pytest.mark.parametrize(("flavour", "count"), [("sdcpp", 8), ("vllm-omni", 8), ("localai", 8), ("together", 4)])
def test_as_many_pictures_as_it_can_are_read(flavour, count):
    result = draw(FakeOpenAI(flavour), call_of(*range(count), model=DEFAULT_MODELS[flavour][0], size=(512, 512)))
    assert len(result.artifacts) == count <= result.backend.capabilities.max_batch_size


def test_a_picture_of_sixteen_megapixels_is_read():
    (artifact,) = draw(FakeOpenAI("sdcpp"), call_of(7, size=(4096, 4096))).artifacts
    assert (artifact.width, artifact.height) == (4096, 4096)


@FLAVOURS
def test_a_picture_comes_in_a_format_that_the_server_writes(flavour):
    model = DEFAULT_MODELS[flavour][0]
    result = draw(
        FakeOpenAI(flavour), call_of(7, model=model, output_format="webp", output_compression=50, seed_given=True)
    )
    formats = result.backend.capabilities.formats
    (artifact,) = result.artifacts
    assert artifact.ignored == ()  # delivery converts what does not come so
    if "webp" in formats and flavour == "vllm-omni":
        assert artifact.media_type == "image/webp"
    elif flavour in {"together", "sdcpp", "localai"}:
        assert artifact.media_type == "image/png"


@pytest.mark.parametrize("flavour", ["sdcpp", "sglang"])
def test_where_the_default_seed_is_always_the_same_one_is_sent(flavour):
    model = DEFAULT_MODELS[flavour][0]
    seeds = {draw(FakeOpenAI(flavour), call_of(seed, model=model)).artifacts[0].seed for seed in (7, 8)}
    assert seeds == {7, 8}


@pytest.mark.parametrize("flavour", ["vllm-omni", "localai", "litellm", "together", "xinference"])
def test_where_the_server_draws_one_itself_no_seed_of_ours_is_sent(flavour):
    result = draw(FakeOpenAI(flavour), call_of(777, model=DEFAULT_MODELS[flavour][0]))
    assert list(result.server.last["seeds"]) != [777]
    assert result.artifacts[0].seed is None


def test_several_seeds_share_a_call_only_where_the_server_counts_on():
    result = draw(FakeOpenAI("sdcpp"), call_of(7, 8, seed_given=True))
    assert [one.seed for one in result.artifacts] == [7, 8]
    alone = draw(FakeOpenAI("sdcpp"), call_of(8, seed_given=True)).artifacts
    assert raw_bytes(result.artifacts[1]) == raw_bytes(alone[0])
    for call in (call_of(7, 8, seed_given=True), call_of(7, 9)):
        flavour = "sglang" if call.request.seed_given else "sdcpp"
        with pytest.raises(AttemptError) as caught:
            draw(FakeOpenAI(flavour), call)  # type: ignore[arg-type]
        assert caught.value.outcome is Outcome.NOT_STARTED


def test_of_a_seed_that_we_drew_for_several_only_the_first_is_known():
    result = draw(FakeOpenAI("sglang"), call_of(7, 8, model=DEFAULT_MODELS["sglang"][0]))
    assert [one.seed for one in result.artifacts] == [7, None]


# stable-diffusion.cpp


def test_the_names_that_sdcpp_knows_are_learnt_and_spelt_as_it_does():
    server = FakeOpenAI("sdcpp")
    result = draw(server, call_of(7, sampler="Euler A", scheduler="KARRAS", clip_skip=2))
    able = result.backend.capabilities
    assert able.samplers is not None
    assert able.schedulers is not None
    assert able.samplers.find("DPM++ 2M") == "dpm++2m"
    assert server.last["notes"] == {
        "sampler": "euler_a", "scheduler": "karras", "guidance": None, "clip_skip": 2, "strength": None,
        "vae_tiling_params": None,
    }  # fmt: skip
    assert (able.batch, able.max_batch_size, able.max_concurrency, able.max_steps) == ("seeds", 8, 1, 100)


@pytest.mark.parametrize(
    "prompt",
    ["a <sd_cpp_extra_args>{}</sd_cpp_extra_args> b", "<sd_cpp_extra_args>", 'x<sd_cpp_extra_args>{"width":9}'],
)
@pytest.mark.parametrize("operation", ["generation", "edit"])
def test_a_client_cannot_pass_parameters_by_the_gateway_in_a_prompt(prompt, operation):
    images = (picture_of(),) if operation == "edit" else ()
    server = FakeOpenAI("sdcpp")
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, prompt=prompt, operation=operation, images=images))
    error = caught.value.error
    assert (error.status, error.param) == (400, "prompt")
    assert "num_inference_steps" in error.message
    assert not server.posts


def test_a_negative_prompt_cannot_end_the_tag_that_carries_it():
    negative = '</sd_cpp_extra_args><sd_cpp_extra_args>{"seed": 1} "quoted" \\u003c'
    server = FakeOpenAI("sdcpp")
    draw(server, call_of(7, negative_prompt=negative))
    assert (server.last["negative"], list(server.last["seeds"])) == (negative, [7])


@pytest.mark.parametrize(("field", "param"), [("prompt", "prompt"), ("negative_prompt", "negative_prompt")])
def test_sdcpp_is_spared_a_text_that_would_end_it(field, param):
    server = FakeOpenAI("sdcpp")
    long: dict[str, Any] = {field: "가" * 3000}
    short: dict[str, Any] = {field: "가" * 2000}
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, **long))
    assert (caught.value.error.status, caught.value.error.param) == (400, param)
    assert not server.posts
    draw(server, call_of(7, **short))


def test_without_a_check_before_it_the_first_call_finds_out():
    result = draw(FakeOpenAI("sdcpp"), call_of(7, seed_given=True), check=False)
    assert list(result.server.last["seeds"]) == [7]
    assert [one.path for one in result.server.exchanges][-1] == "/v1/images/generations"


# LocalAI, Xinference


@pytest.mark.parametrize(("prompt", "negative"), [("a|b", "c"), ("a", "b|c"), ("a|b", None)])
def test_localai_is_not_asked_what_it_would_misread(prompt, negative):
    call = call_of(7, prompt=prompt, negative_prompt=negative, model="stablediffusion")
    with pytest.raises(BackendRefusal) as caught:
        request_fields(call, LOCALAI)
    assert caught.value.error.param == "prompt"
    assert "negative_prompt" in caught.value.error.message


def test_xinference_gets_no_empty_kwargs():
    assert "kwargs" not in request_fields(call_of(7), XINFERENCE)[0]
    body = request_fields(call_of(7, steps=3, seed_given=True), XINFERENCE)[0]
    assert json.loads(body["kwargs"]) == {"seed": 7, "num_inference_steps": 3}
    assert body["size"] == "64*64"


# the hosted API


def hosted(call, **options):
    return draw(FakeOpenAI("openai"), call, {"preset": "openai", **options})


@pytest.mark.parametrize(
    ("model", "size", "asked"),
    [
        ("dall-e-2", (256, 256), {"user": "u"}),
        ("dall-e-3", (1792, 1024), {"quality": "hd", "style": "vivid", "user": "u"}),
        (
            "gpt-image-1",
            (1536, 1024),
            {
                "quality": "low",
                "background": "opaque",
                "moderation": "low",
                "output_format": "jpeg",
                "output_compression": 50,
            },
        ),
        ("gpt-image-2", (1280, 720), {"output_format": "webp"}),
    ],
)
def test_each_hosted_generation_is_asked_only_what_it_takes(model, size, asked):
    call = call_of(7, model=model, size=size, **asked)
    result = hosted(call)
    (artifact,) = result.artifacts
    assert (artifact.width, artifact.height) == size
    assert artifact.ignored == ()
    assert set(asked) <= result.backend.capabilities.of(model).honours


EVERYTHING: dict[str, Any] = {
    "steps": 9, "guidance_scale": 2.0, "negative_prompt": "n", "quality": "low", "style": "vivid", "background": "opaque",
    "moderation": "low", "sampler": "s", "scheduler": "s", "clip_skip": 1, "output_format": "png", "user": "u",
    "seed_given": True,
}  # fmt: skip


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2"])
def test_what_a_hosted_model_refuses_is_never_sent_and_named(model):
    call = call_of(7, model=model, size=(1024, 1024), **EVERYTHING)
    (artifact,) = hosted(call).artifacts
    able = OPENAI.of(model).capabilities()
    assert set(artifact.ignored) == call.request.given - able.honours - {"size"}
    assert "seed" in artifact.ignored
    assert artifact.seed is None


def test_hosted_models_differ_and_routing_can_know_before_the_first_check():
    able = draw(FakeOpenAI("openai"), None, {"preset": "openai"}, check=False).backend.capabilities
    assert able.of("dall-e-3").max_batch_size == 1
    assert able.of("dall-e-3").sizes.refusal(512, 512)
    assert able.of("dall-e-2").sizes.refusal(512, 512) is None
    assert able.of("gpt-image-1").previews
    assert able.of("gpt-image-1").sizes.refusal(1280, 720)
    assert able.of("gpt-image-2").sizes.refusal(1280, 720) is None
    assert able.of("gpt-image-2").sizes.refusal(3840, 1024)
    assert "edit" not in able.of("dall-e-3").operations
    assert (able.of("dall-e-2").max_images, able.of("gpt-image-1").max_images) == (1, 16)
    assert able.of("my-deployment").sizes.refusal(123, 77) is None


def test_a_hosted_model_of_a_later_name_gets_the_rules_of_its_generation():
    server = FakeOpenAI("openai", models=("gpt-image-7-nova", "gpt-image-1-mini-2027"))
    able = draw(server, None, {"preset": "openai"}).backend.capabilities
    assert able.of("gpt-image-7-nova").sizes.multiple == 16
    assert able.of("gpt-image-1-mini-2027").sizes.choices


def test_a_size_that_nobody_asked_for_and_the_model_has_not_is_left_to_it():
    server = FakeOpenAI("openai")
    draw(server, call_of(7, model="gpt-image-1", size=None, shape=(640, 480)), {"preset": "openai"})
    assert "size" not in server.posts[0].json


def test_a_size_that_stable_diffusion_cpp_would_round_is_known_before() -> None:
    sizes = PRESETS["sdcpp"].sizes
    assert sizes.fit(100, 70) == (128, 128)
    assert sizes.fit(512, 768) == (512, 768)


def test_sizes_are_rounded_before_they_are_sent_where_the_server_would_refuse():
    server = FakeOpenAI("openai")
    (artifact,) = draw(server, call_of(7, model="gpt-image-2", size=(650, 490)), {"preset": "openai"}).artifacts
    assert (artifact.width, artifact.height) == (640, 480)


def test_what_the_reply_says_was_done_otherwise_is_named():
    call = call_of(7, model="gpt-image-1", size=(1024, 1024), quality="high", background="transparent")
    assert hosted(call).artifacts[0].ignored == ("background", "quality")


def test_a_hosted_account_names_only_its_models_that_draw():
    report = draw(FakeOpenAI("openai"), None, {"preset": "openai"}).report
    assert report is not None
    assert report.models == ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2")


@pytest.mark.parametrize(
    ("flavour", "models"), [("together", DEFAULT_MODELS["together"]), ("xinference", DEFAULT_MODELS["xinference"])]
)
def test_of_a_mixed_list_only_models_that_draw_are_named(flavour, models):
    report = draw(FakeOpenAI(flavour)).report
    assert report is not None
    assert report.models == models


# refusals keep their meaning


@pytest.mark.parametrize(
    ("flavour", "call", "code", "param"),
    [
        ("vllm-omni", call_of(7, model="other"), "model_not_found", "model"),
        ("litellm", call_of(7, model="other"), "model_not_found", "model"),
        ("xinference", call_of(7, model="other"), "model_not_found", "model"),
        ("litellm", call_of(7, prompt="forbidden", model="flux"), "moderation_blocked", None),
        ("vllm-omni", call_of(7, steps=500), "invalid_value", "num_inference_steps"),
    ],
)
def test_a_refusal_keeps_its_meaning_in_every_dialect(flavour, call, code, param):
    with pytest.raises(BackendRefusal) as caught:
        draw(FakeOpenAI(flavour), call)
    assert (caught.value.error.code, caught.value.error.param) == (code, param)
    assert PROMPT not in caught.value.error.message


def test_a_generic_server_gets_what_the_client_gave():
    call = call_of(7, **EVERYTHING)
    body, ignored = request_fields(call, GENERIC)
    assert not ignored
    assert {"seed", "num_inference_steps", "sampler", "clip_skip", "response_format"} <= set(body)
    assert GENERIC.capabilities().operations == {"generation"}


# edits


def half(mask: bytes) -> tuple[float, float]:
    """How white the left and the right half of a mask are; its alpha where it has one."""
    with Image.open(io.BytesIO(mask)) as picture:
        grey = picture.getchannel("A") if picture.mode == "RGBA" else picture.convert("L")
        left, right = grey.resize((2, 1), Image.Resampling.BOX).tobytes()
    return left / 255, right / 255


@FLAVOURS
def test_an_edit_starts_from_the_picture_that_was_sent(flavour):
    image = picture_of(kind="JPEG")
    model = DEFAULT_MODELS[flavour][0]
    result = draw(FakeOpenAI(flavour), call_of(7, model=model, operation="edit", images=(image,)))
    assert "edit" in result.backend.capabilities.operations
    sent = result.server.last
    if flavour == "together":
        assert sent["image_url"].startswith("data:image/jpeg;base64,")
    elif flavour == "localai":
        assert sent["file"]
    else:
        assert sent["files"]["image"] == [image.data]
        assert result.server.posts[0].path == "/v1/images/edits"
    assert sent["prompt"] == PROMPT


@pytest.mark.parametrize("flavour", ["vllm-omni", "sglang", "sdcpp", "litellm", "xinference"])
def test_several_input_pictures_go_in_order(flavour):
    images = (picture_of(), picture_of((0, 200, 0)), picture_of((0, 0, 200)))
    result = draw(FakeOpenAI(flavour), call_of(7, model=DEFAULT_MODELS[flavour][0], operation="edit", images=images))
    assert result.server.last["files"]["image[]"] == [image.data for image in images]
    assert result.backend.capabilities.max_images == 16


@pytest.mark.parametrize(
    ("flavour", "name", "left", "right"),
    [
        ("openai", "mask", 0.0, 1.0),
        ("litellm", "mask", 0.0, 1.0),
        ("sdcpp", "mask", 1.0, 0.0),
        ("xinference", "mask", 1.0, 0.0),
        ("vllm-omni", "mask_image", 1.0, 0.0),
    ],
)
def test_a_mask_says_where_to_paint_as_the_server_reads_it(flavour, name, left, right):
    model = "gpt-image-1" if flavour == "openai" else DEFAULT_MODELS[flavour][0]
    call = call_of(7, model=model, size=None, operation="edit", images=(picture_of(),), mask=mask_of())
    result = draw(FakeOpenAI(flavour), call, {"preset": flavour})
    assert result.backend.capabilities.of(model).masks
    (mask,) = result.server.last["files"][name]
    assert half(mask) == (left, right)


@pytest.mark.parametrize("flavour", ["sglang", "localai", "together"])
def test_a_server_that_would_not_look_at_a_mask_offers_none(flavour):
    assert not PRESETS[flavour].capabilities().masks


def test_a_mask_that_is_no_picture_is_the_requests_fault():
    broken = msgspec.structs.replace(mask_of(), data=b"\x89PNG, or so it says")
    with pytest.raises(BackendRefusal) as caught:
        draw(FakeOpenAI("sdcpp"), call_of(7, operation="edit", images=(picture_of(),), mask=broken))
    assert (caught.value.error.status, caught.value.error.param) == (400, "mask")


@pytest.mark.parametrize("flavour", ["sdcpp", "vllm-omni"])
def test_strength_reaches_an_edit_and_is_nothing_to_a_generation(flavour):
    server = FakeOpenAI(flavour)
    model = DEFAULT_MODELS[flavour][0]
    result = draw(server, call_of(7, model=model, operation="edit", images=(picture_of(),), strength=0.4))
    able = result.backend.capabilities
    assert "strength" in able.honoured("edit") - able.honoured("generation")
    assert server.last["notes"]["strength"] == 0.4
    assert "strength" not in json.dumps(request_fields(call_of(7, strength=0.4), SDCPP)[0])


# variations


@pytest.mark.parametrize(("flavour", "model"), [("openai", "dall-e-2"), ("xinference", "sd3-medium")])
def test_a_variation_is_a_form_without_words(flavour, model):
    image = picture_of()
    call = call_of(7, model=model, size=(512, 512), operation="variation", images=(image,), prompt="")
    result = draw(FakeOpenAI(flavour), call, {"preset": flavour})
    assert "variation" in result.backend.capabilities.of(model).operations
    assert result.server.posts[0].path == "/v1/images/variations"
    assert b'name="prompt"' not in result.server.posts[0].body
    assert result.server.last["files"] == {"image": [image.data]}
    assert result.artifacts


def test_what_variations_honour_is_a_list_of_its_own():
    able = PRESETS["xinference"].capabilities()
    assert "seed" in able.honoured("variation") - able.honoured("edit")
    call = call_of(
        7, model="sd3-medium", operation="variation", images=(picture_of(),), prompt="", steps=4, seed_given=True
    )
    (artifact,) = draw(FakeOpenAI("xinference"), call).artifacts
    assert (artifact.ignored, artifact.seed) == ((), 7)
    hosted_call = call_of(
        7, model="dall-e-2", size=(512, 512), operation="variation", images=(picture_of(),), prompt="", strength=0.3
    )
    assert hosted(hosted_call).artifacts[0].ignored == ("strength",)
    assert "strength" not in PRESETS["openai"].of("dall-e-2").capabilities().honoured("variation")


@pytest.mark.parametrize(
    ("flavour", "model"), [("openai", "gpt-image-1"), ("openai", "dall-e-3"), ("sdcpp", None), ("vllm-omni", "m")]
)
def test_a_server_without_variations_offers_none_and_is_asked_for_none(flavour, model):
    call = call_of(7, model=model, size=(1024, 1024), operation="variation", images=(picture_of(),), prompt="")
    assert "variation" not in PRESETS[flavour].of(model).capabilities().operations
    server = FakeOpenAI(flavour)
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call, {"preset": flavour})
    assert (caught.value.error.status, caught.value.error.param) == (400, "model")
    assert server.posts == []


# edits again


def test_an_edit_names_what_only_a_generation_honours():
    call = call_of(7, model="gpt-image-1", size=None, operation="edit", images=(picture_of(),), moderation="low")
    assert hosted(call).artifacts[0].ignored == ("moderation",)
    seeded = call_of(7, model="sd3-medium", operation="edit", images=(picture_of(),), steps=4, seed_given=True)
    (artifact,) = draw(FakeOpenAI("xinference"), seeded).artifacts
    assert (artifact.ignored, artifact.seed) == (("num_inference_steps", "seed"), None)


def test_an_edit_of_the_hosted_api_keeps_its_shape_by_itself():
    server = FakeOpenAI("openai")
    call = call_of(7, model="gpt-image-2", size=None, shape=(333, 77), operation="edit", images=(picture_of(),))
    draw(server, call, {"preset": "openai"})
    assert server.last["size"] == (1024, 1024)


def test_the_fakes_tell_pictures_apart_by_all_that_an_engine_looks_at():
    base = drawn("p", 1, (64, 64))
    others = [
        drawn("q", 1, (64, 64)), drawn("p", 2, (64, 64)), drawn("p", 1, (64, 64), steps=2),
        drawn("p", 1, (64, 64), negative="n"), drawn("p", 1, (64, 64), notes="x"),
    ]  # fmt: skip
    assert base not in others
