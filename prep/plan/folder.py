"""The output folder: its committed samples, and the contract that they share."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogcommon.cli.names import command_line
from cogcommon.cli.progress import stage
from cogcommon.errors import SettingError, ShardError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.readers import read_in_order
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import ShardHeader, read_table, record_name, tar_name

from ..source.clip import TONED, Hashed
from ..store.committed import committed_shards
from ..store.outlet import ABOUT_TO_WRITE_S
from ..store.proof import is_ours

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "val"]
_Read = tuple[Split, int, "tuple[ShardHeader, pa.Table] | None"]
SPLITS: tuple[Split, ...] = ("train", "val")

_SCANNED = ["key", "status", "reason", "source", "source_size", "source_mtime_ns", "source_sha256", "colour"]


def split_folder(out: Path, split: Split) -> Path:
    return out if split == "train" else out / "val"


def shard_label(split: Split, number: int) -> str:
    """A shard as it is found in the folder: 000003.tar, val/000000.tar."""
    return tar_name(number) if split == "train" else f"{split}/{tar_name(number)}"


@dataclass(frozen=True, slots=True)
class Placed:
    """A sample that a committed shard holds, or has rejected."""

    number: int
    reason: str  # why it was rejected; empty if it is there
    source_sha256: bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sample that a committed shard has a place for, and nothing in it yet."""

    number: int
    place: int
    rejected: bool = False  # and that the record says so of, with a reason


def _nothing() -> Mapping[Split, Mapping[Any, Any]]:
    return {split: {} for split in SPLITS}


@dataclass(frozen=True)
class Committed:
    """Everything that the records of a folder say, by split and key.

    A sample that two shards of a split hold (the lists changed while several processes encoded) is where it is first.
    """

    samples: Mapping[Split, Mapping[str, Placed]]
    hashes: Mapping[str, Hashed]  # by source, as the list names it
    waiting: Mapping[Split, Mapping[str, Waiting]] = field(default_factory=_nothing)
    rows: Mapping[Split, Mapping[int, int]] = field(default_factory=_nothing)  # of each shard's record
    tone_mapped: Set[str] = frozenset()  # sources that are HDR
    out: Path | None = None  # the folder, for what is looked up only seldom

    def clips(self, split: Split) -> set[bytes]:
        """Content hashes of the clips that a split has."""
        return {placed.source_sha256 for placed in self.samples[split].values()} - {b""}


def scan(out: Path, *, retry_rejected: bool = False) -> Committed:
    """Read the records of a folder.

    Args:
        retry_rejected: a rejected sample counts as one that waits.

    Raises:
        ShardError: a record is damaged; a tar has not the size, the name or the contract that its record says.
    """
    samples: dict[Split, dict[str, Placed]] = {split: {} for split in SPLITS}
    waiting: dict[Split, dict[str, Waiting]] = {split: {} for split in SPLITS}
    rows: dict[Split, dict[int, int]] = {split: {} for split in SPLITS}
    hashes: dict[str, Hashed] = {}
    tone_mapped: set[str] = set()
    contract = contract_if_there(out)
    for split, number, found in _read_records(out):
        if found is None:
            continue
        header, table = found
        if contract is not None and header.contract.fingerprint != contract.fingerprint:
            raise _of_another_folder(out, shard_label(split, number), contract, header.contract)
        columns = [table.column(name).to_pylist() for name in _SCANNED]
        rows[split][number] = table.num_rows
        again: set[str] = set()
        for key, _status, reason, source, size, mtime_ns, sha256, colour in zip(*columns, strict=True):
            hashes[source] = Hashed(size, mtime_ns, sha256)
            if TONED in colour:
                tone_mapped.add(source)
            if reason and retry_rejected:
                again.add(key)
            elif (first := samples[split].get(key)) is None or (first.reason and not reason):
                samples[split][key] = Placed(number, reason, sha256)
        if lacking := again.union(key for _, key in header.waiting):
            order = columns[0]
            for place, key in header.waiting:
                order.insert(place, key)
            waiting[split] |= {
                key: Waiting(number, place, key in again) for place, key in enumerate(order) if key in lacking
            }
    return Committed(samples, hashes, waiting, rows, tone_mapped, out)


def _read_records(out: Path) -> Iterator[_Read]:
    records = list(records_in(out))
    with stage("reading the records", len(records), "shard") as bar:
        for read in read_in_order(_read_one, records):
            yield read
            bar.advance()


def _read_one(place: tuple[Split, int, Path]) -> _Read:
    """A shard's record; None where the tar is gone: `recover_folder` removes it, unless a live process is at it."""
    split, number, path = place
    header, table = read_table(path, _SCANNED)
    tar = path.with_suffix(".tar")
    if header.number != number:
        raise _renamed(tar, tar.with_name(tar_name(header.number)))
    if not tar.exists():
        if tar.is_symlink():
            raise ShardError(
                f"{tar.name} is a link to {tar.readlink()}, and nothing is there",
                where=str(tar),
                fix="mount the disk that it leads to; "
                f"or `{command_line('rm', tar, path)}`, and run `cogprep encode` again, which makes the shard anew",
            )
        return split, number, None
    _check_size(tar, header.tar_size)
    return split, number, (header, table)


