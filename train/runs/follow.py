"""Follows shards while they are encoded (``--follow``): each epoch is over those that are committed at its start.

Rank 0 looks what is there and tells the others, so all train the same. It writes what each epoch is over into
``epochs.json`` of the run's folder before the first step of it is made: a run that was killed makes the steps since
its last checkpoint again over the same samples, and a later look decides only epochs that had not begun.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from cogcommon.cli.names import plain
from cogcommon.cli.progress import said, say
from cogcommon.errors import RunError, SettingError, ShardError, StoreError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.typed import build, parse_object
from cogcommon.store.address import address_of
from cogcommon.store.store import without_secrets
from cogcommon.words import counted

from ..data.epochs import Epoch
from ..data.growing import committed
from ..data.repeats import described
from ..data.shard_set import NoSamples, ShardSet
from ..data.shard_words import can_grow
from ..data.shards import Opened, shard_set
from ..distributed.peers import Peers
from ..settings.training import TrainSettings
from ..store.cache import SampleCache
from .checkpoint import SavedCheckpoint
from .folder import EPOCHS_FILE
from .sampling import make_sampler

_T = TypeVar("_T")

_LOOK_EVERY = 5.0  # seconds
_SAY_EVERY = 60.0
_SEEN_ELSEWHERE = 30.0  # as for a checkpoint: until another host sees what rank 0 has seen
_SHOWN = 4
# What an epoch that goes on has in common with its record, by the record's names, and what decides it.
_SAME = {"fingerprint": "--shards, --validate-shards", "repeat": "--repeat", "steps": "--batch-size, --accumulate"}


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch is over."""

    epoch: int  # from 0
    after: int  # steps of the run before it
    steps: int
    samples: int
    fingerprint: str  # of its samples
    repeat: str  # how often it trains which of them
    added: Mapping[str, str]  # shards that the epoch before did not have: the tar's name, by its sha256
    gone: Sequence[str] = ()  # those that only that one had


@dataclass(frozen=True)
class _Decided:
    """What rank 0 tells the others. Tars by their sha256, with their names."""

    record: EpochRecord
    shards: Mapping[str, str]
    held_out: Mapping[str, str]


