"""The models of an encode: T5, which is on the device only while it embeds captions, then the VAE."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogcommon.cli.progress import say, stage
from cogcommon.files.memory import free_gpu_memory
from cogcommon.libraries import hash_triton_ahead, quiet_libraries
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import Precision, dtype_of
from cogcommon.model.text_encoder import TextEncoder
from cogcommon.model.weights import CLASSES
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import TEXT

from ..plan.folder import commit_contract
from ..plan.plan import PlannedShard
from ..settings.encode import EncodeSettings
from ..store.locks import shard_disk_errors
from ..store.outlet import Outlet
from ..vae.encoder import LatentEncoder, free_wanted
from .captions import TextStore
from .clock import Clock

if TYPE_CHECKING:
    import torch


_BESIDE = 8 << 30  # bytes for the VAE itself, its trial (`use_fused_encoder`), and what CUDA's libraries take


class Models:
    """T5 and the VAE of one device, each loaded at its first use. T5 makes room for the VAE.

    Args:
        keep_text: between its passes T5 stays on the GPU where the VAE has all the memory that it can use beside it,
            and else waits in host memory (9.5 GB for T5-XXL in bf16); without, it is loaded for each.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: Precision,
        settings: EncodeSettings,
        clock: Clock,
        *,
        keep_text: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype_of(precision)
        self._settings = settings
        self._clock = clock
        self._keep_text = keep_text
        self._text: TextEncoder | None = None
        self._latents: LatentEncoder | None = None

    @property
    def text_bytes(self) -> int:
        """Host memory that T5 takes while it is loaded: that of its files, which mostly hold two bytes a weight; more
        where it computes in four."""
        return self._checkpoint.bytes_of("text_encoder") * self._dtype.itemsize // 2

    def embed_captions(
        self, shards: Sequence[PlannedShard], text: TextStore, contract: Contract, outlet: Outlet
    ) -> Contract:
        """Fill the store with the captions of the shards, and commit the contract with its empty caption.

        Returns:
            The contract as the folder has it.
        """
        import safetensors.torch

        captions = {planned.sample.caption: None for shard in shards for planned in shard.samples}
        with self._clock("load"), stage("loading T5"):
            encoder = self._text_encoder()
            empty_LD, _ = encoder.encode("")  # the first one also waits for the GPU's libraries
        empty_caption, ours = safetensors.torch.save({TEXT: empty_LD}), contract
        with shard_disk_errors(outlet.folder):
            contract = outlet.agree(lambda: commit_contract(outlet.folder, ours, empty_caption))
        with self._clock("text"), stage("embedding", len(captions), "caption") as bar:
            text.fill(captions, encoder, bar.advance)
        del encoder
        self._make_room()
        return contract

    def _text_encoder(self) -> TextEncoder:
        if self._text is None:
            quiet_libraries()
            if self._settings.encoder == "auto":
                hash_triton_ahead(self._device)
            import_vae = CLASSES["vae"].load
            self._text = TextEncoder(self._checkpoint, self._device, self._dtype, meanwhile=import_vae)
        else:
            self._text.come_back()
        return self._text

    def _make_room(self) -> None:
        """T5-XXL is 9.5 GB; the VAE comes next."""
        import torch

        if self._text is not None and self._keep_text:
            if self._has_room():
                return
            self._text.make_room()
        else:
            self._text = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _has_room(self) -> bool:
        """Whether the VAE does the same with T5 beside it: what it does with less room may differ in last bits."""
        if self._device.type != "cuda":
            return True
        channels: int = self._checkpoint.vae_config["block_out_channels"][0]
        wanted = (free_wanted(size, channels, self._dtype.itemsize) for size in self._settings.buckets)
        return free_gpu_memory(self._device) >= max(wanted) + _BESIDE

    @property
    def latents(self) -> LatentEncoder:
        if self._latents is None:
            settings = self._settings
            with self._clock("load"), stage("loading the VAE"):
                self._latents = LatentEncoder(
                    self._checkpoint.load_vae(self._dtype).to(self._device),
                    self._device,
                    posterior=settings.posterior,
                    tiling=settings.tiling,
                    image_variants=settings.image_variants,
                    seed=settings.seed,
                    fused=settings.encoder == "auto",
                )
            if self._latents.choice.why:
                say(f"the VAE runs diffusers' encoder, which takes three times as long: {self._latents.choice.why}")
        return self._latents
