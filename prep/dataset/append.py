"""Lines at the end of all lists of a data root, or of none, whenever the writer is killed.

What is to be appended is noted beside the lists first; then each list is replaced as a whole. In the middle of that the
lists do not pair up, which no command takes, and the note says how to go on: whoever appends next does that first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogcommon.errors import DataRootError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.failures import disk_errors

from .list_file import alone, replace_list, split_lines, state_of
from .lists import HALF_ADDED, hash_of_list, read_lists
from .new_lists import IMAGES, PROMPTS, VIDEOS

Lists = Mapping[str, Sequence[str]]  # the lines of prompts.txt, of images.txt where there is one, and of videos.txt

_ORDER = {PROMPTS: "captions", IMAGES: "images", VIDEOS: "clips"}  # in which they are replaced


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
            commit_bytes(root / HALF_ADDED, json.dumps(note, indent=1).encode())
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


def _noted(content: bytes, lines: int, more: Sequence[str]) -> dict[str, Any]:
    """What is to be done to one list, and by which sha256 it is known before and after."""
    after = _hash(_with_lines(content, lines, more))
    return {"lines": lines, "more": list(more), "before": _hash(content), "after": after}


def _go_on(root: Path) -> int:
    """Finish what a killed writer has begun, so many lines; where a person has changed a list since, forget it."""
    try:
        noted = json.loads((root / HALF_ADDED).read_bytes())
    except FileNotFoundError:
        return 0
    note = {name: noted[name] for name in _ORDER if name in noted}
    begun = any(hash_of_list(root / name) == one["after"] for name, one in note.items())
    if begun and _carry_out(root, note):
        return len(note[VIDEOS]["more"])
    (root / HALF_ADDED).unlink(missing_ok=True)
    return 0


def _carry_out(root: Path, note: Mapping[str, Any]) -> bool:
    """Replace each list that is not yet as noted; False where somebody has changed one meanwhile."""
    paths = {name: Path(os.path.realpath(root / name)) for name in note}  # a link stays one
    ours = all(hash_of_list(paths[name]) in (one["before"], one["after"]) for name, one in note.items())
    whole = ours and all(_replace(paths[name], **one) for name, one in note.items())
    (root / HALF_ADDED).unlink(missing_ok=True)
    return whole


def _replace(path: Path, *, lines: int, more: Sequence[str], before: str, after: str) -> bool:
    seen = state_of(path)
    data = path.read_bytes()
    return _hash(data) == after or (_hash(data) == before and replace_list(path, _with_lines(data, lines, more), seen))


def _with_lines(data: bytes, lines: int, more: Sequence[str]) -> bytes:
    """A list with lines after its first ``lines``; blank ones that follow these make room for them."""
    parts, line_break = split_lines(data)
    kept = b"".join(parts[: 2 * lines])
    if len(parts) < 2 * lines:  # the last line has no break
        kept += line_break
    return kept + b"".join(entry.encode() + line_break for entry in more)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
