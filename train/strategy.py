"""How a model is spread over processes, through accelerate: DDP or a ZeRO stage.

The one module that knows DeepSpeed. Its dict is derived from the settings; a
file of the user's own is merged, and what contradicts a setting is named.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogcommon.errors import RunError, SettingError

from .settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Strategy = Literal["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]
_TAG = "state"
_WEIGHTS = "weights.safetensors"  # what is trained, under the transformer's own names
_OPTIMIZER = "optimizer.pt"
STAGE: Mapping[str, int] = {"ddp": 0, "zero1": 1, "zero2": 2, "zero2-offload": 2, "zero3": 3, "zero3-offload": 3}


def choose(settings: TrainSettings, *, full: bool, gpus: int) -> Strategy:
    """The strategy that is meant by ``auto``: from the DeepSpeed file, else by method and GPUs.

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
        if named not in STAGE or named == "ddp":
            raise SettingError(
                f"no strategy is {named}; the file must say one of stages 1 to 3, offload with 2 or 3",
                where=f"{settings.deepspeed}: zero_optimization",
            )
        return named  # type: ignore[return-value]
    if not full or gpus == 0:
        return "ddp"
    return "zero2-offload" if gpus == 1 else "zero2"


def deepspeed_config(settings: TrainSettings, strategy: Strategy, precision: str, world: int) -> dict[str, Any]:
    """DeepSpeed's dict for these settings, with the user's own file merged into it.

    Raises:
        SettingError: the file contradicts a setting; both are named.
    """
    zero: dict[str, Any] = {
        "stage": STAGE[strategy],
        "contiguous_gradients": True,
        "overlap_comm": True,
        # 5e8 elements is DeepSpeed's default; 5e7 takes 100 MB instead of 1 GB in bf16.
        "reduce_bucket_size": 50_000_000,
    }
    if strategy == "zero3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if strategy.endswith("-offload"):
        place = {"device": "cpu", "pin_memory": True}
        if settings.nvme is not None:
            place = {"device": "nvme", "nvme_path": str(settings.nvme), "pin_memory": True}
        zero["offload_optimizer"] = dict(place)
        if strategy == "zero3-offload":
            zero["stage3_gather_16bit_weights_on_model_save"] = True
            zero["offload_param"] = dict(place)
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


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON.

    Raises:
        SettingError: it cannot be read.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"cannot read the DeepSpeed file: {error.strerror}", where=f"--deepspeed {path}") from error
    except ValueError as error:
        raise SettingError(f"not JSON: {error}", where=f"--deepspeed {path}") from error
    if not isinstance(loaded, dict):
        raise SettingError("not a DeepSpeed configuration", where=f"--deepspeed {path}")
    return loaded


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


