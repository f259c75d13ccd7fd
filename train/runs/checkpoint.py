"""Checkpoints of a run, ``checkpoint-N/``, written atomically.

A checkpoint holds the trained weights, the optimizer's state and ``state.json``.
Its step alone gives the position in the order of samples: the rest is a function
of the settings and the shards.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import command_line
from cogcommon.errors import RunError
from cogcommon.files.atomic import TEMPORARY, commit
from cogcommon.files.ownership import RECORD_FILE, Made, is_file, is_folder, remove_folder, state_of
from cogcommon.files.typed import build, parse_object

from ..distributed.leaving import PeerLost
from ..distributed.snapshot import STATE_FILE
from .folder import A_CHECKPOINT, CONFIG_FILE

if TYPE_CHECKING:
    from ..settings.training import TrainSettings

ASIDE = "set-aside"  # in a run: checkpoints of steps that are made again, until there is a new one
CHECKPOINT_NAME = re.compile("checkpoint-[0-9]{1,18}")
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


def run_and_checkpoint(named: Path) -> tuple[Path, Path | None]:
    """The run that somebody names, and the checkpoint where they name one: ``RUN``, or ``RUN/checkpoint-N``."""
    if not (named / STATE_FILE).is_file():
        return named, None
    return named.parent if named.name else named.absolute().parent, named


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    named = [path for path in _named(run) if (path / STATE_FILE).exists()]
    return sorted(named, key=step_of)


def _named(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]


def step_of(path: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(path.name[11:])


def clear(run: Path, after: int, *, aside: bool = False) -> list[str]:
    """Remove what a killed run left half-written, and checkpoints of steps that will be made again.

    Args:
        run: its folder, claimed.
        after: the step from which the run goes on; 0 for one that starts anew. Later
            checkpoints would pass for newer ones, and be kept in the new ones' place.
        aside: whether the whole ones are moved into `ASIDE` instead, until there is a new one (`drop_set_aside`).

    Returns:
        Names of the whole checkpoints that are no longer there.

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
        if aside and _set_aside(path):
            continue
        if not remove_folder(path, A_CHECKPOINT, first=STATE_FILE):
            raise RunError(
                f"{path.name} is newer than the step to go on from, and not one that this run has made",
                where=str(path),
                fix="move it elsewhere, or start a new run with another --out",
            )
    return [path.name for path in abandoned]


def _set_aside(checkpoint: Path) -> bool:
    """Move a checkpoint into `ASIDE`, if all that is in it is ours."""
    made = Made.read(checkpoint)
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not is_folder(path)}
    if made is None or made.by != A_CHECKPOINT or not all(map(made.owns, there - {RECORD_FILE})):
        return False
    aside = checkpoint.parent / ASIDE
    if os.path.lexists(aside) and not is_folder(aside):
        return False
    aside.mkdir(exist_ok=True)
    remove_folder(aside / checkpoint.name, A_CHECKPOINT, first=STATE_FILE)  # of one that began anew before
    if os.path.lexists(aside / checkpoint.name):
        return False
    commit(checkpoint, aside / checkpoint.name)
    return True


def set_aside(run: Path) -> list[Path]:
    """Checkpoints in `ASIDE`."""
    return list_checkpoints(run / ASIDE) if is_folder(run / ASIDE) else []


def drop_set_aside(run: Path) -> None:
    """Remove what `clear` has set aside: a new checkpoint is durable."""
    for path in set_aside(run):
        remove_folder(path, A_CHECKPOINT, first=STATE_FILE)
    if is_folder(run / ASIDE):
        with suppress(OSError):  # there is something of somebody's in it
            (run / ASIDE).rmdir()


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
                fix="give a run folder or one of its checkpoint-N folders; or auto, or never",
            )
        folder = checkpoints[-1]
    try:
        return SavedCheckpoint(folder, read_state(folder), newest=folder != path)
    except (OSError, ValueError) as error:
        raise RunError(f"a damaged checkpoint: {error}", where=str(folder), fix="resume an older one") from error


def states_of(weights: Path) -> list[str]:
    """What weights are, by their content, whatever folder they lie in.

    Args:
        weights: a checkpoint, a LoRA file, or a transformer folder.

    Raises:
        RunError: a damaged checkpoint.
        OSError: the files cannot be read.
    """
    if (weights / STATE_FILE).is_file():
        return [find_checkpoint(weights).state.identity]
    return [state_of(file) for file in (sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights])]


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


def check_same(found: SavedCheckpoint, facts: Mapping[str, Any], world: int, given: TrainSettings) -> None:
    """Refuse to go on with another run than the checkpoint's.

    Args:
        world: data-parallel groups of processes.
        given: the settings as they were typed.

    Raises:
        RunError: names the first fact that differs, and what to change.
    """
    init_lora = getattr(given, "init_lora", None)
    for name, now in facts.items():
        then: Any = found.state.facts.get(name, _BEFORE.get(name, now))  # a fact may be newer than the checkpoint
        if then == now:
            continue
        fix = f"set {name} back, or start a new run with another --out"
        if name == "--init-lora":
            began, named = (Path(path) if path else None for path in (found.state.settings.get("init_lora"), init_lora))
            if began and named and began.resolve() == named.resolve():
                continue  # the file has changed since; what was made of it is in the checkpoint
            if began:
                fix = f"--init-lora {began}, or start a new run with another --out"
        elif name == "global batch":
            per_step = world * given.batch_size
            if given.global_batch:
                fix = f"--global-batch {then}"
            elif then % per_step == 0:
                fix = f"--accumulate {then // per_step}"
            else:
                fix = f"choose --batch-size and --accumulate so that {world} x batch size x accumulate is {then}"
        elif name == "method":
            fix = f"`cogtrain {then}`, or start a new run with another --out"
        elif name == "base model":
            fix = f"--model {then.partition(' ')[2]}, or start a new run with another --out"
        elif name == "shards":
            fix = (
                "give --shards and --validate-shards, which takes samples out of them, as the run began with them; or "
                "start a new run with another --out"
                + f"; from these weights: `{command_line('cogtrain', 'export', '--run', found.folder)}` writes a file "
                "for --init-lora" * (found.state.facts.get("method") == "lora")
            )
        raise RunError(
            f"the checkpoint was made with {'other' if name == 'shards' else 'another'} {name}: "
            f"{_short(then)} then, {_short(now)} now",
            where=str(found.folder),
            fix=fix,
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


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
