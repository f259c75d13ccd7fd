"""The shards of a run: words of the command line -> records -> one table of samples.

Opening reads records only (and the last bytes of each tar). What is wrong with
a shard is found here, or when a sample is read; it is always named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogcommon.cli.names import command_line
from cogcommon.errors import CogError, ShardError, StoreError
from cogcommon.files.readers import read_in_order
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import ShardHeader, extent_intact, read_table, shard_number
from cogcommon.store.store import TRAINING, ReadPart, Stop, StoredFile, WholeFilesOnly
from cogcommon.words import counted

from ..store.cache import SampleCache
from .caption_draw import CaptionDraw, Ints, hash_words
from .shard_words import FoundTar, expand

_COLUMNS = [
    "key", "status", "bucket", "offset", "size", "json_offset", "json_size", "tensors_offset", "tensors_size",
    "sha256", "source_sha256",
]  # fmt: skip
_TAIL = 21 * 512  # a tar ends with two blocks of zeros or more, up to a multiple of 20 blocks
_PARQUET = b"PAR1"  # how a record begins


@dataclass(frozen=True)
class Shard:
    """A committed shard: its tar and what its record says of it."""

    file: StoredFile
    header: ShardHeader
    empty_caption: StoredFile  # of the folder that the tar lies in
    etag: str = ""  # of the tar, when it was opened

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def shown(self) -> str:
        """The name of the tar in messages."""
        return self.file.shown


class NoSamples(ShardError):
    """Shards that are as they should be, and hold nothing to train on."""


@dataclass(frozen=True)
class Opened:
    """A shard, and its record's rows."""

    shard: Shard
    table: pa.Table
    stamp: ReadPart | None = None  # of the record: its size and etag, where somebody asks whether it is still the same


@dataclass(frozen=True)
class SampleExtent:
    """Where a sample lies. Offsets and sizes in bytes, from the start of the tar."""

    key: str
    shard: int
    bucket: Resolution
    offset: int
    size: int
    json_offset: int
    json_size: int
    tensors_offset: int
    tensors_size: int
    sha256: bytes


