"""The engine: one model of diffusers', its calls checked, taken apart, drawn and put together again."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import StartError
from img_serving.domain.images import Call, ItemFailure
from img_serving.engines.diffusers import asked, family, loading
from img_serving.engines.diffusers import device as devices
from img_serving.engines.diffusers.asked import Work
from img_serving.engines.diffusers.batches import Limits, Part, plan
from img_serving.engines.diffusers.loras import LoraRefused, LoraShelf
from img_serving.engines.diffusers.options import DiffusersOptions
from img_serving.engines.diffusers.pictures import drawn, kept_outside
from img_serving.engines.diffusers.previews import Looks, Previewer, fitted
from img_serving.engines.diffusers.quiet import hushed, import_libraries
from img_serving.engines.diffusers.samplers import Samplers
from img_serving.engines.diffusers.steps import Steps
from img_serving.engines.diffusers.watch import Watch
from img_serving.engines.engine import GenerationCancelled, OnStep

if TYPE_CHECKING:
    import numpy.typing as npt

_LOG: Final = logging.getLogger(__name__)
_TURN_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class DiffusersStatistics:
    """The engine at a moment.

    Attributes:
        device, dtype: where and in which numbers it draws.
        memory_used_bytes, memory_total_bytes: of the device; of a CPU, what this process uses. 0 where nobody knows.
        limits: what was learned from running out of memory: pixels of a picture to pictures at once.
        seconds_per_step: of the last part that was drawn whole; None before it.
        pictures: drawn since it was loaded, without fillers.
        loras: adapters that are loaded.
    """

    device: str
    dtype: str
    memory_used_bytes: int
    memory_total_bytes: int
    limits: Mapping[int, int]
    seconds_per_step: float | None
    pictures: int
    loras: int


@dataclass(frozen=True, slots=True)
class _Drawing:
    """One call that is drawn: what all its parts share, and where their pictures go."""

    batch: Call
    scheduler: Callable[[], Any]
    steps: Steps
    previewer: Previewer | None
    found: dict[int, npt.NDArray[Any] | ItemFailure]


class DiffusersEngine:
    """Draws with a diffusers pipeline; edits with those that share its weights. One call at a time: others wait."""

    def __init__(self, options: DiffusersOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is imported or read before `load`. `clock` tells seconds, for previews and speed."""
        self.options = options
        self._clock = clock
        self._turn = threading.Lock()
        self._limits = Limits()
        self._device = ""
        self._dtype: Any = None
        self._words: family.Pipeline | None = None
        self._image: family.Pipeline | None = None
        self._inpaint: family.Pipeline | None = None
        self._samplers: Samplers | None = None
        self._shelf: LoraShelf | None = None
        self._looks = Looks()
        self._capabilities = Capabilities(batch="items", max_batch_size=options.most, max_concurrency=1)
        self._seconds_per_step: float | None = None
        self._pictures = 0
        self._at_hand: Any = None

    def __repr__(self) -> str:
        if not self._device:
            return f"<DiffusersEngine {self.options.model}: not loaded>"
        speed = "nothing drawn yet" if self._seconds_per_step is None else f"{self._seconds_per_step:.3g} s a step"
        limits = ", ".join(f"{most} of {pixels} pixels" for pixels, most in self._limits.known().items())
        return (
            f"<DiffusersEngine {self.options.model} on {self._device} ({self._dtype_name}): {speed}, "
            f"at once {limits or 'whatever is asked'}>"
        )

    def load(self) -> Iterator[tuple[float, str]]:
        """Import, read the weights, put them on the device and learn to show previews.

        Raises:
            StartError: something is missing; the message says what, and what to do.
            MemoryError: the weights do not fit on the device.
        """
        options = self.options
        yield 0.0, "import torch and diffusers"
        import_libraries(offline=options.offline)
        self._device = devices.choose_device(options.device)
        self._dtype = devices.choose_dtype(options.dtype, self._device)
        if options.lora_dir is not None and not options.lora_dir.is_dir():
            raise StartError(f"lora_dir: there is no folder {options.lora_dir}")
        if options.cpu_offload != "none" and self._device == "cpu":
            raise StartError("cpu_offload: there is no GPU to take work off; leave it out")
        yield 0.1, f"read the weights of {options.model}"
        with hushed():
            pipe = self.read(self._dtype)
            yield 0.7, f"put them on {self._device}"
            try:
                self._put_on_device(pipe)
            except Exception as error:
                if not devices.is_out_of_memory(error):
                    raise
                raise MemoryError(
                    f"the weights do not fit into the memory of {self._device}: "
                    "try cpu_offload, dtype bfloat16 or float16, or a smaller model"
                ) from None
            yield 0.9, "learn how its unfinished pictures look"
            self._looks = fitted(pipe)
            self._offload(pipe)
            self._describe(pipe)

    def read(self, dtype: Any) -> Any:
        """The pipeline, its weights of this torch dtype, on any device: for whoever has one that is in no folder.

        Raises:
            StartError: there is no such model, or it may not be read.
        """
        return loading.load_pipeline(self.options, dtype)

    def capabilities(self) -> Capabilities:
        """What the model can do. Before `load` only that batches may be of anything."""
        return self._capabilities

    def statistics(self) -> DiffusersStatistics:
        """The engine now; may be asked while it draws."""
        used, total = devices.memory_bytes(self._device) if self._device else (0, 0)
        return DiffusersStatistics(
            device=self._device,
            dtype=self._dtype_name,
            memory_used_bytes=used,
            memory_total_bytes=total,
            limits=self._limits.known(),
            seconds_per_step=self._seconds_per_step,
            pictures=self._pictures,
            loras=0 if self._shelf is None else len(self._shelf),
        )

    def generate(self, batch: Call, on_step: OnStep) -> list[npt.NDArray[Any] | ItemFailure]:
        """Draw `batch.items`: uint8 arrays [height, width, 3], in order.

        An item fails alone where its prompt names a LoRA that cannot be had, its picture cannot be read, or the model's
        safety checker withholds what was drawn.

        Raises:
            GenerationCancelled: at a step, or while another call draws.
            ValueError: size, steps, guidance, strength, sampler or the number of pictures cannot be had.
            MemoryError: a single picture does not fit into the memory.
            ArithmeticError: the model's numbers overflowed.
            RuntimeError: it was not loaded.
        """
        while not self._turn.acquire(timeout=_TURN_SECONDS):
            on_step.check()
        try:
            with hushed():
                return self._draw(batch, Steps(on_step))
        finally:
            self._turn.release()

    # Loading

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.") if self._dtype is not None else ""

    def _put_on_device(self, pipe: Any) -> None:
        """All of it, or, with offloading, only the VAE for now."""
        options = self.options
        vae = getattr(pipe, "vae", None)
        if options.cpu_offload == "none":
            pipe.to(self._device)
        elif vae is not None:
            vae.to(self._device)
        for wanted, switch in ((options.vae_slicing, "enable_slicing"), (options.vae_tiling, "enable_tiling")):
            if wanted and hasattr(vae, switch):
                # a VAE may lack what its class names
                with contextlib.suppress(NotImplementedError):
                    getattr(vae, switch)()

    def _offload(self, pipe: Any) -> None:
        """Whichever pipeline draws next has the hooks that move its networks: those of two get into each other's way."""
        if self._at_hand is pipe or self.options.cpu_offload == "none":
            return
        if self.options.cpu_offload == "model":
            pipe.enable_model_cpu_offload(device=self._device)
        else:
            pipe.enable_sequential_cpu_offload(device=self._device)
        self._at_hand = pipe

    def _describe(self, pipe: Any) -> None:
        """Find out what it can do, and make the pipelines that edit with the same weights."""
        import diffusers
        from diffusers.pipelines import auto_pipeline

        options = self.options
        if family.draws_from_words(pipe):
            if type(pipe) in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
                self._words = self._described(pipe)
            self._image = self._edits_like(diffusers.AutoPipelineForImage2Image, pipe)
        self._inpaint = self._edits_like(diffusers.AutoPipelineForInpainting, pipe)
        if self._inpaint is not None and not self._inpaint.has_strength and "mask_image" not in self._inpaint.takes:
            self._inpaint = None
        for one in (self._words, self._image, self._inpaint):
            if one is not None:
                one.pipe.set_progress_bar_config(disable=True)
        self._samplers = Samplers(pipe.scheduler, takes_sigmas=family.computes_sigmas(pipe))
        self._shelf = LoraShelf(pipe, options.lora_dir, options.max_loras)
        self._capabilities = self._known(pipe)

    def _described(self, pipe: Any) -> family.Pipeline:
        return family.described(pipe, true_cfg_scale=self.options.true_cfg_scale)

    def _edits_like(self, auto: Any, pipe: Any) -> family.Pipeline | None:
        """The pipeline of an automatic class that shares this one's weights; None if its family has none."""
        try:
            made = self._described(auto.from_pipe(pipe))
        except Exception as error:
            _LOG.debug("no %s for %s: %s", auto.__name__, type(pipe).__name__, type(error).__name__)
            return None
        return made if "image" in made.takes else None

    def _edits(self) -> list[family.Pipeline]:
        return [one for one in (self._image, self._inpaint) if one is not None]

    def _known(self, pipe: Any) -> Capabilities:
        words, samplers = self._words, self._samplers
        edits = self._edits()
        operations = {"generation"} if words is not None else set()
        if edits:
            operations.add("edit")
        if self._image is not None and self._image.has_strength:
            operations.add("variation")  # a picture that is only a reference comes out as it went in, without words
        if not operations:
            raise StartError(f"model: {type(pipe).__name__} neither draws from words nor edits")
        choosable = {"sampler", "scheduler"} if samplers is not None and samplers.samplers.names else set()
        first = words or edits[0]
        rule = family.size_rule(pipe, self.options.max_pixels)
        in_edits = frozenset.intersection(*(one.honours() for one in edits)) | choosable if edits else None
        return Capabilities(
            operations=frozenset(operations),
            batch="items",
            max_batch_size=self.options.most,
            max_concurrency=1,
            honours=(words.honours() - {"strength"} if words is not None else frozenset()) | choosable,
            honours_in_edits=in_edits,
            sizes=rule,
            default_size=family.default_size(first, rule),
            max_steps=self.options.max_steps,
            max_images=1,
            masks=self._inpaint is not None,
            samplers=samplers.samplers if samplers is not None and choosable else None,
            schedulers=samplers.schedules if samplers is not None and choosable else None,
            formats=("png",),
            progress=bool({"callback_on_step_end", "callback"} & first.takes),
            previews="callback_on_step_end" in first.takes,
            cancels=bool({"callback_on_step_end", "callback"} & first.takes),
        )

    # Drawing

    def _draw(self, batch: Call, steps: Steps) -> list[npt.NDArray[Any] | ItemFailure]:
        """Check, group by what a whole drawing shares, draw each group, and put the pictures in order."""
        if self._samplers is None or self._shelf is None:
            raise RuntimeError("the engine was not loaded: call load() first")
        request = batch.request
        asked.check(batch, self._capabilities, self.options, self._edits())
        choice = self._samplers.choose(request.sampler, request.scheduler, edits=request.operation != "generation")
        found: dict[int, npt.NDArray[Any] | ItemFailure] = {}
        groups: dict[tuple[Any, ...], list[Work]] = {}
        for index, item in enumerate(batch.items):
            try:
                work = asked.work_of(index, item, batch, self.options)
            except LoraRefused as error:
                found[index] = ItemFailure(str(error), refused=True)
                continue
            except ValueError as error:
                found[index] = ItemFailure(f"picture {index + 1} cannot be edited: {error}", refused=True)
                continue
            pipeline = self._pipeline_for(work)
            key = (pipeline is self._inpaint, work.loras, pipeline.zeros and not work.negative)
            groups.setdefault(key, []).append(work)
        previewer = Previewer(self._looks, self._clock) if batch.previews else None
        drawing = _Drawing(batch, partial(self._samplers.make, choice), steps, previewer, found)
        waiting = list(groups.values())
        while waiting:
            group = waiting.pop(0)
            try:
                with self._shelf.wearing(group[0].loras):
                    self._draw_group(drawing, group, waiting)
            except LoraRefused as error:
                found.update((work.index, ItemFailure(str(error), refused=True)) for work in group)
        return [found[index] for index in range(len(batch.items))]

    def _draw_group(self, drawing: _Drawing, group: Sequence[Work], waiting: Sequence[Sequence[Work]]) -> None:
        """Draw one group in as many parts as there has to be; where the memory does not do, in smaller ones."""
        batch = drawing.batch
        pixels = batch.width * batch.height
        left = list(group)
        while left:
            parts = self._plan(len(left), pixels, self._pipeline_for(left[0]))
            later = sum(len(self._plan(len(one), pixels, self._pipeline_for(one[0]))) for one in waiting)
            drawing.steps.begin(len(parts) + later)
            part = parts[0]
            if self._draw_part(drawing, left[: part.take], part):
                del left[: part.take]
                continue
            devices.free(self._device)
            if part.size == 1:
                raise MemoryError(
                    f"one picture of {batch.width}x{batch.height} does not fit into the memory of {self._device}: "
                    "ask for a smaller one, or start the engine with vae_tiling or cpu_offload"
                )
            most = self._limits.learn(pixels, part.size)
            _LOG.warning(
                "%d pictures of %dx%d did not fit into the memory: from now on %d at once",
                part.size,
                batch.width,
                batch.height,
                most,
            )

    def _plan(self, count: int, pixels: int, pipeline: family.Pipeline) -> list[Part]:
        if pipeline is not self._words and not pipeline.has_strength:
            return [Part(1, 1)] * count  # its pictures are references, for all prompts of a drawing together
        return plan(count, self.options.sizes, self._limits.most(pixels, self.options.most))

    def _draw_part(self, drawing: _Drawing, works: Sequence[Work], part: Part) -> bool:
        """Draw one part into `found`; False: the memory did not do, and nothing was drawn."""
        pipeline = self._pipeline_for(works[0])
        pipe = pipeline.pipe
        self._offload(pipe)
        own = pipe.scheduler
        filled = [*works, *[works[-1]] * (part.size - part.take)]
        watch = Watch(
            pipe,
            drawing.batch,
            [work.index for work in works],
            steps=drawing.steps,
            previewer=drawing.previewer,
            pace=devices.Pace(self._device),
            clock=self._clock,
        )
        is_whole = False
        try:
            pipe.scheduler = drawing.scheduler()
            drawing.steps.check()
            arguments = asked.arguments(drawing.batch, filled, pipeline, self.options)
            result = pipe(**arguments, **watch.arguments(pipeline.takes))
            drawing.steps.check()
            pictures = drawn(result.images[: part.take])
            withheld = getattr(result, "nsfw_content_detected", None) or [False] * part.size
            is_whole = True
        except GenerationCancelled:
            raise
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            return False
        finally:
            pipe.scheduler = own
            if not is_whole:
                self._mend(pipe)
        self._seconds_per_step = watch.seconds_per_step() or self._seconds_per_step
        self._pictures += part.take
        found = drawing.found
        for work, picture, is_withheld in zip(works, pictures, withheld, strict=False):
            if is_withheld:
                found[work.index] = ItemFailure("the model's safety checker withheld the picture", refused=True)
            elif work.painted is not None and work.start is not None:
                found[work.index] = kept_outside(picture, work.start, work.painted)
            else:
                found[work.index] = picture
        return True

    def _mend(self, pipe: Any) -> None:
        """After a drawing that did not come to its end: networks back in their numbers and places, memory given back."""
        vae = getattr(pipe, "vae", None)
        # SDXL's is in float32 while it decodes, if the rest is float16
        if vae is not None and vae.dtype != self._dtype:
            vae.to(dtype=self._dtype)
        if self.options.cpu_offload != "none":
            pipe.maybe_free_model_hooks()
        devices.free(self._device)

    def _pipeline_for(self, work: Work) -> family.Pipeline:
        wanted = self._words if work.start is None else self._inpaint if work.painted is not None else self._image
        found = wanted or self._inpaint
        if found is None:
            raise RuntimeError("no pipeline does this, although the call was checked")
        return found
