"""What trials on this machine's GPU have shown, kept in the user's cache: no start compiles and compares it again.

A verdict holds while the GPU, its driver, the libraries and our own sources stay what they were. Only what works is
kept: a fault is looked for anew at each start, for somebody may have mended it. ``$COGTUNE_CACHE/trials/`` has a small
file for each GPU with its libraries; it may be removed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.files.atomic import commit_bytes
from cogcommon.files.typed import parse_object
from cogcommon.model.tiny import cache_root

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("torch", "triton", "flash-attn-4", "diffusers", "peft")
_DRIVER = Path("/proc/driver/nvidia/version")


def recalled(what: str, facts: Mapping[str, str], trial: Callable[[], str]) -> str:
    """What ``trial`` gives, without making it where it has succeeded before and no fact has changed since.

    Args:
        what: is tried, and with what.
        facts: all that its outcome depends on; empty: nothing is kept.
        trial: says what works; empty if nothing does.
    """
    file = _file(facts)
    known: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(parse_object(file.read_bytes()))
    if facts and (verdict := known.get(what)) and isinstance(verdict, str):
        return verdict
    found = trial()
    if facts and found:
        with contextlib.suppress(OSError):  # no room, no permission: tried again the next time
            file.parent.mkdir(parents=True, exist_ok=True)
            commit_bytes(file, json.dumps({**known, what: found, "facts": dict(facts)}).encode())
    return found


def forget(facts: Mapping[str, str]) -> None:
    """Believe nothing of it any more: what was tried has failed."""
    with contextlib.suppress(OSError):
        _file(facts).unlink()


def _file(facts: Mapping[str, str]) -> Path:
    named = json.dumps(dict(facts), sort_keys=True).encode()
    return cache_root() / "trials" / f"{hashlib.sha256(named).hexdigest()[:24]}.json"


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
        "compiler": shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc") or "",
        "sources": _digest(sorted(sources.glob("*.py"))),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:24]