@dataclass
class Runtime:
    """One process of a run: accelerate's handle and what the loop asks of it."""

    accelerator: Accelerator
    strategy: Strategy
    precision: str
    config: dict[str, Any] | None  # DeepSpeed's, None for DDP
    _agreement: Any  # process group on the CPU for agree()

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what enters the transformer."""
        from cogcommon.device import dtype_of

        return dtype_of(self.precision)  # type: ignore[arg-type]

    @property
    def sharded(self) -> bool:
        """Optimizer states, and perhaps more, are spread by DeepSpeed."""
        return self.config is not None

    @property
    def whole(self) -> bool:
        """Every process holds all weights."""
        return STAGE[self.strategy] < 3

    def agree(self, value: int) -> int:
        """The largest of all ranks' values; over the CPU, so that no GPU waits."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._agreement)
        return int(tensor)

    def wait(self) -> None:
        self.agree(0)

    def tell(self, value: str) -> str:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._agreement)
        return box[0]

    @contextmanager
    def gathered(self, model: torch.nn.Module, *, only_trained: bool) -> Iterator[None]:
        """ZeRO-3: the weights whole on every rank, for as long as this lasts."""
        if STAGE[self.strategy] < 3:
            yield
            return
        import deepspeed

        parameters = [p for p in model.parameters() if p.requires_grad or not only_trained]
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def full_weight(self) -> Callable[[torch.nn.Parameter], torch.Tensor]:
        """A function that gives a trained weight whole and in fp32; to be called on every rank.

        Under ZeRO the model holds half precision; what was trained are the
        optimizer's fp32 masters.
        """
        if not self.sharded:
            return lambda parameter: parameter.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        def read(parameter: torch.nn.Parameter) -> torch.Tensor:
            weight = safe_get_full_fp32_param(parameter)
            return parameter.detach() if weight is None else weight

        return read

    def masters(self, optimizer: Any) -> list[torch.Tensor]:
        """This rank's part of the trained weights in fp32, as the optimizer steps them."""
        inner = optimizer.optimizer
        if not self.sharded:
            return [parameter for group in inner.param_groups for parameter in group["params"]]
        if STAGE[self.strategy] == 3:
            return list(inner.fp32_partitioned_groups_flat)
        return list(inner.single_partition_of_fp32_groups)

    def set_rate(self, optimizer: Any, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in optimizer.param_groups:
            group["lr"] = rate

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Spread them; the model comes back wrapped."""
        if self.config is not None:
            _single_process_environment()
            self.accelerator.state.deepspeed_plugin.deepspeed_config.update(self.config)
        return self.accelerator.prepare(model, optimizer)

    def save_state(self, model: Any, optimizer: Any, folder: Path) -> None:
        """Write what was trained and the optimizer's state; every rank calls it."""
        if self.sharded:
            frozen = any(not parameter.requires_grad for parameter in model.parameters())
            model.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=frozen)
            return
        if not self.main:
            return
        import safetensors.torch
        import torch

        trained = {name: p.detach() for name, p in self.plain(model).named_parameters() if p.requires_grad}
        safetensors.torch.save_file({name: p.contiguous() for name, p in trained.items()}, folder / _WEIGHTS)
        state = {"optimizer": optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        torch.save(state, folder / _OPTIMIZER)

    def load_state(self, model: Any, optimizer: Any, folder: Path) -> None:
        """Read back what `save_state` wrote.

        Raises:
            RunError: it is damaged, or does not fit this model.
        """
        try:
            if self.sharded:
                frozen = any(not parameter.requires_grad for parameter in model.parameters())
                path, _ = model.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not frozen)
                if path is None:
                    raise RuntimeError("DeepSpeed finds no state in it")
                return
            self._load_plain(model, optimizer, folder)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the checkpoint cannot be loaded: {str(error).splitlines()[0]}",
                where=str(folder),
                fix="resume an older one, with the settings of its run",
            ) from error

    def _load_plain(self, model: Any, optimizer: Any, folder: Path) -> None:
        import safetensors.torch
        import torch

        weights = safetensors.torch.load_file(folder / _WEIGHTS)
        trained = {name: p for name, p in self.plain(model).named_parameters() if p.requires_grad}
        if trained.keys() != weights.keys():
            raise ValueError("it holds other weights than this run trains")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def save_average(self, average: list[torch.Tensor], folder: Path) -> None:
        """Write this rank's part of the moving average; under DDP all have the same."""
        import safetensors.torch

        if self.sharded or self.main:
            tensors = {f"{index:04d}": tensor for index, tensor in enumerate(average)}
            safetensors.torch.save_file(tensors, folder / f"average-{self.rank}.safetensors")

    def load_average(self, folder: Path) -> list[torch.Tensor]:
        import safetensors.torch

        tensors = safetensors.torch.load_file(folder / f"average-{self.rank if self.sharded else 0}.safetensors")
        return [tensors[name] for name in sorted(tensors)]

    def plain(self, model: Any) -> Any:
        """The transformer inside the wrappers, also inside those around its forward."""
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def release(self, model: torch.nn.Module) -> None:
        """Take a model off the GPU, where it is held by nobody but us."""
        if not self.sharded:
            model.to("cpu")


def start(settings: TrainSettings, strategy: Strategy, precision: str, *, cpu: bool) -> Runtime:
    """Join the process group, if there is one, and make accelerate's handle."""
    import torch.distributed as dist
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    options: dict[str, Any] = {
        "mixed_precision": "no" if precision == "fp32" else precision,
        "gradient_accumulation_steps": settings.accumulate,
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = None
    if strategy == "ddp":
        accelerator = Accelerator(cpu=cpu, **options)
    else:
        config = deepspeed_config(settings, strategy, precision, world)
        _single_process_environment()
        if cpu:
            # Without the backend's name accelerate takes itself for a single process.
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json.loads(json.dumps(config))), **options
        )
    group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    return Runtime(accelerator, strategy, precision, config, group)


def _single_process_environment() -> None:
    """DeepSpeed wants a process group even for one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What was trained, whole and in fp32, from a checkpoint of any strategy and any number of processes.

    Raises:
        RunError: it is damaged.
    """
    import safetensors.torch

    try:
        if (checkpoint / _WEIGHTS).exists():
            return safetensors.torch.load_file(checkpoint / _WEIGHTS)
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=_TAG)
        return state
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise RunError(f"the checkpoint cannot be read: {str(error).splitlines()[0]}", where=str(checkpoint)) from error
