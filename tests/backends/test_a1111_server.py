"""The A1111 adapter against servers that behave as the real ones were seen to: Forge, and stable-diffusion.cpp's."""

from __future__ import annotations

import asyncio
import io
import unicodedata
from collections.abc import Callable
from typing import Any

import pybase64
import pytest
from PIL import Image
from tests.support.fake_a1111 import FakeA1111

from img_serving.backends.a1111 import A1111Backend
from img_serving.backends.scripted import picture
from img_serving.backends.stub_server import Answer
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Call, ImageRequest, InputImage, Item, Progress
from img_serving.media.masks import white_where_painted
from img_serving.media.payload import raw_bytes
from img_serving.transport.http import HttpTransport

QUICK = {"progress_interval_seconds": 0.01}


def call_of(
    *seeds: int,
    model: str | None = None,
    size: tuple[int, int] = (64, 48),
    timeout_seconds: float = 5.0,
    previews: bool = False,
    prompt: str = "a fox",
    **request: Any,
) -> Call:
    asked = ImageRequest(prompt, seed=seeds[0], n=len(seeds), **request)
    items = tuple(Item(prompt, asked.negative_prompt, seed) for seed in seeds)
    return Call(asked, model, *size, items, timeout_seconds, previews=previews)


def run(server: FakeA1111, act, **options: Any):
    async def main():
        async with server:
            options.setdefault("options", QUICK)
            backend = A1111Backend(HttpTransport(server.url), **options)
            try:
                return await act(backend)
            finally:
                await backend.close()

    return asyncio.run(main())


def draw(server: FakeA1111, call: Call, **options: Any):
    return run(server, lambda backend: backend.generate(call, lambda progress: None), **options)


async def until(happened: Callable[[], bool]) -> None:
    """Another task's doing, that nothing announces."""
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


# what it is


@pytest.mark.parametrize(
    ("flavour", "program", "multiple", "drawn"),
    [("forge", "Forge", 8, (96, 64)), ("sdcpp", "stable-diffusion.cpp", 64, (128, 128))],
)
def test_a_server_is_known_by_what_it_answers_and_its_sizes_with_it(flavour, program, multiple, drawn):
    server = FakeA1111(flavour=flavour)

    async def act(backend):
        report = await backend.check(5.0)
        (one,) = await backend.generate(call_of(7, size=(100, 70)), lambda progress: None)
        return report, backend.capabilities, (one.width, one.height)

    report, able, size = run(server, act)
    assert report.healthy
    assert program in report.found
    assert able.sizes.multiple == multiple
    assert size == drawn
    assert (server.drawn[0]["width"], server.drawn[0]["height"]) == drawn
    assert (able.progress, able.previews, able.cancels, able.switches_models) == (4 * (flavour == "forge",))


def test_the_rule_of_sizes_is_the_operators_to_say():
    server = FakeA1111()
    draw(server, call_of(7, size=(100, 70)), options={**QUICK, "size_multiple": 32, "size_rounding": "nearest"})
    assert (server.posts[0].json["width"], server.posts[0].json["height"]) == (96, 64)


def test_names_are_the_servers_own():
    async def act(backend):
        await backend.check(5.0)
        return backend.capabilities

    able = run(FakeA1111(), act)
    assert able.samplers.find("euler_a") == "Euler a"
    assert able.samplers.find("k_dpmpp_2m") == "DPM++ 2M"
    assert able.samplers.find("nonsense") is None
    assert able.schedulers.find("SGM Uniform") == "sgm_uniform"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"sampler": "euler a"}, {"sampler_name": "Euler a"}),
        ({"sampler": "k_euler_a", "scheduler": "Karras"}, {"sampler_name": "Euler a", "scheduler": "karras"}),
        ({"sampler": "DPM++ 2M Karras"}, {"sampler_name": "DPM++ 2M", "scheduler": "karras"}),
        ({"sampler": "dpm++_2m_sgm_uniform"}, {"sampler_name": "DPM++ 2M", "scheduler": "sgm_uniform"}),
        (
            {"sampler": "DPM++ 2M Karras", "scheduler": "automatic"},
            {"sampler_name": "DPM++ 2M", "scheduler": "automatic"},
        ),
        ({"scheduler": "sgm uniform"}, {"scheduler": "sgm_uniform"}),
        (
            {"strength": 0.4, "steps": 7, "guidance_scale": 2.5},
            {"denoising_strength": 0.4, "steps": 7, "cfg_scale": 2.5},
        ),
    ],
)
def test_what_is_asked_for_is_sent_in_the_servers_own_words(asked, sent):
    server = FakeA1111()
    (one,) = draw(server, call_of(7, **asked))
    assert sent.items() <= server.posts[0].json.items()
    assert "scheduler" in sent or "scheduler" not in server.posts[0].json
    assert one.ignored == ()


