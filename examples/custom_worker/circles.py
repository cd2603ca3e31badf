"""A model of your own with everything in it: steps, previews, samplers, refusals, edits. `--engine circles.py:Circles`."""

import io

import numpy as np
from PIL import Image

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import ItemFailure, Preview
from img_serving.domain.vocabulary import Vocabulary


class Circles:
    """Draws rings, one more at each step; an edit draws them over the picture it is given."""

    def load(self):
        # A generator: people see what is done and how far it is. Each part is done before the next one is yielded.
        yield 0.0, "reading the palette"
        self.palette = np.random.default_rng(0).integers(0, 256, (64, 3))
        yield 0.9, "mixing the colours"

    def capabilities(self):
        return Capabilities(
            operations=frozenset({"generation", "edit"}),
            max_batch_size=4,
            honours=frozenset({"seed", "size", "num_inference_steps", "sampler", "strength"}),
            sizes=SizeRule(multiple=8, min_side=64, max_side=2048),  # the gateway rounds to it, and tells the client
            default_size=(512, 512),
            max_steps=50,
            samplers=Vocabulary(["Rings", "Discs"]),
            masks=True,
            previews=True,
        )

    def generate(self, batch, on_step):
        request = batch.request
        steps = request.steps or 12  # None: the client said nothing
        if request.sampler == "Discs" and steps > 30:
            # the request is at fault: the client gets a 400 with these words, and nobody tries again elsewhere
            raise ValueError("Discs have at most 30 steps")
        canvases = [self.start(item, batch) for item in batch.items]
        for step in range(steps):
            for item, canvas in zip(batch.items, canvases, strict=True):
                if not isinstance(canvas, ItemFailure):
                    self.ring(canvas, item, step, steps, filled=request.sampler == "Discs")
            previews = (
                [Preview(small(one), "image/jpeg", index) for index, one in shown(canvases)] if batch.previews else ()
            )
            on_step(step + 1, steps, previews)  # raises when nobody wants the pictures any more: let it through
        share = 1.0 if request.strength is None else request.strength
        return [self.finished(item, one, share) for item, one in zip(batch.items, canvases, strict=True)]

    def start(self, item, batch):
        if "square" in item.prompt:
            # this picture alone fails; `refused` says that its prompt is to blame (400), else it is tried elsewhere
            return ItemFailure("there are no squares here", refused=True)
        if item.images:
            return np.array(opened(item.images[0]).resize((batch.width, batch.height)))
        return np.full((batch.height, batch.width, 3), 255, np.uint8)

    def ring(self, canvas, item, step, steps, *, filled):
        # one generator for each picture and step: equal seeds give equal pictures, alone and in a batch
        chance = np.random.default_rng([item.seed, step, *item.prompt.encode()])
        height, width, _ = canvas.shape
        y, x = np.ogrid[:height, :width]
        far = np.hypot(x - chance.integers(0, width), y - chance.integers(0, height))
        radius = min(height, width) * (0.1 + 0.4 * step / steps)
        canvas[far < radius if filled else abs(far - radius) < 4] = self.palette[chance.integers(0, len(self.palette))]

    def finished(self, item, canvas, share):
        if isinstance(canvas, ItemFailure) or not item.images:
            return canvas
        height, width, _ = canvas.shape
        before = np.array(opened(item.images[0]).resize((width, height)), float)
        allowed = np.full((height, width, 1), share)
        if item.mask is not None:  # transparent where the picture may change
            alpha = Image.open(io.BytesIO(item.mask.data)).convert("RGBA").getchannel("A").resize((width, height))
            allowed = allowed * (1 - np.array(alpha, float)[:, :, None] / 255)
        return (before * (1 - allowed) + canvas * allowed).astype(np.uint8)


def opened(image):
    return Image.open(io.BytesIO(image.data)).convert("RGB")


def shown(canvases):
    return [(index, one) for index, one in enumerate(canvases) if not isinstance(one, ItemFailure)]


def small(canvas):
    file = io.BytesIO()
    Image.fromarray(canvas[::4, ::4]).save(file, "JPEG", quality=70)
    return file.getvalue()
