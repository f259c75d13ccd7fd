"""`cogprep clean-cache`: remove what an output folder no longer needs, and nothing else.

What goes: what a killed run left half-written, tars and records without their
other half, samples that the data root no longer has, and with --all everything
that was derived. Only names that cogprep itself gives, in OUT, OUT/val, OUT/preview and
OUT/.survey, are ever touched, and never a file that a live process writes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE
from cogcommon.errors import DataRootError, SettingError
from cogcommon.families import Resolution
from cogcommon.names import json_text
from cogcommon.records import read_table, record_name, tar_name
from cogcommon.terminal import Console
from cogcommon.words import counted, in_bytes

from .cut import Cut
from .disk import ShardBusy, disk_errors, locked_elsewhere, temporary_name
from .output import ORIGIN_FILE, SPLITS, read_contract, read_origin, records_in, scan, split_folder
from .plan import Drop
from .pool import Pool, default_workers
from .settings import CleanSettings
from .shards import drop_samples, finish_rewrites
from .survey import survey
from .survey_cache import FOLDER, SurveyCache
from .workers import Slice

# The temporary file of a commit, .NAME.PROCESS.tmp, and what one shard may leave behind.
_COMMIT = re.compile(r"\..+\.(?P<process>\d+)\.tmp")
_SHARD = re.compile(r"\.?(?P<number>\d{6})\.(?P<kind>tar|parquet|tar\.new|parquet\.new|tar\.tmp)")
_PREVIEW = re.compile(r"index\.html|sheet-\d+\.png")
_CACHE = re.compile(r"[0-9a-f]{32}\.json|\.[0-9a-f]{32}\.json\.\d+\.tmp")
_OF_THE_FOLDER = re.compile(rf"{CONTRACT_FILE}|{EMPTY_CAPTION_FILE}|{ORIGIN_FILE}|report(-\d+-of-\d+)?\.json")


@dataclass(frozen=True)
class Removal:
    """One thing to remove: a file, or samples of a shard."""

    path: Path
    why: str
    size: int  # bytes that it frees
    drop: Drop | None = None  # rewrite the shard; the file stays


def run(settings: CleanSettings) -> None:
    """The command: find, list, ask, remove.

    Raises:
        SettingError: there is something to remove, but no terminal to ask on and no --yes.
    """
    console = Console(stderr=settings.json, soft_wrap=True)
    out = settings.out
    if not settings.dry_run:
        for split in SPLITS:
            finish_rewrites(split_folder(out, split))  # it may only lack its last renames
    removals = list(find_removals(out, everything=settings.all, say=console.print))
    if settings.json:
        print(json_text([{"path": str(r.path), "why": r.why, "bytes": r.size} for r in removals]))
    else:
        for removal in removals:
            console.print(f"{removal.path}: {removal.why}, {in_bytes(removal.size)}")
    if not removals:
        there = f"nothing to remove in {out}" if out.is_dir() else f"nothing to remove: there is no folder {out}"
        console.print(there)
        return
    total = f"{counted(len(removals), 'thing')}, {in_bytes(sum(removal.size for removal in removals))}"
    if settings.dry_run:
        console.print(f"would remove {total}")
        return
    if not settings.yes:
        if not sys.stdin.isatty():
            raise SettingError(
                f"nothing was removed ({total})", where="there is no terminal to ask on", fix="add --yes"
            )
        if input(f"remove {total}? [y/N] ").strip().lower() not in ("y", "yes"):
            console.print("nothing was removed")
            return
    in_use = carry_out(out, removals)
    left = f"; {in_use} in use by a live process and left alone" if in_use else ""
    console.print(f"removed {total}{left}")


def find_removals(out: Path, *, everything: bool, say: Callable[[str], None]) -> Iterator[Removal]:
    """What can go. Nothing is called stale where the data root cannot be read.

    Raises:
        SettingError: ``out`` is the data root itself.
        ShardError: a record is damaged.
    """
    if not out.is_dir():
        return
    origin = read_origin(out)
    if origin is not None and out.resolve() == Path(origin.data_root):
        raise SettingError(
            "this folder is the data root itself", where=str(out), fix="--out takes the folder of shards"
        )
    for split in SPLITS:
        yield from _files(split_folder(out, split), everything)
    if everything:
        yield from _files_of(out / "preview", _PREVIEW, "a preview")
        yield from _files_of(out / FOLDER, _CACHE, "what was found out about clips")
    else:
        yield from _stale(out, say)


def _files(folder: Path, everything: bool) -> Iterator[Removal]:
    """Half-written files and orphans of a folder; with ``everything`` all that is ours."""
    present = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    for name, path in sorted(present.items()):
        if path.is_symlink() or not path.is_file():
            continue
        size = path.stat().st_size
        if (commit := _COMMIT.fullmatch(name)) and not _alive(int(commit["process"])):
            yield Removal(path, "half-written", size)
        elif everything and _OF_THE_FOLDER.fullmatch(name):
            yield Removal(path, "settings or a report", size)
        elif shard := _SHARD.fullmatch(name):
            number, kind = int(shard["number"]), shard["kind"]
            if f"{record_name(number)}.new" in present:
                continue  # a rewrite that the next writer finishes
            # A writer locks its temporary tar, and between renaming it and the record the tar itself.
            if locked_elsewhere(folder / temporary_name(number)) or locked_elsewhere(folder / tar_name(number)):
                continue
            if kind.endswith(("new", "tmp")):
                yield Removal(path, "half-written", size)
            elif everything:
                yield Removal(path, "a shard" if kind == "tar" else "the record of a shard", size)
            elif kind == "tar" and record_name(number) not in present:
                yield Removal(path, "a tar without a record", size)
            elif kind == "parquet" and tar_name(number) not in present:
                yield Removal(path, "a record without a tar", size)


def _files_of(folder: Path, ours: re.Pattern[str], what: str) -> Iterator[Removal]:
    """The files of a folder of ours that have names of ours."""
    if folder.is_dir() and not folder.is_symlink():
        for path in sorted(folder.iterdir()):
            if ours.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield Removal(path, what, path.stat().st_size)


def _stale(out: Path, say: Callable[[str], None]) -> Iterator[Removal]:
    """Samples whose clip, caption or image the data root no longer has, by content."""
    keys = current_keys(out)
    if keys is None:
        say("the data root cannot be read, so no sample is called stale")
        return
    for split, number, path in records_in(out):
        tar = path.with_suffix(".tar")
        if not tar.exists():
            continue
        _, table = read_table(path, ["key", "size"])
        sizes = dict(zip(table.column("key").to_pylist(), table.column("size").to_pylist(), strict=True))
        gone = sizes.keys() - keys
        if gone:
            freed = sum(max(sizes[key], 0) for key in gone)
            drop = Drop(split, number, frozenset(sizes.keys() & keys), len(gone))
            yield Removal(tar, f"{len(gone)} of {len(sizes)} samples are no longer in the data root", freed, drop)


def current_keys(out: Path) -> set[str] | None:
    """Keys of every sample that the data root has now; None where it cannot be read."""
    contract, origin = read_contract(out), read_origin(out)
    if contract is None:
        return set()
    try:
        data = None if origin is None else origin.read_lists(contract.task)
    except DataRootError:
        return None
    if data is None or data.faults:
        return None
    buckets = [Resolution.parse(text) for text in contract.settings["resolution"]]
    with Pool(default_workers()) as pool:
        found = survey(
            data,
            scan(out),
            contract,
            buckets=buckets,
            cut=Cut.of(contract),
            holdout=0,
            pool=pool,
            advance=lambda: None,
            cache=SurveyCache(None, data.root, "", Slice(1, 1, "default")),
        )
    return set(found.keys) or None


def carry_out(out: Path, removals: Sequence[Removal]) -> int:
    """Remove; returns how many were in use after all. Records go before their tars, so that no half shard counts."""
    in_use = 0
    with disk_errors(out):
        for removal in sorted(removals, key=lambda removal: removal.path.suffix != ".parquet"):
            if removal.drop is None:
                removal.path.unlink(missing_ok=True)
                continue
            try:
                drop_samples(split_folder(out, removal.drop.split), removal.drop.number, removal.drop.keep)
            except ShardBusy:
                in_use += 1
        for folder in (out / "preview", out / FOLDER, split_folder(out, "val"), out):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return in_use


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
