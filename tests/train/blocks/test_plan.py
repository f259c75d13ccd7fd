"""Which plan is chosen for which memory, and that the arithmetic is near what was measured elsewhere."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from cogcommon.model.families import BY_NAME
from cogtrain.blocks.load import Load
from cogtrain.blocks.plan import BlockPlan, choose_plan, fits, ladder
from cogtrain.blocks.trial import Missing
from cogtrain.memory.install import flash4_note, notes
from cogtrain.memory.seconds import H200
from workshop.bench_train.subject import random_checkpoint

GIB = 2**30
LORA = {"2b": 59_000_000, "5b": 132_100_000, "1.5-5b": 132_100_000}  # weights trained at rank 128


def load_of(family, trained=None, **options):
    config = random_checkpoint(family).transformer_config
    bytes_ = LORA[family] * 16 if trained is None else trained
    return Load.of(config, BY_NAME[family].tokens(BY_NAME[family].native), batch=1, size=2, trained=bytes_, **options)


def plan_for(memory, family, gib, host=200, compiled=True, **options):
    load = load_of(family, **options)
    return choose_plan(memory, load, free=int(gib * GIB), fits_host=room(load, host), compiled=compiled)


def room(load, gib):
    """Of a host that has so much to lock, of which a plan may take 0.8."""
    return lambda plan: plan.host(load) <= 0.8 * gib * GIB


def test_load_of_5b_is_what_it_weighs():
    load = load_of("5b")
    assert load.activation == 17_776 * 3072 * 2
    assert load.whole / 2 == pytest.approx(5.57e9, rel=0.01)
    small, positions = load_of("2b"), 17_776 * 1920
    assert small.whole / 2 - positions == pytest.approx(1.69e9, rel=0.02)


@pytest.mark.parametrize(
    ("keep", "options", "measured"),
    # Measured on an H200, torch 2.11: full checkpointing compiled, attention kept, nothing recomputed.
    [("attention", {}, 21.5), ("all", {}, 73.0)],
)
def test_predictions_are_near_measurements(keep, options, measured):
    load = load_of("5b")
    assert BlockPlan((keep,) * 42, compiled=True, **options).peak(load) / GIB == pytest.approx(measured, rel=0.1)


def test_fast_keeps_as_much_as_fits():
    assert plan_for("fast", "5b", 80).checkpointing == ("matmuls",) * 42
    some = plan_for("fast", "1.5-5b", 80)
    assert 0 < some.checkpointing.count("matmuls") < 42 and not some.offload_activations and not some.swap_blocks
    assert set(some.checkpointing) == {"matmuls", "attention"}
    assert plan_for("fast", "5b", 24) == plan_for("auto", "5b", 24)


def test_auto_moves_to_the_host_what_does_not_fit_and_no_more():
    plans = [plan_for("auto", "5b", gib) for gib in (80, 22, 16.8, 12, 5.6)]
    assert [(plan.offload_activations, plan.swap_blocks, plan.checkpointing[0]) for plan in plans] == [
        (False, False, "attention"),
        (True, False, "feedforward"),  # what waits in host memory may be more
        (True, False, "attention"),
        (True, True, "feedforward"),
        (True, True, "attention"),
    ]
    assert all(len(set(plan.checkpointing)) == 1 for plan in plans)
    assert plan_for("auto", "5b", 22, host=20).checkpointing == ("attention",) * 42  # not enough of the host's for more


def test_low_moves_all_and_fits_the_small_cards():
    for family, gib in (("5b", 8.5), ("1.5-5b", 11), ("2b", 4)):
        plan = plan_for("low", family, 80)
        assert plan.offload_activations and plan.swap_blocks
        assert plan.peak(load_of(family)) < gib * GIB
    assert plan_for("low", "1.5-5b", 12, host=30).checkpointing == ("inputs",) * 42  # not enough of the host's
    assert not plan_for("low", "1.5-5b", 12, host=10).swap_blocks


def test_what_is_not_compiled_parks_only_what_hooks_reach():
    for gib in (8, 22, 30):
        plan = plan_for("auto", "5b", gib, compiled=False)
        assert set(plan.checkpointing) == ({"inputs"} if plan.offload_activations else {"attention"})


@pytest.mark.parametrize(
    ("host", "locked", "of_gpu"),
    # Host memory beside the system's and Python's own, the 10.4 GiB of weights in it; 12 GB card: 11.5 GiB are free.
    [(26, 19.1, 4.8), (22, 14.6, 5.3), (14, 10.3, 8.6)],
)
def test_low_needs_less_of_a_small_host_as_long_as_the_card_is_enough(host, locked, of_gpu):
    plan, load = plan_for("low", "5b", 11.5, host=host), load_of("5b")
    assert plan.swap_blocks and fits(plan, load, int(11.5 * GIB))
    assert plan.host(load) / GIB == pytest.approx(locked, abs=0.1)
    assert plan.peak(load) / GIB == pytest.approx(of_gpu, abs=0.1)


def test_a_run_says_what_it_lacks():
    load = load_of("5b")
    wanted, free = plan_for("low", "5b", 11.5), int(11.5 * GIB)
    assert notes(wanted, wanted, load, free=free, host_free=200 * GIB) == []
    plan = plan_for("low", "5b", 11.5, host=14)
    (short,) = notes(plan, wanted, load, free=free, host_free=14 * GIB)
    assert "19.1 GiB would be locked, 14.0 GiB are free; 10.3 GiB will be" in short
    plan = plan_for("low", "5b", 11.5, host=8)  # the weights alone are more
    short, large = notes(plan, wanted, load, free=free, host_free=8 * GIB)
    assert "may not fit: about 15." in large and "--rank" in large


def test_full_fine_tuning_and_deepspeed_stream_nothing():
    trained = int(1.69e9 * 16)
    assert not plan_for("low", "2b", 80, trained=trained, frozen=False).swap_blocks
    assert not plan_for("low", "5b", 80, can_swap=False).swap_blocks


def test_when_nothing_fits_the_smallest_is_tried():
    load = load_of("5b")
    plan = plan_for("auto", "5b", 1)
    assert plan.peak(load) <= plan_for("low", "5b", 80).peak(load)


@pytest.mark.parametrize(("host_gib", "auto"), [(1, "inputs"), (200, "all")])
def test_a_cpu_has_one_memory(host_gib, auto):
    load = load_of("2b")
    plans = {
        memory: choose_plan(
            memory, load, free=0, fits_host=lambda plan: plan.alone(load) <= host_gib * GIB, compiled=False, gpu=False
        )
        for memory in ("fast", "auto", "low")
    }
    assert {memory: set(plan.checkpointing) for memory, plan in plans.items()} == {
        "fast": {"all"}, "auto": {auto}, "low": {"inputs"},
    }  # fmt: skip
    assert plans["low"].offload_activations and plans["low"].swap_blocks and not plans["auto"].offload_activations
    kept = plans["fast"].alone(load) - plans["low"].alone(load)
    assert kept > 10 * load.layers * load.activation  # of which the one that is computed again is little


def test_a_plan_says_what_it_does():
    assert str(plan_for("low", "5b", 80)) == (
        "all but the attention is recomputed, what is kept waits in host memory, "
        "frozen weights come from host memory, blocks compiled"
    )
    assert "in 20 blocks" in str(BlockPlan(("matmuls",) * 20 + ("attention",) * 22))


def test_a_plan_is_found_again_by_its_fields_and_not_by_its_sentence():
    for memory in ("fast", "auto", "low"):
        for plan in ladder(memory, load_of("5b", frozen=False, accumulate=1), compiled=True):
            assert BlockPlan.of_fields(json.loads(json.dumps(plan.fields()))) == plan
    one, other = (BlockPlan(("inputs",) * 2, chunks=chunks) for chunks in (1, 4))
    assert str(one) == str(other) and one.fields() != other.fields()


@pytest.mark.parametrize(("capability", "compiled", "says"), [(9, True, True), (9, False, False), (10, True, False)])
def test_what_flash_attention_4_would_save_is_said_of_what_was_measured(monkeypatch, capability, compiled, says):
    """Of an H200's 2.04 s (cuDNN) and 1.73, twice, for a step accumulates two batches; of Blackwell no seconds."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
    run = SimpleNamespace(method=SimpleNamespace(full=False), settings=SimpleNamespace(accumulate=2))
    missing = Missing("is not installed", "pip install it")
    note = flash4_note(run, load_of("5b"), plan_for("fast", "5b", 139, compiled=compiled), H200, missing)
    assert note.startswith("note: FlashAttention 4 is not installed, and ") and note.endswith(": pip install it")
    saved = re.search(r"would save about (.*) s a step", note)
    assert (float(saved[1]) == pytest.approx(2 * (2.04 - 1.73), rel=0.15)) if says else saved is None
