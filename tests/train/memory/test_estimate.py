"""What a run is said to take, against small models that live and published shapes that do not fit here."""

import dataclasses
import gc
import json
import math
from contextlib import nullcontext

import pytest
import torch
from live import Live
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from cogcommon.errors import RunError
from cogcommon.files.memory import Headroom
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, Resolution
from cogtrain.blocks.engine import BlockEngine
from cogtrain.blocks.load import Load
from cogtrain.blocks.plan import BlockPlan, choose_plan
from cogtrain.data.batches import AHEAD, READERS, Collator, bytes_ahead, read_sample
from cogtrain.data.sampler import Slot
from cogtrain.distributed.optimizer import make_optimizer
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.memory import ready
from cogtrain.memory.estimate import bytes_a_weight, estimate, host_needs, load_of, trained_weights
from cogtrain.memory.host import offloaded_bytes
from cogtrain.memory.machine import host_memory
from cogtrain.model.batch import Batch
from cogtrain.model.ema import EMA
from cogtrain.model.method import method_of
from cogtrain.model.objective import Objective
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.trainer.exporter import Exporter
from cogtrain.trainer.failures import out_of_memory
from cogtrain.trainer.saver import Saver
from cogtrain.validation.validate import Validation
from workshop.bench_train.subject import random_checkpoint, random_shards

GIB = 2**30


@pytest.fixture
def run_of(tmp_path, make_shards):
    """run_of(settings, form or family, world): a run; of a family of true shape, which is never loaded."""

    def make(settings, subject="tiny", world=1):
        form = subject if "tiny" in subject else "tiny"
        if not (tmp_path / form).exists():
            make_shards(tmp_path / form, form, samples=8)
        settings = dataclasses.replace(settings, shards=[str(tmp_path / form)])
        run = open_run(settings, torch.device("cpu"), world)
        if subject == form:
            return run
        checkpoint = random_checkpoint(subject)
        shards = random_shards(checkpoint, BY_NAME[subject].native, samples=1)
        return dataclasses.replace(run, checkpoint=checkpoint, shards=shards, precision="bf16")

    return make


@pytest.mark.parametrize(
    "settings", [LoraSettings(rank=3, target_modules=["to_q", "ff.net.2", "norm1.linear", "proj_out"]), SftSettings()]
)
@pytest.mark.parametrize("form", ["tiny", "tiny-2b", "tiny-1.5-i2v"])
@pytest.mark.parametrize(
    ("optimizer", "ema"),
    [("adamw", 0.0), ("adamw", 0.9), ("prodigy", 0.0), ("prodigy", 0.9)]
    + [pytest.param("adamw8bit", ema, marks=pytest.mark.full) for ema in (0.0, 0.9)],  # its package is large
)
def test_all_that_a_trained_weight_brings_is_counted_as_it_lives(run_of, form, settings, optimizer, ema):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao", reason="the package of 8-bit states that works on a CPU")
    settings = dataclasses.replace(settings, optimizer=optimizer, ema=ema, lr=1.0 if optimizer == "prodigy" else 1e-4)
    run = run_of(settings, form)
    transformer = run.checkpoint.load_transformer(torch.float32)
    run.method.apply(transformer)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    stepping = make_optimizer(trained, settings, torch.device("cpu"), offload_optimizer=False)
    average = EMA(trained, ema) if ema else None
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile for a minute
        stepping.step()
    states = [value for state in stepping.state.values() for value in state.values() if torch.is_tensor(value)]
    held = [*trained, *(p.grad for p in trained), *states, *(average.shadow if average else [])]
    live, weights = sum(map(_bytes, held)), sum(parameter.numel() for parameter in trained)
    assert trained_weights(run) == weights
    computed = weights * bytes_a_weight("ddp", 1, optimizer, ema=ema > 0)
    assert computed == load_of(run).trained
    if optimizer == "prodigy":  # what began at zero need not be kept: LoRA's B, a bias
        assert live <= computed and computed - live <= 4 * weights
        zero = sum(p.numel() for p in trained if "p0" in stepping.state[p] and stepping.state[p]["p0"].ndim == 0)
        assert live == pytest.approx(computed - 4 * zero, rel=0.01)
    elif optimizer == "adamw8bit":  # small weights, of which this model has many, keep their states in 32 bits
        small = sum(8 * p.numel() for p in trained if p.numel() < 4096 or p.numel() % 256)
        assert 0 <= live - computed <= small + 4096 * len(trained)
    else:
        assert live == pytest.approx(computed, abs=4 * len(trained))  # and a count of the steps