@dataclass
class Followed:
    """The epochs of a run; every rank holds the same.

    Args:
        groups: data-parallel ones.
        cache: for samples behind a URL.

    Attributes:
        records: of all epochs that have begun, oldest first; on rank 0.
        held_out: samples for validation: those that were there when the run began, so that its losses compare.
    """

    settings: TrainSettings
    groups: int
    cache: SampleCache | None = None
    records: list[EpochRecord] = field(default_factory=list)
    held_out: ShardSet | None = None
    _held_out: dict[str, str] = field(default_factory=dict)  # names of the tars that hold them, by sha256
    _epochs: list[Epoch] = field(default_factory=list)  # the last two: losses may be read a step late
    _record: EpochRecord | None = None  # of the newest
    _decided: Epoch | None = None  # on rank 0, until it is the newest: what was put together to decide it
    _known: dict[str, dict[str, Opened]] = field(default_factory=dict)  # by option, by name: what has been opened

    @property
    def newest(self) -> Epoch:
        return self._epochs[-1]

    @property
    def samples_at_start(self) -> int:
        """Of the run's first epoch; on rank 0."""
        return self.records[0].samples

    def epoch_of(self, step: int) -> Epoch:
        """The epoch of a step: the newest, or the one before."""
        return next(epoch for epoch in reversed(self._epochs) if epoch.after < step)

    def begin(self, done: int, peers: Peers, *, waits: bool = False) -> bool:
        """Begin the epoch of the step after ``done``; every rank calls it.

        Args:
            waits: for shards, where there are too few; without, that is an error.

        Returns:
            Whether it had not begun.

        Raises:
            CogError: the shards cannot be trained on.
        """
        if self._epochs and done < self.newest.last:
            return False
        decided = peers.together(lambda: self._decide(done, waits) if peers.main else None)
        told = peers.broadcast(decided)
        assert told
        peers.together(lambda: self._take(told, patience=0.0 if peers.main else _SEEN_ELSEWHERE))
        return True

    def write(self, folder: Path) -> None:
        """Write ``epochs.json`` of a run's folder."""
        told = {"held_out": self._held_out, "epochs": [asdict(record) for record in self.records]}
        commit_bytes(folder / EPOCHS_FILE, json.dumps(told, indent=1).encode())

    def read(self, folder: Path) -> None:
        """Take over what ``epochs.json`` of a run's folder says, if it is there.

        Raises:
            RunError: it is damaged.
        """
        try:
            told = parse_object((folder / EPOCHS_FILE).read_bytes())
            self._held_out = {str(sha): str(name) for sha, name in told["held_out"].items()}
            self.records = [build(EpochRecord, values) for values in told["epochs"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"the record of the run's epochs is damaged: {error}",
                where=str(folder / EPOCHS_FILE),
                fix="put it back from a copy of the folder, or start a new run with another --out",
            ) from error

    def told(self) -> str:
        """``epoch 3 (from step 41): 120 samples, 40 new since epoch 2``; empty where the samples are the same."""
        now, number = self._record, self.newest.number
        before = next((record for record in self.records if record.epoch == number - 1), None)
        if now is None or (before and before.fingerprint == now.fingerprint):
            return ""
        shards = counted(len(self.newest.shards.shards), "shard")
        words = f"epoch {number} (from step {now.after + 1:,}): {counted(now.samples, 'sample')} in {shards}"
        if before and now.gone:
            verb = "is" if len(now.gone) == 1 else "are"
            words += (
                f", {before.samples:,} in epoch {number - 1}, of which {counted(len(now.gone), 'shard')} {verb} gone"
            )
        elif before:
            words += f", {now.samples - before.samples:,} new since epoch {number - 1}"
        return f"{words}; {counted(now.steps, 'step')}"

    def _decide(self, done: int, waits: bool) -> _Decided:
        """What the epoch after ``done`` steps is over: what its record says, else what is there now."""
        if self.settings.validate_shards and not self._held_out:
            found = _wait_for(lambda: self._look("--validate-shards"), lambda: "", waits, self.settings.validate_shards)
            self._held_out = {sha: one.shard.shown for sha, one in found.items()}
        self._open_held_out(self._held_out, 0.0)
        begun = next((one for one in self.records if one.after <= done < one.after + one.steps), None)
        if begun is None:
            begun = self._now(done, waits)
            self.records.append(begun)
        return _Decided(begun, _shards_at(self.records, begun.epoch), self._held_out)

    def _now(self, done: int, waits: bool) -> EpochRecord:
        """The record of a new epoch, over what is there now."""
        last = self.records[-1] if self.records else None
        if done != (last.after + last.steps if last else 0):
            raise RunError(
                f"{EPOCHS_FILE} does not say which samples the steps before step {done + 1:,} were made of",
                where="the folder of the checkpoint",
                fix=f"copy {EPOCHS_FILE} with the checkpoint, or start a new run with another --out",
            )
        number, samples = (last.epoch + 1 if last else 0), 0

        def enough() -> Epoch | None:
            nonlocal samples
            try:
                epoch = self._epoch(number, done, self._look_or_again())
            except NoSamples:
                return None
            samples = epoch.sampler.samples
            return epoch if epoch.sampler.steps_per_epoch else None

        def lacks() -> str:
            size = self.groups * self.settings.batch_size * self.settings.accumulate
            return f"{counted(samples, 'sample')} of the {size:,} of a step" if samples else ""

        self._decided = _wait_for(enough, lacks, waits, self.settings.shards)
        return self._record_of(self._decided)

    def _record_of(self, epoch: Epoch) -> EpochRecord:
        before = _shards_at(self.records, epoch.number - 1)
        now = {shard.header.tar_sha256: shard.shown for shard in epoch.shards.shards}
        return EpochRecord(
            epoch=epoch.number,
            after=epoch.after,
            steps=epoch.sampler.steps_per_epoch,
            samples=len(epoch.shards),
            fingerprint=epoch.shards.fingerprint,
            repeat=described(epoch.sampler.times),
            added={sha: name for sha, name in now.items() if sha not in before},
            gone=[sha for sha in before if sha not in now],
        )

    def _take(self, decided: _Decided, patience: float) -> None:
        """Open what an epoch is over, and nothing else.

        Raises:
            RunError: it is not there, or something else than when the epoch began.
        """
        self._open_held_out(decided.held_out, patience)
        record = decided.record
        epoch, self._decided = self._decided, None
        if epoch is None:
            epoch = self._epoch(record.epoch, record.after, self._open(decided.shards, "--shards", patience))
        made = self._record_of(epoch)
        for name, option in _SAME.items():
            then, now = (str(getattr(one, name)) for one in (record, made))
            if then != now:
                raise RunError(
                    f"epoch {record.epoch}, which goes on, began with other {name}: {then[:40]} then, {now[:40]} now",
                    where=option,
                    fix="set it back, or start a new run (--resume never, or another --out)",
                )
        self._epochs = [*self._epochs[-1:], epoch]
        self._record = record

    def _epoch(self, number: int, after: int, opened: Sequence[Opened]) -> Epoch:
        if not opened:
            raise NoSamples("no shard is there")
        shards = shard_set(opened, cache=self.cache, may_differ=())  # the run is known by the contract of all
        if self._epochs and shards.contract.fingerprint != self.newest.shards.contract.fingerprint:
            differing = self.newest.shards.contract.differences(shards.contract)
            raise ShardError(
                f"the shards are encoded otherwise than those before: {'; '.join(differing[:4])}",
                where=shards.shards[0].shown,
                fix="put the old ones back, or start a run on the new ones",
            )
        if self.held_out:
            shards = shards.without(self.held_out)
        return Epoch(number, after, shards, make_sampler(self.settings, shards, self.groups))

    def _open_held_out(self, tars: Mapping[str, str], patience: float) -> None:
        if tars and self.held_out is None:
            opened = self._open(tars, "--validate-shards", patience)
            self.held_out = shard_set(opened, "--validate-shards", self.cache)

    def _open(self, tars: Mapping[str, str], option: str, patience: float) -> list[Opened]:
        """These shards, as they were when somebody opened them."""
        until = time.monotonic() + patience
        found = {one.shard.header.tar_sha256: one for one in self._known.get(option, {}).values()}
        while missing := [name for sha, name in tars.items() if sha not in found]:
            found = self._look(option)
            missing = [name for sha, name in tars.items() if sha not in found]
            if missing and time.monotonic() > until:
                more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
                raise RunError(
                    f"shards that the run is being trained on are gone, or others now: "
                    f"{', '.join(missing[:_SHOWN])}{more}",
                    where=f"{option} {' '.join(map(without_secrets, self._words(option)))}",
                    fix="put them back, or start a new run with another --out",
                )
            if missing:
                time.sleep(1.0)
        return [found[sha] for sha in tars]

    def _look_or_again(self) -> list[Opened]:
        """What is committed now; while that cannot be found out, what the epoch before was over."""
        try:
            return list(self._look("--shards").values())
        except StoreError as fault:
            if not self._epochs:
                raise
            said()
            print(plain(f"cannot look for new shards: {fault.what} ({fault.where}); trains the last ones again"))
            names = {shard.shown for shard in self.newest.shards.shards}
            return [one for name, one in self._known["--shards"].items() if name in names]

    def _look(self, option: str) -> dict[str, Opened]:
        """The shards that are committed now, by their tars' sha256."""
        known = committed(self._words(option), option, self.cache, self._known.get(option))
        self._known[option] = known
        return {one.shard.header.tar_sha256: one for one in known.values()}

    def _words(self, option: str) -> Sequence[str]:
        return self.settings.shards if option == "--shards" else self.settings.validate_shards


def open_followed(
    settings: TrainSettings, resume: SavedCheckpoint | None, groups: int, peers: Peers
) -> Followed:  # fmt: skip
    """Begin the epoch of a run's first step from here on; every rank calls it. It waits until there are shards.

    Raises:
        SettingError: no more shards can come.
        CogError: the shards cannot be trained on.
    """
    followed = Followed(settings, groups)

    def read() -> None:
        followed.cache = SampleCache(settings.cache, settings.cache_bytes) if settings.cache else None
        if settings.shards and not any(map(can_grow, settings.shards)):
            first = settings.shards[0].rpartition("/")[0] or "."
            raise SettingError(
                "there is nothing to follow: --shards names tars, to which none can be added",
                where="--follow",
                fix=f"name their folder: --shards {without_secrets(first)}/ (a shell writes a pattern out; quote it)",
            )
        folder = resume.folder.parent if resume else settings.out
        if folder is not None and (resume or settings.resume != "never"):
            followed.read(folder)

    peers.together(read)
    # Of a run that has made all its steps the last epoch, for which nothing is left to come.
    done = min(resume.state.step, (settings.steps or 1) - 1) if resume else 0
    followed.begin(done, peers, waits=True)
    return followed


def _shards_at(records: Sequence[EpochRecord], epoch: int) -> dict[str, str]:
    """The shards of an epoch: names by sha256."""
    shards: dict[str, str] = {}
    for record in (record for record in records if record.epoch <= epoch):
        shards = {sha: name for sha, name in (shards | dict(record.added)).items() if sha not in record.gone}
    return shards


def _wait_for(look: Callable[[], _T | None], lacks: Callable[[], str], waits: bool, words: Sequence[str]) -> _T:
    """What ``look`` gives, once it gives something.

    Args:
        lacks: what there is too little of, in words.
    """
    where, last = " ".join(map(without_secrets, words)), -_SAY_EVERY
    while True:
        if found := look():
            return found
        there = lacks() or "none"
        if not waits:
            raise ShardError(
                f"no samples are left to train on: {there}", where=where, fix="put the shards back, and run it again"
            )
        if (now := time.monotonic()) - last >= _SAY_EVERY:
            last = now
            folders = "".join(f"; the folder {one} does not exist (yet)" for one in _folders_missing(words))
            say(f"waits for shards in {where}: {there} so far{folders}; looks every {_LOOK_EVERY:.0f} s")
        time.sleep(_LOOK_EVERY)


def _folders_missing(words: Sequence[str]) -> list[str]:
    """The folders of this machine that words for shards speak of and that are not there."""
    folders = []
    for word in (word for word in words if address_of(word) is None):
        fixed = re.split(r"[*?\[{]", word)[0]
        folders.append(word if fixed == word and not word.endswith(".tar") else os.path.dirname(fixed) or ".")  # noqa: PTH120
    return [one for one in dict.fromkeys(folders) if not os.path.lexists(one)]
