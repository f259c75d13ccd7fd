"""What is wrong with a shard whose bytes are not what was written: the reason, and what to do about it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from cogcommon.errors import CogError, ShardError, StoreError
from cogcommon.shards.records import read_table
from cogcommon.store.network import ANOTHER_SERVER, IN_A_BROWSER
from cogcommon.store.store import StoredFile

from ..store.cached_tar import UPLOAD_AGAIN

if TYPE_CHECKING:
    from .shard_set import SampleExtent, Shard


def why_wrong(extent: SampleExtent, shard: Shard, first: bytearray, second: bytearray) -> CogError:
    """The reason why a sample's bytes were wrong, twice."""
    if first != second and shard.copy:
        return StoreError(
            f"sample {extent.key} cannot be read: the cache gives other bytes than were fetched into it",
            where=shard.copy.where,
            fix="--cache on another disk: this one fails, or this machine's memory does",
        )
    if first != second:
        return StoreError(
            f"sample {extent.key} cannot be read: the store gives other bytes each time",
            where=shard.shown,
            fix=ANOTHER_SERVER,
        )
    if is_replaced(shard):
        return was_replaced(extent, shard)
    return damaged(shard.file, f"sample {extent.key} is not what was written")


def was_replaced(extent: SampleExtent, shard: Shard) -> StoreError:
    return StoreError(
        f"sample {extent.key} cannot be read: the shard has been replaced since the run was opened",
        where=shard.shown,
        fix="put the old one back; or start a run on the new ones, a LoRA from this run's weights (--init-lora)",
    )


def is_replaced(shard: Shard) -> bool:
    """Whether another shard lies there than was opened: `cogprep encode` has taken samples out of it, for one."""
    try:
        if shard.etag:
            now = shard.file.stat(fresh=True)
            return (now.size, now.etag) != (shard.header.tar_size, shard.etag)
        header, _ = read_table(io.BytesIO(shard.record.read_all().data), ["key"])
        return header.tar_sha256 != shard.header.tar_sha256
    except FileNotFoundError:  # so it is while a shard is rewritten
        return True
    except ShardError:
        return False


def check_sent(file: StoredFile, data: bytes, what: str, *, right: bool) -> None:
    """Refuse what a server sends in a file's place: it says nothing of the file.

    Raises:
        StoreError: it is not ``right``, and came from elsewhere.
    """
    if file.remote and data and not right:
        raise StoreError(
            f"the server sends something else in place of {what}, beginning with {data[:24]!r}",
            where=file.shown,
            fix=IN_A_BROWSER,
        )


def damaged(file: StoredFile, what: str) -> ShardError:
    fix = "`cogprep verify` lists all damage; remove the shard and its record, and `cogprep encode` makes it anew"
    if file.remote:
        fix = UPLOAD_AGAIN
    return ShardError(f"a damaged shard: {what}", where=file.shown, fix=fix)
