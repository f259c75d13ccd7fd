"""What is measured: true shapes with random weights, since time and memory do not depend on the weights' values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["true", "tiny"]


@dataclass(frozen=True)
class Shape:
    """One size of the benchmark. Clips last as long as ``frames`` at the family's 8 fps."""

    frames: int
    height: int
    width: int
    source: tuple[int, int]  # height and width of the clips
    source_fps: int
    vae: dict[str, Any]
    t5: dict[str, Any]

    @property
    def resolution(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def source_frames(self) -> int:
        return -(-self.frames * self.source_fps // 8) + 1


SHAPES: dict[Size, Shape] = {
    "true": Shape(
        frames=49,
        height=480,
        width=720,
        source=(1080, 1920),
        source_fps=24,
        vae={"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "norm_num_groups": 32},
        t5={"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128},
    ),
    # To try the benchmark itself on a CPU.
    "tiny": Shape(
        frames=9,
        height=64,
        width=96,
        source=(128, 192),
        source_fps=16,
        vae={"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
        t5={"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 2048},
    ),
}


@dataclass(frozen=True)
class Folder:
    """Where a benchmark keeps its things."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def clips(self) -> Path:
        return self.root / "clips"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def exact(self) -> Path:
        """The VAE's mean in fp32, whole frames: what the others are compared with."""
        return self.root / "exact.pt"

    @property
    def turn(self) -> Path:
        """Locked by the process that measures: only one does, while others load."""
        return self.root / "turn.lock"
