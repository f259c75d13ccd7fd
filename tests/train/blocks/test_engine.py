"""The blocks run in our own way give what diffusers' blocks give, kept, parked, streamed and compiled."""

import dataclasses
import functools
import gc
from types import SimpleNamespace

import pytest
import torch
from block_runs import CPU, FORMS, LAYERS, LateCopies, farthest, gradients, loss_of, transformer_of

from cogcommon.errors import RunError
from cogtrain.blocks import compiler, flash4, qk_norm
from cogtrain.blocks import engine as engine_module
from cogtrain.blocks.checkpointing import ACTIVATIONS
from cogtrain.blocks.engine import BlockEngine
from cogtrain.blocks.load import Load
from cogtrain.blocks.plan import BlockPlan
from cogtrain.blocks.trial import kernel_fault
from cogtrain.model import lora


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_keeping_gives_the_gradients_of_diffusers_blocks(form, method):
    expected = gradients(*transformer_of(form, method))
    assert len(expected[1]) >= LAYERS * 8
    for keep in ("all", "matmuls", "feedforward", "attention", "inputs"):
        checkpoint, transformer = transformer_of(form, method)
        BlockEngine(transformer, BlockPlan((keep,) * LAYERS), CPU, torch.float32)
        assert farthest(expected, gradients(checkpoint, transformer)) < 1e-6, keep


@pytest.mark.parametrize("form", FORMS)
def test_parked_and_streamed_in_parts_is_the_same_again_and_again(form):
    expected = gradients(*transformer_of(form, "lora"))
    checkpoint, transformer = transformer_of(form, "lora")
    keep = ("attention", "inputs", "matmuls", "attention", "inputs")
    engine = BlockEngine(
        transformer, BlockPlan(keep, offload_activations=True, swap_blocks=True, chunks=3), CPU, torch.float32
    )
    engine.offload_all()
    for _ in range(3):  # later passes meet the buffers and slots of earlier ones
        assert farthest(expected, gradients(checkpoint, transformer)) < 2e-6
    for batch in (1, 2):  # another shape, and back
        plain = gradients(*transformer_of(form, "lora"), batch=batch)
        assert farthest(plain, gradients(checkpoint, transformer, batch=batch)) < 2e-6


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("form", FORMS)
def test_fused_queries_and_keys_give_the_gradients_of_diffusers_blocks(form, method):
    checkpoint, transformer = transformer_of(form, method)
    expected = gradients(checkpoint, transformer.double(), torch.float64)
    for keep in ("all", "matmuls", "feedforward"):
        checkpoint, transformer = transformer_of(form, method)
        engine = BlockEngine(transformer.double(), BlockPlan((keep,) * LAYERS), CPU, torch.float64)
        assert not engine.fused  # a GPU's compiler makes the kernels
        engine.fused = True
        # Rotations are fp32, in diffusers too.
        assert farthest(expected, gradients(checkpoint, transformer, torch.float64)) < 5e-7, keep


def test_flash_attention_4_is_kept_and_not_run_again(monkeypatch):
    expected = gradients(*transformer_of("tiny-1.5", "lora"))
    for keep, times in (("attention", 1), ("feedforward", 1), ("matmuls", 1), ("inputs", 2)):
        made = []
        scores = flash4._scores
        monkeypatch.setattr(flash4, "_scores", lambda q, k, made=made, scores=scores: made.append(1) or scores(q, k))
        checkpoint, transformer = transformer_of("tiny-1.5", "lora")
        engine = BlockEngine(
            transformer, BlockPlan((keep,) * LAYERS, offload_activations=True, swap_blocks=True), CPU, torch.float32
        )
        engine.offload_all()
        engine.kernel = "flash4"
        assert farthest(expected, gradients(checkpoint, transformer)) < 2e-6, keep
        assert len(made) == (times + 1) * LAYERS, keep  # forward, perhaps again, backward
        monkeypatch.setattr(flash4, "_scores", scores)


