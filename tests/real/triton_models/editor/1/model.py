"""Nothing is drawn here: what arrives is what comes back."""

import os
import sys

sys.path[:0] = os.environ["TRITON_MODEL_PATH"].split(":")  # the stub ignores PYTHONPATH

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [triton.InferenceResponse([triton.Tensor("image", given(one))]) for one in requests]


def given(request):
    mask = triton.get_input_tensor_by_name(request, "mask_image")
    return (mask if mask is not None else triton.get_input_tensor_by_name(request, "init_image")).as_numpy()
