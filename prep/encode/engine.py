"""Where planned shards are encoded: the seam between the main path (`part`) and its engines, and the local one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import Precision, device_type, item_bytes, pick_device, start_gpu, visible_gpus
from cogcommon.shards.contract import Contract

from ..plan.plan import PlannedShard
from ..plan.slice import local_rank
from ..processes.pool import Pool
from ..settings.encode import EncodeSettings
from ..store.outlet import Outlet
from .clock import Clock
from .encoder import ShardEncoder
from .outcome import Outcome

# T5 runs over the captions of a round, then makes room for the VAE. A round's embeddings lie in a
# scratch file: 17,000 captions of T5-XXL in bf16, a day of encoding between two loads of T5.
_ROUND_TEXT_BYTES = 32_000_000_000


@dataclass(frozen=True)
class Job:
    """Planned shards, and what an engine needs to encode them.

    Args:
        contract: of every shard; the folder has it, or has none.
        shards: of this process's slice.
        pool: decode processes of this machine.
        begin: to be called once, when all models are there and the contract is committed, before a shard is touched.
        outcome: what becomes of the shards is added to it.
        outlet: where shards go.
    """

    settings: EncodeSettings
    checkpoint: Checkpoint
    precision: Precision
    contract: Contract
    shards: Sequence[PlannedShard]
    pool: Pool
    begin: Callable[[], None]
    clock: Clock
    outcome: Outcome
    outlet: Outlet


class Engine(Protocol):
    """Encodes and commits planned shards, somewhere."""

    def device_type(self) -> str:
        """Of what the models run on, as torch calls it: "cuda" or "cpu"."""

    def encode(self, job: Job) -> None:
        """Encode and commit the shards of a job, of which there may be none.

        Raises:
            ModelError: a model cannot be loaded.
            DiskError: the disk is full. What was committed stays good.
        """


class LocalEngine:
    """This process, on one device of this machine."""

    def device_type(self) -> str:
        """See `Engine`."""
        return device_type()

    def encode(self, job: Job) -> None:
        """See `Engine`; the shards in rounds (`rounds`)."""
        device = pick_device(local_rank(os.environ) % max(1, visible_gpus()))
        start_gpu(device)
        encoder = ShardEncoder(
            job.settings, job.checkpoint, device, job.precision, job.contract, job.pool, job.clock, outlet=job.outlet
        )
        begin = job.begin
        for round_ in rounds(job.shards, job.contract):
            encoder.encode(round_, job.outcome, begin=begin)
            begin = _nothing


def _nothing() -> None:
    pass


def rounds(shards: Sequence[PlannedShard], contract: Contract) -> Iterator[list[PlannedShard]]:
    """Shards in groups whose embeddings fit into the scratch file; without shards, one empty group."""
    text_bytes = _text_bytes(contract)
    group: list[PlannedShard] = []
    captions = 0
    for shard in shards:
        if group and (captions + len(shard.samples)) * text_bytes > _ROUND_TEXT_BYTES:
            yield group
            group, captions = [], 0
        group.append(shard)
        captions += len(shard.samples)
    yield group


def scratch_bytes(shards: Sequence[PlannedShard], contract: Contract) -> int:
    """The most that the scratch file of embeddings (`TextStore`) takes of the disk, beside the shards."""
    captions = (
        len({planned.sample.caption for shard in group for planned in shard.samples})
        for group in rounds(shards, contract)
    )
    return max(captions) * _text_bytes(contract)


def _text_bytes(contract: Contract) -> int:
    return contract.text_tokens * contract.text_dim * item_bytes(contract.dtype)
