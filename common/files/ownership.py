"""Whose is it? Only what we can prove to have made is removed or overwritten.

A folder that a command writes is new, empty, or its own from before; never a data root. What was made in it
stands in its record, ``.cogtune.json``: what made it, and each file with its size and a hash of its beginning.
A file of that name with other content is somebody's, and so is every link. (Folders of shards have records of
their own, their contract and the shards' Parquet files: `cogprep.store.proof`.) In a folder that is older than records,
those files are ours that prove it by what they say: `cogtrain.runs.claim`, `cogprep.store.proof.preview_record`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import SettingError
from .atomic import TEMPORARY, commit, commit_bytes, fsync_folder, fsync_tree, honour_umask, temporary_beside

LISTS = ("prompts.txt", "videos.txt")  # of a data root
RECORD_FILE = ".cogtune.json"
# What systems put into any folder; it makes none somebody's.
_OF_THE_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".gitkeep", ".gitignore"})
# Of files that commands write, each into a folder that `--out` names.
_SUFFIXES = frozenset({".mp4", ".gif", ".png", ".html", ".safetensors", ".tar", ".parquet"})
_BEGINNING = 1 << 20  # bytes


def refuse_data_root(folder: Path, option: str, lists: tuple[str, ...] = LISTS) -> None:
    """Refuse to write into a folder of clips and captions.

    Args:
        option: that names the folder, for the message.
        lists: names of its lists.

    Raises:
        SettingError: the folder holds a list.
    """
    refuse_lists(lambda name: (folder / name).is_file(), str(folder), option, lists)


def refuse_lists(holds: Callable[[str], bool], place: str, option: str, lists: tuple[str, ...] = ()) -> None:
    """As `refuse_data_root`, of a folder wherever it is.

    Args:
        holds: whether there is a file of this name in it.
        place: the folder, as messages name it.
    """
    for name in (*lists, *LISTS):
        if holds(name):
            raise SettingError(
                f"this folder is a data root: it holds {name}",
                where=f"{option} {place}",
                fix=f"{option} takes a folder of its own",
            )


def foreign_folder(folder: Path | str, option: str) -> SettingError:
    """The error for a folder that is somebody's."""
    return SettingError(
        "there are files in this folder that we did not make; none of them was touched",
        where=f"{option} {folder}",
        fix=f"{option} with a new or an empty folder",
    )


def _foreign_file(path: Path) -> SettingError:
    return SettingError(
        f"{path.name} is there, and not as we made it",
        where=str(path),
        fix="move it elsewhere, or name another folder",
    )


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, but for what systems put there and what we were writing; empty without a folder."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name not in _OF_THE_SYSTEM
        and not path.name.startswith((".nfs", "._"))
        and not TEMPORARY.fullmatch(path.name)
    ]


def is_file(path: Path) -> bool:
    """Whether a path is a file itself, not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether a path is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


@dataclass
class Made:
    """The record of a folder.

    Attributes:
        by: what makes the files, in words: ``a training run``.
        request: what was asked for, if that tells two outputs of the command apart.
        files: by name, the file's last two states. Two, for the record is written before the file, and a kill may
            leave either. None while the file is being written, or if a kill came then.
    """

    folder: Path
    by: str
    request: str = ""
    files: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Made | None:
        """The record of a folder; None where there is none that can be believed."""
        path = folder / RECORD_FILE
        try:
            if not is_file(path):
                return None
            found = json.loads(path.read_bytes())
            files = {str(name): [str(state) for state in states] for name, states in found["files"].items()}
            if all(_is_below(name) for name in files):
                return cls(folder, str(found["by"]), str(found["request"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return None

    def owns(self, name: str) -> bool:
        """Whether a file is as we made it, and reached through no link."""
        path = self.folder / name
        if name not in self.files or not is_file(path):
            return False
        if not all(is_folder(self.folder / part) for part in list(PurePosixPath(name).parents)[:-1]):
            return False
        try:
            return not self.files[name] or state_of(path) in self.files[name]
        except OSError:
            return False

    def refuse_foreign(self, *names: str) -> None:
        """Refuse to write over what is not ours.

        Raises:
            SettingError: one of the names is taken by somebody's file.
        """
        for name in names:
            if os.path.lexists(self.folder / name) and not self.owns(name):
                raise _foreign_file(self.folder / name)

    def open(self, *names: str) -> None:
        """Name files and folders that are written by other ways than `commit`, until `close`.

        Raises:
            SettingError: somebody's lies there, or a link.
        """
        self.refuse_foreign(*(name for name in names if not is_folder(self.folder / name)))
        self.files.update({name: [] for name in names})
        self.write()

    def close(self, *names: str) -> None:
        """Record files that have been written as they are now; later changes are somebody's."""
        self.files.update({name: [state_of(self.folder / name)] for name in names if is_file(self.folder / name)})
        self.write()

    def set_aside(self, name: str) -> Path | None:
        """Move a file that somebody has changed to a free name, which is returned."""
        path = self.folder / name
        if not os.path.lexists(path) or self.owns(name):
            return None
        return path.rename(_free_name(path.with_name(f"{path.stem}-yours{path.suffix}")))

    def commit(self, temporary: Path, name: str) -> Path:
        """Give a finished file its name in the folder.

        Args:
            temporary: written and fsynced, in the same folder (`temporary_beside`).

        Raises:
            SettingError: the name is taken by somebody's file.
        """
        self.refuse_foreign(name)
        self.files[name] = [*self.files.get(name, [])[-1:], state_of(temporary)]
        self.write()
        commit(temporary, self.folder / name)
        return self.folder / name

    def commit_bytes(self, name: str, data: bytes) -> Path:
        """Write a file whole or not at all. Raises as `commit`."""
        temporary = temporary_beside(self.folder / name)
        try:
            commit_bytes(temporary, data)
            return self.commit(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, *names: str) -> None:
        """Remove files that are ours; others stay."""
        for name in names:
            if self.owns(name):
                (self.folder / name).unlink(missing_ok=True)

    def forget(self, *names: str) -> None:
        """Remove files that are ours, and name none of these any longer."""
        self.remove(*names)
        self.files = {name: states for name, states in self.files.items() if name not in names}
        self.write()

    def write(self, *, exclusive: bool = False) -> None:
        """Write the record.

        Args:
            exclusive: not over one that another process has written meanwhile.

        Raises:
            NoLocks: for ``exclusive``, where that cannot be had.
        """
        told = {"by": self.by, "request": self.request, "files": self.files}
        data = json.dumps(told, indent=1, ensure_ascii=False).encode()
        commit_bytes(self.folder / RECORD_FILE, data, exclusive=exclusive)


