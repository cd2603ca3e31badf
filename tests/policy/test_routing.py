"""Which backends could serve a request, and what a caller is told when none can."""

from __future__ import annotations

from typing import Any

import pytest

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.errors import Forbidden, InvalidRequest, NotFound, NoUsableBackend
from img_serving.domain.images import ImageRequest, InputImage
from img_serving.domain.jobs import Target
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.domain.vocabulary import Vocabulary
from img_serving.policy.routing import Candidate, RoutingOptions, ignored_by, plan

CAN = Capabilities(honours=frozenset({"size", "seed"}))
ONE = Candidate("one", ("sd15", "sdxl"), CAN)
TWO = Candidate("two", ("sdxl",), CAN, tier=1)
UNLISTED = Candidate("unlisted", (), CAN)
BUILTIN = Candidate("procedural", ("procedural",), CAN, serves_any=True)


def route(
    *backends: Candidate,
    tenant: Tenant = ANONYMOUS,
    aliases: dict[str, str] | None = None,
    default_backend: str | None = None,
    unknown_model: Any = "reject",
    **asked: Any,
) -> list[tuple[str, str | None]]:
    options = RoutingOptions(default_backend, aliases or {}, unknown_model)
    targets = plan(ImageRequest("cat", **asked), tenant, backends, options)
    return [(target.backend, target.model) for target in targets]


def test_all_backends_that_have_the_model_are_the_route_in_file_order():
    assert route(ONE, TWO, model="sdxl") == [("one", "sdxl"), ("two", "sdxl")]
    assert route(TWO, ONE, model="sdxl") == [("two", "sdxl"), ("one", "sdxl")]
    assert route(ONE, TWO, model="sd15") == [("one", "sd15")]


def test_a_target_carries_its_tier():
    targets = plan(ImageRequest("cat", model="sdxl"), ANONYMOUS, [ONE, TWO], RoutingOptions())
    assert targets == (Target("one", "sdxl", 0), Target("two", "sdxl", 1))


def test_without_a_model_the_first_enabled_backend_serves_with_its_first_model():
    disabled = Candidate("off", ("x",), CAN, enabled=False)
    assert route(disabled, ONE, TWO) == [("one", "sd15")]
    assert route(UNLISTED) == [("unlisted", None)]
    assert route(BUILTIN) == [("procedural", None)]


def test_without_a_model_the_default_backend_serves_while_it_is_enabled():
    assert route(ONE, TWO, default_backend="two") == [("two", "sdxl")]
    off = Candidate("two", ("sdxl",), CAN, enabled=False)
    assert route(ONE, off, default_backend="two") == [("one", "sd15")]


def test_an_alias_is_followed_once_and_loops_do_no_harm():
    assert route(ONE, model="dall-e-3", aliases={"dall-e-3": "sdxl"}) == [("one", "sdxl")]
    with pytest.raises(NotFound):
        route(ONE, model="a", aliases={"a": "b", "b": "a"})


def test_a_backends_name_may_stand_for_its_first_model_unless_somebody_has_that_model():
    assert route(ONE, TWO, model="two") == [("two", "sdxl")]
    assert route(ONE, TWO, Candidate("three", ("two",), CAN), model="two") == [("three", "two")]


def test_a_backend_that_does_not_list_its_models_may_have_any():
    assert route(ONE, UNLISTED, model="whatever") == [("unlisted", "whatever")]
    assert route(ONE, UNLISTED, model="sdxl") == [("one", "sdxl")]


def test_the_built_in_stands_in_for_every_model_but_an_exact_match_wins():
    assert route(BUILTIN, model="dall-e-3") == [("procedural", None)]
    assert route(BUILTIN, ONE, model="sdxl") == [("one", "sdxl")]


def test_what_stands_in_for_a_model_is_no_answer_to_a_strict_request():
    with pytest.raises(NotFound, match="the model 'dall-e-3' does not exist"):
        route(BUILTIN, model="dall-e-3", strict=True)
    assert route(BUILTIN, model="procedural", strict=True) == [("procedural", "procedural")]
    assert route(BUILTIN, model="mine", aliases={"mine": "procedural"}, strict=True) == [("procedural", "procedural")]
    assert route(BUILTIN, strict=True) == [("procedural", None)]


def test_a_model_that_nobody_has_is_not_blamed_on_what_stands_in_for_it():
    with pytest.raises(NotFound, match="the model 'nope' does not exist"):
        route(BUILTIN, model="nope", operation="edit")
    with pytest.raises(InvalidRequest, match="cannot do the operation 'edit'"):
        route(BUILTIN, model="procedural", operation="edit")


