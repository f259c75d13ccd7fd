"""All weights trained in host memory: the run is that of torch's AdamW on plain fp32 weights."""

import dataclasses
import functools
import math
import threading
import time

import pytest
import torch
from block_runs import CPU, FORMS, LAYERS, LateCopies, gradients, loss_of, transformer_of

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME
from cogcommon.model.tiny import NATIVE
from cogtrain.blocks.engine import BlockEngine
from cogtrain.blocks.load import Load
from cogtrain.blocks.plan import BlockPlan, choose_plan
from cogtrain.distributed.strategy import read_weights
from cogtrain.memory import install
from cogtrain.memory.estimate import can_train_on_cpu
from cogtrain.memory.install import no_room
from cogtrain.offload import cpu_adam
from cogtrain.offload.cpu_adam import CpuAdamW
from cogtrain.runs.folder import read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import SftSettings
from workshop.bench_train.subject import random_checkpoint

# Where a gradient should be zero (a key's bias), AdamW would make whole steps of rounding errors but for this epsilon.
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-6}
STEPS = 3
GIB = 2**30
FULL_TOKENS = BY_NAME["5b"].tokens(BY_NAME["5b"].native)
LARGEST = 0.05  # below every norm here, so that clipping counts


def plain(form, accumulate=1, device=CPU):
    """Weights after three steps of torch's AdamW on diffusers' own blocks, and the norms."""
    checkpoint, transformer = transformer_of(form, "sft")
    transformer.to(device)
    optimizer = torch.optim.AdamW(transformer.parameters(), **OPTIONS)
    norms = []
    for _ in range(STEPS):
        total = {}
        for micro in range(accumulate):
            for name, gradient in gradients(checkpoint, transformer, batch=1 + micro, device=device)[1].items():
                total[name] = total[name] + gradient if name in total else gradient
        for name, parameter in transformer.named_parameters():
            parameter.grad = total.get(name)
        norms.append(float(torch.nn.utils.clip_grad_norm_(transformer.parameters(), LARGEST)))
        optimizer.step()
    return dict(transformer.cpu().named_parameters()), norms


def cpu_trained(form, accumulate=1, dtype=torch.float32, steps=STEPS, compiled=False, device=CPU, blocks=LAYERS):
    """The same with the last ``blocks`` blocks in host memory."""
    checkpoint, transformer = transformer_of(form, "sft")
    plan = BlockPlan(
        ("attention",) * LAYERS, offload_activations=True, train_on_cpu=blocks, chunks=2, compiled=compiled
    )
    engine = BlockEngine(transformer, plan, device, dtype)
    engine.offload_all()
    optimizer = CpuAdamW([*transformer.parameters()], engine.cpu_training, **OPTIONS)
    norms = []
    for _ in range(steps):
        resident = {}
        for micro in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                for name, gradient in gradients(checkpoint, transformer, dtype, 1 + micro, device)[1].items():
                    resident[name] = resident[name] + gradient if name in resident else gradient
        there = {int(name.split(".")[1]) for name in resident if name.startswith("transformer_blocks")}
        assert there == set(range(LAYERS - blocks))  # those of the others have left
        for name, gradient in resident.items():
            transformer.get_parameter(name).grad = gradient
        norms.append(float(optimizer.clip_gradients(LARGEST)))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()  # ends the last step
    return dict(transformer.named_parameters()), norms, engine, optimizer


def farthest(expected, got):
    """The largest difference of a weight, and that of all of them together; relative."""
    assert expected.keys() == got.keys()
    away = {name: float((got[name] - w).detach().norm()) for name, w in expected.items()}
    size = {name: float(w.detach().norm()) for name, w in expected.items()}
    together = sum(d * d for d in away.values()) ** 0.5 / sum(n * n for n in size.values()) ** 0.5
    return max(away[name] / (size[name] + 1e-3) for name in away), together


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("accumulate", "blocks"), [(1, LAYERS), (2, LAYERS), (2, 1)])
def test_three_steps_are_those_of_torchs_adamw(form, accumulate, blocks):
    expected, norms = plain(form, accumulate)
    got, found, *_ = cpu_trained(form, accumulate, blocks=blocks)
    assert found == pytest.approx(norms, rel=1e-5)
    assert all(norm > 2 * LARGEST for norm in norms)
    untrained = dict(transformer_of(form, "sft")[1].named_parameters())
    assert farthest(untrained, got)[1] > 1e-3
    largest, together = farthest(expected, got)
    assert largest < 1e-5
    assert together < 1e-6


