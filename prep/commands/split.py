"""`cogprep split FILM --out DS`: the lists of a data root whose clips are parts of long footage.

Nothing is copied or encoded: a line names a film and times in it, `film.mp4#t=12.5,18`. No file is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.failures import disk_errors
from cogcommon.words import counted, in_words

from ..dataset.found import find, fits_a_line
from ..dataset.lists import check_root, refuse_address
from ..dataset.new_lists import PROMPTS, SHEETS, VIDEOS, entry_of, refuse_output, set_aside, sheet_of, write_list
from ..dataset.next_steps import next_steps
from ..processes.pool import Pool, default_workers
from ..settings.lists import SplitSettings
from ..show.cut_sheet import ShownPart, draw_cut_sheets
from ..source.clip import CLIPS, ClipFault
from ..split.film import Film, Stretch, look_at_stretch, open_film
from ..split.parts import SHORT, Chosen, LeftOut, Lengths, choose

_STRETCH_S = 180.0  # decoded in one go; up to two groups of pictures before it are decoded for nothing
_UNSEEKABLE_S = 600.0  # longer films must be such that a part can be reached
_SHOWN = 4  # names that one line shows


@dataclass
class FilmTold:
    """What became of one film."""

    film: str
    seconds: float = 0.0
    shots: int = 0
    parts: int = 0
    parts_seconds: float = 0.0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitTold:
    """What `split` found and wrote."""

    out: str
    lines: int
    films: Sequence[FilmTold]
    written: Sequence[str]


def run(settings: SplitSettings) -> None:
    """The command: look, write, and say what to do next."""
    told = split(settings)
    if settings.json:
        print(json_text(asdict(told)))
    else:
        _show(told, settings, Console(soft_wrap=True))


def split(settings: SplitSettings) -> SplitTold:
    """Look through all films, and write the lists of their parts and the sheets of their cuts.

    Raises:
        DataRootError: a list is there already; there is no film, or none gives a part.
    """
    root = settings.root
    refuse_address(settings.source, "split", "FILM")
    refuse_address(root, "split", "--out")
    films = _films(settings.source)
    _refuse_lists(settings)
    names = {film: _name(film, root) for film in films}
    lengths = Lengths(settings.shortest, settings.longest, settings.every)
    entries: list[str] = []
    told: list[FilmTold] = []
    written: list[str] = []
    with Pool(settings.workers or default_workers()) as pool:
        for path, film, seen, faults in _look(pool, films):
            about = FilmTold(str(path), faults=faults)
            told.append(about)
            if film is None:
                continue
            chosen = choose(film, seen, lengths)
            about.seconds, about.shots, about.left_out = film.length_s, chosen.shots, chosen.left_out
            about.parts = len(chosen.parts)
            about.parts_seconds = sum(part.end_s - part.begin_s for part in chosen.parts)
            written += list(_write_sheets(root, path, chosen, len(entries) + 1, seen))
            entries += [entry_of(f"{names[path]}{part}") for part in chosen.parts]
    if not entries:
        raise _nothing(told, settings)
    lists = {VIDEOS: entries, PROMPTS: [""] * len(entries)}
    for name, lines in lists.items():
        if not write_list(root / name, lines):
            raise _there_already([name], settings)
    return SplitTold(str(root), len(entries), told, [*lists, *written])


def _films(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not os.path.lexists(source):
        raise DataRootError(
            "there is no such video or folder", where=str(source), fix="cogprep split film.mp4 --out ds"
        )
    check_root(source, named="FILM", holds="long videos")
    found = find(source)
    if not found.clips:
        raise DataRootError(
            "there are no videos in this folder",
            where=str(source),
            fix=f"name a video, or a folder of files that end in {', '.join(sorted(CLIPS))}",
        )
    return [source / name for name in found.clips]


def _name(film: Path, root: Path) -> str:
    """How a list names a film: relative where it lies in the data root, else absolute.

    Raises:
        DataRootError: no list can hold the name.
    """
    whole, inside = (Path(os.path.abspath(path)) for path in (film, root))  # noqa: PTH100  links stay as typed
    name = whole.relative_to(inside).as_posix() if whole.is_relative_to(inside) else str(whole)
    if not fits_a_line(name):
        raise DataRootError("a list cannot hold this name (not UTF-8, or with a line break)", where=name, fix="mv it")
    return name


def _refuse_lists(settings: SplitSettings) -> None:
    """Before hours of work: the lists could not be written."""
    refuse_output(settings.root)
    there = [name for name in (VIDEOS, PROMPTS) if os.path.lexists(settings.root / name)]
    if there:
        raise _there_already(there, settings)
    with disk_errors(settings.root):
        settings.root.mkdir(parents=True, exist_ok=True)


def _there_already(names: Sequence[str], settings: SplitSettings) -> DataRootError:
    again = "cogprep", "split", settings.source, "--out", settings.root
    return DataRootError(
        f"there is a {' and a '.join(names)} already, and no list is overwritten",
        where=str(settings.root),
        fix=f"--out another folder; or, for new lists: {set_aside(settings.root, names, *again)}",
    )


def _look(pool: Pool, films: Sequence[Path]) -> Iterator[tuple[Path, Film | None, list[Stretch | range], list[str]]]:
    """Each film with what was seen of it, in their order, and why not more."""
    opened: list[Film | ClipFault] = []
    with stage("reading times", len(films), "film") as progress:
        for film in pool.run(open_film, [(path,) for path in films]):
            opened.append(_too_long_to_wind(film) or film)
            progress.advance()
    stretches = [[] if isinstance(film, ClipFault) else list(_stretches(film)) for film in opened]
    tasks = [
        (path, film, one)
        for path, film, ranges in zip(films, opened, stretches, strict=True)
        if isinstance(film, Film)
        for one in ranges
    ]
    with stage("looking for cuts", sum(_minutes(film, one) for _, film, one in tasks), "minute") as progress:
        results = pool.run(look_at_stretch, tasks)
        for path, film, ranges in zip(films, opened, stretches, strict=True):
            if isinstance(film, ClipFault):
                yield path, None, [], [film.reason]
                continue
            seen: list[Stretch | range] = []
            faults = []
            for one, result in zip(ranges, results, strict=False):
                progress.advance(by=_minutes(film, one))
                if isinstance(result, ClipFault):
                    faults.append(
                        f"{film.times_s[one.start]:.0f} s to {film.times_s[one.stop - 1]:.0f} s: {result.reason}"
                    )
                seen.append(one if isinstance(result, ClipFault) else result)
            yield path, film, seen, faults


def _too_long_to_wind(film: Film | ClipFault) -> ClipFault | None:
    if isinstance(film, ClipFault) or film.seekable or film.length_s <= _UNSEEKABLE_S:
        return None
    return ClipFault(
        f"it does not say when its pictures are shown, so each part of its {in_words(film.length_s)} would be decoded "
        "from the beginning; to make one whose parts can be reached: ffmpeg -i FILM -crf 16 OUT.mp4"
    )


def _stretches(film: Film) -> Iterator[range]:
    """The pictures of a film, in about equal stretches."""
    total = len(film.times_s)
    pieces = max(1, round(film.length_s / _STRETCH_S)) if film.seekable else 1
    yield from (range(total * place // pieces, total * (place + 1) // pieces) for place in range(pieces))


def _minutes(film: Film, pictures: range) -> int:
    return max(1, round((film.times_s[pictures.stop - 1] - film.times_s[pictures.start]) / 60))


def _write_sheets(root: Path, film: Path, chosen: Chosen, line: int, seen: Sequence[Stretch | range]) -> Iterator[str]:
    """Draw and write the sheets of a film under names that are free.

    Args:
        line: of the list, of the film's first part.
    """
    pictures = {place: picture for one in seen if isinstance(one, Stretch) for place, picture in one.pictures.items()}
    shown = [
        ShownPart(line + place, pictures_of, part.begin_s, part.end_s)
        for place, (pictures_of, part) in enumerate(zip(chosen.ranges, chosen.parts, strict=True))
    ]
    with disk_errors(root):
        (root / SHEETS).mkdir(exist_ok=True)
        for sheet in draw_cut_sheets(film.name, shown, pictures):
            names = (sheet_of(film.name, number) for number in count(1))
            yield next(name for name in names if commit_bytes(root / name, sheet, exclusive=True))


def _nothing(told: Sequence[FilmTold], settings: SplitSettings) -> DataRootError:
    lines = [f"{film.film}: {'; '.join([*film.faults, *_left_out(film, settings)])}" for film in told]
    fix = ""
    if any(SHORT in film.left_out for film in told):
        fix = f"--shortest {max(0.1, settings.shortest / 2):g} takes shorter ones"
        if settings.every is None and any(film.seconds >= settings.shortest for film in told):
            fix += f"; --every {settings.shortest:g} cuts every so many seconds, wherever scenes change"
    return DataRootError("no part is left to make a clip of", where="\n       ".join(lines[:_SHOWN]), fix=fix)


def _left_out(film: FilmTold, settings: SplitSettings) -> Iterator[str]:
    for why, left in film.left_out.items():
        what = f"shorter than {settings.shortest:g} s" if why == SHORT else why
        yield f"{left.pieces:,} {what} ({in_words(left.seconds)})"


def _show(told: SplitTold, settings: SplitSettings, console: Console) -> None:
    for film in told.films:
        shots = f"{counted(film.shots, 'scene')}, " if settings.every is None else ""
        length = f", {in_words(film.parts_seconds / film.parts)} on average" if film.parts else ""
        console.print(
            f"{film.film}: {in_words(film.seconds)}, {shots}{counted(film.parts, 'part')}{length}", style="bold"
        )
        for fault in film.faults:
            console.print(f"  {fault}", style="yellow")
        if left_out := list(_left_out(film, settings)):
            console.print(f"  left out: {', '.join(left_out)}")
    lists, sheets = told.written[:2], told.written[2:]
    console.print(f"written: {', '.join(lists)} ({counted(told.lines, 'line')})")
    shown = ", ".join(str(Path(told.out) / name) for name in sheets[:_SHOWN])
    more = f" and {len(sheets) - _SHOWN:,} more" if len(sheets) > _SHOWN else ""
    console.print(f"look at the cuts: {shown}{more}")
    console.print("")
    sentence, validate = next_steps(Path(told.out), counted(told.lines, "line"))
    console.print(sentence)
    console.print(f"  {validate}", style="bold")
