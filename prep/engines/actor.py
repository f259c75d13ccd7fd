"""What runs on a GPU of the cluster: one process with its models, which encodes the shards that it is given.

It imports no Ray: the driver makes a Ray actor of the class. Whatever goes wrong is a value, since an exception
might not survive the way.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from cogcommon.cli.stages import before_each
from cogcommon.environment import set_variables
from cogcommon.errors import CogError, ModelError, SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogcommon.shards.contract import Contract
from cogcommon.words import first_line

from ..encode.clock import Clock
from ..encode.encoder import ShardEncoder
from ..encode.outcome import Outcome
from ..encode.part import check_and_hash, make_contract
from ..encode.pipeline import Care
from ..plan.plan import PlannedSample, PlannedShard
from ..processes.pool import Pool, default_workers
from ..settings.encode import EncodeSettings
from ..source.addresses import remote_address
from ..store.locks import at_work


@dataclass(frozen=True)
class Fault:
    """Why an actor could not do what it was asked."""

    what: str
    where: str | None
    fix: str | None
    told: bool  # an error for the person at the keyboard: of the node or the folder, and of no clip

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """An error as a value."""
        if isinstance(error, CogError):
            return cls(error.what, error.where, error.fix, told=True)
        traceback.print_exc()  # to the node's logs
        at = traceback.extract_tb(error.__traceback__)[-1]
        return cls(f"{type(error).__name__}: {first_line(error)}", f"{at.filename}:{at.lineno}", None, told=False)


@dataclass(frozen=True)
class Status:
    """How an actor gets on.

    Args:
        clip: the key of the sample at hand; empty between shards.
        settled: samples of the shard at hand that are settled (`Outcome.samples`).
        idle_s: seconds since anything got further.
        waits_for: what the work waits for, in words.
    """

    clip: str
    settled: int
    idle_s: float
    waits_for: str


class EncodeActor:
    """A GPU of the cluster. Two calls run side by side: `load` or `encode`, and `status`.

    Args:
        settings: the driver's; its paths are absolute.
        contract: of the shards.
        device_type: ``cuda`` or ``cpu``, as of all other GPUs of this run.
        share: GPUs of this node, which share its cores.
    """

    def __init__(self, settings: EncodeSettings, contract: Contract, device_type: str, share: int) -> None:
        self._settings = settings
        self._contract = contract
        self._device_type = device_type
        self._share = share
        self._outcome = Outcome()
        self._clip = ""
        self._further = time.monotonic()
        self._seen = threading.Condition()
        self._seen_clip = ""
        before_each(self._got_further)

    def load(self) -> Fault | None:
        """Check that this node has the run's weights, load the models, commit the contract."""
        try:
            self._load()
        except Exception as error:
            return Fault.of(error)
        return None

    def _load(self) -> None:
        settings, contract = self._settings, self._contract
        folders = {"--out": settings.out}  # which is no address: the driver has refused that
        if remote_address(settings.root) is None:
            folders = {"--data-root": settings.root, **folders}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise SettingError(
                    "this node does not have the folder",
                    where=f"{name} {folder}",
                    fix="mount it on every node at the same path",
                )
        settings.keep_clips()
        device = pick_device()
        if device.type != self._device_type:
            raise SettingError(
                f"the models would run on {device.type} here, and run on {self._device_type} on the first node",
                fix="look whether `nvidia-smi` and torch.cuda.is_available() agree on this node",
            )
        checkpoint = open_checkpoint(contract.model, contract.revision)
        ours = make_contract(settings, checkpoint, contract.dtype, check_and_hash(checkpoint))
        if ours.fingerprint != contract.fingerprint:
            raise ModelError(
                "this node would encode something else than the driver planned",
                where="\n       ".join(ours.differences(contract)),
                fix="the same weights and the same cogtune on every node",
            )
        workers = settings.workers or max(1, default_workers() // self._share)
        set_variables()  # as every command of ours; nobody has typed one here
        pool = Pool(workers, timeout_s=settings.clip_timeout)
        pool.__enter__()  # to the end of this process
        assert settings.precision is not None  # the driver's
        self._encoder = ShardEncoder(
            settings, checkpoint, device, settings.precision, contract, pool, Clock(), keep_text=True
        )
        self._encoder.load()

    def encode(self, shard: PlannedShard, set_aside: Mapping[str, str], careful: bool) -> Outcome | Fault:
        """Encode and commit a shard.

        Args:
            set_aside: see `Care`.
            careful: one clip at a time, each begun when the driver has seen it at hand (`status`).
        """
        self._outcome = outcome = Outcome()
        self._got_further()

        def at_hand(planned: PlannedSample) -> None:
            self.at_hand(planned)
            if careful:
                with self._seen:
                    self._seen.wait_for(lambda: self._seen_clip == planned.key)
            self._got_further()

        try:
            with at_work(self._settings.out):
                self._encoder.encode([shard], outcome, care=Care(at_hand, careful, set_aside))
        except Exception as error:
            return Fault.of(error)
        finally:
            self._clip = ""
        return outcome

    def at_hand(self, planned: PlannedSample) -> None:
        """A clip is about to be read."""
        self._clip = planned.key

    def status(self, seen: str) -> Status:
        """How it gets on.

        Args:
            seen: the clip at hand by the last status that has reached the driver.
        """
        with self._seen:
            self._seen_clip = seen
            self._seen.notify_all()
        idle_s = time.monotonic() - self._further
        return Status(self._clip, self._outcome.samples, idle_s, self._outcome.waits_for)

    def _got_further(self) -> None:
        self._further = time.monotonic()
