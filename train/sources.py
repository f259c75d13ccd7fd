"""The shards of a run: words of the command line -> records -> one table of samples.

Opening reads records only (and the last bytes of each tar). What is wrong with
a shard is found here, or when a sample is read; it is always named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import braceexpand
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogcommon.contract import EMPTY_CAPTION_FILE, Contract
from cogcommon.errors import ShardError
from cogcommon.families import Resolution
from cogcommon.names import command_line
from cogcommon.records import ShardHeader, extent_intact, read_table

from .order import Ints

_COLUMNS = [
    "key", "status", "bucket", "offset", "size", "json_offset", "json_size", "tensors_offset", "tensors_size",
    "sha256", "source_sha256",
]  # fmt: skip
_TAIL = 10240  # a tar ends with zeros, at most one record of 20 blocks
_OPEN_THREADS = 16  # records are small; over a network the wait is what counts


@dataclass(frozen=True)
class Shard:
    """A committed shard: its tar and what its record says of it."""

    path: str  # of the tar, as the file system wants it
    shown: str  # as messages name it
    fs: Any
    header: ShardHeader


@dataclass(frozen=True)
class Extent:
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

    @property
    def contract(self) -> Contract:
        return self.shards[0].header.contract

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def fingerprint(self) -> str:
        """Of the samples and their order, wherever the shards lie: hex sha256."""
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

    def extent(self, index: int) -> Extent:
        row = self.table.slice(index, 1).to_pylist()[0]
        row["bucket"] = Resolution.parse(row["bucket"])
        return Extent(**{field.name: row[field.name] for field in dataclasses.fields(Extent)})

    def without(self, held_out: ShardSet) -> ShardSet:
        """Less the samples whose key, or whose clip, is held out.

        Raises:
            ShardError: nothing is left.
        """
        same = pc.or_(
            pc.is_in(self.table["key"], held_out.table["key"].combine_chunks()),
            pc.is_in(self.table["source_sha256"], held_out.table["source_sha256"].combine_chunks()),
        )
        table = self.table.filter(pc.invert(same))
        if not table.num_rows:
            raise ShardError(
                f"all {len(self)} samples of --shards are in --validate-shards too; none is left to train on",
                where=self.shards[0].shown,
                fix="give other shards to --validate-shards (`cogprep encode --holdout N` sets some apart)",
            )
        return dataclasses.replace(self, table=table)

    def read(self, extent: Extent) -> bytes:
        """A sample's bytes, checked against its hash.

        Raises:
            ShardError: they differ, or cannot be read.
        """
        shard = self.shards[extent.shard]
        try:
            data = shard.fs.cat_file(shard.path, start=extent.offset, end=extent.offset + extent.size)
        except Exception as error:  # each file system raises its own kinds
            raise ShardError(f"sample {extent.key} cannot be read: {error}", where=shard.shown) from error
        if not extent_intact(data, extent.sha256):
            raise _damaged(shard.shown, f"sample {extent.key} is not what was written")
        return bytes(data)

    def empty_caption(self) -> bytes:
        """The stored embedding of the empty caption: safetensors with "text" (L, D).

        Raises:
            ShardError: missing beside the shards, or not the one of their contract.
        """
        shard = self.shards[0]
        path = shard.path.rsplit("/", 1)[0] + "/" + EMPTY_CAPTION_FILE
        shown = shard.shown.rsplit("/", 1)[0] + "/" + EMPTY_CAPTION_FILE if "/" in shard.shown else EMPTY_CAPTION_FILE
        try:
            data = bytes(shard.fs.cat_file(path))
        except Exception as error:
            raise ShardError(
                "the embedding of the empty caption is missing", where=shown, fix="`cogprep encode` writes it again"
            ) from error
        if hashlib.sha256(data).hexdigest() != self.contract.empty_caption_sha256:
            raise ShardError(
                "this embedding of the empty caption does not belong to the shards beside it",
                where=shown,
                fix="remove it; `cogprep encode` writes it again",
            )
        return data


def open_shards(words: Sequence[str], option: str = "--shards") -> ShardSet:
    """Open and check shards, without reading samples.

    Args:
        words: tars, globs, brace ranges, folders, URLs; as the option was given.
        option: for messages.

    Raises:
        ShardError: none there; one without a record, of another size, or encoded
            otherwise than the first; no usable sample.
    """
    paths = expand(words, option)
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        # By content, so that neither the order of the words nor the folder's name enters the order of samples.
        opened = sorted(pool.map(_open_one, paths), key=lambda one: one[0].header.tar_sha256)
    first, *rest = [shard for shard, _ in opened]
    for shard in rest:
        if shard.header.contract.fingerprint != first.header.contract.fingerprint:
            differing = first.header.contract.differences(shard.header.contract)
            raise ShardError(
                f"shards that were encoded differently: {'; '.join(differing[:4])}",
                where=f"{first.shown} here, {shard.shown} there",
                fix="train on shards of one folder, or encode all clips with the same settings",
            )
    tables = [
        table.append_column("shard", pa.array(np.full(table.num_rows, number, np.int32)))
        for number, (_, table) in enumerate(opened)
    ]
    table = pa.concat_tables(tables)
    table = table.filter(pc.equal(table["status"], "ok")).combine_chunks()
    if not table.num_rows:
        raise ShardError(
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
            fix="give each shard once, and only one copy of a folder",
        )
    buckets = sorted(Resolution.parse(name) for name in pc.unique(table["bucket"]).to_pylist())
    return ShardSet([shard for shard, _ in opened], table, buckets)


def expand(words: Iterable[str], option: str) -> list[tuple[Any, str, str]]:
    """(file system, path, shown name) of every tar that the words name, once each, in order.

    Raises:
        ShardError: a word that stands for nothing.
    """
    found: dict[str, tuple[Any, str, str]] = {}
    for word in words:
        for name in braceexpand.braceexpand(word):
            try:
                fs, path = fsspec.core.url_to_fs(name)
                prefix = name[: -len(path)] if name.endswith(path) else ""
                if any(mark in path for mark in "*?[") and not fs.exists(path):
                    matches = sorted(fs.glob(path))
                elif fs.isdir(path):
                    matches = sorted(fs.glob(path.rstrip("/") + "/*.tar"))
                else:
                    matches = [path]
            except (ImportError, ValueError, OSError) as error:
                raise ShardError(f"{name} cannot be looked up: {error}", where=option) from error
            if not matches:
                raise ShardError(
                    f"no shard matches {name}",
                    where=option,
                    fix="give the tars that `cogprep encode` wrote, for example --shards out/*.tar",
                )
            for match in matches:
                if not match.endswith(".tar"):
                    raise ShardError(
                        f"{match} is not a shard",
                        where=option,
                        fix="give the .tar files; their records lie beside them",
                    )
                shown = match if "://" in name else _as_typed(name, path, match)
                found.setdefault(match, (fs, match, prefix + match if "://" in name else shown))
    if not found:
        raise ShardError(
            f"{option} is not given",
            fix=f"{option} out/*.tar (what `cogprep encode` wrote)",
        )
    return list(found.values())


def _as_typed(name: str, absolute: str, match: str) -> str:
    """A local match relative to the working folder where the word was relative."""
    root = absolute[: -len(name)] if absolute.endswith(name) else ""
    return match[len(root) :] if root and match.startswith(root) else match


def _open_one(place: tuple[Any, str, str]) -> tuple[Shard, pa.Table]:
    fs, path, shown = place
    record = path.removesuffix(".tar") + ".parquet"
    shown_record = shown.removesuffix(".tar") + ".parquet"
    folder = shown.rpartition("/")[0] or "."
    try:
        size = fs.info(path)["size"]
    except FileNotFoundError as error:
        raise ShardError(
            "no such shard", where=shown, fix="`cogprep encode` makes what is missing; check the path"
        ) from error
    try:
        raw = fs.cat_file(record)
    except FileNotFoundError as error:
        raise ShardError(
            "a shard without its record: it was never finished",
            where=shown,
            fix="`cogprep encode` finishes an interrupted folder; "
            f"`{command_line('cogprep', 'index', folder)}` rebuilds what can be rebuilt",
        ) from error
    try:
        header, table = read_table(io.BytesIO(raw), _COLUMNS)
    except ShardError as error:
        raise ShardError(error.what, where=shown_record, fix=error.fix) from error
    if size != header.tar_size:
        raise _damaged(shown, f"the tar has {size:,} bytes, its record says {header.tar_size:,}")
    good = table.filter(pc.equal(table["status"], "ok")).sort_by("offset")
    end = 0
    for offset, length in zip(good["offset"].to_pylist(), good["size"].to_pylist(), strict=True):
        if offset != end:
            raise _damaged(shown_record, f"bytes {end:,} to {offset:,} of the tar belong to no sample")
        end = offset + length
    # The extents are hashed when read; behind them come only the zeros that end a tar.
    tail = fs.cat_file(path, start=end, end=size) if end < size else b""
    if len(tail) > _TAIL or tail.strip(b"\0"):
        raise _damaged(shown, "there is something behind the last sample")
    return Shard(path, shown, fs, header), table


def _damaged(shown: str, what: str) -> ShardError:
    return ShardError(
        f"a damaged shard: {what}",
        where=shown,
        fix="`cogprep verify` lists all damage; remove the shard and its record, and `cogprep encode` makes it anew",
    )
