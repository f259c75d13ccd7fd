"""Where an encode's shards go: a folder of this machine, or one behind an address (``--out s3://bucket/out``).

Shards are made in a folder of this machine either way. For an address that is the *desk*, a scratch folder in which the
folder there is mirrored: its records and its contract whole, its tars as stand-ins, files of the same size that take
no room. So whatever plans, counts or compares looks at the desk, and an `Outlet` is asked at three moments only: before
a shard is written (`prepare`), when it is whole (`publish`), and when the contract is settled (`agree`).
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from cogcommon.errors import CogError, DiskError
from cogcommon.files.locks import Busy, open_locked
from cogcommon.store.address import address_of

T = TypeVar("T")

ABOUT_TO_WRITE_S = 5.0  # between another writer's contract and its empty caption


class Outlet:
    """A folder of this machine, where shards are made and stay."""

    keeps = True  # whether shards stay on the disk on which they are made

    def __init__(self, folder: Path, place: str = "") -> None:
        self.folder = folder  # in which shards are made, and records read
        self.place = place or str(folder)  # where they go, as messages name it

    def prepare(self, folder: Path, number: int, *, rewrite: bool = False) -> None:
        """Bring what the next writer of a shard needs to have before it.

        Args:
            folder: `folder`, or val in it.
            rewrite: the shard is committed, and its samples will be read.
        """

    def publish(self, folder: Path, number: int) -> None:
        """Commit, where shards go, what was committed in the folder; also that it was rewritten, or removed.

        Raises:
            ShardDone: another writer was first; the folder has its record by now.
            ShardBusy: another writer may be at it.
        """

    def agree(self, settle: Callable[[], T]) -> T:
        """Settle the contract and the empty caption with other writers.

        Args:
            settle: writes them into the folder where there are none, and refuses others.
        """
        return settle()

    def put(self, name: str) -> None:
        """Bring a file of the folder to where shards go, over what is there."""

    def shown(self, path: Path) -> str:
        """A file of the folder, as messages name it."""
        return str(path)

    def told(self, text: str) -> str:
        """A message about the folder, naming where shards go instead of the folder in which they are made."""
        here = str(self.folder)
        if here == self.place:
            return text
        text = text.replace(here, self.place)
        return re.sub(r"`mv ([^`]*)`", r"rename \1", re.sub(r"`rm ([^`]*)`", r"remove \1", text))

    def retell(self, error: CogError) -> None:
        """Put an error about the folder in the words of `told`; one of this machine's disk stays as it is."""
        if not isinstance(error, DiskError):
            error.what = self.told(error.what)
            error.where = error.where and self.told(error.where)
            error.fix = error.fix and self.told(error.fix)

    @contextmanager
    def at_hand(self, tar: Path) -> Iterator[None]:
        """Have a tar of the folder itself there to read."""
        yield

    def publish_changes(self) -> list[str]:
        """Do where shards go what was done in the folder since it was opened; returns the names of files that stay.

        Those stay that somebody has changed meanwhile.
        """
        return []


@contextmanager
def open_outlet(out: Path, *, cache: Path, slice_: str, lists: tuple[str, ...] = ()) -> Iterator[Outlet]:
    """The outlet of an ``--out``, for one process.

    Args:
        cache: the folder in which desks are kept.
        slice_: of the work, as ``1/4``: a run that goes on finds the desk of the one before.
        lists: names of the data root's lists, beside the usual ones.

    Raises:
        StoreError: the address cannot be reached, and why.
        SettingError, ShardError: as `check_shards_output`, of a folder behind an address.
    """
    address = address_of(out)
    if address is None:
        yield Outlet(out)
        return
    from cogcommon.store.remote_folder import open_folder

    from .remote_outlet import RemoteOutlet

    remote = open_folder(address, "--out")
    with ExitStack() as held:
        desk = held.enter_context(_own_desk(cache, address, slice_))
        outlet = RemoteOutlet(remote, desk)
        with _retold(outlet):
            outlet.begin(lists)
            yield outlet


@contextmanager
def open_image(out: Path, option: str, *, changing: bool = False, leftovers: bool = False) -> Iterator[Outlet]:
    """A folder of shards to look at, or to change; one behind an address is mirrored for the time.

    Args:
        option: that names it.
        changing: it will be changed: half-done rewrites are finished first.
        leftovers: what is half-written is of interest, too.

    Raises:
        StoreError: the address cannot be reached, and why.
        SettingError: it is to be changed, and is a data root.
    """
    address = address_of(out)
    if address is None:
        yield Outlet(out)
        return
    from cogcommon.store.remote_folder import open_folder

    from .remote_outlet import RemoteOutlet

    remote = open_folder(address, option)
    with tempfile.TemporaryDirectory(prefix="cogprep-") as folder:
        desk = Path(os.path.realpath(folder)) / "desk"
        desk.mkdir()
        outlet = RemoteOutlet(remote, desk)
        with _retold(outlet):
            outlet.mirror(option, changing=changing, leftovers=leftovers)
            yield outlet


def put_beside(out: Path, name: str, data: bytes) -> bool:
    """Write a file to an ``--out`` behind an address; False, and nothing done, where it is a folder of this machine."""
    if (address := address_of(out)) is None:
        return False
    from cogcommon.store.remote_folder import open_folder

    open_folder(address, "--out").put(name, data)
    return True


def read_beside(out: Path, name: str) -> bytes:
    """A file of an ``--out``, wherever that is; it must be there."""
    if (address := address_of(out)) is None:
        return (out / name).read_bytes()
    from cogcommon.store.remote_folder import open_folder

    data = open_folder(address, "--out").read(name)
    if data is None:
        raise FileNotFoundError(name)
    return data


def is_address(out: Path) -> bool:
    """Whether an ``--out`` is behind an address."""
    return address_of(out) is not None


@contextmanager
def _own_desk(cache: Path, address: str, slice_: str) -> Iterator[Path]:
    """A desk for this process alone: that of the run before, or another where a live process has it."""
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{slice_.replace('/', '-of-')}"
    number = 1
    while True:
        desk = cache / "desks" / (name if number == 1 else f"{name}-{number}")
        desk.mkdir(parents=True, exist_ok=True)
        try:
            with open_locked(desk.with_name(desk.name + ".lock")):
                yield Path(os.path.realpath(desk))
                return
        except Busy:
            number += 1


@contextmanager
def _retold(outlet: Outlet) -> Iterator[None]:
    try:
        yield
    except CogError as error:
        outlet.retell(error)
        raise
