"""Keeps a copy of a run in an object store (``--mirror s3://...``), made beside the steps; `restore` brings it back.

The run itself stays on this machine's disk: what trains, exports and shows it needs files, and a store that fails for
a while must not stop it. A thread of rank 0 uploads each checkpoint once it is committed, then what else lies in the
folder, and last of all ``mirror.json``, in one request. It names the checkpoints that are whole there, with the size
and the hash of each file, so a kill at any request leaves the one before, or the new one.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from cogcommon.errors import CogError, RunError, StoreError
from cogcommon.files.hashes import sha256_of
from cogcommon.files.ownership import RECORD_FILE, is_file
from cogcommon.store.remote_folder import open_folder

from ...distributed.snapshot import STATE_FILE
from ...model import lora, sft
from ..checkpoint import list_checkpoints, step_of
from ..folder import CARD_FILE, CONFIG_FILE, EPOCHS_FILE, FACTS_FILE, METRICS_FILE, MIRROR_FILE, REPORT_FILE, VALIDATION
from .index import ELSEWHERE, Index, MirroredFile, read_index, run_of, without, write_token

_AGAIN = 60.0  # seconds after which a failed upload is tried again; the next checkpoint tries at once
_LEAVING = 60.0  # seconds that a run that fails waits for what is on its way
_FILES = (CONFIG_FILE, FACTS_FILE, EPOCHS_FILE, METRICS_FILE, lora.FILE, CARD_FILE, REPORT_FILE)
_FOLDERS = (VALIDATION, sft.FOLDER)


class Mirror:
    """Uploads what a run commits in its folder, which is claimed; on rank 0.

    Attributes:
        uploading: steps of the checkpoints that must stay on the disk for now.
        best: the step of a checkpoint that stays there, whatever its age.
    """

    def __init__(self, folder: Path, address: str, *, keep: int, done: int, say: Callable[[str], None]) -> None:
        """Take the mirror over.

        Args:
            keep: the newest checkpoints that stay there, beside the best.
            done: the step after which the run goes on; checkpoints of later ones leave the mirror.
            say: tells the reader something.

        Raises:
            RunError: another run is mirrored there, or objects lie there that are nobody's of ours.
            StoreError: the store takes nothing, and why.
        """
        self.folder, self.keep = folder, keep
        self.uploading: frozenset[int] = frozenset()
        self._remote, self._say = open_folder(address, "--mirror"), say
        self._seen: dict[str, tuple[tuple[int, int], str]] = {}  # by name: size and time of a file, and its hash
        self._fault: CogError | None = None
        self._asked = self._done = 0  # uploads
        self._lost = self._ended = False
        self._changed = threading.Condition()
        self._index = self._take_over(done)
        self.best = self._index.best
        threading.Thread(target=self._work, daemon=True, name="cogtrain-mirror").start()

    @property
    def shown(self) -> str:
        return self._remote.shown

    def soon(self) -> int:
        """Upload what is new, beside what goes on here; gives the number of the upload."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            return self._asked

    def finish(self) -> None:
        """Upload what is new, and wait until it is there.

        Raises:
            StoreError: it is not, and why.
        """
        number = self.soon()
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._done >= number)
            fault = self._fault
        if fault is not None:
            raise StoreError(
                f"the end of the run is not in the mirror: {fault.what}",
                where=fault.where or self.shown,
                fix=f"the run itself is whole in {self.folder}; the same command uploads what is missing",
            ) from fault

    def close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        """End the thread. Where the run has failed, what is on its way may arrive first."""
        with self._changed:
            if error is None or isinstance(error, Exception):
                self._changed.wait_for(lambda: self._lost or self._done >= self._asked, _LEAVING)
            self._ended = True
            self._changed.notify_all()

    def _take_over(self, done: int) -> Index:
        own, index = run_of(self.folder), read_index(self._remote)
        holder = secrets.token_hex(16)
        if index is not None and index.run != own:
            raise RunError("another run is mirrored there", where=f"--mirror {self.shown}", fix=ELSEWHERE)
        if index is not None:
            write_token(self.folder, index.run, self.shown)  # a copy becomes the run's home
            stays = {name: files for name, files in index.checkpoints.items() if step_of(Path(name)) <= done}
            return self._put(replace(index, holder=holder, checkpoints=stays), index)
        if self._remote.entries():
            raise RunError(
                "there are objects that no run has put there; none of them was touched",
                where=f"--mirror {self.shown}",
                fix=ELSEWHERE,
            )
        index = Index(own or secrets.token_hex(16), holder)
        # Before the first upload, so that no other run begins there, and a kill leaves nothing that seems nobody's.
        write_token(self.folder, index.run, self.shown)
        if not self._remote.create(MIRROR_FILE, index.to_json()):
            raise RunError("another run has just begun there", where=f"--mirror {self.shown}", fix=ELSEWHERE)
        return index

    def _work(self) -> None:
        while True:
            with self._changed:
                waits = _AGAIN if self._fault else None
                self._changed.wait_for(lambda: self._ended or self._asked > self._done, waits)
                if self._ended:
                    return
                number = self._asked
            fault: CogError | None = None
            try:
                self._upload(self.best)
            except _Overtaken:
                continue
            except _TakenOver as error:
                fault, self._lost = error.fault, True
            except CogError as error:
                fault = error
            except OSError as error:
                fault = StoreError(f"a file cannot be read: {error.strerror}", where=str(error.filename or self.folder))
            except Exception as error:  # a slip of ours, for which nobody may wait for ever
                fault = StoreError(f"{type(error).__name__}: {error}", where=self.shown)
            with self._changed:
                if fault and str(fault) != str(self._fault) and not self._ended:
                    again = "" if self._lost else "; the run goes on, and it is tried again"
                    self._say(f"note: the mirror is behind: {fault.what} ({fault.where}){again}")
                self._fault, self._done, self.uploading = fault, number, frozenset()
                self._changed.notify_all()
                if self._lost:
                    return

    def _upload(self, best: int | None) -> None:
        """Bring the mirror up to date."""
        whole = list_checkpoints(self.folder)
        wanted = [path for path in whole if path == whole[-1] or step_of(path) == best]
        self.uploading = frozenset(map(step_of, wanted))
        for path in reversed(wanted):
            if files := self._upload_checkpoint(path):
                others = dict(self._uploaded_files())
                checkpoints = {**self._index.checkpoints, path.name: files}
                self._commit(self._pruned(replace(self._index, checkpoints=checkpoints, best=best, files=others)))
                self._say(f"mirrored {path.name} in {self.shown}")
        files_now = dict(self._uploaded_files())
        if files_now != self._index.files or best != self._index.best:
            self._commit(self._pruned(replace(self._index, files=files_now, best=best)))

    def _upload_checkpoint(self, checkpoint: Path) -> dict[str, MirroredFile]:
        """Its files, now that they are there; none if they have been.

        Raises:
            _Overtaken: it went, since newer ones had come before it was known to be on its way.
        """
        committed, there = checkpoint / STATE_FILE, self._index.checkpoints.get(checkpoint.name)
        try:
            if there is not None and there[STATE_FILE].sha256 == sha256_of(committed):
                return {}
            if there is not None:  # of the same step, from before the run went back
                self._commit(replace(self._index, checkpoints=without(self._index, checkpoint.name)))
            files = dict(self._uploaded(checkpoint))
        except (OSError, StoreError):
            if committed.exists():
                raise
        if not committed.exists():  # what is removed loses it first: as long as it is there, so was all else
            raise _Overtaken
        return files

    def _uploaded(self, checkpoint: Path) -> Iterator[tuple[str, MirroredFile]]:
        """The files of a checkpoint, each once it is there."""
        for path in sorted(path for path in checkpoint.rglob("*") if is_file(path)):
            name = path.relative_to(checkpoint).as_posix()
            if name != RECORD_FILE:  # written anew by whoever restores it
                self._remote.upload(f"{checkpoint.name}/{name}", path)
                yield name, MirroredFile(path.stat().st_size, sha256_of(path))

    def _uploaded_files(self) -> Iterator[tuple[str, str]]:
        """What is not a checkpoint: what has changed is uploaded; a hash of each."""
        paths = [self.folder / name for name in _FILES]
        paths += [path for name in _FOLDERS for path in sorted((self.folder / name).rglob("*"))]
        for path in filter(is_file, paths):
            name, status = path.relative_to(self.folder).as_posix(), path.stat()
            if path.name.startswith("."):
                continue
            if path.name == METRICS_FILE:  # it is being written: whole lines
                data = path.read_bytes()
                data = data[: data.rfind(b"\n") + 1]
                digest = hashlib.sha256(data).hexdigest()
                if self._index.files.get(name) != digest:
                    self._remote.put(name, data)
            else:
                stamp, known = (status.st_size, status.st_mtime_ns), self._seen.get(name)
                digest = known[1] if known and known[0] == stamp else sha256_of(path)
                if self._index.files.get(name) != digest:
                    self._remote.upload(name, path)
                self._seen[name] = stamp, digest
            yield name, digest

    def _pruned(self, index: Index) -> Index:
        stays = {*index.names[-self.keep :], f"checkpoint-{index.best}"}
        return replace(index, checkpoints={name: index.checkpoints[name] for name in index.names if name in stays})

    def _commit(self, index: Index) -> None:
        """Write the index, if the mirror is still ours, and remove what it names no longer."""
        there = read_index(self._remote)
        if there is None or there.holder != self._index.holder:
            raise _TakenOver(
                RunError(
                    "another process has taken the mirror over, and goes on with the run from there",
                    where=self.shown,
                    fix="end one of the two",
                )
            )
        self._index = self._put(index, self._index)

    def _put(self, index: Index, before: Index) -> Index:
        gone = [f"{name}/{file}" for name in before.names if name not in index.checkpoints
                for file in before.checkpoints[name]]  # fmt: skip
        stays = {f"{name}/{file}" for name, files in index.checkpoints.items() for file in files}
        index = replace(index, leaving=[name for name in {*before.leaving, *gone} if name not in stays])
        self._remote.put(MIRROR_FILE, index.to_json())
        self._remote.remove(*index.leaving)
        return replace(index, leaving=())


class _Overtaken(Exception):
    pass


class _TakenOver(Exception):
    def __init__(self, fault: CogError) -> None:
        super().__init__(str(fault))
        self.fault = fault