def test_nothing_is_used_before_its_copy_is_waited_for(monkeypatch):
    """On a CPU copies are made at once, the earliest that a GPU could; here the latest."""
    from cogtrain.offload import activations, block_swap

    monkeypatch.setattr(activations, "CopyStream", LateCopies)
    monkeypatch.setattr(block_swap, "CopyStream", LateCopies)
    expected = gradients(*transformer_of("tiny", "lora"))
    checkpoint, transformer = transformer_of("tiny", "lora")
    engine = BlockEngine(
        transformer, BlockPlan(("inputs",) * LAYERS, offload_activations=True, swap_blocks=True), CPU, torch.float32
    )
    engine.offload_all()
    for _ in range(3):
        assert farthest(expected, gradients(checkpoint, transformer)) < 1e-6
    # 5 blocks forward and 3 backward (two are still there); the first pass finds the slots empty.
    assert engine._block_swap._copies.made in range(3 * (LAYERS - 2) * 2, 3 * 2 * LAYERS + 1)
    assert engine._offload._back.made > 0


def test_a_step_fetches_from_the_host_what_is_computed(monkeypatch):
    """Of each pass all but what two blocks have on the GPU from the one before."""
    from cogcommon.model.copies import CopyStream
    from cogtrain.memory.cost import _copied

    fetched = []
    copy = CopyStream.copy

    def counted(self, target, source, after=None):
        if self is not engine._offload._out:
            fetched.append(target.numel() * target.element_size())
        return copy(self, target, source, after)

    monkeypatch.setattr(CopyStream, "copy", counted)
    checkpoint, transformer = transformer_of("tiny", "lora")
    plan = BlockPlan(("inputs",) * LAYERS, offload_activations=True, swap_blocks=True)
    engine = BlockEngine(transformer, plan, CPU, torch.float32)
    engine.offload_all()
    for _ in range(2):  # the first pass finds nothing there
        fetched.clear()
        gradients(checkpoint, transformer)
    config, tokens = dict(checkpoint.transformer_config) | {"num_layers": LAYERS}, 5 * 4 * 6 + 226
    load = Load.of(config, tokens, batch=2, size=4, trained=0)
    block = engine._block_swap._host[0].numel()  # with biases, which are more of a small model
    (_, forward), (_, backward) = _copied(dataclasses.replace(load, block=block), plan)
    assert sum(fetched) == pytest.approx(forward + backward, rel=0.1)
    assert forward == (LAYERS - 2) * block


