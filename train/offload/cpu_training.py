"""Full fine-tuning of blocks that are on the GPU only while they compute; all of a transformer's, or its last ones.

A weight that is trained costs 16 bytes: an fp32 master, two fp32 moments and a gradient. For 5B that is 83 GiB,
and the GPU needs most of it only once a step. So masters and moments live in host memory, where `CpuAdamW` updates
them; a copy of the weights in the type of the computation lies in page-locked memory and is fetched one block ahead,
as LoRA's frozen base is (`BlockSwap`); and a block's gradients are copied to page-locked memory while the backward
pass of the next block runs. On the GPU there are two blocks' weights and two blocks' gradients: 1 GiB for 5B in bf16.

The transformer's own parameters *are* the masters. So checkpoints, their resumption and the export know nothing of
this, and a run can be resumed under another ``--memory``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import CopyStream

from .block_swap import BlockSwap
from .pinned import page_locked

if TYPE_CHECKING:
    import torch


@dataclass
class CpuWeight:
    """One weight of a block, in host memory."""

    master: torch.nn.Parameter  # fp32
    copy: torch.Tensor  # what the GPU computes with
    landing: torch.Tensor  # the last gradient that left the GPU, in the computed type
    landed: Any = None  # event of its copy
    full: bool = False  # the landing holds a gradient of this step
    total: torch.Tensor | None = None  # fp32; of the accumulation steps whose gradients have been added up
    added: bool = False  # the total holds gradients of this step


class CpuTraining:
    """The weights of blocks, all or the last ones, with their gradients, in host memory.

    Args:
        blocks: the parameters of each block, all of them fp32 and trained; they stay where they are.
        device: to compute on.
        dtype: to compute in, of the copies and the gradients.
    """

    def __init__(
        self, blocks: Sequence[Sequence[torch.nn.Parameter]], device: torch.device, dtype: torch.dtype
    ) -> None:
        import torch

        self._copies = CopyStream(device)
        # One block at a time, so that no more than one is copied twice.
        self.block_swap = BlockSwap(
            ([torch.nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in block] for block in blocks), device
        )
        self._blocks = [
            [
                CpuWeight(master, copy, landing)
                for master, copy, landing in zip(
                    block, self.block_swap.on_host(index), _landings(block, device, dtype), strict=True
                )
            ]
            for index, block in enumerate(blocks)
        ]
        self._updates: dict[int, Sequence[Future[None]]] = {}
        self._norms: list[torch.Tensor] = []
        self._leaving: dict[int, list[torch.Tensor]] = {}
        self._left: Any = None

    def __iter__(self) -> Iterator[CpuWeight]:
        return (weight for block in self._blocks for weight in block)

    @property
    def blocks(self) -> Sequence[Sequence[CpuWeight]]:
        return self._blocks

    def take(self, block: int, then: int, *, training: bool) -> list[torch.Tensor]:
        """A block's weights, for the computation that is queued next; ``then`` is the block after that.

        Args:
            training: their gradients are collected in the backward pass.
        """
        self.settle(block)
        self.settle(then)
        views = self.block_swap.take(block, then)
        if not training:
            return views
        leaves = [view.detach().requires_grad_() for view in views]
        for leaf, weight in zip(leaves, self._blocks[block], strict=True):
            leaf.register_post_accumulate_grad_hook(partial(self._collect, block, weight))
        return leaves

    def _collect(self, block: int, weight: CpuWeight, leaf: torch.Tensor) -> None:
        """Start copying a gradient to the host as soon as the backward pass has accumulated it."""
        import torch

        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        for other in [index for index in self._leaving if index != block]:
            # They left while this block went backward. Once the computation waits for that, their memory can be used.
            self._copies.compute_after(self._left)
            del self._leaving[other]
        self._add_up(weight)  # of the accumulation step before; its copy ended long ago
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        weight.landed = self._left = self._copies.copy(weight.landing, gradient)
        weight.full = True
        self._leaving.setdefault(block, []).append(gradient)

    def _add_up(self, weight: CpuWeight) -> None:
        """Empty a landing into the total. Sums are fp32: bf16 would lose what is 256 times smaller."""
        import torch

        if not weight.full:
            return
        self._copies.wait(weight.landed)
        if weight.total is None:
            weight.total = torch.empty_like(weight.master.data)
        if weight.added:
            weight.total.add_(weight.landing)
        else:
            weight.total.copy_(weight.landing)
        weight.full, weight.added = False, True

    def norm(self) -> torch.Tensor:
        """The norm of all gradients of a step, fp32; where they were computed, or on the host where they were added."""
        import torch

        if not any(weight.added for weight in self):
            return torch.linalg.vector_norm(torch.stack(self._norms))
        for weight in self:
            self._add_up(weight)
        totals = [weight.total for weight in self if weight.total is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(total) for total in totals]))

    def arrive(self) -> None:
        """Wait until the last gradient is on the host."""
        self._copies.wait(self._left)

    def gradient(self, weight: CpuWeight) -> torch.Tensor | None:
        """A weight's gradient; None if it got none."""
        if weight.added:
            self._add_up(weight)
            return weight.total
        return weight.landing if weight.full else None

    def zero_grad(self) -> None:
        self._norms.clear()
        for weight in self:
            weight.full = weight.added = False

    def publish(self) -> None:
        """Write the masters, which have changed, into the copies of all blocks."""
        self.settle()
        for weight in self:
            weight.copy.copy_(weight.master.detach())
        self.block_swap.invalidate()

    def update(self, block: int, updates: Sequence[Future[None]]) -> None:
        """Register the updates of a block's masters and copies; `take` waits until they have ended."""
        self._updates[block] = updates
        self.block_swap.invalidate()

    def settle(self, block: int | None = None) -> None:
        """Wait for the updates of a block, or of all."""
        for index in [*self._updates] if block is None else [block]:
            for update in self._updates.pop(index, ()):
                update.result()


def _landings(block: Sequence[torch.nn.Parameter], device: torch.device, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Page-locked memory for a block's gradients."""
    sizes = [parameter.numel() for parameter in block]
    flat = page_locked(sum(sizes) * dtype.itemsize, device).view(dtype)
    return (part.view(parameter.shape) for part, parameter in zip(flat.split(sizes), block, strict=True))
