"""Which tensor carries what: found by name, told by the operator, or taken for granted; and when it cannot be."""

from __future__ import annotations

import pytest

from img_serving.backends.kserve.options import ModelOptions, read_kserve_options
from img_serving.backends.kserve.signature import ModelInfo, TensorInfo, Unfit, choose_output, fixed_shape, sign


def tensors(*told: str) -> tuple[TensorInfo, ...]:
    """`"SEED INT64 -1,1"`, with a "!" at the end where the model needs it."""
    made = []
    for line in told:
        name, datatype, *sides = line.removesuffix("!").split()
        shape = tuple(int(side) for side in sides[0].split(",")) if sides else ()
        made.append(TensorInfo(name, datatype, shape, line.endswith("!")))
    return tuple(made)


def model(*inputs: str, outputs: tuple[str, ...] = ("IMAGE BYTES -1,1",), **more) -> ModelInfo:
    return ModelInfo(inputs=tensors(*inputs), outputs=tensors(*outputs), **more)


def options(**table) -> ModelOptions:
    return read_kserve_options(table).common


TXT2IMG = model("PROMPT BYTES -1,1!", "SEED INT64 -1,1", "STEPS INT32 -1,1", max_batch_size=4)


def names(info: ModelInfo | None, told: ModelOptions | None = None) -> dict[str, str]:
    return {name: one.name for name, one in sign(info, told or ModelOptions()).places.items()}


def test_without_metadata_the_usual_names_are_taken_for_granted():
    signature = sign(None, ModelOptions())
    assert {name: (one.name, one.datatype, one.shape) for name, one in signature.places.items()} == {
        "prompt": ("PROMPT", "BYTES", (-1, 1)),
        "negative_prompt": ("NEGATIVE_PROMPT", "BYTES", (-1, 1)),
        "seed": ("SEED", "INT64", (-1, 1)),
        "steps": ("STEPS", "INT32", (-1, 1)),
        "guidance_scale": ("GUIDANCE", "FP32", (-1, 1)),
        "width": ("WIDTH", "INT32", (-1, 1)),
        "height": ("HEIGHT", "INT32", (-1, 1)),
    }
    assert signature.output is None
    able = signature.capabilities
    assert able.honours == {"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size"}
    assert (able.batch, able.max_batch_size) == ("single", 1)
    assert able.operations == {"generation"}


@pytest.mark.parametrize(
    ("told", "parameter"),
    [
        ("text_prompt BYTES 1", "prompt"), ("Prompt BYTES -1", "prompt"), ("text_input BYTES 1", "prompt"),
        ("negative-prompt BYTES 1", "negative_prompt"), ("random_seed UINT32 1", "seed"),
        ("num_inference_steps INT32 1", "steps"), ("CFG_SCALE FP32 1", "guidance_scale"), ("img_W INT64 1", "width"),
        ("img_H INT64 1", "height"), ("SAMPLES INT32 1", "count"), ("SCHEDULER BYTES 1", "scheduler"),
        ("init_image BYTES 1", "image"), ("image UINT8 -1,-1,3", "image"), ("mask_image BYTES 1", "mask"),
        ("denoising_strength FP32 1", "strength"), ("clip_skip INT32 1", "clip_skip"),
    ],
)  # fmt: skip
def test_tensors_are_found_by_their_names(told, parameter):
    lines = [told] if parameter == "prompt" else ["prompt BYTES 1", told]
    assert names(model(*lines))[parameter] == told.split()[0]


@pytest.mark.parametrize("told", ["seed INT64 2", "image BYTES 3,3", "negative_prompt INT32 1", "width NONSENSE 1"])
def test_a_tensor_that_cannot_carry_it_is_not_taken_by_its_name(told):
    found = names(model("prompt BYTES 1", told))
    assert found.keys() == {"prompt"} | ({"image"} if told.startswith("image") else set())


def test_what_the_metadata_lacks_is_not_honoured():
    assert sign(TXT2IMG, ModelOptions()).capabilities.honours == {"seed", "num_inference_steps"}
    half = sign(model("prompt BYTES 1", "width INT32 1"), ModelOptions())
    assert "size" not in half.capabilities.honours


def test_the_operators_names_come_first():
    info = model("PROMPT BYTES 1", "SEED INT64 1", "NOISE INT32 1")
    found = sign(info, options(inputs={"seed": {"name": "NOISE", "type": "UINT32"}}))
    assert (found.places["seed"].name, found.places["seed"].datatype) == ("NOISE", "UINT32")
    assert names(info, options(inputs={"seed": ""})) == {"prompt": "PROMPT"}
    assert names(model("INPUT__0 BYTES 1"), options(inputs={"prompt": "INPUT__0"})) == {"prompt": "INPUT__0"}


