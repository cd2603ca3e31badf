"""ComfyUI: the adapter, one prompt's way, workflows and their mapping, what the server tells."""

from img_serving.backends.comfyui.adapter import ComfyUIBackend

__all__ = ["ComfyUIBackend"]
