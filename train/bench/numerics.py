"""How far the fast step's loss and gradients are from fp32, beside how far the plain bf16 loop's are.

Four layers of the true width on one batch. Random weights have no outliers, and
say nothing about quantised ones; nothing here is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogcommon.families import Resolution

from .. import lora
from ..data import Batch
from ..inputs import Objective
from ..step.engine import Engine
from ..step.keep import Keep
from ..step.plan import Plan
from ..step.trial import compiler_fault
from .rows import Row
from .subject import RandomCheckpoint, random_checkpoint

if TYPE_CHECKING:
    import torch

_BUCKET = Resolution(17, 256, 384)
_LAYERS = 4


def numerics(row: Row, device: torch.device) -> Mapping[str, Any]:
    """Relative error of the loss and of all gradients together, against fp32."""
    import torch

    layers, rank = 3 if row.small else _LAYERS, row.rank or 128
    checkpoint = random_checkpoint(row.family, {**row.shape, "num_layers": layers})
    bucket = row.bucket if row.small else _BUCKET
    objective = Objective.of(checkpoint)
    batch = _batch(checkpoint, objective, bucket, device)
    exact = _gradients(checkpoint, objective, batch, device, torch.float32, None, rank)
    found = {"plain bf16": _against(exact, _gradients(checkpoint, objective, batch, device, torch.bfloat16, None,
                                                      rank))}  # fmt: skip
    compiled = compiler_fault(device) is None
    ways: tuple[tuple[Keep, bool], ...] = (("attention", True), ("matmuls", False))
    for keep, moved in ways:
        plan = Plan((keep,) * layers, park=moved, stream=moved, chunks=4 if moved else 1, compiled=compiled)
        name = f"{keep}{', from host memory' if moved else ''}"
        got = _gradients(checkpoint, objective, batch, device, torch.bfloat16, plan, rank)
        found[name] = _against(exact, got)
        print(name, found[name], flush=True)
    return {"numerics": found}


def _batch(checkpoint: RandomCheckpoint, objective: Objective, bucket: Resolution, device: torch.device) -> Batch:
    import torch

    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = checkpoint.transformer_config
    grid = (16, bucket.latent_height, bucket.latent_width)
    return Batch(
        keys=("sample",),
        shards=("none",),
        latent_BFCHW=normal(1, bucket.latent_frames, *grid),
        noise_BFCHW=normal(1, objective.padded_frames(bucket.latent_frames), *grid),
        timestep_B=torch.tensor([500]),
        text_BLD=normal(1, config["max_text_seq_length"], config["text_embed_dim"]),
        image_BFCHW=normal(1, 1, *grid) if checkpoint.family.task == "i2v" else None,
    ).to(device)


def _gradients(
    checkpoint: RandomCheckpoint, objective: Objective, batch: Batch, device: torch.device, dtype: torch.dtype,
    plan: Plan | None, rank: int,
) -> tuple[float, torch.Tensor]:  # fmt: skip
    """Loss and all gradients in one vector, twice over: the second pass meets used buffers. ``plan`` None: plainly."""
    import torch

    transformer = checkpoint.load_transformer(torch.bfloat16)  # the same rounded weights for all
    transformer.to(dtype)
    lora.attach(transformer, rank, rank / 2)
    generator = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # B is zero at first, and A would have no gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    transformer.train()
    if plan is None:
        transformer.to(device)
    else:
        engine = Engine(transformer, plan, device, dtype)
        engine.park_all()
    for _ in range(2):
        transformer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=plan is None and dtype != torch.float32):
            loss = objective.losses(transformer, batch, dtype).mean()
        loss.backward()
    gradients = [parameter.grad for parameter in transformer.parameters() if parameter.requires_grad]
    vector = torch.cat([gradient.float().flatten().cpu() for gradient in gradients if gradient is not None])
    return float(loss.detach()), vector


def _against(exact: tuple[float, torch.Tensor], got: tuple[float, torch.Tensor]) -> dict[str, float]:
    return {
        "loss": abs(got[0] - exact[0]) / exact[0],
        "gradients": float((got[1] - exact[1]).norm() / exact[1].norm()),
    }
