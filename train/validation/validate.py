"""Validation: loss and videos of held-out samples, with the base model's beside them.

Every number is a function of the samples and the weights alone. Each sample is
measured once, by one rank, as a batch of one, so the value does not depend on
the number of processes; nothing here uses a random generator of training's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cogcommon.cli.progress import stage
from cogcommon.files.atomic import commit_bytes
from cogcommon.media.video import write_mp4

from ..blocks.engine import BlockEngine
from ..blocks.plan import BlockPlan
from ..data.batches import Collator, StoredSample, read_sample
from ..data.sampler import Slot
from ..data.shards import ShardSet
from ..distributed.signals import StopRequest
from ..distributed.strategy import Runtime
from ..model.objective import Objective
from ..runs.folder import CAPTIONS_FILE, CLIPS, VALIDATION, ValidationLine, finite
from ..runs.log import RunLog, peak_gib, reset_peak
from ..runs.run import Run
from .videos import STEPS, Conditions, decode_latents, denoise, load_decoder

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX

TIMESTEPS = (125, 375, 625, 875)  # the middles of four equal parts
_SEED = 0  # of the noise: the same in every run, so that runs can be compared
_BASE_FILE = "base.json"


class _Asked(Exception):
    """The run is asked to stop: what is saved for it matters more than the validation."""


@dataclass(frozen=True)
class Validation:
    """Measures a model on held-out samples.

    Args:
        objective: without any weighting of the loss.
        stop: is asked between samples and between sampling steps.
        base_loss: of the untouched base model.
    """

    run: Run
    runtime: Runtime
    held_out: ShardSet
    objective: Objective
    folder: Path
    log: RunLog
    stop: StopRequest
    base_loss: float

    @classmethod
    def begin(
        cls, run: Run, runtime: Runtime, model: torch.nn.Module, folder: Path, log: RunLog, stop: StopRequest
    ) -> Validation | None:
        """Measure the base model, unless this run has done so before; None without held-out samples.

        Call it when nothing has been trained or resumed yet: LoRA's B is zero
        (`Method.as_base`) and full fine-tuning's weights are the checkpoint's, so
        ``model`` is the base model. Every rank calls it.

        Raises:
            ShardError: a held-out sample is damaged.
        """
        if run.held_out is None:
            return None
        validation = cls(
            run, runtime, run.held_out, Objective.of(run.checkpoint), folder / VALIDATION, log, stop, math.nan
        )
        known = validation._remembered()
        if known is None:
            log.say(f"validation: {len(run.held_out)} held-out samples at {len(TIMESTEPS)} timesteps; base model first")
            if validation.videos and not runtime.whole:
                log.say(
                    f"validation videos: {run.strategy} gathers the weights once, into host memory of each process "
                    "that draws; if that is too much, --validate-videos 0"
                )
            with run.method.as_base(model):
                known, peak = validation._take(model, 0)
            if runtime.device.type == "cuda":
                log.say(f"validation held at most {peak:.1f} GiB of the GPU")
            validation._remember(known)
        return dataclasses.replace(validation, base_loss=known)

    def _remembered(self) -> float | None:
        """The base model's loss as rank 0 finds it in the run folder."""
        found = ""
        path = self.folder / _BASE_FILE
        if self.runtime.main and path.exists():
            found = path.read_text(encoding="utf-8")
        known = json.loads(self.runtime.peers.broadcast(found) or "{}")
        if known.get("facts") != self._facts():
            return None
        return math.nan if known["loss"] is None else float(known["loss"])

    def _remember(self, loss: float) -> None:
        if self.runtime.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = {"facts": self._facts(), "loss": finite(loss)}
            commit_bytes(self.folder / _BASE_FILE, json.dumps(known).encode())

    def _facts(self) -> list[Any]:
        """What the base model's loss and videos depend on."""
        return [
            self.held_out.fingerprint,
            self.run.checkpoint.fingerprint,
            self.run.precision,
            [*TIMESTEPS],
            self.videos,
        ]

    @property
    def videos(self) -> int:
        return min(self.run.settings.validate_videos, len(self.held_out))

    def measure(self, model: torch.nn.Module, step: int) -> ValidationLine | None:
        """Loss, and videos where asked for; every rank calls it. None if the run is asked to stop meanwhile."""
        training = peak_gib(self.runtime.device)  # since the last validation
        try:
            value, peak = self._take(model, step)
        except _Asked:
            return None
        if self.runtime.device.type == "cuda" and peak > training:
            self.log.say(
                f"validation held {peak:.1f} GiB of the GPU, training {training:.1f}"
                + ("; --validate-videos 0 lowers it" if self.videos else "")
            )
        return ValidationLine(step, finite(value), finite(self.base_loss), peak)

    def _take(self, model: torch.nn.Module, step: int) -> tuple[float, float]:
        """The loss, and the most memory held meanwhile; before and after it is counted anew."""
        reset_peak(self.runtime.device)
        value = self.loss(model)
        if self.videos:
            self.draw(model, step)
        peak = peak_gib(self.runtime.device)
        reset_peak(self.runtime.device)
        return value, peak

    def loss(self, model: torch.nn.Module) -> float:
        """Mean velocity loss over all held-out samples and `TIMESTEPS`, at the posteriors' means."""
        import torch

        collate = Collator(self.objective, _SEED, held_out=True)
        groups = self.run.groups
        rounds = -(-len(self.held_out) // groups.count)
        rows = []
        with self._evaluating(model) as plain, stage("validating", rounds, "sample") as bar:
            for number in range(rounds):
                self._go_on()
                index = number * groups.count + groups.of(self.runtime.rank)
                # A group that has none left repeats the first: under ZeRO-3 all ranks run every forward pass.
                stored = self._read(index if index < len(self.held_out) else 0)
                row = []
                for timestep in TIMESTEPS:
                    batch = collate([stored], [Slot(index, 0, 0)], [timestep]).to(self.runtime.device)
                    with self.runtime.accelerator.autocast():
                        row.append(self.objective.losses(plain, batch, self.runtime.dtype)[0])
                rows.append(torch.stack(row))
                bar.advance()
        losses_RT = groups.once(self.runtime.accelerator.gather(torch.stack(rows))).double().cpu()  # group by group
        by_sample = losses_RT.view(groups.count, rounds, -1).transpose(0, 1).reshape(-1, len(TIMESTEPS))
        by_sample = by_sample[: len(self.held_out)]
        for index in (~by_sample.isfinite().all(1)).nonzero().flatten().tolist():
            extent = self.held_out.extent(index)
            self.log.say(
                f"note: the held-out loss of {extent.key} in {self.held_out.shards[extent.shard].shown} is not finite"
            )
        values = by_sample.flatten().tolist()
        # `math.fsum` takes no sum of infinities of both signs.
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan

    def draw(self, model: torch.nn.Module, step: int) -> None:
        """Write ``validation/step-N/i.mp4`` for the first held-out samples, each by one group, side by side.

        With the base model's (step 0) comes the clip itself, as it is stored, and its first frame for I2V.
        """
        groups, rank = self.run.groups, self.runtime.rank
        folder = self.folder / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        with self._evaluating(model) as live, self._whole(live) as transformer:
            with stage("loading the VAE"):
                decoder = load_decoder(self.run.checkpoint, self.runtime.dtype)
            for start in range(0, self.videos, groups.count):  # a round; all meet before the next one
                index = start + groups.of(rank)
                stored = self._read(min(index, self.videos - 1))
                with suppress(_Asked):  # all leave together, below
                    if index < self.videos:
                        if step == 0 and groups.leads(rank):
                            with stage("decoding the clip"):
                                self._show_clip(decoder, stored, index)
                        name = f"video {index + 1}/{self.videos}"
                        with stage(name, STEPS, "step") as bar:
                            latent, length = self._draw_latent(transformer, stored, bar.advance)
                        with stage(f"{name}: decoding"):
                            frames = decode_latents(decoder, latent, length)
                        if groups.leads(rank):
                            write_mp4(folder / f"{index}.mp4", frames, self.run.checkpoint.family.fps)
                self._go_on()
        if self.runtime.main:
            captions = [read_sample(self.held_out, index).caption for index in range(self.videos)]
            commit_bytes(self.folder / CAPTIONS_FILE, json.dumps(captions, ensure_ascii=False).encode())
        self.runtime.barrier()

    def _go_on(self) -> None:
        """Raises:
        _Asked: any rank is asked to stop.
        """
        if self.runtime.all_reduce_max(self.stop.signal):
            raise _Asked

    def _draw_latent(
        self, transformer: torch.nn.Module, stored: StoredSample, advance: Callable[[], None]
    ) -> tuple[torch.Tensor, int]:
        """A video's latent from a sample's caption, and image, as stored; and its frames without padding."""
        import safetensors.torch
        import torch

        def go_on() -> None:
            if self.stop.signal:
                raise _Asked
            advance()

        device = self.runtime.device
        batch = Collator(self.objective, _SEED, held_out=True)([stored], [Slot(0, 0, 0)]).to(device)
        # Encode writes no empty caption beside held-out shards.
        empty = safetensors.torch.load(self.run.shards.empty_caption())["text"]
        conditions = Conditions(batch.noise_BFCHW, batch.text_BLD, empty[None].to(device), batch.conditions)
        generator = torch.Generator().manual_seed(_SEED)
        with self.runtime.accelerator.autocast():
            latent = denoise(
                transformer, self.objective, self.run.checkpoint, conditions, generator, self.runtime.dtype, each=go_on
            )
        return latent, batch.latent_BFCHW.shape[1]

    def _show_clip(self, decoder: AutoencoderKLCogVideoX, stored: StoredSample, index: int) -> None:
        """Write what the videos are to be compared with."""
        batch = Collator(self.objective, _SEED, held_out=True)([stored], [Slot(0, 0, 0)]).to(self.runtime.device)
        clip_FHWC = decode_latents(decoder, batch.latent_BFCHW, batch.latent_BFCHW.shape[1])
        folder = self.folder / CLIPS
        folder.mkdir(parents=True, exist_ok=True)
        write_mp4(folder / f"{index}.mp4", clip_FHWC, self.run.checkpoint.family.fps)
        for image_BFCHW in batch.conditions.values():  # unscaled
            image_FHWC = decode_latents(decoder, image_BFCHW * decoder.config.scaling_factor, 1)
            Image.fromarray(image_FHWC[0]).save(folder / f"{index}.png")

    @contextmanager
    def _whole(self, live: Any) -> Iterator[Any]:
        """The model with all its weights: the live one, or under ZeRO-3 a copy, gathered once.

        The copy's blocks stay in host memory and come to the GPU one ahead (``offload.block_swap``): beside
        the live weights there would be no room for 10.4 GiB more that training does not need, for 5B.
        """
        import torch

        if self.runtime.whole:
            yield live
            return
        read = self.runtime.full_weight()
        trained = [(name, parameter) for name, parameter in live.named_parameters() if parameter.requires_grad]
        group = self.run.groups.of(self.runtime.rank)
        if group >= self.videos:  # nothing to draw here, but the others need this rank's parts
            for _, parameter in trained:
                read(parameter)
            yield None
            return
        copy = self.run.checkpoint.load_transformer(self.runtime.dtype)  # frozen weights are the checkpoint's
        self.run.method.apply(copy)
        into = dict(copy.named_parameters())
        with torch.no_grad():
            for name, parameter in trained:
                into[name].copy_(read(parameter))
        copy.requires_grad_(False).eval()
        plan = BlockPlan.to_draw(len(copy.transformer_blocks))
        engine = BlockEngine(copy, plan, self.runtime.device, self.runtime.dtype)
        try:
            yield copy
        finally:
            engine.unlock()

    def _read(self, index: int) -> StoredSample:
        """A held-out sample; when any rank cannot read its own, all stop together."""
        return self.runtime.peers.together(lambda: read_sample(self.held_out, index))

    @contextmanager
    def _evaluating(self, model: torch.nn.Module) -> Iterator[Any]:
        """The plain model in evaluation mode, without gradients; back as it was afterwards."""
        import torch

        plain = self.runtime.plain(model)
        was = plain.training
        plain.eval()
        try:
            with torch.no_grad():
                yield plain
        finally:
            plain.train(was)
