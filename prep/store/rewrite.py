"""Rewriting committed shards, and removing them: at any moment there is the old shard, or the new one (`shards`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from cogcommon.files.atomic import commit, commit_bytes, fsync_folder
from cogcommon.shards.records import (
    SampleRow,
    ShardRecord,
    read_record,
    record_bytes,
    record_name,
    shard_number,
    tar_name,
)

from .committed import committed_shards, read_extent
from .extents import finish_tar
from .locks import ShardBusy, lock_shard, shard_disk_errors
from .proof import is_ours, refuse_foreign


def drop_samples(folder: Path, number: int, keep: Callable[[SampleRow], bool]) -> ShardRecord | None:
    """Rewrite a committed shard without the samples that are gone, from its own bytes.

    Args:
        keep: whether a sample stays. It is asked under the shard's lock, for what the shard holds then.

    Returns:
        The new record; None if nothing stays and the shard was removed.

    Raises:
        ShardBusy: another live process writes it.
        ShardError: the shard is damaged.
        DiskError: the disk is full.
    """
    tar, record_path = folder / tar_name(number), folder / record_name(number)
    # Locked to the end, or another process would take this rewrite for one that a killed process left.
    with shard_disk_errors(tar), lock_shard(folder, number):
        complete_rewrite(folder, number)
        if not record_path.exists():  # somebody was first
            return None
        old = read_record(record_path)
        kept = [place for place in old.places if isinstance(place, str) or keep(place)]
        if len(kept) == len(old.places):
            return old
        if all(isinstance(place, str) for place in kept):
            remove_shard(folder, number)
            return None
        with open_rewrite(folder, number) as sink:
            places = [place if isinstance(place, str) else copy_sample(place, tar, sink) for place in kept]
            record = ShardRecord.of(number, finish_tar(sink), old.header.contract, places)
        finish_rewrite(folder, number, record)
    return record


def copy_sample(row: SampleRow, tar: Path, sink: IO[bytes]) -> SampleRow:
    """Copy a sample to the end of another tar; returns its row with the new offsets."""
    if row.status != "ok":
        return row
    shift = sink.tell() - row.offset
    sink.write(read_extent(tar, row))
    return dataclasses.replace(
        row,
        offset=row.offset + shift,
        json_offset=row.json_offset + shift,
        tensors_offset=row.tensors_offset + shift,
    )


def open_rewrite(folder: Path, number: int) -> IO[bytes]:
    """Open the tar of a rewrite, over what a killed process left of one; never through a link.

    Needs the shard's lock, to the end of `finish_rewrite`.
    """
    refuse_foreign(folder / tar_name(number))
    path = _new(folder / tar_name(number))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, "w+b", buffering=1 << 20)


def finish_rewrite(folder: Path, number: int, record: ShardRecord) -> None:
    """Put a whole rewrite and its record in place of the committed ones."""
    commit_bytes(_new(folder / record_name(number)), record_bytes(record))
    complete_rewrite(folder, number)


def remove_shard(folder: Path, number: int) -> None:
    """Remove a shard: first the record, so that it stops counting, then the tar. What is not ours stays."""
    for path in (folder / record_name(number), folder / tar_name(number)):
        if is_ours(path):
            path.unlink(missing_ok=True)
            fsync_folder(folder)


def recover_folder(folder: Path) -> None:
    """Make a folder fit for writing: finish rewrites, and remove records whose tar is gone.

    What a live process works on is left alone.
    """
    finish_rewrites(folder)
    committed = committed_shards(folder)
    there = {path.name for path in folder.iterdir()} if committed else set()
    for number in committed:
        if tar_name(number) not in there:
            with suppress(ShardBusy), shard_disk_errors(folder), lock_shard(folder, number):
                if not os.path.lexists(folder / tar_name(number)):
                    remove_shard(folder, number)


def finish_rewrites(folder: Path) -> None:
    """Finish, or undo, the rewrites that a killed process left half-way."""
    halves = [path.name[1:].removesuffix(".new") for path in folder.glob(".*.new")]
    found = [shard_number(name, kind) for name in halves for kind in ("tar", "parquet")]
    for number in sorted({number for number in found if number is not None}):
        with suppress(ShardBusy), shard_disk_errors(folder), lock_shard(folder, number):
            complete_rewrite(folder, number)


def complete_rewrite(folder: Path, number: int) -> None:
    """Carry out a rewrite whose record is there, drop one whose record is not. Needs the lock."""
    tar, record = folder / tar_name(number), folder / record_name(number)
    if _new(record).exists():
        refuse_foreign(tar)
        refuse_foreign(record)
        if _new(tar).exists():
            record.unlink(missing_ok=True)
            fsync_folder(folder)
            commit(_new(tar), tar)
        commit(_new(record), record)
    else:
        _new(tar).unlink(missing_ok=True)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
