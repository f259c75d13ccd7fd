"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class EMA:
    """``shadow`` follows the weights: ``shadow = decay shadow + (1 - decay) weight`` after every step.

    Early on the decay is (1+n)/(10+n) where that is less, so that the initial weights lose their influence.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.shadow = [weight.detach().clone() for weight in weights]

    def begin(self) -> None:
        """Begin anew, with the weights as they are."""
        import torch

        with torch.no_grad():
            for shadow, weight in zip(self.shadow, self.weights, strict=True):
                shadow.copy_(weight)

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (from 1)."""
        import torch

        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for shadow, weight in zip(self.shadow, self.weights, strict=True):
                shadow.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the average into the weights inside the ``with``, and back after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        import torch

        with torch.no_grad():
            for shadow, weight in zip(self.shadow, self.weights, strict=True):
                kept = weight.clone()
                weight.copy_(shadow)
                shadow.copy_(kept)
