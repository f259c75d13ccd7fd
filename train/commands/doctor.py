"""``cogtrain doctor``: what of this machine matters for encoding and training, and what to do about it."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogcommon.cli.names import json_text
from cogcommon.files.failures import room_of
from cogcommon.files.memory import host_memory_left
from cogcommon.model.device import EMULATED, has_bf16
from cogcommon.model.families import FAMILIES
from cogcommon.model.hub import is_reached
from cogcommon.words import GIB, counted, in_bytes, in_gib

from ..blocks.trial import can_have_flash4, compiler_fault, forget_trials, missing_flash4
from ..memory.cost import PRODUCTS
from ..memory.link import timed_speed
from ..memory.measured import measured

if TYPE_CHECKING:
    import torch

    from ..settings.planning import DoctorSettings

_SHARED = 1 * GIB  # of /dev/shm, what NCCL and decode processes are content with; a container has 64 MB by default
_FILES = 1024  # open files that a run over thousands of shards may need
_DISK = 50e9  # bytes; a checkpoint of 5B, its shards and some room
_HOST = 16 * GIB  # what loading 5B takes, and a little more


@dataclass(frozen=True)
class Diagnosis:
    """One thing of the machine."""

    about: str
    found: str
    verdict: Literal["good", "note", "bad"] = (
        "good"  # note: it works, and could do better; bad: something will not work
    )
    advice: str = ""  # what to do about it


def run(settings: DoctorSettings) -> None:
    """The command."""
    found = list(findings())
    if settings.json:
        print(json_text([dataclasses.asdict(finding) for finding in found]))
        return
    from cogcommon.cli.terminal import Console, styled

    console = Console(soft_wrap=True)
    marks = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("bad", "red")}
    for finding in found:
        mark, style = marks[finding.verdict]
        console.print(styled((f"{mark:5}", style), f"{finding.about:14} {finding.found}"))
        if finding.advice:
            console.print(f"{'':20} {finding.advice}")
    bad = sum(finding.verdict == "bad" for finding in found)
    console.print("\n" + (f"{counted(bad, 'thing')} to put right" if bad else "nothing to put right"))


def findings() -> Iterator[Diagnosis]:
    """All that matters, in the order in which a run needs it."""
    import torch

    yield _torch()
    yield from _bytecode()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _gpu(torch.device("cuda", number))
        yield _compiler(torch.device("cuda", 0))
        yield from _attention(torch.device("cuda", 0))
    else:
        yield _no_gpu()
    yield _host()
    yield _cpp()
    yield _disk()
    yield from _limits()
    yield _hub()
    yield Diagnosis("ffmpeg", "not needed: PyAV brings its own")


def _torch() -> Diagnosis:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
    return Diagnosis("python, torch", f"Python {platform.python_version()}, torch {torch.__version__}, {build}")


def _bytecode() -> Iterator[Diagnosis]:
    """Whether torch, the largest of the libraries, is compiled anew from its sources at each import.

    So it is where packages were installed without .pyc files (``uv``, ``pip --no-compile``) and none may be written. On
    an H200's host torch alone then took 4.8 s and not 2.6.
    """
    import torch

    if not Path(cache_from_source(str(torch.__file__))).exists():
        advice = f"python -m compileall -q {Path(str(torch.__file__)).parents[1]}"
        if sys.dont_write_bytecode:
            advice = f"unset PYTHONDONTWRITEBYTECODE, and once: {advice}"
        yield Diagnosis("start", "libraries have no .pyc files: each command takes seconds longer", "note", advice)


def _no_gpu() -> Diagnosis:
    """Why torch sees no GPU, as far as can be told."""
    import torch

    small = "without one, only the built-in models (--model tiny) are of use"
    if not torch.version.cuda and torch.version.hip is None:
        driver = shutil.which("nvidia-smi") is not None
        advice = "install torch's build for CUDA: pytorch.org/get-started names the command" if driver else small
        return Diagnosis("GPU", "none that torch can use: its build is for CPUs", "bad" if driver else "note", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Diagnosis("GPU", "hidden by CUDA_VISIBLE_DEVICES", "bad", "unset CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return Diagnosis("GPU", "none: there is no driver here", "note", f"in a container: --gpus all; {small}")
    advice = f"run nvidia-smi: the driver must be new enough for CUDA {torch.version.cuda}, or torch older"
    return Diagnosis("GPU", "a driver is here, and torch cannot use it", "bad", advice)


def _gpu(device: torch.device) -> Iterator[Diagnosis]:
    import torch

    about = f"GPU {device.index}"
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    found = f"{name}, {free / GIB:.1f} of {in_gib(total)} free"
    if free < 0.9 * total:
        yield Diagnosis(about, found, "note", "something else holds its memory: nvidia-smi says what")
    else:
        yield Diagnosis(about, found)
    if not has_bf16(device):
        yield Diagnosis(f"{about}, bf16", "none in hardware", "note", EMULATED.format(name))
    half = torch.bfloat16 if has_bf16(device) else torch.float16
    speed = timed_speed(device, half)
    rates = f"{PRODUCTS / speed.relative / 1e12:.0f} TFLOP/s in half precision; copies at {speed.link / 1e9:.0f} GB/s"
    yield Diagnosis(f"{about}, speed", rates)


def _compiler(device: torch.device) -> Diagnosis:
    forget_trials(device)  # who asks wants it looked at now
    fault = compiler_fault(device)
    if fault is None:
        return Diagnosis("torch.compile", "works")
    advice = "install gcc (apt install gcc python3-dev) and Triton (it comes with torch on Linux)"
    return Diagnosis("torch.compile", f"does not work: {fault}", "note", f"steps take half as long again; {advice}")


def _attention(device: torch.device) -> Iterator[Diagnosis]:
    """FlashAttention 4, where the GPU can have it."""
    if not can_have_flash4(device):
        return
    import torch

    missing = missing_flash4(device, torch.bfloat16, compiler_fault(device) is None)
    if missing is None:
        yield Diagnosis("attention", "FlashAttention 4 works")
        return
    gains = ", ".join(f"{name} {slow:.2f} to {fast:.2f} s" for name, slow, fast in flash4_gains())
    advice = f"{missing.fix} is faster; steps on an H200: {gains}"
    yield Diagnosis("attention", f"cuDNN's: FlashAttention 4 {missing.why}", "note", advice)


def flash4_gains() -> list[tuple[str, float, float]]:
    """Measured LoRA steps with cuDNN's attention and with FlashAttention 4: family, seconds, seconds."""
    best: dict[tuple[str, str], float] = {}
    for line in measured():
        if (line.method, line.gpus, line.memory) == ("lora", 1, "fast"):
            key = (line.family, line.attention)
            best[key] = min(line.s_per_step, best.get(key, line.s_per_step))
    names = dict.fromkeys(family for family, _ in best)
    return [
        (name, best[name, "cudnn"], best[name, "flash4"])
        for name in names
        if (name, "cudnn") in best and (name, "flash4") in best
    ]


