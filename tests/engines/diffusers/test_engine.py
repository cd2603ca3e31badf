"""The engine on tiny pipelines: what a batch promises, progress, stopping, edits, memory, and what is refused."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.drawing import SIDE, STEPS, call, draw, item, mask_of_right_half, most_different, picture, pipe_of

from img_serving.domain.images import SEED_LIMIT, InputImage, ItemFailure
from img_serving.engines.diffusers.family import described
from img_serving.engines.engine import GenerationCancelled, OnStep

pytest.importorskip("torch", reason="NO TORCH: make test-diffusers runs this in an environment that has it")
pytest.importorskip("diffusers", reason="NO DIFFUSERS: make test-diffusers runs this in an environment that has it")

FAMILIES = ("sd", "sdxl", "sd3", "flux")
EVERY = pytest.mark.parametrize("family", FAMILIES)
Engines = Callable[..., Any]


class Seen:
    """Remembers what an engine tells; `stop_after` steps nobody wants the pictures any more."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self.previews: list[Any] = []
        self._stop_after = stop_after

    def on_step(self) -> OnStep:
        return OnStep(self._told, lambda: self._stop_after is not None and len(self.steps) >= self._stop_after)

    def _told(self, done: int, total: int, previews: Any) -> None:
        self.steps.append((done, total))
        self.previews += previews


# What a batch promises


@EVERY
def test_with_one_bucket_a_picture_is_the_same_to_the_bit_alone_and_in_any_company(
    engine: Engines, family: str
) -> None:
    one = engine(family, buckets=(4,))
    items = [item(seed, f"a {thing}") for seed, thing in enumerate(["cat", "dog", "house", "red sea", "bird", "lake"])]
    together = draw(one, *items[:4])
    alone = [draw(one, each)[0] for each in items[:4]]
    others = draw(one, items[5], items[1], items[4])
    for first, second in zip(together, alone, strict=True):
        assert np.array_equal(first, second)
    assert np.array_equal(others[1], together[1])


@EVERY
def test_without_padding_company_changes_a_picture_by_at_most_one_of_255(engine: Engines, family: str) -> None:
    one = engine(family, padding=False)
    items = [item(seed, f"a {thing}") for seed, thing in enumerate(["cat", "dog", "house"])]
    for first, each in zip(draw(one, *items), items, strict=True):
        assert most_different(first, draw(one, each)[0]) <= 1


@EVERY
def test_prompt_and_seed_belong_to_each_picture(engine: Engines, family: str) -> None:
    first, again, seed, prompt = draw(engine(family), item(1), item(1), item(2), item(1, "a dog"))
    assert most_different(first, again) <= 1
    assert most_different(first, seed) > 8
    assert most_different(first, prompt) > 0
    assert first.shape == (SIDE, SIDE, 3)
    assert first.dtype == np.uint8


def test_the_largest_seed_is_one_of_its_own(engine: Engines) -> None:
    one = engine("sd")
    largest, second, wrapped = draw(one, item(SEED_LIMIT - 1), item(SEED_LIMIT - 2), item(0))
    assert most_different(largest, second) > 8
    assert most_different(largest, wrapped) > 8


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_negative_prompt_acts_and_is_its_own_pictures_only(engine: Engines, family: str) -> None:
    one = engine(family, buckets=(4,))
    plain, against = item(1), item(1, negative="green")
    together = draw(one, plain, against)
    assert most_different(*together) > 0
    assert np.array_equal(together[0], draw(one, plain)[0])
    assert np.array_equal(together[1], draw(one, against)[0])


def test_an_empty_negative_prompt_is_none(engine: Engines) -> None:
    """SDXL draws otherwise with an empty one than without; a client cannot tell the two apart."""
    one = engine("sdxl", buckets=(1,))
    assert np.array_equal(draw(one, item(1))[0], draw(one, item(1, negative=""))[0])


def test_a_distilled_model_has_no_negative_prompt_unless_true_guidance_is_on(engine: Engines) -> None:
    plain, guided = engine("flux"), engine("flux", true_cfg_scale=3.0)
    assert "negative_prompt" not in plain.capabilities().honours
    assert np.array_equal(draw(plain, item(1, negative="green"))[0], draw(plain, item(1))[0])
    assert "negative_prompt" in guided.capabilities().honours
    assert most_different(draw(guided, item(1, negative="green"))[0], draw(guided, item(1))[0]) > 0


