"""img-serving: one OpenAI-compatible gateway in front of many image-generation backends."""

__version__ = "0.1.0"