def _host() -> Diagnosis:
    left = host_memory_left()
    found = f"{in_gib(left.bytes)} free ({left.where})"
    if left.bytes < _HOST:
        return Diagnosis(
            "host memory", found, "note", "loading a 5B takes 11 GiB; `cogtrain plan` says what a run takes"
        )
    return Diagnosis("host memory", found)


def _cpp() -> Diagnosis:
    """DeepSpeed compiles its optimizer for the host at first use; only the -offload strategies need it."""
    missing = [name for name, there in (("g++", shutil.which("g++")), ("ninja", find_spec("ninja"))) if not there]
    if missing:
        advice = "apt install g++; pip install ninja"
        return Diagnosis("C++ compiler", f"no {' and no '.join(missing)}: no -offload strategy", "note", advice)
    return Diagnosis("C++ compiler", "g++ and ninja, for the -offload strategies")


def _disk() -> Diagnosis:
    here = Path.cwd()
    room = room_of(here)
    if room is None:
        return Diagnosis("disk", f"{here}: it cannot be told how much is free")
    found = f"{in_bytes(room)} free in {here}"
    if room < _DISK:
        advice = "--out names another disk; `cogprep validate` and `cogtrain plan` say what they write"
        return Diagnosis("disk", found, "note", advice)
    return Diagnosis("disk", found)


def _limits() -> Iterator[Diagnosis]:
    if sys.platform == "linux" and Path("/dev/shm").is_dir():
        room = shutil.disk_usage("/dev/shm").total
        if room < _SHARED:
            advice = "docker run --shm-size 8g, or --ipc host; several GPUs need it"
            yield Diagnosis("shared memory", f"{in_bytes(room)} in /dev/shm", "note", advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FILES:
        yield Diagnosis("open files", f"at most {files}", "note", "ulimit -n 4096")


def _hub() -> Diagnosis:
    """Which published models are here already, and whether the others can be fetched."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        here = {repo.repo_id for repo in scan_cache_dir().repos}
    except CacheNotFound:
        here = set()
    names = [family.hub_id.split("/")[1] for family in FAMILIES]
    known = sorted(repo for repo in here if repo.split("/")[-1] in names)
    found = f"{', '.join(known) or 'none of the five models'} in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        verdict: Literal["good", "bad"] = "good" if known else "bad"
        return Diagnosis("models", f"{found}; HF_HUB_OFFLINE is set", verdict, "" if known else "unset HF_HUB_OFFLINE")
    if len(known) < len(names) and not is_reached():
        return Diagnosis(
            "models",
            f"{found}; the hub ({constants.ENDPOINT}) cannot be reached",
            "note" if known else "bad",
            "export HF_ENDPOINT=https://... names a mirror; or fetch a model elsewhere, `hf download "
            f"{FAMILIES[0].hub_id} --local-dir FOLDER`, and give --model FOLDER",
        )
    return Diagnosis("models", found, advice="" if known else "they are fetched when first used, 13 to 22 GB each")
