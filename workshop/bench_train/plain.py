"""The plain loop beside the product's, as the public fine-tuning code has it: diffusers and PEFT through accelerate,
every block checkpointed by diffusers itself, torch's AdamW, DeepSpeed as it comes, the loss asked for at every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cogcommon.model.device import dtype_of
from cogtrain.data.batches import Collator, prefetch
from cogtrain.data.sampler import group_slots
from cogtrain.distributed import zero
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.distributed.strategy import join_alone
from cogtrain.model.objective import Objective
from cogtrain.runs.log import peak_gib
from cogtrain.runs.run import Run

from .machine import BenchMachine
from .rows import BenchRow

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def reference(run: Run, row: BenchRow, pinned: bool = True) -> Mapping[str, Any]:
    """Seconds and bytes of the plain loop on a run's weights and samples.

    Args:
        pinned: what DeepSpeed has in host memory is page-locked, as it is in the public code.
    """
    import torch

    machine = BenchMachine()
    accelerator = _accelerator(run, pinned)
    device, dtype = accelerator.device, dtype_of(run.precision)
    transformer = run.checkpoint.load_transformer(run.method.weight_dtype(dtype, run.strategy != "ddp"))
    run.method.apply(transformer)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(transformer, _optimizer(trained, run))
    objective = Objective.of(run.checkpoint)
    rank, world = accelerator.process_index, run.world
    places = (divmod(step, run.sampler.steps_per_epoch) for step in range(row.steps))
    slots = (
        group_slots(run.sampler.epoch(epoch)[place], epoch, micro=0, group=rank, groups=world, size=1)
        for epoch, place in places
    )
    batches = prefetch(run.shards, slots, Collator(objective, run.settings.seed), ahead=2, pin=device.type == "cuda")
    marks: list[Sequence[float]] = []
    losses = []
    first_peak_gib = 0.0
    for batch in batches:
        times = [_now(device)]
        loss = objective.losses(model, batch.to(device), dtype).mean()
        times.append(_now(device))
        accelerator.backward(loss)  # DeepSpeed makes its step in there
        times.append(_now(device))
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(accelerator.reduce(loss.detach(), "mean").item(), 5))
        times.append(_now(device))
        marks.append(times)
        machine.look()
        if len(marks) == 1 and device.type == "cuda":
            first_peak_gib = peak_gib(device)
            torch.cuda.reset_peak_memory_stats()
    counted = marks[row.settling :]
    parts = {
        name: statistics.median(times[end] - times[begin] for times in counted)
        for name, begin, end in (
            ("s_per_step", 0, 3), ("forward_s", 0, 1), ("backward_s", 1, 2), ("optimizer_s", 2, 3)
        )
    }  # fmt: skip
    return parts | {
        "steps": len(counted),
        "compile_s": 0.0,
        "peak_gib": peak_gib(device),
        "first_peak_gib": first_peak_gib,
        "plan": "every block checkpointed by diffusers" + ("" if pinned else ", host memory not page-locked"),
        "attention": "torch",
        "losses": losses,
        "all_s": [round(times[3] - times[0], 3) for times in marks],
        **machine.found(run),
    }


def _accelerator(run: Run, pinned: bool) -> Accelerator:
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.cuda.is_available()
    options: dict[str, Any] = {"mixed_precision": "no" if run.precision == "fp32" else run.precision}
    if run.strategy == "ddp":
        return Accelerator(cpu=cpu, **options)
    if run.world == 1:
        join_alone(cpu)
    if cpu:
        zero.without_shared_memory_op()
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed(run, pinned)), **options)


def _deepspeed(run: Run, pinned: bool) -> dict[str, Any]:
    """Its own defaults, but for what the public code sets, too."""
    spread = STRATEGIES[run.strategy]
    stage: dict[str, Any] = {"stage": spread.stage, "overlap_comm": True, "contiguous_gradients": True}
    place = {"device": "cpu", "pin_memory": pinned}
    if spread.offloads:
        stage["offload_optimizer"] = place
    if spread.offloads_weights:
        stage["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": run.world,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": run.precision == "bf16"},
        "fp16": {"enabled": run.precision == "fp16"},
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def _optimizer(trained: Sequence[torch.nn.Parameter], run: Run) -> torch.optim.Optimizer:
    import torch

    options: dict[str, Any] = {"lr": run.settings.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4}
    offload_optimizer = STRATEGIES[run.strategy].offloads
    return zero.deepspeed_cpu_adam(trained, **options) if offload_optimizer else torch.optim.AdamW(trained, **options)


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
