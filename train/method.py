"""LoRA or full fine-tuning: the one place that asks.

What differs is which weights are trained, in which type they are held, and what
is exported. Everything else is the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cogcommon.checkpoint import Checkpoint

from . import lora
from .settings import LoraSettings, TrainSettings
from .strategy import Runtime

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel


class Method(Protocol):
    """How a transformer is made ready to be trained, and what comes of it."""

    name: str
    full: bool  # every weight is trained

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        """The type in which the checkpoint's weights are loaded, to compute in ``dtype``."""
        ...

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Choose the weights to train."""
        ...

    def facts(self) -> dict[str, Any]:
        """Settings without which its checkpoints do not fit, by option."""
        ...

    def export(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: dict[str, str]
    ) -> Path | None:
        """Write the weights; every rank calls it, rank 0 writes.

        Returns:
            What was written, on rank 0.
        """
        ...


class Lora:
    """Adapters beside the linear layers; the base stays as it is, in the type that is computed in.

    An fp32 base would cost 20.8 GiB instead of 10.4 for 5B.
    """

    name = "lora"
    full = False

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.alpha = settings.rank / 2 if settings.alpha is None else settings.alpha

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        return dtype

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        settings = self.settings
        lora.attach(
            transformer, settings.rank, self.alpha, settings.target_modules, settings.lora_dropout, seed=settings.seed
        )

    def facts(self) -> dict[str, Any]:
        return {
            "--rank": self.settings.rank,
            "--alpha": self.alpha,
            "--target-modules": sorted(self.settings.target_modules),
        }

    def export(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: dict[str, str]
    ) -> Path | None:
        state = lora.state_dict(runtime.plain(model), runtime.full_weight())
        if not runtime.main:
            return None
        return lora.save(state, folder, facts | {"rank": str(self.settings.rank), "alpha": f"{self.alpha:g}"})


class Sft:
    """Every weight; held in fp32, by DDP in the model itself, by ZeRO in the optimizer."""

    name = "sft"
    full = True

    def weight_dtype(self, dtype: torch.dtype, sharded: bool) -> torch.dtype:
        import torch

        return dtype if sharded else torch.float32

    def apply(self, transformer: CogVideoXTransformer3DModel) -> None:
        transformer.requires_grad_(True)

    def facts(self) -> dict[str, Any]:
        return {}

    def export(
        self, runtime: Runtime, model: torch.nn.Module, checkpoint: Checkpoint, folder: Path, facts: dict[str, str]
    ) -> Path | None:
        raise NotImplementedError


def method_of(settings: TrainSettings) -> Method:
    return Lora(settings) if isinstance(settings, LoraSettings) else Sft()
