"""Replaces a committed shard behind an address that loses or gains samples.

As on a disk it is done in steps that the next writer can finish::

    .000007.tar.rewrite-SHA256.tmp  the new tar, whole
    .000007.parquet.new             its record: from here on the next writer will finish the rewrite
    000007.parquet removed, 000007.tar copied from the new one, 000007.parquet written, these two removed
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from cogcommon.shards.records import ShardHeader, read_table
from cogcommon.store.remote_folder import RemoteFolder

from .desk import tar_of
from .locks import ShardBusy

HALF = re.compile(r"\.(\d{6,18})\.parquet\.new", re.ASCII)
WHOLE = re.compile(r"\.(\d{6,18})\.tar\.rewrite-[0-9a-f]{16}\.tmp", re.ASCII)


def replace_shard(remote: RemoteFolder, record: str, header: ShardHeader, data: bytes, tar: Path) -> None:
    """Put a rewritten shard in place of the committed one.

    Args:
        record: its name there.
        data: the new record, whose header is ``header``.
        tar: the new tar, here.

    Raises:
        ShardBusy: another writer is at it.
    """
    half, whole = _halves(record, header)
    remote.upload(whole, tar)
    if not remote.create(half, data):
        raise ShardBusy
    finish_replacing(remote, half)


def finish_replacing(remote: RemoteFolder, half: str) -> None:
    """Carry out a rewrite whose record is there; any number of writers may."""
    data = remote.read(half)
    if data is None:
        return
    folder, _, name = half.rpartition("/")
    record = f"{folder}/{name[1:]}".lstrip("/").removesuffix(".new")
    tar = tar_of(record)
    header, _ = read_table(io.BytesIO(data), ["key"])
    half, whole = _halves(record, header)
    if remote.stat(whole) is not None:
        remote.remove(record)
        copied = remote.copy(whole, tar)
        if copied or ((entry := remote.stat(tar)) and entry.size == header.tar_size):
            remote.create(record, data)
    remote.remove(half, whole)


def _halves(record: str, header: ShardHeader) -> tuple[str, str]:
    """Names of a rewrite's record and tar."""
    folder, slash, name = record.rpartition("/")
    stem = name.removesuffix(".parquet")
    return f"{folder}{slash}.{name}.new", f"{folder}{slash}.{stem}.tar.rewrite-{header.tar_sha256[:16]}.tmp"
