"""Logs each step's loss and gradient norm one step late, so that the host never waits for the GPU.

Reading a loss makes the host wait for the GPU, and the GPU then waits for the host. So a step's
numbers are copied to page-locked memory and read after the next step has been queued. A loss or a
gradient that is not finite is therefore noticed one step late; by then `skip_if_not_finite` has kept
it from the weights, on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import download

from ..distributed.optimizer import unwrapped
from ..distributed.strategy import Runtime
from ..runs.folder import StepLine, finite
from ..runs.log import RunLog, peak_gib
from ..runs.run import Run
from .clock import StepClock
from .step_check import Judge, not_finite, stop_for

if TYPE_CHECKING:
    import torch


def can_defer(run: Run, runtime: Runtime, optimizer: Any) -> bool:
    """Whether losses may be read a step late: the optimizer must be able to skip a step by itself.

    torch's fused AdamW skips when a flag on the GPU says so. fp16's gradient scaler sets that flag
    anyway: a loss that is not finite gives gradients that are not. ``--on-nonfinite skip`` must
    know the losses between the forward and the backward pass, so it cannot wait.
    """
    import torch

    inner = unwrapped(optimizer)
    return (
        run.settings.on_nonfinite == "stop"
        and not runtime.sharded
        and isinstance(inner, torch.optim.AdamW)
        and all(group["fused"] for group in inner.param_groups)
    )


def skip_if_not_finite(optimizer: Any, losses: Sequence[torch.Tensor], norm: torch.Tensor) -> None:
    """Make a fused optimizer's next step do nothing if a loss or the gradient is not finite; the host does not wait."""
    import torch

    numbers = torch.cat([*losses, norm.detach().reshape(1).to(losses[0].device, losses[0].dtype)])
    unwrapped(optimizer).found_inf = 1.0 - numbers.isfinite().all().float()


@dataclass(frozen=True)
class _Pending:
    step: int
    rate: float
    numbers: torch.Tensor  # gradient norm, then the losses of all ranks; in host memory once ``copied`` has passed
    copied: torch.cuda.Event | None
    clock: StepClock


class StepLog:
    """Takes each step's numbers when it has been queued, and logs them once they have reached the host.

    Args:
        judge: of the gradients, where they are seen here first (`can_defer`).
    """

    def __init__(self, run: Run, runtime: Runtime, log: RunLog, judge: Judge | None) -> None:
        self._run = run
        self._runtime = runtime
        self._log = log
        self._judge = judge
        self._pending: _Pending | None = None

    def add(self, step: int, rate: float, losses: Sequence[torch.Tensor], norm: Any, clock: StepClock) -> None:
        """Take the numbers of a step that has been queued."""
        import torch

        assert self._pending is None
        on_device = torch.as_tensor(norm, dtype=torch.float32, device=self._runtime.device).reshape(1)
        numbers = download(torch.cat([on_device, *(loss.float() for loss in losses)]))
        copied = torch.cuda.current_stream().record_event() if on_device.device.type == "cuda" else None
        self._pending = _Pending(step, rate, numbers, copied, clock)

    def flush(self) -> None:
        """Wait for the numbers of the last step that was added, and log them.

        Raises:
            RunError: a loss or the gradient was not finite; the weights are those of the step before.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        norm, *losses = pending.numbers.tolist()
        run = self._run
        epoch, place = divmod(pending.step - 1, run.sampler.steps_per_epoch)
        if losses and run.settings.on_nonfinite == "stop":
            bad = not_finite(losses, run.sampler.epoch(epoch)[place], run)
            if bad:
                raise stop_for(bad, pending.step, self._runtime.main)
        if self._judge:
            self._judge.gradient(pending.step, norm, samples=len(losses))
        times = pending.clock.read()
        if times.compile > 1:
            self._log.say(
                f"step {pending.step}: {times.compile:.0f} s went into compiling the blocks, once per resolution"
            )
        self._log.step(
            StepLine(
                step=pending.step,
                epoch=epoch,
                loss=finite(sum(losses) / len(losses)) if losses else None,
                lr=pending.rate,
                grad_norm=finite(norm),
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
