"""Whether weights are finite: looked at before each checkpoint and each export, so that none that is not is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cogcommon.errors import RunError

if TYPE_CHECKING:
    import torch


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers are finite. Takes no memory beside theirs."""
    import torch

    for tensor in tensors:
        # An 8-bit optimizer's states are of a type of their own.
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if plain and tensor.is_floating_point() and tensor.numel():
            least, most = tensor.detach().aminmax()
            if not (math.isfinite(least) and math.isfinite(most)):
                return False
    return True


def refuse_to_write(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Let no weights into a file that are not finite.

    Raises:
        RunError: they are not.
    """
    if not all_finite(tensors):
        raise RunError(
            f"{what} not finite: nothing was written",
            fix="resume a checkpoint with a lower --lr, or export it: `cogtrain export --run RUN/checkpoint-N`",
        )
