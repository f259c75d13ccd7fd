"""Tries the compiler and the attention kernels on this device with a few numbers before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cogcommon.errors import SettingError

from .attention import Kernel, attend
from .checkpointing import with_checkpointing
from .compiler import compiled, in_one_line
from .verdicts import forget, gpu_facts, recalled

if TYPE_CHECKING:
    import torch

_HEAD_DIM = 64  # of every published CogVideoX
_FARTHEST = 0.05  # from fp32; bf16 is off by less than 0.02 here
INSTALL_FLASH4 = "pip install 'cogtune[attention]'"
_MEND_FLASH4 = "pip install --upgrade 'flash-attn-4[cu13]' nvidia-cutlass-dsl quack-kernels apache-tvm-ffi"


def _facts(device: torch.device) -> Mapping[str, str]:
    facts = gpu_facts(device, Path(__file__).parent)
    # Its version alone does not say: a folder of sources has none.
    return {**facts, "flash4": str(flash4_is_there())} if facts else facts


def forget_trials(device: torch.device) -> None:
    """The blocks have failed with what had been found to work: the next start tries everything again."""
    if facts := _facts(device):
        forget(facts)


@lru_cache
def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work on the device; None if it does."""
    return _fault("compiler", device, lambda: _compiler_fault(device))


def _fault(what: str, device: torch.device, trial: Callable[[], str | None]) -> str | None:
    """What a trial finds wrong, if anything; it is not made where it has found nothing before."""
    faults: list[str] = []

    def word() -> str:
        faults.extend(filter(None, [trial()]))
        return "" if faults else "works"

    recalled(what, _facts(device), word)
    return faults[0] if faults else None


def _compiler_fault(device: torch.device) -> str | None:
    import torch
    import torch.nn.functional as F

    def small(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) * 2

    x = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(small, fullgraph=True, dynamic=False)(x).sum().backward()
    except Exception as error:  # torch raises whatever the compilers below it raise
        return in_one_line(error)
    return None


def check_compiler(device: torch.device) -> None:
    """Raises:
    SettingError: ``--compile on``, and nothing can be compiled.
    """
    if fault := compiler_fault(device):
        raise no_compiler(fault)


def no_compiler(fault: str) -> SettingError:
    return SettingError(
        f"nothing can be compiled here: {fault}",
        where="--compile on",
        fix="install gcc and Triton (it comes with torch on Linux), or --compile auto",
    )


@lru_cache
def attention_kernel(device: torch.device, dtype: torch.dtype, compiling: bool) -> Kernel:
    """The fastest attention kernel that runs forward and backward on the device, as the blocks will use it."""
    import torch

    if device.type != "cuda" or dtype == torch.float32:
        return "torch"
    if found := _fastest_attention(device, dtype, compiling):
        return found
    return "torch" if kernel_fault("flash", device, dtype, compiling) else "flash"


def _fastest_attention(device: torch.device, dtype: torch.dtype, compiling: bool) -> Kernel | None:
    """Of those that are fast; None if none of them works."""
    candidates: tuple[Kernel, ...] = ("flash4", "cudnn") if flash4_is_there() else ("cudnn",)

    def fastest() -> Kernel:
        times: dict[Kernel, float] = {kernel: _milliseconds(kernel, device, dtype) for kernel in working}
        return min(times, key=times.__getitem__)

    working = [kernel for kernel in candidates if not kernel_fault(kernel, device, dtype, compiling)]
    if len(working) < 2:
        return working[0] if working else None
    what = f"the fastest of {', '.join(working)} {_how(dtype, compiling)}"
    return cast(Kernel, recalled(what, _facts(device), fastest))


def _how(dtype: torch.dtype, compiling: bool) -> str:
    return f"in {dtype}{', compiled' * compiling}"


def flash4_is_there() -> bool:
    """Whether FlashAttention 4 is installed; whether it works, and is the fastest, its trial tells."""
    try:
        return find_spec("flash_attn.cute") is not None
    except Exception:  # FlashAttention 2, whose name the package shares, may be there and broken: neither can be used
        return False


