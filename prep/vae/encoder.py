"""Frames to latents: the VAE, with tiles only when memory asks for them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError
from cogcommon.files.memory import free_gpu_memory
from cogcommon.model.copies import CopyStream, download
from cogcommon.model.families import Resolution
from cogcommon.shards.records import (
    IMAGE_CLEAN_MEAN,
    IMAGE_CLEAN_STD,
    IMAGE_MEAN,
    IMAGE_STD,
    LATENT_MEAN,
    LATENT_STD,
)

from ..settings.encode import Posterior, Tiling
from .choice import Choice, use_fused_encoder
from .chunks import Together, bytes_together, chunks_of, together
from .gpu_time import Span, record

if TYPE_CHECKING:
    import numpy as np
    import torch

_ROOM = 0.7  # of the memory that is free for the tensors of a layer; the rest is for cuDNN and the next clip's pixels


@dataclass(frozen=True)
class Latents:
    """The tensors of a sample, on the CPU, under the names that records.py gives them."""

    tensors: dict[str, torch.Tensor]
    tiled: bool


@dataclass(frozen=True)
class Moments:
    """Mean and std of a posterior, on their way to the host."""

    mean: torch.Tensor
    std: torch.Tensor
    tiled: bool


@dataclass(frozen=True)
class Pending:
    """A clip whose encode has been queued on the device."""

    span: Span | None
    tiled: bool
    warm_up_s: float  # of the clip's size, when it is the first
    _finish: Callable[[], Latents]

    @property
    def done(self) -> bool:
        return self.span is None or self.span.end.query()

    def wait(self) -> None:
        """Return when the device is done with the clip."""
        if self.span is not None:
            self.span.end.synchronize()

    def latents(self) -> Latents:
        """The latents, when they are there."""
        self.wait()
        return self._finish()


def free_wanted(size: Resolution, channels: int, item: int) -> float:
    """Free bytes of a GPU with which clips of a size are encoded as they would be with any more.

    Args:
        channels: of the VAE's first layer.
        item: bytes of a number.
    """
    return bytes_together(size.frames, size.height, size.width, channels, item) / _ROOM


def generator_of(seed: int, key: str, purpose: str) -> torch.Generator:
    """A CPU generator for one draw of one sample, independent of order, worker and device."""
    import torch

    digest = hashlib.sha256(f"{seed} {key} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class LatentEncoder:
    """A VAE on a device.

    On a GPU clips overlap: `start` returns while the device works. There the first clip
    of a size is encoded twice: the first time picks convolution kernels.

    Args:
        vae: an AutoencoderKLCogVideoX, on ``device``.
        posterior: store mean and std, or one sample.
        tiling: "auto" runs whole frames until memory is short, then tiles for that size.
        image_variants: pre-noised first frames a sample, for I2V.
        seed: of the noise.
        fused: on a GPU, use the fused encoder if it proves right there (`encoder_choice`).
    """

    def __init__(
        self,
        vae: Any,
        device: torch.device,
        *,
        posterior: Posterior,
        tiling: Tiling,
        image_variants: int,
        seed: int,
        fused: bool = True,
    ) -> None:
        import torch

        self._vae = vae
        self._device = device
        self._posterior = posterior
        self._tiling = tiling
        self._variants = image_variants
        self._seed = seed
        self._too_large: set[tuple[int, ...]] = set()
        self._warm: set[tuple[int, ...]] = set()
        self._together: dict[tuple[int, ...], Together] = {}  # chunks of a size that the encoder takes at once
        self.choice = Choice("diffusers")
        with self._on_device():
            self._copies = CopyStream(device)
            if device.type == "cuda":
                if fused:
                    with torch.inference_mode():
                        self.choice = use_fused_encoder(vae, device)
                # By its heuristic cuDNN takes a kernel for the 42 widest convolutions that loses 0.07 s a clip (H200).
                # Only now: two encoders' convolutions at the trial's sizes would be tried in all ways for one clip.
                torch.backends.cudnn.benchmark = True

    def encode(self, key: str, frames_FHWC: np.ndarray[Any, Any], image_HWC: np.ndarray[Any, Any] | None) -> Latents:
        """Encode a clip, and wait for it. See `start`."""
        return self.start(key, frames_FHWC, image_HWC).latents()

    def start(self, key: str, frames_FHWC: np.ndarray[Any, Any], image_HWC: np.ndarray[Any, Any] | None) -> Pending:
        """Begin to encode a clip, and its first frame for I2V.

        Args:
            key: of the sample; seeds whatever is drawn.
            frames_FHWC: uint8 RGB, as many frames as the family takes.
            image_HWC: uint8 RGB of the same size, or None for T2V.

        Returns:
            Unscaled latents (C, F', H/8, W/8); image latents (K, C, 1, H/8, W/8) and clean (C, 1, H/8, W/8).

        Raises:
            SettingError: the memory does not suffice, not even in tiles.
        """
        with self._on_device():
            warm_up_s = self._warm_up(frames_FHWC, image_HWC)
            frames_1CFHW = self._pixels(frames_FHWC)
            image_1CFHW = None if image_HWC is None else self._pixels(image_HWC[None])
            begin = record(self._device)
            clip = self._moments(frames_1CFHW)
            images = [] if image_1CFHW is None else list(self._image_moments(key, image_1CFHW))
            end = record(self._device)
        span = Span(begin, end, follows=not warm_up_s) if begin and end else None
        return Pending(span, clip.tiled, warm_up_s, lambda: self._finish(key, clip, images))

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels of ours go to the current GPU, wherever their tensors are."""
        import torch

        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _warm_up(self, frames_FHWC: np.ndarray[Any, Any], image_HWC: np.ndarray[Any, Any] | None) -> float:
        """On a GPU, encode the first clip of a size once and drop the result; returns the seconds it took."""
        import torch

        if self._device.type != "cuda" or frames_FHWC.shape in self._warm:
            return 0.0
        self._warm.add(frames_FHWC.shape)
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        self._moments(self._pixels(frames_FHWC))
        if image_HWC is not None:
            self._moments(self._pixels(image_HWC[None]))
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def _image_moments(self, key: str, pixels_1CFHW: torch.Tensor) -> Iterator[Moments]:
        """The first frame as it is, then with noise on its *pixels*, sigma = exp(N(-3, 0.5)) a draw.

        CogVideoX-I2V trains on an image noised anew in every step (SVD's augmentation); K draws stored
        once keep that without a VAE in the training loop.
        """
        import torch

        yield self._moments(pixels_1CFHW)
        generator = generator_of(self._seed, key, "image noise")
        for _ in range(self._variants):
            sigma = torch.exp(torch.randn((), generator=generator) * 0.5 - 3.0).item()
            noise = torch.randn(pixels_1CFHW.shape, generator=generator)
            yield self._moments(pixels_1CFHW + sigma * self._copies.upload(noise))

    def _finish(self, key: str, clip: Moments, images: Sequence[Moments]) -> Latents:
        import torch

        tensors = self._named(LATENT_MEAN, LATENT_STD, clip, key)
        if images:
            clean, *noisy = images
            tensors |= self._named(IMAGE_CLEAN_MEAN, IMAGE_CLEAN_STD, clean, f"{key} clean")
            drawn = [
                self._named(IMAGE_MEAN, IMAGE_STD, variant, f"{key} {index}") for index, variant in enumerate(noisy)
            ]
            tensors |= {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        return Latents(tensors, clip.tiled)

    def _pixels(self, frames_FHWC: np.ndarray[Any, Any]) -> torch.Tensor:
        """[-1, 1] in fp32, (1, C, F, H, W), on the device: the arithmetic of diffusers' VideoProcessor."""
        import torch

        frames = self._copies.upload(torch.from_numpy(frames_FHWC))
        return (frames.permute(3, 0, 1, 2)[None].float() / 255.0) * 2.0 - 1.0

    def _moments(self, pixels_1CFHW: torch.Tensor) -> Moments:
        import torch

        shape = tuple(pixels_1CFHW.shape)
        pixels = pixels_1CFHW.to(self._vae.dtype)
        with torch.inference_mode():
            if self._tiling != "on" and shape not in self._too_large:
                try:
                    return self._run(pixels, tiles=False)
                except RuntimeError as error:
                    if not _is_out_of_memory(error):
                        raise
                    fewer = self._together.get(shape, Together()) != Together()
                    if self._tiling == "off" and not fewer:
                        raise self._no_memory(shape, "--tiling auto, or --precision bf16") from error
                # Outside the handler: there the traceback still holds the tensors of the failed try.
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                if fewer:
                    self._together[shape] = Together()
                    return self._moments(pixels_1CFHW)
                self._too_large.add(shape)
            try:
                return self._run(pixels, tiles=True)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise self._no_memory(shape, "--precision bf16, or a smaller --resolution") from error

    def _no_memory(self, shape: tuple[int, ...], fix: str) -> SettingError:
        _, _, frames, height, width = shape
        return SettingError(
            f"the VAE has too little memory for {frames}x{height}x{width}", where=str(self._device), fix=fix
        )

    def _run(self, pixels: torch.Tensor, *, tiles: bool) -> Moments:
        vae = self._vae
        vae.enable_tiling() if tiles else vae.disable_tiling()
        posterior = vae.encode(pixels).latent_dist if tiles else self._whole(pixels)
        height, width = pixels.shape[-2:]
        tiled = tiles and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width)
        return Moments(download(posterior.mean[0]), download(posterior.std[0]), tiled)

    def _whole(self, pixels: torch.Tensor) -> Any:
        """The posterior of whole frames, as many chunks of them together as memory has room for."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        vae, shape = self._vae, tuple(pixels.shape)
        if self.choice.encoder != "fused" or not vae.encoder.ways.together:
            return vae.encode(pixels).latent_dist
        frames = vae.num_sample_frames_batch_size
        if shape not in self._together:
            channels = vae.config.block_out_channels[0]
            room = _ROOM * free_gpu_memory(self._device)
            self._together[shape] = together(
                chunks_of(shape[2], frames), shape[3], shape[4], channels, pixels.itemsize, room
            )
        return DiagonalGaussianDistribution(vae.encoder.clip(pixels, frames, self._together[shape]))

    def _named(self, mean_name: str, std_name: str, moments: Moments, purpose: str) -> dict[str, torch.Tensor]:
        import torch

        if self._posterior == "moments":
            return {mean_name: moments.mean, std_name: moments.std}
        eps = torch.randn(moments.mean.shape, generator=generator_of(self._seed, purpose, "posterior"))
        return {mean_name: (moments.mean.float() + moments.std.float() * eps).to(moments.mean.dtype)}


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # On a CPU torch raises a plain RuntimeError; OutOfMemoryError is one, too.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
