"""What the tests of applications share: a gateway as docs/recipes sets it up, and a request of SillyTavern's page."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

KEY = "sk-recipes-key"
CONFIG = f"""
[auth]
api_keys = [{{ name = "app", key = "{KEY}", role = "user" }}]
[routing.aliases]
"gpt-image-1" = "painter"
"dall-e-3" = "painter"
[[backends]]
name = "painter"
protocol = "builtin"
models = ["painter", "second"]
default_size = "64x64"
"""

SILLYTAVERN_BODY: dict[str, Any] = {
    "url": "http://127.0.0.1:8080",
    "auth": f"silly:{KEY}",
    "prompt": "a fox",
    "negative_prompt": "a hen",
    "sampler_name": "Automatic",
    "scheduler": "Automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 64,
    "height": 96,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "None",
    "hr_scale": 1,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
"""Of its AUTOMATIC1111 source, with the fields that are for its own server."""


def picture(text: str) -> Image.Image:
    """A picture of base64, decoded to its last pixel."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
