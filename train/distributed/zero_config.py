"""DeepSpeed's dict, derived from the settings.

A file of the user's own is merged into it; what contradicts a setting is named,
because DeepSpeed would silently follow the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cogcommon.errors import SettingError
from cogcommon.files.typed import parse_object

from ..settings.training import Optimizer, Strategy, TrainSettings
from . import zero
from .strategies import STRATEGIES


def can_spread(optimizer: Optimizer, strategy: Strategy) -> bool:
    """Whether an optimizer does under a strategy what it does under DDP.

    Prodigy finds one rate from sums over all weights; where each process steps a part of them, each would find its
    own. What steps in host memory is DeepSpeed's AdamW.
    """
    if strategy == "ddp":
        return True
    return optimizer == "adamw" if STRATEGIES[strategy].offloads else optimizer != "prodigy"


def choose_strategy(settings: TrainSettings, *, full: bool, gpus: int) -> Strategy:
    """Resolve ``--strategy auto``: from the DeepSpeed file, else by method and GPUs.

    Args:
        full: every weight is trained, not adapters.
        gpus: processes with a GPU each; 0 on a CPU.
    """
    if settings.strategy != "auto":
        return settings.strategy
    if settings.deepspeed is not None:
        zero = read_deepspeed_file(settings.deepspeed).get("zero_optimization", {})
        offload = any(
            zero.get(part, {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param")
        )
        named = f"zero{zero.get('stage', 0)}" + ("-offload" if offload else "")
        if named not in STRATEGIES or named == "ddp":
            raise SettingError(
                f"no strategy is {named}; the file must say one of stages 1 to 3, offload with 2 or 3",
                where=f"{settings.deepspeed}: zero_optimization",
                fix='write "stage": 2 in the file' + ", or give --strategy zero2, too" * ("stage" not in zero),
            )
        return named  # type: ignore[return-value]
    # On one GPU `offload.cpu_training` offloads more than DeepSpeed, and only what does not fit.
    return "zero2" if full and gpus > 1 else "ddp"


def check_strategy(settings: TrainSettings, strategy: Strategy) -> None:
    """Refuse options that a strategy cannot do.

    Raises:
        SettingError: names both.
    """
    if settings.deepspeed is not None and strategy == "ddp":
        raise SettingError(
            "a DeepSpeed file has no meaning for --strategy ddp",
            where=f"--deepspeed {settings.deepspeed}, --strategy ddp",
            fix="leave one of them out",
        )
    if settings.ema and strategy != "ddp":
        raise SettingError(
            f"--ema averages weights that every process holds; {strategy} spreads them",
            where="--ema, --strategy",
            fix="--strategy ddp, or leave --ema out",
        )
    if settings.nvme is not None and not STRATEGIES[strategy].offloads:
        raise SettingError(
            f"--nvme is where an -offload strategy puts things; {strategy} offloads nothing",
            where="--nvme, --strategy",
            fix="--strategy zero3-offload",
        )
    if settings.nvme is not None and not STRATEGIES[strategy].offloads_weights:
        raise SettingError(
            f"{strategy} offloads to host memory only",
            where="--nvme, --strategy",
            fix="--strategy zero3-offload",
        )
    if settings.nvme is not None:
        zero.check_nvme(settings.nvme)


def deepspeed_config(settings: TrainSettings, strategy: Strategy, precision: str, world: int) -> dict[str, Any]:
    """DeepSpeed's dict for these settings, with the user's own file merged into it.

    Raises:
        SettingError: the file contradicts a setting; both are named.
    """
    spread = STRATEGIES[strategy]
    zero: dict[str, Any] = {
        "stage": spread.stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        # 5e8 elements is DeepSpeed's default; 5e7 takes 100 MB instead of 1 GB in bf16. Stage 3 lets the host be only
        # two buckets ahead of the GPU, which are two weights of 5B if they are small.
        "reduce_bucket_size": 50_000_000 if spread.whole else 200_000_000,
    }
    if not spread.whole:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if spread.offloads:
        place = {"device": "cpu", "pin_memory": True}
        if settings.nvme is not None:
            place = {"device": "nvme", "nvme_path": str(settings.nvme), "pin_memory": True}
        zero["offload_optimizer"] = dict(place)
        if spread.offloads_weights:
            zero["offload_param"] = dict(place)
            if settings.nvme is not None:
                # A block's eight large weights are read at once (`zero.gather_by_block`), and more of the next. The
                # largest of any model has 38 million numbers.
                zero["offload_param"] |= {"buffer_count": 24, "buffer_size": 40_000_000}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "train_batch_size": settings.batch_size * settings.accumulate * world,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # we make the optimizer, DeepSpeedCPUAdam where it offloads
        "steps_per_print": 2**31,
    }
    if settings.deepspeed is not None:
        own = read_deepspeed_file(settings.deepspeed)
        _check_spelling(own, config, settings.deepspeed)
        _check_optimizer(own, settings)
        _merge(config, own, settings, [])
    return config


# Which option says what a key of the DeepSpeed file says.
_OPTIONS = {
    "train_micro_batch_size_per_gpu": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "train_batch_size": "--batch-size, --accumulate and the number of processes",
    "gradient_clipping": "--max-grad-norm",
    "bf16.enabled": "--precision",
    "fp16.enabled": "--precision",
    "zero_optimization.stage": "--strategy",
    "zero_optimization.offload_optimizer.device": "--strategy and --nvme",
    "zero_optimization.offload_optimizer.nvme_path": "--nvme",
    "zero_optimization.offload_param.device": "--strategy and --nvme",
    "zero_optimization.offload_param.nvme_path": "--nvme",
}


# Those that are read here, an outer one before what is in it.
_SECTIONS = (
    "optimizer", "optimizer.params", "scheduler", "scheduler.params", "bf16", "fp16", "zero_optimization",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
)  # fmt: skip
# Without these DeepSpeed would step with a gradient that is not finite.
_FOR_NOT_FINITE = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON, without the sections that are null or "auto", which say nothing.

    Raises:
        SettingError: it cannot be read, or has a plain value in a section's place.
    """
    try:
        return _sections_checked(parse_object(path.read_bytes()), path)
    except OSError as error:
        raise SettingError(f"cannot read the DeepSpeed file: {error.strerror}", where=f"--deepspeed {path}") from error
    except ValueError as error:
        raise SettingError(
            f"not a DeepSpeed configuration: {error}",
            where=f"--deepspeed {path}",
            fix="a file of JSON; what CogVideo's zero2.yaml, zero3.yaml and their offload say is "
            "--strategy zero2, zero3, zero2-offload, zero3-offload",
        ) from error


