"""Opens the shards of a run: words of the command line -> records -> one table of samples (`shard_set`).

Records are read only, and the last bytes of each tar. What is wrong with a shard is found here, or when a sample is
read; it is always named.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogcommon.cli.names import command_line
from cogcommon.errors import ShardError, StoreError
from cogcommon.files.readers import read_in_order
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import OF_THE_CLIPS
from cogcommon.shards.records import ShardHeader, read_table, shard_number
from cogcommon.store.network import ANOTHER_SERVER
from cogcommon.store.store import ReadPart, StoredFile, WholeFilesOnly

from ..store.cache import SampleCache
from ..store.cached_tar import UPLOAD_AGAIN, CachedTar
from .shard_faults import check_sent, damaged
from .shard_set import NoSamples, Shard, ShardSet
from .shard_words import FoundTar, expand

_COLUMNS = [
    "key", "status", "bucket", "offset", "size", "json_offset", "json_size", "tensors_offset", "tensors_size",
    "sha256", "source_sha256",
]  # fmt: skip
_TAIL = 21 * 512  # a tar ends with two blocks of zeros or more, up to a multiple of 20 blocks
_PARQUET = b"PAR1"  # how a record begins


class OtherTar(StoreError):
    """A tar behind an address that is not its record's: it was cut short, or is about to be replaced."""


@dataclass(frozen=True)
class Opened:
    """A shard, and its record's rows."""

    shard: Shard
    table: pa.Table
    stamp: ReadPart | None = None  # of the record: its size and etag, where somebody asks whether it is still the same


def open_shards(words: Sequence[str], option: str = "--shards", cache: SampleCache | None = None) -> ShardSet:
    """Open and check shards, without reading samples.

    Args:
        words: tars, globs, brace ranges, folders, URLs; as the option was given.
        option: for messages.
        cache: for samples behind a URL.

    Raises:
        ShardError: none there; one without a record, of another size, or encoded
            otherwise than the first; no usable sample.
    """
    return shard_set(read_in_order(lambda found: open_one(found, cache), expand(words, option)), option, cache)


def shard_set(
    opened: Iterable[Opened],
    option: str = "--shards",
    cache: SampleCache | None = None,
    *,
    may_differ: Collection[str] = OF_THE_CLIPS,
) -> ShardSet:
    """Shards as one set; at least one.

    Args:
        may_differ: facts of their contracts that need not be the same.

    Raises:
        ShardError: they do not belong together.
        NoSamples: every clip was rejected.
    """
    # By content, so that neither the order of the words nor the folder's name enters the order of samples.
    opened = sorted(opened, key=lambda one: one.shard.header.tar_sha256)
    first, *rest = [one.shard for one in opened]
    for shard in rest:
        if shard.header.contract.fingerprint == first.header.contract.fingerprint:
            continue
        if differing := first.header.contract.differences(shard.header.contract, but=may_differ):
            raise ShardError(
                f"shards that were encoded differently: {'; '.join(differing[:4])}",
                where=f"{first.shown} here, {shard.shown} there",
                fix="train on shards of one folder, or encode all clips with the same settings",
            )
    tables = [
        one.table.append_column("shard", pa.array(np.full(one.table.num_rows, number, np.int32)))
        for number, one in enumerate(opened)
    ]
    table = pa.concat_tables(tables)
    table = table.filter(pc.equal(table["status"], "ok")).combine_chunks()
    if not table.num_rows:
        raise NoSamples(
            f"no usable sample in {len(opened)} shard{'s' * (len(opened) > 1)}: every clip was rejected",
            where=first.shown,
            fix=f"`{command_line('cogprep', 'inspect', first.shown.rpartition('/')[0] or '.')}` gives the reasons",
        )
    twice = pc.value_counts(table["key"])
    twice = twice.filter(pc.greater(twice.field("counts"), 1))
    if len(twice):
        raise ShardError(
            f"{len(twice)} samples are in more than one of these shards, {twice[0]['values'].as_py()} for one",
            where=option,
            fix="give each shard once, and only one copy of a folder; where one folder holds them twice, "
            "`cogprep encode` drops the second",
        )
    buckets = sorted(Resolution.parse(name) for name in pc.unique(table["bucket"]).to_pylist())
    return ShardSet([one.shard for one in opened], table, buckets, cache)


