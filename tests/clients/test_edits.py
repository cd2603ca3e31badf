"""Pictures from pictures: every way in which the libraries send files."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image
from tests.clients.rehearsal import PICTURE
from tests.support.official_clients import OfficialClient, Told, need_clients, picture_file
from tests.support.programs import Program

need_clients()
pytestmark = pytest.mark.smoke


def png(colour: str = "teal", mode: str = "RGB", side: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), colour).save(out, "PNG")
    return out.getvalue()


def mask() -> bytes:
    """Only the left half may change."""
    made = Image.new("RGBA", (64, 64), "black")
    made.paste((0, 0, 0, 0), (0, 0, 32, 64))
    out = io.BytesIO()
    made.save(out, "PNG")
    return out.getvalue()


def edit(client: OfficialClient, program: Program, **arguments: Any) -> Told:
    arguments = {"model": "procedural", "prompt": "a boat", **PICTURE, **arguments}
    return client.call("edit", f"{program.url}/v1", str(program.key), extensions={"seed": 3}, **arguments)


def picture_of(told: Told) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(told.pictures[0]["b64_json"]))).convert("RGB")


def test_it_edits_one_picture(client: OfficialClient, gateway: Program) -> None:
    told = edit(client, gateway, image=picture_file(png()))
    assert picture_of(told).size == (64, 64)
    assert told.request_id == told.attempts[0].headers["x-request-id"]


def test_it_edits_a_list_of_pictures(client: OfficialClient, gateway: Program) -> None:
    told = edit(client, gateway, image=[picture_file(png())], n=2)
    assert len(told.pictures) == 2
    several = edit(client, gateway, image=[picture_file(png()), picture_file(png("red"), "second.png")])
    assert picture_of(several).size == (64, 64)


def test_bytes_without_a_name_or_a_type_are_looked_at(python_client: OfficialClient, gateway: Program) -> None:
    assert picture_of(edit(python_client, gateway, image=picture_file(png(), name=None))).size == (64, 64)


def test_what_the_mask_covers_stays(client: OfficialClient, gateway: Program) -> None:
    told = edit(client, gateway, image=picture_file(png()), mask=picture_file(mask(), "mask.png"))
    drawn, before = picture_of(told), Image.open(io.BytesIO(png()))
    right, left = (32, 0, 64, 64), (0, 0, 32, 64)
    assert drawn.crop(right).tobytes() == before.crop(right).tobytes()
    assert drawn.crop(left).tobytes() != before.crop(left).tobytes()


def test_the_asynchronous_client_edits_too(python_client: OfficialClient, gateway: Program) -> None:
    told = python_client.call(
        "edit", f"{gateway.url}/v1", str(gateway.key), options={"asynchronous": True},
        model="procedural", prompt="a boat", image=[picture_file(png())], **PICTURE,
    )  # fmt: skip
    assert picture_of(told).size == (64, 64)


def test_it_varies_a_picture(client: OfficialClient, gateway: Program) -> None:
    told = client.call(
        "variation", f"{gateway.url}/v1", str(gateway.key),
        model="procedural", image=picture_file(png()), n=2, response_format="b64_json", size="64x64",
    )  # fmt: skip
    assert len({one["b64_json"] for one in told.pictures}) == 2
    assert picture_of(told).size == (64, 64)


def test_what_is_no_picture_is_the_callers_error(client: OfficialClient, gateway: Program) -> None:
    error = edit(client, gateway, image=picture_file(b"no picture at all")).error
    assert "BadRequestError" in error.classes
    assert (error.param, error.type) == ("image", "invalid_request_error")
