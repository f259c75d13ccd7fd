"""What became of shards that were encoded: counts, times, and whom the work waited for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..plan.folder import Split
from ..plan.plan import Rejected
from ..vae.choice import Choice
from ..vae.gpu_time import GpuTime


@dataclass(frozen=True)
class NodeWork:
    """What a node of a cluster did."""

    name: str
    clips: int
    clips_per_minute: float
    waits_for: str  # as `Outcome.waits_for`


@dataclass
class Outcome:
    """What became of the shards; counts are samples, times are seconds."""

    encoded: int = 0
    recovered: int = 0  # taken over from what a killed run had written
    elsewhere: int = 0  # committed by another process after the plan was made
    rejected: list[Rejected] = field(default_factory=list)
    postponed: list[Rejected] = field(default_factory=list)  # left out of the records; the next run tries again
    busy: list[tuple[Split, int]] = field(default_factory=list)  # shards that another process writes
    tiled: int = 0
    tone_mapped: int = 0
    truncated: int = 0  # captions longer than the model's text
    pictures: int = 0  # of those encoded, clips of one frame
    profiles_unused: int = 0  # pictures and first frames whose colour profile cannot be applied
    decode_wait_s: float = 0.0  # the VAE waited for clips
    vae_s: float = 0.0
    write_wait_s: float = 0.0  # the VAE waited for the disk
    warm_up_s: float = 0.0  # the VAE chose its kernels, once a size; counted nowhere else
    gpu: GpuTime = field(default_factory=GpuTime)
    encoder: Choice = field(default_factory=lambda: Choice("diffusers"))
    nodes: list[NodeWork] = field(default_factory=list)  # of a cluster

    @property
    def samples(self) -> int:
        """Samples that are settled, one way or another, or on the GPU."""
        settled = self.encoded + self.recovered + self.elsewhere
        return settled + len(self.rejected) + len(self.postponed)

    def add(self, other: Outcome) -> None:
        """Add what became of other shards, which another process encoded at the same time."""
        warm_up_s = max(self.warm_up_s, other.warm_up_s)  # side by side
        for name in (one.name for one in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, int | float | list):
                mine += theirs
                setattr(self, name, mine)
        self.warm_up_s = warm_up_s
        self.gpu.busy_s += other.gpu.busy_s
        self.gpu.idle_s += other.gpu.idle_s
        if other.encoder.why or not self.encoder.why:  # one that had to fall back is what must be said
            self.encoder = other.encoder

    @property
    def waits_for(self) -> str:
        """Which side the work waits for most, in words."""
        sides = {"decoding": self.decode_wait_s, "the VAE": self.vae_s, "the disk": self.write_wait_s}
        return f"waiting for {max(sides, key=lambda side: sides[side])}"