def _bytes(tensor):
    inner = [getattr(tensor, name) for name in getattr(tensor, "tensor_attrs", [])]  # of a quantised one
    return sum(map(_bytes, inner)) if inner else tensor.numel() * tensor.element_size()


def test_zero_spreads_what_its_stage_says():
    # ZeRO, arXiv 1910.02054, figure 1: of 16 bytes, 64 processes leave 2.21875 and 0.25 to each.
    assert [bytes_a_weight(s, 64) for s in ("zero2", "zero3")] == [2.21875, 0.25]
    assert bytes_a_weight("zero2-offload", 1) == 2 and bytes_a_weight("zero3-offload", 8) == 0


def test_what_is_page_locked_is_a_power_of_two():
    for weights, gib in ((5_570_283_072, 32 + 32 + 16), (2**30, 4 + 4 + 2)):
        assert offloaded_bytes(weights, "zero2-offload") == 8 * weights + gib * GIB
    assert offloaded_bytes(2**29, "zero3-offload") == 20 * 2**29 and offloaded_bytes(100, "zero2") == 0
    assert offloaded_bytes(2**29 + 1, "zero3-offload") == pytest.approx(28 * 2**29)  # 12, and twice 8


def test_what_deepspeed_will_take_of_the_host_is_left_to_it(run_of):
    run = run_of(SftSettings(strategy="zero3-offload"), "5b", world=8)
    needs = host_needs(run, gpu=True)
    load, theirs = needs.load, int(offloaded_bytes(trained_weights(run) / 8, "zero3-offload"))
    assert load.block == 0 and needs.offloaded == theirs  # no weights of its own for a process to give up
    beside = needs.itself + needs.batches + theirs + needs.loading
    for free, left in ((beside + 10 * GIB, 10 * GIB), (beside // 2, 0)):
        assert needs.left(8 * free, 8) == pytest.approx(left, abs=8)
        plan = choose_plan("low", load, free=12 * GIB, fits_host=lambda p: needs.fits(p, 8 * free, 8), compiled=True)  # noqa: B023
        assert plan.host(load) <= 0.8 * left


def keeping_best(run, keep_best):
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, keep_best=keep_best))


STREAMED, RESIDENT = (BlockPlan(("inputs",) * 42, offload_activations=True, swap_blocks=swap) for swap in (True, False))


@pytest.mark.parametrize("keep_best", [False, True])
def test_each_plan_leaves_room_for_its_own_end(run_of, keep_best):
    """To export a kept checkpoint a base is loaded again; where that came from the host it is there twice, else on
    both."""
    needs = host_needs(keeping_best(run_of(LoraSettings(), "5b"), keep_best), gpu=True)
    assert needs.ending(RESIDENT) - needs.ending(STREAMED) == keep_best * needs.loading
    for plan in (STREAMED, RESIDENT):
        worst = needs.at_most(plan, 1)
        ending = plan.host(needs.load) + needs.ending(plan)
        assert worst == needs.itself + needs.batches + max(ending, needs.loading)
        assert needs.fits(plan, int(1.3 * worst), 1) and not needs.fits(plan, worst - GIB, 1)


