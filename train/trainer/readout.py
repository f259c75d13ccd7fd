"""Reads each step's losses and gradient norm on the host, one step late where that can be; judges and logs them.

Reading a loss makes the host wait for the GPU, and the GPU then waits for the host. So a step's
numbers are copied to page-locked memory and read after the next step has been queued. A loss or a
gradient that is not finite is therefore noticed one step late; by then `skip_if_not_finite` has kept
it from the weights, on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.errors import RunError
from cogcommon.model.copies import download
from cogcommon.words import GIB

from ..distributed.leaving import PeerFailed
from ..distributed.optimizer import unwrapped
from ..distributed.strategy import Runtime
from ..model.batch import Batch
from ..runs.folder import StepLine, finite
from ..runs.log import RunLog, peak_gib
from ..runs.run import Run
from .clock import StepClock
from .step_check import Judge, listed, not_finite, stop_for

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Pending:
    """The numbers of a step that has been queued."""

    step: int
    rate: float
    numbers: torch.Tensor  # gradient norm, then the losses of all ranks; in host memory once ``copied`` has passed
    copied: torch.cuda.Event | None
    clock: StepClock


class Readout:
    """Asked by the trainer wherever the numbers of a step decide something, in the order of the methods.

    Deferred, only `catch_up` waits for the GPU, and `take` of the first step, which somebody waits for; otherwise each
    method reads what it needs at once.
    """

    def __init__(self, run: Run, runtime: Runtime, optimizer: Any, log: RunLog) -> None:
        self._run = run
        self._runtime = runtime
        self._optimizer = optimizer
        self._log = log
        self._judge = Judge(run, runtime, log)
        self._deferred = _can_defer(run, runtime, optimizer)
        self._pending: _Pending | None = None
        self._first = True

    def loss(
        self, losses_of: Callable[[Batch], torch.Tensor], batch: Batch, step: int, micro: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to go backward from, and the losses of all ranks' samples. Every rank calls it.

        If they are read now, and some are not finite, the loss to go backward from is zero, and all are left out.

        Args:
            losses_of: gives the loss of each sample (B).

        Raises:
            RunError: a loss is not finite, and ``--on-nonfinite`` says stop; or the model's weights are ruined.
        """
        losses_B = losses_of(batch)
        gathered = self._run.groups.once(self._runtime.accelerator.gather(losses_B.detach()))
        bad = [] if self._deferred else self._not_finite(gathered.tolist(), step, micro)
        if not bad:
            return losses_B.mean(), gathered
        if self._run.settings.on_nonfinite == "stop":
            raise stop_for(bad, step, self._runtime.main)
        del losses_B  # and with it all that the first pass has kept
        self._log.say(f"step {step}: the loss is not finite; left out, with the rest of its batch: {listed(bad)}")
        # Every rank goes through the model once more, on zeros, so that gradients exist and add nothing.
        nothing = losses_of(batch.blank()).mean()
        if self._runtime.all_reduce_max(int(not bool(nothing.isfinite()))):
            raise _ruined(step) if self._runtime.main else PeerFailed()
        return nothing * 0, gathered[:0]

    def may_step(self, step: int, losses: Sequence[torch.Tensor], norm: torch.Tensor) -> bool:
        """Whether the optimizer is to step; deferred, the GPU makes that step do nothing where it must not.

        Args:
            norm: of the gradient.

        Raises:
            RunError: this step, or where it is deferred the one before, is not finite: nothing is trained after it.
        """
        if not self._deferred:
            return self._judge.gradient(step, float(norm), samples=sum(map(len, losses)))
        self.catch_up()
        skip_if_not_finite(self._optimizer, losses, norm)
        return True

    def take(self, step: int, rate: float, losses: Sequence[torch.Tensor], norm: Any, clock: StepClock) -> None:
        """Take the numbers of a step that has been queued, and log them; deferred, once the next one has been."""
        import torch

        assert self._pending is None
        on_device = torch.as_tensor(norm, dtype=torch.float32, device=self._runtime.device).reshape(1)
        numbers = download(torch.cat([on_device, *(loss.float() for loss in losses)]))
        copied = torch.cuda.current_stream().record_event() if on_device.device.type == "cuda" else None
        self._pending = _Pending(step, rate, numbers, copied, clock)
        if self._first or not self._deferred:
            self._first = False
            self.catch_up()

    def catch_up(self) -> None:
        """Wait for the numbers of the last step that was taken, and log them.

        Raises:
            RunError: a loss or the gradient was not finite; the weights are those of the step before.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        norm, *losses = pending.numbers.tolist()
        if self._deferred:
            if bad := self._not_finite(losses, pending.step):
                raise stop_for(bad, pending.step, self._runtime.main)
            self._judge.gradient(pending.step, norm, samples=len(losses))
        self._write(pending, losses, norm)

    def end(self) -> None:
        """Look back on all steps.

        Raises:
            RunError: there were some, and nothing was trained in any of them.
        """
        self._judge.end()

    def _not_finite(self, losses: Sequence[float], step: int, micro: int = 0) -> list[str]:
        """The samples whose loss is not finite.

        Args:
            losses: of all ranks, rank by rank; of a whole step, or of the micro-batch ``micro``.
        """
        epoch, first = self._run.epoch_of(step), micro * len(losses)
        return not_finite(losses, epoch.batch(step)[0][first : first + len(losses)], epoch.shards)

    def _write(self, pending: _Pending, losses: Sequence[float], norm: float) -> None:
        run, step, times = self._run, pending.step, pending.clock.read()
        if times.compile > 1:
            self._log.say(f"step {step}: {times.compile:.0f} s went into compiling the blocks, once per resolution")
        self._log.step(
            StepLine(
                step=step,
                epoch=run.epoch_of(step).number,
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
                kept_gib=times.kept / GIB,
            )
        )


def _can_defer(run: Run, runtime: Runtime, optimizer: Any) -> bool:
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


def _ruined(step: int) -> RunError:
    return RunError(
        "the model's output is not finite even for zeros: its weights are ruined",
        where=f"step {step}",
        fix="resume the last checkpoint with a lower --lr, or with --precision bf16",
    )
