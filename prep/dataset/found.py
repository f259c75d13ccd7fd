"""What lies in a folder of clips: clips, pictures and captions in it and all its folders. Nothing is opened.

Left out, and said so: what is hidden, half-downloaded or empty, links that point nowhere, what cogprep and cogtrain
have made, and names that a list cannot hold.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from cogcommon.files.ownership import RECORD_FILE
from cogcommon.media.image import HEIC_PICTURES, PICTURES
from cogcommon.shards.contract import CONTRACT_FILE

from ..source.clip import CLIPS

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet", "captions.json")  # names of tables
TABLES = {".csv": ".csv", ".tsv": ".csv", ".jsonl": ".jsonl", ".parquet": ".parquet"}  # how metadata.* would end

_UNFINISHED = (".part", ".crdownload", ".download", ".aria2", ".ytdl", ".tmp")  # beside a download, or at its end
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


@dataclass
class FoundFiles:
    """Names relative to the folder, with ``/`` between their parts, in the order of the names."""

    root: Path
    clips: list[str] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    fit_pictures: list[str] = field(default_factory=list)  # of them, what would not be left out if they were clips
    texts: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)  # the outermost folders' first
    tables: list[str] = field(default_factory=list)  # of other names, which are not read
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by the reason

    @cached_property
    def alone(self) -> list[str]:
        """The pictures that a list can name and that are of no clip's name, in the order of the names."""
        images = filter(None, map(self.image_of, self.clips))
        taken = {split_name(name)[0] for name in (*self.clips, *images)}
        return sorted(name for name in self.fit_pictures if split_name(name)[0] not in taken)

    def image_of(self, clip: str) -> str | None:
        """The picture of a clip's name: beside it, or at its place in images/ (``videos/b/7.mp4``: images/b/7.png)."""
        if not self.pictures:
            return None
        stem, _ = split_name(clip)
        likely = (place + kind for place in (stem, f"images/{stem.partition('/')[2] or stem}") for kind in self._kinds)
        return next((picture for picture in likely if picture in self.pictures), None)

    @cached_property
    def _kinds(self) -> list[str]:
        """How the pictures' names end: in any capitals, but a .png before a .jpg."""
        there = {name[len(split_name(name)[0]) :] for name in self.pictures}
        return sorted(there, key=lambda kind: (PICTURES.index(kind.lower()), kind))


def find(root: Path) -> FoundFiles:
    """Look through a folder. Links are followed, and each folder is looked at once.

    Raises:
        OSError: the folder itself cannot be read.
    """
    found = FoundFiles(root)
    folders, links = [""], list[str]()  # what lies in a folder itself is listed under that name, not a link's
    seen = set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            info = (root / folder).stat()
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(root / folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            found.left_out["folders that cannot be read"].append(f"{folder}/")
            continue
        names = {entry.name for entry in entries}
        if folder and names & {RECORD_FILE, CONTRACT_FILE}:
            found.left_out["made by cogprep or cogtrain"].append(f"{folder}/")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not _leads_to(os.path.isdir, entry.is_dir, entry):
                _sort(found, entry, name, names)
            elif not entry.name.startswith(".") and entry.name not in _OF_SYSTEMS:
                (links if entry.is_symlink() else folders).append(name)
    for listed in (found.clips, *found.left_out.values()):
        listed.sort()
    found.metadata.sort(key=_rank)
    return found


def _rank(metadata: str) -> tuple[int, str, int]:
    folder, _, name = metadata.rpartition("/")
    return len(PurePosixPath(metadata).parts), folder, METADATA.index(name)


def _leads_to(through: Callable[[str], bool], itself: Callable[[], bool], entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a file; of a link, what it points to, which os.path asks without raising."""
    return through(entry.path) if entry.is_symlink() else itself()


def _sort(found: FoundFiles, entry: os.DirEntry[str], name: str, names: set[str]) -> None:
    """Put a file where it belongs."""
    stem, kind = split_name(entry.name)
    if kind in _UNFINISHED and split_name(stem)[1] in CLIPS:
        found.left_out["half-downloaded"].append(name)
    elif kind in CLIPS:
        why = next(_why_not(entry, name, names), None)
        if why is None:
            found.clips.append(name)
        else:
            found.left_out[why].append(name)
    elif kind in PICTURES:
        found.pictures.add(name)
        if not any(_why_not(entry, name, names)):
            found.fit_pictures.append(name)
    elif kind in HEIC_PICTURES:
        found.left_out["HEIC, which cannot be read here: save them as PNG or JPEG"].append(name)
    elif kind == ".txt":
        found.texts.add(name)
    elif entry.name in METADATA:
        found.metadata.append(name)
    elif kind in TABLES and not entry.name.startswith("."):
        found.tables.append(name)


def split_name(name: str) -> tuple[str, str]:
    """A name, folders and all, without its kind, and the kind in small letters: ``b.c/A`` and ``.mp4``.

    Of a name without a dot, whatever the dots of its folders, the kind is empty.
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.rpartition(".")
    return (f"{folder}{slash}{stem}", f".{kind}".lower()) if dot else (name, "")


def _why_not(entry: os.DirEntry[str], name: str, names: set[str]) -> Iterator[str]:
    """Why a clip is left out."""
    if entry.name.startswith("."):
        yield "hidden"
    if any(entry.name + end in names for end in _UNFINISHED):
        yield "half-downloaded"
    if not _leads_to(os.path.isfile, entry.is_file, entry):
        yield "links that point nowhere" if entry.is_symlink() else "not regular files"
    elif not Path(entry.path).stat().st_size:
        yield "empty (0 bytes)"
    if not fits_a_line(name):
        yield "names that a list cannot hold (not UTF-8, or with a line break): rename them"


def fits_a_line(name: str) -> bool:
    """Whether a list can hold a name."""
    return not any(mark in "\r\n" or "\ud800" <= mark <= "\udfff" for mark in name)
