"""A sample as bytes: its extent in a tar.

Two headers, the json, the safetensors, padding: one contiguous run. A tar is
extents back to back and zeros at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from cogcommon.shards.records import SampleRow

if TYPE_CHECKING:
    import torch

# What the json member says beside key and tensors_sha256: only what follows from the content of
# the input, never a time or a line number, so that the same input gives the same bytes.
INFO_FIELDS = (
    "caption",
    "caption_tokens",
    "caption_truncated",
    "source",
    "image",
    "bucket",
    "frames",
    "effective_fps",
    "crop_box",
    "colour",
    "tiled",
)
# Of these, what only encoding finds out; the rest is known to the plan.
FOUND_FIELDS = ("caption_tokens", "caption_truncated", "frames", "effective_fps", "crop_box", "colour", "tiled")


_OWNER = "cogprep"  # user and group of every member
_MOST_TEXT = 1 << 24  # bytes of a json member, far more than any


@dataclasses.dataclass(frozen=True)
class TarExtent:
    """A sample as it lies in a tar. ``data`` is kept only until it is written."""

    info: Mapping[str, Any]
    offset: int
    size: int
    json_size: int
    tensors_size: int
    sha256: bytes
    data: bytes = b""

    def placed(self, row: SampleRow, offset: int) -> SampleRow:
        json_offset = offset + tarfile.BLOCKSIZE
        return dataclasses.replace(
            row,
            offset=offset,
            size=self.size,
            json_offset=json_offset,
            json_size=self.json_size,
            tensors_offset=json_offset + _padded(self.json_size) + tarfile.BLOCKSIZE,
            tensors_size=self.tensors_size,
            sha256=self.sha256,
        )


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def make_extent(row: SampleRow, tensors: Mapping[str, torch.Tensor]) -> TarExtent:
    """A sample's bytes. safetensors sorts by type and name, json by key: the same sample, the same bytes."""
    import safetensors.torch
    import webdataset  # brings torch, which looking at shards has no need of

    payload = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    info = {"key": row.key, "tensors_sha256": hashlib.sha256(payload).hexdigest()}
    info |= {name: getattr(row, name) for name in INFO_FIELDS}
    text = json.dumps(info, sort_keys=True, ensure_ascii=False).encode()
    sink = io.BytesIO()
    writer = webdataset.TarWriter(sink, user=_OWNER, group=_OWNER, encoder=False, mtime=0)
    writer.write({"__key__": row.key, "json": text, "safetensors": payload})
    size = writer.tarstream.offset  # closing adds the end mark, which is not part of the sample
    writer.close()
    data = sink.getvalue()[:size]
    assert size == 2 * tarfile.BLOCKSIZE + _padded(len(text)) + _padded(len(payload)), "a header of more than a block"
    return TarExtent(info, -1, size, len(text), len(payload), hashlib.sha256(data).digest(), data)


def whole_extents(stream: IO[bytes]) -> Iterator[TarExtent]:
    """The extents at the front of a tar, up to the first that is not whole and true to its own hash."""
    stream.seek(0)
    while True:
        offset = stream.tell()
        text_member = _read_member(stream)
        payload_member = _read_member(stream)
        if text_member is None or payload_member is None:
            return
        try:
            info = json.loads(text_member.payload)
            whole = info["tensors_sha256"] == hashlib.sha256(payload_member.payload).hexdigest()
            named = (text_member.name, payload_member.name) == (f"{info['key']}.json", f"{info['key']}.safetensors")
        except (ValueError, KeyError, TypeError):
            return
        if not (whole and named and info.keys() >= set(FOUND_FIELDS)):
            return
        data = text_member.raw + payload_member.raw
        yield TarExtent(
            info,
            offset,
            len(data),
            len(text_member.payload),
            len(payload_member.payload),
            hashlib.sha256(data).digest(),
            data,
        )


def holds_samples(tar: Path) -> bool:
    """Whether a tar begins with a sample that is there to its end, by its headers and the tar's size alone.

    A tar behind an address has a stand-in here that holds no more than these.
    """
    with tar.open("rb") as stream:
        names = []
        for _ in range(2):
            if (member := _read_header(stream)) is None:
                return False
            names.append(member.name)
            stream.seek(_padded(member.size), os.SEEK_CUR)
        key = names[0].removesuffix(".json")
        return names == [f"{key}.json", f"{key}.safetensors"] and stream.tell() <= os.fstat(stream.fileno()).st_size


@dataclasses.dataclass(frozen=True)
class _Member:
    name: str
    payload: bytes
    raw: bytes  # header, payload, padding


def _read_member(stream: IO[bytes]) -> _Member | None:
    member = _read_header(stream)
    if member is None:
        return None
    body = stream.read(_padded(member.size))
    if len(body) < _padded(member.size):
        return None
    return _Member(member.name, body[: member.size], member.raw + body)


class _Header(NamedTuple):
    name: str
    size: int
    raw: bytes


def _read_header(stream: IO[bytes]) -> _Header | None:
    raw = stream.read(tarfile.BLOCKSIZE)
    try:
        member = tarfile.TarInfo.frombuf(raw, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return None
    return _Header(member.name, member.size, raw)


def signed(path: Path) -> bool:
    """Whether our writer began a tar: by its first member, or because it is the tar of a shard without samples."""
    with path.open("rb") as stream:
        header = stream.read(tarfile.BLOCKSIZE)
        if not any(header):
            rest = stream.read(tarfile.RECORDSIZE)
            return len(header) + len(rest) == tarfile.RECORDSIZE and not any(rest)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            if (member.uname, member.gname) != (_OWNER, _OWNER) or member.size > _MOST_TEXT:
                return False
            info = json.loads(stream.read(member.size))
            return bool(member.name == f"{info['key']}.json" and info["tensors_sha256"])
        except (tarfile.HeaderError, ValueError, KeyError, TypeError, RecursionError):
            return False


def finish_tar(stream: IO[bytes]) -> tuple[int, str]:
    """Write the end mark (two zero blocks, filled up to a record of 10,240 bytes as tar does), fsync, hash."""
    size = stream.tell()
    total = -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    stream.write(bytes(total - size))
    stream.flush()
    os.fsync(stream.fileno())
    stream.seek(0)
    return total, hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def tar_end_whole(stream: IO[bytes], end: int) -> tuple[int, str] | None:
    """Size and sha256 of a tar whose extents end at ``end``; None if what follows is not an end mark."""
    stream.seek(end)
    tail = stream.read()
    whole = len(tail) >= 2 * tarfile.BLOCKSIZE and (end + len(tail)) % tarfile.RECORDSIZE == 0 and not any(tail)
    if not whole:
        return None
    stream.seek(0)
    return end + len(tail), hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
