"""The one module that uses DeepSpeed's engine: its weights, fp32 masters and checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from cogcommon.cli.names import command_line
from cogcommon.cli.progress import stage
from cogcommon.errors import SettingError
from cogcommon.files.atomic import temporary_beside
from cogcommon.files.failures import disk_error, number_of
from cogcommon.files.ownership import is_file

from .peers import Peers

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_TAG = "state"  # DeepSpeed's folder inside a checkpoint


def without_shared_memory_op() -> None:
    """Leave collectives on a CPU to gloo.

    DeepSpeed compiles its own operation for them; in a run of two processes one died of
    a signal in it, before its first step.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def deepspeed_cpu_adam(parameters: Sequence[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW that steps in host memory. Its own default for the weight decay is 0.

    Raises:
        SettingError: DeepSpeed cannot compile it here, as it does at its first use.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        with compiling_alone():
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    except (RuntimeError, ImportError) as error:
        why = str(error.__cause__ or error).strip().splitlines()
        raise SettingError(
            f"DeepSpeed cannot compile the optimizer that steps in host memory: {why[0] if why else 'no reason given'}",
            where="an -offload strategy",
            fix="install g++ and ninja (apt install g++; pip install ninja), or sft on one GPU: "
            "--strategy ddp --memory low, which needs neither",
        ) from error


def check_deepspeed_cpu_adam() -> None:
    """Compile what `deepspeed_cpu_adam` needs, once for all processes.

    Raises:
        SettingError: it cannot be compiled here.
    """
    import torch

    deepspeed_cpu_adam([torch.nn.Parameter(torch.zeros(1))])


@contextlib.contextmanager
def compiling_alone() -> Iterator[None]:
    """Let one process at a time compile DeepSpeed's operations, past what a killed one left.

    torch marks a build with a file named ``lock``; where its process was killed, every
    later one would wait for that file for ever.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with contextlib.ExitStack() as held:
        held.enter_context(stage("compiling an optimizer for host memory, once"))  # or waiting for who compiles it
        # Without a lock it goes on: a folder that cannot be written may hold what is needed, some disks have no locks.
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((root / "cogtrain.lock").open("w")), fcntl.LOCK_EX)
        for left in [*root.glob("*/lock"), *root.glob("*/*/lock")]:  # torch's lock of an operation, an empty file
            with contextlib.suppress(OSError):
                if is_file(left) and left.stat().st_size == 0 and not _open_in_a_process(left):
                    left.unlink()
        yield


def _open_in_a_process(file: Path) -> bool:
    import psutil

    path = str(file.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(opened.path == path for opened in process.open_files()):
                return True
    return False


def check_nvme(folder: Path) -> None:
    """Refuse to offload to a disk where DeepSpeed could not.

    Raises:
        SettingError: no such folder, or no libaio to write to it with.
    """
    if not folder.is_dir():
        raise SettingError("no such folder to offload to", where=f"--nvme {folder}", fix=command_line("mkdir", folder))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise SettingError(
            "DeepSpeed cannot offload to a disk here: libaio is missing",
            where=f"--nvme {folder}",
            fix="apt install libaio-dev (Debian, Ubuntu) or dnf install libaio-devel",
        )


def full_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A trained weight whole and in fp32, from the optimizer's masters; to be called on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    weight = safe_get_full_fp32_param(parameter)
    assert weight is not None, "not a trained weight"
    return weight


def gather_by_block(transformer: Any) -> None:
    """Have ZeRO-3 gather the weights of a block when it is called, all at once, not those of each layer in it."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(transformer, [type(transformer.transformer_blocks[0])])
    for block in transformer.transformer_blocks:  # before DeepSpeed's own hooks
        block.register_forward_pre_hook(_by_place, with_kwargs=True)


_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")


def _by_place(block: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A block's arguments made positional, the first of them differentiable.

    DeepSpeed learns from torch's full backward hooks that a block has gone backward. These see positional arguments
    that need a gradient, and no others; diffusers passes arguments by name, and a LoRA's first block gets none that
    needs a gradient. DeepSpeed would free the weights before their gradients exist.
    """
    import torch

    named = dict(named)
    first, *rest = (*arguments, *(named.pop(name, None) for name in _ARGUMENTS[len(arguments) :]))
    if block.training and torch.is_grad_enabled() and not first.requires_grad:
        first = first.detach().requires_grad_()
    return (first, *rest), named


def held_tensors(engine: Any) -> Iterator[torch.Tensor]:
    """What this process holds of the fp32 masters and of the optimizer's state."""
    import torch

    optimizer = engine.optimizer.optimizer  # torch's, or DeepSpeed's own Adam, inside ZeRO's
    for group in optimizer.param_groups:
        yield from group["params"]
    for master, state in optimizer.state.items():  # stage 3 leaves its groups empty between two steps
        yield from (value for value in (master, *state.values()) if isinstance(value, torch.Tensor))


def prepare(engine: Any) -> None:
    """Have an engine use our `Files`, and leave no recovery scripts, which `cogtrain export` makes needless, in a
    checkpoint. fp16's loss scale stays at its least instead of ending the run in a traceback; `finite.Judge` ends it.
    """
    from .zero_files import Files

    engine.checkpoint_engine = Files()
    engine._copy_recovery_script = lambda save_path: None
    if hasattr(scaler := engine.optimizer.loss_scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def save(engine: Any, folder: Path) -> None:
    """Write the engine's state into a checkpoint; every rank calls it. What is frozen is left out.

    Raises:
        OSError, ...: this rank could not write its part; all ranks have met.
    """
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=_partly_frozen(engine))
    if engine.checkpoint_engine.fault is not None:
        raise engine.checkpoint_engine.fault


def load(engine: Any, folder: Path) -> None:
    """Read the engine's state back.

    Raises:
        RuntimeError, OSError, ...: DeepSpeed's own.
        pickle.UnpicklingError: it holds more than numbers.
    """
    from .zero_files import numbers_only

    with numbers_only():
        path, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not _partly_frozen(engine))
    if path is None:
        raise FileNotFoundError("DeepSpeed finds no state in it")


def load_converted(engine: Any, folder: Path, peers: Peers) -> None:
    """As `load`, of a checkpoint of another number of processes, by way of a copy as large; every rank calls it.

    Raises:
        DiskError: the copy finds no room.
        RuntimeError, OSError, ...: as `load`.
    """
    scratch = Path(peers.broadcast(str(temporary_beside(folder.parent / "universal"))))
    try:
        if peers.main:
            _convert_for_now(folder, scratch)
        peers.barrier()
        with _without_warnings():
            load(engine, scratch)
        peers.barrier()
    finally:
        if peers.main:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert_for_now(folder: Path, scratch: Path) -> None:
    try:
        convert(folder, scratch)
    except Exception as error:
        number = number_of(error, scratch)
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise  # the checkpoint's own fault
        shutil.rmtree(scratch, ignore_errors=True)
        size = sum(path.stat().st_size for path in (folder / _TAG).iterdir())
        go_on = "run the command again; on as many processes as wrote the checkpoint it takes no room"
        raise disk_error(OSError(), number, folder, needs=size, go_on=go_on) from error


def gather_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What was trained, whole and in fp32, put together from all ranks' files."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from .zero_files import numbers_only

    # It tells of each of its steps, on both.
    with numbers_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
    return state


def _partly_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


def convert(folder: Path, into: Path) -> None:
    """Make a checkpoint loadable on another number of processes (DeepSpeed's universal checkpoint).

    Args:
        folder: a checkpoint.
        into: a new folder.
    """
    from deepspeed.checkpoint import ds_to_universal

    from .zero_files import numbers_only

    ds_to_universal.tqdm = SimpleNamespace(tqdm=_counted)  # its bars
    (into / _TAG).mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(folder / _TAG),
        output_folder=str(into / _TAG),
        num_extract_workers=1,  # more would be child processes, which cost more than they save here
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), numbers_only():
        ds_to_universal.main(options)


def _counted(parts: Sequence[T]) -> Iterator[T]:
    with stage("converting the checkpoint", len(parts), "part") as bar:
        for part in parts:
            yield part
            bar.advance()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """DeepSpeed warns on every process that a converted checkpoint is not split by tensor parallelism."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
