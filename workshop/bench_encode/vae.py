"""One way to run the VAE's encoder, measured: ``python -m workshop.bench_encode.vae FOLDER SIZE LEVER``.

A lever is a process of its own, because cuDNN's choices last as long as a process.
Prints JSON lines: seconds a clip (median), the first one's, peak memory, and the
distance of the latents' mean from fp32 on whole frames (relative, rms).
"""

from __future__ import annotations

import fcntl
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device

from .shape import SHAPES, Folder, Shape, Size

_LARGE = (81, 768, 1360)  # 1.5's native size
_WAIT_S = 45.0


def plain(vae: Any) -> None:
    vae.disable_tiling()


def tiled(vae: Any) -> None:
    vae.enable_tiling()


def benchmark(_vae: Any) -> None:
    torch.backends.cudnn.benchmark = True


def channels_last(vae: Any) -> None:
    for module in vae.encoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def compiled(vae: Any) -> None:
    channels_last(vae)
    benchmark(vae)
    vae.encoder = torch.compile(vae.encoder, dynamic=False)


def fused(vae: Any) -> None:
    from cogprep.vae.fused import FusedEncoder
    from cogprep.vae.kernels import TritonKernels

    vae.encoder = FusedEncoder(vae.encoder, TritonKernels())


def fused_benchmark(vae: Any) -> None:
    benchmark(vae)
    fused(vae)


def fused_every_kernel(vae: Any) -> None:
    torch.backends.cudnn.benchmark_limit = 0
    fused_benchmark(vae)


# In the order of the table; "exact" makes what the others are compared with.
LEVERS: dict[str, Callable[[Any], None]] = {
    "exact": plain,
    "diffusers, tiled": tiled,
    "diffusers, whole frames": plain,
    "diffusers, cudnn.benchmark": benchmark,
    "diffusers, channels_last_3d": channels_last,
    "diffusers, compiled, channels_last_3d, cudnn.benchmark": compiled,
    "fused": fused,
    "fused, cudnn.benchmark": fused_benchmark,
    "fused, cudnn.benchmark of every kernel": fused_every_kernel,
}


def measure(folder: Folder, shape: Shape, lever: str, runs: int = 5) -> Iterator[dict[str, object]]:
    """Measure one lever; the first line is its row of the table."""
    device = pick_device()
    quiet_libraries()
    vae: Any = open_checkpoint(str(folder.model)).load_vae(torch.float32 if lever == "exact" else torch.bfloat16)
    clip_1CFHW = picture(shape.frames, shape.height, shape.width).to(vae.dtype)
    if lever != "exact":
        _wait_for(folder.exact)
    with _turn(folder.turn), torch.inference_mode():
        vae, clip_1CFHW = vae.to(device), clip_1CFHW.to(device)
        LEVERS[lever](vae)
        if lever == "exact":
            torch.backends.cudnn.allow_tf32 = False
            torch.save(vae.encode(clip_1CFHW).latent_dist.mean.cpu(), folder.exact.with_suffix(".tmp"))
            folder.exact.with_suffix(".tmp").rename(folder.exact)
            return
        first_s, _ = timed(lambda: vae.encode(clip_1CFHW), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rest = [timed(lambda: vae.encode(clip_1CFHW), device) for _ in range(runs)]
        yield {
            "vae": lever,
            "size": shape.resolution,
            "s": statistics.median(seconds for seconds, _ in rest),
            "fastest_s": min(seconds for seconds, _ in rest),
            "first_s": first_s,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            "error": _distance(rest[-1][1].latent_dist.mean, folder.exact),
        }
        if lever == "fused, cudnn.benchmark" and device.type == "cuda":
            yield {"profile_of": lever, "ms_by_kernel": profile(lambda: vae.encode(clip_1CFHW))}


def measure_large(folder: Folder, lever: str) -> Iterator[dict[str, object]]:
    """1.5's native size: the fused encoder beside diffusers' on whole frames, in one process."""
    device = pick_device()
    quiet_libraries()
    vae: Any = open_checkpoint(str(folder.model)).load_vae(torch.bfloat16)
    clip_1CFHW = picture(*_LARGE).to(vae.dtype)
    size = "x".join(map(str, _LARGE))
    with _turn(folder.turn), torch.inference_mode():
        vae, clip_1CFHW = vae.to(device), clip_1CFHW.to(device)
        wanted = None
        for name in ("diffusers, whole frames", lever):
            LEVERS[name](vae)
            first_s, _ = timed(lambda: vae.encode(clip_1CFHW), device)
            torch.cuda.reset_peak_memory_stats()
            seconds, found = timed(lambda: vae.encode(clip_1CFHW), device)
            peak = torch.cuda.max_memory_allocated() / 2**30
            mean = found.latent_dist.mean.double()
            wanted = mean if wanted is None else wanted
            error = ((mean - wanted).norm() / wanted.norm()).item()
            yield {
                "vae": name,
                "size": size,
                "s": seconds,
                "first_s": first_s,
                "peak_gib": peak,
                "from_diffusers": error,
            }


def picture(frames: int, height: int, width: int) -> torch.Tensor:
    """A clip in [-1, 1], (1, 3, F, H, W): soft shapes that change, with some grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, frames // 8 + 2, height // 32, width // 32), generator=generator)
    clip = torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")
    return clip * 1.8 - 0.9 + 0.05 * torch.randn(clip.shape, generator=generator)


def profile(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU by kernel, the 16 longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_device_time_total)
    return {f"{row.key[:90]} x{row.count}": round(row.self_device_time_total / 1000, 2) for row in rows[:16]}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type != "cuda":
        started = time.perf_counter()
        result = work()
        return time.perf_counter() - started, result
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000, result


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _distance(mean: torch.Tensor, exact_file: Path) -> float | None:
    if not exact_file.exists():
        return None
    exact = torch.load(exact_file).double()
    return ((mean.cpu().double() - exact).norm() / exact.norm()).item()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def main(root: str, size: str, lever: str) -> None:
    folder = Folder(Path(root))
    for line in measure_large(folder, lever) if size == "large" else measure(folder, SHAPES[cast(Size, size)], lever):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
