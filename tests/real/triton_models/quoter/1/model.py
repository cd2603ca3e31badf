"""A model that breaks on whatever it is asked."""

import os
import sys

sys.path[:0] = os.environ["TRITON_MODEL_PATH"].split(":")  # the stub ignores PYTHONPATH

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        prompt = triton.get_input_tensor_by_name(requests[0], "PROMPT").as_numpy()[0].decode()
        raise RuntimeError(f"cannot draw {prompt!r}")
