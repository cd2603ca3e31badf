"""Workflows: how they are read, checked, mapped and filled, and what the websocket says of them."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_comfyui import JPEG

from img_serving.backends.comfyui import ComfyUIBackend
from img_serving.backends.comfyui.built_in import built_in, model_ids, samplers, schedulers
from img_serving.backends.comfyui.events import Watch
from img_serving.backends.comfyui.graph import Slot
from img_serving.backends.comfyui.guess import guess, steps_of
from img_serving.backends.comfyui.replies import (
    NotComfyUI,
    Picture,
    Queued,
    Record,
    Upload,
    faults_in,
    find_queued,
    heeds_interrupted_id,
    read_choices,
    read_record,
    read_version,
)
from img_serving.backends.comfyui.workflow import Workflow, read_workflows
from img_serving.ports import UpstreamReply


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


PLAIN = {
    "3": node(
        "KSampler", seed=1, steps=20, cfg=8.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
    ),
    "4": node("CheckpointLoaderSimple", ckpt_name="sd.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="blur", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
}  # fmt: skip


def changed(*without: str, **nodes: Any) -> dict[str, Any]:
    """`PLAIN` with other nodes (`n5=…` is node 5)."""
    graph = {name: one for name, one in copy.deepcopy(PLAIN).items() if name not in without}
    return graph | {name.removeprefix("n"): one for name, one in nodes.items()}


FLUX = {
    "1": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
    "2": node("DualCLIPLoader", clip_name1="a", clip_name2="b", type="flux"),
    "3": node("VAELoader", vae_name="ae"),
    "5": node("EmptySD3LatentImage", width=["20", 0], height=["21", 0], batch_size=1),
    "6": node("CLIPTextEncode", text=["22", 0], clip=["2", 0]),
    "8": node("VAEDecode", samples=["13", 0], vae=["3", 0]),
    "9": node("SaveImage", filename_prefix="flux", images=["8", 0]),
    "13": node(
        "SamplerCustomAdvanced",
        noise=["25", 0],
        guider=["23", 0],
        sampler=["16", 0],
        sigmas=["17", 0],
        latent_image=["5", 0],
    ),
    "16": node("KSamplerSelect", sampler_name="euler"),
    "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0, model=["30", 0]),
    "20": node("PrimitiveInt", value=1024),
    "21": node("PrimitiveInt", value=768),
    "22": node("PrimitiveStringMultiline", value="a cat"),
    "23": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
    "25": node("RandomNoise", noise_seed=1),
    "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    "30": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=["20", 0], height=["21", 0], model=["1", 0]),
}
SDXL_REFINED = {
    "1": node("CheckpointLoaderSimple", ckpt_name="base"),
    "2": node("CheckpointLoaderSimple", ckpt_name="refiner"),
    "5": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
    "6": node("CLIPTextEncodeSDXL", text_g="a cat", text_l="a cat", width=1024, height=1024, clip=["1", 1]),
    "7": node("CLIPTextEncode", text="blur", clip=["1", 1]),
    "10": node(
        "KSamplerAdvanced", noise_seed=1, steps=25, cfg=8.0, sampler_name="euler", scheduler="normal", add_noise="enable",
        model=["1", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
    ),
    "11": node(
        "KSamplerAdvanced", noise_seed=2, steps=25, cfg=5.0, sampler_name="euler", scheduler="normal", add_noise="disable",
        model=["2", 0], positive=["15", 0], negative=["16", 0], latent_image=["10", 0],
    ),
    "15": node("CLIPTextEncode", text="a cat", clip=["2", 1]),
    "16": node("CLIPTextEncode", text="blur", clip=["2", 1]),
    "17": node("VAEDecode", samples=["11", 0], vae=["2", 2]),
    "19": node("SaveImage", filename_prefix="x", images=["17", 0]),
}  # fmt: skip
QWEN_EDIT = {
    "1": node("UNETLoader", unet_name="qwen", weight_dtype="default"),
    "2": node("CLIPLoader", clip_name="q", type="qwen_image"),
    "3": node("VAELoader", vae_name="q"),
    "4": node("LoadImage", image="example.png"),
    "5": node("TextEncodeQwenImageEdit", prompt="make it blue", clip=["2", 0], vae=["3", 0], image=["4", 0]),
    "6": node("TextEncodeQwenImageEdit", prompt="", clip=["2", 0], vae=["3", 0], image=["4", 0]),
    "7": node("VAEEncode", pixels=["4", 0], vae=["3", 0]),
    "8": node(
        "KSampler", seed=1, steps=20, cfg=2.5, sampler_name="euler", scheduler="simple", denoise=1.0,
        model=["1", 0], positive=["5", 0], negative=["6", 0], latent_image=["7", 0],
    ),
    "9": node("VAEDecode", samples=["8", 0], vae=["3", 0]),
    "10": node("PreviewImage", images=["9", 0]),
}  # fmt: skip


def shown(slots: dict[str, tuple[Slot, ...]]) -> dict[str, str]:
    return {name: " ".join(str(slot) for slot in found) for name, found in sorted(slots.items())}


def one(graph: Any, **more: Any) -> Workflow:
    return read_workflows({"mine": {"graph": graph, **more}})["mine"]


def fault(graph: Any = PLAIN, **more: Any) -> str:
    with pytest.raises(ValueError, match=r"^workflows\.mine") as caught:
        one(graph, **more)
    return str(caught.value)


# guessing


def test_a_plain_graph_is_mapped_by_its_links() -> None:
    assert shown(guess(PLAIN, "9")) == {
        "checkpoint": "4.ckpt_name",
        "guidance_scale": "3.cfg",
        "height": "5.height",
        "negative_prompt": "7.text",
        "prompt": "6.text",
        "sampler": "3.sampler_name",
        "scheduler": "3.scheduler",
        "seed": "3.seed",
        "steps": "3.steps",
        "width": "5.width",
    }


def test_a_graph_of_custom_samplers_is_mapped_through_its_parts() -> None:
    assert shown(guess(FLUX, "9")) == {
        "guidance_scale": "26.guidance",
        "height": "21.value",
        "prompt": "22.value",
        "sampler": "16.sampler_name",
        "scheduler": "17.scheduler",
        "seed": "25.noise_seed",
        "steps": "17.steps",
        "width": "20.value",
    }
    assert steps_of(FLUX, "9") == {"13": 20}


def test_of_two_samplers_both_get_what_they_agree_on() -> None:
    assert shown(guess(SDXL_REFINED, "19")) == {
        "guidance_scale": "10.cfg",
        "height": "5.height",
        "negative_prompt": "16.text 7.text",
        "prompt": "15.text 6.text_g 6.text_l",
        "sampler": "11.sampler_name 10.sampler_name",
        "scheduler": "11.scheduler 10.scheduler",
        "seed": "11.noise_seed 10.noise_seed",
        "steps": "11.steps 10.steps",
        "width": "5.width",
    }


def test_a_graph_that_edits_has_a_picture_and_a_strength() -> None:
    found = shown(guess(QWEN_EDIT, "10"))
    assert (found["image"], found["prompt"], found["negative_prompt"]) == ("4.image", "5.prompt", "6.prompt")
    assert found["strength"] == "8.denoise"
    assert "width" not in found


def test_a_picture_that_is_scaled_first_gives_the_size() -> None:
    graph = changed(
        n5=node("VAEEncode", pixels=["11", 0], vae=["4", 2]),
        n10=node("LoadImage", image="x.png"),
        n11=node("ImageScale", image=["10", 0], upscale_method="lanczos", width=64, height=64, crop="disabled"),
    )
    found = shown(guess(graph, "9"))
    assert (found["image"], found["width"], found["height"]) == ("10.image", "11.width", "11.height")


def test_a_pose_that_guides_the_drawing_is_no_picture_to_edit() -> None:
    graph = changed(
        n3=node("KSampler", **{**PLAIN["3"]["inputs"], "positive": ["20", 0], "negative": ["20", 1]}),
        n10=node("LoadImage", image="pose.png"),
        n20=node(
            "ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["21", 0], image=["10", 0],
            strength=1.0,
        ),
        n21=node("ControlNetLoader", control_net_name="x"),
    )  # fmt: skip
    found = shown(guess(graph, "9"))
    assert (found["prompt"], found["negative_prompt"]) == ("6.text", "7.text")
    assert "image" not in found
    assert one(graph).operations == {"generation"}


def test_a_zeroed_prompt_is_no_negative_prompt() -> None:
    graph = changed(n7=node("ConditioningZeroOut", conditioning=["6", 0]))
    assert "negative_prompt" not in guess(graph, "9")


def test_a_graph_in_a_circle_is_read_all_the_same() -> None:
    graph = changed(n5=node("LatentUpscale", samples=["5", 0], width=8, height=8))
    assert guess(graph, "9")["prompt"] == (Slot("6", "text"),)


def test_the_built_in_graphs_are_what_would_be_guessed_of_them() -> None:
    for edit, mask in ((False, False), (True, False), (True, True)):
        template = built_in(edit=edit, mask=mask)
        assert guess(template.graph, template.output) == dict(template.slots)


# reading


def test_a_workflow_knows_what_it_honours_and_what_was_guessed() -> None:
    workflow = one(PLAIN, inputs={"seed": ["3.seed"], "steps": []})
    assert workflow.honours == {"negative_prompt", "seed", "guidance_scale", "size", "sampler", "scheduler"}
    template = workflow.generation
    assert template is not None
    assert (template.output, "seed" in template.guessed, "prompt" in template.guessed) == ("9", False, True)
    assert template.guesses.startswith("checkpoint = 4.ckpt_name, guidance_scale = 3.cfg, height = 5.height, ")
    assert template.parameter_at("5", "width") == "size"
    assert template.parameter_at("5", "batch_size") is None


@pytest.mark.parametrize(
    ("graph", "multiple"),
    [(PLAIN, 8), (changed(n5=node("EmptySD3LatentImage", width=64, height=64, batch_size=1)), 16)],
)
def test_sizes_are_multiples_of_what_the_latent_needs(graph: Any, multiple: int) -> None:
    sizes = one(graph).sizes
    assert (sizes.multiple, sizes.rounding, sizes.min_side, sizes.max_side) == (multiple, "down", 16, 16384)
    assert one(graph, size_multiple=64).sizes.fit(100, 130) == (64, 128)
    assert one(graph, inputs={"width": []}).sizes.fit(100, 130) == (100, 130)


def test_a_workflow_may_have_no_place_for_a_prompt_where_that_is_said() -> None:
    mapped = one(PLAIN, inputs={"prompt": []})
    assert mapped.generation is not None
    assert "prompt" not in mapped.generation.slots


def test_files_are_read_when_the_adapter_is_made(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"prompt": PLAIN, "client_id": "x"}))
    workflow = read_workflows({"mine": {"file": str(file), "edit_graph": QWEN_EDIT}})["mine"]
    assert workflow.operations == {"generation", "edit", "variation"}


def test_a_fault_says_what_where_and_what_would_be_right(tmp_path: Path) -> None:
    assert "no node '66' (the nearest: 6" in fault(inputs={"prompt": "66.text"})
    assert "node 6 (CLIPTextEncode) has no input 'txt' (the nearest: text)" in fault(inputs={"prompt": "6.txt"})
    assert "inputs.prompt: '6' must be \"node.input\"" in fault(inputs={"prompt": "6"})
    assert "inputs.promt: unknown option; did you mean prompt?" in fault(inputs={"promt": "6.text"})
    assert "mine.ouput: unknown option; did you mean output?" in fault(ouput="9")
    assert "3.seed holds no text, which cannot be the prompt" in fault(inputs={"prompt": "3.seed"})
    assert "6.text holds a text, which cannot be the seed" in fault(inputs={"seed": "6.text"})
    assert "no node '10' (the nearest" in fault(output="10")
    assert "several would do (9, 12)" in fault(changed(n12=PLAIN["9"]))
    assert "edit_graph for it" in fault(edit_inputs={"image": "10.image"})
    assert "edit_inputs: no picture gets in" in fault(edit_graph=PLAIN)
    assert "checkpoint: no node takes it" in fault(FLUX, checkpoint="x")
    assert "linked to node '99'" in fault(changed(n8=node("VAEDecode", samples=["99", 0])))
    assert "no text node was found" in fault(changed(n6=node("Nothing"), n7=node("Nothing")))
    assert "needs `file`" in fault(None)
    assert "cannot be read (No such file" in fault(None, file=str(tmp_path / "none.json"))
    assert "one of the two has to go" in fault(file="x.json")
    with pytest.raises(ValueError, match="must be a table"):
        read_workflows({"x": "w.json"})


@pytest.mark.parametrize(
    "document",
    [
        {"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4},
        {"9": "text"},
        {"9": {"inputs": {}}},
        {"9": {"class_type": "SaveImage"}},
        {},
    ],
)
def test_another_format_is_told_how_to_export_the_right_one(document: Any) -> None:
    assert "Export (API)" in fault(document)


@pytest.mark.parametrize("text", ['{"secret": ', "secret", "[]", "", "[" * 5000])
def test_a_file_that_is_no_workflow_is_never_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "w.json"
    file.write_text(text)
    said = fault(None, file=str(file))
    assert "Export (API)" in said
    assert "secret" not in said


def test_the_table_itself_is_closed() -> None:
    class Nowhere:
        async def request(self, *_: Any, **__: Any) -> UpstreamReply:
            return UpstreamReply(404)

        async def close(self) -> None: ...

    with pytest.raises(ValueError, match="workflow: unknown option; did you mean workflows"):
        ComfyUIBackend(Nowhere(), options={"workflow": {}})
    with pytest.raises(ValueError, match="built_in: false, and there are no workflows"):
        ComfyUIBackend(Nowhere(), options={"built_in": False})
    with pytest.raises(ValueError, match="built_in: must be true or false, not a string"):
        ComfyUIBackend(Nowhere(), options={"built_in": "yes"})
    backend = ComfyUIBackend(Nowhere(), options={"workflows": {"a": {"graph": PLAIN}, "b": {"graph": QWEN_EDIT}}})
    able = backend.capabilities
    assert able.of("a").operations == {"generation"}
    assert able.of("b").operations == {"edit", "variation"}
    assert able.of("a").formats == ()
    assert "built" not in repr(backend)


# filling


def test_only_what_is_mapped_and_given_is_changed_and_the_graph_stays_as_it_was() -> None:
    template = one(PLAIN).generation
    assert template is not None
    before = json.dumps(template.graph)
    graph = template.filled({"prompt": "개", "seed": 2**63 - 1, "steps": 4, "mask": "nowhere"})
    assert json.dumps(template.graph) == before
    assert (graph["6"]["inputs"]["text"], graph["3"]["inputs"]["seed"], graph["3"]["inputs"]["steps"]) == (
        "개",
        2**63 - 1,
        4,
    )
    assert graph["7"] is template.graph["7"]
    assert graph["6"]["inputs"]["clip"] == ["4", 1]


def test_more_slots_than_pictures_get_the_last_one_again() -> None:
    graph = {**QWEN_EDIT, "20": node("LoadImage", image="a"), "21": node("LoadImage", image="b")}
    template = one(graph, inputs={"image": ["4.image", "20.image", "21.image"]}).edit
    assert template is not None
    filled = template.filled({"image": ["one", "two"]})
    assert [filled[name]["inputs"]["image"] for name in ("4", "20", "21")] == ["one", "two", "two"]


def test_identifiers_with_dots_and_colons_are_found() -> None:
    graph = changed(**{"n12:6.1": node("Style", **{"images.text": "x"})})
    template = one(graph, inputs={"negative_prompt": "12:6.1.images.text"}).generation
    assert template is not None
    assert template.slots["negative_prompt"] == (Slot("12:6.1", "images.text"),)


# names


def test_model_ids_are_names_without_extension_unless_two_would_be_one() -> None:
    files = ["a.safetensors", "sub\\b.ckpt", "c.ckpt", "c.safetensors", "v1.5", "모델.safetensors"]
    assert model_ids(files) == {
        "a": "a.safetensors",
        "sub/b": "sub\\b.ckpt",
        "c.ckpt": "c.ckpt",
        "c.safetensors": "c.safetensors",
        "v1": "v1.5",
        "모델": "모델.safetensors",
    }


def test_only_names_that_the_server_has_are_found_by_another() -> None:
    schedules = schedulers(["normal", "karras"])
    known = samplers(["euler", "dpmpp_2m"], schedules)
    assert (known.find("DPM++ 2M"), known.find("Euler a"), known.find("k_euler")) == ("dpmpp_2m", None, "euler")
    assert (schedules.find("Automatic"), schedules.find("Exponential")) == ("normal", None)


# replies


def test_a_record_tells_why_it_failed_without_inputs_or_traceback() -> None:
    told = {"exception_type": "torch.OutOfMemoryError", "exception_message": "CUDA\n", "node_type": "KSampler"}
    for messages, reason in (
        ([["execution_interrupted", {}]], "interrupted at the server"),
        ([["execution_error", {**told, "traceback": ["x"]}]], "KSampler failed: OutOfMemoryError: CUDA"),
        ([["execution_error", {}]], "a node failed: "),
        ([5, ["execution_start"]], "it failed, and the server does not say why"),
    ):
        body = {"id": {"outputs": {}, "status": {"status_str": "error", "completed": False, "messages": messages}}}
        record = read_record(json.dumps(body).encode(), "id")
        assert record is not None
        assert record.failure() == reason


def test_a_record_of_2023_has_no_status_and_other_outputs_do_not_matter() -> None:
    body = {"id": {"outputs": {"8": {"text": ["x"]}, "9": {"images": [{"filename": "a b.png", "type": "temp"}]}}}}
    record = read_record(json.dumps(body).encode(), "id")
    assert isinstance(record, Record)
    assert record.failure() is None
    assert record.picture("9") == Picture("a b.png", "", "temp")
    assert Picture("a b&c.png", "하위/x", "temp").path == (
        "/view?filename=a+b%26c.png&subfolder=%ED%95%98%EC%9C%84%2Fx&type=temp"
    )
    assert (record.picture("8"), record.picture("7")) == (None, None)
    assert read_record(b"{}", "id") is None


def test_the_queue_is_in_the_order_of_its_numbers() -> None:
    running = [[3, "a", {}, {"client_id": "x"}, []]]
    pending = [[9, "d", {}, {}, []], [5.5, "c", {}, {"client_id": "me"}, []], [-4, "b", {}, None, []]]
    body = json.dumps({"queue_running": running, "queue_pending": pending}).encode()
    assert find_queued(body, "a", "nobody") == Queued("a", 0, True)
    assert find_queued(body, "d", "nobody") == Queued("d", 3, False)
    assert find_queued(body, "other", "me") == Queued("c", 2, False)
    assert find_queued(body, "other", "nobody") is None
    for bad in (b"[]", b'{"queue_running": [[]]}', b'{"queue_pending": [["x", "y"]]}', b"<"):
        with pytest.raises(NotComfyUI):
            find_queued(bad, "a", "b")


def test_uploads_are_named_as_nodes_take_them() -> None:
    assert Upload("a.png", "img-serving", "temp").annotated == "img-serving/a.png [temp]"
    assert Upload("a.png").annotated == "a.png [input]"


@pytest.mark.parametrize(
    ("document", "choices"),
    [
        ({"K": {"input": {"required": {"x": [["a", "b"], {}]}}}}, ("a", "b")),
        ({"K": {"input": {"required": {"x": ["COMBO", {"options": ["a"]}]}}}}, ("a",)),
        ({"K": {"input": {"required": {"x": ["INT", {}]}}}}, None),
        ({}, None),
        ([], None),
    ],
)
def test_choices_are_read_in_both_shapes(document: Any, choices: Any) -> None:
    assert read_choices(json.dumps(document).encode(), "K", "x") == choices


@pytest.mark.parametrize(
    ("version", "heeds"),
    [
        ("0.3.64", True),
        ("0.3.57", True),
        ("0.3.56", False),
        ("v0.33.0", True),
        ("1.0.0", True),
        ("0.3.40", False),
        ("", False),
        ("nightly", False),
    ],
)
def test_targeted_interrupts_are_known_by_the_version(version: str, heeds: bool) -> None:
    assert heeds_interrupted_id(version) is heeds


def test_a_version_is_taken_only_where_it_is_one() -> None:
    assert read_version(b'{"system": {"comfyui_version": "0.33.0"}}') == "0.33.0"
    assert read_version(b'{"system": {"comfyui_version": "<script>"}}') == ""
    assert read_version(b'{"system": {}}') == ""
    assert read_version(b'{"cuda": {}}') is None


@pytest.mark.parametrize("document", [None, [], {"error": "text"}, {"error": {"message": "x"}}, {"node_errors": []}])
def test_complaints_of_others_are_not_taken_for_comfyuis(document: Any) -> None:
    assert faults_in(document) == []


# the websocket


def event(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


def test_news_are_only_of_our_own_prompt() -> None:
    watch = Watch("me", {"3": 2}, previews=True)
    preview = struct.pack(">II", 1, 1) + JPEG
    assert watch.take(preview) is None
    assert watch.take(event("progress", value=1, max=2, prompt_id="other", node="3")) is None
    assert watch.take(event("executing", node="3")) is None
    assert not watch.has_started
    started = watch.take(event("execution_start", prompt_id="me"))
    assert started is not None
    assert (started.done, started.total, watch.has_started) == (0, 2, True)
    step = watch.take(event("progress", value=1, max=2, prompt_id="me", node="3"))
    assert step is not None
    assert (step.done, step.total) == (1, 2)
    seen = watch.take(preview)
    assert seen is not None
    assert seen.preview == (JPEG, "image/jpeg")
    over = watch.take(event("executing", node=None, prompt_id="me"))
    assert over is not None
    assert over.is_over
    assert watch.take(preview) is None


def test_the_steps_of_several_samplers_are_one_way_and_other_nodes_do_not_count() -> None:
    watch = Watch("me", {"1": 4, "2": 4}, previews=False)
    told = []
    for name, value, of in [("1", 2, 4), ("1", 4, 4), ("9", 1, 100), ("2", 1, 2), ("2", 2, 2), ("9", 99, 100)]:
        news = watch.take(event("progress", value=value, max=of, prompt_id="me", node=name))
        assert news is not None
        told.append((news.done, news.total))
    assert told == [(2, 8), (4, 8), (4, 8), (5, 6), (6, 6), (6, 6)]


def test_without_a_known_sampler_every_node_counts_but_never_backwards() -> None:
    watch = Watch("me", {}, previews=False)
    shares = []
    for name, value, of in [("1", 1, 2), ("1", 2, 2), ("2", 1, 50), ("2", 50, 50)]:
        news = watch.take(event("progress", value=value, max=of, prompt_id="me", node=name))
        assert news is not None
        shares.append(news.done / news.total)
    assert shares == sorted(shares)


def with_metadata(**metadata: Any) -> bytes:
    text = json.dumps(metadata).encode()
    return struct.pack(">II", 4, len(text)) + text + JPEG


def test_previews_that_name_a_prompt_are_ours_or_not() -> None:
    watch = Watch("me", {}, previews=True)
    assert watch.take(with_metadata(prompt_id="other")) is None
    assert watch.take(with_metadata()) is None
    news = watch.take(with_metadata(prompt_id="me"))
    assert news is not None
    assert news.preview is not None
    assert Watch("me", {}, previews=False).take(with_metadata(prompt_id="me")) is None


@pytest.mark.parametrize(
    "frame",
    [
        "", "{", "[]", "5", '{"type": 5}', '{"type": "progress", "data": []}', "[" * 5000,
        '{"type": "status", "data": {}}', b"", b"\0\0\0\1", b"\0\0\0\4\xff\xff\xff\xff{", b"\0\0\0\3\0\0\0\1nhello",
        b"\0\0\0\4\0\0\0\2[]" + JPEG, b"\0\0\0\1\0\0\0\1GIF89a",
    ],
)  # fmt: skip
def test_frames_that_cannot_be_read_say_nothing(frame: str | bytes) -> None:
    watch = Watch("me", {}, previews=True)
    watch.take(event("execution_start", prompt_id="me"))
    assert watch.take(frame) is None


def test_an_idle_server_is_noticed() -> None:
    watch = Watch("me", {}, previews=False)
    assert watch.take(event("status", status={"exec_info": {"queue_remaining": 0}}, sid="x")) is None
    assert watch.is_idle
    watch.take(event("status", status={"exec_info": {"queue_remaining": 2}}))
    assert not watch.is_idle


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in fault(None, file=str(tmp_path / "pipe"))
    assert "is no regular file" in fault(None, file="/dev/zero")
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(17 << 20)
    assert "which no workflow is" in fault(None, file=str(large))