def test_what_the_server_did_instead_is_told():
    class Stubborn(FakeA1111):
        def _understood(self, asked):
            return {**super()._understood(asked), "sampler_name": "Euler", "scheduler": "sgm_uniform"}

    (one,) = draw(Stubborn(), call_of(7, sampler="DPM++ 2M", scheduler="karras"))
    assert one.ignored == ("sampler", "scheduler")


# models


def test_the_model_is_named_only_when_another_one_is_loaded_and_stays():
    server = FakeA1111()

    async def act(backend):
        for model in ("tiny-a", "tiny-b", "tiny-b", "sub/tiny-b.safetensors", "tiny-a"):
            await backend.generate(call_of(7, model=model), lambda progress: None)

    run(server, act)
    assert [one["model"] for one in server.drawn] == ["tiny-a", "tiny-b", "tiny-b", "tiny-b", "tiny-a"]
    assert server.loads == ["tiny-b", "tiny-a"]
    named = ["override_settings" in post.json for post in server.posts]
    assert named == [False, True, False, False, True]


def test_others_may_have_changed_the_model_of_a_shared_server():
    server = FakeA1111()

    async def act(backend):
        for _ in range(2):
            await backend.generate(call_of(7, model="tiny-a"), lambda progress: None)
            server.loaded = "tiny-b"  # somebody else's doing

    run(server, act, shared=True)
    assert [one["model"] for one in server.drawn] == ["tiny-a", "tiny-a"]


@pytest.mark.parametrize("model", ["tiny-b", "tiny-b.safetensors", "TINY-B", "sub/tiny-b.safetensors"])
def test_a_model_is_found_by_its_file_name_and_not_by_a_title_that_changes(model):
    server = FakeA1111()
    server.loads.append("tiny-b")  # its title has a hash now
    draw(server, call_of(7, model=model))
    assert server.drawn[0]["model"] == "tiny-b"
    assert server.posts[0].json["override_settings"] == {"sd_model_checkpoint": "tiny-b"}


def test_a_model_that_the_server_does_not_have_is_refused_instead_of_drawn_with_another():
    server = FakeA1111()
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, model="no-such"))
    assert (caught.value.error.status, caught.value.error.param) == (404, "model")
    assert "tiny-a" in caught.value.error.message
    assert not server.drawn


def test_a_model_that_came_since_the_last_look_is_found():
    server = FakeA1111()

    async def act(backend):
        await backend.check(5.0)
        server.checkpoints["new"] = "new.safetensors"
        await backend.generate(call_of(7, model="new"), lambda progress: None)

    run(server, act)
    assert server.drawn[0]["model"] == "new"


def test_a_server_that_cannot_switch_draws_with_the_model_it_has_whatever_it_is_called():
    server = FakeA1111(flavour="sdcpp")
    draw(server, call_of(7, model="my-model"))
    assert "override_settings" not in server.posts[0].json


def test_a_picture_by_another_model_is_a_failure():
    with pytest.raises(AttemptError, match="drew with 'tiny-b' instead of 'tiny-a'") as caught:
        draw(FakeA1111(liar=True), call_of(7, model="tiny-a"))
    assert caught.value.outcome is Outcome.FAILED