def test_a_host_that_has_no_room_for_the_kept_checkpoint_is_told_what_to_leave_out(run_of, monkeypatch):
    run = run_of(LoraSettings(memory="low"), "5b")
    without, kept = (estimate(keeping_best(run, keep), gpu=False).host_at_most(1) for keep in (False, True))
    assert kept - without > 4 * GIB
    room = Headroom((without + kept) // 2, "the memory limit of box")
    monkeypatch.setattr(ready, "host_memory_left", lambda: room)
    monkeypatch.setattr(ready, "visible_gpus", lambda: 0)
    ready.check_host_memory(run, 1)
    with pytest.raises(RunError) as caught:
        ready.check_host_memory(keeping_best(run, True), 1)
    assert caught.value.fix.startswith("leave --keep-best out, or a host")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_is_counted_at_the_end_only_where_one_is_loaded(run_of, strategy):
    """`Lora.verify` takes the model that was trained, but where DeepSpeed holds it; a kept checkpoint has one of its
    own."""
    for keep_best, bases in ((False, strategy != "ddp"), (True, 1 + (strategy != "ddp"))):
        needs = host_needs(keeping_best(run_of(LoraSettings(strategy=strategy), "5b"), keep_best), gpu=True)
        assert needs.exported // needs.loading == bases and needs.exported % needs.loading < 3 * GIB
        assert needs.released == (needs.loading if keep_best and strategy == "ddp" else 0)


def test_a_lora_of_5b_fits_a_host_of_16_gb(run_of):
    needs = host_needs(run_of(LoraSettings(), "5b"), gpu=True)
    assert needs.fits(BlockPlan(("attention",) * 42, compiled=True), host_memory("16GB"), 1)


@pytest.mark.parametrize("settings", [LoraSettings(rank=32), SftSettings()], ids=["lora", "sft"])
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.full)])
def test_the_end_of_a_run_takes_what_is_computed(
    tmp_path, make_shards, train_here, monkeypatch, settings, keep_best, strategy
):
    """Every tensor that begins to live as a run exports and proves its weights, those of a kept checkpoint, too."""
    make_shards(tmp_path / "out", samples=2)
    make_shards(tmp_path / "held", samples=1, seed=9)
    losses, live = iter((0.1, 0.2)), Live()
    there, measure = [], Validation.measure

    def scripted(*arguments):
        return dataclasses.replace(measure(*arguments), val_loss=next(losses))

    def counting(call):
        def counted(saver, *arguments):
            if not there:
                gc.collect()
                for one in gc.get_objects():  # asked for its type: a proxy of what is gone answers nothing else
                    if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
                        live.count(one)
                there.append(live.now)
            with live if live not in _get_current_dispatch_mode_stack() else nullcontext():
                return call(saver, *arguments)

        return counted

    monkeypatch.setattr(Validation, "measure", scripted)
    monkeypatch.setattr(Exporter, "export", counting(Exporter.export))
    monkeypatch.setattr(Saver, "finish", counting(Saver.finish))
    settings = dataclasses.replace(
        settings, shards=[str(tmp_path / "out")], validate_shards=[str(tmp_path / "held")], out=tmp_path / "run",
        validate_every=1, steps=2, keep_best=keep_best, strategy=strategy,
    )  # fmt: skip
    train_here(settings)
    needs = host_needs(open_run(settings, torch.device("cpu"), 1), gpu=False)
    computed, answer = needs.exported, 14 * 4 * 242 * 192  # and what 242 tokens take in a forward pass
    lives = live.most - there[0]
    print(f"{type(settings).__name__}, keep best {keep_best}: computed {computed >> 10} KiB, lives {lives >> 10}")
    assert 0.7 * computed <= lives <= computed + answer


def test_what_is_left_counts_every_process_and_every_batch(run_of):
    run = run_of(LoraSettings(), "5b")
    one, many = (host_needs(run, gpu=True, batch=batch) for batch in (1, 8))
    assert many.batches == pytest.approx(8 * one.batches, rel=0.35)  # torch locks powers of two
    plan = BlockPlan(("attention",) * one.load.layers)
    assert many.at_most(plan, 4) - one.at_most(plan, 4) == 4 * (many.batches - one.batches)
    alone = host_needs(run, gpu=False)
    assert alone.training(plan) == plan.alone(alone.load) > alone.loading


MANY = Resolution(9, 160, 256)  # 480 tokens of video, beside which a small model's weights are small