def test_a_tensor_carries_one_thing():
    info = model("PROMPT BYTES 1", "SEED INT64 1")
    assert names(info, options(inputs={"steps": "SEED"})) == {"prompt": "PROMPT", "steps": "SEED"}


@pytest.mark.parametrize(
    ("info", "table", "says"),
    [
        (model("A BYTES 1"), {}, "called like a prompt (texts: A BYTES)"),
        (TXT2IMG, {"inputs": {"seed": "NOISE"}}, "has no input tensor NOISE for the seed (it has: PROMPT BYTES"),
        (TXT2IMG, {"tensors": {"LORA": "x"}}, "has no input tensor LORA"),
        (TXT2IMG, {"output": "PNG"}, "has no output tensor PNG (it has: IMAGE BYTES)"),
        (model("PROMPT BYTES 1", outputs=("A BYTES 1", "B BYTES 1")), {}, "say which one is, as `output`"),
        (model("PROMPT BYTES 1", outputs=("A INT64 1",)), {}, "called like a picture"),
        (model("PROMPT BYTES 1!", "LORA BYTES 1!"), {}, "needs the tensor LORA (BYTES [1])"),
        (model("PROMPT BYTES 1!", "SCHEDULER BYTES 1!"), {}, "needs the tensor SCHEDULER"),
        (model("PROMPT BYTES 1", "S INT64 2"), {"inputs": {"seed": "S"}}, "which is not one seed"),
        (model("PROMPT BYTES 1", "A INT32 3"), {"tensors": {"A": [1, 2]}}, "cannot be given 2 values of A"),
        (model("PROMPT BYTES 1", "W NONSENSE 1"), {"inputs": {"width": "W"}}, "a datatype that nobody knows"),
    ],
)
def test_a_model_that_cannot_be_drawn_with_says_why(info, table, says):
    with pytest.raises(Unfit) as caught:
        sign(info, options(**table))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("info", "is_other"),
    [
        (model("text_input BYTES 1", outputs=("text_output BYTES 1",)), True),
        (model("input_ids INT64 -1,77", outputs=("embeddings FP16 -1,77,768",)), True),
        (model("latents FP32 -1,4,64,64", outputs=("image FP32 -1,3,-1,-1",)), True),
        (model("PROMPT BYTES 1!", "LORA BYTES 1!"), False),
    ],
)
def test_models_that_are_no_painters_are_told_from_those_that_lack_something(info, is_other):
    with pytest.raises(Unfit) as caught:
        sign(info, ModelOptions(), is_meant=False)
    assert caught.value.is_other is is_other


@pytest.mark.parametrize("told", ["LORA BYTES 1!", "SCHEDULER BYTES -1,1!"])
def test_the_operators_values_fill_what_a_model_needs(told):
    info = model("PROMPT BYTES -1,1!", told, max_batch_size=2)
    assert sign(info, options(tensors={told.split()[0]: "x"})).fixed.keys() == {told.split()[0]}


@pytest.mark.parametrize("told", ["STEPS INT32 1!", "GUIDANCE FP32 1!", "NEGATIVE_PROMPT BYTES 1!", "SAMPLES INT32 1!"])
def test_a_model_may_need_what_requests_leave_out(told):
    sign(model("PROMPT BYTES 1!", told), ModelOptions())


# outputs


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (("SEED_USED INT64 1", "IMAGE BYTES 1", "LOG BYTES 1"), "IMAGE"),
        (("generated_image FP32 -1,-1,-1",), "generated_image"),
        (("images UINT8 -1,-1,-1,3", "latents FP16 -1,4,64,64"), "images"),
        (("OUTPUT_0 BYTES 1",), "OUTPUT_0"),
        (("OUTPUT_0 FP16 -1,3,512,512", "n INT32 1"), "OUTPUT_0"),
        (("image INT64 1",), None),
        (("A BYTES 1", "B BYTES 1"), None),
        ((), None),
    ],
)
def test_the_output_with_the_picture_is_found(outputs, found):
    one = choose_output(tensors(*outputs))
    assert (one and one.name) == found


# batches


def batch(info: ModelInfo | None, told: ModelOptions | None = None, **more) -> tuple[bool, int]:
    found = sign(info, told or ModelOptions(), **more)
    return found.has_rows, found.max_batch_size


def test_a_batch_dimension_of_the_servers_has_its_limit():
    assert batch(TXT2IMG) == (True, 4)
    assert batch(TXT2IMG, options(max_batch_size=2)) == (True, 2)
    assert batch(TXT2IMG, options(max_batch_size=9)) == (True, 4)
    assert batch(TXT2IMG, max_batch_size=3) == (True, 3)
    assert sign(TXT2IMG, ModelOptions()).capabilities.batch == "items"


