"""Which device and number type the work runs on."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..libraries import importing
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
    with importing():
        import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def start_gpu(device: torch.device) -> None:
    """Begin to start CUDA, cuBLAS and cuDNN, beside what this thread does next: to import takes as long."""
    if device.type == "cuda":
        threading.Thread(target=_start_gpu, args=(device,), daemon=True).start()


def _start_gpu(device: torch.device) -> None:
    import torch

    with suppress(RuntimeError):  # the first to use the GPU for something says what is wrong with it
        square = torch.ones(64, 64, device=device)
        picture, kernel = (square @ square)[None, None], square[None, None, :3, :3]
        torch.nn.functional.conv2d(picture, kernel).sum().item()


def visible_gpus() -> int:
    """GPUs of this host that this process may use; asking starts CUDA at most as far as its driver.

    What has nothing to do for a GPU ends before torch is imported, which takes seconds where torch knows CUDA.
    """
    names = None if "torch" in sys.modules else _gpus_by_driver()
    if names is not None:
        found = len(names)
    else:
        import torch

        found = torch.cuda.device_count()
    if not found:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as `pick_device`, for whoever imports a library before it
    return found


def device_type() -> str:
    """Of what models run on here, as torch calls it: "cuda" or "cpu". As `visible_gpus`."""
    return "cuda" if visible_gpus() else "cpu"


def gpu_name() -> str | None:
    """The driver's name of the first GPU; None without one."""
    names = None if "torch" in sys.modules else _gpus_by_driver()
    if names is not None:
        return names[0] if names else None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE: the driver is here, and no card, or none that may be seen


@cache
def _gpus_by_driver() -> tuple[str, ...] | None:
    """Names of the GPUs that torch would find, asked of the driver as torch does; None where torch must say it."""
    package = find_spec("torch")
    versions = Path(package.origin).with_name("version.py") if package and package.origin else None
    if versions is None or not versions.is_file():
        return None
    built = dict(re.findall(r"^(\w+)(?::[^=\n]*)? = (?:'([^']*)'|None)$", versions.read_text("utf-8"), re.MULTILINE))
    if built.get("cuda") is None or built.get("hip") or built.get("xpu"):
        return None
    if not built["cuda"]:
        return ()  # built without CUDA
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, can, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    started = driver.cuInit(0)
    if started == _NO_DEVICE:
        return ()
    if started or driver.cuDriverGetVersion(ctypes.byref(can)) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    if can.value // 1000 < int(built["cuda"].split(".")[0]):
        return None  # an old driver, which torch may or may not take
    names = []
    for number in range(count.value):  # a device's handle is its number
        if driver.cuDeviceGetName(name, len(name), number):
            return None
        names.append(name.value.decode(errors="replace"))
    return tuple(names)


def default_precision(family: Family, device: torch.device | str) -> Precision:
    """The family's own on a GPU; fp32 on a CPU, where half precision saves memory but seldom time.

    Args:
        device: or its type.
    """
    return family.precision if is_gpu(device) else "fp32"


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device is a GPU, or its type says so."""
    return str(device).startswith("cuda")


# Of a GPU's name, or "this GPU".
EMULATED = (
    "{} has no bf16 in hardware (it came with Ampere): torch emulates it, many times as slowly; --precision fp16 is "
    "2B's own, and for the others, which were trained in bf16, to be tried"
)


def has_bf16(device: torch.device | str) -> bool:
    """Whether bf16 is computed in hardware; so it is where we cannot ask, as of a type alone."""
    if isinstance(device, str):
        return True
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
