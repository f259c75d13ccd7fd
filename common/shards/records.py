"""The record of a shard: ``NNNNNN.parquet`` beside ``NNNNNN.tar``.

A shard counts only once its record exists. One row stands for one planned
sample, rejected ones too. Offsets and hashes cover a sample's whole extent in
the tar (headers, members and padding, one contiguous range), so one read gives
a sample and one hash answers for every byte of it. A sample that a passing fault
kept out has no row; the header keeps its place, for the next run to fill.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ShardError
from ..files.atomic import commit_bytes
from ..files.failures import disk_error
from ..files.typed import parse_object
from ..libraries import hidden
from .contract import Contract

with hidden("pandas"):  # pyarrow looks for it once, and imports it, half a second's work, where it is installed
    pa.array([0])

# Members of a sample: <key>.json and <key>.safetensors. Tensors in the latter:
LATENT_MEAN = "latent_mean"  # (C, F', h, w), unscaled posterior mean; or the sample itself
LATENT_STD = "latent_std"  # (C, F', h, w), posterior standard deviation; absent with --posterior sample
TEXT = "text"  # (L, D), last hidden state of T5
# A condition is one tensor under its name, used as it is; or NAME_mean, K variants of which training draws one, with
# NAME_std where moments are stored, and NAME_clean_mean, which validation takes.
IMAGE = "image"  # I2V's first frame
IMAGE_MEAN = f"{IMAGE}_mean"  # (K, C, 1, h, w), K pre-noised first frames
IMAGE_STD = f"{IMAGE}_std"
IMAGE_CLEAN_MEAN = f"{IMAGE}_clean_mean"  # (C, 1, h, w), the first frame as it is
IMAGE_CLEAN_STD = f"{IMAGE}_clean_std"

_Bytes = TypeVar("_Bytes", bytes, memoryview)

_METADATA_KEY = b"cogtune"
_CHECK_KEY = b"cogtune.sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One planned sample. Offsets are bytes from the start of the tar; times are seconds.

    A sample has no extent until it is written, and a rejected one never.
    """

    key: str  # digits, letters, underscores
    status: str  # "ok" or "rejected"
    reason: str = ""  # why it was rejected
    bucket: str  # FxHxW
    offset: int = -1  # of the extent
    size: int = -1
    json_offset: int = -1
    json_size: int = -1
    tensors_offset: int = -1
    tensors_size: int = -1
    sha256: bytes = b""  # of the extent
    caption: str
    caption_tokens: int
    caption_truncated: bool
    source: str  # as the list names it, with the part of the clip if it names one: a.mp4#t=12.5,18
    source_line: int  # from 1
    source_size: int
    source_mtime_ns: int
    source_sha256: bytes  # of the file's content; of a part, of that and of its times
    image: str  # as the list names it; empty without one
    image_sha256: bytes
    frames: list[int]  # indices of the source frames picked, from the first of the part
    effective_fps: float  # of the picked frames, in source time
    crop_box: list[int]  # left, top, right, bottom in the upright, square-pixel source
    colour: str  # decision, for example "bt709 limited (tagged)"
    tiled: bool  # whether the VAE ran in tiles


_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "list[int]": pa.list_(pa.field("element", pa.int32())),  # the name Parquet gives it
}
SCHEMA = pa.schema([pa.field(field.name, _TYPES[str(field.type)], nullable=False) for field in fields(SampleRow)])


@dataclass(frozen=True)
class ShardHeader:
    """What a record says of its tar as a whole."""

    number: int
    tar_size: int
    tar_sha256: str
    contract: Contract
    waiting: Sequence[tuple[int, str]] = ()  # planned samples that a passing fault kept out: place and key


@dataclass(frozen=True)
class ShardRecord:
    header: ShardHeader
    rows: Sequence[SampleRow]

    @classmethod
    def of(
        cls, number: int, tar: tuple[int, str], contract: Contract, places: Sequence[SampleRow | str]
    ) -> ShardRecord:
        """A record of what `places` gives.

        Args:
            tar: its size and sha256.
        """
        waiting = tuple((place, key) for place, key in enumerate(places) if isinstance(key, str))
        rows = [row for row in places if isinstance(row, SampleRow)]
        return cls(ShardHeader(number, *tar, contract, waiting), rows)

    @property
    def places(self) -> list[SampleRow | str]:
        """The samples in planned order; of one that waits, its key."""
        places: list[SampleRow | str] = [*self.rows]
        for place, key in sorted(self.header.waiting):
            places.insert(place, key)
        return places


def tar_name(number: int) -> str:
    return f"{number:06d}.tar"


def record_name(number: int) -> str:
    return f"{number:06d}.parquet"


