"""Queries and keys in one step: what torch and diffusers give in several, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from cogtrain.blocks import qk_norm as module
from cogtrain.blocks import trial
from cogtrain.blocks.qk_norm import qk_norm, qk_norm_backward

SHAPE, SKIP, EPS = (2, 21, 3, 8), 5, 1e-6  # (B, S, H, D)


def arguments(added, rotary, dtype=torch.float64, device="cpu", shape=SHAPE):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x, more, weight, bias = normal(*shape), normal(*shape), normal(shape[-1]), normal(shape[-1])
    angle = normal(shape[1] - SKIP, shape[-1] // 2).repeat_interleave(2, dim=1).float()
    tables = (angle.cos(), angle.sin()) if rotary else (None, None)
    return x, more if added else None, weight, bias, *tables, SKIP, EPS


def in_several_steps(x, added, weight, bias, cos, sin, skip, eps):
    y = F.layer_norm(x if added is None else x + added, x.shape[-1:], weight, bias, eps).transpose(1, 2)
    if cos is not None:
        turned = apply_rotary_emb(y[:, :, skip:], (cos, sin))
        y = torch.cat([y[:, :, :skip], turned], dim=2)
    return y.transpose(1, 2)


def gradients(function, given):
    leaves = [
        value.clone().requires_grad_() if torch.is_tensor(value) and i < 4 else value for i, value in enumerate(given)
    ]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out).to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves[:4] if torch.is_tensor(leaf))]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_one_step_gives_what_several_give(added, rotary):
    given = arguments(added, rotary)
    for mine, theirs in zip(gradients(qk_norm, given), gradients(in_several_steps, given), strict=True):
        # diffusers rounds to fp32 where it turns.
        assert (mine - theirs).abs().max() < (1e-6 if rotary else 1e-12) * theirs.abs().max()


@pytest.mark.parametrize("rotary", [False, True])
def test_the_compiler_is_told_the_truth_about_it(rotary):
    torch.library.opcheck(qk_norm, tuple(
        value.requires_grad_() if torch.is_tensor(value) and i < 4 else value
        for i, value in enumerate(arguments(True, rotary, torch.float32))
    ))  # fmt: skip
    x, added, weight, _, *rest = arguments(True, rotary, torch.float32)
    torch.library.opcheck(qk_norm_backward, (x * 2, x, added, weight, *rest, True))


def test_kernels_that_fail_or_are_off_are_told(monkeypatch):
    cpu = torch.device("cpu")
    assert trial._qk_norm_fault(cpu, torch.bfloat16) is None

    def refused(*_):
        raise RuntimeError("PTX was compiled with an unsupported toolchain")

    with monkeypatch.context() as patch:
        patch.setattr(module, "qk_norm_backward", refused)
        fault = trial._qk_norm_fault(cpu, torch.bfloat16)
    assert fault == "RuntimeError: PTX was compiled with an unsupported toolchain"
    calls = iter((2.0, 1.0))  # of the kernels, then of what they are compared with
    right = module.qk_norm
    monkeypatch.setattr(module, "qk_norm", lambda *given: right(*given) * next(calls))
    assert trial._qk_norm_fault(cpu, torch.bfloat16) == "it is off by 1"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_kernels_give_it_too(dtype, most):
    assert trial._qk_norm_fault(torch.device("cuda"), dtype) is None
    shape = (2, 1111, 48, 64)  # more rows than the programs that share a sum take at once
    for added in (False, True):
        for rotary in (False, True):
            exact = gradients(qk_norm, arguments(added, rotary, shape=shape))
            there = gradients(qk_norm, arguments(added, rotary, dtype, "cuda", shape))
            for mine, theirs in zip(there, exact, strict=True):
                assert (mine.cpu().double() - theirs).norm() < most * theirs.norm()
