"""The Triton kernels compile for every generation of cards that runs them, and fit its shared memory.

With Triton 3.6 a block of theirs takes 1.0 KiB (`qk_kernels`) and 4.0 KiB (`kernels`) at most, on all six; they fit
with 3.9, too.
Triton's compiler needs no GPU. Where torch has none of its own (a CPU's), `pip install --no-deps triton` brings it
(640 MB on the disk); without it these tests are skipped.
"""

from itertools import product

import pytest

triton = pytest.importorskip("triton")

# KiB of shared memory that a block may use, by compute capability (CUDA C Programming Guide, "Technical
# Specifications per Compute Capability"): Ampere, GeForce 30, GeForce 40 and L4, Hopper, B200, GeForce 50.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = ("bf16", "fp16", "fp32")
CHANNELS = (128, 256, 512)  # of the VAE's encoder
HEADS = {"2b": 30, "5b": 48}


def qk_kernels():
    """Kernel, types of its arguments, constants, for each way in which the blocks call it."""
    from cogtrain.blocks import qk_kernels as kernels

    for dtype, added, rotary in product(TYPES, (False, True), (False, True)):
        same = dict.fromkeys(("x", "added", "weight", "bias", "out", "grad"), f"*{dtype}")
        types = same | {"cos": "*fp32", "sin": "*fp32", "parts": "*fp32", "eps": "fp32"}
        width = 64
        constants = {"D": width, "ROWS": kernels._BLOCK // width, "ADDED": added, "ROTARY": rotary}
        for heads in HEADS.values() if added and rotary else [HEADS["5b"]]:
            yield kernels._forward_kernel, types, constants | {"HEADS": heads}
            for sums in (False, True):
                yield kernels._backward_kernel, types, constants | {"HEADS": heads, "SUMS": sums}


def vae_kernels():
    from cogprep.vae import kernels, steps

    launched = kernels.TritonKernels()
    for dtype, channels in product(TYPES, CHANNELS):
        same = dict.fromkeys(("x", "other", "out", "weight", "norm_bias", "video"), f"*{dtype}")
        types = same | {"parts": "*fp32", "affine": "*fp32", "bias": "*fp32", "eps": "fp32"}
        shape = {"C": channels, "ROWS": max(1, launched.block // channels)}
        for other, store in ((False, False), (False, True), (True, True)):
            yield steps.sum_kernel, types, shape | {"OTHER": other, "STORE": store}
        yield steps.affine_kernel, types, {"C": channels, "WIDTH": channels // 32, "BLOCK": 128}
        for backwards in (False, True):
            yield steps.norm_silu_kernel, types, shape | {"BACKWARDS": backwards}
        for halve, odd in product((False, True), (False, True)):
            yield steps.add_pool_kernel, types, shape | {"HALVE": halve, "ODD": odd}
        if channels == CHANNELS[0]:
            yield steps.first_kernel, types, {"C": channels, "INPUTS": 3, "TAPS": 32, "ROWS": launched.first_rows}


def shared_kib(kernel, types, constants, capability):
    """Compile down to the card's machine code; KiB of shared memory that a block takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As a launch says it: what torch allocates begins at a multiple of 16 bytes.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    return compiled.metadata.shared / 1024


@pytest.mark.full  # half a minute for each card
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernels", [qk_kernels, vae_kernels], ids=lambda kernels: kernels.__name__)
def test_every_kernel_fits_the_card(kernels, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    most, count = 0.0, 0
    for kernel, types, constants in kernels():
        shared = shared_kib(kernel, types, constants, capability)
        assert shared <= SHARED[capability], (kernel.__name__, constants, shared)
        most, count = max(most, shared), count + 1
    print(f"sm_{capability}: {count} {kernels.__name__}, at most {most:.1f} of {SHARED[capability]} KiB")


def test_one_kernel_of_each_compiles_for_the_smallest_card():
    for kernels in (qk_kernels, vae_kernels):
        assert shared_kib(*next(kernels()), 86) <= SHARED[86]
