"""What trials on this machine's GPU have shown, kept in the user's cache: no start compiles and compares it again.

A verdict holds while the GPU, its driver, the libraries and our own sources stay what they were, and no block has
failed (`BlockEngine`). Only what works is kept: a fault is looked for anew at each start, for somebody may have mended
it. ``$COGTUNE_CACHE/trials/`` has a small file for each GPU with its libraries; it may be removed at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.files.hashes import sha256_of
from cogcommon.model.remembered import CacheFile

if TYPE_CHECKING:
    import torch

# FlashAttention 4 is compiled at its first call by libraries that may be upgraded without it, and no longer fit then.
_LIBRARIES = (
    "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi", "diffusers", "peft",
)  # fmt: skip
_DRIVER = Path("/proc/driver/nvidia/version")


def recalled(what: str, facts: Mapping[str, str], trial: Callable[[], str]) -> str:
    """What ``trial`` gives, without making it where it has succeeded before and no fact has changed since.

    Args:
        what: is tried, and with what.
        facts: all that its outcome depends on; empty: nothing is kept.
        trial: says what works; empty if nothing does.
    """
    if not facts:
        return trial()
    file = _file(facts)
    if (verdict := file.read().get(what)) and isinstance(verdict, str):
        return verdict
    if found := trial():  # which takes seconds, in which other processes of the run have written what they found
        file.write({**file.read(), what: found, "facts": dict(facts)})
    return found


def forget(facts: Mapping[str, str]) -> None:
    """Believe nothing of it any more: what was tried has failed."""
    _file(facts).remove()


def _file(facts: Mapping[str, str]) -> CacheFile:
    return CacheFile("trials", json.dumps(dict(facts), sort_keys=True))


@cache
def gpu_facts(device: torch.device, sources: Path) -> Mapping[str, str]:
    """All that the outcome of a trial on a device depends on; of a CPU nothing, as its trials take no time.

    Args:
        sources: a folder of our own files that are tried.
    """
    import torch

    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    driver = ""
    with contextlib.suppress(OSError):
        driver = _DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return {
        "gpu": f"{properties.name}, {properties.major}.{properties.minor}, {properties.multi_processor_count}",
        "driver": driver,
        "built": f"CUDA {torch.version.cuda} cuDNN {torch.backends.cudnn.version()}",
        "libraries": ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
        "python": platform.python_version(),
        "compiler": shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc") or "",
        "sources": ", ".join(f"{file.name} {sha256_of(file)}" for file in sorted(sources.glob("*.py"))),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
