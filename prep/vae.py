"""Frames to latents: the VAE, with tiles only when memory asks for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError
from cogcommon.records import (
    IMAGE_CLEAN_MEAN,
    IMAGE_CLEAN_STD,
    IMAGE_MEAN,
    IMAGE_STD,
    LATENT_MEAN,
    LATENT_STD,
)

from .settings import Posterior, Tiling

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Latents:
    """The tensors of a sample, on the CPU, under the names that records.py gives them."""

    tensors: dict[str, torch.Tensor]
    tiled: bool


def generator_of(seed: int, key: str, purpose: str) -> torch.Generator:
    """A CPU generator of a sample's own: nothing drawn depends on order, worker or device."""
    import torch

    digest = hashlib.sha256(f"{seed} {key} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class LatentEncoder:
    """A VAE on a device.

    Args:
        vae: an AutoencoderKLCogVideoX, on ``device``.
        posterior: store mean and std, or one sample.
        tiling: "auto" runs whole frames until memory is short, then tiles for that size.
        image_variants: pre-noised first frames a sample, for I2V.
        seed: of the noise.
    """

    def __init__(
        self, vae: Any, device: torch.device, *, posterior: Posterior, tiling: Tiling, image_variants: int, seed: int
    ) -> None:
        self._vae = vae
        self._device = device
        self._posterior = posterior
        self._tiling = tiling
        self._variants = image_variants
        self._seed = seed
        self._too_large: set[tuple[int, ...]] = set()

    def encode(self, key: str, frames_FHWC: np.ndarray[Any, Any], image_HWC: np.ndarray[Any, Any] | None) -> Latents:
        """Encode a clip, and its first frame for I2V.

        Args:
            key: of the sample; seeds whatever is drawn.
            frames_FHWC: uint8 RGB, F = 8N+1.
            image_HWC: uint8 RGB of the same size, or None for T2V.

        Returns:
            Unscaled latents (C, F', H/8, W/8); image latents (K, C, 1, H/8, W/8) and clean (C, 1, H/8, W/8).

        Raises:
            SettingError: the memory does not suffice, not even in tiles.
        """
        tensors: dict[str, torch.Tensor] = {}
        mean, std, tiled = self._moments(self._pixels(frames_FHWC))
        self._store(tensors, LATENT_MEAN, LATENT_STD, mean, std, key)
        if image_HWC is not None:
            self._encode_image(tensors, key, self._pixels(image_HWC[None]))
        return Latents(tensors, tiled)

    def _encode_image(self, tensors: dict[str, torch.Tensor], key: str, pixels_1CFHW: torch.Tensor) -> None:
        """The first frame as it is, and with noise on its *pixels*, sigma = exp(N(-3, 0.5)) a draw.

        CogVideoX-I2V trains on an image noised anew in every step (SVD's augmentation); K draws stored
        once keep that without a VAE in the training loop.
        """
        import torch

        mean, std, _ = self._moments(pixels_1CFHW)
        self._store(tensors, IMAGE_CLEAN_MEAN, IMAGE_CLEAN_STD, mean, std, f"{key} clean")
        draws: dict[str, list[torch.Tensor]] = {}
        generator = generator_of(self._seed, key, "image noise")
        for variant in range(self._variants):
            sigma = torch.exp(torch.randn((), generator=generator) * 0.5 - 3.0).item()
            noise = torch.randn(pixels_1CFHW.shape, generator=generator)
            mean, std, _ = self._moments(pixels_1CFHW + sigma * noise.to(self._device))
            one: dict[str, torch.Tensor] = {}
            self._store(one, IMAGE_MEAN, IMAGE_STD, mean, std, f"{key} {variant}")
            for name, tensor in one.items():
                draws.setdefault(name, []).append(tensor)
        tensors |= {name: torch.stack(variants) for name, variants in draws.items()}

    def _pixels(self, frames_FHWC: np.ndarray[Any, Any]) -> torch.Tensor:
        """[-1, 1] in fp32, (1, C, F, H, W), on the device: the arithmetic of diffusers' VideoProcessor."""
        import torch

        frames = torch.from_numpy(frames_FHWC).to(self._device)
        return (frames.permute(3, 0, 1, 2)[None].float() / 255.0) * 2.0 - 1.0

    def _moments(self, pixels_1CFHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
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
                    if self._tiling == "off":
                        raise self._no_memory(shape, "--tiling auto, or --precision bf16") from error
                # Outside the handler: there the traceback still holds the tensors of the failed try.
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
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

    def _run(self, pixels: torch.Tensor, *, tiles: bool) -> tuple[torch.Tensor, torch.Tensor, bool]:
        vae = self._vae
        vae.enable_tiling() if tiles else vae.disable_tiling()
        posterior = vae.encode(pixels).latent_dist
        height, width = pixels.shape[-2:]
        tiled = tiles and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width)
        return posterior.mean[0].cpu(), posterior.std[0].cpu(), tiled

    def _store(
        self,
        tensors: dict[str, torch.Tensor],
        mean_name: str,
        std_name: str,
        mean: torch.Tensor,
        std: torch.Tensor,
        purpose: str,
    ) -> None:
        import torch

        if self._posterior == "moments":
            tensors[mean_name], tensors[std_name] = mean, std
        else:
            eps = torch.randn(mean.shape, generator=generator_of(self._seed, purpose, "posterior"))
            tensors[mean_name] = (mean.float() + std.float() * eps).to(mean.dtype)


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # On a CPU torch raises a plain RuntimeError; OutOfMemoryError is one, too.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
