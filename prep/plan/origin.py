"""Where the samples of an output folder came from (``origin.json``): its data root, its lists, what it holds out."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cogcommon.cli.names import command_line
from cogcommon.errors import DataRootError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.typed import build, parse_object
from cogcommon.model.families import Task
from cogcommon.store.address import as_shown
from cogcommon.words import counted

from ..dataset.lists import DataSet, hash_of_list, read_lists
from ..settings.encode import PlanSettings
from ..source.addresses import remote_address
from ..store.proof import ORIGIN_FILE, refuse_foreign
from .folder import Committed
from .holdout import Holdout

_SETTLED_NS = 2_000_000_000  # a file that was written longer ago than the coarsest clock of a file system ticks
_BELIEVED_S = 10.0  # for which what a list behind an address held is believed


@dataclass(frozen=True)
class Origin:
    """Where a folder's samples came from, so that `clean-cache` and `verify` can look again."""

    data_root: str
    prompts: str
    videos: str
    images: str | None
    id_token: str
    holdout: int = 0  # clips that were asked for
    held_out: Sequence[str] = ()  # and those chosen: content hashes in hex, ascending

    @classmethod
    def of(cls, settings: PlanSettings, holdout: Holdout) -> Origin:
        """Where the samples of an encode come from, and which clips it sets aside."""
        held_out = sorted(clip.hex() for clip in holdout.clips)
        root = str(settings.root.resolve()) if remote_address(settings.root) is None else as_shown(settings.root)
        lists = settings.prompts, settings.videos, settings.images
        return cls(root, *lists, settings.id_token, holdout.count, held_out)

    @property
    def lists(self) -> str:
        """The data root and the lists in it, in words."""
        images = "" if self.images in (None, "images.txt") else f", {self.images}"
        return f"{self.data_root} ({self.videos}, {self.prompts}{images})"

    def read_lists(self, task: Task) -> DataSet:
        """The lists as they are now.

        Raises:
            DataRootError: the data root is gone.
        """
        return read_lists(
            Path(self.data_root),
            task=task,
            prompts=self.prompts,
            videos=self.videos,
            images=self.images,
            id_token=self.id_token,
        )

    def state_of_lists(self) -> tuple[str, ...]:
        """A hash of each list as it is now, empty where it cannot be read."""
        names = self.prompts, self.videos, self.images or "images.txt"
        return tuple(_hash_of(Path(self.data_root) / name) for name in names)

    def write(self, out: Path) -> None:
        refuse_foreign(out / ORIGIN_FILE)
        commit_bytes(out / ORIGIN_FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())


def read_origin(out: Path) -> Origin | None:
    """Where the folder came from; None if it does not say."""
    try:
        origin = build(Origin, parse_object((out / ORIGIN_FILE).read_bytes()))
        if b"\0" in b"".join(map(os.fsencode, (origin.data_root, origin.prompts, origin.videos, origin.images or ""))):
            raise ValueError("no path")
        _ = [bytes.fromhex(clip) for clip in origin.held_out]
    except (OSError, ValueError):  # also of what os.fsencode cannot take
        return None
    return origin


def remembered_holdout(out: Path, committed: Committed) -> Holdout:
    """The clips that the folder sets aside, as its origin says; an older folder says it by what is in val/."""
    origin = read_origin(out)
    if origin is not None and (origin.holdout or origin.held_out):
        return Holdout(origin.holdout, frozenset(map(bytes.fromhex, origin.held_out)))
    clips = committed.clips("val")
    return Holdout(len(clips), frozenset(clips))


def guard_other_data(out: Path, origin: Origin, lost: int) -> None:
    """Refuse to drop samples because other data was named: by mistake, or to try something.

    Args:
        origin: of the encode that would drop them.
        lost: samples that would go since they are not in its data.

    Raises:
        DataRootError: the folder was encoded from another data root, or other lists, or does not say from which.
    """
    before = read_origin(out)
    if not lost or (before is not None and before.lists == origin.lists):
        return
    was = (
        f"it was encoded from {before.lists}" if before else f"its {ORIGIN_FILE} does not say what it was encoded from"
    )
    raise DataRootError(
        f"{out} would lose {counted(lost, 'sample')} that {'is' if lost == 1 else 'are'} not in this data",
        where=f"{was}\n       this is {origin.lists}",
        fix=f"--out ANOTHER keeps both; --replace drops them, if {out} is to follow this data from now on; "
        f"or start over, after `{command_line('cogprep', 'clean-cache', '--out', out, '--all')}`",
    )


def _hash_of(path: Path) -> str:
    """Of a list's content. It is asked after for every sample that would go, and read only if it may have changed."""
    if remote_address(path) is not None:
        return _hash_as_it_was(path, (int(time.monotonic() / _BELIEVED_S),))
    try:
        info = path.stat()
    except OSError:
        return ""
    if time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) < _SETTLED_NS:
        return hash_of_list(path)
    return _hash_as_it_was(path, (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))


@lru_cache(maxsize=8)
def _hash_as_it_was(path: Path, state: tuple[int, ...]) -> str:
    return hash_of_list(path)
