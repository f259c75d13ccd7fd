"""Random folders in which some things are ours and some are not, to let commands loose on.

A tree begins as ours (whole, or with parts missing), as an empty folder, or as none. Then somebody's files are put
into it: under names of their own, under our very names, in place of our files, and as links to files and folders
outside. Whatever a command does, `Tree.touched` says which of them did not come through unchanged.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

OWN_NAMES = ("notes.txt", "a.mp4", "000000.tar.backup", "7.parquet", ".hidden", "more/b.txt", "1².parquet")


class Tree:
    """A random tree.

    Args:
        folder: holds the tree, and what lies outside of it.
        ours: folders that our commands made, of which one is the beginning.
        names: that our commands use, relative to the tree.
    """

    def __init__(self, folder: Path, ours: Sequence[Path], names: Sequence[str], draw: random.Random) -> None:
        self._draw = draw
        self.top, self._outside = folder / "tree", folder / "outside"
        self._foreign: dict[Path, bytes | str] = {}
        begin = draw.choice([None, "empty", *ours, *ours, *ours])
        if isinstance(begin, Path):
            shutil.copytree(begin, self.top, symlinks=True)
            self._take_away()
        elif begin:
            self.top.mkdir(parents=True)
        shutil.copytree(draw.choice(ours), self._outside, symlinks=True)  # a link may lead to shards, or to a run
        (self._outside / "theirs").mkdir()
        (self._outside / "theirs" / "file").write_bytes(draw.randbytes(40))
        for _ in range(draw.choice([0, 1, 1, 2, 3, 6])):
            self._put(draw.choice([*names, *names, *OWN_NAMES]))
        for path in self._outside.rglob("*"):
            if path.is_file() and not path.is_symlink():
                self._foreign[path] = path.read_bytes()

    def _take_away(self) -> None:
        files = sorted(path for path in self.top.rglob("*") if path.is_file())  # the same draws everywhere
        for path in self._draw.sample(files, self._draw.choice([0, 0, 1, 2, len(files) // 2])):
            if self._draw.random() < 0.3:
                path.write_bytes(path.read_bytes()[: self._draw.randrange(1 + path.stat().st_size)])
            else:
                path.unlink()

    def _put(self, name: str) -> None:
        path = self.top / name
        if any(parent.is_symlink() or parent.is_file() for parent in [*path.parents][: len(Path(name).parts)]):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        for gone in [other for other in self._foreign if path in other.parents]:
            del self._foreign[gone]
        target = self._draw.choice([None, None, None, self._outside, self._outside / "theirs" / "file"])
        if target is None:
            path.write_bytes(self._bytes())
            self._foreign[path] = path.read_bytes()
        else:
            path.symlink_to(target)
            self._foreign[path] = str(target)

    def _bytes(self) -> bytes:
        noise = self._draw.randbytes(60)
        return self._draw.choice([b"", b"{}", b"[]", b'{"files": {}}', bytes(512), b"PAR1" + noise, noise])

    def touched(self) -> list[Path]:
        """What is somebody's and is not as it was."""
        return [path for path, was in self._foreign.items() if _content(path) != was]

    def moved_aside(self, path: Path) -> bool:
        """Whether something of somebody's lies beside its place, under a name that begins alike."""
        beside = path.parent.glob(f"{path.stem}*") if path.parent.is_dir() else []
        return any(_content(other) == self._foreign[path] for other in beside if other != path)

    def told(self) -> list[str]:
        """The tree, for a message."""
        return [f"{path} -> {path.readlink()}" if path.is_symlink() else str(path) for path in self.top.rglob("*")]


def _content(path: Path) -> bytes | str | None:
    if path.is_symlink():
        return str(path.readlink())
    return path.read_bytes() if path.is_file() else None
