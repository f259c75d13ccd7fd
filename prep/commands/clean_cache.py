"""`cogprep clean-cache`: remove what an output folder no longer needs, and nothing else.

What goes: what a killed run left half-written, tars and records without their
other half, samples that the data root no longer has, and with --all everything
that was derived. Only what `cogprep.store.proof` proves to be ours is ever touched, and
never a file that a live process writes. All of it is looked at twice: for the list,
and, under its lock, at the moment it goes, for a question may stand for days.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import paused, stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError
from cogcommon.files.atomic import TEMPORARY
from cogcommon.files.locks import locked_elsewhere, may_lock, remove_unless_held
from cogcommon.files.ownership import RECORD_FILE, is_file, is_folder, refuse_data_root
from cogcommon.shards.records import SampleRow, number_in_record, read_table, record_name, shard_number, tar_name
from cogcommon.words import counted, in_bytes

from ..plan.folder import SPLITS, Split, records_in, split_folder
from ..plan.stale import Wanted
from ..settings.shards import CleanSettings
from ..store.extents import holds_samples
from ..store.locks import (
    ShardBusy,
    is_at_work,
    is_lock_of_removing,
    lock_shard,
    removing,
    shard_disk_errors,
    temporary_name,
)
from ..store.outlet import Outlet, open_image
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
from ..store.rewrite import drop_samples, finish_rewrites


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


def run(settings: CleanSettings) -> None:
    """The command: find, list, ask, remove.

    Raises:
        SettingError: there is something to remove, but no terminal to ask on and no --yes.
    """
    changing = not settings.dry_run
    with open_image(settings.out, "--out", changing=changing, leftovers=True) as image:
        _clean(settings, image)


def _clean(settings: CleanSettings, image: Outlet) -> None:
    console = Console(stderr=settings.json, soft_wrap=True)
    out = image.folder
    refuse_data_root(out, "--out")
    if not settings.dry_run and is_output(out):
        for folder in _folders(out).values():
            finish_rewrites(folder)  # it may only lack its last renames
    with stage("comparing shards and data root"):
        removals = list(find_removals(out, everything=settings.all, say=lambda text: console.print(image.told(text))))
    if settings.json:
        print(json_text([{"path": image.shown(r.path), "why": r.why, "bytes": r.size} for r in removals]))
    else:
        for removal in removals:
            console.print(f"{image.shown(removal.path)}: {removal.why}, {in_bytes(removal.size)}")
    if not removals:
        there = f"nothing to remove in {image.place}"
        if not out.is_dir():
            there = f"nothing to remove: there is no folder {out}"
        console.print(there)
        return
    total = _total(removals)
    if settings.dry_run:
        console.print(f"would remove {total}")
        return
    if not settings.yes:
        if not sys.stdin.isatty():
            raise SettingError(
                f"nothing was removed ({total})", where="there is no terminal to ask on", fix="add --yes"
            )
        with paused():
            answer = input(f"remove {total}? [y/N] ").strip().lower()
        if answer not in ("y", "yes"):
            console.print("nothing was removed")
            return
    with stage("removing"), ExitStack() as held:
        for removal in removals:
            if removal.gone:
                held.enter_context(image.at_hand(removal.path))
        left = carry_out(out, removals, everything=settings.all)
        left |= {out / name for name in image.publish_changes()}
    gone = [removal for removal in removals if removal.path not in left]
    in_use = ", ".join(map(image.shown, sorted(left)))
    more = f"; {len(left)} in use or changed meanwhile, and left alone: {in_use}" if left else ""
    console.print(f"removed {_total(gone)}{more}")


def _total(removals: Sequence[Removal]) -> str:
    return f"{counted(len(removals), 'thing')}, {in_bytes(sum(removal.size for removal in removals))}"


def _folders(out: Path) -> dict[Split, Path]:
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
    for split, folder in _folders(out).items():
        for number in sorted({number for number, _ in _shard_files(folder)}):
            # A writer locks its temporary tar, and between renaming it and the record the tar itself.
            tar = folder / tar_name(number)
            held = [*filter(locked_elsewhere, [folder / temporary_name(number), *filter(is_file, [tar])])]
            if refused := [path for path in held if not may_lock(path)]:
                say(f"no permission: {refused[0]}; its shard stays until you may read and write it (`ls -l`, `chmod`)")
            elif not held:
                of_shards += _of_shard(folder, split, number, everything)
    yield from of_shards
    stay = is_at_work(out) or _any_shard_left(out, {removal.path for removal in of_shards})
    yield from _beside_shards(out, everything, stay)
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


def _any_shard_left(out: Path, without: Collection[Path] = ()) -> bool:
    """Whether there is anything of any shard, beside the files of ``without``."""
    return any(path not in without for folder in _folders(out).values() for _, path in _shard_files(folder))


def _of_shard(folder: Path, split: Split, number: int, everything: bool) -> Iterator[Removal]:
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


def _beside_shards(out: Path, everything: bool, shards_stay: bool) -> Iterator[Removal]:
    """Files of a folder that belong to no shard, in the order in which they go.

    Args:
        shards_stay: whether any shard does, or may come; then what tells of the shards stays, too.
    """
    folders = [*_folders(out).values(), *(out / name for name in (SURVEY, PREVIEW) if is_folder(out / name))]
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
        of_shard = any(shard_number(path.name, kind) is not None for kind in ("tar", "parquet"))
        if is_ours(path) and not (of_shard or TEMPORARY.fullmatch(path.name) or SHARD_TEMPORARY.fullmatch(path.name)):
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
    folders = _folders(out)
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


def carry_out(out: Path, removals: Sequence[Removal], *, everything: bool) -> set[Path]:
    """Remove what was listed and can still go; returns what of it stays."""
    stay: set[Path] = set()
    wanted = Wanted(out)
    with shard_disk_errors(out):
        for (split, number), listed in _by_shard(removals).items():
            folder = split_folder(out, split)
            try:
                if listed[0].gone:
                    if not _drop(folder, number, listed[0].gone, wanted):
                        stay.add(listed[0].path)
                elif folder.is_dir():
                    stay |= _remove_of_shard(folder, split, number, listed, everything)
            except ShardBusy:
                stay |= {removal.path for removal in listed}
        if out.is_dir():  # else another clean-cache was first
            with removing(out) as busy:
                stay |= _remove_beside(out, removals, everything, busy)
            _remove_if_empty(out)
    return stay


def _remove_beside(out: Path, removals: Sequence[Removal], everything: bool, busy: bool) -> set[Path]:
    """Remove what was listed and belongs to no shard; returns what of it stays.

    Args:
        busy: whether a run lives in the folder; then what tells of its shards stays.
    """
    stay: set[Path] = set()
    beside = _beside_shards(out, everything, busy or _any_shard_left(out))
    now = {(removal.path, removal.state) for removal in beside}
    for removal in removals:
        if removal.shard is not None or is_lock_of_removing(removal.path):
            continue
        if (removal.path, removal.state) not in now:
            stay.add(removal.path)
        elif not TEMPORARY.fullmatch(removal.path.name):
            removal.path.unlink(missing_ok=True)
        elif not remove_unless_held(removal.path):
            stay.add(removal.path)
    if not busy:
        for folder in (out / PREVIEW, out / SURVEY, out / "val"):
            _remove_if_empty(folder)
    return stay


def _remove_if_empty(folder: Path) -> None:
    if is_folder(folder) and not any(folder.iterdir()):
        with suppress(OSError):  # somebody has put something into it just now
            folder.rmdir()


def _by_shard(removals: Sequence[Removal]) -> dict[tuple[Split, int], list[Removal]]:
    shards: dict[tuple[Split, int], list[Removal]] = {}
    for removal in removals:
        if removal.shard is not None:
            shards.setdefault(removal.shard, []).append(removal)
    return shards


def _remove_of_shard(folder: Path, split: Split, number: int, listed: Sequence[Removal], everything: bool) -> set[Path]:
    """Remove what was listed of a shard and can go now that it is locked; returns what of it stays."""
    stay: set[Path] = set()
    with lock_shard(folder, number):
        now = {(found.path, found.why, found.state) for found in _of_shard(folder, split, number, everything)}
        for removal in listed:
            if removal.path == folder / temporary_name(number) and not removal.size:
                continue  # it is our lock, and goes with it
            if (removal.path, removal.why, removal.state) in now:
                removal.path.unlink(missing_ok=True)
            elif removal.path.exists():
                stay.add(removal.path)
    return stay


def _drop(folder: Path, number: int, gone: Collection[str], wanted: Wanted) -> bool:
    """Take samples out of a shard that are still not wanted; returns whether that was all that were listed."""
    kept = []

    def keep(row: SampleRow) -> bool:
        stays = row.key not in gone or wanted.has(row.key, row.source, row.caption)
        kept.append(stays and row.key in gone)
        return stays

    drop_samples(folder, number, keep)
    return not any(kept)
