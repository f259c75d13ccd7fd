"""The batches that a rank trains on, from a step on: which samples, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from ..data.batches import AHEAD, Collator, prefetch
from ..data.sampler import Slot, group_slots
from ..distributed.strategy import Runtime
from ..model.batch import Batch
from ..model.objective import Objective
from ..runs.run import Run


def feed(run: Run, runtime: Runtime, objective: Objective, done: int) -> Generator[Batch]:
    """This rank's micro-batches after step ``done``, made ahead of their turn; close it."""
    return prefetch(
        run.shards, _places(run, runtime, done), _collator(run, objective),
        ahead=AHEAD, pin=runtime.device.type == "cuda",
    )  # fmt: skip


def _places(run: Run, runtime: Runtime, done: int) -> Iterator[list[Slot]]:
    """This rank's places after step ``done``, one micro-batch at a time."""
    for step in range(done, run.steps):
        epoch, place = divmod(step, run.sampler.steps_per_epoch)
        batch, turns = run.sampler.epoch(epoch)[place], run.sampler.turns(epoch)
        for micro in range(run.settings.accumulate):
            yield group_slots(
                batch, epoch, micro=micro, group=run.groups.of(runtime.rank), groups=run.groups.count,
                size=run.settings.batch_size, turns=None if turns is None else turns[place],
            )  # fmt: skip


def _collator(run: Run, objective: Objective) -> Collator:
    import safetensors.torch

    settings = run.settings
    return Collator(
        objective,
        settings.seed,
        stratify=run.global_batch if settings.timesteps == "stratified" else None,
        caption_dropout=settings.caption_dropout,
        empty_text=safetensors.torch.load(run.shards.empty_caption())["text"] if settings.caption_dropout else None,
    )