@dataclass(frozen=True)
class ShardSet:
    """All usable samples of some shards that were encoded alike."""

    shards: Sequence[Shard]
    table: pa.Table  # _COLUMNS and "shard", one row a sample
    buckets: Sequence[Resolution]
    cache: SampleCache | None = None

    @property
    def contract(self) -> Contract:
        return self.shards[0].header.contract

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def fingerprint(self) -> str:
        """A hash of the samples and their order, wherever the shards lie; hex sha256."""
        digest = hashlib.sha256(self.contract.fingerprint.encode())
        for key in self.table["key"].to_pylist():
            digest.update(key.encode())
        return digest.hexdigest()

    @property
    def shard_of(self) -> Ints:
        return self.table["shard"].to_numpy().astype(np.int64)

    @property
    def bucket_of(self) -> Ints:
        """Index into ``buckets`` of each sample."""
        names = pa.array([str(bucket) for bucket in self.buckets])
        return pc.index_in(self.table["bucket"], names).to_numpy().astype(np.int64)

    @property
    def samples(self) -> dict[Resolution, int]:
        """How many there are of each bucket."""
        counts = np.bincount(self.bucket_of, minlength=len(self.buckets))
        return {bucket: int(count) for bucket, count in zip(self.buckets, counts, strict=True)}

    @cached_property
    def clip_of(self) -> Ints:
        """Number of each sample's clip, from 0: samples of the same content and bucket are captions of one clip.

        A record that `cogprep index` rebuilt does not know the content; there each sample is a clip of its own.
        """
        key = self.table["key"].cast(pa.binary())
        content = pc.if_else(self._of_no_clip, key, self.table["source_sha256"])
        clips = pc.binary_join_element_wise(content, self.table["bucket"].cast(pa.binary()), pa.scalar(b" "))
        return clips.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)

    @property
    def of_no_clip(self) -> int:
        """Samples whose record does not say of which clip they are."""
        return int(pc.sum(self._of_no_clip).as_py())

    @property
    def _of_no_clip(self) -> pa.ChunkedArray:
        return pc.equal(self.table["source_sha256"], pa.scalar(b"", pa.binary()))

    @property
    def clips(self) -> int:
        """How many different clips the samples are of."""
        return int(self.clip_of.max()) + 1

    @property
    def described(self) -> str:
        """How many samples, of how many clips, where they are not as many."""
        samples = counted(len(self), "sample")
        return samples if self.clips == len(self) else f"{samples} (captions of {counted(self.clips, 'clip')})"

    def caption_draw(self, seed: int) -> CaptionDraw:
        """What takes one caption of each clip an epoch."""
        return CaptionDraw(self.clip_of, hash_words(self.table["key"].to_pylist()), seed)

    def extent(self, index: int) -> SampleExtent:
        row = self.table.slice(index, 1).to_pylist()[0]
        row["bucket"] = Resolution.parse(row["bucket"])
        return SampleExtent(**{field.name: row[field.name] for field in dataclasses.fields(SampleExtent)})

    def without(self, held_out: ShardSet) -> ShardSet:
        """This set without the samples whose key, or whose clip, is held out.

        Raises:
            ShardError: nothing is left.
        """
        clips = held_out.table.filter(pc.invert(held_out._of_no_clip))["source_sha256"]
        same = pc.or_(
            pc.is_in(self.table["key"], held_out.table["key"].combine_chunks()),
            pc.is_in(self.table["source_sha256"], clips.combine_chunks()),
        )
        table = self.table.filter(pc.invert(same))
        if not table.num_rows:
            raise NoSamples(
                f"all {len(self)} samples of --shards are in --validate-shards too; none is left to train on",
                where=self.shards[0].shown,
                fix="give other shards to --validate-shards (`cogprep encode --holdout N` sets some apart)",
            )
        return dataclasses.replace(self, table=table)

    def read(self, extent: SampleExtent, stop: Stop | None = None) -> bytearray:
        """A sample's bytes, checked against its hash.

        Raises:
            ShardError: they are not what was written: read twice, and the same both times.
            StoreError: they cannot be read, and why.
        """
        cache = self.cache if self.shards[extent.shard].file.remote else None
        if cache is not None and (kept := cache.get(extent.sha256)) is not None:
            return kept
        data = self._fetch(extent, stop)
        if not extent_intact(data, extent.sha256):
            again = self._fetch(extent, stop)
            if not extent_intact(again, extent.sha256):
                raise self._why(extent, data, again)
            self.shards[extent.shard].file.count("a sample came with other bytes")
            data = again
        if cache is not None:
            cache.put(extent.sha256, data)
        return data

    def fetch_ahead(self, index: int, stop: Stop | None = None) -> None:
        """Bring a sample of a remote shard into the cache, if there is one and it has room. Raises as `read`."""
        extent = self.extent(index)
        cache = self.cache if self.shards[extent.shard].file.remote else None
        if cache is not None and cache.takes(extent.size) and not cache.has(extent.sha256):
            self.read(extent, stop)

    def _fetch(self, extent: SampleExtent, stop: Stop | None) -> bytearray:
        file = self.shards[extent.shard].file
        try:
            return file.read(extent.offset, extent.offset + extent.size, TRAINING, stop).data
        except FileNotFoundError as error:
            raise StoreError(
                f"sample {extent.key} cannot be read: the shard is gone, which was there when the run was opened",
                where=file.shown,
                fix="put it back; the same command goes on from the last checkpoint of --out",
            ) from error

    def _why(self, extent: SampleExtent, first: bytearray, second: bytearray) -> CogError:
        """The reason why a sample's bytes were wrong, twice."""
        shard = self.shards[extent.shard]
        if first != second:
            return StoreError(
                f"sample {extent.key} cannot be read: the store gives other bytes each time",
                where=shard.shown,
                fix="another server or mirror; a proxy between may be at fault",
            )
        if shard.file.remote:
            try:
                now = shard.file.stat(fresh=True)
            except FileNotFoundError:
                now = ReadPart(bytearray(), 0)
            if (now.size, now.etag) != (shard.header.tar_size, shard.etag):
                return StoreError(
                    f"sample {extent.key} cannot be read: the shard has been replaced since the run was opened",
                    where=shard.shown,
                    fix="put the old one back, or start a run on the new ones",
                )
        return _damaged(shard.file, f"sample {extent.key} is not what was written")

    def empty_caption(self) -> bytes:
        """The stored embedding of the empty caption: safetensors with "text" (L, D).

        Raises:
            ShardError: missing beside the shards, or not the one of their contract.
            StoreError: it cannot be read, and why.
        """
        file = self.shards[0].empty_caption
        for _ in range(2 if file.remote else 1):
            try:
                data = bytes(file.read_all().data)
            except FileNotFoundError as error:
                raise ShardError(
                    "the embedding of the empty caption is missing",
                    where=file.shown,
                    fix="`cogprep encode` writes it again",
                ) from error
            if hashlib.sha256(data).hexdigest() == self.contract.empty_caption_sha256:
                return data
        raise ShardError(
            "this embedding of the empty caption does not belong to the shards beside it",
            where=file.shown,
            fix="remove it; `cogprep encode` writes it again",
        )


