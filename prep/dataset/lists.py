"""The lists of a data root: line n of every list belongs to sample n.

A pairing that cannot be trusted is worth nothing, so a list with any fault
yields no samples at all; and all faults are found at once, not one a run.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cogcommon.cli.names import command_line
from cogcommon.errors import DataRootError
from cogcommon.files.near import files_like, folders_like
from cogcommon.files.regular_file import Empty, Missing, Unreadable, open_regular
from cogcommon.model.families import Task
from cogcommon.store.address import as_shown
from cogcommon.words import counted, did_you_mean

from ..source.addresses import named_without_secrets, remote_address
from ..source.clip import BadClip
from ..source.remote import Unreached, read_object, state_of

# Byte order marks, wherever lists were joined, and what has neither width nor meaning. The joiners U+200C and
# U+200D do mean something, in Persian and in emoji.
_UNSEEN = "\ufeff\u200b\u2060"
HALF_ADDED = ".half-added.json"  # beside lists that `init --add` is about to make longer
_SHOWN = 20  # faults an error message prints; `validate --json` has them all


@dataclass(frozen=True, slots=True)
class Sample:
    """A clip and its caption, as the lists name them; nothing has been opened yet."""

    line: int  # in every list, from 1
    caption: str  # with the id token in front
    source: str  # relative to the data root, or absolute
    image: str  # likewise; empty without one


# What may be done about a fault of a list (`remedies`); of one that is "told" the fault itself says it.
ListKind = Literal["uncaptioned", "blank", "no list", "unpaired", "unreached", "told", "other"]


@dataclass(frozen=True, order=True)
class ListFault:
    """Why the lists cannot be paired."""

    file: str
    line: int  # from 1; 0 for the file as a whole
    what: str
    kind: ListKind = field(default="other", compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}" if self.line else f"{self.file}: {self.what}"


@dataclass(frozen=True)
class DataSet:
    """What the lists say. ``samples`` is empty when there is any fault; ``columns`` is what could be read.

    ``columns`` has the entries of "captions", "clips" and "images", line by line. ``paired`` is what the samples are,
    or will be where captions that are not written yet are all that is wrong: these are empty.
    """

    root: Path
    samples: Sequence[Sample]
    faults: Sequence[ListFault]
    columns: Mapping[str, Sequence[str]]
    paired: Sequence[Sample] = ()
    images_unused: bool = False  # images.txt is there, but the task is T2V

    @property
    def uncaptioned(self) -> bool:
        """Whether captions that are not written yet are all that is wrong."""
        return bool(self.faults) and all(fault.kind == "uncaptioned" for fault in self.faults)

    def trusted(self) -> DataSet:
        """The data set itself, if its lists can be trusted.

        Raises:
            DataRootError: with every fault of every list.
        """
        if self.faults:
            lines = [str(fault) for fault in self.faults[:_SHOWN]]
            if len(self.faults) > _SHOWN:
                lines.append(f"and {len(self.faults) - _SHOWN} more")
            what = "the lists do not pair up: " + counted(len(self.faults), "fault")
            fix = "mend these lines (line n of every list is one sample)"
            if all(fault.line == 0 for fault in self.faults):
                fix = "give each list whole (line n of every list is one sample)"
            if self.uncaptioned:
                what = f"{counted(len(self.faults), 'clip')} without a caption yet"
                fix = f"write one into each blank line of {self.faults[0].file}, or let a model do it (cogprep caption)"
            raise DataRootError(
                what, where="\n       ".join([as_shown(self.root), *lines]), fix=f"{fix}; nothing was encoded"
            )
        return self


def check_root(root: Path, *lists: str, named: str = "--data-root", holds: str = "prompts.txt and videos.txt") -> None:
    """Refuse what is no folder, or has none of the lists.

    Args:
        lists: names of the lists of captions and clips, where there must be one at least.
        named: the option or argument that has named the folder, for the message.
        holds: what the folder is to hold, likewise.

    Raises:
        DataRootError: it is missing, or a file, or without lists.
    """
    if remote_address(root) is None and not os.path.isdir(root):  # noqa: PTH112, as `_is_there`
        raise DataRootError(
            "the data root is not a folder" if _is_there(root) else "there is no such data root",
            where=f"{named} {root}",
            fix=did_you_mean(folders_like(root), f"{named} takes the folder that holds {holds}"),
        )
    if lists and not any(_is_there(root / name) for name in lists):
        raise DataRootError(
            f"there is neither a {' nor a '.join(lists)} in this folder",
            where=as_shown(root),
            fix=f"`{command_line('cogprep', 'init', root)}` writes both from the clips and captions that are there"
            if remote_address(root) is None
            else f"put both there; of a copy on this machine `{command_line('cogprep', 'init', 'COPY')}` writes them",
        )


def refuse_address(place: Path, command: str, named: str) -> None:
    """Refuse an address where a command works on folders of this machine, and say how a bucket gets its lists.

    Raises:
        DataRootError: it is an address.
    """
    if remote_address(place) is not None:
        raise DataRootError(
            f"cogprep {command} works on folders of this machine, and this is an address",
            where=f"{named} {as_shown(place)}",
            fix="for clips in a bucket write the lists yourself, into a folder of this machine: videos.txt with lines "
            "such as s3://bucket/a.mp4, prompts.txt with their captions; then cogprep encode --data-root FOLDER",
        )


def read_lists(
    root: Path,
    *,
    task: Task,
    prompts: str = "prompts.txt",
    videos: str = "videos.txt",
    images: str | None = None,
    id_token: str = "",
) -> DataSet:
    """Read and pair the lists of a data root.

    Args:
        root: the folder that list entries are relative to.
        task: T2V reads no images.
        prompts: name of the list of captions, one a line.
        videos: name of the list of clips.
        images: name of the list of first frames; None means images.txt if it is there.
        id_token: put in front of every caption that does not begin with it.

    Raises:
        DataRootError: the root is no folder.
    """
    check_root(root)
    names = {"captions": prompts, "clips": videos}
    if task == "i2v" and (images is not None or _is_there(root / "images.txt")):
        names["images"] = images or "images.txt"
    faults: list[ListFault] = []
    columns: dict[str, list[str]] = {}
    for column, name in names.items():
        entries = read_list(root, name, column != "captions", faults)
        if entries is not None:
            columns[column] = entries if column == "captions" else named_without_secrets(entries)
    faults += _blank_lines(columns, names)
    counts = {names[column]: len(entries) for column, entries in columns.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        adding = _is_there(root / HALF_ADDED)
        again = f"; to finish what was adding lines: {command_line('cogprep', 'init', root, '--add')}" if adding else ""
        faults.append(
            ListFault(
                max(counts, key=lambda name: counts[name]),
                min(counts.values()) + 1,
                f"unpaired from here, or from an earlier line: {said} lines{again}",
                "told" if again else "unpaired",
            )
        )
    unused = task == "t2v" and _is_there(root / (images or "images.txt"))
    if any(fault.kind != "uncaptioned" for fault in faults):
        return DataSet(root, (), sorted(faults), columns, images_unused=unused)
    stills = columns.get("images") or [""] * len(columns["clips"])
    samples = [
        Sample(line, with_token(id_token, caption), clip, still)
        for line, (caption, clip, still) in enumerate(
            zip(columns["captions"], columns["clips"], stills, strict=True), 1
        )
    ]
    return DataSet(root, () if faults else samples, sorted(faults), columns, samples, unused)


def with_token(id_token: str, caption: str) -> str:
    """A caption with a word in front: once, also where whoever wrote the caption has put it there."""
    begins = caption.startswith(id_token) and not caption[len(id_token) :][:1].isalnum()
    return caption if not id_token or not caption or begins else f"{id_token} {caption}"


def _blank_lines(columns: Mapping[str, list[str]], names: Mapping[str, str]) -> Iterator[ListFault]:
    """Cut off the blank lines at the end of each list, and name the others: dropping one would shift every later pair.

    A blank line that has a clip is a caption that is not written yet, also at the end.
    """
    clips = columns.get("clips", [])
    for column, entries in sorted(columns.items(), reverse=True):  # the clips, then the captions
        least = len(clips) if column == "captions" else 0
        while len(entries) > least and not entries[-1]:
            entries.pop()
        if not entries:
            yield ListFault(names[column], 0, "the list is empty", "no list")
        paired = column == "captions" and len(entries) == len(clips)
        for line, entry in enumerate(entries, 1):
            if not entry:
                if paired and clips[line - 1]:
                    yield ListFault(names[column], line, f"no caption yet for {clips[line - 1]}", "uncaptioned")
                else:
                    yield ListFault(names[column], line, "blank line", "blank")


def read_list(root: Path, name: str, of_files: bool, faults: list[ListFault]) -> list[str] | None:
    """The lines of one list, blank ones too; None if it cannot be read.

    Args:
        of_files: the entries are names of files.
        faults: gets what is wrong with the list.
    """
    try:
        data = _content(root / name)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            faults.append(ListFault(name, 0, "UTF-16, as Windows writes it; save the list as UTF-8", "told"))
            return None
        text = data.decode("utf-8")
    except FileNotFoundError:
        told = _remedy(root, name)
        faults.append(ListFault(name, 0, f"the list is missing{told}", "told" if told else "no list"))
        return None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        faults.append(ListFault(name, line, "not UTF-8; save the list as UTF-8", "told"))
        return None
    except (OSError, BadClip) as error:
        faults.append(ListFault(name, 0, f"cannot be read: {getattr(error, 'strerror', None) or error}", "unreached"))
        return None
    except Unreadable as error:
        if isinstance(error.__cause__, OSError):
            faults.append(ListFault(name, 0, str(error), "unreached"))
        else:
            faults.append(ListFault(name, 0, f"{error}; save the list as a file", "told"))
        return None
    # Not splitlines(): it also cuts at form feeds and at Unicode separators, which captions contain.
    entries = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    if any(mark in text for mark in _UNSEEN):
        entries = [_seen(entry, root if of_files else None) for entry in entries]
    if not entries[-1]:
        entries.pop()  # what follows the end of the last line
    faults += [ListFault(name, line, "a NUL byte") for line, entry in enumerate(entries, 1) if "\0" in entry]
    return entries


def _remedy(root: Path, name: str) -> str:
    """What a missing list may be called, or what writes it: `cogprep init` can where it has the clips' to go by."""
    if meant := files_like(root / name):
        return f"; {did_you_mean(meant)}"
    if name == "prompts.txt" and _is_there(root / "videos.txt"):
        return f"; to write it: {command_line('cogprep', 'init', root)}"
    return ""


