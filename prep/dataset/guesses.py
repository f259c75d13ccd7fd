"""What was probably meant where many lines, or the size itself, are wrong in one way; and what to type then."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import command_line, quoted
from cogcommon.errors import SettingError
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Resolution
from cogcommon.words import counted

from ..source.clip import ClipFault
from ..source.near import folder_before
from ..source.part import file_named
from .probe import Look

_MOST = 0.9  # of the clips, for something to be said of all


@dataclass(frozen=True)
class Guess:
    """What is probably wrong, and what to type."""

    what: str
    fix: str


def guess_folders(root: Path, name: str, entries: Sequence[str], bad: Collection[str]) -> Iterator[Guess]:
    """A list whose missing files all lie in one folder that its lines do not name.

    Args:
        name: of the list.
        bad: the entries that cannot be used.
    """
    missing = {entry for entry in bad if entry and not _is_file(root, entry)}
    folder = folder_before(root, file_named(min(missing))) if missing else None
    if folder is None or not all(_is_file(root / folder, entry) for entry in missing):
        return
    lines = sum(entry in missing for entry in entries)
    by_hand = f"write {folder}/ in front of these lines of {name}"
    fix = _rewritten(root / name, f"s|^|{folder}/|") if lines == len(entries) else by_hand
    yield Guess(
        f"{_paths(lines, entries)} of {name} {'lack' if lines > 1 else 'lacks'} {folder}/, where the files are", fix
    )


def guess_moved(root: Path, name: str, entries: Sequence[str], bad: Collection[str]) -> Iterator[Guess]:
    """A list of another machine, or of a folder above: its missing files are there once their paths begin later.

    Args:
        name, bad: as in `guess_folders`.
    """
    missing = {entry for entry in bad if entry and not _is_file(root, entry)}
    first = min(missing, default="")
    for slash in re.finditer("/+", first):
        before = first[: slash.end()]
        if all(entry.startswith(before) and _is_file(root, entry[len(before) :]) for entry in missing):
            lines = sum(entry in missing for entry in entries)
            by_hand = f"take {before} out of these lines of {name}"
            pattern = re.sub(r"[\\.*\[\]^$|]", r"\\\g<0>", before)
            fix = _rewritten(root / name, f"s|^{pattern}||") if lines == len(entries) else by_hand
            yield Guess(
                f"{_paths(lines, entries)} of {name} {'begin' if lines > 1 else 'begins'} with {before}; "
                f"without it the files are there, in {root}",
                fix,
            )
            return


def _paths(lines: int, entries: Sequence[str]) -> str:
    return f"{'all ' if lines == len(entries) > 1 else ''}{counted(lines, 'path')}"


def _rewritten(path: Path, script: str) -> str:
    """The command that changes every line of a list."""
    old, new = quoted(path), quoted(path.with_name(f"{path.name}.new"))
    return f"sed {quoted(script)} {old} > {new} && mv {new} {old}"


def guess_uncaptioned(root: Path, names: tuple[str, str], captions: Sequence[str], clips: int) -> Iterator[Guess]:
    """Captions that are not written yet.

    Args:
        names: of the lists of captions and of clips.
    """
    blank = sum(not caption for caption in captions)
    if blank and len(captions) == clips:
        flags = zip(("--prompts", "--videos"), names, ("prompts.txt", "videos.txt"), strict=True)
        more = [word for flag, name, usual in flags if name != usual for word in (flag, name)]
        yield Guess(
            f"{counted(blank, 'caption')} {'is' if blank == 1 else 'are'} still to be written",
            f"write one into each blank line of {names[0]}, or let a model do it: "
            + command_line("cogprep", "caption", root, *more),
        )


def guess_turned(
    checkpoint: Checkpoint, buckets: Sequence[Resolution], looks: Collection[Look | ClipFault]
) -> Iterator[Guess]:
    """Height and width changed for each other: the clips lie, and all sizes stand; or the other way round."""
    leans = [_lean(look.facts.width, look.facts.height) for look in looks if isinstance(look, Look)]
    of_sizes = {_lean(size.width, size.height) for size in buckets}
    lean = max(set(leans), key=leans.count, default=0)
    if lean == 0 or of_sizes != {-lean} or leans.count(lean) < _MOST * len(leans):
        return
    if len(turned := turned_sizes(checkpoint, buckets)) < len(buckets):
        return
    clips, sizes = ("wider than high", "higher than wide")[::lean]
    are, said = "is" if len(leans) == 1 else "are", ", ".join(map(str, buckets))
    yield Guess(
        f"{counted(leans.count(lean), 'clip')} of {len(leans):,} {are} {clips}, and {said} "
        f"{'is' if len(buckets) == 1 else 'are'} {sizes} (frames x height x width)",
        f"--resolution {' '.join(map(str, turned))}",
    )


def turned_sizes(checkpoint: Checkpoint, buckets: Sequence[Resolution]) -> list[Resolution]:
    """The sizes with height and width changed for each other: those that the model takes."""
    turned = []
    for size in buckets:
        with suppress(SettingError):
            checkpoint.check_resolution(size.turned)
            turned.append(size.turned)
    return turned


def _lean(width: int, height: int) -> int:
    """1: wider than high; -1: higher than wide."""
    return (width > height) - (width < height)


def _is_file(folder: Path, entry: str) -> bool:
    try:
        return (folder / entry).is_file() or (folder / file_named(entry)).is_file()
    except (OSError, ValueError):
        return False
