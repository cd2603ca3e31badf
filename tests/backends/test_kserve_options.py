"""`[backends.kserve]`: closed, every fault named by its option, a model's own table over the one of all."""

from __future__ import annotations

import pytest

from img_serving.backends.kserve.options import Constant, NamedTensor, read_kserve_options


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"outputs": "IMAGE"}, "outputs: unknown option; did you mean output?"),
        ({"inputs": {"sead": "SEED"}}, "inputs.sead: unknown option; did you mean seed?"),
        ({"inputs": {"seed": 5}}, "inputs.seed: must be the name of a tensor, a table"),
        ({"inputs": {"seed": {"type": "INT64"}}}, "inputs.seed.name: "),
        ({"inputs": {"seed": {"name": "S", "type": "INT65"}}}, "inputs.seed.type: "),
        ({"inputs": {"seed": {"name": "S", "shape": [-2]}}}, "inputs.seed.shape[0]: "),
        ({"inputs": {"prompt": ""}}, "inputs.prompt: nothing could be drawn without it"),
        ({"inputs": {"seed": "A", "steps": "A"}}, "inputs.steps: the tensor A carries the seed already"),
        ({"tensors": {"A": []}}, "tensors.A: a tensor has at least one value"),
        ({"tensors": {"A": {"type": "INT32"}}}, "tensors.A.value: "),
        ({"tensors": {"A": {"value": "x", "type": "INT32"}}}, "tensors.A: INT32 holds no text such as 'x'"),
        ({"tensors": {"A": {"value": 300, "type": "UINT8"}}}, "tensors.A: UINT8 cannot hold 300"),
        ({"tensors": {"A": ["x", 5]}}, "tensors.A: the values of a tensor are all texts, or all numbers"),
        ({"inputs": {"prompt": {"name": "P", "type": "FP32"}}}, "inputs.prompt.type: words travel as BYTES"),
        ({"tensors": {"A": {"value": 3.5, "type": "INT32"}}}, "tensors.A.value: INT32 has whole numbers only"),
        ({"parameters": {"a": 2**63}}, "parameters.a: 9223372036854775808 does not fit into 64 bits"),
        ({"parameters": {"a": 0.5}}, "parameters"),
        ({"layout": "nhwc"}, "layout: "),
        ({"value_range": "0-1"}, "value_range: "),
        ({"encoding": "hex"}, "encoding: "),
        ({"max_batch_size": 0}, "max_batch_size: "),
        ({"size_multiple": 0}, "size_multiple: "),
        ({"batch_dimension": "yes"}, "batch_dimension: "),
        ({"models": {"sdxl": 5}}, "models.sdxl: must be a table"),
        ({"models": {"sdxl": {"outptu": "A"}}}, "models.sdxl.outptu: unknown option; did you mean output?"),
        (
            {"models": {"sdxl": {"inputs": {"seeds": "A"}}}},
            "models.sdxl.inputs.seeds: unknown option; did you mean seed?",
        ),
        ({"models": {"sdxl": {"models": {}}}}, "models.sdxl.models: unknown option"),
    ],
)
def test_a_fault_is_named_by_its_option(table, says):
    with pytest.raises(ValueError, match=r".") as caught:
        read_kserve_options(table)
    assert str(caught.value).startswith(says)


def test_a_models_own_table_lies_over_that_of_all():
    read = read_kserve_options(
        {
            "version": "2",
            "output": "IMAGE",
            "inputs": {"seed": "SEED", "steps": "STEPS"},
            "tensors": {"A": 1, "B": 2},
            "parameters": {"x": 1, "y": True},
            "models": {
                "sdxl": {"output": "PNG", "inputs": {"steps": "N"}, "tensors": {"B": 3}, "parameters": {"y": False}}
            },
        }
    )
    own = read.of("sdxl")
    assert (own.version, own.output) == ("2", "PNG")
    assert own.inputs == {"seed": NamedTensor("SEED"), "steps": NamedTensor("N")}
    assert own.constants == {"A": Constant("A", (1,)), "B": Constant("B", (3,))}
    assert own.parameters == {"x": 1, "y": False}
    assert read.of("another").output == "IMAGE"


def test_an_empty_name_is_nowhere():
    assert read_kserve_options({"inputs": {"seed": ""}}).common.inputs == {"seed": None}


def test_a_tensor_may_be_a_table():
    read = read_kserve_options({"inputs": {"seed": {"name": "S", "type": "UINT32", "shape": [-1, 1]}}})
    assert read.common.inputs == {"seed": NamedTensor("S", "UINT32", (-1, 1))}