def most_bytes(function):
    """The most bytes that a call holds at once of what it allocates, and what is left of them after it.

    What others have left in cycles goes before, or it would be counted as freed by the call.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        gc.enable()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, live


def kept_by_a_block(keep, parked, compiled):
    """What each further block adds to the peak of a step, and to what is left after it, in activations."""
    activation = 2 * 346 * 32 * 4  # samples, tokens, width, bytes
    found = []
    for layers in (3, 7):
        checkpoint, transformer = transformer_of("tiny", "lora", layers)
        plan = BlockPlan((keep,) * layers, offload_activations=parked, swap_blocks=parked, compiled=compiled)
        BlockEngine(transformer, plan, CPU, torch.float32).offload_all()
        for _ in range(2):  # passes that compile, and lay the buffers on the host
            gradients(checkpoint, transformer)
        found.append(most_bytes(functools.partial(gradients, checkpoint, transformer)))
    (few, few_left), (many, many_left) = found
    return (many - few) / 4 / activation, (many_left - few_left) / 4 / activation


@pytest.mark.parametrize(("keep", "compiled"), [("inputs", False), ("attention", True)])
def test_what_is_parked_is_held_by_nobody_forward_or_backward(keep, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    peak, left = kept_by_a_block(keep, parked=True, compiled=compiled)
    assert left < 0.1  # gradients of the adapters, and no tensor fetched a second time
    assert peak < 0.1


@pytest.mark.parametrize(("keep", "compiled"), [("inputs", False), ("attention", False), ("attention", True)])
def test_a_block_keeps_what_the_plan_counts(keep, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    peak, _ = kept_by_a_block(keep, parked=False, compiled=compiled)
    assert peak == pytest.approx(ACTIVATIONS[keep], rel=0.03)


def test_streamed_weights_are_in_host_memory_and_bit_for_bit_the_same():
    _, plain = transformer_of("tiny", "lora")
    _, transformer = transformer_of("tiny", "lora")
    BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS, swap_blocks=True), CPU, torch.float32)
    expected, got = plain.state_dict(), transformer.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    ignored = transformer._ddp_params_and_buffers_to_ignore
    assert ignored == [n for n, p in transformer.named_parameters() if "blocks" in n and not p.requires_grad]


def test_bf16_is_as_near_to_fp32_as_autocast_is():
    exact = gradients(*transformer_of("tiny", "lora"))
    checkpoint, transformer = transformer_of("tiny", "lora")
    with torch.autocast("cpu", torch.bfloat16):
        autocast = farthest(exact, gradients(checkpoint, transformer, torch.bfloat16))
    checkpoint, transformer = transformer_of("tiny", "lora")
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    BlockEngine(transformer, BlockPlan(("attention",) * LAYERS), CPU, torch.bfloat16)
    got = gradients(checkpoint, transformer, torch.bfloat16)
    assert all(gradient.dtype == torch.float32 for gradient in got[1].values())
    assert farthest(exact, got) < max(2 * autocast, 0.02)


def test_a_layer_outside_attention_and_dropout_work_with_checkpoints():
    checkpoint, transformer = transformer_of("tiny", "sft")
    transformer.requires_grad_(False)
    lora.attach(transformer, 4, 2.0, ["ff.net.2", "norm1.linear", "to_q"], dropout=0.5)
    torch.manual_seed(1)
    expected = gradients(checkpoint, transformer)
    BlockEngine(
        transformer, BlockPlan(("attention",) * LAYERS, offload_activations=True, swap_blocks=True), CPU, torch.float32
    ).offload_all()
    torch.manual_seed(1)
    first = gradients(checkpoint, transformer)
    torch.manual_seed(1)
    assert farthest(first, gradients(checkpoint, transformer)) == 0  # the same dropout, and the same in recomputation
    assert expected[1].keys() == first[1].keys()


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("form", FORMS)
def test_all_blocks_are_one_graph_without_breaks(form, method, monkeypatch):
    """With the checkpoint inside and hooks around. Without inductor, which takes a minute and is tried below."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = gradients(*transformer_of(form, method))
    checkpoint, transformer = transformer_of(form, method)
    plan = BlockPlan(
        ("attention",) * LAYERS, offload_activations=True, swap_blocks=method == "lora", chunks=2, compiled=True
    )
    BlockEngine(transformer, plan, CPU, torch.float32).offload_all()
    for _ in range(2):
        assert farthest(expected, gradients(checkpoint, transformer)) < 2e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiler_that_fails_costs_a_sentence_and_not_the_run(monkeypatch):
    def fails(graph, inputs, **options):
        raise RuntimeError("no such kernel\nand a page of it")

    def also_fails(*tensors):
        raise OSError("there is no compiler any more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fails))
    torch._dynamo.reset()
    expected = gradients(*transformer_of("tiny", "lora"))
    checkpoint, transformer = transformer_of("tiny", "lora")
    said = []
    plan = BlockPlan(("attention",) * LAYERS, offload_activations=True, swap_blocks=True, compiled=True)
    engine = BlockEngine(transformer, plan, CPU, torch.float32, said.append)
    engine.offload_all()
    engine.fused = True  # as an earlier start had found it to work
    monkeypatch.setattr(qk_norm, "_normalised", also_fails)
    for _ in range(2):
        assert farthest(expected, gradients(checkpoint, transformer)) < 2e-6
    assert len(said) == 1 and "not compiled" in said[0] and "no such kernel" in said[0] and "page" not in said[0]


def test_the_compiler_is_kept_from_the_fusion_that_spoils_gradients(monkeypatch):
    """Only a GPU shows the gradients (test_numerics); here, that both passes are compiled without it."""
    import torch._inductor.compile_fx as inductor
    import torch._inductor.config as config

    if not hasattr(config.triton, "mix_order_reduction"):
        pytest.skip("this torch does not have the fusion")
    seen = []
    generate = inductor.fx_codegen_and_compile

    def watched(*arguments, **options):
        seen.append((options["is_backward"], config.triton.mix_order_reduction))
        return generate(*arguments, **options)

    monkeypatch.setattr(inductor, "fx_codegen_and_compile", watched)
    torch._dynamo.reset()
    x = torch.ones(3, requires_grad=True)
    with config.patch(force_disable_caches=True):
        assert config.triton.mix_order_reduction is not False  # else it need not be told
        compiler.compiled(lambda x: x.sin() * x)(x).sum().backward()
    assert seen == [(False, False), (True, False)]


def test_blocks_are_compiled_under_ddp_too(monkeypatch):
    """There torch would compile by parts, and up to 2.11 refuses a graph with a checkpoint inside."""
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch.nn.parallel import DistributedDataParallel

    def refuses(self, *graph):
        raise NotImplementedError("DDPOptimizer backend: Found a higher order op in the graph")

    monkeypatch.setattr(DDPOptimizer, "compile_fn", refuses)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", SimpleNamespace(bucket_bytes_cap=1 << 20))
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # torch's default
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    checkpoint, transformer = transformer_of("tiny", "lora")
    said = []
    BlockEngine(transformer, BlockPlan(("attention",) * LAYERS, compiled=True), CPU, torch.float32, said.append)
    expected = gradients(*transformer_of("tiny", "lora"))
    assert farthest(expected, gradients(checkpoint, transformer)) < 2e-6
    assert not said


def test_a_kernel_that_has_stopped_working_is_tried_again_at_the_next_start(monkeypatch):
    """Its verdict would be recalled for ever: the libraries that FlashAttention 4 needs change without it."""
    forgotten = []

    def fails(q, k):
        raise ModuleNotFoundError("No module named 'cutlass.utils.ampere_helpers'")

    monkeypatch.setattr(engine_module, "forget_trials", forgotten.append)
    monkeypatch.setattr(flash4, "_scores", fails)
    checkpoint, transformer = transformer_of("tiny", "lora")
    engine = BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS), CPU, torch.float32)
    gradients(checkpoint, transformer)
    assert not forgotten
    engine.kernel = "flash4"
    engine._functions.clear()
    with pytest.raises(ModuleNotFoundError):
        gradients(checkpoint, transformer)
    assert forgotten == [CPU]