@pytest.mark.parametrize(
    ("sides", "reason"),
    [((64, 96), None), ((100, 70), "multiples of 8 pixels: 96x64 would do"), ((1024, 512), "up to 262144 pixels")],
)
def test_a_strict_edit_without_a_size_is_refused_where_it_would_not_keep_its_own(sides, reason):
    picture = InputImage(b"", "image/png", *sides)
    can = Capabilities(operations=frozenset({"edit"}), sizes=SizeRule(multiple=8))
    one = Candidate("one", (), can, default_pixels=512 * 512)
    if reason is None:
        assert route(one, operation="edit", images=(picture,), strict=True)
    else:
        with pytest.raises(InvalidRequest, match=reason) as refused:
            route(one, operation="edit", images=(picture,), strict=True)
        assert refused.value.param == "size"
    assert route(one, operation="edit", images=(picture,))


def test_an_unknown_model_is_refused_or_served_by_the_default_as_configured():
    with pytest.raises(NotFound) as caught:
        route(ONE, model="nope")
    assert (caught.value.code, caught.value.param, caught.value.status) == ("model_not_found", "model", 404)
    assert route(ONE, TWO, model="nope", unknown_model="default", default_backend="two") == [("two", "sdxl")]


def test_a_named_backend_is_the_only_one():
    assert route(ONE, TWO, backend="two") == [("two", "sdxl")]
    assert route(ONE, TWO, backend="one", model="sdxl") == [("one", "sdxl")]
    assert route(ONE, UNLISTED, backend="unlisted", model="any") == [("unlisted", "any")]
    assert route(BUILTIN, backend="procedural", model="any") == [("procedural", None)]
    assert route(ONE, backend="one", model="one") == [("one", "sd15")]


def test_a_named_backend_that_is_unknown_disabled_or_lacks_the_model_is_said_so():
    with pytest.raises(NotFound, match=r"known: one, two"):
        route(ONE, TWO, backend="three")
    with pytest.raises(NoUsableBackend, match="disabled"):
        route(Candidate("off", (), CAN, enabled=False), backend="off")
    with pytest.raises(NotFound, match="it has: sdxl"):
        route(TWO, backend="two", model="sd15")


def test_without_any_enabled_backend_nothing_is_usable():
    for backends in ((), (Candidate("off", ("sdxl",), CAN, enabled=False),)):
        with pytest.raises(NoUsableBackend):
            route(*backends, model="sdxl")


def test_a_tenants_work_goes_only_where_it_may():
    tenant = Tenant("ann", backends=frozenset({"two"}))
    assert route(ONE, TWO, tenant=tenant, model="sdxl") == [("two", "sdxl")]
    with pytest.raises(Forbidden, match="one") as caught:
        route(ONE, TWO, tenant=tenant, model="sd15")
    assert caught.value.code == "backend_not_allowed"


def test_a_tenant_gets_only_its_models_also_as_the_default():
    tenant = Tenant("ann", models=frozenset({"sdxl"}))
    assert route(ONE, TWO, tenant=tenant, model="sdxl") == [("one", "sdxl"), ("two", "sdxl")]
    with pytest.raises(Forbidden):
        route(ONE, TWO, tenant=tenant, model="sd15")
    with pytest.raises(Forbidden, match="default model"):
        route(ONE, TWO, tenant=tenant)


@pytest.mark.parametrize(
    ("can", "size", "reason"),
    [
        (Capabilities(sizes=SizeRule(max_pixels=100 * 100)), (101, 100), "over its 10000 pixels"),
        (Capabilities(sizes=SizeRule(min_side=64)), (32, 128), "at least 64"),
        (Capabilities(sizes=SizeRule(max_side=64)), (32, 128), "at most 64"),
    ],
)
def test_a_size_that_no_backend_can_draw_is_refused_with_each_ones_reason(can, size, reason):
    small = Candidate("small", ("m",), can)
    with pytest.raises(InvalidRequest, match=f"small: .*{reason}") as caught:
        route(small, model="m", width=size[0], height=size[1])
    assert caught.value.param == "size"
    assert route(small, Candidate("big", ("m",), CAN), model="m", width=size[0], height=size[1]) == [("big", "m")]
    assert route(small, model="m") == [("small", "m")]


def test_an_operation_that_a_backend_lacks_takes_it_out():
    editor = Candidate("editor", ("m",), Capabilities(operations=frozenset({"edit"})))
    drawer = Candidate("drawer", ("m",), CAN)
    assert route(editor, drawer, model="m", operation="edit") == [("editor", "m")]
    with pytest.raises(InvalidRequest, match="'variation'"):
        route(editor, drawer, model="m", operation="variation")


def test_a_variation_is_routed_as_an_edit_is_and_honours_what_it_says_itself():
    picture = InputImage(b"", "image/png", 64, 64)
    edits = Capabilities(
        operations=frozenset({"edit", "variation"}),
        honours_in_edits=frozenset({"seed", "strength"}),
        honours_in_variations=frozenset({"strength"}),
    )
    one = Candidate("one", ("m",), edits)
    asked: dict[str, Any] = {"model": "m", "operation": "variation", "images": (picture,)}
    assert route(one, Candidate("drawer", ("m",), CAN), **asked) == [("one", "m")]
    with pytest.raises(InvalidRequest, match="at most 1 input image") as caught:
        route(one, **{**asked, "images": (picture, picture)})
    assert (caught.value.status, caught.value.param) == (400, "image")
    with pytest.raises(InvalidRequest, match="cannot do the operation 'variation'") as caught:
        route(ONE, **{**asked, "model": "sdxl"})
    assert (caught.value.status, caught.value.param) == (400, "model")
    given = frozenset({"seed", "strength"})
    assert ignored_by(ImageRequest("", operation="variation", given=given), edits) == ("seed",)
    assert ignored_by(ImageRequest("x", operation="edit", given=given), edits) == ()