def state_of(path: Path) -> str:
    """A file's size and the hash of its beginning: enough to tell ours from another, whatever its size."""
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_BEGINNING)).hexdigest()
        return f"{os.fstat(stream.fileno()).st_size}:{digest[:32]}"


def _is_below(name: str) -> bool:
    """Whether a name of a record stays in its folder."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)


def check_own_folder(folder: Path, by: str, option: str) -> Made | None:
    """The record of a folder that a command may write to; None where it is new or empty. Nothing is written.

    Raises:
        SettingError: it is a data root, a file, or somebody's; or it is new, and called like a file.
    """
    refuse_data_root(folder, option)
    if folder.suffix.lower() in _SUFFIXES and not os.path.lexists(folder):
        raise SettingError(
            f"this is the name of a file, and {option} names a folder",
            where=f"{option} {folder}",
            fix=f"{option} {folder.with_suffix('')}, in which files get names of their own",
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise SettingError("this is no folder", where=f"{option} {folder}", fix=f"{option} with a new folder")
    made = Made.read(folder)
    if made is None and entries(folder) and (made := Made.read(folder)) is None:  # not one that has just been written
        raise foreign_folder(folder, option)
    if made is not None and made.by != by:
        raise SettingError(
            f"this folder holds {made.by}", where=f"{option} {folder}", fix=f"{option} with a new folder"
        )
    return made


def take_output(folder: Path, by: str, option: str, request: str = "") -> Made:
    """Make a folder ours, and give its record. Raises as `check_own_folder`, and OSError."""
    made = check_own_folder(folder, by, option) or Made(folder, by)
    folder.mkdir(parents=True, exist_ok=True)
    made.request = request
    made.write()
    return made


def record_of(folder: Path, by: str, proves: Callable[[str], bool] = lambda name: True, request: str = "") -> Made:
    """The record that a folder should have; it is not written.

    Args:
        proves: whether a file, by its name in the folder, is ours. A folder that is older than records may hold
            somebody's, which stay theirs.
        request: see `Made`.
    """
    names = [path.relative_to(folder).as_posix() for path in _files_below(folder) if path.name != RECORD_FILE]
    return Made(folder, by, request, {name: [state_of(folder / name)] for name in names if proves(name)})


def seal(folder: Path, by: str) -> None:
    """Write the record of a folder that is finished."""
    record_of(folder, by).write()


def remove_folder(folder: Path, by: str, first: str = "") -> bool:
    """Remove a sealed folder's files, and the folder if nothing of somebody's is left in it.

    Args:
        first: the file that makes it count; it goes first, and a kill leaves nothing that seems whole.

    Returns:
        Whether the folder was ours.
    """
    made = Made.read(folder) if is_folder(folder) else None
    if made is None or made.by != by:
        return False
    made.remove(first)
    fsync_folder(folder)
    made.remove(*made.files)
    # The record goes last, and stays as long as it names anything that is left.
    within = {parent for name in made.files for parent in list(PurePosixPath(name).parents)[:-1]}
    for inner in sorted(within, key=lambda parent: len(parent.parts), reverse=True):
        with suppress(OSError):
            (folder / inner).rmdir()
    (folder / RECORD_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return True


def refuse_other(folder: Path, by: str) -> None:
    """Refuse to replace a folder that ``by`` has not made.

    Raises:
        SettingError: it is there, and somebody's.
    """
    made = Made.read(folder) if is_folder(folder) else None
    if os.path.lexists(folder) and (made is None or made.by != by):
        raise _foreign_file(folder)


def replace_folder(finished: Path, final: Path, by: str) -> None:
    """Give a finished folder its name, durably. What we made there before goes; what somebody put into it stays in it.

    Args:
        finished: a temporary folder beside ``final``.

    Raises:
        SettingError: ``final`` is there and not ours.
    """
    for path in _files_below(finished):
        honour_umask(path)
    seal(finished, by)
    fsync_tree(finished)
    if not os.path.lexists(final):
        commit(finished, final)
        return
    refuse_other(final, by)
    # Under a name that nothing removes: a kill may leave somebody's files in it.
    old = _free_name(final.with_name(f"{final.name}.old"))
    final.rename(old)
    commit(finished, final)
    remove_folder(old, by)
    for path in list(_files_below(old)):
        name = final / path.relative_to(old)
        name.parent.mkdir(parents=True, exist_ok=True)
        path.rename(_free_name(name))  # taken: it is one of ours that somebody has changed
    for inner, _, _ in os.walk(old, topdown=False):
        Path(inner).rmdir()


def _free_name(path: Path) -> Path:
    free, number = path, 2
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _files_below(folder: Path) -> Iterator[Path]:
    """Files and links in a folder and its folders; links are not followed."""
    for top, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if (Path(top) / name).is_symlink())]:
            yield Path(top) / name
