"""Which of a clip's captions an epoch trains (``--captions one``): a pure function of (seed, epoch, clip).

A clip's captions are drawn without putting them back: in as many epochs as it has captions each is trained once, in an
order of the clip's own; then they are drawn anew. Neither other clips nor the number of processes matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .sample_rng import seed_of

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CaptionDraw:
    """One sample of each clip, another one each epoch.

    Args:
        clip_of: number of each sample's clip (N), from 0.
        words: 64 bits of each sample's key (N), by `hash_words`.
        seed: of the run.
    """

    clip_of: Ints
    words: _Words
    seed: int

    def __call__(self, epoch: int) -> Ints:
        """The samples of an epoch, ascending: as many as there are clips."""
        cycle, turn = np.divmod(epoch, self._captions)  # of each clip
        salt = np.uint64(seed_of(self.seed, 0, "", "captions"))
        shuffled = _mix(self.words ^ _mix(salt + cycle.astype(np.uint64))[self.clip_of])
        by_clip = np.lexsort((shuffled, self.clip_of))
        first = np.cumsum(self._captions) - self._captions
        return np.sort(by_clip[first + turn])

    @cached_property
    def _captions(self) -> Ints:
        """Of each clip, how many."""
        return np.bincount(self.clip_of).astype(np.int64)


def hash_words(keys: Iterable[str]) -> _Words:
    """64 bits of each key."""
    return np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys], np.uint64)


def _mix(words: _Words) -> _Words:
    """Words that look random, one to one (splitmix64's finalizer; Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