def open_one(found: FoundTar, cache: SampleCache | None) -> Opened:
    """Open a shard by two requests: the record, and the tar's last bytes, whose answer tells its size.

    Raises:
        ShardError: it is not there, not finished, or damaged.
        StoreError: it cannot be read, and why.
    """
    header, table = _record(found)
    good = table.filter(pc.equal(table["status"], "ok")).sort_by("offset")
    end = 0
    for offset, length in zip(good["offset"].to_pylist(), good["size"].to_pylist(), strict=True):
        if offset != end:
            raise damaged(found.record, f"bytes {end:,} to {offset:,} of the tar belong to no sample")
        end = offset + length
    tar, copy = found.tar, None
    try:
        try:
            tail = _tail(tar, end)
        except WholeFilesOnly:
            if cache is None:
                raise
            copy = CachedTar(cache, tar, header.tar_sha256, header.tar_size)
            tar = StoredFile(copy, tar.path, tar.shown)
            tail = _tail(tar, end)
        if tar.remote and _fault_of(tail, header):  # nothing is called damaged because of one error
            if copy:
                copy.check()
            tail = _tail(tar, end, fresh=True)
    except FileNotFoundError as error:
        raise _no_such_shard(tar) from error
    if (fault := _fault_of(tail, header)) and tar.remote:
        raise OtherTar(
            f"this is not the tar of its record: {fault}",
            where=tar.shown,
            fix="upload both again: the upload was cut short, or another file took the tar's place",
        )
    if fault:
        raise damaged(tar, fault)
    if cache is not None:
        cache.protect(good["sha256"])
    return Opened(Shard(tar, header, found.record, found.empty_caption, tail.etag), table)


def _record(found: FoundTar) -> tuple[ShardHeader, pa.Table]:
    file = found.record
    came = set()
    for _ in range(2 if file.remote else 1):
        try:
            raw = bytes(file.read_all().data)
        except FileNotFoundError as error:
            try:
                found.tar.stat()
            except FileNotFoundError:
                raise _no_such_shard(found.tar) from error
            raise _without_record(found) from error
        try:
            return read_table(io.BytesIO(raw), _COLUMNS)
        except ShardError as error:
            fault = error
            came.add(raw)
    check_sent(file, raw, "the record", right=raw.startswith(_PARQUET))
    if len(came) > 1:
        raise StoreError("the server gives other bytes each time", where=file.shown, fix=ANOTHER_SERVER)
    raise ShardError(fault.what, where=file.shown, fix=UPLOAD_AGAIN if file.remote else fault.fix) from fault


def _without_record(found: FoundTar) -> ShardError:
    folder, _, name = found.tar.shown.rpartition("/")
    if shard_number(name, "tar") is None:
        return ShardError(
            "a tar without a record beside it, which says what is in it",
            where=found.tar.shown,
            fix=f"a shard that was renamed needs its record as {found.record.shown.rpartition('/')[2]}; "
            "move any other tar elsewhere, or name the shards without it",
        )
    out = re.sub("(^|(?<=.)/)val$", "", folder) or "."
    return ShardError(
        "a shard without its record: it was never finished",
        where=found.tar.shown,
        fix="`cogprep encode` finishes an interrupted folder; "
        f"`{command_line('cogprep', 'index', out)}` rebuilds a lost record; "
        f"`{command_line('cogprep', 'clean-cache', '--out', out)}` removes what neither has a use for",
    )


def _no_such_shard(tar: StoredFile) -> ShardError:
    return ShardError("no such shard", where=tar.shown, fix="`cogprep encode` makes what is missing; check the path")


def _tail(tar: StoredFile, end: int, *, fresh: bool = False) -> ReadPart:
    """The bytes behind the samples, and the tar's size and etag; ``fresh``: not as a listing has told them."""
    tail = tar.read(end, end + _TAIL + 1)
    return tail if tail.size is not None else dataclasses.replace(tar.stat(fresh=fresh), data=tail.data)


def _fault_of(tail: ReadPart, header: ShardHeader) -> str:
    """What is wrong with a tar's size or last bytes. The samples are hashed when read; behind them come only zeros."""
    if tail.size != header.tar_size:
        return f"the tar has {tail.size or 0:,} bytes, its record says {header.tar_size:,}"
    if len(tail.data) > _TAIL or tail.data.strip(b"\0"):
        return "there is something behind the last sample"
    return ""
