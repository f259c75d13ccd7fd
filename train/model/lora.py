"""LoRA on the transformer, and its file: fp32, in diffusers' keys, with the scale folded in.

A LoRA layer computes ``W x + alpha/rank * B A x``; the other kinds of adapters
differ in the scale (`adapters`). The file that diffusers and ComfyUI load has no reliable
place for alpha: most loaders take it to be the rank, and the adapter acts
rank/alpha times too strongly. So the file holds ``scale B``, which is
exact with every loader. Stored as fp32; bf16 would cost 1.7e-4.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError
from cogcommon.files.atomic import honour_umask, whole
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.copies import move

from ..settings.training import TARGET_MODULES, AdapterName
from .adapters import ADAPTERS
from .compare import check_answer
from .finite import refuse_to_write
from .lora_file import FACTS, read_lora
from .lora_file import FILE as FILE
from .lora_names import PREFIX, comfyui_name

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

ADAPTER = "default"


def attach(
    transformer: CogVideoXTransformer3DModel,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] = TARGET_MODULES,
    dropout: float = 0.0,
    *,
    seed: int = 42,
    adapter: AdapterName = "lora",
) -> None:
    """Freeze the transformer and put fp32 adapters of rank ``rank`` beside its linear layers.

    B starts at zero; each A has its own generator, seeded by its name,
    so that every rank and every run begins with the same weights.

    Args:
        target_modules: names, or ends of names, of linear layers.
        dropout: of the adapters' input, 0 to 1.
        adapter: their kind; it says how ``alpha`` scales them.

    Raises:
        SettingError: a target that the transformer does not have.
    """
    import torch
    from peft import LoraConfig

    assert rank >= 1 and alpha > 0 and 0 <= dropout < 1  # LoraSettings
    check_targets(transformer, target_modules)
    transformer.requires_grad_(False)
    plain = ADAPTERS[adapter].plain_alpha(alpha, rank)
    with torch.device("meta"):  # peft would draw numbers for A and B, in one thread (5B, rank 128: 2.4 s)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=plain, lora_dropout=dropout, target_modules=list(target_modules)), ADAPTER
        )

    def begin(named: tuple[str, Any]) -> None:
        name, layer = named
        # In fp32, whatever the base's type: bf16 weights would lose updates smaller than 2^-9 of themselves.
        a, b = (side[ADAPTER].to_empty(device="cpu").float().weight for side in (layer.lora_A, layer.lora_B))
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(a.shape[1])  # as torch.nn.Linear starts
        with torch.no_grad():
            a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) * bound)
            b.zero_()

    with ThreadPoolExecutor() as pool:
        list(pool.map(begin, adapted(transformer)))


def check_targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> None:
    """Refuse a layer that the transformer, which may be one without memory, does not have.

    Raises:
        SettingError: with the layers of a block.
    """
    block = "transformer_blocks.0."
    known = sorted(name.removeprefix(block) for name in _linear(transformer) if name.startswith(block))
    for target in target_modules:
        if not targets(transformer, [target]):
            raise SettingError(
                f"the transformer has no linear layer called {target!r}",
                where="--target-modules",
                fix="layers of a block: " + ", ".join(known),
            )
    if not target_modules:
        raise SettingError("no layer gets an adapter", where="--target-modules", fix="some of " + ", ".join(known))


def targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """The linear layers, by name, that get an adapter."""
    return {
        name: layer
        for name, layer in _linear(transformer).items()
        if any(name == target or name.endswith("." + target) for target in target_modules)
    }


def _linear(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    import torch

    return {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}


def adapted(transformer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def state_dict(
    transformer: torch.nn.Module,
    read: Callable[[torch.nn.Parameter], torch.Tensor] | None = None,
    *,
    keep: bool = True,
) -> dict[str, torch.Tensor]:
    """The adapters as the file holds them: fp32, on the CPU, the scale folded into B.

    Args:
        read: gives a weight whole; under ZeRO the ranks hold parts, and all of them call this.
        keep: false on ranks that only help to gather; they get an empty dict.

    Raises:
        RunError: a weight is not finite.

    Returns:
        ``transformer.<layer>.lora_A.weight`` (rank, in) and ``...lora_B.weight`` (out, rank).
    """
    import torch

    state: dict[str, torch.Tensor] = {}
    for name, layer in adapted(transformer):
        for side in ("lora_A", "lora_B"):
            parameter = getattr(layer, side)[ADAPTER].weight
            weight = read(parameter) if read else parameter.detach()
            if not keep:
                continue
            weight = weight.to("cpu", torch.float32, copy=True)
            assert weight.ndim == 2 and weight.numel(), "a part of a weight: it must be gathered"
            if side == "lora_B":
                weight *= layer.scaling[ADAPTER]
            state[f"{PREFIX}{name}.{side}.weight"] = weight.contiguous()
    assert state or not keep, "no adapters attached"
    refuse_to_write(state.values(), "the adapters' weights are")
    return state


def file_state(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """What `state_dict` gives, out of the trained weights under the transformer's own names.

    Args:
        scale: of the adapters.
    """
    return {
        f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": weight * scale if ".lora_B." in name else weight
        for name, weight in weights.items()
    }


def save(state: Mapping[str, torch.Tensor], folder: Path, facts: Mapping[str, str], name: str = FILE) -> Path:
    """Write a LoRA file, whole or not at all.

    Args:
        state: from `state_dict`, or `for_comfyui` of it.
        facts: what the reader should know (``base_model``, ``family``, ``adapter``,
            ``rank``, ``alpha``, ...); kept in the file's metadata under a name of ours.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        save_file(dict(state), temporary, metadata(facts))
        honour_umask(temporary)
    return path


