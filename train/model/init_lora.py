"""Begins a run's adapters with those of a LoRA file, of whatever rank, alpha and tool (``--init-lora``).

The adapters add to each weight what the file adds, whatever the run's own scale. A smaller rank is filled up: the new
rows of A are drawn as ever, the new columns of B are zero. A larger one is cut to the nearest matrix of the run's rank
(the largest singular values).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cogcommon.errors import SettingError
from cogcommon.words import counted

from .lora import ADAPTER, adapted, targets
from .lora_file import LoraFile
from .lora_names import PREFIX

if TYPE_CHECKING:
    import torch


def check_init(file: LoraFile, transformer: torch.nn.Module, target_modules: list[str]) -> None:
    """Refuse a file that changes layers which the run does not train.

    Args:
        transformer: a plain one, perhaps without memory.

    Raises:
        SettingError: with the layers to train.
    """
    ours = targets(transformer, target_modules)
    theirs = layers_of(file)
    if left := sorted(theirs - ours.keys()):
        ends = [name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in left]
        ends = sorted({end.removeprefix("attn1.") for end in ends})
        raise SettingError(
            f"the file changes {counted(len(left), 'layer')} that this run would not train, such as {left[0]}",
            where=f"--init-lora {file.path}",
            fix="--target-modules " + " ".join(dict.fromkeys([*target_modules, *ends])),
        )


def layers_of(file: LoraFile) -> set[str]:
    return {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in file.state}


def begin_with(file: LoraFile, transformer: torch.nn.Module) -> str:
    """Set adapters that have just been attached to what a file adds; what was done, in words."""
    import torch

    kept, new, rank = 1.0, 0, 0
    with torch.no_grad():
        for name, layer in adapted(transformer):
            a = file.state.get(f"transformer.{name}.lora_A.weight")
            if a is None:
                new += 1
                continue
            b = file.state[f"transformer.{name}.lora_B.weight"]
            into_a, into_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            rank = len(into_a)
            if len(a) > rank:
                a, b, share = cut_to(a, b, rank)
                kept = min(kept, share)
            into_a[: len(a)] = a
            into_b[:, : len(a)] = b / layer.scaling[ADAPTER]
    said = f"begins with {file}"
    if file.rank < rank:
        said += f"; filled up to rank {rank} with zeros"
    if file.rank > rank:
        said += f"; cut to rank {rank}: every layer keeps at least {100 * kept:.1f}% of what it adds (SVD)"
    return said + (f"; {counted(new, 'layer')} that the file does not change begin anew" if new else "")


def cut_to(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The pair of a smaller rank whose product is nearest to ``b @ a``, and the share of its norm that is kept.

    Args:
        a: (more, in).
        b: (out, more).

    Returns:
        (rank, in) and (out, rank), their columns and rows equally long; 0 to 1.
    """
    import torch

    left, of_b = torch.linalg.qr(b.double())
    right, of_a = torch.linalg.qr(a.double().T)
    u, sizes, vh = torch.linalg.svd(of_b @ of_a.T)  # (more, more): cheap
    root = sizes[:rank].sqrt()
    share = float(sizes[:rank].norm() / sizes.norm()) if sizes[0] > 0 else 1.0
    return (root[:, None] * (vh[:rank] @ right.T)).float(), ((left @ u[:, :rank]) * root).float(), share


@contextmanager
def without(model: torch.nn.Module) -> Iterator[None]:
    """Inside the ``with`` the adapters add nothing: B is zero, in whatever parts a process holds it."""
    parts = [
        part
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_B." in name
        for part in (parameter.data, getattr(parameter, "ds_tensor", None))  # DeepSpeed's share of it
        if part is not None
    ]
    before = [part.clone() for part in parts]
    for part in parts:
        part.zero_()
    try:
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            part.copy_(values)