def test_what_cannot_be_honoured_is_named_and_refused_only_when_strict():
    asked: dict[str, Any] = {"model": "sdxl", "given": frozenset({"seed", "style", "quality"})}
    assert ignored_by(ImageRequest("cat", given=frozenset({"seed", "style", "quality"})), CAN) == ("quality", "style")
    assert route(ONE, **asked) == [("one", "sdxl")]
    with pytest.raises(InvalidRequest, match="quality, style") as caught:
        route(ONE, strict=True, **asked)
    assert caught.value.param == "quality"


SAMPLERS = Vocabulary(["Euler a", "DDIM"])
IMAGE = InputImage(b"png", "image/png", 64, 64)


@pytest.mark.parametrize(
    ("can", "asked", "reason", "param"),
    [
        (
            Capabilities(samplers=SAMPLERS, honours=frozenset({"sampler"})),
            {"sampler": "eular"},
            r"no sampler 'eular' \(the nearest it has: Euler a",
            "sampler",
        ),
        (
            Capabilities(schedulers=SAMPLERS, honours=frozenset({"scheduler"})),
            {"scheduler": "x"},
            "no scheduler 'x'",
            "scheduler",
        ),
        (Capabilities(max_steps=20), {"steps": 21}, "at most 20 steps", "num_inference_steps"),
        (Capabilities(), {"images": (IMAGE, IMAGE)}, "at most 1 input image[)]", "image"),
        (Capabilities(max_images=2), {"images": (IMAGE,) * 3}, "at most 2 input images", "image"),
        (Capabilities(), {"mask": IMAGE}, "cannot use a mask", "mask"),
        (
            Capabilities(sizes=SizeRule(choices=((256, 256),))),
            {"width": 64, "height": 64},
            "none of its sizes",
            "size",
        ),
    ],
)
def test_what_a_backend_would_silently_do_otherwise_is_refused_or_goes_elsewhere(can, asked, reason, param):
    unable = Candidate("unable", ("m",), can)
    with pytest.raises(InvalidRequest, match=f"unable: .*{reason}") as caught:
        route(unable, model="m", **asked)
    assert caught.value.param == param
    able = Candidate("able", ("m",), Capabilities(masks=True, max_images=16))
    assert route(unable, able, model="m", **asked) == [("able", "m")]


@pytest.mark.parametrize("spelling", ["Euler a", "euler_a", "EULER-A"])
def test_a_sampler_is_known_by_any_spelling(spelling):
    known = Candidate("one", ("m",), Capabilities(samplers=SAMPLERS, honours=frozenset({"sampler"})))
    assert route(known, model="m", sampler=spelling) == [("one", "m")]


def test_a_sampler_that_is_not_passed_on_is_ignored_and_not_refused():
    assert route(Candidate("one", ("m",), Capabilities(samplers=SAMPLERS)), model="m", sampler="x") == [("one", "m")]


def test_a_size_that_is_rounded_is_refused_only_when_strict():
    rounding = Candidate("one", ("m",), Capabilities(honours=CAN.honours, sizes=SizeRule(multiple=8)))
    asked: dict[str, Any] = {"model": "m", "width": 100, "height": 70, "given": frozenset({"size"})}
    assert route(rounding, **asked) == [("one", "m")]
    with pytest.raises(InvalidRequest, match="multiples of 8 pixels: 96x64 would do"):
        route(rounding, strict=True, **asked)
    assert route(rounding, strict=True, **{**asked, "width": 104, "height": 72}) == [("one", "m")]


def test_each_model_of_a_backend_is_judged_by_what_it_can():
    variants = {"flux": Capabilities(max_steps=4)}
    mixed = Candidate("one", ("sd", "flux"), Capabilities(variants=variants))
    assert route(mixed, model="sd", steps=20) == [("one", "sd")]
    with pytest.raises(InvalidRequest, match="at most 4 steps"):
        route(mixed, model="flux", steps=20)


def test_only_the_endpoints_that_can_are_the_route_where_not_all_can():
    small, large = Capabilities(max_steps=20), Capabilities(max_steps=100)
    mixed = Candidate("mixed", ("m",), small, endpoints=((1, small), (2, large), (3, large)))
    routes = [
        plan(ImageRequest("cat", model="m", steps=steps), ANONYMOUS, [mixed], RoutingOptions()) for steps in (9, 50)
    ]
    assert routes == [(Target("mixed", "m"),), (Target("mixed", "m", only=(2, 3)),)]
    with pytest.raises(InvalidRequest, match="at most 20 steps"):
        route(mixed, model="m", steps=101)
