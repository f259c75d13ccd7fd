"""`cogprep clean-cache`: remove what an output folder no longer needs (`plan.removals`), and nothing else.

All of it is looked at twice: for the list, and, under its lock, when it goes, for a question may stand for days.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import paused, stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError
from cogcommon.files.atomic import TEMPORARY
from cogcommon.files.locks import remove_unless_held
from cogcommon.files.ownership import is_folder, refuse_data_root
from cogcommon.shards.records import SampleRow
from cogcommon.words import counted, in_bytes

from ..plan.folder import Split, split_folder
from ..plan.removals import Removal, any_shard_left, beside_shards, find_removals, folders_of, of_shard
from ..plan.stale import Wanted
from ..settings.shards import CleanSettings
from ..store.locks import ShardBusy, is_lock_of_removing, lock_shard, removing, shard_disk_errors, temporary_name
from ..store.outlet import Outlet, open_image
from ..store.proof import PREVIEW, SURVEY, is_output
from ..store.rewrite import drop_samples, finish_rewrites


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
        for folder in folders_of(out).values():
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
        left = _carry_out(out, removals, everything=settings.all)
        left |= {out / name for name in image.publish_changes()}
    gone = [removal for removal in removals if removal.path not in left]
    in_use = ", ".join(map(image.shown, sorted(left)))
    more = f"; {len(left)} in use or changed meanwhile, and left alone: {in_use}" if left else ""
    console.print(f"removed {_total(gone)}{more}")


def _total(removals: Sequence[Removal]) -> str:
    return f"{counted(len(removals), 'thing')}, {in_bytes(sum(removal.size for removal in removals))}"


def _carry_out(out: Path, removals: Sequence[Removal], *, everything: bool) -> set[Path]:
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
    beside = beside_shards(out, everything, busy or any_shard_left(out))
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
        now = {(found.path, found.why, found.state) for found in of_shard(folder, split, number, everything)}
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