def test_clip_skip_is_for_one_call_and_never_becomes_the_servers_own():
    server = FakeA1111()

    async def act(backend):
        for clip_skip in (None, 2, None, 3):
            await backend.generate(call_of(7, model="tiny-b", clip_skip=clip_skip), lambda progress: None)
        backend._is_known = False  # it was down, or the gateway was: what is learned then must not be ours
        await backend.generate(call_of(7, model="tiny-a"), lambda progress: None)

    run(server, act)
    assert [one["clip_skip"] for one in server.drawn] == [1, 2, 1, 3, 1]
    assert [one["model"] for one in server.drawn] == ["tiny-b"] * 4 + ["tiny-a"]
    assert server.loads == ["tiny-b", "tiny-a"]


def test_clip_skip_and_another_model_at_once_cost_one_loading():
    server = FakeA1111()

    async def act(backend):
        for clip_skip in (2, 2, None):
            await backend.generate(call_of(7, model="tiny-b", clip_skip=clip_skip), lambda progress: None)

    run(server, act)
    assert [(one["model"], one["clip_skip"]) for one in server.drawn] == [("tiny-b", 2), ("tiny-b", 2), ("tiny-b", 1)]
    assert server.loads == ["tiny-b"]


def test_where_others_use_the_server_its_settings_are_put_back():
    server = FakeA1111()
    draw(server, call_of(7, model="tiny-b"), shared=True)
    assert server.posts[0].json["override_settings_restore_afterwards"] is True
    assert server.loads == ["tiny-b", "tiny-a"]


# pictures that come along

IMAGE = InputImage(picture("start", 1, 64, 48), "image/png", 64, 48)
MASK = InputImage(picture("mask", 2, 64, 48), "image/png", 64, 48)


def test_an_edit_sends_its_picture_and_a_mask_that_is_white_where_it_may_paint():
    server = FakeA1111()
    edit = call_of(7, operation="edit", images=(IMAGE,), mask=MASK, strength=0.6)
    (one,) = draw(server, edit)
    sent = server.posts[0]
    assert sent.path == "/sdapi/v1/img2img"
    assert [pybase64.b64decode(text) for text in sent.json["init_images"]] == [IMAGE.data]
    assert pybase64.b64decode(sent.json["mask"]) == white_where_painted(MASK.data)
    assert sent.json["denoising_strength"] == 0.6
    assert (one.width, one.height) == (64, 48)


@pytest.mark.parametrize(("strength", "sent"), [(None, 0.5), (0.3, 0.3)])
def test_a_variation_is_an_edit_without_words_that_leaves_half_of_it(strength, sent):
    server = FakeA1111()
    draw(server, call_of(7, prompt="", operation="variation", images=(IMAGE,), strength=strength))
    body = server.posts[0].json
    assert server.posts[0].path == "/sdapi/v1/img2img"
    assert [pybase64.b64decode(text) for text in body["init_images"]] == [IMAGE.data]
    assert (body["prompt"], body["denoising_strength"]) == ("", sent)
    # an edit has the server's own
    draw(other := FakeA1111(), call_of(7, operation="edit", images=(IMAGE,)))
    assert "denoising_strength" not in other.posts[0].json


BLACK = io.BytesIO()
Image.new("L", (64, 48), 0).save(BLACK, "PNG")


@pytest.mark.parametrize(
    ("data", "words"), [(b"\x89PNG\r\n\x1a\n", "could not be decoded"), (BLACK.getvalue(), "nothing to paint")]
)
def test_a_mask_that_is_no_picture_or_leaves_nothing_to_paint_is_the_requests_fault(data, words):
    """Of the second kind Forge repaints everything, and stable-diffusion.cpp nothing."""
    mask = InputImage(data, "image/png", 64, 48)
    with pytest.raises(BackendRefusal, match=words) as caught:
        draw(FakeA1111(), call_of(7, operation="edit", images=(IMAGE,), mask=mask))
    assert caught.value.error.param == "mask"


