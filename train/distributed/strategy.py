"""How a model is spread over processes, through accelerate: DDP or a ZeRO stage.

What differs between the two stays in this module; what is DeepSpeed's alone is in ``zero``.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.errors import RunError
from cogcommon.files.memory import free_gpu_memory

from ..settings.training import Strategy, TrainSettings
from . import zero
from .peers import Peers, meet
from .snapshot import EMA, OPTIMIZER, WEIGHTS, Snapshot
from .strategies import STRATEGIES
from .zero_config import deepspeed_config

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


@dataclass
class Runtime:
    """One process of a run: accelerate's handle and what the loop asks of it.

    Attributes:
        config: DeepSpeed's; None: DDP.
        converts: the checkpoint that `load_state` will read was written by another number of processes, and has to be
            converted for that.
    """

    accelerator: Accelerator
    strategy: Strategy
    precision: str
    config: dict[str, Any] | None
    peers: Peers
    converts: bool = False

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
        from cogcommon.model.device import dtype_of

        return dtype_of(self.precision)  # type: ignore[arg-type]

    @property
    def whole(self) -> bool:
        """Every process holds all weights."""
        return STRATEGIES[self.strategy].whole

    @property
    def sharded(self) -> bool:
        """Optimizer states, and perhaps more, are spread by DeepSpeed."""
        return self.config is not None

    def all_reduce_max(self, value: int) -> int:
        """The largest of all ranks' values; over the CPU, so that no GPU waits."""
        return self.peers.all_reduce_max(value)

    def barrier(self) -> None:
        self.peers.barrier()

    def full_weight(self) -> Callable[[torch.nn.Parameter], torch.Tensor]:
        """A function that gives a trained weight whole and in fp32; to be called on every rank.

        Under ZeRO the model holds half precision; what was trained are the
        optimizer's fp32 masters.
        """
        return zero.full_weight if self.sharded else _detached

    def set_rate(self, optimizer: Any, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], float | int):
                group["lr"] = rate
            else:
                group["lr"].fill_(rate)  # torchao compiles its step over a tensor

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, saved_by: int | None
    ) -> tuple[Any, Any]:
        """Spread them; the model comes back wrapped.

        Args:
            saved_by: processes that wrote the checkpoint which `load_state` will read; None without one.
        """
        self.converts = self.sharded and saved_by not in (None, self.world)
        if self.converts:
            self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        if self.sharded:
            engine, wrapped = self.accelerator.prepare(model, optimizer)
            zero.prepare(engine)
            return engine, wrapped
        # Weights are where they belong; moving them again would bring swapped ones to the GPU.
        return self.accelerator.prepare(model, optimizer, device_placement=[False, False])

    def held(self, model: Any, optimizer: Any, shadow: Sequence[torch.Tensor] | None) -> Iterator[torch.Tensor]:
        """What this process holds of the trained weights, of their average and of the optimizer's state."""
        import torch

        if self.sharded:
            yield from zero.held_tensors(model)
            return
        states = optimizer.state_dict()["state"]  # first: it ends an update that `CpuAdamW` still makes
        yield from self._trained(model).values()
        yield from shadow or ()
        for state in states.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def snapshot(self, model: Any, optimizer: Any, shadow: Sequence[torch.Tensor] | None) -> Snapshot | None:
        """What this process writes into a checkpoint, live; None where it writes nothing, or DeepSpeed does.

        Args:
            shadow: moving average of the trained weights (DDP).
        """
        if self.sharded or not self.main:
            return None
        state = {"optimizer": optimizer.state_dict()}  # first: it ends an update that `CpuAdamW` still makes
        trained = self._trained(model)
        average = None if shadow is None else dict(zip(trained, shadow, strict=True))
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return Snapshot(trained, average, state)

    def save_state(self, model: Any, snapshot: Snapshot | None, folder: Path) -> None:
        """Write what was trained and the optimizer's state, as they are now; every rank calls it.

        Args:
            snapshot: of now.
        """
        if self.sharded:
            zero.save(model, folder)
        elif snapshot is not None:
            snapshot.write(folder)

    def load_state(self, model: Any, optimizer: Any, shadow: Sequence[torch.Tensor] | None, folder: Path) -> None:
        """Read back what `save_state` wrote, on this or another number of processes.

        Raises:
            RunError: it is damaged, or does not fit this model.
            DiskError: there is no room to convert it.
        """
        try:
            if not self.sharded:
                self._load_plain(model, optimizer, shadow, folder)
            elif self.converts:
                zero.load_converted(model, folder, self.peers)
            else:
                zero.load(model, folder)
        except Exception as error:
            why = _unreadable(error)
            if why is None:
                raise
            raise RunError(
                f"the checkpoint cannot be loaded: {why}",
                where=str(folder),
                fix="resume an older one, with the settings of its run",
            ) from error

    def _load_plain(self, model: Any, optimizer: Any, shadow: Sequence[torch.Tensor] | None, folder: Path) -> None:
        import safetensors.torch
        import torch

        trained = self._trained(model)
        files: dict[str, list[torch.Tensor]] = {WEIGHTS: [*trained.values()]}
        if shadow is not None:
            files[EMA] = list(shadow)
        for file, into in files.items():
            saved = safetensors.torch.load_file(folder / file)
            if trained.keys() != saved.keys():
                raise ValueError("it holds other weights than this run trains")
            with torch.no_grad():
                for name, tensor in zip(trained, into, strict=True):
                    tensor.copy_(saved[name])
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _trained(self, model: Any) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.plain(model).named_parameters() if p.requires_grad}

    def plain(self, model: Any) -> Any:
        """The transformer inside the wrappers."""
        if self.sharded:
            return self.accelerator.unwrap_model(model)
        from torch.nn.parallel import DistributedDataParallel

        # Accelerate's way imports DeepSpeed, for seconds, to see that it is not this model's wrapper.
        return model.module if isinstance(model, DistributedDataParallel) else model

    def release(self, model: torch.nn.Module) -> None:
        """Move a model off the GPU, unless DeepSpeed holds its weights."""
        if not self.sharded:
            model.to("cpu")

    def make_room(self, model: torch.nn.Module) -> torch.device:
        """Where a second copy of a model that has been trained can go; the model leaves the GPU if it must."""
        if self.room_for(model) != self.device:
            self.release(model)
        return self.room_for(model)

    def room_for(self, model: torch.nn.Module) -> torch.device:
        """This process's GPU if a second copy of the model fits there, else the CPU."""
        return self._room(_whole_bytes(parameter) for parameter in model.parameters())

    def room_of(self, model: torch.nn.Module) -> torch.device:
        """This process's GPU if what lies elsewhere of the model fits there, too, else the CPU."""
        return self._room(parameter.nbytes for parameter in model.parameters() if parameter.device != self.device)

    def _room(self, sizes: Iterable[int]) -> torch.device:
        import torch

        fits = self.device.type == "cpu" or 1.2 * sum(sizes) < free_gpu_memory(self.device)
        return self.device if fits else torch.device("cpu")