def metadata(facts: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file with facts that `lora_file.read_facts` reads."""
    return {"format": "pt", FACTS: json.dumps(dict(facts), sort_keys=True)}


def for_comfyui(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `state_dict` with the names of ComfyUI's own CogVideoX: ``diffusion_model.blocks.0.q.lora_A.weight``."""
    named = {}
    for name, tensor in state.items():
        layer, side = name.removeprefix(PREFIX).rsplit(".lora_", 1)
        named[f"{comfyui_name(layer)}.lora_{side}"] = tensor
    return named


def load(file: Path, checkpoint: Checkpoint, transformer: CogVideoXTransformer3DModel) -> None:
    """Put a LoRA file, of whatever tool, onto a plain transformer, as diffusers' pipelines do; adapters in fp32.

    Raises:
        ModelError: not a LoRA file, or one for another model.
    """
    import torch

    state = read_lora(file, checkpoint, transformer).state
    transformer.load_lora_adapter(dict(state), prefix="transformer", adapter_name=ADAPTER, low_cpu_mem_usage=True)
    with torch.no_grad():
        for name, layer in adapted(transformer):
            # diffusers has just rounded them to the base's type.
            for side, linear in (("lora_A", layer.lora_A[ADAPTER]), ("lora_B", layer.lora_B[ADAPTER])):
                linear.float().weight.copy_(state[f"{PREFIX}{name}.{side}.weight"])


def merge(transformer: CogVideoXTransformer3DModel) -> None:
    """Add the adapters into the weights and take them off. Sums in fp32, then rounds once."""
    import torch

    with torch.no_grad():
        for _, layer in adapted(transformer):
            weight = layer.get_base_layer().weight
            delta = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
            weight.copy_(weight.float() + layer.scaling[ADAPTER] * delta)
    transformer.unload_lora()


def check(
    file: Path,
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Load the file into a fresh transformer of the same checkpoint; compare what acts, and one forward pass.

    Args:
        state: the live model's `state_dict`.
        expected: `output_on_noise` of the live model, taken with its base in ``dtype`` on ``device``.

    Returns:
        As `check_answer`.

    Raises:
        RunError: the file does not give the model that was trained.
    """
    transformer = checkpoint.load_transformer(dtype)
    move(transformer, device)
    return check_on(transformer, file, checkpoint, state, expected, dtype)


def check_on(
    transformer: CogVideoXTransformer3DModel,
    file: Path,
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    dtype: torch.dtype,
    wrong: Sequence[str] = (),
) -> float:
    """`check` on a transformer without adapters that is there already; the file's adapters stay on it.

    Args:
        wrong: weights of it that are known to be others than the checkpoint's.
    """
    device = next(transformer.parameters()).device
    load(file, checkpoint, transformer)
    wrong = [*wrong, *acting_otherwise(transformer, state)]
    return check_answer(transformer.to(device), wrong, expected, dtype, what="LoRA", where=file)


def take_off(transformer: CogVideoXTransformer3DModel) -> None:
    """Make a transformer that was trained a plain one again: no adapters, every forward method its class's own."""
    transformer.unload_lora()
    for module in transformer.modules():
        module.__dict__.pop("forward", None)  # of the block engine, and of accelerate's wrapper
    transformer.requires_grad_(False)


def acting_otherwise(transformer: CogVideoXTransformer3DModel, state: Mapping[str, torch.Tensor]) -> list[str]:
    """The adapters of a transformer that are not those of a `state_dict`, with the scale that a loader gave them.

    They are compared where the transformer is.
    """
    differing, acting = [], set()
    for name, layer in adapted(transformer):
        for side, scale in (("lora_A", 1.0), ("lora_B", layer.scaling[ADAPTER])):
            weight, key = getattr(layer, side)[ADAPTER].weight.detach().float(), f"{PREFIX}{name}.{side}.weight"
            acting.add(key)
            if key in state and not _equal(weight * scale, state[key].to(weight.device)):
                differing.append(key)
    return sorted([*differing, *(acting ^ state.keys())])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the rounding of a scale."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())
