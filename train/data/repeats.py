"""Which samples an epoch trains several times (``--repeat FOLDER=N``), so that a few do not drown among many."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from cogcommon.errors import SettingError
from cogcommon.store.store import without_secrets
from cogcommon.words import counted

from .caption_draw import Ints
from .shard_set import ShardSet
from .shard_words import expand

_OPTION = "--repeat"
_MOST = 10_000


def split_repeat(word: str) -> tuple[str, int]:
    """What a word names, and how many times an epoch trains it.

    Raises:
        SettingError: it says no whole number from 1 on.
    """
    what, mark, number = word.rpartition("=")
    if not (mark and what and re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= _MOST):
        raise SettingError(
            f"{without_secrets(word)} does not say how many times (1 to {_MOST:,})",
            where=_OPTION,
            fix=f"{_OPTION} pictures/=8, or for all samples of one size {_OPTION} 1x480x720=8",
        )
    return what, int(number)


def is_size(what: str) -> bool:
    """Whether a size is meant, FxHxW, and not shards."""
    return re.fullmatch("[0-9]+x[0-9]+x[0-9]+", what) is not None


def times_of(words: Sequence[str], shards: ShardSet, *, growing: bool = False) -> Ints | None:
    """How often an epoch trains each sample; None: each once.

    Args:
        words: as given: tars as for --shards or a size, each with ``=N``.
        growing: more shards are to come, so a word may name none of the samples yet.

    Raises:
        SettingError: a word names no sample, or one that another names, too.
        ShardError: a word names no shard.
    """
    times = np.zeros(len(shards), np.int64)
    for word in words:
        what, number = split_repeat(word)
        named = _of_size(what, shards) if is_size(what) else _of_tars(what, shards, growing)
        if not (growing or named.any()):
            raise _names_nothing(what, shards)
        if (times[named] > 0).any():
            raise SettingError(
                f"{without_secrets(what)} names samples that are named already", where=_OPTION, fix="name each once"
            )
        times[named] = number
    return times.clip(1) if (times > 1).any() else None


def _of_size(what: str, shards: ShardSet) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    sizes = [str(bucket) for bucket in shards.buckets]
    return shards.bucket_of == (sizes.index(what) if what in sizes else -1)


def _of_tars(what: str, shards: ShardSet, growing: bool) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    tars = {_place(found.tar.shown) for found in expand([what], _OPTION, growing=growing)}
    numbers = [number for number, shard in enumerate(shards.shards) if _place(shard.shown) in tars]
    return np.isin(shards.shard_of, numbers)


def _names_nothing(what: str, shards: ShardSet) -> SettingError:
    if is_size(what):
        sizes = ", ".join(map(str, shards.buckets))
        return SettingError(f"no sample is of {what}", where=_OPTION, fix=f"one of {sizes}")
    folders = dict.fromkeys(shard.shown.rpartition("/")[0] or "." for shard in shards.shards)
    return SettingError(
        f"{without_secrets(what)} holds none of the samples that are trained",
        where=_OPTION,
        fix="name a folder of --shards: " + " or ".join(itertools.islice(folders, 3)),
    )


def _place(shown: str) -> str:
    """A tar's name, by whatever way it was given."""
    return shown if "://" in shown else os.path.realpath(shown)


def of_clips(times: Ints, clip_of: Ints) -> Ints:
    """As often as any caption of their clip: where an epoch draws one of them, all must count alike."""
    most = np.zeros(int(clip_of.max()) + 1, np.int64)
    np.maximum.at(most, clip_of, times)
    return most[clip_of]


def described(times: Ints | None) -> str:
    """The counts, and a hash of which samples they are of: what a resumed run must have in common."""
    if times is None:
        return "none"
    return f"{', '.join(_counts(times))} ({hashlib.sha256(times.tobytes()).hexdigest()[:8]})"


def told(times: Ints, samples: int, noun: str) -> str:
    """What a run says of it.

    Args:
        samples: that an epoch trains, each time counted.
        noun: what is repeated: sample or clip.
    """
    return f"each epoch trains {counted(samples, noun)}, of which {', '.join(_counts(times))} each ({_OPTION})"


def _counts(times: Ints) -> Iterator[str]:
    for number, count in zip(*np.unique(times[times > 1], return_counts=True), strict=True):
        yield f"{counted(int(count), 'sample')} {number:,} times"
