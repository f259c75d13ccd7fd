"""How far the product's loss and gradients are from fp32, beside how far the plain bf16 loop's are.

Two layers of the true width on one batch of the native size, a LoRA's weights trained and all: a compiler may fail
at one size alone. Random weights have no outliers, and say nothing about quantised ones; nothing here is quantised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.model.families import Resolution
from cogtrain.blocks.checkpointing import Checkpointing
from cogtrain.blocks.engine import BlockEngine
from cogtrain.blocks.plan import BlockPlan
from cogtrain.blocks.trial import compiler_fault
from cogtrain.model import lora
from cogtrain.model.batch import Batch
from cogtrain.model.objective import Objective

from .rows import BenchRow
from .subject import RandomCheckpoint, random_checkpoint

if TYPE_CHECKING:
    import torch

_LAYERS = 2


@dataclass(frozen=True)
class _Found:
    """A loss, and the gradient of each weight, fp32, on the CPU."""

    loss: float
    gradients: Mapping[str, torch.Tensor]


def numerics(row: BenchRow, device: torch.device) -> Mapping[str, Any]:
    """Errors of the loss and of all gradients together, relative to fp32, and the weights whose gradients are worst."""
    import torch

    layers = row.layers or (3 if row.small else _LAYERS)
    checkpoint = random_checkpoint(row.family, {**row.shape, "num_layers": layers})
    objective = Objective.of(checkpoint)
    batch = _batch(checkpoint, objective, row.bucket, device)
    found = {}
    for rank in (row.rank or 128, None):
        exact = _found(checkpoint, objective, batch, device, torch.float32, None, rank)
        method = "LoRA" if rank else "SFT"
        for name, plan in _ways(layers, rank is None, compiler_fault(device) is None):
            got = _found(checkpoint, objective, batch, device, torch.bfloat16, plan, rank)
            found[f"{method}, {name}"] = _against(exact, got)
            print(method, name, found[f"{method}, {name}"], flush=True)
    return {"numerics": found}


def _ways(layers: int, full: bool, compiled: bool) -> Iterator[tuple[str, BlockPlan | None]]:
    def each(policy: Checkpointing) -> tuple[Checkpointing, ...]:
        return (policy,) * layers

    yield "plain bf16", None
    yield "attention", BlockPlan(each("attention"), compiled=compiled)
    yield "matmuls", BlockPlan(each("matmuls"), compiled=compiled)
    moved = BlockPlan(
        each("attention"),
        offload_activations=True,
        swap_blocks=not full,
        train_on_cpu=layers if full else 0,
        chunks=4,
        compiled=True,
    )
    yield "from host memory", moved if compiled else moved.uncompiled


def _batch(checkpoint: RandomCheckpoint, objective: Objective, bucket: Resolution, device: torch.device) -> Batch:
    import torch

    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = checkpoint.transformer_config
    channels, frames, *plane = checkpoint.family.latent(bucket)
    grid = (channels, *plane)
    return Batch(
        keys=("sample",),
        shards=("none",),
        latent_BFCHW=normal(1, frames, *grid),
        noise_BFCHW=normal(1, objective.family.padded_frames(frames), *grid),
        timestep_B=torch.tensor([500]),
        text_BLD=normal(1, config["max_text_seq_length"], config["text_embed_dim"]),
        conditions={name: normal(1, 1, *grid) for name in checkpoint.family.conditions},
    ).to(device)


def _found(
    checkpoint: RandomCheckpoint, objective: Objective, batch: Batch, device: torch.device, dtype: torch.dtype,
    plan: BlockPlan | None, rank: int | None,
) -> _Found:  # fmt: skip
    """Of the second of two passes, which meets used buffers. ``plan`` None: plainly; ``rank`` None: all is trained."""
    import torch

    transformer = checkpoint.load_transformer(torch.bfloat16)  # the same rounded weights for all
    if rank:
        transformer.to(dtype)
        lora.attach(transformer, rank, rank / 2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad:  # B is zero at first, and A would have no gradient
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    else:
        transformer.to(torch.float32).requires_grad_()
    transformer.train()
    cpu_training = None
    if plan is None:
        transformer.to(device)
    else:
        engine = BlockEngine(transformer, plan, device, dtype)
        engine.offload_all()
        cpu_training = engine.cpu_training
    for _ in range(2):
        transformer.zero_grad()
        if cpu_training:
            cpu_training.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and (plan is None or not rank)):
            loss = objective.losses(transformer, batch, dtype).mean()
        loss.backward()
    gradients = {parameter: parameter.grad for parameter in transformer.parameters() if parameter.grad is not None}
    if cpu_training:
        cpu_training.arrive()
        gradients |= {weight.master: cpu_training.gradient(weight) for weight in cpu_training}
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    return _Found(float(loss.detach()), {names[at]: gradient.float().cpu() for at, gradient in gradients.items()})


def _against(exact: _Found, got: _Found) -> dict[str, Any]:
    off: dict[str, float] = {}
    square = whole = 0.0
    for name, gradient in exact.gradients.items():
        away, length = float((got.gradients[name] - gradient).norm()), float(gradient.norm())
        square, whole = square + away**2, whole + length**2
        kind = re.sub(r"transformer_blocks\.\d+\.", "", name)
        error = away / max(length, 1e-30)
        off[kind] = max(off.get(kind, 0.0), error if math.isfinite(error) else math.inf)
    worst = sorted(off, key=lambda kind: -off[kind])[:3]
    return {
        "loss": abs(got.loss - exact.loss) / exact.loss,
        "gradients": (square / whole) ** 0.5,
        "worst": {kind: round(off[kind], 4) for kind in worst},
    }
