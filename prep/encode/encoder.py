"""Encodes planned shards on one device: T5 over their captions, then clips through the VAE to committed shards.

This is what every engine does with the shards that it is given, one device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cogcommon.cli.progress import stage
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import Precision
from cogcommon.shards.contract import Contract

from ..plan.plan import PlannedShard
from ..processes.pool import Pool
from ..settings.encode import EncodeSettings
from ..store.outlet import Outlet
from .captions import TextStore
from .clock import Clock
from .decoding import Decoding
from .models import Models
from .outcome import Outcome
from .pipeline import QUICKLY, Care, Pipeline

if TYPE_CHECKING:
    import torch


class ShardEncoder:
    """A device with its models, and decode processes; they are loaded at their first use.

    Args:
        checkpoint: where the models come from.
        device: for T5 and the VAE.
        precision: of both.
        contract: of every shard; the folder need not have it yet.
        pool: decode processes.
        clock: seconds are added to its stages.
        outlet: where shards go; if there is none, the settings' folder.
        keep_text: see `Models`.
    """

    def __init__(
        self,
        settings: EncodeSettings,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: Precision,
        contract: Contract,
        pool: Pool,
        clock: Clock,
        *,
        outlet: Outlet | None = None,
        keep_text: bool = False,
    ) -> None:
        self._outlet = outlet or Outlet(settings.out)
        self._settings = settings
        self._contract = contract
        self._pool = pool
        self._clock = clock
        self._models = Models(checkpoint, device, precision, settings, clock, keep_text=keep_text)

    def load(self) -> None:
        """Load all models, and commit the contract."""
        self.encode([], Outcome())

    def encode(
        self,
        shards: Sequence[PlannedShard],
        outcome: Outcome,
        *,
        begin: Callable[[], None] = lambda: None,
        care: Care = QUICKLY,
    ) -> None:
        """Encode and commit shards.

        Args:
            outcome: what came of them is added to it.
            begin: called when all models are there and the contract is committed, before a shard is touched.
            care: see there.

        Raises:
            SettingError: the folder has another contract.
            DiskError: the disk is full. What was committed stays good.
        """
        settings = self._settings
        decoding = Decoding(settings.root, settings.cut, self._contract.family_row.fps, self._pool)
        with TextStore(self._outlet.folder) as text, decoding:
            if care is QUICKLY:
                decoding.begin(shards, beside=self._models.text_bytes)
            self._contract = self._models.embed_captions(shards, text, self._contract, self._outlet)
            latents = self._models.latents
            outcome.encoder = latents.choice
            begin()
            total = sum(len(shard.samples) for shard in shards)
            with self._clock("encode"), stage("encoding", total, "clip") as bar:
                Pipeline(
                    outlet=self._outlet,
                    contract=self._contract,
                    decoding=decoding,
                    latents=latents,
                    text=text,
                    outcome=outcome,
                    advance=lambda: bar.advance(outcome.waits_for),
                    care=care,
                ).encode(shards)