def test_lists_of_any_length_are_batches_where_all_that_differs_is_in_lists():
    pixels = ("images UINT8 -1,-1,-1,3",)
    lists = model("prompt BYTES -1", "seed INT64 -1", "width INT32 1", outputs=pixels, max_batch_size=0)
    assert batch(lists) == (True, 4)
    one_seed = model("prompt BYTES -1", "seed INT64 1", outputs=pixels, max_batch_size=0)
    assert batch(one_seed) == (False, 1)
    one_picture = model("prompt BYTES -1", "seed INT64 -1", outputs=("image FP32 -1,-1,3",), max_batch_size=0)
    assert batch(one_picture) == (False, 1)
    single = model("prompt BYTES 1", outputs=("image BYTES 1",), max_batch_size=0)
    assert batch(single) == (False, 1)


def test_without_metadata_the_operator_says_how_many():
    assert batch(None) == (True, 1)
    assert batch(None, max_batch_size=6) == (True, 6)
    assert batch(None, options(max_batch_size=3), max_batch_size=6) == (True, 3)
    assert batch(None, options(batch_dimension=False, max_batch_size=3)) == (False, 1)


def test_what_the_server_refused_is_not_asked_again():
    assert batch(None, max_batch_size=6, learned_batch=2) == (True, 2)


def test_batch_dimension_overrules_the_metadata():
    assert batch(TXT2IMG, options(batch_dimension=False)) == (False, 1)
    assert batch(model("prompt BYTES -1", "seed INT64 1"), options(batch_dimension=True)) == (True, 4)


def test_a_model_that_streams_draws_one_picture_a_call():
    found = sign(model("PROMPT BYTES -1,1", max_batch_size=4, is_decoupled=True), ModelOptions())
    assert (found.is_stream, found.max_batch_size) == (True, 1)
    able = found.capabilities
    assert (able.batch, able.progress, able.previews, able.cancels) == ("single", True, True, True)


def test_the_output_with_the_step_is_found_or_told():
    info = model("PROMPT BYTES 1", outputs=("IMAGE BYTES 1", "STEP INT32 1", "AT INT32 1"), is_decoupled=True)
    assert sign(info, ModelOptions()).step_output == "STEP"
    assert sign(info, options(step_output="AT")).step_output == "AT"


# edits


def test_a_tensor_for_a_picture_makes_edits():
    able = sign(
        model("prompt BYTES 1", "image BYTES 1", "mask BYTES 1", "strength FP32 1"), ModelOptions()
    ).capabilities
    assert able.operations == {"generation", "edit", "variation"}
    assert able.masks
    assert "strength" in able.honours
    needs = sign(model("prompt BYTES 1", "image BYTES 1!"), ModelOptions()).capabilities
    assert needs.operations == {"edit", "variation"}
    assert not needs.masks


def test_size_multiple_is_a_rule_of_sizes():
    rule = sign(TXT2IMG, options(size_multiple=8)).capabilities.sizes
    assert rule.fit(100, 70) == (96, 64)


# the operator's values


@pytest.mark.parametrize(
    ("declared", "value", "rows", "shape", "repeats"),
    [
        ("-1,1", 5, 3, (3, 1), 3),
        ("1", 5, 3, (1,), 1),
        ("-1,3", [1, 2, 3], 2, (2, 3), 2),
        ("-1,-1", [1, 2, 3], 2, (2, 3), 2),
        ("-1,-1,-1", [1, 2, 3], 1, (1, 3, 1), 1),
        ("3", [1, 2, 3], 2, (3,), 1),
        ("-1", {"value": [1, 2, 3], "shape": [3]}, 2, (3,), 1),
        ("-1,1", {"value": 5, "shape": [-1, 1, 1]}, 2, (2, 1, 1), 2),
    ],
)
def test_the_operators_values_have_the_shape_of_their_tensor(declared, value, rows, shape, repeats):
    info = model("PROMPT BYTES -1,1", f"A INT32 {declared}", max_batch_size=4)
    signature = sign(info, options(tensors={"A": value}))
    assert fixed_shape(signature, signature.fixed["A"], rows) == (shape, repeats)
    assert signature.fixed["A"].tensor.datatype == "INT32"


def test_without_metadata_values_say_what_they_are():
    signature = sign(None, options(tensors={"A": [1, 2], "B": 0.5, "C": "x", "D": True, "E": 2**40}))
    assert {name: one.tensor.datatype for name, one in signature.fixed.items()} == {
        "A": "INT32", "B": "FP32", "C": "BYTES", "D": "BOOL", "E": "INT64",
    }  # fmt: skip
    assert fixed_shape(signature, signature.fixed["A"], 3) == ((3, 2), 3)
