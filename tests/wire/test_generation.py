"""Messages of the worker's service: what goes in comes out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.backends.scripted import picture
from img_serving.domain.capabilities import PARAMETERS, Capabilities, SizeRule
from img_serving.domain.images import Call, ImageRequest, InputImage, Item, Operation, Preview, Progress
from img_serving.domain.vocabulary import Vocabulary
from img_serving.wire.generation import (
    SERVICE,
    call_of,
    capabilities_of,
    message_of,
    model_message,
    progress_events,
)
from img_serving.wire.v1 import generation_pb2 as pb

ROOT = Path(__file__).parent.parent.parent
steady = settings(deadline=None, derandomize=True)
IMAGE = InputImage(picture("start", 1, 16, 8), "image/png", 16, 8)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
maybe = lambda one: st.none() | one  # noqa: E731 - said many times below
seeds = st.integers(0, 2**63 - 1)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    operation: Operation = draw(st.sampled_from(get_args(Operation)))
    images = () if operation == "generation" else (IMAGE,) * draw(st.integers(1, 2))
    masked: bool = draw(st.booleans())
    mask = IMAGE if images and masked else None
    items = tuple(
        Item(draw(texts), draw(maybe(texts)), draw(seeds), images, mask) for _ in range(draw(st.integers(1, 3)))
    )
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    shared = {
        "steps": draw(maybe(st.integers(0, 1000))),
        "guidance_scale": draw(maybe(st.floats(0, 100))),
        "strength": draw(maybe(st.floats(0, 1))),
        "sampler": draw(maybe(texts)),
        "scheduler": draw(maybe(texts)),
        "clip_skip": draw(maybe(st.integers(0, 12))),
        "quality": draw(maybe(texts)),
        "style": draw(maybe(texts)),
        "background": draw(maybe(texts)),
        "output_format": draw(st.sampled_from([None, "png", "jpeg", "webp"])),
        "output_compression": draw(maybe(st.integers(0, 100))),
    }
    names = {"steps": "num_inference_steps"}
    request = ImageRequest(
        items[0].prompt,
        operation=operation,
        model=draw(maybe(texts.filter(bool))),
        n=len(items),
        width=width,
        height=height,
        negative_prompt=items[0].negative_prompt,
        seed=items[0].seed,
        seed_given=True,
        images=images,
        mask=mask,
        given=frozenset(names.get(name, name) for name, value in shared.items() if value is not None),
        **shared,
    )
    return Call(request, request.model, width, height, items, 60.0, request_id="req-1", previews=draw(st.booleans()))


@steady
@given(calls())
def test_a_call_comes_out_as_it_went_in(call: Call) -> None:
    sent = message_of(call, frozenset()).SerializeToString()
    assert call_of(pb.GenerateRequest.FromString(sent), timeout_seconds=60.0) == call


@steady
@given(calls(), st.frozensets(st.sampled_from(sorted(PARAMETERS))))
def test_what_is_not_honoured_is_not_sent(call: Call, honours: frozenset[str]) -> None:
    arrived = call_of(message_of(call, honours | {"size"}), timeout_seconds=60.0)
    assert arrived.request.given == call.request.given & honours
    assert [one.negative_prompt for one in arrived.items] == [
        one.negative_prompt if "negative_prompt" in honours else None for one in call.items
    ]
    assert [one.seed for one in arrived.items] == [one.seed for one in call.items], "a seed always is"


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1.0])
def test_a_preview_tells_how_far_its_own_picture_is(share: float | None) -> None:
    preview = Preview(picture("x", 1, 8, 8), "image/png", 2, share)
    (event, _) = progress_events(Progress(9, 12, preview))
    arrived = pb.GenerateEvent.FromString(event.SerializeToString()).preview
    assert (arrived.index, arrived.share if arrived.HasField("share") else None) == (2, share)


def test_capabilities_come_out_as_they_went_in() -> None:
    can = Capabilities(
        operations=frozenset({"generation", "edit", "variation"}),
        batch="items",
        max_batch_size=6,
        max_concurrency=3,
        honours=frozenset({"seed", "style"}),
        honours_in_edits=frozenset({"seed", "strength"}),
        sizes=SizeRule(multiple=16, rounding="nearest", min_side=64, max_side=2048, max_pixels=2**21),
        default_size=(1024, 768),
        max_steps=99,
        max_images=3,
        masks=True,
        samplers=Vocabulary(["euler"]),
        schedulers=Vocabulary(["karras"]),
        formats=("png", "webp"),
        progress=True,
        previews=True,
        cancels=True,
        any_model=True,
    )
    assert capabilities_of(model_message("m", can), slots=3, any_model=True) == can


def test_an_input_image_that_unpacks_to_gigabytes_is_refused() -> None:
    header = picture("x", 1, 8, 8)
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">II5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = header[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + header[33:]
    message = pb.GenerateRequest(
        width=64, height=64, operation=pb.OPERATION_EDIT, items=[pb.Item(images=[pb.InputImage(data=bomb)])]
    )
    with pytest.raises(Exception, match="pixels"):
        call_of(message, timeout_seconds=1.0)


def test_the_committed_stubs_are_what_the_proto_files_give() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "protoc", "--check"],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'grpc_tools'" in done.stderr:
        pytest.skip("grpcio-tools is not installed")
    assert done.returncode == 0, done.stderr


def test_the_service_has_the_name_that_the_page_tells() -> None:
    assert pb.DESCRIPTOR.services_by_name["ImageGeneration"].full_name == SERVICE
    assert "img_serving.v1" in (ROOT / "proto" / "img_serving" / "v1" / "generation.proto").read_text()


def test_fields_of_a_newer_version_are_passed_over() -> None:
    call = Call(ImageRequest("x", width=8, height=8, seed_given=True), None, 8, 8, (Item("x", None, 0),), 60.0)
    newer = message_of(call, frozenset()).SerializeToString() + bytes(
        [0xF2, 0x3F, 0x02, 0x68, 0x69]
    )  # field 1022, "hi"
    assert call_of(pb.GenerateRequest.FromString(newer), timeout_seconds=60.0) == msgspec.structs.replace(call)
