"""OpenAI's Images API in every dialect: the adapter, the presets, what is sent and what comes back."""

from img_serving.backends.openai.adapter import OpenAIBackend

__all__ = ["OpenAIBackend"]
