"""What one forward pass takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogcommon.model.copies import CopyStream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. B samples of one bucket; latents unscaled, fp32.

    F is the latent frame count, F+ the count after padding for the temporal patch.
    """

    keys: tuple[str, ...]
    shards: tuple[str, ...]  # where each sample lies, for messages
    latent_BFCHW: torch.Tensor
    noise_BFCHW: torch.Tensor  # F+
    timestep_B: torch.Tensor  # int64
    text_BLD: torch.Tensor  # as stored
    conditions: Mapping[str, torch.Tensor]  # the family's, by name; I2V's image is (B, 1, C, h, w)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def upload(self, copies: CopyStream) -> Batch:
        """The batch on the device, copied beside what is computed there."""
        return self._each(copies.upload)

    def pin(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def blank(self) -> Batch:
        """The same shapes, all zeros."""
        import torch

        return self._each(torch.zeros_like)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            latent_BFCHW=change(self.latent_BFCHW),
            noise_BFCHW=change(self.noise_BFCHW),
            timestep_B=change(self.timestep_B),
            text_BLD=change(self.text_BLD),
            conditions={name: change(tensor) for name, tensor in self.conditions.items()},
        )
