"""How a model of your own is tested: as a class, without a gateway, a worker or a socket."""

import numpy as np
from gradient import Gradient

from img_serving.engines.engine import OnStep, call_of, load_fully


def drawn(call):
    engine = Gradient()
    load_fully(engine)
    return engine.generate(call, OnStep())


def test_equal_seeds_give_equal_pictures_alone_and_in_a_batch():
    together = drawn(call_of("a fox", "a fox", "a fox", seed=5, width=64, height=32))
    alone = drawn(call_of("a fox", seed=7, width=64, height=32))
    assert np.array_equal(together[2], alone[0])
    assert together[0].shape == (32, 64, 3)


def test_it_tells_how_far_it_is():
    engine, told = Gradient(), []
    load_fully(engine)
    engine.generate(call_of("a fox", "an owl"), OnStep(lambda done, total, previews: told.append((done, total))))
    assert told == [(1, 2), (2, 2)]