# progress


def test_progress_grows_and_shows_unfinished_pictures_where_they_are_wanted():
    server = FakeA1111(steps=6, step_seconds=0.02)
    told: list[Progress] = []
    run(server, lambda backend: backend.generate(call_of(7, previews=True), told.append))
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert {one.total for one in told} == {6}
    shown = [one.preview for one in told if one.preview is not None]
    assert shown
    assert shown[0].media_type == "image/png"
    assert len({one.data for one in shown}) == len(shown)


def test_what_is_shown_of_several_pictures_is_one_of_them():
    """Of a batch the server shows a contact sheet; so those that somebody watches are drawn one after the other."""
    server = FakeA1111(steps=5, step_seconds=0.03)
    told: list[Progress] = []
    drawn = run(server, lambda backend: backend.generate(call_of(7, 8, 9, previews=True), told.append))
    assert [one.seed for one in drawn] == [7, 8, 9]
    assert [(one["batch_size"], one["n_iter"]) for one in server.drawn] == [(1, 3)]
    shown = [one.preview for one in told if one.preview is not None]
    assert {one.index for one in shown} == {0, 1, 2}
    for one in shown:
        step = round((one.share or 0.0) * 5)
        # the fake never tells the last step
        assert one.data in {picture(f"step {at}", 7 + one.index, 8, 8) for at in (step, step + 1)}


def test_pictures_are_not_asked_for_where_nobody_wants_them():
    server = FakeA1111(steps=4, step_seconds=0.02)
    draw(server, call_of(7))
    pages = [one.path for one in server.exchanges if "/progress" in one.path]
    assert pages
    assert not [path for path in pages if "skip_current_image=true" not in path]


def test_progress_renews_the_time_out_and_silence_does_not():
    slow = FakeA1111(steps=10, step_seconds=0.03)
    (one,) = draw(slow, call_of(7, timeout_seconds=0.2))
    assert one.seed == 7

    async def act(backend):
        server.gate = asyncio.Event()  # never opened: the first step never ends
        await backend.generate(call_of(7, timeout_seconds=0.1), lambda progress: None)

    server = FakeA1111()
    with pytest.raises(AttemptError, match=r"within 0\.1 s") as caught:
        run(server, act)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert server.interrupts == 1  # nobody wants it any more


@pytest.mark.parametrize("options", [{"shared": True}, {"slots": 2}])
def test_nobody_knows_whose_progress_it_is_on_a_server_that_others_use(options):
    server = FakeA1111(steps=4, step_seconds=0.02)
    told: list[Progress] = []
    run(server, lambda backend: backend.generate(call_of(7, previews=True), told.append), **options)
    assert told == []


# cancelling


async def cancelled(backend, server: FakeA1111, call: Call) -> float:
    """Cancel a call whose first step is being drawn; returns when."""
    server.gate = asyncio.Event()
    drawing = asyncio.create_task(backend.generate(call, lambda progress: None))
    await until(lambda: bool(server.drawn))
    cancelled_at = asyncio.get_running_loop().time()
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    return cancelled_at


def test_a_cancelled_call_is_interrupted_and_the_next_one_is_not():
    server = FakeA1111()

    async def act(backend):
        at = await cancelled(backend, server, call_of(7))
        await until(lambda: server.interrupts == 1)
        assert (server.stopped_at or at) - at < 0.1
        assert (server.posts[0].disconnected_at or at) - at < 0.1
        server.gate = None
        return await backend.generate(call_of(8), lambda progress: None)

    (one,) = run(server, act)
    assert raw_bytes(one) == picture("a fox", 8, 64, 48)
    assert server.interrupts == 1


@pytest.mark.parametrize("options", [{"shared": True}, {"slots": 2}])
def test_what_may_be_somebody_elses_is_never_interrupted(options):
    server = FakeA1111()

    async def act(backend):
        await cancelled(backend, server, call_of(7))

    run(server, act, **options)
    assert server.interrupts == 0
    assert not [one for one in server.exchanges if one.path.endswith("/interrupt")]