@EVERY
@pytest.mark.parametrize("change", [{"steps": 2}, {"guidance_scale": 1.5}, {"width": 128}], ids=str)
def test_what_all_share_acts(engine: Engines, family: str, change: dict[str, Any]) -> None:
    usual, changed = draw(engine(family), item(1))[0], draw(engine(family), item(1), **change)[0]
    assert changed.shape == (SIDE, change.get("width", SIDE), 3)
    assert changed.shape != usual.shape or most_different(changed, usual) > 0


def test_clip_skip_counts_as_a1111_does(engine: Engines) -> None:
    one = engine("sdxl")
    assert "clip_skip" in one.capabilities().honours
    usual = draw(one, item(1))[0]
    assert np.array_equal(draw(one, item(1), clip_skip=1)[0], usual)
    assert most_different(draw(one, item(1), clip_skip=2)[0], usual) > 0


def test_defaults_of_the_operator_act_where_a_request_says_nothing(engine: Engines) -> None:
    seen = Seen()
    one = engine("sd", default_steps=2, default_guidance_scale=1.5)
    chosen = draw(one, item(1), steps=None, on_step=seen.on_step())[0]
    assert seen.steps[-1] == (2, 2)
    assert np.array_equal(chosen, draw(one, item(1), steps=2, guidance_scale=1.5)[0])
    assert most_different(chosen, draw(one, item(1), steps=2, guidance_scale=9.0)[0]) > 0


def test_a_model_whose_guidance_is_true_guidance_takes_scale_and_negative_prompt(engine: Engines) -> None:
    """Qwen-Image: what others call the guidance scale is `true_cfg_scale` there, and acts with a negative prompt only."""
    one = engine("qwen", buckets=(2,))
    usual = draw(one, item(1))[0]
    assert {"guidance_scale", "negative_prompt"} <= one.capabilities().honours
    assert most_different(draw(one, item(1), guidance_scale=12.0)[0], usual) > 0
    assert most_different(draw(one, item(1, negative="green"))[0], usual) > 0
    assert one._looks.is_fitted
    masked = item(1, images=(picture(),), mask=mask_of_right_half())
    assert most_different(draw(one, masked, strength=1.0)[0], usual) > 0


# Progress, previews, stopping


@EVERY
def test_every_step_is_told(engine: Engines, family: str) -> None:
    seen = Seen()
    draw(engine(family), item(1), item(2), on_step=seen.on_step())
    assert seen.steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_batch_in_parts_is_told_as_one(engine: Engines) -> None:
    seen = Seen()
    draw(engine("sd", buckets=(2,), max_batch_size=8), *(item(seed) for seed in range(5)), on_step=seen.on_step())
    assert seen.steps == [(step, 3 * STEPS) for step in range(1, 3 * STEPS + 1)]


def test_samplers_that_ask_the_network_twice_tell_all_of_their_steps(engine: Engines) -> None:
    seen = Seen()
    draw(engine("sd"), item(1), sampler="Heun", on_step=seen.on_step())
    assert seen.steps[-1] == (7, 7)


def test_a_strong_edit_has_as_many_steps_as_it_really_takes(engine: Engines) -> None:
    seen = Seen()
    draw(engine("sdxl"), item(1, images=(picture(),)), steps=10, strength=0.35, on_step=seen.on_step())
    assert seen.steps[-1] == (3, 3)


@EVERY
def test_stopped_between_steps_the_engine_draws_on_as_before(engine: Engines, family: str) -> None:
    one = engine(family)
    before = draw(one, item(1))[0]
    seen = Seen(stop_after=2)
    with pytest.raises(GenerationCancelled):
        draw(one, item(2), item(3), on_step=seen.on_step())
    assert len(seen.steps) == 2
    assert np.array_equal(draw(one, item(1))[0], before)


def test_who_waits_for_another_call_can_be_stopped_too(engine: Engines) -> None:
    one = engine("sd")
    begun, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        begun.set()
        go_on.wait(20.0)

    other = threading.Thread(target=draw, args=(one, item(1)), kwargs={"on_step": OnStep(hold)})
    other.start()
    try:
        assert begun.wait(20.0)
        with pytest.raises(GenerationCancelled):
            draw(one, item(2), on_step=OnStep(None, lambda: True))
    finally:
        go_on.set()
        other.join()


