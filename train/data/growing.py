"""Shards that are being written while they are trained: those of the words that are committed by now."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from cogcommon.errors import ShardError
from cogcommon.files.readers import read_in_order

from ..store.cache import SampleCache
from .shard_words import FoundTar, expand
from .shards import Opened, OtherTar, open_one

_SETTLED = 5.0  # seconds in which a shard that is being replaced fits its record again


def committed(
    words: Sequence[str], option: str, cache: SampleCache | None = None, known: Mapping[str, Opened] | None = None
) -> dict[str, Opened]:
    """The shards whose records are there, by the names of their tars. A tar without one is still being written.

    Args:
        words: as for `open_shards`; they may stand for nothing yet.
        known: what this gave before; a shard is opened again only if its record is another one now.

    Raises:
        ShardError: a shard does not fit its record.
        StoreError: a place that cannot be looked into, or a file that cannot be read.
    """
    known = known or {}
    opened = read_in_order(
        lambda found: _open_committed(found, cache, known.get(found.tar.shown)), expand(words, option, growing=True)
    )
    return {one.shard.shown: one for one in opened if one is not None}


def _open_committed(found: FoundTar, cache: SampleCache | None, before: Opened | None) -> Opened | None:
    until = time.monotonic() + _SETTLED
    while True:
        try:
            stamp = found.record.stat()
        except FileNotFoundError:
            return None
        if before is not None and stamp.etag and stamp == before.stamp:
            return before
        try:
            return dataclasses.replace(open_one(found, cache), stamp=stamp)
        except (ShardError, OtherTar):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
