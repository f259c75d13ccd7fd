"""The numbers of a step, read when the GPU has long had them.

Asking for a loss makes the host wait for the GPU, and then the GPU for the
host. So a step's loss and norm are copied to page-locked memory and read in the
step after, when that one is queued. A loss that is not finite is found one step
late; `hold` has kept it from the weights by then, on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .clock import StepClock
from .guard import not_finite, stop_for
from .optim import unwrapped
from .progress import RunLog, peak_gib
from .run import Run
from .run_folder import StepLine
from .strategy import Runtime

if TYPE_CHECKING:
    import torch


def can_wait(run: Run, runtime: Runtime, optimizer: Any) -> bool:
    """Whether losses may be read late: something must hold the optimizer back meanwhile.

    torch's fused AdamW can be told so by a number on the GPU. fp16's scaler does
    so by itself: a loss that is not finite has gradients that are not.
    ``--on-nonfinite skip`` decides between forward and backward.
    """
    import torch

    inner = unwrapped(optimizer)
    return (
        run.settings.on_nonfinite == "stop"
        and not runtime.sharded
        and isinstance(inner, torch.optim.AdamW)
        and all(group["fused"] for group in inner.param_groups)
    )


def hold(optimizer: Any, losses: Sequence[torch.Tensor]) -> None:
    """Make the next step of a fused optimizer do nothing if any loss is not finite; the host does not wait."""
    import torch

    unwrapped(optimizer).found_inf = 1.0 - torch.cat([*losses]).isfinite().all().float()


@dataclass(frozen=True)
class _Made:
    step: int
    rate: float
    numbers: torch.Tensor  # norm of the gradients, then the losses of all ranks; on the host, perhaps not there yet
    there: torch.cuda.Event | None
    clock: StepClock


class Ledger:
    """Takes a step's numbers when it is made, and logs them when they have come."""

    def __init__(self, run: Run, runtime: Runtime, log: RunLog) -> None:
        self._run = run
        self._runtime = runtime
        self._log = log
        self._waiting: _Made | None = None

    def enter(self, step: int, rate: float, losses: Sequence[torch.Tensor], norm: Any, clock: StepClock) -> None:
        """A step has been made, or is queued."""
        import torch

        assert self._waiting is None
        on_device = torch.as_tensor(norm, dtype=torch.float32, device=self._runtime.device).reshape(1)
        numbers = torch.cat([on_device, *(loss.float() for loss in losses)])
        there = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            there = torch.cuda.Event()
            there.record()
        self._waiting = _Made(step, rate, numbers, there, clock)

    def settle(self) -> None:
        """Wait for the numbers of the last step that was entered, and log them.

        Raises:
            RunError: a loss was not finite; the weights are those of the step before.
        """
        made, self._waiting = self._waiting, None
        if made is None:
            return
        if made.there is not None:
            made.there.synchronize()
        norm, *losses = made.numbers.tolist()
        run = self._run
        epoch, place = divmod(made.step - 1, run.order.steps_per_epoch)
        if losses and run.settings.on_nonfinite == "stop":
            bad = not_finite(losses, run.order.epoch(epoch)[place], run)
            if bad:
                raise stop_for(bad, made.step, self._runtime.main)
        times = made.clock.read()
        if times.compile > 1:
            self._log.say(
                f"step {made.step}: {times.compile:.0f} s went into compiling the blocks, once per resolution"
            )
        self._log.step(
            StepLine(
                step=made.step,
                epoch=epoch,
                loss=sum(losses) / len(losses) if losses else float("nan"),
                lr=made.rate,
                grad_norm=norm,
                s_per_step=times.step,
                samples_per_s=run.global_batch / times.step,
                peak_gib=peak_gib(self._runtime.device),
                data_s=times.data,
                forward_s=times.forward,
                backward_s=times.backward,
                optimizer_s=times.optimizer,
                compile_s=times.compile,
                kept_gib=times.kept / 2**30,
            )
        )
