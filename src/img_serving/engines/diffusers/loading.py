"""Weights from a folder, a single file or the hub, made into a pipeline: safetensors only, and no code that comes with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from img_serving.domain.errors import StartError
from img_serving.engines.diffusers.options import DiffusersOptions

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth")
_CONFIGURATION: Final = ("*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model")


def load_pipeline(options: DiffusersOptions, dtype: Any) -> Any:
    """The pipeline on the CPU, with weights of `dtype`.

    Raises:
        StartError: there is no such model, it is no pipeline that draws, or its weights may not be read; and what to do.
    """
    path = Path(options.model).expanduser()
    try:
        if path.is_dir():
            return _from_folder(str(path), options, dtype)
        if path.is_file():
            return _from_file(path, options, dtype)
        if path.suffix in {".safetensors", *_PICKLES} or not _HUB_ID.fullmatch(options.model):
            raise StartError(
                f"model: there is no file or folder {options.model}, and it is no hub id such as owner/name either"
            )
        return _from_hub(options, dtype)
    except (StartError, MemoryError):
        raise
    except Exception as error:
        raise StartError(_explained(error, options)) from error


def _from_folder(folder: str, options: DiffusersOptions, dtype: Any) -> Any:
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise StartError(f"model: {folder} has no model_index.json, so it is no folder of a diffusers pipeline")
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartError(f"model: {index} is not JSON ({error})") from None
    if not options.allow_pickle:
        _refuse_pickles(Path(folder), described)
    return _pretrained(folder, described, options, dtype)


def _from_hub(options: DiffusersOptions, dtype: Any) -> Any:
    import diffusers

    described = diffusers.DiffusionPipeline.load_config(
        options.model, revision=options.revision, local_files_only=options.offline
    )
    return _pretrained(options.model, described, options, dtype)


def _pretrained(model: str, described: dict[str, Any], options: DiffusersOptions, dtype: Any) -> Any:
    """By the class that `model_index.json` names: with the pipeline that draws from words, else with the one that edits."""
    import diffusers

    name = described.get("_class_name")
    if not isinstance(name, str):
        raise StartError("model: its pipeline is code of its own, which is never run")
    more: dict[str, Any] = {}
    if "safety_checker" in described and not options.safety_checker:
        more = {"safety_checker": None, "requires_safety_checker": False}
    auto = _auto_class(name)
    if auto is None:
        raise StartError(
            f"model: {name} is no pipeline that AutoPipelineForText2Image of diffusers {diffusers.__version__} knows"
        )
    return auto.from_pretrained(
        model,
        dtype=dtype,
        revision=options.revision,
        variant=options.variant,
        local_files_only=options.offline,
        use_safetensors=None if options.allow_pickle else True,
        **more,
    )


def _auto_class(name: str) -> Any:
    """The first of diffusers' automatic classes that has a pipeline for a model whose own is called `name`."""
    import diffusers
    from diffusers.pipelines import auto_pipeline

    for auto, mapping in (
        (diffusers.AutoPipelineForText2Image, auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING),
        (diffusers.AutoPipelineForImage2Image, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        (diffusers.AutoPipelineForInpainting, auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING),
    ):
        if auto_pipeline._get_task_class(mapping, name, throw_error_if_not_exist=False) is not None:
            return auto
    return None


def _from_file(path: Path, options: DiffusersOptions, dtype: Any) -> Any:
    """One file has weights only: all else comes from `config`, or from the hub by the kind of the weights."""
    import diffusers

    if path.suffix != ".safetensors" and not options.allow_pickle:
        raise StartError(f"model: {path.name} is no .safetensors file. {_PICKLE_ADVICE}")
    config = _configuration_of(path, options)
    described = json.loads((Path(config) / "model_index.json").read_text(encoding="utf-8"))
    found = getattr(diffusers, str(described.get("_class_name")), None)
    if found is None or not hasattr(found, "from_single_file"):
        raise StartError(f"model: a {described.get('_class_name')} cannot be read from a single file; use its folder")
    return found.from_single_file(str(path), config=config, dtype=dtype, local_files_only=options.offline)


def _configuration_of(path: Path, options: DiffusersOptions) -> str:
    """A folder with everything but weights."""
    from diffusers.loaders import single_file_utils
    from huggingface_hub import snapshot_download

    if options.config is not None and Path(options.config).expanduser().is_dir():
        folder = Path(options.config).expanduser()
        if not (folder / "model_index.json").is_file():
            raise StartError(f"config: {folder} has no model_index.json")
        return str(folder)
    name = options.config
    if name is None:
        weights = single_file_utils.load_single_file_checkpoint(str(path), local_files_only=True)
        name = single_file_utils.fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
        del weights
    try:
        return str(snapshot_download(name, allow_patterns=list(_CONFIGURATION), local_files_only=options.offline))
    except Exception as error:
        raise StartError(
            f"model: {path.name} has weights only; its configuration and tokenizers are those of {name}, which "
            f"{'is not in the cache' if options.offline else 'could not be fetched'} ({type(error).__name__}). "
            "Name a folder that has them (config)"
        ) from None


_PICKLE_ADVICE: Final = (
    "Weights that are Python pickles can run any code as they load, so they are read only with allow_pickle "
    "(--allow-pickle); better convert them to safetensors"
)


def _refuse_pickles(folder: Path, described: dict[str, Any]) -> None:
    """Say so before anything is read where a part of a pipeline has pickled weights only."""
    for part, kind in described.items():
        if part.startswith("_") or not isinstance(kind, list) or not all(isinstance(name, str) for name in kind):
            continue
        if not (folder / part).is_dir():
            continue
        names = [path.suffix for path in (folder / part).iterdir()]
        if ".safetensors" not in names and any(suffix in _PICKLES for suffix in names):
            raise StartError(f"model: {folder / part} has no .safetensors file, only pickled weights. {_PICKLE_ADVICE}")


def _explained(error: Exception, options: DiffusersOptions) -> str:
    """What a library's failure means, in one sentence, with what to do."""
    name = type(error).__name__
    text = str(error)
    if "safetensors" in text and not options.allow_pickle and ("find" in text or "use_safetensors" in text):
        return f"model: {options.model} has no safetensors weights. {_PICKLE_ADVICE}"
    if name in {"LocalEntryNotFoundError", "OfflineModeIsEnabled"} or (options.offline and isinstance(error, OSError)):
        return (
            f"model: {options.model} is not in the hub's cache, and the engine is offline. "
            "Start once without --offline, or give a folder"
        )
    if name == "GatedRepoError":
        return f"model: {options.model} is gated: accept its terms on its page and set HF_TOKEN"
    if name in {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return f"model: the hub has no {options.model} of that name and revision (a private one needs HF_TOKEN)"
    first = text.strip().splitlines()[0][:300] if text.strip() else "no reason given"
    return f"model: {options.model} could not be loaded: {name}: {first}"