def can_have_flash4(device: torch.device) -> bool:
    """Whether FlashAttention 4 has kernels for a GPU: Hopper, and Blackwell of data centers."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@dataclass(frozen=True)
class Missing:
    """Why FlashAttention 4 is not used where the GPU could have it, and what to type."""

    why: str
    fix: str


def missing_flash4(device: torch.device, dtype: torch.dtype, compiling: bool) -> Missing | None:
    """None: it works, or the GPU has no use for it."""
    import torch

    if not can_have_flash4(device) or dtype == torch.float32:
        return None
    if not flash4_is_there():
        return Missing("is not installed", INSTALL_FLASH4)
    if fault := kernel_fault("flash4", device, dtype, compiling):
        return Missing(f"is installed and does not work here ({fault})", _MEND_FLASH4)
    return None


def _milliseconds(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """Of a forward and a backward pass on half a block of 5B at 49x480x720; the fastest of three.

    With much less work it would time the calls: those of FlashAttention 4 take half a millisecond.
    """
    import torch

    shape = (1, 17776, 24, _HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    took = []
    for _ in range(4):
        begin.record()
        with torch.enable_grad():
            torch.autograd.grad(attend(kernel, q, k, v), (q, k, v), torch.ones_like(q))
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return min(took[1:])


@lru_cache
def kernel_fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, compiling: bool) -> str | None:
    """Why an attention kernel cannot be used on the device; None if it can."""
    what = f"{kernel} {_how(dtype, compiling)}"
    return _fault(what, device, lambda: _kernel_fault(kernel, device, dtype, compiling))


def _kernel_fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, compiling: bool) -> str | None:
    """Why it gives no answer or a wrong one, with its output kept and, it may be, compiled."""
    import torch
    import torch.nn.functional as F

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(kernel, q * 1.0, k * 1.0, v * 1.0)

    kept = with_checkpointing(attention, "attention")  # type: ignore[arg-type]
    function = compiled(kept) if compiling else kept
    generator = torch.Generator(device).manual_seed(0)
    # Strided as in a block: (B, S, H, D) seen as (B, H, S, D).
    shape = (1, 144, 4, _HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, generator=generator).transpose(1, 2) for _ in range(3))
    half = [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():  # a model that only draws asks, too
        try:
            answer = function(*half)
            answer.float().square().sum().backward()  # type: ignore[attr-defined]
        except Exception as error:  # refusals, and whatever the compilers raise
            return in_one_line(error)
        expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2])
        expected.square().sum().backward()
    pairs = [(answer, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(half, exact, strict=True))]
    return _too_far(float((mine.detach().float() - theirs.detach()).abs().max()) for mine, theirs in pairs)  # type: ignore


@lru_cache
def qk_norm_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of `qk_norm` cannot be used; None if they give on this GPU what they give on a CPU."""
    return _fault(f"qk_norm in {dtype}", device, lambda: _qk_norm_fault(device, dtype))


def _qk_norm_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    import torch

    from .qk_norm import qk_norm, qk_norm_backward

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, added, grad = (normal(1, 40, 2, _HEAD_DIM).to(dtype) for _ in range(3))
    weight, bias = (normal(_HEAD_DIM).to(dtype) for _ in range(2))
    angle = normal(33, _HEAD_DIM // 2).repeat_interleave(2, dim=1)
    forward = (x, added, weight, bias, angle.cos(), angle.sin(), 7, 1e-6)
    backward = (grad, x, added, weight, angle.cos(), angle.sin(), 7, 1e-6, True)
    there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in (*forward, *backward)]
    try:
        answers = qk_norm(*there[:8]), *qk_norm_backward(*there[8:])
    except Exception as error:  # whatever Triton and its compilers raise
        return in_one_line(error)
    expected = qk_norm(*forward), *qk_norm_backward(*backward)
    pairs = [(mine.cpu().float(), theirs.float()) for mine, theirs in zip(answers, expected, strict=True)]
    return _too_far(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


def _too_far(distances: Iterable[float]) -> str | None:
    return next((f"it is off by {far:.2g}" for far in distances if not far < _FARTHEST), None)  # so is NaN
