"""What is there instead of a file that a list names and that is missing.

Lists come from other machines, other programs and other alphabets: the folder is left out, capitals differ,
accents are written in two ways, Windows paths, quotes of a table, addresses of a web page.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from cogcommon.media.image import PICTURES

from .clip import CLIPS

_MOST = 20_000  # names of a folder that are looked at
_FOLDERS = 200  # folders that a bare name is looked for in
_QUOTES = "\"'`“”„«»‘’"
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/")
_DRIVE = re.compile(r"[A-Za-z]:(?=[\\/])|\\\\")


def near(path: Path) -> str:
    """What the missing file probably is: ``videos/a.mp4 is there``; empty where nothing is like it.

    Args:
        path: of the data root and the entry; the part of it that is there is taken for the folder.
    """
    try:
        return _near(path)
    except (OSError, ValueError):  # of names that no file can have
        return ""


def _near(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    entry = path.relative_to(folder).as_posix()
    if _URL.match(entry):
        return "an address, not a file: download it first"
    bare = entry.strip(_QUOTES + " ")
    told = ["in quotes"] if bare != entry else []
    if drive := _DRIVE.match(bare):
        bare = bare[drive.end() :]
    if drive or "\\" in bare:
        bare = bare.replace("\\", "/")
        told.append("a Windows path")
    found = _find(folder, bare.strip("/").split("/"), outer=bool(drive) or entry.startswith("file:"))
    if found is not None:
        root = next((above for above in (folder, *folder.parents) if (above / "videos.txt").is_file()), folder)
        told.append(f"{(folder / found).relative_to(root).as_posix()} is there{_how(found, bare)}")
    return "; ".join(told)


def folder_before(root: Path, entry: str) -> str | None:
    """The folder below the root in which a missing file lies under its whole name: ``videos``; None: in none."""
    entry = entry.removeprefix("./")
    try:
        found = _find(root, entry.split("/"), outer=False)
    except (OSError, ValueError):
        return None
    return found.removesuffix(f"/{entry}") if found and found.endswith(f"/{entry}") else None


def clip_of_pictures(folder: Path) -> str | None:
    """What makes a clip of a folder of frames; None of a folder that holds no pictures."""
    kinds = Counter(Path(name).suffix for name in _names(folder).values())
    of_pictures = [kind for kind, _ in kinds.most_common() if kind.lower() in PICTURES]
    if not of_pictures:
        return None
    return f"ffmpeg -framerate 24 -pattern_type glob -i 'CLIP/*{of_pictures[0]}' -crf 16 OUT.mp4"


def _how(found: str, entry: str) -> str:
    """Where two names look alike, how they differ."""
    entry = entry.removeprefix("./")
    if found == entry or found.endswith("/" + entry) or entry.endswith("/" + found):
        return ""
    if unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", entry):
        return ", its accents written in the other way (Unicode NFC and NFD)"
    if found.casefold() == entry.casefold():
        return ", in other capitals"
    return ""


def _find(folder: Path, parts: list[str], *, outer: bool) -> str | None:
    """A file like these parts, relative to the folder.

    Args:
        outer: the first parts may be folders of another machine.
    """
    for start in range(len(parts) if outer else 1):
        if (there := _down(folder, parts[start:])) is not None:
            return there
    name = parts[-1]
    for inner in islice(_folders(folder), _FOLDERS):
        if (there := _down(inner, [name])) is not None:
            return (inner.relative_to(folder) / there).as_posix()
    return None


def _down(folder: Path, parts: list[str]) -> str | None:
    """The path below the folder whose every part is like these."""
    at, names = folder, []
    for part in parts:
        if part in ("", "."):
            continue
        name = part if (at / part).exists() else _names(at).get(_alike(part))
        if name is None and part is parts[-1]:
            name = _stems(at, _kinds(part)).get(_alike(Path(part).stem))
        if name is None:
            return None
        names.append(name)
        at = at / name
    return "/".join(names) if names and at.is_file() else None


def _alike(name: str) -> str:
    """Equal for names that a reader would take for the same."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc")).split())


@lru_cache(maxsize=8)
def _names(folder: Path) -> dict[str, str]:
    """Names in a folder, by what they look like."""
    try:
        with os.scandir(folder) as entries:
            return {_alike(entry.name): entry.name for entry in islice(entries, _MOST)}
    except OSError:
        return {}


def _kinds(name: str) -> frozenset[str]:
    """What a file that was meant by a name may end in: a clip stands for no first frame of the same name."""
    pictures = frozenset(PICTURES)
    return next((kinds for kinds in (pictures, CLIPS) if Path(name).suffix.lower() in kinds), pictures | CLIPS)


@lru_cache(maxsize=8)
def _stems(folder: Path, kinds: frozenset[str]) -> dict[str, str]:
    """Those of such kinds, without what comes after the last dot: the file may have been converted since."""
    return {_alike(Path(name).stem): name for name in _names(folder).values() if Path(name).suffix.lower() in kinds}


def _folders(folder: Path) -> Iterator[Path]:
    """Folders below, nearest first, two levels deep; links are not followed."""
    level = [folder]
    for _ in range(2):
        level = [inner for outer in level for inner in _inner(outer)]
        yield from level


def _inner(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in islice(entries, _MOST) if entry.is_dir(follow_symlinks=False)][
                :_FOLDERS
            ]
    except OSError:
        return []