def _of_another_folder(out: Path, shard: str, contract: Contract, theirs: Contract) -> ShardError:
    """The error for a shard that was encoded with other settings than its folder; an encode would drop it."""
    return ShardError(
        f"{shard} was encoded with other settings than {CONTRACT_FILE} says: "
        + "; ".join(theirs.differences(contract)[:4]),
        where=str(out),
        fix=f"move it and its record back to where they were; `{command_line('cogprep', 'verify', out)}` names all",
    )


def _check_size(tar: Path, recorded: int) -> None:
    # A full check reads every byte (`verify`); this one costs nothing and finds what copying cuts short.
    size = tar.stat().st_size
    if size != recorded:
        raise ShardError(
            f"{tar.name} has {size} bytes; its record says {recorded}",
            where=str(tar),
            fix=f"`{command_line('rm', tar, tar.with_suffix('.parquet'))}`, and run `cogprep encode` again",
        )


def _renamed(tar: Path, named: Path) -> ShardError:
    """The error for a shard that has the name of another number; to train on, any name will do.

    Args:
        named: as its record calls it.
    """
    here, there = (tar, tar.with_suffix(".parquet")), (named, named.with_suffix(".parquet"))
    free = not any(os.path.lexists(path) for path in there)
    back = " and ".join(f"`{command_line('mv', *pair)}`" for pair in zip(here, there, strict=True))
    return ShardError(
        f"{tar.name} is {named.name} by its record: it was renamed or copied, and `cogprep encode` goes by the names",
        where=str(tar),
        fix=back if free else f"move {tar.name} and {here[1].name} to a folder of their own, or remove them",
    )


def records_in(out: Path) -> Iterator[tuple[Split, int, Path]]:
    """Split, number and record of every committed shard of a folder."""
    for split in SPLITS:
        folder = split_folder(out, split)
        for number in committed_shards(folder):
            yield split, number, folder / record_name(number)


def read_contract(out: Path) -> Contract | None:
    """The folder's contract; None where there is none yet.

    Raises:
        ShardError: damaged, or of another schema version; or lost, for it was there before the first shard.
    """
    contract = contract_if_there(out)
    if contract is None and any(is_ours(record) for _, _, record in records_in(out)):
        raise ShardError(
            f"{CONTRACT_FILE} is lost, by which it is known how these shards were encoded",
            where=str(out / CONTRACT_FILE),
            fix=f"`{command_line('cogprep', 'index', out)}` takes it from the record of a shard",
        )
    return contract


def contract_if_there(out: Path) -> Contract | None:
    """As `read_contract`, but None where it is lost, too."""
    path = out / CONTRACT_FILE
    return Contract.from_json(path.read_bytes(), where=str(path)) if path.exists() else None


def check_contract(out: Path, ours: Contract) -> Contract | None:
    """The folder's contract if it agrees with ours, None if there is none.

    Raises:
        SettingError: it differs; the message names every difference and the choices.
    """
    theirs = read_contract(out)
    if theirs is not None and theirs.fingerprint != ours.fingerprint:
        raise SettingError(
            f"{out} was encoded with other settings; the two never mix",
            where="\n       ".join(f"{line} ({CONTRACT_FILE})" for line in ours.differences(theirs)),
            fix=f"use the old settings; or keep both, with --out ANOTHER; or start over, "
            f"after `{command_line('cogprep', 'clean-cache', '--out', out, '--all')}`",
        )
    return theirs


def commit_contract(out: Path, ours: Contract, empty_caption: bytes) -> Contract:
    """Write contract and empty caption, unless another worker was first: then theirs count.

    The contract comes first, so that a folder never holds an empty caption that nothing speaks for: one that a killed
    run of another model had left would be taken for ours.

    Raises:
        SettingError: theirs differs from ours.
        ShardError: the empty caption that lies there is not the contract's, or ours would not be.
    """
    path = out / EMPTY_CAPTION_FILE
    digest = hashlib.sha256(empty_caption).hexdigest()
    ours = dataclasses.replace(ours, empty_caption_sha256=digest)
    commit_bytes(out / CONTRACT_FILE, ours.to_json().encode(), exclusive=True)
    theirs = check_contract(out, ours)
    assert theirs is not None
    if theirs.empty_caption_sha256 == digest:
        commit_bytes(path, empty_caption, exclusive=True)
    else:  # on another GPU a caption's last bits differ; the one who wrote the contract is about to write its own
        deadline = time.monotonic() + ABOUT_TO_WRITE_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != theirs.empty_caption_sha256:
        there = path.exists()
        raise ShardError(
            f"{EMPTY_CAPTION_FILE} is not the one that the contract names" if there else f"no {EMPTY_CAPTION_FILE}",
            where=str(path),
            fix=(f"`{command_line('rm', path)}`, and " if there else "")
            + "run the same command again on the device that made these shards",
        )
    return theirs