def _sections_checked(own: dict[str, Any], path: Path) -> dict[str, Any]:
    for dotted in _SECTIONS:
        outer, _, key = dotted.rpartition(".")
        around = own.get(outer, {}) if outer else own
        found = around.get(key, {})
        if found is None or found == "auto":
            del around[key]
        elif not isinstance(found, dict):
            raise SettingError(
                f"{dotted} = {json.dumps(found)} is no section", where=f"--deepspeed {path}",
                fix=f'write "{key}": {{...}}, or leave it out',
            )  # fmt: skip
    return own


def _check_spelling(own: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """DeepSpeed skips a key that it does not know without a word; one that nearly is one of ours is a slip."""
    for key in own.keys() - config.keys() - {"optimizer", "scheduler"}:
        if near := get_close_matches(key, [*config, "optimizer", "scheduler"], n=1, cutoff=0.85):
            raise SettingError(f"DeepSpeed has no key {key!r}", where=f"--deepspeed {path}", fix=f"write {near[0]!r}")


def _merge(config: dict[str, Any], own: Mapping[str, Any], settings: TrainSettings, at: list[str]) -> None:
    for key, value in own.items():
        dotted = ".".join([*at, key])
        if dotted in ("optimizer", "scheduler") or value == "auto":
            continue  # checked before; made by us
        if isinstance(value, Mapping):
            inner = config.setdefault(key, {})
            if not isinstance(inner, dict):
                raise _contradiction(settings, dotted, value, inner, "a plain value")
            _merge(inner, value, settings, [*at, key])
        elif dotted in _FOR_NOT_FINITE and value is False:
            raise _contradiction(settings, dotted, value, True, "a gradient that is not finite must be seen")
        elif dotted in _OPTIONS and config.get(key, _ABSENT[type(value)]) != value:
            raise _contradiction(settings, dotted, value, config.get(key, "none"), _OPTIONS[dotted])
        else:
            config[key] = value


class _Absent(dict[type, Any]):
    """What a missing key of DeepSpeed's means, by type: off."""

    def __missing__(self, kind: type) -> Any:
        return {bool: False, str: "none"}.get(kind)


_ABSENT = _Absent()


def _check_optimizer(own: Mapping[str, Any], settings: TrainSettings) -> None:
    optimizer = own.get("optimizer", {})
    kinds = {"adamw": ("adamw", "adam"), "adamw8bit": (), "prodigy": ()}
    kind = str(optimizer.get("type", "auto")).lower()
    if kind not in ("auto", *kinds[settings.optimizer]):
        raise _contradiction(settings, "optimizer.type", optimizer["type"], settings.optimizer, "--optimizer")
    mine = {
        "lr": (settings.lr, "--lr"),
        "betas": ([settings.beta1, settings.beta2], "--beta1, --beta2"),
        "eps": (settings.eps, "--eps"),
        "weight_decay": (settings.weight_decay, "--weight-decay"),
    }
    for name, value in optimizer.get("params", {}).items():
        if name in mine and value not in ("auto", mine[name][0]):
            raise _contradiction(settings, f"optimizer.params.{name}", value, *mine[name])
    scheduler = own.get("scheduler", {})
    for name, value in {"type": scheduler.get("type", "auto"), **scheduler.get("params", {})}.items():
        if value != "auto" and not (name == "type" and all(v == "auto" for v in scheduler.get("params", {}).values())):
            raise _contradiction(
                settings, f"scheduler.{name}", value, settings.lr_schedule, "--lr-schedule, --warmup and --lr"
            )


def _contradiction(settings: TrainSettings, key: str, theirs: Any, ours: Any, option: str) -> SettingError:
    return SettingError(
        f"the DeepSpeed file says {key} = {json.dumps(theirs)}, the settings say {json.dumps(ours)} ({option})",
        where=f"{settings.deepspeed}: {key}, against {option}",
        fix=f'make them equal, or write "auto" for {key}',
    )