@pytest.mark.parametrize(
    "settings", [LoraSettings(), LoraSettings(rank=4), SftSettings()], ids=["lora", "rank 4", "sft"]
)
@pytest.mark.parametrize("keep", ["all", "inputs"])
@pytest.mark.parametrize("form", ["random-tiny", "tiny", "tiny-1.5"])
def test_on_cpus_a_step_holds_what_is_computed(form, keep, settings):
    """Every tensor that lives in a forward and a backward pass, but for the weights and their gradients."""
    checkpoint, method = open_checkpoint(form), method_of(settings)
    transformer = checkpoint.load_transformer(torch.float32)
    method.apply(transformer)
    transformer.train()
    config, trains = checkpoint.transformer_config, isinstance(settings, LoraSettings)
    plan = BlockPlan((keep,) * config["num_layers"])
    BlockEngine(transformer, plan, torch.device("cpu"), torch.float32)
    objective, live = Objective.of(checkpoint), Live()
    channels, count, *picture = checkpoint.family.latent(MANY)
    frames = (1, count, channels, *picture)
    noise = (1, objective.family.padded_frames(count), *frames[2:])
    text = (1, config["max_text_seq_length"], config["text_embed_dim"])
    batch = Batch(("a",), ("s",), *map(torch.randn, (frames, noise)), torch.tensor([300]), torch.randn(text), {})
    for tensor in [*transformer.parameters(), *transformer.buffers(), *vars(batch).values()]:
        if isinstance(tensor, torch.Tensor):
            live.count(tensor)
    before = live.now
    with live:
        objective.losses(transformer, batch, torch.float32).mean().backward()
    load = Load.of(
        config, checkpoint.family.tokens(MANY), batch=1, size=4, trained=0, frozen=trains,
        rank=settings.rank * len(settings.target_modules) if trains else 0,
        latents=math.prod(checkpoint.family.padded_latent(MANY)),
    )  # fmt: skip
    grads = sum(4 * parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    computed = plan.alone(load) - plan.resting(load)
    shown = [f"{size / load.activation:.1f}" for size in (live.most - before, computed, grads)]
    print(f"{form} {keep} {method.name}: in activations, lives, computed, gradients:", *shown)
    assert 0.75 * computed <= live.most - before <= 1.05 * computed + grads


def test_batches_ahead_are_what_the_loader_holds(run_of):
    """Of the loader's own numbers: what it keeps ready, what is in use, and what each thread keeps of small pieces."""
    for form in ("tiny", "tiny-1.5-i2v"):
        run = run_of(LoraSettings(), form)
        samples = [read_sample(run.shards, index) for index in range(3)]
        batch = Collator(Objective.of(run.checkpoint), 0)(samples, [Slot(index, 0, index) for index in range(3)])
        made, stored = (
            sum(leaf.nbytes for leaf in tree_leaves([vars(part) for part in parts]) if isinstance(leaf, torch.Tensor))
            for parts in ([batch], samples)
        )
        computed = bytes_ahead(run.checkpoint, run.buckets[0], batch=3, pin=False)
        assert computed == pytest.approx((AHEAD + 1) * made + READERS * (stored + made), rel=0.1)


def test_a_file_of_ones_own_counts(run_of, tmp_path):
    def peak(bucket):
        file = tmp_path / f"{bucket}.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": bucket}}))
        return estimate(run_of(SftSettings(strategy="zero3", deepspeed=file), "5b", world=2)).peak

    assert peak(500_000_000) - peak(200_000_000) == 300_000_000 * 2 * 2.5  # a bucket, its copy, half of the sum


def test_demand_of_5b_is_what_was_measured(run_of):
    run = run_of(LoraSettings(), "5b")
    assert trained_weights(run) == 132_120_576  # as a run of 5B says it
    # Measured on an H100: auto 22.3 GiB.
    assert estimate(run).peak / GIB == pytest.approx(22.3, rel=0.03)
    peaks = [estimate(run, memory=memory).peak for memory in ("fast", "auto", "low")]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < 0.25 * peaks[1]
    full = run_of(SftSettings(strategy="zero3"), "5b", world=8)
    eight, one = estimate(full).peak, estimate(dataclasses.replace(full, world=1)).peak
    spread = 16 * trained_weights(full) + 2 * 200_000_000  # and of a bucket the part that is a process's own
    assert one - eight == pytest.approx(7 / 8 * spread, rel=1e-6)


def test_out_of_memory_gives_the_peaks_that_were_planned_with(run_of):
    def fix(settings, world=1):
        return out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), run_of(settings, "5b", world)).fix

    now, low = (estimate(run_of(LoraSettings(), "5b"), memory=memory) for memory in ("auto", "low"))
    assert f"--memory low: about {low.peak / GIB:.1f} GiB instead of {now.peak / GIB:.1f} GiB" in fix(LoraSettings())
    assert f"and {low.plan.host(low.load) / GIB:.1f} GiB of host memory" in fix(LoraSettings())
    assert "a smaller --resolution" in fix(LoraSettings(memory="low"))  # nothing of ours is left to turn
    assert "a smaller --resolution" in fix(SftSettings(strategy="ddp", memory="low"))
    assert fix(SftSettings(strategy="zero2-offload")).startswith("--strategy ddp --memory low: about ")
    both = fix(SftSettings(strategy="zero2"), 2)
    assert both.startswith("--strategy zero3: about ") and "; or --strategy zero3-offload --memory low: " in both
    assert "--batch-size 1 --accumulate 6 (the same global batch)" in fix(LoraSettings(batch_size=3, accumulate=2))


def test_a_card_that_auto_fills_to_the_host_is_told_nothing_that_changes_nothing(run_of):
    run = run_of(LoraSettings(), "5b")
    auto, low = (estimate(run, card=int(5.6 * GIB), memory=memory) for memory in ("auto", "low"))
    assert auto.plan == low.plan
