"""The output folder: its committed samples, and the contract that they share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogcommon.cli.names import command_line
from cogcommon.cli.progress import stage
from cogcommon.errors import DataRootError, SettingError, ShardError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.readers import read_in_order
from cogcommon.files.typed import build, parse_object
from cogcommon.model.families import Task
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import ShardHeader, read_table, record_name, tar_name
from cogcommon.store.address import as_shown
from cogcommon.words import counted

from ..dataset.lists import DataSet, hash_of_list, read_lists
from ..settings.encode import PlanSettings
from ..source.addresses import remote_address
from ..source.clip import TONED, Hashed
from ..store.committed import committed_shards
from ..store.outlet import ABOUT_TO_WRITE_S
from ..store.proof import ORIGIN_FILE, refuse_foreign
from .holdout import Holdout

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "val"]
_Read = tuple[Split, int, "tuple[ShardHeader, pa.Table] | None"]
SPLITS: tuple[Split, ...] = ("train", "val")
_SETTLED_NS = 2_000_000_000  # a file that was written longer ago than the coarsest clock of a file system ticks
_BELIEVED_S = 10.0  # for which what a list behind an address held is believed

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
        ShardError: a record is damaged, or a tar has not the size that its record says.
    """
    samples: dict[Split, dict[str, Placed]] = {split: {} for split in SPLITS}
    waiting: dict[Split, dict[str, Waiting]] = {split: {} for split in SPLITS}
    rows: dict[Split, dict[int, int]] = {split: {} for split in SPLITS}
    hashes: dict[str, Hashed] = {}
    tone_mapped: set[str] = set()
    for split, number, found in _read_records(out):
        if found is None:
            continue
        header, table = found
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
    back = " && ".join(command_line("mv", *pair) for pair in zip(here, there, strict=True))
    return ShardError(
        f"{tar.name} is {named.name} by its record: it was renamed or copied, and `cogprep encode` goes by the names",
        where=str(tar),
        fix=f"`{back}`" if free else f"move {tar.name} and {here[1].name} to a folder of their own, or remove them",
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
        ShardError: damaged, or of another schema version.
    """
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


@dataclass(frozen=True)
class Origin:
    """Where a folder's samples came from, so that `clean-cache` and `verify` can look again."""

    data_root: str
    prompts: str
    videos: str
    images: str | None
    id_token: str
    holdout: int = 0  # clips that were asked for
    held_out: Sequence[str] = ()  # and those chosen: content hashes in hex, ascending

    @classmethod
    def of(cls, settings: PlanSettings, holdout: Holdout) -> Origin:
        """Where the samples of an encode come from, and which clips it sets aside."""
        held_out = sorted(clip.hex() for clip in holdout.clips)
        root = str(settings.root.resolve()) if remote_address(settings.root) is None else as_shown(settings.root)
        lists = settings.prompts, settings.videos, settings.images
        return cls(root, *lists, settings.id_token, holdout.count, held_out)

    @property
    def lists(self) -> str:
        """The data root and the lists in it, in words."""
        images = "" if self.images in (None, "images.txt") else f", {self.images}"
        return f"{self.data_root} ({self.videos}, {self.prompts}{images})"

    def read_lists(self, task: Task) -> DataSet:
        """The lists as they are now.

        Raises:
            DataRootError: the data root is gone.
        """
        return read_lists(
            Path(self.data_root),
            task=task,
            prompts=self.prompts,
            videos=self.videos,
            images=self.images,
            id_token=self.id_token,
        )

    def state_of_lists(self) -> tuple[str, ...]:
        """A hash of each list as it is now, empty where it cannot be read."""
        names = self.prompts, self.videos, self.images or "images.txt"
        return tuple(_hash_of(Path(self.data_root) / name) for name in names)

    def write(self, out: Path) -> None:
        refuse_foreign(out / ORIGIN_FILE)
        commit_bytes(out / ORIGIN_FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())


def _hash_of(path: Path) -> str:
    """Of a list's content. It is asked after for every sample that would go, and read only if it may have changed."""
    if remote_address(path) is not None:
        return _hash_as_it_was(path, (int(time.monotonic() / _BELIEVED_S),))
    try:
        info = path.stat()
    except OSError:
        return ""
    if time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) < _SETTLED_NS:
        return hash_of_list(path)
    return _hash_as_it_was(path, (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))


@lru_cache(maxsize=8)
def _hash_as_it_was(path: Path, state: tuple[int, ...]) -> str:
    return hash_of_list(path)


def read_origin(out: Path) -> Origin | None:
    """Where the folder came from; None if it does not say."""
    try:
        origin = build(Origin, parse_object((out / ORIGIN_FILE).read_bytes()))
        if b"\0" in b"".join(map(os.fsencode, (origin.data_root, origin.prompts, origin.videos, origin.images or ""))):
            raise ValueError("no path")
        _ = [bytes.fromhex(clip) for clip in origin.held_out]
    except (OSError, ValueError):  # also of what os.fsencode cannot take
        return None
    return origin


def remembered_holdout(out: Path, committed: Committed) -> Holdout:
    """The clips that the folder sets aside, as its origin says; an older folder says it by what is in val/."""
    origin = read_origin(out)
    if origin is not None and (origin.holdout or origin.held_out):
        return Holdout(origin.holdout, frozenset(map(bytes.fromhex, origin.held_out)))
    clips = committed.clips("val")
    return Holdout(len(clips), frozenset(clips))


def guard_other_data(out: Path, origin: Origin, dropped: int) -> None:
    """Refuse to drop samples because other data was named: by mistake, or to try something.

    Args:
        origin: of the encode that would drop them.
        dropped: samples that would go.

    Raises:
        DataRootError: the folder was encoded from another data root, or other lists, or does not say from which.
    """
    before = read_origin(out)
    if not dropped or (before is not None and before.lists == origin.lists):
        return
    was = (
        f"it was encoded from {before.lists}" if before else f"its {ORIGIN_FILE} does not say what it was encoded from"
    )
    raise DataRootError(
        f"{out} would lose {counted(dropped, 'sample')} that are not in this data",
        where=f"{was}\n       this is {origin.lists}",
        fix=f"--out ANOTHER keeps both; --replace drops them, if {out} is to follow this data from now on; "
        f"or start over, after `{command_line('cogprep', 'clean-cache', '--out', out, '--all')}`",
    )