def test_an_error_of_the_computation_is_not_taken_for_the_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    checkpoint, transformer = transformer_of("tiny", "lora")
    engine = BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS, compiled=True), CPU, torch.float32)

    def runs_out(*tensors):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine, "_function", lambda *a, **k: runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(checkpoint, transformer)


@pytest.mark.full  # a minute of g++
@pytest.mark.parametrize("keep", ["matmuls", "feedforward", "attention", "inputs"])
def test_compiled_for_real(keep):
    torch._dynamo.reset()
    expected = gradients(*transformer_of("tiny", "lora"), batch=1)
    checkpoint, transformer = transformer_of("tiny", "lora")
    BlockEngine(
        transformer,
        BlockPlan((keep,) * LAYERS, offload_activations=True, swap_blocks=True, chunks=2, compiled=True),
        CPU,
        torch.float32,
    )
    for _ in range(2):
        assert farthest(expected, gradients(checkpoint, transformer, batch=1)) < 1e-5


def test_evaluation_computes_the_same_without_gradients():
    _, plain = transformer_of("tiny", "lora")
    _, transformer = transformer_of("tiny", "lora")
    BlockEngine(
        transformer,
        BlockPlan(("attention",) * LAYERS, offload_activations=True, swap_blocks=True, compiled=True),
        CPU,
        torch.float32,
    )
    from cogtrain.model.compare import output_on_noise

    assert torch.allclose(output_on_noise(plain), output_on_noise(transformer), atol=1e-6)
    assert transformer.training


