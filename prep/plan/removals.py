"""What `cogprep clean-cache` can remove of an output folder, and why; what may not go is not in it.

What can go: what a killed run left half-written, tars and records without their other half, samples that the data root
no longer has, and, if everything is to go, all that was derived. Only what `cogprep.store.proof` proves to be ours is
ever in it, and never a file that a live process writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogcommon.files.atomic import TEMPORARY
from cogcommon.files.locks import locked_elsewhere, may_lock
from cogcommon.files.ownership import RECORD_FILE, is_file, is_folder, refuse_data_root
from cogcommon.shards.records import number_in_record, read_table, record_name, shard_number, tar_name
from cogcommon.words import counted

from ..store.extents import holds_samples
from ..store.locks import is_at_work, temporary_name
from ..store.proof import (
    A_PREVIEW,
    OF_THE_SHARDS,
    PREVIEW,
    SHARD_TEMPORARY,
    SURVEY,
    is_ours,
    is_output,
    preview_record,
)
from .folder import SPLITS, Split, records_in, split_folder
from .stale import Wanted


@dataclass(frozen=True)
class Removal:
    """One thing to remove: a file, or samples of a shard."""

    path: Path
    why: str
    size: int  # bytes that it frees
    state: tuple[int, int]  # inode and time of change: what was listed is what goes
    shard: tuple[Split, int] | None = None  # that it belongs to
    gone: frozenset[str] = frozenset()  # keys of samples to take out; the rest of the shard stays


def _removal(
    path: Path, why: str, shard: tuple[Split, int] | None = None, size: int = -1, gone: frozenset[str] = frozenset()
) -> Iterator[Removal]:
    """One, or none if the file is gone by now: runs come and go."""
    with suppress(FileNotFoundError):
        now = path.stat()
        yield Removal(path, why, now.st_size if size < 0 else size, (now.st_ino, now.st_mtime_ns), shard, gone)


def folders_of(out: Path) -> dict[Split, Path]:
    """Where shards lie. A link is not followed."""
    return {split: split_folder(out, split) for split in SPLITS if split == "train" or is_folder(out / split)}


def find_removals(out: Path, *, everything: bool, say: Callable[[str], None]) -> Iterator[Removal]:
    """What can go. Nothing is called stale where the data root cannot be read.

    Raises:
        SettingError: ``out`` is a data root.
        ShardError: a record is damaged.
    """
    if not out.is_dir():
        return
    refuse_data_root(out, "--out")
    if not is_output(out):
        say(f"{out} was not made by cogprep: there is neither a contract of its own in it, nor a record of a shard")
        return
    of_shards: list[Removal] = []
    for split, folder in folders_of(out).items():
        for number in sorted({number for number, _ in _shard_files(folder)}):
            # A writer locks its temporary tar, and between renaming it and the record the tar itself.
            tar = folder / tar_name(number)
            held = [*filter(locked_elsewhere, [folder / temporary_name(number), *filter(is_file, [tar])])]
            if refused := [path for path in held if not may_lock(path)]:
                say(f"no permission: {refused[0]}; its shard stays until you may read and write it (`ls -l`, `chmod`)")
            elif not held:
                of_shards += of_shard(folder, split, number, everything)
    yield from of_shards
    stay = is_at_work(out) or any_shard_left(out, {removal.path for removal in of_shards})
    yield from beside_shards(out, everything, stay)
    if everything and stay and (kept := [name for name in OF_THE_SHARDS if is_ours(out / name)]):
        say(f"kept for the shards that stay or are being written: {', '.join(kept)}")
    if not everything:
        yield from _stale(out, say)


def _shard_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """All that lies in a folder under a name of a shard, with the shard's number."""
    for path in folder.iterdir():
        for kind in ("tar", "parquet"):
            if (number := shard_number(path.name, kind)) is not None:
                yield number, path
        if half := SHARD_TEMPORARY.fullmatch(path.name):
            yield int(half[1]), path


