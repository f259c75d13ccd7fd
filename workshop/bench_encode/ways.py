"""Ways of the fused encoder, none and all, and how its steps are launched, one by one.

``python -m workshop.bench_encode.ways FOLDER SIZE SECONDS``: one process measures them all, because they share cuDNN's
choices. Prints JSON lines: a row for each way as `workshop.bench_encode.vae` prints it for a lever, GPU kernels of a
clip, then what steps and convolutions reach alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogprep.vae import convolve
from cogprep.vae.chunks import Chunks, Together
from cogprep.vae.fused import FusedEncoder, Ways
from cogprep.vae.kernels import TritonKernels

from .shape import SHAPES, Folder, Shape, Size
from .vae import picture, profile, timed

_ALL: dict[str, Any] = {"bias_later": True, "first_kernel": True}
_WHOLE = Together(99, 99)


@dataclass(frozen=True)
class Candidate:
    """A way to measure; as it stands, what encodes take when nothing is changed."""

    name: str
    ways: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    together: Together = Together()
    graph: bool = False


CANDIDATES = (
    Candidate("one by one"),
    Candidate("everything", _ALL, {}, _WHOLE),
    Candidate("everything, blocks of 2048", _ALL, {"block": 2048}, _WHOLE),
    Candidate("everything, 8 programs a sum", _ALL, {"per_sm": 8}, _WHOLE),
    Candidate("everything, again", _ALL, {}, _WHOLE),
    Candidate("everything, as a CUDA graph", _ALL, {}, _WHOLE, graph=True),
    Candidate("deep together", _ALL, {}, Together(1, 99)),
)
_PROFILED = ("everything",)


def measure(folder: Folder, shape: Shape, seconds: float) -> Iterator[dict[str, object]]:
    """Measure each candidate while there is time."""
    deadline = time.monotonic() + seconds
    device = pick_device()
    quiet_libraries()
    vae: Any = open_checkpoint(str(folder.model)).load_vae(torch.bfloat16).to(device)
    vae.disable_tiling()
    frames = max(shape.frames, 2 * vae.num_sample_frames_batch_size + 1)
    clip_1CFHW = picture(frames, shape.height, shape.width).to(device, torch.bfloat16)
    exact = _exact(folder, clip_1CFHW)
    torch.backends.cudnn.benchmark = True
    plain = vae.encoder
    for candidate in CANDIDATES:
        if time.monotonic() > deadline:
            yield {"skipped": candidate.name}
            continue
        try:
            yield from _measure_one(candidate, vae, plain, clip_1CFHW, exact, device)
        except Exception as error:  # the others are worth measuring
            yield {"failed": candidate.name, "why": f"{type(error).__name__}: {error}"[:300]}
    if device.type == "cuda":
        vae.encoder = plain
        yield from _steps_alone(clip_1CFHW, device, deadline)
        yield from _convolutions_alone(clip_1CFHW, device, deadline)


def _exact(folder: Folder, clip_1CFHW: torch.Tensor) -> torch.Tensor:
    """The mean in fp32, of diffusers' encoder."""
    vae: Any = open_checkpoint(str(folder.model)).load_vae(torch.float32).to(clip_1CFHW.device)
    vae.disable_tiling()
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return cast(torch.Tensor, vae.encode(clip_1CFHW.float()).latent_dist.mean.double())
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _measure_one(
    candidate: Candidate, vae: Any, plain: Any, clip_1CFHW: torch.Tensor, exact: torch.Tensor, device: torch.device
) -> Iterator[dict[str, object]]:
    encoder = FusedEncoder(plain, TritonKernels(**candidate.kernels), Ways(**candidate.ways))
    vae.encoder = encoder
    work = _work(candidate, vae, encoder, clip_1CFHW)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    first_s, _ = timed(work, device)
    if candidate.graph:
        work = _captured(work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rest = [timed(work, device) for _ in range(9 if device.type == "cuda" else 1)]
    mean = rest[-1][1].chunk(2, dim=1)[0].double()
    yield {
        "vae": candidate.name,
        "size": "x".join(map(str, clip_1CFHW.shape[2:])),
        "s": statistics.median(seconds for seconds, _ in rest),
        "fastest_s": min(seconds for seconds, _ in rest),
        "first_s": first_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "error": ((mean - exact).norm() / exact.norm()).item(),
    }
    if candidate.name in _PROFILED and device.type == "cuda":
        yield {"profile_of": candidate.name, "ms_by_kernel": profile(work)}


def _work(
    candidate: Candidate, vae: Any, encoder: FusedEncoder, clip_1CFHW: torch.Tensor
) -> Callable[[], torch.Tensor]:
    if candidate.together == Together():
        return lambda: vae.encode(clip_1CFHW).latent_dist.parameters
    return lambda: encoder.clip(clip_1CFHW, vae.num_sample_frames_batch_size, candidate.together)


def _captured(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def _steps_alone(clip_1CFHW: torch.Tensor, device: torch.device, deadline: float) -> Iterator[dict[str, object]]:
    """Steps at the widest layer, eight frames, by the kernels' settings."""
    height, width = clip_1CFHW.shape[3:]
    chunks = Chunks(8)
    x_THWC = torch.randn((8, height, width, 128), device=device).bfloat16()
    other_THWC, out_THWC = torch.randn_like(x_THWC), torch.empty_like(x_THWC)
    bias_C = torch.zeros(128, device=device)
    norm = torch.nn.GroupNorm(32, 128, device=device, dtype=torch.bfloat16)
    pixels_CTHW = torch.rand((3, 10, height, width), device=device).bfloat16()
    weight_3KC = torch.rand((3, 32, 128), device=device).bfloat16()
    one = x_THWC.nbytes

    def steps(kernels: TritonKernels) -> list[tuple[str, Callable[[], object], float]]:
        sums = kernels.sums(x_THWC, bias_C, chunks)
        return [
            ("sums", lambda: kernels.sums(x_THWC, bias_C, chunks), one),
            ("add_", lambda: kernels.add_(x_THWC, bias_C, other_THWC, chunks), 3 * one),
            ("norm_silu", lambda: kernels.norm_silu(x_THWC, bias_C, sums, norm, out_THWC, chunks), 2 * one),
            ("add_pool", lambda: kernels.add_pool(x_THWC, bias_C, other_THWC, halve_time=True), 2.5 * one),
        ]

    launches = ((4096, 4, 4), (4096, 4, 8), (4096, 4, 16), (4096, 8, 4), (2048, 4, 16), (1024, 4, 16), (16384, 8, 2),
        (16384, 8, 3), (16384, 16, 2), (8192, 8, 3))  # fmt: skip
    for block, warps, per_sm in launches:
        if time.monotonic() < deadline:
            for name, work, moved in steps(TritonKernels(block, warps, per_sm)):
                shown = f"{name}, {block} values, {warps} warps, {per_sm} a multiprocessor"
                yield _rate(shown, work, moved, "TB/s")
    for rows, warps, per_sm in ((32, 4, 4), (32, 4, 8), (32, 2, 8), (64, 4, 8)):
        if time.monotonic() < deadline:
            kernels = TritonKernels(per_sm=per_sm, first_rows=rows, first_warps=warps)
            first = lambda k=kernels: k.first(pixels_CTHW, weight_3KC, bias_C, chunks)  # noqa: E731
            yield _rate(f"first, {rows} rows, {warps} warps, {per_sm} a multiprocessor", first, one, "TB/s")


def _convolutions_alone(clip_1CFHW: torch.Tensor, device: torch.device, deadline: float) -> Iterator[dict[str, object]]:
    """Convolutions by layer, of a chunk's frames and of several chunks'."""
    height, width = clip_1CFHW.shape[3:]
    layers = (
        (1, 8, 128, (8, 16)),
        (1, 128, 128, (8, 16)),
        (2, 256, 256, (4, 25)),
        (4, 256, 256, (2, 13)),
        (8, 512, 512, (2, 13)),
    )
    for less, inputs, outputs, lengths in layers:
        for frames in lengths:
            if time.monotonic() > deadline:
                return
            shape = (1, frames + 2, height // less, width // less, inputs)
            input_1THWC = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weight = torch.randn((outputs, inputs, 3, 3, 3), device=device, dtype=torch.bfloat16) / 50
            weight = weight.to(memory_format=torch.channels_last_3d)
            name = f"convolution {inputs} to {outputs}, {frames} frames of {height // less}x{width // less}"
            work = lambda i=input_1THWC, w=weight: convolve.convolve(i, w)  # noqa: E731
            yield _rate(name, work, 54.0 * inputs * outputs * frames * shape[2] * shape[3], "TFLOP/s")


def _rate(name: str, work: Callable[[], object], amount: float, unit: str) -> dict[str, object]:
    device = torch.device("cuda")
    work()
    seconds = statistics.median(timed(work, device)[0] for _ in range(9))
    return {"step": name, "ms": 1000 * seconds, "rate": amount / seconds / 1e12, "unit": unit}


def main(root: str, size: str, seconds: str) -> None:
    with torch.inference_mode():
        for line in measure(Folder(Path(root)), SHAPES[cast(Size, size)], float(seconds)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
