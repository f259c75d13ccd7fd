"""Muon: an optimizer for few steps.

The VAE's L1 error after 300 steps of stills: 0.127 with it, 0.175 with AdamW.
torch's own takes matrices only, and most of the VAE is 3D kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Muon:
    """Momentum made orthogonal for matrices and kernels (Jordan et al. 2024), Adam for vectors.

    Every step of a matrix has the same size in all its directions, so that rare
    ones are learned too. ``rate`` is the root mean square of an element's step,
    and a tensor, so that a step captured as a CUDA graph reads its new values.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.0) -> None:
        """``decay``: of the matrices' elements, for each unit of ``rate``; without it they grow all through a run."""
        self.parameters, self.decay = list(parameters), decay
        device = self.parameters[0].device
        self.rate, self.count = torch.zeros((), device=device), torch.zeros((), device=device)
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) if p.ndim < 2 else torch.zeros((), device=device) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        moved = [index for index, p in enumerate(self.parameters) if p.grad is not None]
        self._turn([index for index in moved if self.parameters[index].ndim >= 2])
        self._adapt([index for index in moved if self.parameters[index].ndim < 2])

    def _turn(self, matrices: list[int]) -> None:
        """Orthogonal steps. Those of one size, or of one size lying down, are made together: 6 products, not 60."""
        if self.decay:
            torch._foreach_mul_([self.parameters[index] for index in matrices], 1 - self.decay * self.rate)
        gradients, first = self._of(matrices)
        torch._foreach_lerp_(first, gradients, 0.05)
        looks = torch._foreach_lerp(gradients, first, 0.95)
        alike: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
        for index, look in zip(matrices, looks, strict=True):
            lying = _lying(look.flatten(1))
            alike.setdefault(lying.shape, []).append((self.parameters[index], lying))
        for shape, some in alike.items():
            updates = self.rate * max(shape) ** 0.5 * orthogonal(torch.stack([look for _, look in some]))
            turned = [u if len(p) == u.shape[0] else u.mT for (p, _), u in zip(some, updates, strict=True)]
            torch._foreach_sub_(
                [p for p, _ in some], [u.reshape(p.shape) for (p, _), u in zip(some, turned, strict=True)]
            )

    def _adapt(self, vectors: list[int]) -> None:
        """Adam's steps, beta 0.9 and 0.99."""
        gradients, first = self._of(vectors)
        second = [self.second[index] for index in vectors]
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_mul_(second, 0.99)
        torch._foreach_addcmul_(second, gradients, gradients, 0.01)
        spreads = torch._foreach_sqrt(torch._foreach_mul(second, 1 / (1 - 0.99**self.count)))
        torch._foreach_add_(spreads, 1e-8)
        updates = torch._foreach_div(first, spreads)
        torch._foreach_mul_(updates, self.rate / (1 - 0.9**self.count))
        torch._foreach_sub_([self.parameters[index] for index in vectors], updates)

    def _of(self, indices: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gradients and their running means."""
        gradients = [g for index in indices if (g := self.parameters[index].grad) is not None]
        return gradients, [self.first[index] for index in indices]

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first, "second": self.second}

    def load(self, state: dict[str, Any]) -> None:
        self.count.copy_(state["count"])
        for mine, saved in zip(self.first + self.second, state["first"] + state["second"], strict=True):
            mine.copy_(saved)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of the SVD of a matrix, or of each in a stack, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(matrix.shape[-2:]))
    for _ in range(5):  # x = 3.4445 x + (-4.7750 s + 2.0315 s s) x, s = x x^T; three kernels each
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).reshape(matrix.shape)


def _lying(matrix: torch.Tensor) -> torch.Tensor:
    """Wider than high."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
