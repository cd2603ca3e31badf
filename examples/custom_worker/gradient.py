"""A model of your own in ten lines: `img-serving worker --engine examples/custom_worker/gradient.py:Gradient`."""

import numpy as np

from img_serving.domain.capabilities import Capabilities


class Gradient:
    """Draws two colours that the words and the seed choose, one running into the other."""

    def load(self):
        # Here you would read your weights. Called once, in a thread; what it raises ends the worker with that message.
        self.ramp = np.linspace(0.0, 1.0, 1024)

    def capabilities(self):
        # What is not named in `honours` is not sent, and clients who ask for it are told that it was ignored.
        return Capabilities(max_batch_size=8, honours=frozenset({"seed", "size"}), default_size=(512, 512))

    def generate(self, batch, on_step):
        # One picture for each item, in order: uint8 [height, width, 3], a Pillow image, or the bytes of a PNG.
        pictures = []
        share = np.interp(np.linspace(0, 1, batch.width), np.linspace(0, 1, 1024), self.ramp)[None, :, None]
        for done, item in enumerate(batch.items, 1):
            left, right = np.random.default_rng([item.seed, *item.prompt.encode()]).integers(0, 256, (2, 1, 1, 3))
            row = (left * (1 - share) + right * share).astype(np.uint8)
            pictures.append(row.repeat(batch.height, axis=0))
            on_step(done, len(batch.items))  # tells how far it is, and raises when nobody wants the pictures any more
        return pictures