# Edits


@EVERY
def test_the_stronger_an_edit_the_less_is_left_of_its_start(engine: Engines, family: str) -> None:
    one = engine(family, buckets=(2,))
    starts = [item(1, images=(picture(colour),)) for colour in ("orange", "teal")]

    def left_of_it(strength: float) -> int:
        first, second = draw(one, *starts, steps=8, strength=strength)
        return int(np.abs(first.astype(int) - second).sum())

    assert left_of_it(0.25) > left_of_it(1.0)


@EVERY
def test_a_variation_is_an_edit_without_words_that_leaves_half_of_it(engine: Engines, family: str) -> None:
    one = engine(family, buckets=(2,))
    assert "variation" in one.capabilities().operations
    start = [item(seed, "", images=(picture(),)) for seed in (1, 2)]
    first, second = draw(one, *start, operation="variation", steps=8)
    assert most_different(first, second) > 4
    same = draw(one, *start, strength=0.5, steps=8)
    assert [most_different(*pair) for pair in zip((first, second), same, strict=True)] == [0, 0]
    assert np.array_equal(draw(one, *start, operation="variation", strength=0.9, steps=8)[0], first) is False


def test_pictures_of_any_size_and_kind_are_a_start_and_each_item_has_its_own(engine: Engines) -> None:
    one = engine("sd", buckets=(2,))
    from PIL import Image
    from tests.support.drawing import file_of

    large = picture(side=200)
    see_through = InputImage(file_of(Image.new("RGBA", (30, 50), (255, 0, 0, 0)), "WEBP"), "image/webp", 30, 50)
    white = InputImage(file_of(Image.new("RGB", (SIDE, SIDE), "white"), "JPEG"), "image/jpeg", SIDE, SIDE)
    first, second = draw(one, item(1, images=(large,)), item(1, images=(see_through,)), strength=0.5)
    assert first.shape == second.shape == (SIDE, SIDE, 3)
    assert most_different(first, second) > 8
    assert most_different(second, draw(one, item(1, images=(white,)), strength=0.5)[0]) <= 2


@EVERY
def test_a_masked_edit_paints_where_the_mask_is_transparent_and_nowhere_else(engine: Engines, family: str) -> None:
    one = engine(family, buckets=(2,))
    start = np.asarray(_decoded(picture()))
    masked = item(1, images=(picture(),), mask=mask_of_right_half())
    painted, company = draw(one, masked, item(2, images=(picture("teal"),), mask=mask_of_right_half()), strength=1.0)
    half = SIDE // 2
    assert np.array_equal(painted[:, :half], start[:, :half])
    assert (np.abs(painted[:, half:].astype(int) - start[:, half:]).max(axis=2) > 16).mean() > 0.5
    assert np.array_equal(painted, draw(one, masked, strength=1.0)[0])
    assert most_different(company, painted) > 16


def test_edits_with_and_without_a_mask_share_a_call(engine: Engines) -> None:
    one = engine("sd", buckets=(1,), max_batch_size=2)
    both = [item(1, images=(picture(),), mask=mask_of_right_half()), item(1, images=(picture(),))]
    together = draw(one, *both, strength=0.75)
    for first, each in zip(together, both, strict=True):
        assert np.array_equal(first, draw(one, each, strength=0.75)[0])
    assert most_different(*together) > 8


