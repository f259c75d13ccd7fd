"""Draws the videos of validation while training goes on, each by one group of processes, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cogcommon.cli.progress import stage
from cogcommon.media.video import write_mp4

from ..blocks.engine import BlockEngine
from ..blocks.plan import BlockPlan
from ..data.batches import Collator, StoredSample
from ..data.sampler import Slot
from ..distributed.signals import StopRequest
from ..distributed.strategy import Runtime
from ..model.objective import Objective
from ..runs.folder import CLIPS
from ..runs.run import Run
from ..settings.results import SEED, STEPS
from .embed import EmbeddedPrompt
from .videos import Conditions, decode_latents, denoise, load_decoder

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX

HELD_OUT_SEED = 0  # of held-out samples' noise: the same in every run, so that runs can be compared


class Asked(Exception):
    """The run is asked to stop: what is saved for it matters more than the validation."""


@dataclass(frozen=True)
class Scene:
    """What a video is drawn from, on the CPU.

    Attributes:
        generator: of the noise that DPM adds at each step.
        frames: latent frames of the video; the noise may have more, which are padding.
        clip_BFCHW: what the video is to be compared with, if there is a clip: unscaled latents.
    """

    conditions: Conditions
    generator: torch.Generator
    frames: int
    clip_BFCHW: torch.Tensor | None = None


@dataclass(frozen=True)
class Video:
    """A video to draw.

    Attributes:
        name: of its file, without the suffix.
        read: gives its scene; a CogError of one rank ends all.
    """

    name: str
    read: Callable[[], Scene]


def of_sample(stored: StoredSample, objective: Objective, empty_BLD: torch.Tensor) -> Scene:
    """A held-out sample's caption, and image, as they are stored."""
    import torch

    batch = Collator(objective, HELD_OUT_SEED, held_out=True)([stored], [Slot(0, 0, 0)])
    return Scene(
        Conditions(batch.noise_BFCHW, batch.text_BLD, empty_BLD, batch.conditions),
        torch.Generator().manual_seed(HELD_OUT_SEED),
        batch.latent_BFCHW.shape[1],
        batch.latent_BFCHW,
    )


def of_prompt(embedded: EmbeddedPrompt, objective: Objective, empty_BLD: torch.Tensor) -> Scene:
    """A prompt, and its first frame; with the noise that diffusers' pipelines draw of the seed."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    family, size = objective.family, embedded.prompt.size
    channels, frames, height, width = family.padded_latent(size)
    noise_BFCHW = torch.randn(1, frames, channels, height, width, generator=generator)
    named = {name: tensor[None] for name, tensor in embedded.conditions.items()}
    conditions = Conditions(noise_BFCHW, embedded.text_LD[None], empty_BLD, named)
    return Scene(conditions, generator, family.latent(size).frames)


@dataclass(frozen=True)
class Drawing:
    """Draws videos with a model in training.

    Attributes:
        folder: of the validations.
        stop: is asked between sampling steps.
    """

    run: Run
    runtime: Runtime
    objective: Objective
    folder: Path
    stop: StopRequest

    def draw(self, plain: Any, step: int, videos: Sequence[Video]) -> None:
        """Write ``step-N/NAME.mp4`` of each video; every rank calls it.

        With the base model's (step 0) comes the clip itself, as it is stored, and its first frame for I2V.

        Args:
            plain: the live model, in evaluation mode.

        Raises:
            Asked: the run is asked to stop.
        """
        groups, rank = self.run.groups, self.runtime.rank
        folder = self.folder_of(step)
        folder.mkdir(parents=True, exist_ok=True)
        with self._whole(plain, len(videos)) as transformer:
            with stage("loading the VAE"):
                decoder = load_decoder(self.run.checkpoint, self.runtime.dtype)
            for start in range(0, len(videos), groups.count):  # a round; all meet before the next one
                index = start + groups.of(rank)
                video = videos[min(index, len(videos) - 1)]
                scene = self.runtime.peers.together(video.read)
                with suppress(Asked):  # all leave together, below
                    if index < len(videos):
                        name, leads = f"video {index + 1}/{len(videos)}", groups.leads(rank)
                        if step == 0 and leads and scene.clip_BFCHW is not None:
                            with stage("decoding the clip"):
                                self._show_clip(decoder, scene, video.name)
                        with stage(name, STEPS, "step") as bar:
                            latent_BFCHW = self._latent(transformer, scene, bar.advance)
                        with stage(f"{name}: decoding"):
                            frames = decode_latents(decoder, latent_BFCHW, scene.frames)
                        if leads:
                            write_mp4(folder / f"{video.name}.mp4", frames, self.run.checkpoint.family.fps)
                self.go_on()
        self.runtime.barrier()

    def folder_of(self, step: int) -> Path:
        """Where the videos of a step go; 0: of the base model."""
        return self.folder / f"step-{step:06d}"

    def go_on(self) -> None:
        """Raises:
        Asked: any rank is asked to stop.
        """
        if self.runtime.all_reduce_max(self.stop.signal):
            raise Asked

    def _latent(self, transformer: torch.nn.Module, scene: Scene, advance: Callable[[], None]) -> torch.Tensor:
        """The latent of a video, scaled."""

        def go_on() -> None:
            if self.stop.signal:
                raise Asked
            advance()

        runtime = self.runtime
        with runtime.accelerator.autocast():
            return denoise(
                transformer, self.objective, self.run.checkpoint, scene.conditions.to(runtime.device), scene.generator,
                runtime.dtype, each=go_on,
            )  # fmt: skip

    def _show_clip(self, decoder: AutoencoderKLCogVideoX, scene: Scene, name: str) -> None:
        """Write what the video is to be compared with."""
        assert scene.clip_BFCHW is not None
        scale, device = decoder.config.scaling_factor, self.runtime.device  # stored latents are unscaled
        clip_FHWC = decode_latents(decoder, scene.clip_BFCHW.to(device) * scale, scene.frames)
        folder = self.folder / CLIPS
        folder.mkdir(parents=True, exist_ok=True)
        write_mp4(folder / f"{name}.mp4", clip_FHWC, self.run.checkpoint.family.fps)
        for image_BFCHW in scene.conditions.named.values():
            image_FHWC = decode_latents(decoder, image_BFCHW.to(device) * scale, 1)
            Image.fromarray(image_FHWC[0]).save(folder / f"{name}.png")

    @contextmanager
    def _whole(self, live: Any, videos: int) -> Iterator[Any]:
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
        if group >= videos:  # nothing to draw here, but the others need this rank's parts
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
