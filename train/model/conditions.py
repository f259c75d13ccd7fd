"""The conditions of a sample: what a model is told beside the caption. One row each, by name.

A family's row names its conditions (`Family.conditions`); a shard holds each as tensors whose names begin with its
name, a batch as one tensor under its name. A row here says how that tensor enters the transformer: as channels beside
the noised latents, of the same frames and size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cogcommon.shards.records import IMAGE

if TYPE_CHECKING:
    import torch

    from .objective import Objective

Enter = Callable[["Objective", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def first_frame(objective: Objective, noisy_BFCHW: torch.Tensor, image_BFCHW: torch.Tensor) -> torch.Tensor:
    """I2V: the image's latent in frame 0, after the padding; zeros elsewhere.

    Args:
        image_BFCHW: unscaled, one frame.
    """
    import torch

    channels_BFCHW = torch.zeros_like(noisy_BFCHW)
    channels_BFCHW[:, :1] = image_BFCHW * objective.image_scale
    return channels_BFCHW


CONDITIONS: dict[str, Enter] = {IMAGE: first_frame}
