"""Everything random about a training sample, as a function of (seed, epoch, sample key).

Each draw has its own generator, so leaving one out (no caption dropout, no image)
never shifts another, and neither rank, restart nor prefetch order changes what a
sample gets. All draws are made on the CPU: the same numbers on every device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Purpose = str  # "posterior", "noise", "timestep", "caption", "order", "dropout"; of a condition "image variant", ...


def seed_of(seed: int, epoch: int, key: str, purpose: Purpose) -> int:
    """63 bits that depend on all four."""
    digest = hashlib.sha256(f"{seed} {epoch} {key} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class SampleRNG:
    """The random choices for one sample in one epoch."""

    seed: int
    epoch: int
    key: str

    def normal(self, shape: tuple[int, ...], purpose: Purpose) -> torch.Tensor:
        """Standard normal, fp32, on the CPU."""
        import torch

        return torch.randn(shape, generator=self._generator(purpose))

    def uniform(self, purpose: Purpose) -> float:
        """In [0, 1), with 53 bits."""
        import torch

        return float(torch.rand((), generator=self._generator(purpose), dtype=torch.float64))

    def timestep(self, steps: int, slot: int | None = None, slots: int = 1) -> int:
        """A timestep in 0..steps-1.

        Args:
            slot: place in the global batch, of ``slots``, for a stratified draw:
                every batch then covers the whole range (the CogVideoX paper's
                explicit uniform sampling); None draws uniformly.
        """
        u = self.uniform("timestep")
        position = u if slot is None else (slot + u) / slots
        return min(int(position * steps), steps - 1)

    def choice(self, count: int, purpose: Purpose) -> int:
        return min(int(self.uniform(purpose) * count), count - 1)

    def _generator(self, purpose: Purpose) -> torch.Generator:
        import torch

        return torch.Generator().manual_seed(seed_of(self.seed, self.epoch, self.key, purpose))
