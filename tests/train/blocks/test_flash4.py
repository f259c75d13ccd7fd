"""FlashAttention 4 as an operation: its gradients, what the compiler is told, and where it is taken."""

import importlib
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from cogtrain.blocks import trial
from cogtrain.blocks.attention import attend
from cogtrain.blocks.flash4 import flash4, flash4_backward
from cogtrain.commands import doctor

GPU = torch.device("cuda")


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 17, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def test_it_is_attention():
    mine, theirs = inputs(), inputs()
    for leaves, answer in ((mine, attend("flash4", *mine)), (theirs, F.scaled_dot_product_attention(*theirs))):
        (answer * torch.linspace(-1, 2, answer.numel(), dtype=answer.dtype).view_as(answer)).sum().backward()
        leaves.append(answer.detach())
    for one, other in zip(mine, theirs, strict=True):
        one, other = (one.grad, other.grad) if one.requires_grad else (one, other)
        assert (one - other).abs().max() < 1e-7 * other.abs().max()  # the sums of exponentials are fp32


def test_the_compiler_is_told_the_truth_about_it():
    q, k, v = (leaf.detach().transpose(1, 2).contiguous().requires_grad_() for leaf in inputs(torch.float32))
    torch.library.opcheck(flash4, (q, k, v))
    out, sums = (tensor.detach() for tensor in flash4(q, k, v))
    torch.library.opcheck(flash4_backward, (out * 2, *(leaf.detach() for leaf in (q, k, v)), out, sums))


@pytest.mark.parametrize(
    ("there", "works", "times", "taken"),
    [
        (False, {"cudnn", "flash4"}, {}, "cudnn"),
        (True, {"cudnn", "flash4"}, {"cudnn": 2.0, "flash4": 1.0}, "flash4"),
        (True, {"cudnn", "flash4"}, {"cudnn": 1.0, "flash4": 2.0}, "cudnn"),
        (True, {"flash4"}, {}, "flash4"),
        (True, {"cudnn"}, {}, "cudnn"),
        (True, {"flash"}, {}, "flash"),
        (False, set(), {}, "torch"),
    ],
)
def test_the_fastest_that_works_is_taken(monkeypatch, there, works, times, taken):
    monkeypatch.setattr(trial, "flash4_is_there", lambda: there)
    monkeypatch.setattr(trial, "_facts", lambda device: {})
    tried = []
    monkeypatch.setattr(trial, "kernel_fault", lambda kernel, *_: tried.append(kernel) or kernel not in works)
    monkeypatch.setattr(trial, "_milliseconds", lambda kernel, *_: times[kernel])
    assert trial.attention_kernel.__wrapped__(GPU, torch.bfloat16, True) == taken
    assert ("flash" in tried) == (taken in ("flash", "torch"))  # a trial takes seconds
    assert trial.attention_kernel.__wrapped__(GPU, torch.float32, True) == "torch"


def test_it_is_not_there_where_version_2_which_shares_its_name_is_broken(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert trial.flash4_is_there()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    importlib.invalidate_caches()
    assert not trial.flash4_is_there()


@pytest.fixture
def choice(monkeypatch, tmp_path):
    """The kernel that a start takes: of those that work, the faster; what worked is kept from start to start."""
    monkeypatch.setenv("COGTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(trial, "gpu_facts", lambda *_: {"gpu": "one card", "libraries": "flash-attn-4 none"})
    monkeypatch.setattr(trial, "_milliseconds", lambda kernel, *_: {"flash4": 1.0, "cudnn": 2.0}[kernel])

    def start(works, there=True):
        tried = []
        monkeypatch.setattr(trial, "flash4_is_there", lambda: there)
        trial.kernel_fault.cache_clear()  # as a new process
        fault = lambda kernel, *_: tried.append(kernel) or (None if kernel in works else "no room")  # noqa: E731
        monkeypatch.setattr(trial, "_kernel_fault", fault)
        return trial.attention_kernel.__wrapped__(GPU, torch.bfloat16, True), tried

    return start


def test_a_verdict_does_not_outlive_it(choice):
    """Sources without metadata, as a folder of PYTHONPATH, have no version that would change."""
    both = {"flash4", "cudnn"}
    for there, taken in ((True, "flash4"), (False, "cudnn"), (True, "flash4")):
        assert choice(both, there)[0] == taken
    assert choice(both) == ("flash4", [])


def test_what_failed_is_tried_at_the_next_start(choice):
    """On a GPU without room for the trial, say, or with a library that is put right since."""
    assert choice({"cudnn"}) == ("cudnn", ["flash4", "cudnn"])
    assert choice({"cudnn"}) == ("cudnn", ["flash4"])
    assert choice({"flash4", "cudnn"}) == ("flash4", ["flash4"])
    assert choice(set()) == ("flash4", [])


@pytest.mark.parametrize(
    ("there", "fault", "capability", "why", "fix"),
    [
        (False, None, 9, "is not installed", "cogtune[attention]"),
        (True, "ImportError: libtvm_ffi.so", 9, "does not work here (ImportError: libtvm_ffi.so)", "--upgrade"),
        (True, None, 10, None, None),
        (False, None, 8, None, None),
    ],
)
def test_why_it_is_not_used_is_told_where_the_gpu_could_have_it(monkeypatch, there, fault, capability, why, fix):
    """A package without one of its libraries cost an hour of measuring with cuDNN's attention, and nothing said so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
    monkeypatch.setattr(trial, "flash4_is_there", lambda: there)
    monkeypatch.setattr(trial, "kernel_fault", lambda *_: fault)
    monkeypatch.setattr(doctor, "compiler_fault", lambda *_: None)
    assert trial.missing_flash4(GPU, torch.float32, True) is None
    missing = trial.missing_flash4(GPU, torch.bfloat16, True)
    assert (missing is None) == (why is None)
    if missing:
        assert why in missing.why and fix in missing.fix
    found = list(doctor._attention(GPU))
    assert [finding.verdict for finding in found] == ([] if capability == 8 else ["note" if why else "good"])
    assert not why or why in found[0].found


def test_a_kernel_that_fails_says_how():
    """A GPU's, on a CPU: FlashAttention 4's own libraries are not here."""
    fault = trial._kernel_fault("cudnn", torch.device("cpu"), torch.bfloat16, False)
    assert fault and re.match(r"\w+(Error|Exception): ", fault)


@pytest.mark.gpu
@pytest.mark.skipif(not trial.flash4_is_there(), reason="needs flash-attn-4")
@pytest.mark.parametrize("compiling", [False, True])
def test_it_works_on_this_gpu(compiling):
    assert trial._kernel_fault("flash4", GPU, torch.bfloat16, compiling) is None
    times = {kernel: trial._milliseconds(kernel, GPU, torch.bfloat16) for kernel in ("flash4", "cudnn", "flash")}
    print("milliseconds:", times)
    assert times["flash4"] < times["flash"]
