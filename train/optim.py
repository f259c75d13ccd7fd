"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError

from . import zero
from .settings import TrainSettings

if TYPE_CHECKING:
    import torch

    from .step.host_training import HostTraining
    from .strategy import Runtime


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


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    settings: TrainSettings,
    device: torch.device,
    *,
    on_host: bool,
    hosted: HostTraining | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for.

    Args:
        device: that the forward pass runs on.
        on_host: an -offload strategy keeps the states in host memory, and steps there.
        hosted: the weights that the engine keeps there (``step.host_training``), if it does.

    Raises:
        SettingError: it needs a package that is not there, or does not work as set.
    """
    import torch

    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if on_host and settings.optimizer != "adamw":
        raise SettingError(
            f"--optimizer {settings.optimizer} does not step in host memory",
            where="--optimizer, --strategy",
            fix="--optimizer adamw, or a strategy without -offload",
        )
    if settings.optimizer == "adamw":
        if hosted is not None:
            from .step.host_adam import HostAdamW

            return HostAdamW(parameters, hosted, **common)
        if on_host:
            return zero.host_adam(parameters, **common)
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **common)
    if settings.optimizer == "adamw8bit":
        return _adamw8bit()(parameters, **common)
    return _prodigy(settings)(parameters, decouple=True, use_bias_correction=True, safeguard_warmup=True, **common)


def clip(
    runtime: Runtime, optimizer: Any, trained: Sequence[torch.nn.Parameter], settings: TrainSettings
) -> torch.Tensor:
    """Clip the norm of all gradients, wherever they are.

    Returns:
        The norm as it was, which is finite exactly where all gradients are.
    """
    import torch

    largest = settings.max_grad_norm or float("inf")
    inner = unwrapped(optimizer)
    if hasattr(inner, "clip"):  # HostAdamW: its gradients are not in .grad
        norm: torch.Tensor = inner.clip(largest, runtime.accelerator.scaler)
        return norm
    return torch.as_tensor(runtime.accelerator.clip_grad_norm_(trained, largest))


def unwrapped(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise SettingError(
                "--optimizer adamw8bit needs a package that is not installed",
                where="--optimizer",
                fix="pip install bitsandbytes (or torchao)",
            ) from error
    return AdamW8bit


def _prodigy(settings: TrainSettings) -> Any:
    if settings.lr < 0.1:
        raise SettingError(
            f"Prodigy finds the rate itself and multiplies it by --lr; {settings.lr:g} would hold it still",
            where="--optimizer prodigy, --lr",
            fix="--lr 1",
        )
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise SettingError(
            "--optimizer prodigy needs a package that is not installed",
            where="--optimizer",
            fix="pip install prodigyopt",
        ) from error
    return Prodigy