def test_a_server_without_interrupt_and_progress_draws_all_the_same():
    server = FakeA1111(flavour="sdcpp")

    async def act(backend):
        await cancelled(backend, server, call_of(7))
        assert server.gate is not None
        server.gate.set()  # it draws on, and nobody can stop it
        return await backend.generate(call_of(8), lambda progress: None)

    (one,) = run(server, act)
    assert one.seed == 8
    assert not [one for one in server.exchanges if "/interrupt" in one.path]


def test_an_unfinished_picture_of_an_interrupted_server_is_no_picture():
    server = FakeA1111()

    async def act(backend):
        server.gate = asyncio.Event()
        drawing = asyncio.create_task(backend.generate(call_of(7), lambda progress: None))
        await until(lambda: bool(server.drawn))
        server.state["interrupted"] = True  # by somebody at the server's own page
        server.gate.set()
        await drawing

    with pytest.raises(AttemptError, match="unfinished") as caught:
        run(server, act)
    assert caught.value.outcome is Outcome.FAILED


# seeds and words


def test_picture_i_of_a_batch_has_the_seed_plus_i():
    results = draw(FakeA1111(), call_of(7, 8, 9))
    assert [one.seed for one in results] == [7, 8, 9]
    assert [raw_bytes(one) for one in results] == [picture("a fox", seed, 64, 48) for seed in (7, 8, 9)]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_arrive_as_they_were_written(form):
    words = unicodedata.normalize(form, "등대 위의 갈매기 🕊️")
    server = FakeA1111()
    draw(server, call_of(7, prompt=words, negative_prompt=words))
    assert (server.drawn[0]["prompt"], server.drawn[0]["negative_prompt"]) == (words, words)


# health


def test_health_is_asked_without_drawing_and_a_server_that_was_down_is_asked_anew():
    server = FakeA1111()

    async def act(backend):
        await backend.check(5.0)
        asked = len(server.exchanges)
        await backend.check(5.0)
        assert len(server.exchanges) == asked + 1
        await server.stop()
        assert not (await backend.check(1.0)).healthy
        server.flavour = "sdcpp"
        await server.start()
        return await backend.check(5.0)

    report = run(server, act)
    assert "stable-diffusion.cpp" in report.found
    assert not server.posts
    assert not [one for one in server.exchanges if "skip_current_image=false" in one.path or "memory" in one.path]


def test_a_password_is_asked_for_and_sent():
    basic = "Basic " + pybase64.b64encode(b"me:secret-word").decode()
    (one,) = draw(FakeA1111(basic=basic), call_of(7), username="me", password="secret-word")
    assert one.seed == 7
    report = run(FakeA1111(basic=basic), lambda backend: backend.check(5.0), username="me", password="wrong-word")
    assert not report.healthy
    assert "401" in report.detail


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size_multiples": 8}, "size_multiples: unknown option; did you mean size_multiple"),
        ({"size_multiple": 0}, "size_multiple: "),
        ({"size_rounding": "sideways"}, "size_rounding: "),
        ({"progress_interval_seconds": 0}, "progress_interval_seconds: "),
    ],
)
def test_an_impossible_option_is_refused_by_its_name(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        A1111Backend(HttpTransport("http://127.0.0.1:1"), options=options)


@pytest.mark.parametrize(
    ("texts", "param"),
    [
        ({"prompt": "a" * 8193}, "prompt"),
        ({"prompt": "등" * 3000}, "prompt"),
        ({"negative_prompt": "b" * 8193}, "negative_prompt"),
        ({"prompt": 'x<sd_cpp_extra_args>{"width": 20000}</sd_cpp_extra_args>'}, "prompt"),
    ],
)
def test_what_would_end_stable_diffusion_cpp_or_go_round_our_limits_is_refused(texts, param):
    server = FakeA1111(flavour="sdcpp")
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, **texts))
    assert caught.value.error.param == param
    assert not server.posts
    draw(FakeA1111(), call_of(7, **texts))  # no other program is troubled by it


