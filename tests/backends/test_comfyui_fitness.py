"""What is told of a server's nodes, and which workflows can run there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.backends.test_comfyui import SAVING

from img_serving.backends.comfyui.fitness import Nodes, checkpoint_file, classes_of, misfit, read_node
from img_serving.backends.comfyui.workflow import Workflow, read_workflows

INFO: dict[str, Any] = {
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["a.safetensors", "sub\\b.ckpt"], {"tooltip": "…"}]}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP"]}}},
    "EmptyLatentImage": {"input": {"required": {"width": ["INT", {}], "height": ["INT", {}], "batch_size": ["INT", {}]}}},
    "KSampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}], "seed": ["INT", {}], "steps": ["INT", {}], "cfg": ["FLOAT", {}],
                "sampler_name": ["COMBO", {"options": ["heun", "euler"]}], "scheduler": [["karras"]],
                "positive": ["CONDITIONING"], "negative": ["CONDITIONING"], "latent_image": ["LATENT"],
                "denoise": ["FLOAT"],
            }
        }
    },
    "VAEDecode": {"input": {"required": {"samples": ["LATENT"], "vae": ["VAE"]}}},
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING"]}, "hidden": {"prompt": "PROMPT"}},
        "output_node": True,
    },
}  # fmt: skip
"""As ComfyUI 0.33.0 tells it, without what is not read."""


def nodes(**changed: Any) -> Nodes:
    found: dict[str, Any] = {}
    for name, told in {**INFO, **changed}.items():
        whole = {} if told is None else {name: {"python_module": "nodes", "output_node": False, **told}}
        found |= read_node(json.dumps(whole).encode(), name)
    return found


def flow(changed: dict[str, Any] | None = None, **more: Any) -> Workflow:
    graph = json.loads(json.dumps(SAVING))
    graph["1"]["inputs"]["ckpt_name"] = "a.safetensors"
    for node, inputs in (changed or {}).items():
        graph[node]["inputs"] |= inputs
    return read_workflows({"mine": {"graph": graph, **more}})["mine"]


def test_a_workflow_that_fits_is_not_complained_about() -> None:
    assert misfit(flow(), nodes()) is None
    assert misfit(flow(), {}) is None, "of a server that tells nothing, nothing is held against it"
    assert classes_of(flow()) == INFO.keys() - {"LoadImage"}


@pytest.mark.parametrize(
    ("workflow", "changed", "reason"),
    [
        (flow(), {"KSampler": None}, "node 5 is a KSampler, which the server does not have"),
        (flow({"5": {"sampler_name": "nope"}}), {}, "5.sampler_name is nope, which the server does not have (it has: heun,"),
        (flow({"1": {"ckpt_name": "gone.ckpt"}}), {}, "1.ckpt_name is gone.ckpt"),
        (flow(output="5"), {}, "node 5 (KSampler) is no end of a graph"),
        (flow(inputs={"seed": "5.model"}), {}, "5.model takes a MODEL of another node, which the seed is not"),
        (flow(checkpoint="c"), {}, "it lacks the checkpoint c"),
    ],
)  # fmt: skip
def test_what_a_server_cannot_run_is_said_with_its_place(
    workflow: Workflow, changed: dict[str, Any], reason: str
) -> None:
    found = misfit(workflow, nodes(**changed))
    assert found is not None
    assert found.startswith(reason)


def test_nodes_that_people_add_may_take_what_they_do_not_list() -> None:
    theirs = {**INFO["KSampler"], "python_module": "custom_nodes.theirs"}
    assert misfit(flow({"5": {"sampler_name": "nosampler"}}), nodes(KSampler=theirs)) is None
    assert misfit(flow(inputs={"seed": "5.model"}), nodes(KSampler=theirs)) is not None


@pytest.mark.parametrize(
    ("named", "file"),
    [("a", "a.safetensors"), ("a.safetensors", "a.safetensors"), ("sub/b", "sub\\b.ckpt"), ("b", None)],
)
def test_a_checkpoint_is_found_by_its_file_or_by_its_model(named: str, file: str | None) -> None:
    workflow = flow(checkpoint=named)
    assert workflow.generation is not None
    assert checkpoint_file(workflow, workflow.generation, nodes()) == file
    assert checkpoint_file(workflow, workflow.generation, {}) == named, "the server decides itself"


def test_pictures_that_are_put_in_need_not_be_listed() -> None:
    assert nodes()["LoadImage"].choices == {}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b'{"X": 1}',
        b'{"X": {"input": []}}',
        b"[" * 5000,
        b'{"X": {"input": {"required": {"a": 1}}}}',
    ],
)
def test_what_is_no_description_holds_nothing_against_anybody(body: bytes) -> None:
    told = read_node(body, "X")
    assert told.get("X", ...) is not None
