"""The data-parallel groups of a run: between whom the global batch is divided.

The processes of a group take the same samples with the same random draws. Today every process is a group of its own;
where several compute one sample together (sequence or tensor parallelism), `data_groups` says so, and nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DataGroups:
    """``world`` processes in ``count`` groups of equal size; ranks that follow each other are one group."""

    world: int
    count: int

    def __post_init__(self) -> None:
        assert self.count >= 1 and self.world % self.count == 0, self

    @property
    def size(self) -> int:
        """Processes of a group."""
        return self.world // self.count

    def of(self, rank: int) -> int:
        """The group of a rank, from 0."""
        return rank // self.size

    def leads(self, rank: int) -> bool:
        """Whether a rank is the first of its group."""
        return rank % self.size == 0

    def once(self, gathered: torch.Tensor) -> torch.Tensor:
        """Of what all ranks have, one after the other in the first dimension, each group's once."""
        parts = gathered.unflatten(0, (self.world, -1))
        return parts[:: self.size].flatten(0, 1)


def data_groups(world: int) -> DataGroups:
    """The groups of a run of so many processes."""
    return DataGroups(world, count=world)
