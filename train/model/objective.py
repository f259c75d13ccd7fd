"""The transformer's inputs and the loss: the one place that asks 1.0 or 1.5.

The inputs are exactly those that diffusers' pipelines pass at inference; a model
trained on anything else learns to undo the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Family

from .conditions import CONDITIONS
from .diffusion import Schedule, squared_error

if TYPE_CHECKING:
    import torch

    from .batch import Batch


@dataclass(frozen=True)
class Objective:
    """From a batch to the loss of each sample.

    Args:
        family: of the checkpoint.
        schedule: of the checkpoint.
        config: the transformer's ``config.json``.
        scaling_factor: multiplies an unscaled video latent.
        image_scale: multiplies an unscaled image latent. 1.5-I2V divides by the
            scaling factor (``invert_scale_latents``), and only the image latent.
        min_snr_gamma: weight the loss by min(SNR, gamma)/(SNR+1); None leaves it.
    """

    family: Family
    schedule: Schedule
    config: Mapping[str, Any]
    scaling_factor: float
    image_scale: float
    min_snr_gamma: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, min_snr_gamma: float | None = None) -> Objective:
        factor = checkpoint.vae_config["scaling_factor"]
        return cls(
            family=checkpoint.family,
            schedule=Schedule.from_config(checkpoint.scheduler_config),
            config=checkpoint.transformer_config,
            scaling_factor=factor,
            image_scale=1 / factor if checkpoint.vae_config.get("invert_scale_latents") else factor,
            min_snr_gamma=min_snr_gamma,
        )

    def losses(self, transformer: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Velocity loss of each sample (B), fp32.

        Noising and the loss are computed in the type of ``batch.latent_BFCHW``;
        only what enters the transformer is cast.

        Args:
            dtype: the type the transformer computes in.
        """
        x0 = self.clean(batch.latent_BFCHW)
        assert batch.noise_BFCHW.shape == x0.shape, (batch.noise_BFCHW.shape, x0.shape)
        noisy = self.schedule.add_noise(x0, batch.noise_BFCHW, batch.timestep_B)
        target = self.schedule.velocity(x0, batch.noise_BFCHW, batch.timestep_B)
        inputs = self.model_inputs(noisy, batch.conditions, batch.text_BLD, batch.timestep_B, dtype)
        losses_B = squared_error(transformer(**inputs, return_dict=False)[0], target)
        if self.min_snr_gamma is not None:
            losses_B = losses_B * self.schedule.min_snr_weight(batch.timestep_B, self.min_snr_gamma).to(losses_B.dtype)
        return losses_B

    def clean(self, latent_BFCHW: torch.Tensor) -> torch.Tensor:
        """Scaled latents, padded at the front: 1.5's pipeline drops the front frame after sampling."""
        import torch

        scaled = latent_BFCHW * self.scaling_factor
        missing = self.family.padded_frames(scaled.shape[1]) - scaled.shape[1]
        return torch.cat([scaled[:, :1]] * missing + [scaled], dim=1) if missing else scaled

    def model_inputs(
        self,
        noisy_BFCHW: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        text_BLD: torch.Tensor,
        timestep_B: torch.Tensor,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Keyword arguments of ``CogVideoXTransformer3DModel``.

        Args:
            noisy_BFCHW: scaled, padded, noised latents.
            conditions: the family's, by name, unscaled; each adds its channels (`conditions.CONDITIONS`).
        """
        import torch

        added = [CONDITIONS[name](self, noisy_BFCHW, conditions[name]) for name in self.family.conditions]
        hidden = torch.cat([noisy_BFCHW, *added], dim=2) if added else noisy_BFCHW
        ofs = None
        if self.family.ofs is not None:
            ofs = torch.full((1,), self.family.ofs, device=hidden.device, dtype=dtype)
        return {
            "hidden_states": hidden.to(dtype),
            "encoder_hidden_states": text_BLD.to(dtype),
            "timestep": timestep_B,
            "ofs": ofs,
            "image_rotary_emb": self.rope(*hidden.shape[1:2], *hidden.shape[3:], device=hidden.device),
        }

    def rope(
        self, frames: int, height: int, width: int, *, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rotary tables (tokens, head dim) of a padded latent's size; None for 2B.

        1.0 stretches the grid over the base one, 1.5 cuts it from its table.
        The reference cuts for both, which is wrong by up to 2.0 for 1.0 at other
        sizes than 480x720.
        """
        if not self.config["use_rotary_positional_embeddings"]:
            return None
        config, patch = self.config, self.family.patch
        return _rope(
            config["attention_head_dim"],
            self.family.token_frames(frames),
            (height // patch, width // patch),
            (config["sample_height"] // patch, config["sample_width"] // patch),
            self.family.patch_t is not None,
            device,
        )


@lru_cache(maxsize=32)  # one entry a bucket
def _rope(
    head_dim: int, frames: int, grid: tuple[int, int], base: tuple[int, int], sliced: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if sliced:
        return get_3d_rotary_pos_embed(
            head_dim, None, grid_size=grid, temporal_size=frames, grid_type="slice", max_size=base, device=device
        )
    return get_3d_rotary_pos_embed(
        head_dim, region_within(grid, base), grid_size=grid, temporal_size=frames, device=device
    )  # fmt: skip


def region_within(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top left and bottom right of the largest region of a grid's shape in the middle of the base grid.

    It is diffusers' ``get_resize_crop_region_for_grid``, whose module imports pipelines and with them all of T5.

    Args:
        grid: height and width, as ``base``.
    """
    (height, width), (most_high, most_wide) = grid, base
    if height / width > most_high / most_wide:
        high, wide = most_high, round(most_high / height * width)
    else:
        high, wide = round(most_wide / width * height), most_wide
    top, left = round((most_high - high) / 2), round((most_wide - wide) / 2)
    return (top, left), (top + high, left + wide)