def any_shard_left(out: Path, without: Collection[Path] = ()) -> bool:
    """Whether there is anything of any shard, beside the files of ``without``."""
    return any(path not in without for folder in folders_of(out).values() for _, path in _shard_files(folder))


def of_shard(folder: Path, split: Split, number: int, everything: bool) -> Iterator[Removal]:
    """What can go of a shard, as it is at this moment."""
    tar, record = folder / tar_name(number), folder / record_name(number)
    if (folder / f".{record.name}.new").exists():
        return  # a rewrite that the next writer finishes
    half = folder / temporary_name(number)
    reasons = {half: f"half-written{_worth(half)}", folder / f".{tar.name}.new": "half-written"}
    if not os.path.lexists(record):
        reasons |= {tar: f"a tar without a record{_worth(tar)}"}
    elif not os.path.lexists(tar):
        reasons |= {record: "a record without a tar"}
    elif everything and number_in_record(record) in (None, number):  # else somebody has renamed or copied the shard
        reasons |= {record: "the record of a shard", tar: "a shard"}
    for path, why in reasons.items():
        if is_ours(path):
            yield from _removal(path, why, (split, number))


def _worth(tar: Path) -> str:
    """What to say of a tar that does not count yet, and out of which the next writer takes samples (`ShardWriter`)."""
    with suppress(OSError):
        if is_file(tar) and holds_samples(tar):
            return ", with finished clips that the same `cogprep encode` takes over"
    return ""


def beside_shards(out: Path, everything: bool, shards_stay: bool) -> Iterator[Removal]:
    """Files of a folder that belong to no shard, in the order in which they go.

    Args:
        shards_stay: whether any shard does, or may come; then what tells of the shards stays, too.
    """
    folders = [*folders_of(out).values(), *(out / name for name in (SURVEY, PREVIEW) if is_folder(out / name))]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if TEMPORARY.fullmatch(path.name) and is_file(path) and not locked_elsewhere(path):
                yield from _removal(path, "half-written")
    if not everything:
        return
    for folder in folders:
        if (made := preview_record(folder)) and made.by == A_PREVIEW:
            files = [folder / name for name in sorted(made.files) if made.owns(name)]
            for path in [*files, *filter(is_file, [folder / RECORD_FILE])]:
                yield from _removal(path, "a preview")
    for path in [*_files(out / SURVEY), *sorted(_files(out), key=_when)]:
        if shards_stay and path.parent == out and path.name in OF_THE_SHARDS:
            continue
        belongs = any(shard_number(path.name, kind) is not None for kind in ("tar", "parquet"))
        if is_ours(path) and not (belongs or TEMPORARY.fullmatch(path.name) or SHARD_TEMPORARY.fullmatch(path.name)):
            what = "what was found out about clips" if path.parent.name == SURVEY else "settings or a report"
            yield from _removal(path, what)


def _when(path: Path) -> int:
    return OF_THE_SHARDS.index(path.name) if path.name in OF_THE_SHARDS else -1


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and (folder.name != SURVEY or is_folder(folder)) else []


def _stale(out: Path, say: Callable[[str], None]) -> Iterator[Removal]:
    """Samples whose clip, caption or image the data root no longer has, by content."""
    wanted = Wanted(out)
    if why := wanted.unknown():
        say(f"no sample is called stale: {why}")
        return
    if wanted.kept:
        say(f"{counted(wanted.kept, 'sample')} kept: in the lists of the data root, but not to be read now")
    folders = folders_of(out)
    for split, number, path in records_in(out):
        tar = path.with_suffix(".tar")
        if split not in folders or not (is_ours(tar) and is_ours(path)):
            continue
        rows = read_table(path, ["key", "size", "source", "caption"])[1].to_pylist()
        gone = {
            row["key"]: max(row["size"], 0) for row in rows if not wanted.has(row["key"], row["source"], row["caption"])
        }
        if gone:
            why = f"{len(gone)} of {len(rows)} samples are no longer in the data root"
            yield from _removal(tar, why, (split, number), sum(gone.values()), frozenset(gone))