def test_in_bf16_it_is_as_near_to_fp32_as_autocast_is():
    exact, norms = plain("tiny")
    checkpoint, transformer = transformer_of("tiny", "sft")
    optimizer = torch.optim.AdamW(transformer.parameters(), **OPTIONS)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            gradients(checkpoint, transformer, torch.bfloat16, batch=1)
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), LARGEST)
        optimizer.step()
    autocast = farthest(exact, dict(transformer.named_parameters()))[1]
    got, found, engine, _ = cpu_trained("tiny", dtype=torch.bfloat16)
    assert found == pytest.approx(norms, rel=0.02)
    assert 0 < farthest(exact, got)[1] < 1.5 * autocast
    for weight in engine.cpu_training:
        assert weight.master.dtype == torch.float32
        assert weight.landing.dtype == torch.bfloat16
        assert torch.equal(weight.copy, weight.master.bfloat16())  # what the next step computes with


def test_gradients_come_as_late_as_they_may(monkeypatch):
    from cogtrain.offload import activations, block_swap, cpu_training

    expected, norms, *_ = cpu_trained("tiny")

    class Late(LateCopies):
        """In their order: the end of one is the end of those before it, as in a CUDA stream."""

        def __init__(self, device):
            super().__init__(device)
            self.begun = []

        def copy(self, target, source, after=None):
            self.begun.append(super().copy(target, source, after))
            return len(self.begun)

        def wait(self, event):
            for number in range(event or 0):
                self.begun[number]()

        compute_after = wait

    monkeypatch.setattr(activations, "CopyStream", LateCopies)
    monkeypatch.setattr(block_swap, "CopyStream", LateCopies)
    monkeypatch.setattr(cpu_training, "CopyStream", Late)
    got, found, *_ = cpu_trained("tiny")
    assert found == norms
    assert farthest(expected, got) == (0, 0)


