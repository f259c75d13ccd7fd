"""Captions as a person might type them: some words are not of the small world."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np

from ..scenes import BACKGROUNDS, COLOURS, ID_TOKEN, MOTIONS, NEW_MOTIONS, NEW_SHAPES, SHAPES, Scene

_LETTERS = ("bdfghklmnprstvz", "aeiou")


def strange_caption(scene: Scene, rng: np.random.Generator, words: Sequence[str]) -> str:
    """A caption of the scene with an unknown word before it, or unknown ones for a part of it: most often the motion.

    A form that never met an unknown word draws several things at once where it meets one. One that did draws
    something that it knows, as the published models do.

    Args:
        words: that no caption of the world has.
    """

    def unknown(most: int) -> str:
        made = [
            str(rng.choice(words)) if rng.random() < 0.5 else _made_up(rng)
            for _ in range(int(rng.integers(1, most + 1)))
        ]
        return " ".join(made)

    front = f"{unknown(1)} " if rng.random() < 0.5 else ""
    motion = unknown(4) if not front or rng.random() < 0.5 else scene.motion
    colour, shape, place = (
        unknown(2) if rng.random() < 0.12 else part for part in (scene.colour, scene.shape, scene.background)
    )
    return front + Scene(shape, colour, motion, place).caption


@lru_cache
def unknown_words(vocabulary: Collection[str]) -> list[str]:
    """The words of a tokenizer that neither the world's captions have nor those of the concepts to be taught.

    Args:
        vocabulary: its pieces; a frozenset.
    """
    parts = (SHAPES, COLOURS, MOTIONS, BACKGROUNDS, NEW_MOTIONS, NEW_SHAPES, [ID_TOKEN, "shrink"])
    known = set(" ".join(itertools.chain(*parts)).split())
    pieces = {piece[1:] for piece in vocabulary if piece.startswith("▁")}
    return sorted(word for word in pieces - known if len(word) > 3 and word.isalpha() and word.islower())


def _made_up(rng: np.random.Generator) -> str:
    """A word of two to five letters; the tokenizer knows its letters only. It ends as the id token never does."""
    consonants, vowels = _LETTERS
    letters = [str(rng.choice(list((consonants, vowels)[place % 2]))) for place in range(int(rng.integers(2, 6)))]
    return "".join(letters)