def _seen(entry: str, root: Path | None) -> str:
    """An entry without what nobody sees in it, unless there is a file of exactly that name."""
    seen = entry.translate(dict.fromkeys(map(ord, _UNSEEN))).strip()
    if seen == entry or root is None or "\0" in entry:
        return seen
    return entry if _is_there(root / entry) and not _is_there(root / seen) else seen


def _content(path: Path) -> bytes:
    """Of a list, on this machine or behind an address.

    Raises:
        OSError: as it was told.
        Unreadable: it is no file: one that is a pipe would be empty the next time.
        BadClip: as the store has told it.
    """
    try:
        if (address := remote_address(path)) is not None:
            return read_object(address)
        with open_regular(path) as file:
            return file.readall()
    except Empty:
        return b""
    except Missing:
        raise FileNotFoundError(str(path)) from None


def hash_of_list(path: Path) -> str:
    """sha256 of a list as it is now, in hex; empty where it cannot be read."""
    try:
        return hashlib.sha256(_content(path)).hexdigest()
    except (OSError, Unreadable, BadClip):
        return ""


def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder. `Path.exists` raises for a name that is too long to be one."""
    if (address := remote_address(path)) is not None:
        try:
            state_of(address)
        except Missing:
            return False
        except Unreached as error:
            raise DataRootError("the data root cannot be read", where=str(error)) from error
        return True
    return os.path.exists(path)  # noqa: PTH110