def test_a_model_made_for_inpainting_only_edits(engine: Engines) -> None:
    one = engine("inpaint", buckets=(1,))
    can = one.capabilities()
    assert can.operations == {"edit"}
    assert can.masks
    masked = draw(one, item(1, images=(picture(),), mask=mask_of_right_half()))[0]
    everywhere = draw(one, item(1, images=(picture(),)))[0]
    assert np.array_equal(masked[:, : SIDE // 2], np.asarray(_decoded(picture()))[:, : SIDE // 2])
    assert most_different(everywhere[:, : SIDE // 2], masked[:, : SIDE // 2]) > 8
    with pytest.raises(ValueError, match="the model does edit, not generation"):
        draw(one, item(1))


def test_a_model_that_takes_pictures_as_references_edits_one_at_a_time(model: Engines) -> None:
    """FLUX.1 Kontext: several pictures of a call would be references for all of its prompts."""
    import diffusers
    from tests.support.drawing import engine_of

    from img_serving.engines.diffusers.quiet import hushed

    folder = model("flux", in_channels=64).parent / "kontext"
    with hushed():
        parts = diffusers.FluxPipeline.from_pretrained(model("flux", in_channels=64), local_files_only=True).components
        diffusers.FluxKontextPipeline(**parts).save_pretrained(folder)
    one = engine_of(folder)
    assert "strength" not in (one.capabilities().honours_in_edits or ())
    assert not one.capabilities().masks
    assert "variation" not in one.capabilities().operations, "without words it would come out as it went in"
    seen = Seen()
    items = [item(1, images=(picture(),)), item(1, images=(picture("teal"),))]
    first, second = draw(one, *items, on_step=seen.on_step())
    assert seen.steps[-1] == (8, 8)
    assert first.shape == (SIDE, SIDE, 3)
    assert most_different(first, second) > 0
    assert np.array_equal(second, draw(one, items[1])[0])


# Memory


class _Short:
    """A pipeline in whose memory at most `room` pictures fit; `late`: it finds out at the end of its steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one: Any, room: int, error: BaseException) -> None:
        self.batches: list[int] = []
        kind = type(pipe_of(one))
        whole = kind.__call__

        def short(pipe: Any, **arguments: Any) -> Any:
            self.batches.append(len(arguments["prompt"]))
            if len(arguments["prompt"]) > room:
                raise error
            return whole(pipe, **arguments)

        monkeypatch.setattr(kind, "__call__", short)


def _out_of_memory(kind: str) -> BaseException:
    import torch

    kinds: dict[str, BaseException] = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["cuda", "cublas", "mps", "cpu", "python"])
def test_a_batch_that_does_not_fit_is_halved_and_the_limit_kept(
    model: Engines, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from tests.support.drawing import engine_of

    one = engine_of(model("sd"))
    expected = [draw(one, item(seed))[0] for seed in range(6)]
    short = _Short(monkeypatch, one, 2, _out_of_memory(kind))
    drawn = draw(one, *(item(seed) for seed in range(6)))
    assert short.batches == [8, 4, 2, 2, 2]
    for first, second in zip(drawn, expected, strict=True):
        assert most_different(first, second) <= 1
    short.batches.clear()
    draw(one, *(item(seed) for seed in range(4)))
    assert short.batches == [2, 2]
    short.batches.clear()
    draw(one, *(item(seed) for seed in range(4)), width=128)
    assert short.batches == [2, 2]
    assert one.statistics().limits == {SIDE * SIDE: 2}
    assert f"at once 2 of {SIDE * SIDE} pixels" in repr(one)


def test_a_picture_that_does_not_fit_says_what_would_help(engine: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine("sd", buckets=(1,))
    with monkeypatch.context() as patch:
        _Short(patch, one, 0, _out_of_memory("cuda"))
        with pytest.raises(MemoryError, match="64x64 does not fit into the memory of cpu: ask for a smaller one"):
            draw(one, item(1))
    draw(one, item(1))


def test_another_failure_is_no_lack_of_memory(engine: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine("sd")
    short = _Short(monkeypatch, one, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        draw(one, item(1), item(2))
    assert short.batches == [2]
    assert one.statistics().limits == {}


def test_memory_that_ends_while_a_vae_is_in_other_numbers_leaves_it_usable(model: Engines) -> None:
    """SDXL's VAE decodes in float32 where the rest is float16, and a failure there would leave it so."""
    import torch
    from tests.support.drawing import engine_of

    one = engine_of(model("sdxl"), dtype="float16")
    expected = draw(one, item(1), steps=1)[0]
    vae = pipe_of(one).vae
    whole, failed = vae.decode, []

    def short(latents: Any, *arguments: Any, **more: Any) -> Any:
        if len(latents) > 1:
            failed.append(vae.dtype)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(latents, *arguments, **more)

    vae.decode = short
    seen = Seen()
    drawn = draw(one, item(1), item(2), steps=1, on_step=seen.on_step())
    assert failed == [torch.float32]
    assert vae.dtype == torch.float16
    assert most_different(drawn[0], expected) <= 2
    assert seen.steps == [(1, 1), (2, 3), (3, 3)]


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 100}, "must be multiples of 8, not 100x64"),
        ({"width": 32}, "a side must be at least 64"),
        ({"width": 4096, "height": 4096}, "over its 4194304 pixels"),
        ({"steps": 0}, "steps must be from 1 to 200, not 0"),
        ({"steps": 201}, "steps must be from 1 to 200, not 201"),
        ({"guidance_scale": -1.0}, "guidance scale must be from 0 to 100"),
        ({"guidance_scale": float("nan")}, "guidance scale must be from 0 to 100"),
        ({"clip_skip": 0}, "clip skip must be from 1"),
        ({"sampler": "Eular"}, "no such sampler; the nearest it has: Euler"),
        ({"scheduler": "karas"}, "no such scheduler; the nearest it has: Karras"),
        ({"sampler": "DDIM", "scheduler": "karras"}, "Karras does not go with this sampler, but with: Euler"),
        ({"operation": "variation"}, "needs a picture"),
        ({"operation": "edit"}, "an edit needs a picture"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(engine: Engines, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        draw(engine("sd"), item(1), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.0}, "strength must be over 0 and at most 1"),
        ({"strength": 1.5}, "strength must be over 0 and at most 1"),
        ({"strength": 0.1}, "4 steps at strength 0.1 are less than one"),
        ({"steps": 3}, None),
    ],
    ids=str,
)
def test_an_edit_that_cannot_be_is_refused(engine: Engines, change: dict[str, Any], words: str | None) -> None:
    edit = item(1, images=(picture(),))
    if words is None:
        draw(engine("sd"), edit, **change)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        draw(engine("sd"), edit, **change)


def test_too_many_items_pictures_or_seeds_are_refused(engine: Engines) -> None:
    one = engine("sd")
    for items, words in (
        ((), "from 1 to 8 pictures, not 0"),
        ([item(seed) for seed in range(9)], "from 1 to 8 pictures, not 9"),
        ([item(-1)], "seed must be from 0"),
        ([item(SEED_LIMIT)], "seed must be from 0"),
        ([item(1, images=(picture(), picture()))], "starts from one picture, not 2"),
    ):
        with pytest.raises(ValueError, match=words):
            one.generate(call(*items), OnStep())


def test_samplers_that_cannot_start_from_a_picture_say_so(engine: Engines) -> None:
    one = engine("sd3")
    draw(one, item(1), sampler="UniPC")
    with pytest.raises(ValueError, match="UniPC cannot start from a picture; those that can: Euler, Heun"):
        draw(one, item(1, images=(picture(),)), sampler="UniPC")


def test_a_broken_picture_fails_alone(engine: Engines) -> None:
    broken = InputImage(b"\x89PNG\r\n\x1a\nno", "image/png", 9, 9)
    opaque = InputImage(picture().data, "image/png", SIDE, SIDE)
    good = item(1, images=(picture(),))
    results = engine("sd").generate(
        call(item(1, images=(broken,)), good, item(2, images=(picture(),), mask=broken), strength=0.5), OnStep()
    )
    assert isinstance(results[0], ItemFailure)
    assert results[0].refused
    assert "picture 1 cannot be edited: the picture could not be decoded" in results[0].message
    assert np.array_equal(results[1], draw(engine("sd"), good, strength=0.5)[0])
    assert isinstance(results[2], ItemFailure)
    nothing = item(1, images=(picture(),), mask=_black(opaque))
    (failed,) = engine("sd").generate(call(nothing, strength=0.5), OnStep())
    assert isinstance(failed, ItemFailure)
    assert "leaves nothing to paint" in failed.message


def test_numbers_that_overflow_are_an_error_and_no_black_picture(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine("sd")
    whole = pipe_of(one).vae.decode

    def overflowing(*arguments: Any, **more: Any) -> Any:
        (result,) = whole(*arguments, **more)
        return (result * float("nan"),)

    monkeypatch.setattr(pipe_of(one).vae, "decode", overflowing)
    with pytest.raises(ArithmeticError, match="use dtype bfloat16 or float32"):
        draw(one, item(1))


@EVERY
def test_pictures_made_into_bytes_on_the_device_are_those_of_the_pipelines_own_arrays(
    engine: Engines, family: str
) -> None:
    one = engine(family, buckets=(2,))
    items = [item(1), item(2, "a dog")]
    here = draw(one, *items)
    assert one._words.leaves_tensors
    one._words = replace(one._words, leaves_tensors=False)
    try:
        there = draw(one, *items)
    finally:
        one._words = replace(one._words, leaves_tensors=True)
    assert all(np.array_equal(first, second) for first, second in zip(here, there, strict=True))


def test_a_pipeline_with_a_safety_checker_hands_out_arrays_as_it_always_did(engine: Engines) -> None:
    pipe = pipe_of(engine("sd"))
    checked = copy.copy(pipe)
    checked.safety_checker = object()
    assert described(pipe, true_cfg_scale=1.0).leaves_tensors
    assert not described(checked, true_cfg_scale=1.0).leaves_tensors


def test_what_a_safety_checker_withholds_is_refused_and_not_black(
    engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine("sd")
    monkeypatch.setattr(pipe_of(one), "run_safety_checker", lambda image, *_: (image, [True, False]))
    withheld, shown = one.generate(call(item(1), item(2)), OnStep())
    assert withheld == ItemFailure("the model's safety checker withheld the picture", refused=True)
    assert isinstance(shown, np.ndarray)


# What is known of it


@pytest.mark.parametrize(
    ("family", "multiple", "size", "honours"),
    [
        ("sd", 8, (64, 64), {"negative_prompt", "guidance_scale"}),
        ("sdxl", 8, (64, 64), {"clip_skip", "negative_prompt", "guidance_scale"}),
        ("sd3", 16, (128, 128), {"clip_skip", "negative_prompt", "guidance_scale"}),
        ("flux", 16, (1024, 1024), {"guidance_scale"}),
    ],
)
def test_what_a_model_can_do_is_read_off_its_pipeline(
    engine: Engines, family: str, multiple: int, size: tuple[int, int], honours: set[str]
) -> None:
    can = engine(family).capabilities()
    always = {"seed", "size", "num_inference_steps", "sampler", "scheduler"}
    assert can.operations == {"generation", "edit", "variation"}
    # whether Stable Diffusion can leave out layers depends on the version of transformers
    optional = {"clip_skip"} if family == "sd" else set()
    assert can.honours - optional == always | honours
    assert (can.honours_in_edits or frozenset()) - optional == always | honours | {"strength"}
    assert (can.sizes.multiple, can.default_size, can.masks, can.max_images) == (multiple, size, True, 1)
    assert (can.batch, can.max_batch_size, can.max_concurrency) == ("items", 8, 1)
    assert can.progress
    assert can.previews
    assert can.cancels


def test_the_largest_side_of_a_model_with_places_is_known(engine: Engines) -> None:
    assert engine("sd3").capabilities().sizes.max_side == 24 * 16
    draw(engine("sd3"), item(1), width=384, steps=1)
    with pytest.raises(ValueError, match="at most 384"):
        draw(engine("sd3"), item(1), width=400, steps=1)


def test_guidance_that_is_not_an_input_of_the_network_is_not_honoured(model: Engines) -> None:
    from tests.support.drawing import engine_of

    assert "guidance_scale" not in engine_of(model("flux", guidance_embeds=False)).capabilities().honours


def test_what_it_does_can_be_looked_at(model: Engines) -> None:
    from tests.support.drawing import engine_of

    one = engine_of(model("sd"), buckets=(4,))
    before = one.statistics()
    assert (before.device, before.dtype, before.seconds_per_step, before.pictures) == ("cpu", "float32", None, 0)
    assert 0 < before.memory_used_bytes < before.memory_total_bytes
    draw(one, item(1), item(2), item(3))
    after = one.statistics()
    assert after.pictures == 3
    assert after.seconds_per_step is not None
    assert after.seconds_per_step > 0
    assert "on cpu (float32)" in repr(one)
    assert "s a step, at once whatever is asked" in repr(one)


def test_nothing_is_drawn_before_it_is_loaded() -> None:
    from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions

    with pytest.raises(RuntimeError, match="not loaded"):
        DiffusersEngine(DiffusersOptions(model="x")).generate(call(item(1)), OnStep())


def _decoded(image: InputImage) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(image.data)).convert("RGB")


def _black(image: InputImage) -> InputImage:
    from PIL import Image
    from tests.support.drawing import file_of

    return InputImage(file_of(Image.new("RGB", (image.width, image.height))), "image/png", image.width, image.height)
