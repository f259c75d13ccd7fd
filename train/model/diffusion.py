"""The diffusion that CogVideoX was trained with: schedule, noising, velocity, loss.

Coefficients are fp64 and are rounded once, into the type of what they multiply
(fp32 in training). In bf16 the first timesteps would add no noise at all:
sqrt(abar_0) rounds to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cogcommon.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Schedule:
    """``abar_T``: share of the signal's variance left at each timestep, fp64, on the CPU."""

    abar_T: torch.Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of a checkpoint's ``scheduler_config.json``.

        In diffusers' order: cumulative product, SNR shift, then the rescale to
        zero terminal SNR (Lin et al. 2023, arXiv:2305.08891, algorithm 1). The
        other order is off by 5% at t=990 for 2B.

        Raises:
            ModelError: a scheduler of another kind.
        """
        import torch

        if (config.get("beta_schedule"), config.get("prediction_type")) != ("scaled_linear", "v_prediction"):
            raise ModelError(
                f"a scheduler with {config.get('beta_schedule')} betas that predicts {config.get('prediction_type')}",
                where="scheduler/scheduler_config.json",
                fix="CogVideoX has scaled_linear betas and predicts v; take the scheduler of the published checkpoint",
            )
        steps = config["num_train_timesteps"]
        betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, steps, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        shift = config["snr_shift_scale"]
        abar = abar / (shift + (1 - shift) * abar)
        if config.get("rescale_betas_zero_snr", False):  # as diffusers has it
            root = abar.sqrt()
            abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return cls(abar)

    def __len__(self) -> int:
        return len(self.abar_T)

    def add_noise(self, x0_BFCHW: torch.Tensor, noise_BFCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        """``sqrt(abar) x0 + sqrt(1-abar) noise``, in x0's type."""
        signal, noise = self._coefficients(timestep_B, x0_BFCHW)
        return signal * x0_BFCHW + noise * noise_BFCHW

    def velocity(self, x0_BFCHW: torch.Tensor, noise_BFCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        """What the model predicts: ``sqrt(abar) noise - sqrt(1-abar) x0`` (Salimans & Ho 2022, arXiv:2202.00512)."""
        signal, noise = self._coefficients(timestep_B, x0_BFCHW)
        return signal * noise_BFCHW - noise * x0_BFCHW

    def min_snr_weight(self, timestep_B: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(SNR, gamma) / (SNR + 1), fp64 (Hang et al. 2023, arXiv:2303.09556, for v-prediction)."""
        import torch

        abar_B = _on(self, timestep_B.device)[timestep_B]
        # SNR = abar/(1-abar), so 1/(SNR+1) = 1-abar, and both stay finite at abar = 0.
        return torch.minimum(abar_B, gamma * (1 - abar_B))

    def _coefficients(self, timestep_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = _on(self, like.device)[timestep_B.to(like.device)].view(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


@lru_cache(maxsize=16)
def _on(schedule: Schedule, device: torch.device) -> torch.Tensor:
    """The schedule on a device: fetching timesteps from a GPU would make the host wait for it."""
    return schedule.abar_T.to(device)


def squared_error(predicted_BFCHW: torch.Tensor, target_BFCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample (B), in the target's type."""
    return (predicted_BFCHW.to(target_BFCHW.dtype) - target_BFCHW).square().flatten(1).mean(1)
