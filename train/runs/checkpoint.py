"""Checkpoints of a run, ``checkpoint-N/``, written atomically.

A checkpoint holds the trained weights, the optimizer's state and ``state.json``.
Its step alone gives the position in the order of samples: the rest is a function
of the settings and the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import command_line
from cogcommon.errors import CogError, RunError
from cogcommon.files.atomic import TEMPORARY, fsync_folder, temporary_beside
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import is_file, is_folder, remove_folder, replace_folder
from cogcommon.files.typed import build, parse_object

from ..distributed.leaving import PeerFailed, PeerLost
from ..distributed.strategy import Runtime
from ..model.finite import all_finite
from .folder import A_CHECKPOINT, CONFIG_FILE

if TYPE_CHECKING:
    import torch

STATE_FILE = "state.json"
_SCHEMA = 1


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says of the run it belongs to.

    ``facts`` must be the same when it is resumed, by name as messages show them.
    """

    step: int  # optimizer steps made
    world: int
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]  # of the run, for the note of what was changed
    schema: int = _SCHEMA
    identity: str = field(default_factory=lambda: secrets.token_hex(8))  # no two checkpoints have the same


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk; ``newest``: taken because it was the newest of its run."""

    folder: Path
    state: RunState
    newest: bool = False

    @property
    def digest(self) -> str:
        """A hash of its state and its files' names and sizes: no other checkpoint, and no part of it, has the same."""
        digest = hashlib.sha256((self.folder / STATE_FILE).read_bytes())
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step}"


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    named = [path for path in _named(run) if (path / STATE_FILE).exists()]
    return sorted(named, key=step_of)


def _named(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if re.fullmatch(r"[0-9]{1,18}", path.name[11:])]


def step_of(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name[11:])


def clear(run: Path, after: int) -> list[str]:
    """Remove what a killed run left half-written, and checkpoints of steps that will be made again.

    Args:
        run: its folder, claimed.
        after: the step from which the run goes on; 0 for one that starts anew. Later
            checkpoints would pass for newer ones, and be kept in the new ones' place.

    Returns:
        Names of the whole checkpoints that were removed.

    Raises:
        RunError: a later checkpoint is not as a run of ours made it.
    """
    for path in run.glob(".*.tmp"):  # checkpoints, files, an export
        if TEMPORARY.fullmatch(path.name) and is_folder(path):
            shutil.rmtree(path)
        elif TEMPORARY.fullmatch(path.name) and is_file(path):
            path.unlink()
    whole = list_checkpoints(run)
    for path in _named(run):
        if path not in whole:  # it was being removed when the run was killed
            remove_folder(path, A_CHECKPOINT)
    abandoned = [path for path in whole if step_of(path) > after]
    for path in abandoned:
        if not remove_folder(path, A_CHECKPOINT, first=STATE_FILE):
            raise RunError(
                f"{path.name} is newer than the step to go on from, and not one that this run has made",
                where=str(path),
                fix="move it elsewhere, or start a new run with another --out",
            )
    return [path.name for path in abandoned]


def find_checkpoint(path: Path) -> SavedCheckpoint:
    """A checkpoint folder, or the latest one of a run folder.

    Raises:
        RunError: there is none.
    """
    folder = path
    if not (path / STATE_FILE).exists():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise RunError(
                "no checkpoint to resume" if path.is_dir() else "no such folder to resume",
                where=f"--resume {path}",
                fix="give a run folder or one of its checkpoint-N folders",
            )
        folder = checkpoints[-1]
    try:
        return SavedCheckpoint(folder, read_state(folder), newest=folder != path)
    except (OSError, ValueError) as error:
        raise RunError(f"a damaged checkpoint: {error}", where=str(folder), fix="resume an older one") from error


def check_newest(run: Path, found: SavedCheckpoint | None) -> None:
    """Refuse to take newer checkpoints away, which another process has written since one was looked for.

    Args:
        run: its folder, claimed.
        found: the newest one then; None: there was none.

    Raises:
        PeerLost: there is a newer one now.
    """
    now = list_checkpoints(run)
    if now and (found is None or step_of(now[-1]) != found.state.step):
        raise PeerLost(
            f"another process trained in this folder while this one started, up to step {step_of(now[-1])}",
            where=str(run),
            fix="run the same command again",
        )


