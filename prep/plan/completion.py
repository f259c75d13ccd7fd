"""Completing a committed shard: samples that an earlier run had to leave out get their place in it.

The shard becomes, byte for byte, what it would have been had nothing disturbed that run. It is
rewritten beside the old one, which counts until the new one is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.errors import CogError
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow, ShardRecord, read_record, record_name, tar_name

from ..store.extents import finish_tar, make_extent
from ..store.locks import lock_shard, shard_disk_errors
from ..store.rewrite import complete_rewrite, copy_sample, finish_rewrite, open_rewrite
from ..store.shards import ShardDone, ShardWriter

if TYPE_CHECKING:
    import torch


def open_writer(folder: Path, number: int, contract: Contract, planned: Collection[str], *, completes: bool) -> Writer:
    """The writer of a planned shard.

    Args:
        completes: the shard was committed without these samples; if it is gone by now, it is a new one.

    Raises:
        ShardBusy: another live process writes it.
        ShardDone: another process has done it.
        ShardError: the disk is full, or another fault of the file system; the committed shard is damaged.
    """
    if completes and (folder / record_name(number)).exists():
        return ShardCompletion(folder, number, planned)
    return ShardWriter(folder, number, contract, planned)


class ShardCompletion:
    """A committed shard that gets the samples it lacks; used as a `ShardWriter` is.

    What a killed completion had laid is made again.

    Args:
        folder: where the shard is.
        number: of the shard.
        planned: keys that wait in it, or that it has rejected and that are tried again.

    Raises:
        As `open_writer`.
    """

    def __init__(self, folder: Path, number: int, planned: Collection[str]) -> None:
        self.folder = folder
        self.number = number
        self._tar = folder / tar_name(number)
        self._filled = False
        with shard_disk_errors(self._tar), ExitStack() as held:
            held.enter_context(lock_shard(folder, number))
            complete_rewrite(folder, number)
            self._old = read_record(folder / record_name(number))
            self._ahead = deque(self._old.places)
            if not any(_key(place) in planned and not _has_tensors(place) for place in self._ahead):
                raise ShardDone
            self._sink = held.enter_context(open_rewrite(folder, number))
            self._held = held.pop_all()
        self._places: list[SampleRow | str] = []

    def add(self, row: SampleRow, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put an encoded sample in its place. The row's extent is filled in here."""
        extent = make_extent(row, tensors)
        with shard_disk_errors(self._tar):
            self._copy_up_to(row.key)
            offset = self._sink.tell()
            self._sink.write(extent.data)
        self._places.append(extent.placed(row, offset))
        self._filled = True

    def add_rejected(self, row: SampleRow) -> None:
        """A sample that has no tensors after all: its row keeps the reason."""
        assert row.status == "rejected" and row.reason and row.offset == -1
        self._copy_up_to(row.key)
        self._places.append(row)
        self._filled = True

    def postpone(self, key: str) -> None:
        """A sample that still waits."""
        self._copy_up_to(key)
        self._places.append(key)

    def commit(self) -> ShardRecord | None:
        """Put the new shard in place of the old one; None where nothing was added to it."""
        with shard_disk_errors(self._tar), self._held:
            if not self._filled:
                complete_rewrite(self.folder, self.number)  # which undoes it: it has no record
                return None
            self._copy_up_to(None)
            record = ShardRecord.of(self.number, finish_tar(self._sink), self._old.header.contract, self._places)
            finish_rewrite(self.folder, self.number, record)
        return record

    def abandon(self) -> None:
        """Let go of the shard, which stays as it was."""
        if not self._sink.closed:
            with suppress(OSError, CogError), self._held:  # the first error is the one to show
                complete_rewrite(self.folder, self.number)

    def _copy_up_to(self, key: str | None) -> None:
        """Copy what lies before a sample; without one, all that is left."""
        while self._ahead:
            place = self._ahead.popleft()
            if _key(place) == key:
                return
            with shard_disk_errors(self._tar):
                self._places.append(place if isinstance(place, str) else copy_sample(place, self._tar, self._sink))


Writer = ShardWriter | ShardCompletion


def _key(place: SampleRow | str) -> str:
    return place if isinstance(place, str) else place.key


def _has_tensors(place: SampleRow | str) -> bool:
    return isinstance(place, SampleRow) and place.status == "ok"
