"""Lines at the end of all lists of a data root, or of none, whenever the writer is killed.

What is to be appended is noted beside the lists first; then each list is replaced as a whole. In the middle of that the
lists do not pair up, which no command takes, and the note says how to go on: whoever appends next does that first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.errors import DataRootError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.failures import disk_errors
from cogcommon.files.typed import build, parse_object
from cogcommon.words import first_line

from .list_file import alone, replace_list, split_lines, state_of
from .lists import HALF_ADDED, hash_of_list, read_lists
from .new_lists import IMAGES, PROMPTS, VIDEOS

Lists = Mapping[str, Sequence[str]]  # the lines of prompts.txt, of images.txt where there is one, and of videos.txt

_ORDER = {PROMPTS: "captions", IMAGES: "images", VIDEOS: "clips"}  # in which they are replaced


@dataclass(frozen=True)
class _Noted:
    """What is to be done to one list, and by which sha256 it is known before and after."""

    lines: int
    more: list[str]
    before: str
    after: str


@dataclass(frozen=True)
class Appended:
    """What was done."""

    lists: Lists  # as they are now
    lines: int  # that were appended
    finished: int  # of them, what an append that was killed had begun


def append_lines(root: Path, choose: Callable[[Lists], Lists]) -> Appended:
    """Append lines to the lists that are there; every line that they have stays byte for byte as it is.

    Args:
        root: the data root, with prompts.txt and videos.txt.
        choose: from the lists as they are, the lines for each of them, as many for one as for the other. Called again
            where somebody has changed a list meanwhile.

    Raises:
        DataRootError: the lists do not pair up; nothing was appended.
        DiskError: the disk refuses.
    """
    captions = Path(os.path.realpath(root / PROMPTS))
    with disk_errors(root), alone(captions):
        finished = _go_on(root)
        while True:
            content = {name: (root / name).read_bytes() for name in _ORDER if (root / name).is_file()}
            lists = _read(root)
            more = choose(lists)
            lines = len(more[VIDEOS])
            if not lines:
                return Appended(lists, finished, finished)
            note = {name: _noted(content.get(name, b""), len(lists[name]), more[name]) for name in lists}
            shown = {name: dataclasses.asdict(noted) for name, noted in note.items()}
            commit_bytes(root / HALF_ADDED, json.dumps(shown, indent=1).encode())
            if _carry_out(root, note):
                after = {name: [*lists[name], *more[name]] for name in lists}
                return Appended(after, finished + lines, finished)


def _read(root: Path) -> Lists:
    """The lists, which pair up; captions may be missing."""
    data = read_lists(root, task="i2v")
    if faults := [fault for fault in data.faults if fault.kind != "uncaptioned"]:
        raise DataRootError(
            "the lists do not pair up, so nobody can tell which clip a new line would belong to",
            where="\n       ".join([str(root), *map(str, faults)]),
            fix="line n of every list is one clip: mend these lines, then the same command again",
        )
    return {name: data.columns[column] for name, column in _ORDER.items() if column in data.columns}


def _noted(content: bytes, lines: int, more: Sequence[str]) -> _Noted:
    return _Noted(lines, list(more), _hash(content), _hash(_with_lines(content, lines, more)))


def _go_on(root: Path) -> int:
    """Finish what a killed writer has begun, so many lines; where a person has changed a list since, forget it."""
    try:
        given = parse_object((root / HALF_ADDED).read_bytes())
        note = {name: build(_Noted, given[name]) for name in _ORDER if name in given or name != IMAGES}
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError) as error:
        raise DataRootError(
            "what an `init --add` that was stopped has noted cannot be read, so it cannot be finished",
            where=f"{root / HALF_ADDED}: {first_line(error)}",
            fix="look whether line n of every list is one clip, remove that file, then the same command again",
        ) from error
    begun = any(hash_of_list(root / name) == noted.after for name, noted in note.items())
    if begun and _carry_out(root, note):
        return len(note[VIDEOS].more)
    (root / HALF_ADDED).unlink(missing_ok=True)
    return 0


def _carry_out(root: Path, note: Mapping[str, _Noted]) -> bool:
    """Replace each list that is not yet as noted; False where somebody has changed one meanwhile."""
    paths = {name: Path(os.path.realpath(root / name)) for name in note}  # a link stays one
    ours = all(hash_of_list(paths[name]) in (noted.before, noted.after) for name, noted in note.items())
    whole = ours and all(_replace(paths[name], noted) for name, noted in note.items())
    (root / HALF_ADDED).unlink(missing_ok=True)
    return whole


def _replace(path: Path, noted: _Noted) -> bool:
    seen, data = state_of(path), path.read_bytes()
    if _hash(data) == noted.after:
        return True
    return _hash(data) == noted.before and replace_list(path, _with_lines(data, noted.lines, noted.more), seen)


def _with_lines(data: bytes, lines: int, more: Sequence[str]) -> bytes:
    """A list with lines after its first ``lines``; blank ones that follow these make room for them."""
    parts, line_break = split_lines(data)
    kept = b"".join(parts[: 2 * lines])
    if len(parts) < 2 * lines:  # the last line has no break
        kept += line_break
    return kept + b"".join(entry.encode() + line_break for entry in more)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
