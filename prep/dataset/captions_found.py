"""The captions of the clips of a folder: from a .txt file beside each, else from a table of many.

A clip may have several captions; each makes a line of its own.
"""

from __future__ import annotations

import ntpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from cogcommon.files.ownership import LISTS

from ..source.clip import CLIPS
from .found import FoundFiles, split_name
from .metadata import in_a_line, read_table, text_of

_LISTS = frozenset({*LISTS, "images.txt"})
_LONGEST = 1 << 20  # bytes; a longer text is no caption


@dataclass
class Captions:
    """The captions by clip, and what to say of where they came from."""

    of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # by clip, where its captions are from
    absent: dict[str, list[str]] = field(default_factory=dict)  # by table, clips in it that are not there
    differ: dict[str, list[str]] = field(default_factory=dict)  # by table, clips of which another one was believed
    shared: list[str] = field(default_factory=list)  # texts that lie beside more than one clip of their name
    joined: list[str] = field(default_factory=list)  # texts of several lines, which are one caption
    faults: dict[str, str] = field(default_factory=dict)  # by file, why it gave no caption

    def counts(self, clips: Iterable[str]) -> dict[str, int]:
        """Of some clips, how many have their captions from where."""
        return dict(Counter(self.sources[clip] for clip in clips if clip in self.sources))

    def take(self, clip: str, captions: tuple[str, ...], source: str) -> None:
        """Give a clip its captions, unless it has some already."""
        if clip not in self.of:
            self.of[clip] = captions
            self.sources[clip] = source
        elif self.of[clip] != captions:
            self.differ.setdefault(source, []).append(clip)


def find_captions(found: FoundFiles, clips: Sequence[str]) -> Captions:
    """Look for the captions of some clips, as `FoundFiles` or videos.txt names them.

    Raises:
        DataRootError: a table is damaged.
    """
    captions = Captions()
    _take_texts(captions, found, clips)
    places, there = Places(clips), Places([*found.clips, *chain(*found.left_out.values())])
    for table in found.metadata:
        _take_table(captions, found, table, places, there)
    return captions


def _take_texts(captions: Captions, found: FoundFiles, clips: Sequence[str]) -> None:
    """Captions from the .txt files beside the clips."""
    beside = defaultdict(list)
    for clip in dict.fromkeys(clips):
        text = f"{split_name(clip)[0]}.txt"
        if text in found.texts and text not in _LISTS:
            beside[text].append(clip)
    for text, theirs in beside.items():
        lines = _read(found.root / text, text, captions.faults)
        caption = in_a_line(lines)
        if len([line for line in lines.splitlines() if line.strip()]) > 1:
            captions.joined.append(text)
        for clip in theirs if caption else ():
            captions.take(clip, (caption,), ".txt files beside them")
        if caption and len(theirs) > 1:
            captions.shared.append(text)


def _take_table(captions: Captions, found: FoundFiles, name: str, places: Places, there: Places) -> None:
    """Captions from a table, for the clips that have none yet.

    Args:
        places: of the clips whose captions are looked for.
        there: of all clips in the folder.
    """
    table = read_table(found.root / name)
    if table.unused:
        captions.faults[name] = table.unused
    folder = name.rpartition("/")[0]
    rows: dict[str, tuple[str, ...]] = {}
    for row in table.rows:
        clip = places.find(row.clip, folder)
        if clip is not None:
            rows[clip] = tuple(dict.fromkeys((*rows.get(clip, ()), *row.captions)))
        elif split_name(row.clip)[1] in CLIPS and there.find(row.clip, folder) is None:  # it may name pictures, too
            captions.absent.setdefault(name, []).append(row.clip)
    for clip, several in rows.items():
        if several:
            captions.take(clip, several, name)


def _read(path: Path, name: str, faults: dict[str, str]) -> str:
    """What a text holds; empty where that is no caption."""
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            faults[name] = "too long for a caption"
            return ""
        return text_of(data)
    except UnicodeDecodeError:
        faults[name] = "not UTF-8; save it as UTF-8"
    except OSError as error:
        faults[name] = f"cannot be read: {error.strerror}"
    return ""


class Places:
    """Finds a clip by the name that a table gives it: perhaps of another folder, another machine, or Windows."""

    def __init__(self, clips: Sequence[str]) -> None:
        self._clips: dict[str, str] = {}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for clip in dict.fromkeys(clips):
            folders, bare = _parts(clip)
            self._clips["/".join((*folders, bare))] = clip
            self._by_name[bare].append(clip)

    def find(self, name: str, folder: str) -> str | None:
        """The clip, or None.

        Args:
            folder: in which the table lies, relative to the root.
        """
        folders, bare = _parts(name)
        for likely in _likely(folders, bare, folder):
            if likely in self._clips:
                return self._clips[likely]
        alike = self._by_name.get(bare, ()) if _is_loose(name) else ()
        return alike[0] if len(alike) == 1 else None


def _parts(name: str) -> tuple[list[str], str]:
    """The folders of a path and its last part, without ``.`` and ``..``, accents written in one way."""
    parts: list[str] = []
    for part in unicodedata.normalize("NFC", name).replace("\\", "/").split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    return parts[:-1], parts[-1] if parts else ""


def _is_loose(name: str) -> bool:
    """Whether nothing is known of the folder: a bare name, or a path of another machine."""
    return ntpath.basename(name) == name or bool(ntpath.splitdrive(name)[0]) or name[0] in "/\\"


def _likely(folders: list[str], bare: str, folder: str) -> Iterator[str]:
    """Where a clip may lie: below the table, below the root, or wherever the end of a longer path fits."""
    for start in range(len(folders) + 1):
        if start and start == len(folders):
            return  # a name without any of its folders
        inner = "/".join((*folders[start:], bare))
        if folder:
            yield f"{folder}/{inner}"
        yield inner