def start(
    settings: TrainSettings, strategy: Strategy, precision: str, *, cpu: bool, autocast: bool = True,
    peers: Peers | None = None,
) -> Runtime:  # fmt: skip
    """Make accelerate's handle, over the processes that have met.

    Args:
        peers: None: meet them.
        autocast: fp32 weights are to be computed with in half precision (DDP).
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs

    options: dict[str, Any] = {
        "mixed_precision": "no" if precision == "fp32" else precision,
        "gradient_accumulation_steps": settings.accumulate,
    }
    _hush()
    peers = peers or meet()
    config = None
    if peers.world == 1 and (strategy != "ddp" or "RANK" in os.environ):
        join_alone(cpu)
    if strategy == "ddp":
        # Gradients live in the buckets they are exchanged in, not beside them: 6.8 GB less for all weights of 2B.
        # Buffers are position tables, the same on every rank.
        options["kwargs_handlers"] = [
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            AutocastKwargs(enabled=autocast),
        ]
        accelerator = Accelerator(cpu=cpu, **options)
    else:
        config = deepspeed_config(settings, strategy, precision, peers.world)
        if cpu:
            zero.without_shared_memory_op()
            # Without the backend's name accelerate takes itself for a single process.
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json.loads(json.dumps(config))), **options
        )
    assert accelerator.num_processes == peers.world, (accelerator.num_processes, peers.world)
    return Runtime(accelerator, strategy, precision, config, peers)


def _whole_bytes(parameter: torch.nn.Parameter) -> int:
    """Of a weight, though ZeRO-3 holds it in parts, and none of it in the parameter itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _hush() -> None:
    """Leave out warnings of no use to the reader, which come once a rank."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # names that torch will drop
    warnings.filterwarnings("ignore", category=UserWarning, module="_distutils_hack")  # DeepSpeed's doing
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # it is the right one
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # by accelerate


def _detached(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.detach()


def join_alone(cpu: bool) -> None:
    """Join a process group of one: DeepSpeed wants a group even for one process, and accelerate where RANK is set."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if not dist.is_initialized():
        store = TCPStore("127.0.0.1", 0, 1, is_master=True)  # the port that MASTER_PORT names may have been taken since
        dist.init_process_group("gloo" if cpu else "nccl", store=store, rank=0, world_size=1)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What is exported, whole and in fp32, from a checkpoint of any strategy and any number of processes.

    Raises:
        RunError: it is damaged.
    """
    import safetensors.torch

    try:
        for file in (EMA, WEIGHTS):
            if (checkpoint / file).exists():
                return safetensors.torch.load_file(checkpoint / file)
        return zero.gather_weights(checkpoint)
    except Exception as error:
        why = _unreadable(error)
        if why is None:
            raise
        raise RunError(f"the checkpoint cannot be read: {why}", where=str(checkpoint)) from error


def _unreadable(error: Exception) -> str | None:
    """Why a checkpoint cannot be read; None for an error that is not the checkpoint's."""
    from safetensors import SafetensorError

    if isinstance(error, pickle.UnpicklingError):
        return "a file in it is damaged, or asks for more than numbers, which is not done for it"
    if isinstance(error, OSError | RuntimeError | ValueError | KeyError | EOFError | SafetensorError):
        return str(error).partition("\n")[0] or type(error).__name__
    return None