def shard_number(name: str, kind: str = "parquet") -> int | None:
    """The number in the name of a record, or of a tar; None for any other name."""
    digits, _, suffix = name.partition(".")
    if suffix != kind or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        return None
    return int(digits) if digits == f"{int(digits):06d}" else None


def number_in_record(path: Path) -> int | None:
    """The number that a record of ours says in its header; None if it is none, or its header is damaged."""
    try:
        metadata = pq.read_schema(pa.BufferReader(path.read_bytes())).metadata or {}
        text = metadata[_METADATA_KEY]
        if hashlib.sha256(text).hexdigest().encode() == metadata[_CHECK_KEY]:
            return int(parse_object(text)["number"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        pass
    return None


def write_record(record: ShardRecord, path: Path) -> None:
    """Commit a record; from then on the shard counts."""
    commit_bytes(path, record_bytes(record))


def record_bytes(record: ShardRecord) -> bytes:
    """The record as Parquet. The same record gives the same bytes."""
    header: dict[str, Any] = {
        "number": record.header.number,
        "tar_size": record.header.tar_size,
        "tar_sha256": record.header.tar_sha256,
        "contract": record.header.contract.to_json(),
    }
    if record.header.waiting:
        header["waiting"] = [list(place_and_key) for place_and_key in record.header.waiting]
    columns = {field.name: [getattr(row, field.name) for row in record.rows] for field in fields(SampleRow)}
    # Parquet checks its pages, but not its footer, where the header lies.
    text = json.dumps(header).encode()
    metadata = {_METADATA_KEY: text, _CHECK_KEY: hashlib.sha256(text).hexdigest().encode()}
    table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_record(path: Path) -> ShardRecord:
    """Read a whole record.

    Raises:
        ShardError: damaged, or no record of ours.
    """
    header, table = read_table(path)
    return ShardRecord(header, [SampleRow(**row) for row in table.to_pylist()])


def read_table(path: Path | io.BytesIO, columns: list[str] | None = None) -> tuple[ShardHeader, pa.Table]:
    """Header and rows of a record, with only the columns that are needed.

    Raises:
        ShardError: damaged, or no record of ours.
    """
    where = str(path) if isinstance(path, Path) else "record"
    try:
        # Read here: pyarrow takes no path that is not UTF-8, and its threads must not need Python, which may be ending.
        data = path.read_bytes() if isinstance(path, Path) else path.getvalue()
        # Not pq.read_table: it takes three times as long for a file as small as this.
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(columns, use_threads=False)
        wanted = [SCHEMA.field(name) for name in columns or SCHEMA.names]
        if {(field.name, field.type) for field in table.schema} != {(field.name, field.type) for field in wanted}:
            raise ValueError(f"its columns are {table.schema.to_string(show_schema_metadata=False)}")
        text = table.schema.metadata[_METADATA_KEY]
        if hashlib.sha256(text).hexdigest().encode() != table.schema.metadata[_CHECK_KEY]:
            raise ValueError("its header is not what was written")
        header = parse_object(text)
        contract, waiting = header.pop("contract"), header.pop("waiting", [])
        if [[type(place), type(key)] for place, key in waiting] != [[int, str]] * len(waiting):
            raise ValueError("its header is not one of this version")
        if [type(header[name]) for name in ("number", "tar_size", "tar_sha256")] != [int, int, str] or len(header) != 3:
            raise ValueError("its header is not one of this version")
    except FileNotFoundError as error:
        raise ShardError(
            "the record is missing",
            where=where,
            fix="`cogprep encode` finishes an interrupted folder; `cogprep index OUT` says what else is there",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have no number
            raise disk_error(error, error.errno, Path(where)) from error
        raise ShardError(
            f"the record is damaged: {' '.join(str(error).split())}",
            where=where,
            fix="remove it and run `cogprep encode` again; it makes this shard anew",
        ) from error
    header["waiting"] = tuple((place, key) for place, key in waiting)
    return ShardHeader(contract=Contract.from_json(contract, where=where), **header), table


def split_extent(extent: _Bytes, row: SampleRow | dict[str, Any]) -> tuple[dict[str, Any], _Bytes]:
    """The json and the safetensors bytes of a sample, from its extent; of a memoryview without a copy.

    Args:
        row: gives offset, json_offset, json_size, tensors_offset, tensors_size.
    """
    get = row.__getitem__ if isinstance(row, dict) else lambda name: getattr(row, name)
    info_at, tensors_at = get("json_offset") - get("offset"), get("tensors_offset") - get("offset")
    info = extent[info_at : info_at + get("json_size")]
    return json.loads(bytes(info)), extent[tensors_at : tensors_at + get("tensors_size")]


def extent_intact(extent: bytes | bytearray, sha256: bytes) -> bool:
    return hashlib.sha256(extent).digest() == sha256
