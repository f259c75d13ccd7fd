"""Brings a run back from its mirror: the newest whole checkpoint, where the folder of the run has no newer one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogcommon.cli.progress import say, stage
from cogcommon.errors import RunError
from cogcommon.files.atomic import commit, temporary_beside
from cogcommon.files.failures import disk_errors
from cogcommon.files.hashes import sha256_of
from cogcommon.files.ownership import entries, replace_folder
from cogcommon.store.address import address_of
from cogcommon.store.remote_folder import RemoteFolder, open_folder

from ...distributed.snapshot import STATE_FILE
from ...model import lora, sft
from ..checkpoint import CHECKPOINT_NAME, list_checkpoints, step_of
from ..claim import claimed
from ..folder import A_CHECKPOINT, CONFIG_FILE, EPOCHS_FILE, FACTS_FILE, METRICS_FILE, VALIDATION
from .index import Index, MirroredFile, is_copy, read_index, run_of, write_token

_FILES = (METRICS_FILE, FACTS_FILE, EPOCHS_FILE)  # the others are written anew
_OTHERS = 1800.0  # seconds for others to bring the same to a folder: a checkpoint of all weights of 5B has 67 GB


def restore(folder: Path, address: str, waits: float = 0.0) -> None:
    """Bring the newest checkpoint of a mirror into a run's folder, if it is newer than those that are there.

    With it come the metrics, the record of epochs and what validation has made so far, and the best checkpoint.

    Args:
        waits: seconds for another process to leave the folder.

    Raises:
        RunError: the folder is another run's, or nothing in the mirror is whole.
        StoreError: it cannot be read, and why.
        DiskError: there is no room for it.
    """
    remote = open_folder(address, "--mirror")
    index, here = read_index(remote), list_checkpoints(folder)
    if index is None:
        return
    if here and run_of(folder) != index.run:
        raise RunError(
            f"the mirror is of another run than {folder}",
            where=f"--mirror {remote.shown}",
            fix="another --mirror for this one, or another --out for that one",
        )
    if _lacks(folder, index):
        # The other hosts of the run may be at it, too, in the folder that all share.
        with disk_errors(folder), claimed(folder, max(waits, _OTHERS)):
            if _lacks(folder, index):
                with stage(f"restoring from {remote.shown}"):
                    _restore(remote, index, _newer(folder, index), folder)


def _newer(folder: Path, index: Index) -> list[str]:
    """The checkpoints of a mirror that are newer than all of the folder's, oldest first."""
    here = list_checkpoints(folder)
    return [name for name in index.names if not here or step_of(Path(name)) > step_of(here[-1])]


def _lacks(folder: Path, index: Index) -> bool:
    """Whether there is something in a mirror for a folder to go on with."""
    return bool(_newer(folder, index)) or not (list_checkpoints(folder) or run_of(folder) == index.run)


def local_run(named: Path | None) -> Path | None:
    """The folder of a run, or of a checkpoint in it; where the address of its mirror is given, brought here.

    It comes to ``runs/NAME``, with weights, settings and metrics, and the checkpoint if that is what was named. Where
    that is the folder in which the run is made, and no older than its mirror, its own files stay as they are.

    Raises:
        RunError: no run is mirrored there, or the folder holds something else.
        StoreError: it cannot be read, and why.
    """
    address = None if named is None else address_of(named)
    if named is None or address is None:
        return named
    above, _, last = address.rpartition("/")
    checkpoint = last if CHECKPOINT_NAME.fullmatch(last) else ""
    remote = open_folder(above if checkpoint else address, "--run")
    index = read_index(remote)
    if index is None or (checkpoint and checkpoint not in index.checkpoints):
        there = "" if index is None else f"; there are {', '.join(index.names) or 'none'}"
        what = "no such checkpoint" if index else "no run is mirrored there"
        raise RunError(f"{what}{there}", where=f"--run {remote.shown}", fix="the address that --mirror had")
    folder = Path("runs") / (above if checkpoint else address).rpartition("/")[2]
    if entries(folder) and run_of(folder) != index.run:
        raise RunError(
            f"it would be brought to {folder}, which holds something else",
            where=f"--run {remote.shown}",
            fix="work in another folder (cd)",
        )
    if run_of(folder) == index.run and not is_copy(folder) and not _newer(folder, index):
        say(f"{folder} is the run's own folder, and no older than {remote.shown}: its files are used as they are")
        if checkpoint and not (folder / checkpoint).exists():
            with disk_errors(folder), claimed(folder, _OTHERS), stage(f"fetching from {remote.shown}"):
                _fetch_checkpoint(remote, checkpoint, index, folder)
        return folder / checkpoint
    with disk_errors(folder), claimed(folder, _OTHERS) as made, stage(f"fetching from {remote.shown}"):
        write_token(folder, index.run, remote.shown, copy=run_of(folder) is None or is_copy(folder))
        for file in (*_FILES, lora.FILE):
            if file in index.files:
                _fetch(remote, file, folder / file, index.files[file] if file == lora.FILE else None)
        if CONFIG_FILE in index.files and not (folder / CONFIG_FILE).exists():
            temporary = temporary_beside(folder / CONFIG_FILE)
            _fetch(remote, CONFIG_FILE, temporary)
            made.commit(temporary, CONFIG_FILE)
        _fetch_transformer(remote, index, folder)
        if checkpoint and not (folder / checkpoint).exists():
            _fetch_checkpoint(remote, checkpoint, index, folder)
    return folder / checkpoint


