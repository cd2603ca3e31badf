"""What travels over A1111's web API: the body of a drawing, the reply with its pictures, and the page of progress."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pybase64

from img_serving.backends.sdcpp import tagged
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import SEED_LIMIT, Artifact, Call
from img_serving.media.payload import artifact_from_base64
from img_serving.media.scan import SKELETON_BYTES, split_string_list_json

HONOURED: Final = {
    "num_inference_steps": ("steps", "steps"),
    "guidance_scale": ("guidance_scale", "cfg_scale"),
    "strength": ("usual_strength", "denoising_strength"),
}
"""Parameters that are passed on as they are: the attribute of `ImageRequest` that holds each, and its name in this protocol."""

SDCPP_SEED_LIMIT: Final = 2**31
"""stable-diffusion.cpp's server (97d2990) reads the field `seed` as 32 bits with a sign, and draws any seed from here on
with another one; its tag takes 64 bits."""

KEEP_WHAT_WAS_THERE: Final = 1
"""`inpainting_fill`: what is repainted starts from the picture itself."""

PROGRESS_SCALE: Final = 100
"""Where a server tells its progress as a share only, it is counted in hundredths."""


class _Reply(msgspec.Struct):
    images: list[str] | None = None
    info: Any = None


class Info(msgspec.Struct):
    """What `info` (a JSON document inside a string) tells that we use. What pictures can do without is `Any`."""

    all_seeds: list[int] | None = None
    index_of_first_image: int = 0
    sd_model_name: Any = None
    sampler_name: Any = None
    extra_generation_params: Any = None

    @property
    def model(self) -> str | None:
        """The checkpoint that drew."""
        return self.sd_model_name if isinstance(self.sd_model_name, str) and self.sd_model_name else None

    @property
    def sampler(self) -> str | None:
        """The sampler that was used."""
        return self.sampler_name if isinstance(self.sampler_name, str) and self.sampler_name else None

    @property
    def schedule(self) -> str | None:
        """The noise schedule that was used, where it says so (A1111 1.9 and later)."""
        more = self.extra_generation_params
        told = more.get("Schedule type") if isinstance(more, dict) else None
        return told if isinstance(told, str) else None


class ProgressState(msgspec.Struct):
    """The part `state` of the page of progress."""

    interrupted: bool = False
    stopping_generation: bool = False
    job_count: int = 0
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressPage(msgspec.Struct):
    """`GET /sdapi/v1/progress`. `progress` is from 0 to 1; it stays at 0.01 until the first step has ended."""

    progress: float = 0.0
    state: ProgressState = msgspec.field(default_factory=ProgressState)
    current_image: str | None = None

    def steps(self) -> tuple[int, int]:
        """How many steps are done, of how many. Until the first one is done, the server still tells of the job before."""
        state = self.state
        if state.sampling_steps > 0:
            jobs = max(1, state.job_count)
            job = min(max(0, state.job_no), jobs - 1)
            return job * state.sampling_steps + min(
                state.sampling_step, state.sampling_steps
            ), jobs * state.sampling_steps
        if 0.0 < self.progress <= 1.0:
            return int(self.progress * PROGRESS_SCALE), PROGRESS_SCALE
        return 0, 0

    def share(self) -> float | None:
        """How far the picture is that is drawn now, 0 to 1; None where the server counts no steps."""
        state = self.state
        return min(1.0, max(0.0, state.sampling_step / state.sampling_steps)) if state.sampling_steps > 0 else None


_REPLY = msgspec.json.Decoder(_Reply)
_INFO = msgspec.json.Decoder(Info)
_PROGRESS = msgspec.json.Decoder(ProgressPage)


def request_body(
    call: Call,
    size: tuple[int, int],
    *,
    sampler: str | None = None,
    schedule: str | None = None,
    checkpoint: str | None = None,
    clip_skip: int | None = None,
    restore: bool = False,
    mask: bytes | None = None,
    one_by_one: bool = False,
    is_sdcpp: bool = False,
) -> dict[str, Any]:
    """What is sent: the call's own facts, and of the optional parameters only what the client gave.

    Args:
        call: what is drawn.
        size: width and height in pixels, as the server draws them.
        sampler: the server's own name.
        schedule: the server's own name.
        checkpoint: the model to load first; None: the one that is there.
        clip_skip: to set for this call; None: as it is.
        restore: whether the server's own settings are put back afterwards. It loads its own model again then.
        mask: a PNG, white where it may paint.
        one_by_one: the pictures are drawn one after the other, for the server shows those of a batch in one contact sheet.
        is_sdcpp: the server is stable-diffusion.cpp's, which has some things elsewhere.
    """
    request = call.request
    first = call.items[0]
    body: dict[str, Any] = {
        "prompt": first.prompt,
        "negative_prompt": first.negative_prompt or "",
        "seed": first.seed,
        "width": size[0],
        "height": size[1],
        "batch_size": 1 if one_by_one else len(call.items),
        "n_iter": len(call.items) if one_by_one else 1,
        "send_images": True,
        "save_images": False,
    }
    for attribute, name in HONOURED.values():
        value = getattr(request, attribute)
        if value is not None:
            body[name] = value
    if sampler is not None:
        body["sampler_name"] = sampler
    if schedule is not None:
        body["scheduler"] = schedule
    if request.images:
        body["init_images"] = [pybase64.b64encode_as_string(one.data) for one in request.images]
    if mask is not None:
        body["mask"] = pybase64.b64encode_as_string(mask)
        body["inpainting_fill"] = KEEP_WHAT_WAS_THERE
        body["inpaint_full_res"] = False
    if request.clip_skip is not None:
        body["clip_skip"] = request.clip_skip  # where stable-diffusion.cpp and SD.Next look for it; Forge looks below
    if is_sdcpp:
        if call.items[-1].seed >= SDCPP_SEED_LIMIT:
            body["prompt"] += tagged({"seed": first.seed})
        return body
    overrides: dict[str, Any] = {}
    if checkpoint is not None:
        overrides["sd_model_checkpoint"] = checkpoint
    if clip_skip is not None:
        overrides["CLIP_stop_at_last_layers"] = clip_skip
    if overrides:
        body["override_settings"] = overrides
        body["override_settings_restore_afterwards"] = restore
    return body


def read_reply(body: bytes | bytearray, call: Call) -> tuple[list[Artifact], Info]:
    """The pictures of a complete reply, one an item, and what it says of them. Raises AttemptError."""
    try:
        skeleton, payloads = split_string_list_json(body)
        if len(skeleton) > SKELETON_BYTES:
            raise ValueError("what is left without its pictures is too large")
        reply = _REPLY.decode(skeleton)
    except (ValueError, RecursionError):
        raise AttemptError(
            Outcome.FAILED, "the backend's reply is no txt2img reply (bad JSON or another shape)"
        ) from None
    info = _info(reply.info)
    wanted = len(call.items)
    # A contact sheet of the whole batch may come first (an option of the server), and helper pictures may come last.
    start = max(0, info.index_of_first_image)
    images = (reply.images or [])[start : start + wanted]
    if len(images) < wanted:
        raise AttemptError(Outcome.FAILED, f"the backend drew {len(images)} of {wanted} pictures")
    seeds = _seeds(info, call)
    try:
        drawn = [artifact_from_base64(payloads[int(image)], seed) for image, seed in zip(images, seeds, strict=True)]
    except ValueError as error:
        raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None
    return drawn, info


def read_progress(body: bytes | bytearray) -> ProgressPage | None:
    """The page of progress; None for anything else."""
    try:
        return _PROGRESS.decode(body)
    except (ValueError, RecursionError):
        return None


def _info(info: Any) -> Info:
    """`info` is a note about pictures that are there already: one that cannot be read must not cost them."""
    try:
        return _INFO.decode(info) if isinstance(info, str) else msgspec.convert(info or {}, Info)
    except (ValueError, RecursionError):
        return Info()


def _seeds(info: Info, call: Call) -> list[int]:
    told = info.all_seeds or []
    asked = [item.seed for item in call.items]
    told = told[: len(asked)]
    return told if len(told) == len(asked) and all(0 <= seed < SEED_LIMIT for seed in told) else asked
