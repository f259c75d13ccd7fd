"""One training loop for every part of the built-in model: resumable, and seeded by step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .muon import Muon

Losses = dict[str, torch.Tensor]
B = TypeVar("B")


def fit(
    model: torch.nn.Module,
    batch_at: Callable[[int], B],
    losses_of: Callable[[B, int], Losses],
    folder: Path,
    *,
    steps: int,
    lr: float,
    workers: int = 0,
    save_every: int = 500,
) -> None:
    """Train with Muon and a one-cycle learning rate; continue where ``folder`` was left.

    Args:
        batch_at: the batch of a step, drawn from the step's number alone, so that a resumed run is the run.
        losses_of: the losses of a batch and its step by name; their sum gives the gradient.
        folder: gets ``state.pt`` and ``metrics.jsonl``.
        steps: in all; the learning rate falls to zero there.
        lr: peak, reached after a twentieth of the steps, 100 at most.
        workers: processes that draw batches ahead; on a GPU one core cannot keep up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = Muon(model.parameters(), lr=lr)
    state_file, first = folder / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.monotonic()
    seen: list[torch.Tensor] = []  # losses since the last line
    ahead = DataLoader(Batches(batch_at), batch_size=None, sampler=range(first, steps), num_workers=workers)
    for step, batch in zip(range(first, steps), ahead, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * one_cycle(step, steps)
        losses = losses_of(batch, step)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss of step {step} is {total.item()}: {losses}")
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(torch.stack(list(losses.values())).detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            means = torch.stack(seen).mean(0).tolist()
            seen.clear()
            line = {"step": step + 1, **dict(zip(losses, means, strict=True)), "seconds": time.monotonic() - started}
            rounded = json.dumps({name: float(f"{value:.4g}") for name, value in line.items()})
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
                out.write(rounded + "\n")
            print(rounded, flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / ".state.tmp")
            (folder / ".state.tmp").rename(state_file)


class Batches(Dataset[B], Generic[B]):
    """``batch_at`` by number, for torch's loader."""

    def __init__(self, batch_at: Callable[[int], B]) -> None:
        self.batch_at = batch_at

    def __getitem__(self, step: int) -> B:
        return self.batch_at(step)


def one_cycle(step: int, steps: int) -> float:
    """Up in a straight line for a twentieth of the run or 100 steps, then down along half a cosine."""
    warm = min(100, max(1, steps // 20))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
