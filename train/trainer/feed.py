"""The batches that a rank trains on, from a step on: which samples, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from ..data.batches import AHEAD, Collator, prefetch
from ..data.sampler import Slot, group_slots
from ..distributed.strategy import Runtime
from ..model.batch import Batch
from ..model.objective import Objective
from ..runs.run import Run


class Feed:
    """This rank's micro-batches after step ``done``, made ahead of their turn; close it.

    With --follow they are made ahead within an epoch, and no further: what the next one is over is decided when it
    begins.

    Args:
        new_epoch: called on rank 0 before the first step, and with --follow before that of each epoch.
    """

    def __init__(
        self, run: Run, runtime: Runtime, objective: Objective, done: int, new_epoch: Callable[[], None]
    ) -> None:
        self._run, self._runtime, self._objective, self._new_epoch = run, runtime, objective, new_epoch
        self._batches = self._begin(done)

    def next(self, step: int) -> Batch:
        """The next micro-batch, which is of this step; every rank calls it."""
        peers, followed = self._runtime.peers, self._run.followed
        if followed and followed.begin(step - 1, peers):
            self.close()
            self._batches = self._begin(step - 1)
        return peers.together(lambda: next(self._batches))

    def close(self) -> None:
        self._batches.close()

    def _begin(self, done: int) -> Generator[Batch]:
        run, runtime = self._run, self._runtime
        if runtime.main:
            self._new_epoch()
        return prefetch(
            run.newest.shards, _places(run, runtime, done), _collator(run, self._objective),
            ahead=AHEAD, pin=runtime.device.type == "cuda",
        )  # fmt: skip


def _places(run: Run, runtime: Runtime, done: int) -> Iterator[list[Slot]]:
    """This rank's places after step ``done``, one micro-batch at a time."""
    last = min(run.steps, run.newest.last) if run.followed else run.steps
    for step in range(done + 1, last + 1):
        epoch = run.epoch_of(step)
        batch, turns = epoch.batch(step)
        for micro in range(run.settings.accumulate):
            yield group_slots(
                batch, epoch.number, micro=micro, group=run.groups.of(runtime.rank), groups=run.groups.count,
                size=run.settings.batch_size, turns=turns,
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