def test_blocks_multiply_with_torchs_own_function(monkeypatch):
    """DeepSpeed puts another in its place, which one version of the compiler gives gradients of zero."""
    checkpoint, transformer = transformer_of("tiny", "lora")
    BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS), CPU, torch.float32)
    weights = {id(weight) for weight in transformer.transformer_blocks.parameters()}
    linear, seen = torch.nn.functional.linear, set()

    def replaced(x, weight, bias=None):
        seen.add(id(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", replaced)
    loss_of(checkpoint, transformer).backward()
    assert seen and not seen & weights


def test_a_kernel_is_tried_backward_also_where_nothing_is_trained():
    with torch.no_grad():  # as under ZeRO-3, where validation is the first to ask
        assert kernel_fault("torch", CPU, torch.bfloat16, compiling=False) is None


@pytest.mark.gpu  # streams and events order nothing on a CPU
@pytest.mark.parametrize("compiled", [False, True])
def test_parked_and_streamed_beside_the_computation_is_the_same(compiled):
    device = torch.device("cuda")
    checkpoint, transformer = transformer_of("tiny", "lora")
    expected = gradients(checkpoint, transformer.to(device), device=device)
    checkpoint, transformer = transformer_of("tiny", "lora")
    plan = BlockPlan(("attention",) * LAYERS, offload_activations=True, swap_blocks=True, chunks=2, compiled=compiled)
    BlockEngine(transformer, plan, device, torch.float32).offload_all()
    for _ in range(5):
        assert farthest(expected, gradients(checkpoint, transformer, device=device)) < 1e-4


@pytest.mark.gpu  # the allocator's own count, and copies that take time
def test_what_is_parked_leaves_the_gpu():
    device = torch.device("cuda")
    peaks = []
    for layers in (3, 9):
        checkpoint, transformer = transformer_of("tiny", "lora", layers)
        plan = BlockPlan(("attention",) * layers, offload_activations=True, swap_blocks=True, compiled=True)
        BlockEngine(transformer, plan, device, torch.float32).offload_all()
        for _ in range(2):
            gradients(checkpoint, transformer, device=device)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(checkpoint, transformer, device=device)
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert (peaks[1] - peaks[0]) / 6 < 0.2 * 2 * 346 * 32 * 4  # of an activation, a block; two if it were kept


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"modules_to_save": ["norm_q"]}, "Wrapper"),
        ("loha", "peft.tuners.loha"),
        ("two", "2 adapters"),
        ("processor", "FusedCogVideoXAttnProcessor2_0"),
        ("norm", "RMSNorm"),
    ],
)
def test_layers_that_the_blocks_do_not_know_are_refused(change, says):
    """PEFT's and torch's own; each would be left out of the computation."""
    from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0
    from peft import LoHaConfig, LoraConfig, inject_adapter_in_model

    _, transformer = transformer_of("tiny", "sft")
    if isinstance(change, dict):
        transformer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], **change), transformer)
    elif change == "loha":
        transformer = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["to_q"]), transformer)
    elif change == "two":
        for name in ("one", "other"):
            transformer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), transformer, name)
    elif change == "processor":
        transformer.transformer_blocks[3].attn1.set_processor(FusedCogVideoXAttnProcessor2_0())
    else:
        transformer.transformer_blocks[3].norm2.norm = torch.nn.RMSNorm(64)
    with pytest.raises(RunError, match="computed wrongly") as caught:
        BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS), CPU, torch.float32)
    assert says in str(caught.value), caught.value