def usual_size(samples: Mapping[Resolution, int]) -> Resolution:
    """The size of the most clips; of the most pictures where there are no clips.

    Args:
        samples: how many there are of each bucket.
    """
    return max(samples, key=lambda bucket: (bucket.frames > 1, samples[bucket]))


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


def shard_set(opened: Iterable[Opened], option: str = "--shards", cache: SampleCache | None = None) -> ShardSet:
    """Shards as one set; at least one.

    Raises:
        ShardError: they do not belong together.
        NoSamples: every clip was rejected.
    """
    # By content, so that neither the order of the words nor the folder's name enters the order of samples.
    opened = sorted(opened, key=lambda one: one.shard.header.tar_sha256)
    first, *rest = [one.shard for one in opened]
    for shard in rest:
        if shard.header.contract.fingerprint != first.header.contract.fingerprint:
            differing = first.header.contract.differences(shard.header.contract)
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
            raise _damaged(found.record, f"bytes {end:,} to {offset:,} of the tar belong to no sample")
        end = offset + length
    tar = found.tar
    try:
        try:
            tail = _tail(tar, end)
        except WholeFilesOnly:
            if cache is None:
                raise
            tar = cache.whole(tar, header.tar_sha256, header.tar_size)
            tail = _tail(tar, end)
        if tar.remote and _fault_of(tail, header):  # nothing is called damaged because a server erred once
            tail = _tail(tar, end)
    except FileNotFoundError as error:
        raise _no_such_shard(tar) from error
    if (fault := _fault_of(tail, header)) and tar.remote:
        raise StoreError(
            f"this is not the tar of its record: {fault}",
            where=tar.shown,
            fix="upload both again: the upload was cut short, or another file took the tar's place",
        )
    if fault:
        raise _damaged(tar, fault)
    if cache is not None:
        cache.protect(good["sha256"])
    return Opened(Shard(tar, header, found.empty_caption, tail.etag), table)


def _record(found: FoundTar) -> tuple[ShardHeader, pa.Table]:
    file = found.record
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
    if file.remote and not raw.startswith(_PARQUET):
        raise StoreError(
            f"the server sends something else in place of the record, beginning with {raw[:24]!r}",
            where=file.shown,
            fix="open the URL in a browser: it may be the page of a login or of a proxy",
        )
    raise ShardError(fault.what, where=file.shown, fix=fault.fix) from fault


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


def _tail(tar: StoredFile, end: int) -> ReadPart:
    """The bytes behind the samples, and the tar's size and etag."""
    tail = tar.read(end, end + _TAIL + 1)
    return tail if tail.size is not None else dataclasses.replace(tar.stat(), data=tail.data)


def _fault_of(tail: ReadPart, header: ShardHeader) -> str:
    """What is wrong with a tar's size or last bytes. The samples are hashed when read; behind them come only zeros."""
    if tail.size != header.tar_size:
        return f"the tar has {tail.size or 0:,} bytes, its record says {header.tar_size:,}"
    if len(tail.data) > _TAIL or tail.data.strip(b"\0"):
        return "there is something behind the last sample"
    return ""


def _damaged(file: StoredFile, what: str) -> ShardError:
    fix = "`cogprep verify` lists all damage; remove the shard and its record, and `cogprep encode` makes it anew"
    if file.remote:
        fix = "compare it with the copy that `cogprep encode` wrote (`cogprep verify` there), and upload it again"
    return ShardError(f"a damaged shard: {what}", where=file.shown, fix=fix)
