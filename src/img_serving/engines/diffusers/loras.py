"""LoRA by name: taken out of prompts, found in one folder, kept loaded on a pipeline while they are in use."""

from __future__ import annotations

import contextlib
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from img_serving.domain.vocabulary import Vocabulary, shown

_TAG: Final = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_BLANKS: Final = re.compile(r"[ \t]{2,}")
MAX_WEIGHT: Final = 10.0
MAX_TAGS: Final = 16


class LoraRefused(ValueError):
    """The prompt names a LoRA that cannot be had; the message says why. It holds nothing else of the prompt."""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One LoRA with its weight; `name` as the folder has it."""

    name: str
    weight: float


def take_out(prompt: str, folder: Path | None) -> tuple[str, tuple[LoraUse, ...]]:
    """The prompt without its `<lora:name>` and `<lora:name:0.8>`, and what they mean, in order. Named twice: the last counts.

    Raises:
        LoraRefused: there is no folder, nothing of that name in it (the nearest is named), or the weight is no number.
    """
    tags = _TAG.findall(prompt)
    if not tags:
        return prompt, ()
    if folder is None:
        raise LoraRefused("the prompt names a LoRA, and this worker has no folder of them (lora_dir)")
    if len(tags) > MAX_TAGS:
        raise LoraRefused(f"the prompt names {len(tags)} LoRAs, and {MAX_TAGS} may be")
    known = Vocabulary(sorted(files_of(folder)))
    uses: dict[str, LoraUse] = {}
    for tag in tags:
        name, _, weight = tag.strip().partition(":")
        found = known.find(name.strip())
        if found is None:
            raise LoraRefused(f"there is no LoRA {shown(name.strip())!r}; {known.hint(name)}")
        uses[found] = LoraUse(found, _weight(weight, found))
    return _BLANKS.sub(" ", _TAG.sub("", prompt)).strip(), tuple(uses.values())


def files_of(folder: Path) -> dict[str, Path]:
    """The LoRAs of a folder by name: its own `*.safetensors`, none of folders within. Empty if it cannot be read."""
    try:
        return {path.stem: path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file()}
    except OSError:
        return {}


def _weight(text: str, name: str) -> float:
    if not text.strip():
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MAX_WEIGHT:
        raise LoraRefused(f"the weight of LoRA {shown(name)!r} is a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


_FileKey = tuple[str, int, int]


class LoraShelf:
    """The adapters that are loaded on a pipeline's networks (which its edits share), the one used longest ago first."""

    def __init__(self, pipeline: Any, folder: Path | None, most: int) -> None:
        """`most` of them stay loaded while none is in use."""
        self._pipeline, self._folder, self._most = pipeline, folder, most
        self._adapters: OrderedDict[_FileKey, str] = OrderedDict()
        self._made = 0

    def __len__(self) -> int:
        return len(self._adapters)

    @contextlib.contextmanager
    def wearing(self, uses: Sequence[LoraUse]) -> Iterator[None]:
        """The pipeline draws with these, and after it as if there were none.

        Raises:
            LoraRefused: a file does not fit the model, or is gone.
        """
        if not uses:
            yield
            return
        keys = [self._load(use.name) for use in uses]
        adapters = [self._adapters[key] for key in keys]
        try:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(adapters, adapter_weights=[use.weight for use in uses])
            yield
        finally:
            self._pipeline.disable_lora()
            self._drop_what_is_over()

    def _load(self, name: str) -> _FileKey:
        """The adapter of a file as it is now: one that was written anew is another."""
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise LoraRefused("this model takes no LoRA")
        path = files_of(self._folder).get(name) if self._folder is not None else None
        try:
            if path is None:
                raise FileNotFoundError(name)
            state = path.stat()
        except OSError:
            raise LoraRefused(f"the file of LoRA {shown(name)!r} is gone") from None
        key = (name, state.st_mtime_ns, state.st_size)
        if key in self._adapters:
            self._adapters.move_to_end(key)
            return key
        self._made += 1
        adapter = f"lora_{self._made}"
        try:
            self._pipeline.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=adapter,
                use_safetensors=True,
                local_files_only=True,
            )
            fits = any(adapter in names for names in self._pipeline.get_list_adapters().values())
        except MemoryError:
            raise
        except Exception as error:
            if "out of memory" in str(error).lower():
                raise
            fits = False
        if not fits:
            with contextlib.suppress(Exception):  # what was half put on comes off; where nothing was, this fails
                self._pipeline.delete_adapters(adapter)
            self._bare()
            raise LoraRefused(f"LoRA {shown(name)!r} does not fit this model")
        self._adapters[key] = adapter
        return key

    def _bare(self) -> None:
        """No adapter acts."""
        with contextlib.suppress(Exception):  # without any adapter there is nothing to turn off
            self._pipeline.disable_lora()

    def _drop_what_is_over(self) -> None:
        while len(self._adapters) > self._most:
            _, adapter = self._adapters.popitem(last=False)
            self._pipeline.delete_adapters(adapter)