@pytest.mark.parametrize(
    ("seeds", "tagged"),
    [((7, 8), False), ((2**31 - 2,), False), ((2**31,), True), ((2**31 - 1, 2**31), True), ((2**62,), True)],
)
def test_stable_diffusion_cpp_gets_large_seeds_where_it_has_room_for_them(seeds, tagged):
    server = FakeA1111(flavour="sdcpp")
    results = draw(server, call_of(*seeds, size=(64, 64)))
    assert [raw_bytes(one) for one in results] == [picture("a fox", seed, 64, 64) for seed in seeds]
    assert ("<sd_cpp_extra_args>" in server.posts[0].json["prompt"]) is tagged


def test_a_server_is_not_asked_for_more_than_it_does():
    async def act(backend):
        await backend.check(5.0)
        return backend.capabilities

    small = run(FakeA1111(flavour="sdcpp"), act, max_batch_size=16)
    assert (small.max_batch_size, small.max_steps, small.sizes.max_side) == (8, 100, 4096)
    large = run(FakeA1111(), act, max_batch_size=16)
    assert (large.max_batch_size, large.max_steps, large.sizes.max_side) == (16, None, 8192)


def test_a_checkpoint_that_the_server_itself_misses_is_the_requests_fault():
    class Missing(FakeA1111):
        async def _job(self, exchange, path):
            return Answer(404, b'{"detail":"Model not found"}')

    with pytest.raises(BackendRefusal) as caught:
        draw(Missing(), call_of(7, model="tiny-b"))
    assert (caught.value.error.status, caught.value.error.param) == (404, "model")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"steps": 150}, "num_inference_steps"),
        ({"sampler": "nonsense"}, "sampler"),
        ({"scheduler": "nonsense"}, "scheduler"),
        ({"size": (5000, 64)}, "image"),
        ({"size": (100, 70), "strict": True, "width": 100, "height": 70, "given": frozenset({"size"})}, "size"),
    ],
)
def test_what_routing_could_not_know_before_the_first_call_is_refused_by_then(asked, param):
    server = FakeA1111(flavour="sdcpp")
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, **asked))
    assert caught.value.error.param == param
    assert not server.posts


def test_a_question_that_failed_is_asked_again_at_the_next_check():
    server = FakeA1111()

    async def act(backend):
        server.follow({"statuses": {"/sdapi/v1/samplers": 500, "/sdapi/v1/progress": 503}})
        await backend.check(5.0)
        before = backend.capabilities
        server.follow({})
        await backend.check(5.0)
        return before, backend.capabilities

    before, after = run(server, act)
    assert (before.samplers, before.cancels) == (None, False)
    assert after.samplers is not None
    assert after.cancels


def test_a_server_without_a_list_of_schedules_honours_none():
    async def act(backend):
        await backend.check(5.0)
        return backend.capabilities.honours

    assert "scheduler" in run(FakeA1111(), act)
    assert "scheduler" not in run(FakeA1111(absent=frozenset({"/sdapi/v1/schedulers"})), act)


def test_a_seed_that_the_server_says_it_did_not_use_was_not_honoured():
    class Whimsical(FakeA1111):
        def _a1111(self, asked, step):
            return super()._a1111({**asked, "seed": 999}, step)

    (one,) = draw(Whimsical(), call_of(7))
    assert (one.seed, one.ignored) == (999, ("seed",))


def test_names_from_elsewhere_are_short_and_harmless_in_messages():
    server = FakeA1111()
    server.checkpoints = {"a" * 100_000: "a", "b\n\x1b[31m": "b"}
    server.loaded = "b\n\x1b[31m"
    with pytest.raises(BackendRefusal) as caught:
        draw(server, call_of(7, model="no-such"))
    message = caught.value.error.message
    assert len(message) < 500
    assert message.isprintable()
