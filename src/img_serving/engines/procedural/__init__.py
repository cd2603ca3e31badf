"""The procedural painter: draws skies, landscapes, seas, cities and space from the words, with no model behind them.

It is honest about what it is: a small lexicon (English and Korean) turns words into scenes, lights, colours and styles;
a word it does not know still bends colour and form, always in the same way. Every random number comes from BLAKE2b and
from the raw PCG64 stream, and the arithmetic keeps to operations that IEEE 754 rounds exactly (no sine, no power), so
equal inputs give equal bytes. All fields are float32.

How a picture comes about, and where:
    words -> `Scene`   what is there, and in which colours            lexicon, words, palette, scene
    steps -> `Latent`  a flow that folds the noise, detail that       steps
                       grows, grain that fades: small, whatever
                       the picture
    both  -> `Frame`   one size and stage, and its coordinates        frame
          -> pixels    in bands of rows, from back to front           canvas, finish
                         at reduced resolution                        backdrop: sky, space, abstract
                         at full resolution                           stars, bodies, ranges (land, flora, city),
                                                                      lighthouse, water
                         on top                                       foreground
An edit or a variation begins with pictures instead (start): the scene's light and lines are carried into them (edit), or the
latent's flow carries their points (variation).
Underneath: chance and noise (all that is random), fields and colours (all arithmetic), limits (what is taken).

The rooms import numpy as they load, so whoever wants a quick start imports this package late.
"""

from __future__ import annotations

from img_serving.engines.procedural.engine import ProceduralEngine
from img_serving.engines.procedural.limits import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    MAX_PIXELS,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    MODEL,
)
from img_serving.engines.procedural.painter import Preview, Watch, paint, retouch, vary
from img_serving.engines.procedural.scene import Scene, compose
from img_serving.engines.procedural.start import Start, start_of

__all__ = [
    "DEFAULT_GUIDANCE",
    "DEFAULT_STEPS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MAX_STEPS",
    "MIN_SIDE",
    "MODEL",
    "Preview",
    "ProceduralEngine",
    "Scene",
    "Start",
    "Watch",
    "compose",
    "paint",
    "retouch",
    "start_of",
    "vary",
]
