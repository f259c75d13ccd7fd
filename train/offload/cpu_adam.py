"""AdamW for weights that live in host memory; those that live on the GPU are stepped there, by torch's own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .cpu_training import CpuTraining, CpuWeight

# Numbers that a core updates at a time: their fp32 gradient is still in its cache when the update reads it.
_CHUNK = 1 << 19
_THREADS = 4  # that update; of 2, 4, 8 and 16 on 16 cores the fastest, see `CpuAdamW`

_Update = tuple[Sequence[torch.Tensor], dict[str, Any]]  # of a weight: its tensors, and the options of AdamW


class CpuAdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose state is also what torch's would be: {step, exp_avg, exp_avg_sq}, fp32.

    An update reads a weight's gradient, master and moments once and writes master, moments and the copy
    that the GPU computes with: 28 bytes a weight in bf16, 156 GB for 5B. Threads do it, block after block,
    while the next forward pass begins with the blocks that are done. They are four, of several cores each, because
    Python's lock goes from hand to hand: sixteen, of one each, moved 18.5 GB/s on sixteen cores, four moved 56.8.
    For the same reason all that is to be done is known before the first of them begins.

    Args:
        parameters: all that is trained, on the host and not.
        cpu_training: the weights on the host; their gradients are there, not in ``.grad``.
        options: AdamW's.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], cpu_training: CpuTraining, **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self._training = cpu_training
        self._factor = torch.ones(())
        threads = min(_THREADS, torch.get_num_threads())
        self._cores = max(1, (torch.get_num_threads() - 1) // threads)  # for each; one stays for the forward pass
        self._threads = _workers(threads, self._cores)
        self._own = threading.local()

    def clip_gradients(self, largest: float, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
        """Clip the norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does.

        Args:
            scaler: fp16's gradient scaler; gradients on the host are unscaled in the update.

        Returns:
            The norm as it was.
        """
        resident = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_host, scale = self._training.norm(), 1.0
        if scaler is not None:
            # The scaler looks for what is not finite in .grad alone. The norm is not finite exactly where a gradient on
            # the host is not; times zero it spoils one of those that the scaler sees, or adds nothing.
            resident[0].add_(on_host.to(resident[0].device) * 0)
            scaler.unscale_(self)
            scale = scaler.get_scale()
        other = torch.nn.utils.get_total_norm(resident)
        norm = torch.linalg.vector_norm(torch.stack([on_host.to(other.device) / scale, other]))
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        if resident:
            torch._foreach_mul_(resident, factor)
        self._factor = factor / scale
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Begin to update all weights; where ``found_inf`` is set, as for torch's fused AdamW, none.

        It returns when all gradients are on the host. Whoever asks the engine for weights
        waits for them, and so does `state_dict`.
        """
        self._training.arrive()
        factor, due = float(self._factor), []
        if not bool(getattr(self, "found_inf", None) or False):
            group_of = {id(p): group for group in self.param_groups for p in group["params"]}
            due = [self._due(block, group_of) for block in self._training.blocks]
        super().step(closure)  # the weights on the GPU, without waiting for it
        for index, weights in enumerate(due):
            self._training.update(index, [self._threads.submit(self._update, part, factor) for part in weights])

    def _due(self, block: Sequence[CpuWeight], group_of: Mapping[int, dict[str, Any]]) -> Sequence[Sequence[_Update]]:
        """The updates of a block's weights that have gradients: each large one alone, small ones together."""
        alone: list[list[_Update]] = []
        together: list[_Update] = []
        for weight in block:
            gradient = self._training.gradient(weight)
            if gradient is not None:
                update = self._one(weight, gradient, group_of[id(weight.master)])
                (alone.append([update]) if gradient.numel() >= _CHUNK else together.append(update))
        return [*alone, together] if together else alone

    def _one(self, weight: CpuWeight, gradient: torch.Tensor, group: dict[str, Any]) -> _Update:
        state = self.state[weight.master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight.master.data)
            state["exp_avg_sq"] = torch.zeros_like(weight.master.data)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        # The options as they are now: the loop will have set the next step's rate before the last thread is done.
        options = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
        options |= {"eps": group["eps"], "amsgrad": False, "maximize": False, "state_steps": [state["step"]]}
        return (weight.master.data, gradient, state["exp_avg"], state["exp_avg_sq"], weight.copy), options

    def _update(self, updates: Sequence[_Update], factor: float) -> None:
        """Update weights. Every operation on a piece of one gives a core the same part."""
        piece = self._cores * _CHUNK
        if not hasattr(self._own, "scratch"):
            self._own.scratch = torch.empty(piece)
        for tensors, options in updates:
            for master, gradient, mean, square, copy in zip(*(t.view(-1).split(piece) for t in tensors), strict=True):
                clipped = self._own.scratch[: master.numel()].copy_(gradient)
                if factor != 1.0:
                    clipped.mul_(factor)
                torch._fused_adamw_([master], [clipped], [mean], [square], [], **options)
                copy.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._training.zero_grad()

    def settle(self) -> None:
        """Wait until all weights are updated."""
        self._training.settle()

    def state_dict(self) -> dict[str, Any]:
        """The state once all weights are updated, so that it belongs to the masters."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read a state back, after the weights."""
        super().load_state_dict(state_dict)
        self._training.publish()


def _workers(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads whose operations use ``cores`` cores each; all other threads keep their number."""
    number = torch.get_num_threads()
    begun = threading.Barrier(threads + 1)

    def use() -> None:
        torch.get_num_threads()  # torch sets a new thread's number to the process's at the first question
        torch.set_num_threads(cores)

    workers = ThreadPoolExecutor(threads, "host-adam", initializer=use)
    for _ in range(threads):
        workers.submit(begun.wait)
    begun.wait()
    torch.set_num_threads(number)  # threads that are made later get all cores
    return workers
