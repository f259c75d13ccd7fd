"""The samples of a run's shards, as one table; each is checked against its hash when it is read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogcommon.errors import ShardError, StoreError
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import ShardHeader, extent_intact
from cogcommon.store.store import TRAINING, Stop, StoredFile
from cogcommon.words import counted

from ..store.cache import SampleCache
from ..store.cached_tar import CachedTar
from .caption_draw import CaptionDraw, Ints, hash_words
from .shard_faults import check_sent, is_replaced, was_replaced, why_wrong


@dataclass(frozen=True)
class Shard:
    """A committed shard: its tar and what its record says of it."""

    file: StoredFile
    header: ShardHeader
    record: StoredFile
    empty_caption: StoredFile  # of the folder that the tar lies in
    etag: str = ""  # of the tar, when it was opened

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def shown(self) -> str:
        """The name of the tar in messages."""
        return self.file.shown

    @property
    def copy(self) -> CachedTar | None:
        """The cache's copy, where its server gives no parts of the tar."""
        return self.file.store if isinstance(self.file.store, CachedTar) else None


class NoSamples(ShardError):
    """Shards that are as they should be, and hold nothing to train on."""


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
    """All usable samples of some shards that were encoded alike, but for `OF_THE_CLIPS`."""

    shards: Sequence[Shard]
    table: pa.Table  # what `shards` reads of the records, and "shard": one row a sample
    buckets: Sequence[Resolution]
    cache: SampleCache | None = None

    @property
    def contract(self) -> Contract:
        """Of the first shard by content; the others' say the same of all that a model depends on."""
        return self.shards[0].header.contract

    @property
    def id_tokens(self) -> set[str]:
        """The words that stand before captions; an empty one where some captions have none."""
        return {str(shard.header.contract.settings.get("id_token", "")) for shard in self.shards}

    @property
    def id_token(self) -> str:
        """The word that was taught, maybe beside clips without one; empty where there is none, or more than one."""
        words = self.id_tokens - {""}
        return words.pop() if len(words) == 1 else ""

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
        cache = self._cache_of(extent)
        if cache is not None and (kept := cache.get(extent.sha256)) is not None:
            return kept
        data = self._fetch(extent, stop)
        if not extent_intact(data, extent.sha256):
            shard, again = self.shards[extent.shard], self._fetch(extent, stop, doubted=True)
            if not extent_intact(again, extent.sha256):
                raise why_wrong(extent, shard, data, again)
            if shard.copy is None:
                shard.file.count("a sample came with other bytes")
            data = again
        if cache is not None:
            cache.put(extent.sha256, data)
        return data

    def fetch_ahead(self, index: int, stop: Stop | None = None) -> None:
        """Bring a sample of a remote shard into the cache, if there is one and it has room. Raises as `read`."""
        extent = self.extent(index)
        cache = self._cache_of(extent)
        if cache is not None and cache.takes(extent.size) and not cache.has(extent.sha256):
            self.read(extent, stop)

    def _cache_of(self, extent: SampleExtent) -> SampleCache | None:
        """What keeps a sample, if it lies elsewhere and is not in a tar that the cache has whole."""
        shard = self.shards[extent.shard]
        return self.cache if shard.file.remote and shard.copy is None else None

    def _fetch(self, extent: SampleExtent, stop: Stop | None, *, doubted: bool = False) -> bytearray:
        """A sample's bytes from where the shard lies.

        Args:
            doubted: they came wrong before: a copy in the cache is looked at, and fetched again where it is damaged.
        """
        shard = self.shards[extent.shard]
        file = shard.file
        try:
            if doubted and shard.copy:
                shard.copy.check()
            return file.read(extent.offset, extent.offset + extent.size, TRAINING, stop).data
        except ShardError:  # of a tar that was fetched whole
            if is_replaced(shard):
                raise was_replaced(extent, shard) from None
            raise
        except FileNotFoundError as error:
            raise StoreError(
                f"sample {extent.key} cannot be read: the shard is gone, which was there when the run was opened",
                where=file.shown,
                fix="put it back; the same command goes on from the last checkpoint of --out",
            ) from error

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
        check_sent(file, data, "the embedding of the empty caption", right=data[8:9] == b"{")  # as safetensors do
        raise ShardError(
            "this embedding of the empty caption does not belong to the shards beside it",
            where=file.shown,
            fix="remove it; `cogprep encode` writes it again",
        )


def usual_sizes(samples: Mapping[Resolution, int]) -> list[Resolution]:
    """The sizes of clips, that of the most first; those of pictures where there are no clips.

    Args:
        samples: how many there are of each bucket.
    """
    ranked = sorted(samples, key=lambda bucket: (bucket.frames > 1, samples[bucket]), reverse=True)
    return [bucket for bucket in ranked if (bucket.frames > 1) == (ranked[0].frames > 1)]
