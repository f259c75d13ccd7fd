"""Which clips are set aside for validation: chosen once, by content, and remembered.

A clip that was held out never moves into training by itself, nor one that was trained on out of it;
either would make every later validation loss a lie. So the choice is kept beside the shards, and
only another `--holdout` changes it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from cogcommon.cli.progress import paused, say
from cogcommon.errors import SettingError
from cogcommon.words import counted


@dataclass(frozen=True)
class Holdout:
    """How many clips were asked for, and which they are, by content hash."""

    count: int = 0
    clips: frozenset[bytes] = frozenset()


def choose_holdout(
    asked: int | None, before: Holdout, present: Collection[bytes], trained: Collection[bytes]
) -> Holdout:
    """The clips to set aside, with all their captions, so that no clip is on both sides.

    The same number as before keeps the clips of before, also those that are not here now; where one
    of them has gone, a clip that was never trained on takes its place, if there is any. Another number
    takes as few clips as it can from where they are: those are encoded again, since their samples go from the
    shards of one side before those of the other are written.

    Args:
        asked: how many; None for as many as before.
        before: the choice so far.
        present: the clips that are here now.
        trained: the clips that training shards have.
    """
    count = before.count if asked is None else asked
    here = before.clips & set(present)
    if count < len(here):
        return Holdout(count, frozenset(sorted(here)[:count]))
    others = sorted(set(present) - before.clips)
    fill = [clip for clip in others if clip not in trained]
    if count != before.count:
        fill += [clip for clip in others if clip in trained]
    return Holdout(count, before.clips.union(fill[: count - len(here)]))


def describe_moves(
    before: Holdout, after: Holdout, out: str, *, held: Collection[bytes], trained: Collection[bytes]
) -> str:
    """Which clips another choice moves between training and validation, in words; empty where none is."""
    ways = {
        "validation to training": len(set(held) - after.clips),
        "training to validation": len(after.clips & set(trained)),
    }
    moves = [f"{counted(count, 'clip')} from {way}" for way, count in ways.items() if count]
    if after == before or not moves:
        return ""
    again = "which is" if sum(ways.values()) == 1 else "which are"
    return (
        f"--holdout {after.count} moves {' and '.join(moves)}, {again} encoded again, so as to be on both sides at no "
        f"moment; {out} was encoded with --holdout {before.count}"
    )


def ask_to_move(
    before: Holdout, after: Holdout, out: str, yes: bool, *, held: Collection[bytes], trained: Collection[bytes]
) -> None:
    """Ask before another `--holdout` moves clips between training and validation.

    Args:
        out: the folder of shards, as messages name it.
        yes: say what moves, and do not ask.
        held: clips that are in its validation shards and stay in the data.
        trained: clips that are in its training shards and stay in the data.

    Raises:
        SettingError: the answer is no, or there is no terminal to ask on.
    """
    what = describe_moves(before, after, out, held=held, trained=trained)
    if not what:
        return
    if yes:
        say(what)
        return
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        say(f"{what}. A clip that a model was trained on cannot judge that model.")
        with suppress(EOFError), paused():
            if input("move them? [y/N] ").strip().lower() in ("y", "yes"):
                return
    raise SettingError(
        what,
        where=f"{out}, which is as it was" if terminal else "there is no terminal to ask on",
        fix=f"leave --holdout out, which keeps {before.count}; or add --yes to move them; or --out ANOTHER",
    )