def test_what_is_not_finite_changes_nothing():
    before, _, _, optimizer = cpu_trained("tiny", steps=1)
    before = {name: weight.detach().clone() for name, weight in before.items()}
    checkpoint, transformer = transformer_of("tiny", "sft")
    del checkpoint, transformer
    for weight in optimizer._training:
        weight.landing.fill_(float("nan"))
        weight.full = True
    optimizer._training._norms.append(torch.tensor(float("nan")))
    assert not optimizer.clip_gradients(1.0).isfinite()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.state_dict()
    assert all(torch.equal(before[id_], w) for id_, w in zip(before, optimizer.param_groups[0]["params"], strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_fp16s_scaler_sees_an_overflow_on_the_host():
    """Scaled by a power of two, steps are the same steps; one gradient on the host too large, and none is made."""

    def train(scaled, overflow=-1):
        checkpoint, transformer = transformer_of("tiny-2b", "sft")
        engine = BlockEngine(transformer, BlockPlan(("inputs",) * LAYERS, train_on_cpu=LAYERS), CPU, torch.float16)
        optimizer = CpuAdamW([*transformer.parameters()], engine.cpu_training, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1) if scaled else None
        norms, scales, weights = [], [], []
        for step in range(STEPS):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(checkpoint, transformer, torch.float16, batch=1)
            (scaler.scale(loss) if scaler else loss).backward()
            if step == overflow:
                weight = engine.cpu_training.blocks[1][3]
                weight.landing.view(-1)[0] = torch.inf
                engine.cpu_training._norms.append(torch.linalg.vector_norm(weight.landing.float()))
            norms.append(float(optimizer.clip_gradients(LARGEST, scaler)))
            if scaler:
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            else:
                optimizer.step()
            optimizer.zero_grad()
            optimizer.state_dict()  # ends the step
            weights.append({name: weight.detach().clone() for name, weight in transformer.named_parameters()})
        return norms, scales, weights, optimizer

    exact, expected = plain("tiny-2b")
    unscaled, scaled = train(scaled=False), train(scaled=True)
    assert scaled[0] == pytest.approx(expected, rel=2e-3) and scaled[1] == [2.0**13, 2.0**14, 2.0**15]
    away = [farthest(exact, weights[-1])[1] for _, _, weights, _ in (unscaled, scaled)]
    assert away[1] < 1e-4 < away[0]  # unscaled, small gradients are zero in fp16
    norms, scales, weights, optimizer = train(scaled=True, overflow=1)
    assert not math.isfinite(norms[1]) and scales == [2.0**13, 2.0**12, 2.0**13]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert farthest(weights[1], weights[2])[1] > 1e-4
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("blocks", [LAYERS, 2])
def test_compiled_blocks_are_one_graph_here_and_one_on_the_host(monkeypatch, blocks):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, norms, *_ = cpu_trained("tiny", blocks=blocks)
    got, found, *_ = cpu_trained("tiny", compiled=True, blocks=blocks)
    assert found == pytest.approx(norms, rel=1e-5)
    assert farthest(expected, got)[1] < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if blocks == LAYERS else 2)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_forward_pass_waits_for_the_blocks_that_it_has_come_to(monkeypatch):
    """A step returns before its updates have been made; `take` waits for those of its block, and for no others'."""
    go = threading.Semaphore(0)
    update = CpuAdamW._update
    monkeypatch.setattr(cpu_adam, "_THREADS", 1)  # several would take permits out of their order

    def late(self, *what):
        go.acquire()
        update(self, *what)

    *_, engine, optimizer = cpu_trained("tiny", steps=1)
    monkeypatch.setattr(CpuAdamW, "_update", late)
    for weight in engine.cpu_training:
        weight.landing.normal_()
        weight.full = True
        engine.cpu_training._norms.append(torch.linalg.vector_norm(weight.landing))
    before = {id(weight): weight.copy.clone() for weight in engine.cpu_training}
    optimizer.clip_gradients(LARGEST)
    optimizer.step()
    optimizer.zero_grad()
    blocks = engine.cpu_training.blocks
    assert all(torch.equal(weight.copy, before[id(weight)]) for weight in engine.cpu_training)
    tasks = [len(engine.cpu_training._updates[index]) for index in range(LAYERS)]
    go.release(sum(tasks[:2]))
    for weight, view in zip(blocks[0], engine.cpu_training.take(0, then=1, training=False), strict=True):
        assert torch.equal(view, weight.copy) and not torch.equal(weight.copy, before[id(weight)])
    assert all(torch.equal(weight.copy, before[id(weight)]) for weight in blocks[-1])
    go.release(sum(tasks))
    optimizer.state_dict()
    assert not any(torch.equal(weight.copy, before[id(weight)]) for weight in blocks[-1])


@pytest.mark.parametrize(("cores", "each"), [(3, 1), (9, 2)])
def test_threads_share_the_cores_and_leave_others_theirs(cores, each):
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        *_, optimizer = cpu_trained("tiny", steps=1)
        workers = optimizer._threads
        assert {update.result() for update in [workers.submit(torch.get_num_threads) for _ in range(20)]} == {each}
        assert torch.get_num_threads() == cores
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [cores]
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu  # copies and updates beside the computation
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_three_steps_are_those_of_torchs_adamw(accumulate):
    expected, norms = plain("tiny", accumulate, torch.device("cuda"))
    for compiled, blocks in ((False, LAYERS), (True, LAYERS), (True, 1)):
        cuda = torch.device("cuda")
        got, found, engine, _ = cpu_trained("tiny", accumulate, compiled=compiled, device=cuda, blocks=blocks)
        assert found == pytest.approx(norms, rel=1e-3)
        assert farthest(expected, {name: weight.cpu() for name, weight in got.items()})[1] < 1e-4
        assert all(weight.master.device.type == "cpu" and weight.landing.is_pinned() for weight in engine.cpu_training)


def test_5b_fits_a_24_gb_card_where_the_host_has_room():
    config = random_checkpoint("5b").transformer_config
    numbers = 5_570_000_000

    def plan(accumulate=1, memory="low", free=22, host=110):
        load = Load.of(config, FULL_TOKENS, batch=1, size=2, trained=16 * numbers, frozen=False,
                       accumulate=accumulate)  # fmt: skip
        fits = lambda plan: plan.host(load) <= 0.8 * host * GIB  # noqa: E731
        return choose_plan(memory, load, free=free * GIB, fits_host=fits, compiled=True), load

    chosen, load = plan()
    assert chosen.train_on_cpu == 42 and chosen.offload_activations and not chosen.swap_blocks
    assert chosen.peak(load) < 12 * GIB
    # Copies, gradients and moments: 12 bytes a weight of the blocks; with accumulation also an fp32 sum.
    assert 42 * load.cpu_trained.host == pytest.approx(12 * numbers, rel=0.02)
    assert 42 * plan(accumulate=2)[1].cpu_trained.host == pytest.approx(16 * numbers, rel=0.02)
    none, load = plan(host=40)
    assert none.train_on_cpu < 42
    error = no_room(none, load, free=22 * GIB, host_free=40 * GIB)
    for part in ("22.0 GiB are free", "66.3 GiB more of host memory", "40.0 GiB are free"):
        assert part in error.what
    assert "host memory" in str(chosen)


def test_no_more_blocks_than_need_be_are_trained_in_host_memory():
    config = random_checkpoint("5b").transformer_config
    trained = 16 * 5_570_000_000
    load = Load.of(config, FULL_TOKENS, batch=1, size=2, trained=trained, arriving=trained // 4, frozen=False,
                   accumulate=1)  # fmt: skip
    plans = {
        free: choose_plan(
            "auto", load, free=free * GIB, fits_host=lambda plan: plan.host(load) <= 160 * GIB, compiled=True
        )
        for free in (140, 79, 60, 40, 22, 4)
    }
    counts = [plan.train_on_cpu for plan in plans.values()]
    assert counts[0] == 0 and counts[-1] == 42 and counts == sorted(counts) and len(set(counts)) == 6
    for free, plan in plans.items():
        assert plan.peak(load) <= 0.88 * free * GIB
        if plan.train_on_cpu not in (0, 42):  # with one block fewer there it would not fit
            fewer = dataclasses.replace(plan, train_on_cpu=plan.train_on_cpu - 1)
            assert fewer.peak(load) > 0.88 * free * GIB and fewer.host(load) < plan.host(load)
            assert f"of {plan.train_on_cpu} blocks are in host memory" in str(plan)


def test_predicted_host_bytes_are_those_that_are_there():
    *_, engine, optimizer = cpu_trained("tiny", accumulate=2, steps=1)
    weights = [*engine.cpu_training]
    held = [tensor for w in weights for tensor in (w.copy, w.landing, w.total)]
    held += [optimizer.state[w.master][name] for w in weights for name in ("exp_avg", "exp_avg_sq")]
    numbers = sum(w.master.numel() for w in weights)
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 20 * numbers
    config = dict(open_checkpoint("random-tiny").transformer_config) | {"num_layers": LAYERS}
    load = Load.of(config, BY_NAME["5b"].tokens(NATIVE), batch=1, size=4, trained=0, frozen=False, accumulate=2)
    assert LAYERS * load.cpu_trained.host == pytest.approx(
        20 * numbers, rel=0.1
    )  # norms and biases count for more in a small one


# Whole runs


@pytest.fixture
def run(tmp_path, make_shards, train_here):
    """run(name, form, **settings) -> losses, gradient norms and the folder of a run of four samples."""

    def train(name, form="tiny", **settings):
        if not (tmp_path / form).exists():
            make_shards(tmp_path / form, form, samples=4)
        common = {"shards": [str(tmp_path / form)], "lr": 1e-3, "seed": 3, "memory": "low"}
        folder = train_here(SftSettings(**common | {"out": tmp_path / name} | settings))
        steps = read_run(folder).steps
        return [line.loss for line in steps], [line.grad_norm for line in steps], folder

    return train


@pytest.mark.parametrize(("form", "accumulate"), [("tiny", 2), ("tiny-1.5-i2v", 1), ("tiny-2b", 1)])
def test_a_run_is_the_same_run_under_every_memory_setting(run, form, accumulate):
    settings = {"steps": 4, "accumulate": accumulate, "caption_dropout": 0.5}
    auto = run("auto", form, memory="auto", **settings)
    low = run("low", form, **settings)
    assert low[0] == pytest.approx(auto[0], rel=1e-5)
    assert low[1] == pytest.approx(auto[1], rel=1e-4)
    assert low[0][0] != low[0][-1]
    assert (low[2] / "transformer/config.json").is_file()  # loaded back and compared by the run itself


@pytest.fixture
def one_block(monkeypatch):
    """Runs train their last block in host memory and the others where they compute, as on a card of middling size."""
    monkeypatch.setattr(
        install,
        "choose_plan",
        lambda memory, load, **free: BlockPlan(("inputs",) * load.layers, offload_activations=True, train_on_cpu=1),
    )


@pytest.mark.parametrize("form", ["tiny", "tiny-i2v"])
def test_a_run_with_one_block_in_host_memory_is_that_run_and_is_resumed(run, form, request):
    settings = {"steps": 4, "caption_dropout": 0.5}
    plain = run("auto", form, memory="auto", **settings)
    request.getfixturevalue("one_block")
    whole = run("whole", form, **settings)
    assert "states of 1 block are in host memory" in read_run(whole[2]).facts.plan
    assert whole[0] == pytest.approx(plain[0], rel=1e-5)
    run("parts", form, **settings | {"steps": 2})
    parts = run("parts", form, **settings)
    assert parts[0] == whole[0] and parts[1] == whole[1]
    assert (parts[2] / "transformer/config.json").is_file()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_bit_equal(run, accumulate):
    settings = {"accumulate": accumulate, "caption_dropout": 0.5, "precision": "bf16"}
    whole = run("whole", steps=4, **settings)
    run("parts", steps=2, **settings)
    parts = run("parts", steps=4, **settings)
    assert parts[0] == whole[0] and parts[1] == whole[1]
    one, two = (read_weights(folder / "checkpoint-4") for *_, folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(weight.dtype == torch.float32 for weight in one.values())


def test_a_run_goes_on_under_another_memory_setting(run):
    whole = run("whole", steps=4)
    run("parts", steps=2, memory="auto")
    assert run("parts", steps=4)[0] == pytest.approx(whole[0], rel=1e-5)


def test_validation_sees_the_weights_as_they_are(run, tmp_path, make_shards):
    make_shards(tmp_path / "held", samples=2, seed=7, captions=("other",))
    lines = []
    for memory in ("auto", "low"):
        folder = run(memory, memory=memory, steps=4, validate_every=2, validate_shards=[str(tmp_path / "held")])[2]
        lines.append([(line.val_loss, line.base_val_loss) for line in read_run(folder).validations])
    assert len(lines[1]) == 2 and lines[1][1][0] != lines[1][0][0] != lines[1][0][1]
    for auto, low in zip(*lines, strict=True):
        assert low == pytest.approx(auto, rel=1e-5)


def test_who_may_train_in_host_memory(tmp_path, make_shards):
    make_shards(tmp_path / "out", "tiny-2b", samples=4)
    settings = SftSettings(shards=[str(tmp_path / "out")], memory="low")
    low = open_run(settings, torch.device("cuda"), 1)
    assert low.precision == "fp16" and low.strategy == "ddp" and can_train_on_cpu(low, low.strategy)
    for other in ({"ema": 0.9, "strategy": "ddp"}, {"optimizer": "prodigy", "lr": 1.0}, {"strategy": "zero2"}):
        run = open_run(dataclasses.replace(low.settings, **other), torch.device("cuda"), 1)
        assert not can_train_on_cpu(run, run.strategy)


def test_the_export_waits_for_the_last_step(run, monkeypatch):
    """It is written before the checkpoint, and the last step's updates may still be under way."""
    import safetensors.torch

    from cogtrain.offload.cpu_adam import CpuAdamW

    update = CpuAdamW._update

    def slowly(self, updates, factor):
        time.sleep(0.2)
        update(self, updates, factor)

    monkeypatch.setattr(CpuAdamW, "_update", slowly)
    folder = run("slow", steps=2, lr=1e-2, precision="fp32")[2]
    saved = read_weights(folder / "checkpoint-2")
    exported = safetensors.torch.load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