def _fetch_transformer(remote: RemoteFolder, index: Index, folder: Path) -> None:
    """The folder that full fine-tuning exports, unless it is here."""
    files = {name: sha for name, sha in index.files.items() if name.startswith(f"{sft.FOLDER}/")}
    if not all((folder / name).is_file() and sha256_of(folder / name) == sha for name, sha in files.items()):
        with _replacing(folder / sft.FOLDER, sft.A_TRANSFORMER) as temporary:
            for name, sha in files.items():
                _fetch(remote, name, temporary / Path(name).relative_to(sft.FOLDER), sha)


def _restore(remote: RemoteFolder, index: Index, newer: list[str], folder: Path) -> None:
    """The checkpoint to go on from comes last: a kill before that leaves a folder that is restored again."""
    write_token(folder, index.run, remote.shown)
    for file in index.files:
        if file in _FILES or file.startswith(f"{VALIDATION}/"):
            _fetch(remote, file, folder / file)
    faults: dict[str, RunError] = {}

    def bring(name: str) -> bool:
        try:
            if not (folder / name / STATE_FILE).exists():
                _fetch_checkpoint(remote, name, index, folder)
        except RunError as fault:
            faults[name] = fault
            say(f"{name} of the mirror is not whole: {fault.what}")
        return name not in faults

    best = f"checkpoint-{index.best}"
    if best in index.checkpoints:
        bring(best)
    name = next((name for name in reversed(newer) if name not in faults and bring(name)), None)
    if name is not None:
        say(f"restored {name} from {remote.shown} into {folder}")
    elif newer:
        raise faults[newer[-1]]
    # Else it was lost before its first checkpoint: it begins anew, and the mirror is still its own.


def _fetch_checkpoint(remote: RemoteFolder, name: str, index: Index, folder: Path) -> None:
    with _replacing(folder / name, A_CHECKPOINT) as temporary:
        for file, told in index.checkpoints[name].items():
            _fetch_checked(remote, f"{name}/{file}", told, temporary / file)


@contextmanager
def _replacing(final: Path, by: str) -> Iterator[Path]:
    """A folder to fill, which takes the place of another once all is in it."""
    temporary = temporary_beside(final)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, final, by)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_checked(remote: RemoteFolder, name: str, told: MirroredFile, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        if remote.fetch(name, to) is None:
            raise RunError("a file is missing", where=remote.name(name))
        if to.stat().st_size == told.size and sha256_of(to) == told.sha256:
            return
    raise RunError("a file is not what was uploaded", where=remote.name(name), fix="--resume never begins anew")


def _fetch(remote: RemoteFolder, name: str, to: Path, sha256: str | None = None) -> None:
    """A file beside the checkpoints: one that is written again and again, or with a hash just this one."""
    if sha256 is not None and to.is_file() and sha256_of(to) == sha256:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(to)
    try:
        there = remote.fetch(name, temporary) is not None
        if sha256 is not None and not (there and sha256_of(temporary) == sha256):
            raise RunError("a file is not what was uploaded, or missing", where=remote.name(name), fix="run it again")
        if there:
            commit(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)
