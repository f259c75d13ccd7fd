"""The room that a run takes on the disk: foretold by `cogtrain plan`, compared with what is free before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.errors import DiskError
from cogcommon.files.failures import room_of
from cogcommon.words import in_bytes

from ..distributed.strategies import STRATEGIES
from ..runs.checkpoint import list_checkpoints, set_aside
from ..settings.training import Strategy
from .estimate import STATES, Trains
from .weights import trained_weights

if TYPE_CHECKING:
    from ..runs.run import Run

_PAGES = 1_000_000  # bytes of settings, lines of metrics, card and report


@dataclass(frozen=True)
class Writes:
    """Bytes that a run writes; videos of validation are not counted.

    ``prompts`` are the embeddings of --validate-prompt, which stay in the run's folder.
    """

    checkpoint: int  # each
    export: int
    keep: int  # checkpoints
    prompts: int = 0
    best: bool = False  # one more of them, the best; its weights are exported in the place of the last ones

    @property
    def total(self) -> int:
        """At the fullest moment: an old checkpoint, or export, goes when the new one is whole."""
        return self.checkpoint * (self.keep + self.best + 1) + self.least

    @property
    def least(self) -> int:
        """Without any checkpoint."""
        return self.export * (1 + self.best) + self.prompts + _PAGES

    def __str__(self) -> str:
        kept = f"--keep {self.keep}" + " --keep-best" * self.best
        return (
            f"a checkpoint is {in_bytes(self.checkpoint)}, and {kept} has {self.keep + self.best + 1} there while it "
            f"writes one; the weights are {in_bytes(self.export)}; up to {in_bytes(self.total)} of disk"
        )


def writes(run: Trains, strategy: Strategy | None = None) -> Writes:
    """What a run writes.

    Args:
        strategy: another than the run's own.
    """
    strategy, settings = strategy or run.strategy, run.settings
    weights, size = trained_weights(run), 4 if run.precision == "fp32" else 2
    states = STATES[settings.optimizer]
    if settings.optimizer == "prodigy" and not run.method.full:
        states -= 2  # half of the adapters began at zero, which it need not remember
    # The fp32 weights and what the optimizer keeps of them; stages 1 and 2 write what they compute with, too.
    each = 4 + states + 4 * (settings.ema > 0) + (size if STRATEGIES[strategy].stage in (1, 2) else 0)
    config = run.checkpoint.transformer_config
    prompts = len(run.prompts) * config["max_text_seq_length"] * config["text_embed_dim"] * size
    export = weights * (size if run.method.full else 4)
    return Writes(int(each * weights), export, settings.keep, prompts, settings.keep_best)


def has_room_beside(run: Trains, folder: Path) -> bool:
    """Whether a checkpoint and the weights find room beside all that is on the disk now."""
    free, needs = room_of(folder), writes(run)
    return free is None or free >= needs.checkpoint + needs.least


def check_room(run: Run, folder: Path) -> list[str]:
    """Compare what a run is going to write with what is free, before it is loaded.

    Args:
        folder: of the run, with the checkpoints that it goes on from.

    Returns:
        Notes: checkpoints will not find room. Their lack costs a resume, not the weights.

    Raises:
        DiskError: not even the trained weights will.
    """
    free = room_of(folder)
    if free is None:
        return []
    needs, settings = writes(run), run.settings
    if needs.least > free:
        raise DiskError(
            f"the trained weights would find no room: they take {in_bytes(needs.least)}, and {in_bytes(free)} are free",
            where=str(folder),
            fix=f"make {in_bytes(needs.least - free)} of room, or give --out on another disk",
        )
    done = run.resume.state.step if run.resume else 0
    there = len(list_checkpoints(folder))

    def at_most(every: int, keep: int) -> int:
        """Checkpoints that will be there at the same time, beside those that are there now."""
        to_come = -(-run.steps // every) - done // every if done < run.steps else 0
        if to_come and needs.best:  # at most each validation is the best so far
            to_come += run.steps // settings.validate_every - done // settings.validate_every
        return max(1, min(there + to_come, keep + needs.best + 1) - there) if to_come else 0

    later = sum(file.stat().st_size for old in set_aside(folder) for file in old.rglob("*") if file.is_file())
    room = (free + later - needs.least) // max(1, needs.checkpoint)
    every = settings.save_every if settings.save_minutes is None else 1  # as far as anybody can tell
    if at_most(every, settings.keep) <= room:
        return []
    fewer = [keep for keep in range(1, settings.keep) if at_most(every, keep) <= room]
    alone = " without --save-minutes" if settings.save_minutes is not None else ""
    if fewer:
        do = f"--keep {fewer[-1]} has room"
    elif room:
        do = f"--save-every {run.steps}{alone} has room for one, at the end"
    else:
        do = f"--save-every {run.steps}{alone} trains to the end without one; the weights have room"
    return [
        f"the disk would be full before the run ends, and training stop there: {in_bytes(free)} are free, and "
        f"{needs}; {do}"
    ]
