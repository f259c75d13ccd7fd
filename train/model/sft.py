"""The weights of full fine-tuning: a diffusers ``transformer`` folder, written, loaded, compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.errors import ModelError
from cogcommon.files.atomic import temporary_beside
from cogcommon.files.ownership import replace_folder
from cogcommon.files.typed import parse_object
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.copies import move
from cogcommon.model.weights import load_part

from .compare import check_answer
from .finite import refuse_to_write

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

FOLDER = "transformer"  # a diffusers folder
A_TRANSFORMER = "a transformer"  # what made its files


def state_dict(
    transformer: torch.nn.Module,
    dtype: torch.dtype,
    read: Callable[[torch.nn.Parameter], torch.Tensor] | None = None,
    *,
    keep: bool = True,
) -> dict[str, torch.Tensor]:
    """Every weight in ``dtype``, on the CPU.

    Args:
        dtype: of the file; the masters are rounded to it once.
        read: gives a weight whole; under ZeRO the ranks hold parts, and all of them call this.
        keep: false on ranks that only help to gather; they get an empty dict.

    Raises:
        RunError: a weight is not finite, or not in ``dtype``.
    """
    state = {}
    for name, parameter in transformer.named_parameters():
        weight = read(parameter) if read else parameter.detach()
        if keep:
            assert weight.numel(), "a part of a weight: it must be gathered"
            state[name] = weight.to("cpu", dtype, copy=True).contiguous()
    refuse_to_write(state.values(), f"the weights, in {str(dtype).removeprefix('torch.')}, are")
    return state


def save(state: Mapping[str, torch.Tensor], checkpoint: Checkpoint, folder: Path) -> Path:
    """Write ``transformer/`` in a folder, whole or not at all; an older one is replaced.

    Args:
        state: from `state_dict`.

    Returns:
        The transformer folder.
    """
    transformer = checkpoint.load_transformer(next(iter(state.values())).dtype)
    result = transformer.load_state_dict(dict(state), strict=False, assign=True)
    # Position tables are buffers: never trained, and in the file as the checkpoint has them.
    assert not result.unexpected_keys, result
    assert set(result.missing_keys) <= {name for name, _ in transformer.named_buffers()}, result
    target = folder / FOLDER
    scratch = temporary_beside(target)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        transformer.save_pretrained(scratch, max_shard_size="5GB")
        replace_folder(scratch, target, A_TRANSFORMER)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)  # where the disk is full, others need the room
        raise
    return target


def load(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """A tuned transformer.

    Raises:
        ModelError: damaged, or not of this checkpoint.
    """
    try:
        config = parse_object((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tuned transformer has no config.json that can be read: {error}",
            where=str(folder),
            fix="give the `transformer` folder of a run",
        ) from error
    for key, ours in checkpoint.transformer_config.items():
        if not key.startswith("_") and config.get(key) != ours:
            raise ModelError(
                f"this transformer is not one of {checkpoint.name}: {key} is {config.get(key)}, there {ours}",
                where=str(folder / "config.json"),
                fix="give the --model that it was trained from",
            )
    return load_part(folder, "transformer", str(folder), torch_dtype=dtype)


def check(
    folder: Path,
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    device: torch.device,
) -> float:
    """Load the folder as anyone would, and compare weights bit for bit and one forward pass.

    Args:
        state: what was written.
        expected: `output_on_noise` of the live model.

    Returns:
        As `check_answer`.

    Raises:
        RunError: the folder does not give the model that was trained.
    """
    import torch

    dtype = next(iter(state.values())).dtype
    transformer = load(folder, checkpoint, dtype)
    weights = dict(transformer.named_parameters())
    wrong = [name for name, weight in state.items() if not torch.equal(weights[name], weight)]
    move(transformer, device)
    return check_answer(transformer, wrong, expected, dtype, what="transformer", where=folder)
