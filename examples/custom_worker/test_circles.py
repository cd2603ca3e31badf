import io

import numpy as np
import pytest
from circles import Circles
from msgspec import structs
from PIL import Image

from img_serving.domain.images import InputImage, Item, ItemFailure
from img_serving.engines.engine import GenerationCancelled, OnStep, call_of, load_fully


def drawn(call, on_step=None):
    engine = Circles()
    load_fully(engine)
    return engine.generate(call, on_step or OnStep())


def test_equal_seeds_give_equal_pictures_alone_and_in_a_batch():
    together = drawn(call_of("rings", "rings", seed=5, width=64, height=64))
    assert np.array_equal(together[1], drawn(call_of("rings", seed=6, width=64, height=64))[0])


def test_one_bad_prompt_fails_alone():
    bad, good = drawn(call_of("a square", "a ring", width=64, height=64))
    assert bad == ItemFailure("there are no squares here", refused=True)
    assert good.shape == (64, 64, 3)


def test_it_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at most 30 steps"):
        drawn(call_of("rings", steps=40, sampler="Discs"))


def test_it_stops_when_nobody_wants_the_picture():
    told = []
    with pytest.raises(GenerationCancelled):
        drawn(call_of("rings", width=64, height=64), OnStep(lambda *step: told.append(step), lambda: len(told) == 3))
    assert len(told) == 3


def test_it_shows_each_step():
    told = []
    drawn(call_of("rings", width=64, height=64, steps=2, previews=True), OnStep(lambda *step: told.append(step)))
    assert [(done, total, len(previews)) for done, total, previews in told] == [(1, 2, 1), (2, 2, 1)]


def test_what_a_mask_protects_stays():
    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return InputImage(file.getvalue(), "image/png", 64, 64)

    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))  # the left half may change
    item = Item("rings", None, 1, (png(Image.new("RGB", (64, 64), "red")),), png(mask))
    (edited,) = drawn(structs.replace(call_of("rings", width=64, height=64, operation="edit"), items=(item,)))
    assert (edited[:, 32:] == (255, 0, 0)).all()
    assert (edited[:, :32] != (255, 0, 0)).any()