def read_state(folder: Path) -> RunState:
    """What a checkpoint says of its run.

    Raises:
        OSError, ValueError: it says nothing that can be believed.
    """
    values = parse_object((folder / STATE_FILE).read_bytes())
    if values.get("schema") != _SCHEMA:
        raise ValueError(f"schema {values.get('schema')}, this version reads {_SCHEMA}")
    return build(RunState, values)


_BEFORE = {
    "--adapter": "lora",
    "--captions": "all",
    "--follow": False,
    "--init-lora": None,
    "--repeat": "none",
}  # facts of checkpoints that are older than these facts


def check_same(found: SavedCheckpoint, facts: Mapping[str, Any], world: int, batch_size: int) -> None:
    """Refuse to go on with another run than the checkpoint's.

    Raises:
        RunError: names the first fact that differs, and what to change.
    """
    for name, now in facts.items():
        then: Any = found.state.facts.get(name, _BEFORE.get(name, now))  # a fact may be newer than the checkpoint
        if then == now:
            continue
        fix = f"set {name} back, or start a new run with another --out"
        if name == "global batch":
            per_step = world * batch_size
            fix = (
                f"--accumulate {then // per_step}"
                if then % per_step == 0
                else f"choose --batch-size and --accumulate so that {world} x batch size x accumulate is {then}"
            )
        elif name == "shards":
            fix = "give the shards that the run began with, or start a new run with another --out"
        raise RunError(
            f"the checkpoint was made with another {name}: {_short(then)} then, {_short(now)} now",
            where=str(found.folder),
            fix=fix,
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


class NotSaved(Exception):
    """A checkpoint could not be written; raised on all ranks alike. ``fault`` is what to say of it."""

    def __init__(self, fault: CogError) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Saving:
    """A checkpoint on its way to the disk; each rank has one, for they learn together what becomes of it.

    Attributes:
        beside: a thread of rank 0 writes it from a copy in host memory, while the next steps are made.
    """

    def __init__(self, runtime: Runtime, final: Path, temporary: Path) -> None:
        self.beside = False
        self._peers, self._final, self._temporary = runtime.peers, final, temporary
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._after: Exception | None = None  # what has failed once it was durable

    @property
    def ended(self) -> bool:
        """Whether it is durable, or has failed; on ranks other than 0 always."""
        return self._thread is None or not self._thread.is_alive()

    def together(self, act: Callable[[], object]) -> None:
        """Do a part of it on all ranks, or fail on all.

        Raises:
            NotSaved: nothing of the checkpoint is left.
        """
        try:
            self._peers.together(act)
        except CogError as fault:
            if self._peers.main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise NotSaved(fault) from fault

    def start(self, act: Callable[[], object], then: Callable[[], object]) -> None:
        """Do the rest of it in a thread, and ``then`` what is to be done once it is durable."""

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
            try:
                act()
            except Exception as error:
                self._fault = error
                shutil.rmtree(self._temporary, ignore_errors=True)  # at once: the steps write, too
                return
            try:
                then()
            except Exception as error:
                self._after = error

        self._thread = threading.Thread(target=work, name="cogtrain-checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the thread of this rank; its fault, if it has failed."""
        if self._thread is not None:
            self._thread.join()
        return self._fault

    def end(self) -> Path:
        """Wait until it is durable; every rank calls it.

        Raises:
            NotSaved: the disk is full, or another fault of the file system; nothing of the checkpoint is left.
        """

        def found() -> None:
            if fault := self.wait():
                raise fault

        if self.beside:
            self.together(found)
        if self._after:
            raise self._after
        return self._final


def begin_saving(
    runtime: Runtime,
    model: Any,
    optimizer: Any,
    shadow: list[torch.Tensor] | None,
    state: RunState,
    run: Path,
    *,
    room: Callable[[int], bool] = lambda size: False,
    needs: int = 0,
    then: Callable[[], object] = lambda: None,
) -> Saving:
    """Begin to write a checkpoint; every rank calls it. Once it has returned, steps may change all that it holds.

    Args:
        shadow: this rank's part of the moving average of the weights.
        room: whether so many bytes are free for a copy in host memory, on rank 0; where not, or where DeepSpeed writes
            (from the live weights, in collectives), the checkpoint is written before this returns.
        needs: bytes that it takes, about, for the message of a disk that is full.
        then: called on rank 0 as soon as it is durable, perhaps in the thread: older ones can go.

    Raises:
        RunError: a weight, or a number of the optimizer's state, is not finite.
        NotSaved: the disk is full, or another fault of the file system; nothing of the checkpoint is left.
    """
    _check_finite(runtime, model, optimizer, shadow, f"step {state.step}", "resume the last checkpoint")
    final = run / checkpoint_name(state.step)
    temporary = Path(runtime.peers.broadcast(str(temporary_beside(final))))

    def begin() -> None:
        temporary.mkdir(parents=True)

    def commit() -> None:
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        fsync_tree(temporary)
        replace_folder(temporary, final, A_CHECKPOINT)  # the same step is there after a resume from an older one

    def write(act: Callable[[], None]) -> Callable[[], None]:
        def told() -> None:
            with disk_errors(final, needs=needs, go_on=lambda: how_to_go_on(run, state.facts["method"])):
                act()

        return told

    saving, main = Saving(runtime, final, temporary), runtime.main
    saving.together(write(begin) if main else lambda: None)
    live = None if runtime.sharded else runtime.snapshot(model, optimizer, shadow)
    copy = None
    if live is not None and live.plain and room(live.nbytes):
        with suppress(RuntimeError, MemoryError):  # the system gives no page-locked memory: training waits, instead
            copy = live.copied()
    saving.beside = bool(runtime.all_reduce_max(int(copy is not None)))
    if copy is not None:
        snapshot = copy

        def rest() -> None:
            snapshot.write(temporary)
            commit()

        saving.start(write(rest), then)
    elif not saving.beside:
        saving.together(write(lambda: runtime.save_state(model, optimizer, shadow, temporary)))
        saving.together(write(commit) if main else lambda: None)
        if main:
            then()
    return saving


def prune(run: Path, keep: int, best: int | None, held: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest ``keep``, the best, and those of the steps in ``held``."""
    for old in list_checkpoints(run)[:-keep]:
        if step_of(old) != best and step_of(old) not in held:
            remove_folder(old, A_CHECKPOINT, first=STATE_FILE)


def how_to_go_on(run: Path, method: str) -> str:
    """What to type when a fault is mended, and from where the run then goes on."""
    if not (run / CONFIG_FILE).exists():
        return "run the command again"
    whole = list_checkpoints(run)
    kept = (
        f"it goes on from {whole[-1].name}, which is whole" if whole else "it begins anew: no checkpoint is there yet"
    )
    return f"{command_line('cogtrain', method, '--config', run / CONFIG_FILE)} ({kept})"


def load(runtime: Runtime, model: Any, optimizer: Any, shadow: list[torch.Tensor] | None, folder: Path) -> None:
    """Read a checkpoint back; every rank calls it.

    Raises:
        RunError: it is damaged, does not fit this model, or holds what is not finite.
    """
    runtime.load_state(model, optimizer, shadow, folder)
    _check_finite(runtime, model, optimizer, shadow, str(folder), "resume an older one")


def _check_finite(
    runtime: Runtime, model: Any, optimizer: Any, shadow: list[torch.Tensor] | None, where: str, do: str
) -> None:
    if runtime.all_reduce_max(int(not all_finite(runtime.held(model, optimizer, shadow)))):
        raise (
            RunError(
                "the weights, or the optimizer's state, are not finite", where=where, fix=f"{do}, with a lower --lr"
            )
            if runtime.main
            else PeerFailed()
        )


def fsync_tree(folder: Path) -> None:
    """Make a folder and all that is in it durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            fsync_folder(path)
    fsync_folder(folder)
