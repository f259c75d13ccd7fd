"""LoRA or full fine-tuning: the one place that asks.

What differs is which weights are trained, in which type they are held, and what
is exported. Everything else is the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cogcommon.errors import RunError
from cogcommon.files.failures import disk_errors
from cogcommon.model.checkpoint import Checkpoint

from ..distributed.strategy import Runtime, read_weights
from ..settings.training import TARGET_MODULES, AdapterName, LoraSettings, TrainSettings
from . import lora, sft
from .adapters import ADAPTERS
from .compare import Frozen, output_on_noise
from .init_lora import begin_with, check_init, without
from .lora_file import LoraFile, digest_of, lora_in, read_lora

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel


class Method(Protocol):
    """How a transformer is made ready to be trained, and what comes of it."""

    name: Literal["lora", "sft"]
    full: bool  # every weight is trained
    adapter: AdapterName | None  # the kind of adapters, where it trains any

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        """The type in which the checkpoint's weights are loaded, to compute in ``dtype``."""
        ...

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what cannot be trained of a checkpoint, before its weights are read.

        Raises:
            SettingError: it has no such layers.
        """
        ...

    def check_files(self) -> None:
        """Refuse files that a new run begins with and that are not there; no model is needed.

        Raises:
            ModelError: the file of --init-lora is missing.
        """
        ...

    def check_start(self, checkpoint: Checkpoint) -> None:
        """Refuse what a new run cannot begin with; one that is resumed needs it no longer.

        Raises:
            CogError: the file of --init-lora is missing, or does not fit.
        """
        ...

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Choose the weights to train."""
        ...

    def start(self, transformer: CogVideoXTransformer3DModel, checkpoint: Checkpoint) -> str:
        """Set the weights of a new run to what they begin with, after `apply`; what was done, in words, if anything."""
        ...

    def watch(self, runtime: Runtime, transformer: torch.nn.Module) -> None:
        """Take note of the weights that will not be trained, once they are where they stay; `verify` asks for them."""
        ...

    def as_base(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Inside the ``with`` a model of which nothing has been trained yet is the base model."""
        ...

    def resume_facts(self) -> dict[str, Any]:
        """Settings without which its checkpoints do not fit, by option."""
        ...

    def write(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: Mapping[str, str],
        go_on: Callable[[], str],
    ) -> Written:  # fmt: skip
        """Write the weights as they are exported; every rank calls it, rank 0 writes.

        Args:
            go_on: says what to type when a fault of the disk is mended.

        Raises:
            RunError: they are not finite.
            DiskError: the disk is full, or another fault of the file system; nothing of them is left.
        """
        ...

    def verify(self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, written: Written) -> Exported:
        """Load what was written back, and compare; on rank 0.

        The model cannot be trained further: it makes room for the one that is loaded, or is what that is loaded into.

        Raises:
            RunError: it is not what was trained.
        """
        ...


@dataclass(frozen=True)
class Written:
    """A file or folder of weights, and what it must be: the weights, and the live model's `output_on_noise`.

    ``state`` is rank 0's; others hold none.
    """

    path: Path
    state: Mapping[str, torch.Tensor]
    expected: torch.Tensor


@dataclass(frozen=True)
class Exported:
    """A file or folder, and how far its answer is from the trained model's (relative; `output_on_noise`)."""

    path: Path
    difference: float


class Lora:
    """Adapters beside the linear layers; the base stays as it is, in the type that is computed in.

    An fp32 base would cost 20.8 GiB instead of 10.4 for 5B.
    """

    name: Literal["lora", "sft"] = "lora"
    full = False

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.adapter: AdapterName | None = settings.adapter
        kind = ADAPTERS[settings.adapter]
        self.alpha = kind.default_alpha(settings.rank) if settings.alpha is None else settings.alpha
        self._frozen: Frozen | None = None

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        return dtype

    def check(self, checkpoint: Checkpoint) -> None:
        if tuple(self.settings.target_modules) != TARGET_MODULES:  # which every family has
            lora.check_targets(outline(checkpoint.transformer_config), self.settings.target_modules)

    def check_files(self) -> None:
        if self.settings.init_lora:
            lora_in(self.settings.init_lora)

    def check_start(self, checkpoint: Checkpoint) -> None:
        if self.settings.init_lora:
            plain = outline(checkpoint.transformer_config)
            check_init(self._init(checkpoint, plain), plain, self.settings.target_modules)

    def _init(self, checkpoint: Checkpoint, transformer: torch.nn.Module) -> LoraFile:
        assert self.settings.init_lora
        return read_lora(lora_in(self.settings.init_lora), checkpoint, transformer)

    def start(self, transformer: CogVideoXTransformer3DModel, checkpoint: Checkpoint) -> str:
        if not self.settings.init_lora:
            return ""
        return begin_with(self._init(checkpoint, outline(checkpoint.transformer_config)), transformer)

    @cached_property
    def _begun(self) -> dict[str, Any]:
        """Which file it began with; nothing where that has been moved: the weights are in the checkpoints."""
        init = self.settings.init_lora
        if init and not init.exists():
            return {}
        return {"--init-lora": digest_of(lora_in(init)) if init else None}

    def as_base(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return without(model) if self.settings.init_lora else nullcontext()

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        settings = self.settings
        lora.attach(
            transformer, settings.rank, self.alpha, settings.target_modules, settings.lora_dropout,
            seed=settings.seed, adapter=settings.adapter,
        )  # fmt: skip

    def resume_facts(self) -> dict[str, Any]:
        return self._begun | {
            "--adapter": self.settings.adapter,
            "--rank": self.settings.rank,
            "--alpha": self.alpha,
            "--target-modules": sorted(self.settings.target_modules),
        }

    def write(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: Mapping[str, str],
        go_on: Callable[[], str],
    ) -> Written:  # fmt: skip
        plain = runtime.plain(model)
        of_adapter = {"adapter": self.settings.adapter, "rank": str(self.settings.rank), "alpha": f"{self.alpha:g}"}
        return _written(
            runtime, plain, folder / lora.FILE, go_on,
            lambda: lora.state_dict(plain, runtime.full_weight(), keep=runtime.main),
            lambda state: lora.save(state, folder, {**facts, **of_adapter}),
        )  # fmt: skip

    def file_of(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors of the file that a checkpoint of the run would be exported as, in fp32.

        Args:
            folder: the run's ``checkpoint-N``.

        Raises:
            RunError: it is damaged.
        """
        plain = ADAPTERS[self.settings.adapter].plain_alpha(self.alpha, self.settings.rank)
        return lora.file_state(read_weights(folder), plain / self.settings.rank)

    def watch(self, runtime: Runtime, transformer: torch.nn.Module) -> None:
        if runtime.main and not runtime.sharded:
            self._frozen = Frozen(transformer)

    def verify(self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, written: Written) -> Exported:
        plain = runtime.plain(model)
        if self._frozen is None:  # DeepSpeed holds the weights, and perhaps in parts
            room = runtime.make_room(plain)  # a base that was streamed need not fit on the GPU
            found = lora.check(written.path, checkpoint, written.state, written.expected, room, runtime.dtype)
            return Exported(written.path, found)
        # The base that was trained on is the checkpoint's, bit for bit: none need be loaded beside it.
        changed = self._frozen.changed(plain)
        lora.take_off(plain)
        plain.to(runtime.room_of(plain))
        found = lora.check_on(
            plain, written.path, checkpoint, written.state, written.expected, runtime.dtype, changed
        )  # fmt: skip
        return Exported(written.path, found)


class Sft:
    """Every weight; held in fp32, by DDP in the model itself, by ZeRO in the optimizer."""

    name: Literal["lora", "sft"] = "sft"
    full = True
    adapter: AdapterName | None = None

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        import torch

        return dtype if sharded else torch.float32

    def check(self, checkpoint: Checkpoint) -> None:
        pass

    def check_files(self) -> None:
        pass

    def check_start(self, checkpoint: Checkpoint) -> None:
        pass

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        transformer.requires_grad_(True)

    def start(self, transformer: CogVideoXTransformer3DModel, checkpoint: Checkpoint) -> str:
        return ""

    def watch(self, runtime: Runtime, transformer: torch.nn.Module) -> None:
        pass

    def as_base(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def resume_facts(self) -> dict[str, Any]:
        return {}

    def write(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: Mapping[str, str],
        go_on: Callable[[], str],
    ) -> Written:  # fmt: skip
        plain = runtime.plain(model)
        return _written(
            runtime, plain, folder / sft.FOLDER, go_on,
            lambda: sft.state_dict(plain, runtime.dtype, runtime.full_weight(), keep=runtime.main),
            lambda state: sft.save(state, checkpoint, folder),
        )  # fmt: skip

    def verify(self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, written: Written) -> Exported:
        plain = runtime.plain(model)
        room = runtime.make_room(plain)  # what was trained in parts, or in host memory, need not fit on the GPU whole
        return Exported(written.path, sft.check(written.path, checkpoint, written.state, written.expected, room))


def _written(
    runtime: Runtime,
    plain: Any,
    path: Path,
    go_on: Callable[[], str],
    collect: Callable[[], dict[str, torch.Tensor]],
    save: Callable[[dict[str, torch.Tensor]], object],
) -> Written:
    """Collect the weights from all ranks and write them on rank 0; if one of them cannot, all stop."""
    peers = runtime.peers
    state = peers.together(collect)
    expected = output_on_noise(plain)

    def write() -> None:
        with disk_errors(path, needs=sum(tensor.nbytes for tensor in state.values()), go_on=go_on):
            save(state)

    peers.together(write if runtime.main else lambda: None)
    return Written(path, state, expected)


def of_checkpoint(
    method: Method, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype
) -> CogVideoXTransformer3DModel:
    """The transformer as a checkpoint of a run would be exported, on the CPU, with its adapters attached.

    Args:
        folder: the run's ``checkpoint-N``.

    Raises:
        RunError: it is damaged, or of another run.
    """
    import torch

    weights = read_weights(folder)
    transformer = checkpoint.load_transformer(dtype)
    method.apply(transformer)
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    if trained.keys() != weights.keys():
        raise RunError(
            f"the checkpoint holds other weights than its run trains in {checkpoint.name}",
            where=str(folder),
            fix="leave --model out, if it was given",
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    return transformer


def method_of(settings: TrainSettings) -> Method:
    return Lora(settings) if isinstance(settings, LoraSettings) else Sft()


def outline(config: Mapping[str, Any]) -> CogVideoXTransformer3DModel:
    """The transformer of a ``config.json`` with its layers' names and shapes, and no memory; to be left as it is."""
    return _outline(json.dumps(dict(config)))


@lru_cache
def _outline(config_json: str) -> CogVideoXTransformer3DModel:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(json.loads(config_json))
