"""Which device and number type the work runs on; and libraries that keep quiet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from ..cli.progress import stage
from .families import Family

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
Dtype = Literal["float32", "bfloat16", "float16"]

# As the command line says it, and as torch and the shards' contract do.
DTYPES: Mapping[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this rank, or the CPU. Call it before any model is loaded.

    It also tells DeepSpeed, which diffusers and transformers import on their
    own, that there is no GPU; otherwise DeepSpeed logs its guess to stdout.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def visible_gpus() -> int:
    """GPUs of this host that this process may use; asking does not start CUDA."""
    import torch

    return torch.cuda.device_count()


def default_precision(family: Family, device: torch.device) -> Precision:
    """The family's own on a GPU; fp32 on a CPU, where half precision saves memory but seldom time."""
    return family.precision if device.type == "cuda" else "fp32"


# Of a GPU's name, or "this GPU".
EMULATED = (
    "{} has no bf16 in hardware (it came with Ampere): torch emulates it, many times as slowly; --precision fp16 is "
    "2B's own, and for the others, which were trained in bf16, to be tried"
)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed in hardware; so it is where we cannot ask."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def dtype_of(precision: Precision | Dtype) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES.get(precision, precision))
    return dtype


def item_bytes(dtype: Dtype) -> int:
    """Bytes of one number."""
    return 4 if dtype == "float32" else 2


@stage("loading the libraries")
def quiet_libraries() -> None:
    """Switch off the progress bars and chatter of transformers and diffusers; we draw our own."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
