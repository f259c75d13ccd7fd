"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError

from ..settings.training import Optimizer, Strategy, TrainSettings
from . import zero
from .strategies import STRATEGIES
from .zero_config import can_spread

if TYPE_CHECKING:
    import torch

    from ..offload.cpu_training import CpuTraining
    from .strategy import Runtime


# Package, module and class; the first that can be imported.
_PACKAGES: Mapping[Optimizer, tuple[tuple[str, str, str], ...]] = {
    "adamw8bit": (("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"), ("torchao", "torchao.optim", "AdamW8bit")),
    "prodigy": (("prodigyopt", "prodigyopt", "Prodigy"),),
}
# The peak learning rates that make sense: the least, and one that is too much. AdamW
# moves a weight by about the rate, whatever its gradient is.
_RATES: Mapping[Optimizer, tuple[float, float]] = {"adamw": (0, 0.5), "adamw8bit": (0, 0.5), "prodigy": (0.1, 10)}


def warmup_steps(settings: TrainSettings, steps: int) -> int:
    """As asked; else 100, but at most a tenth of the run."""
    return settings.warmup if settings.warmup is not None else min(100, steps // 10)


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """The rate of optimizer step ``step``, counted from 1; the last one is ``steps``.

    Steps of the optimizer, not of a process or an accumulation: the schedule is
    the same on any number of processes. linear and cosine are zero at the last step.
    """
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return settings.lr * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.lr * factor[settings.lr_schedule]


def told_of_schedule(settings: TrainSettings, done: int, then: int, now: int) -> list[str]:
    """What to know of the rate where a run goes on after ``done`` steps, and another step is its last one now.

    Args:
        then: the last step, as it was when the run was stopped.
        now: as it is.
    """
    if settings.lr_schedule == "constant" or then == now or done >= now:
        return []
    before, after = learning_rate(done, then, settings), learning_rate(done + 1, now, settings)
    return [
        f"--lr-schedule {settings.lr_schedule} ends at step {now:,} now, not {then:,}: "
        f"the rate was {before:.2g} and goes on at {after:.2g}"
    ]


def check_optimizer(settings: TrainSettings, strategy: Strategy) -> None:
    """Refuse an optimizer that would not do what it is chosen for.

    Raises:
        SettingError: it needs another strategy, or another rate.
    """
    name = settings.optimizer
    if not can_spread(name, strategy):
        why = (
            f"--optimizer {name} does not step in host memory"
            if STRATEGIES[strategy].offloads
            else f"Prodigy finds one rate from all weights; under {strategy} each process has a part of them"
        )
        fix = "--strategy ddp" if name == "prodigy" else "a strategy without -offload"
        raise SettingError(why, where="--optimizer, --strategy", fix=f"--optimizer adamw, or {fix}")
    least, most = _RATES[name]
    if not (settings.lr == 0 or least <= settings.lr < most):
        if name == "prodigy":
            raise SettingError(
                f"Prodigy finds the rate itself and multiplies it by --lr; {settings.lr:g} would hold it still"
                if settings.lr < least
                else f"Prodigy finds the rate itself and multiplies it by --lr; {settings.lr:g} would be far too much",
                where="--optimizer prodigy, --lr",
                fix="--lr 1",
            )
        raise SettingError(
            f"a rate of {settings.lr:g} moves every weight by about as much in a step, and few are larger than 0.1",
            where="--lr",
            fix="--lr 1e-4 (LoRA), --lr 1e-5 (sft); 1 is Prodigy's: --optimizer prodigy",
        )


def check_optimizer_installed(name: Optimizer, strategy: Strategy) -> None:
    """Raises:
    SettingError: the optimizer needs a package that is not there, or another one under this strategy.
    """
    if name not in _PACKAGES:
        return
    if _class_of(name).__module__.startswith("torchao") and strategy != "ddp":
        # 24 bytes a weight beside 16 that it holds, counted uncompiled; bitsandbytes holds 10 and makes no copies.
        raise SettingError(
            f"torchao's 8 bits save no memory under {strategy}: it steps a process's whole part at once, and makes "
            "copies of it in fp32",
            where="--optimizer adamw8bit, --strategy",
            fix="pip install bitsandbytes, which makes none; or --optimizer adamw, or --strategy ddp",
        )


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    settings: TrainSettings,
    device: torch.device,
    *,
    offload_optimizer: bool,
    cpu_training: CpuTraining | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for (`check_optimizer`, `check_optimizer_installed`).

    Args:
        device: that the forward pass runs on.
        offload_optimizer: an -offload strategy keeps the states in host memory, and steps there.
        cpu_training: the weights that the engine keeps there (``offload.cpu_training``), if it does.

    Raises:
        SettingError: DeepSpeed's that steps in host memory cannot be compiled.
    """
    import torch

    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        if cpu_training is not None:
            from ..offload.cpu_adam import CpuAdamW

            return CpuAdamW(parameters, cpu_training, **common)
        if offload_optimizer:
            return zero.deepspeed_cpu_adam(parameters, **common)
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **common)
    if settings.optimizer == "prodigy":
        common |= {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    return _class_of(settings.optimizer)(parameters, **common)


def clip_gradients(
    runtime: Runtime, optimizer: Any, trained: Sequence[torch.nn.Parameter], settings: TrainSettings
) -> torch.Tensor:
    """Clip the norm of all gradients, wherever they are.

    Returns:
        The norm as it was, which is finite exactly where all gradients are.
    """
    import torch

    largest = settings.max_grad_norm or float("inf")
    inner = unwrapped(optimizer)
    if hasattr(inner, "clip_gradients"):  # CpuAdamW: its gradients are not in .grad
        norm: torch.Tensor = inner.clip_gradients(largest, runtime.accelerator.scaler)
        return norm
    return torch.as_tensor(runtime.accelerator.clip_grad_norm_(trained, largest))


def finish_update(optimizer: Any) -> None:
    """Wait for an optimizer that steps beside the computation: until then its weights are not to be read."""
    inner = unwrapped(optimizer)
    if hasattr(inner, "settle"):  # CpuAdamW
        inner.settle()


def unwrapped(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _class_of(name: Optimizer) -> Any:
    """The class of an optimizer that is not torch's own."""
    for _, module, cls in _PACKAGES[name]:
        try:
            return getattr(importlib.import_module(module), cls)
        except ImportError:  # not there, or made for another machine
            continue
    named = [package for package, _, _ in _PACKAGES[name]]
    raise SettingError(
        f"--optimizer {name} needs a package that is not installed",
        where="--optimizer",
        fix=f"pip install {named[0]}" + "".join(f" (or {other})" for other in named[1:]),
    )
