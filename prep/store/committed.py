"""Shards that are there: which are committed, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.cli.names import command_line
from cogcommon.errors import ShardError
from cogcommon.shards.records import SampleRow, extent_intact, shard_number, split_extent

if TYPE_CHECKING:
    import torch


def committed_shards(folder: Path) -> list[int]:
    """Numbers of the shards that have a record, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(number for name in names if (number := shard_number(name)) is not None)


def tars_without_record(folder: Path) -> list[Path]:
    """Tars that do not count: still being written, left by a killed writer, or with a lost record."""
    tars = sorted(path for path in folder.glob("*.tar") if shard_number(path.name, "tar") is not None)
    return [tar for tar in tars if not tar.with_suffix(".parquet").exists()]


def read_extent(tar: Path, row: SampleRow) -> bytes:
    """A sample's bytes, checked against its hash.

    Raises:
        OSError: the tar cannot be read.
        ShardError: the sample is damaged.
    """
    with tar.open("rb") as stream:
        stream.seek(row.offset)
        extent = stream.read(row.size)
    if not extent_intact(extent, row.sha256):
        raise ShardError(
            f"sample {row.key} is damaged",
            where=f"{tar}, bytes {row.offset} to {row.offset + row.size}",
            fix=f"`{command_line('rm', tar, tar.with_suffix('.parquet'))}`, and run `cogprep encode` again",
        )
    return extent


def read_tensors(tar: Path, row: SampleRow) -> dict[str, torch.Tensor]:
    """A sample's tensors, by the names in `cogcommon.shards.records`.

    Raises:
        ShardError: the tar cannot be read, or the sample is damaged.
    """
    import safetensors.torch

    try:
        extent = read_extent(tar, row)
    except OSError as error:
        raise ShardError(f"the shard cannot be read: {error.strerror}", where=str(tar)) from error
    return safetensors.torch.load(split_extent(extent, row)[1])
