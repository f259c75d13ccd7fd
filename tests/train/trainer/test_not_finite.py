"""Gradients, weights and held-out losses that are not finite: nothing of them is kept, and the run goes on from before.

Losses that are not finite are in test_guard.py.
"""

import dataclasses
import json
import math
import weakref
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from nan_gradient import make_gradients_nan

from cogcommon.errors import RunError
from cogtrain.data import batches
from cogtrain.distributed.strategy import Runtime, read_weights
from cogtrain.model import lora
from cogtrain.model.finite import all_finite
from cogtrain.model.objective import Objective
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.runs.folder import read_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.trainer.step_check import Judge

STEPS = 3
SAME = {"steps": STEPS, "lr": 1e-2, "save_every": 1, "keep": 9, "seed": 3}


class _Fused(torch.optim.AdamW):
    """A GPU's optimizer, with which losses are read a step late."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **(options | {"fused": True}))


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps): the gradients of these steps are NaN from now on."""
    return make_gradients_nan(monkeypatch.setattr)


@pytest.fixture
def here(tmp_path, make_shards, train_here):
    """here(name, options of `train`, **settings) -> run folder."""
    make_shards(tmp_path / "out", samples=6)

    def run(name="run", cls=LoraSettings, options=None, **settings):
        small = {"rank": 4} if cls is LoraSettings else {}
        given = SAME | small | {"shards": [str(tmp_path / "out")], "out": tmp_path / name} | settings
        return train_here(cls(**given), **options or {})

    return run


def steps_saved(run):
    return [int(path.name[11:]) for path in checkpoints.list_checkpoints(run)]


def check_whole(run):
    """Everything in every checkpoint is finite."""
    for folder in checkpoints.list_checkpoints(run):
        assert all_finite(read_weights(folder).values()), folder


@pytest.mark.parametrize(
    ("cls", "settings", "late"),
    [
        pytest.param(LoraSettings, {}, False, id="plain", marks=pytest.mark.full),
        pytest.param(LoraSettings, {"accumulate": 2}, True, id="read-late"),
        pytest.param(
            LoraSettings, {"memory": "low", "ema": 0.9}, True, id="parked-and-streamed", marks=pytest.mark.full
        ),
        pytest.param(LoraSettings, {"optimizer": "prodigy", "lr": 1.0}, False, id="prodigy", marks=pytest.mark.full),
        pytest.param(SftSettings, {"memory": "low", "precision": "bf16"}, False, id="trained-on-the-host"),
    ],
)
def test_a_nan_gradient_is_in_no_checkpoint_and_three_restarts_go_on(
    here, spoil, monkeypatch, cls, settings, late, losses
):
    if late:
        monkeypatch.setattr(torch.optim, "AdamW", _Fused)
    undisturbed = losses(here("undisturbed", cls, **settings))
    for step in (2, 2, 3):
        spoil([step])
        with pytest.raises(RunError, match="the gradient is not finite, though every loss is") as caught:
            here("run", cls, **settings)
        assert f"step {step};" in caught.value.where and "--on-nonfinite skip" in caught.value.fix
    spoil([])
    run = here("run", cls, **settings)
    assert losses(run) == undisturbed
    assert steps_saved(run) == [1, 2, 3]
    check_whole(run)


def test_skip_leaves_the_step_out_and_says_so(here, spoil, capsys):
    spoil([2, 4])
    run = here(on_nonfinite="skip", steps=5)
    assert "step 2: the gradient is not finite, though every loss is; the step is left out" in capsys.readouterr().out
    norms = [line.grad_norm for line in read_run(run).steps]
    assert [norm is None for norm in norms] == [False, True, False, True, False]
    weights = [read_weights(folder) for folder in checkpoints.list_checkpoints(run)]
    same = [all(torch.equal(one[name], two[name]) for name in one) for one, two in pairwise(weights)]
    assert same == [True, False, True, False]
    check_whole(run)


def test_a_run_of_which_no_step_was_made_does_not_end_well(here, spoil):
    spoil(range(99))
    with pytest.raises(RunError, match="the gradient is not finite for 3 steps in a row, though every loss is"):
        here(on_nonfinite="skip")


STRATEGIES = ["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


# On CPUs --memory fast is auto's plan. What is not disturbed gives the same losses under both.
@pytest.mark.parametrize(
    ("strategy", "methods", "memories"),
    [
        pytest.param("zero3", ["sft"], ["auto"], id="zero3-sft"),
        *(
            pytest.param(name, [method], ["auto", "low"], id=f"{name}-{method}", marks=pytest.mark.full)
            for name, method in product(STRATEGIES, ("lora", "sft"))
        ),
    ],
)
def test_under_each_strategy_on_two_processes(tmp_path, make_shards, run_ranks, strategy, methods, memories, losses):
    make_shards(tmp_path / "out", samples=8)
    cases = []
    for method, memory in product(methods, memories):
        whole = [("whole", [])] if memory == "auto" else []
        for name, spoilt in (*whole, ("run", [2]), ("run", [2]), ("run", [3]), ("run", [])):
            settings = SAME | {"shards": [str(tmp_path / "out")], "strategy": strategy, "memory": memory}
            settings["out"] = tmp_path / f"{method}-{name}-{memory if name == 'run' else ''}"
            number = f"{len(cases)}-{method}-{memory}-{name}-{spoilt}"
            cases.append({"name": number, "method": method, "nan_gradient": spoilt, "settings": settings})
    ranks = run_ranks(2, cases, tmp_path / "ranks")
    for case in cases:
        faults = [seen.get("error", [""]) for seen in ranks[case["name"]]]
        if case["nan_gradient"]:
            assert "the gradient is not finite" in faults[0][1], case["name"]
            assert faults[1][0] == "PeerFailed"  # said once
        else:
            assert faults == [[""], [""]], case["name"]
            run = case["settings"]["out"]
            assert losses(run) == pytest.approx(losses(tmp_path / f"{case['method']}-whole-"), rel=1e-6)
            assert steps_saved(run) == [1, 2, 3]
            check_whole(run)


def poison(monkeypatch, step):
    """Options of `train` with which a weight is infinite once a step is made, as too large a step of the optimizer
    would leave it."""
    seen, prepare = [], Runtime.prepare

    def watched(self, model, optimizer, **named):
        seen[:] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return prepare(self, model, optimizer, **named)

    def poisoned(number):
        if number == step:
            with torch.no_grad():
                seen[0].view(-1)[0] = math.inf

    monkeypatch.setattr(Runtime, "prepare", watched)
    return {"after_step": poisoned}


@pytest.mark.parametrize("cls", [LoraSettings, SftSettings])
def test_weights_that_are_not_finite_are_not_saved(here, monkeypatch, cls):
    options = poison(monkeypatch, 2)
    with pytest.raises(RunError, match="the weights, or the optimizer's state, are not finite") as caught:
        here(cls=cls, options=options)
    assert caught.value.where == "step 2" and "resume the last checkpoint" in caught.value.fix


def test_a_checkpoint_that_is_not_finite_is_neither_resumed_nor_exported(here):
    import safetensors.torch

    from cogtrain.commands.export import run as export
    from cogtrain.settings.results import ExportSettings

    run = here(steps=2)
    file = run / "checkpoint-2" / "weights.safetensors"
    weights = safetensors.torch.load_file(file)
    next(iter(weights.values())).view(-1)[0] = math.nan
    safetensors.torch.save_file(weights, file)
    with pytest.raises(RunError, match="not finite") as caught:
        here(steps=3)
    assert "resume an older one" in caught.value.fix
    with pytest.raises(RunError, match="not finite: nothing was written"):
        export(ExportSettings(run=run / "checkpoint-2"))
    assert not (run / "checkpoint-2" / "exported" / "diffusers" / lora.FILE).exists()


def test_weights_too_large_for_the_files_type_are_not_exported(here):
    from cogtrain.commands.export import run as export
    from cogtrain.settings.results import ExportSettings

    run = here(cls=SftSettings, steps=1, precision="fp32")
    import safetensors.torch

    file = run / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    next(iter(weights.values())).view(-1)[0] = 1e6
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match="the weights, in float16, are not finite"):
        export(ExportSettings(run=run, precision="fp16"))


def test_skip_frees_the_first_pass_before_it_makes_the_second(here, monkeypatch):
    kept, passes = [], []
    plain = Objective.losses

    def watched(self, transformer, batch, dtype):
        passes.append(sum(ref() is not None for ref in kept))
        found = plain(self, transformer, batch, dtype)
        if transformer.training and not kept:
            found = found * math.nan
            kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Objective, "losses", watched)
    here(steps=2, on_nonfinite="skip")
    assert kept and passes[:2] == [0, 0]


def test_a_held_out_loss_that_is_not_finite_breaks_neither_report_nor_card(
    here, tmp_path, make_shards, monkeypatch, capsys
):
    read = batches.read_sample
    from cogtrain.validation import validate

    make_shards(tmp_path / "held", samples=2, seed=7, captions=("other",))

    def read_spoilt(shards, index, *stop):
        sample = read(shards, index)
        return dataclasses.replace(sample, text=sample.text * math.nan) if index == 1 else sample

    monkeypatch.setattr(validate, "read_sample", read_spoilt)
    options = {"validate_shards": [str(tmp_path / "held")], "validate_every": 2}
    run = here(steps=2, **options)
    here(steps=4, **options)  # the base model's loss is remembered as what it was
    said = capsys.readouterr().out
    assert "held-out loss not finite, base model not finite" in said and "note: the held-out" in said
    assert [line.val_loss for line in read_run(run).validations] == [None, None]
    json.loads((run / "validation/base.json").read_text(), parse_constant=pytest.fail)
    assert "<b>not finite</b>" in (run / "report.html").read_text() and "nan" not in (run / "report.html").read_text()
    assert "| held-out loss | not finite at step 4; the base model's is not finite |" in (run / "README.md").read_text()


def test_fp16s_scale_is_given_time_to_come_down_and_no_more():
    run = SimpleNamespace(precision="fp16", settings=SimpleNamespace(on_nonfinite="stop"), steps=99)
    judge = Judge(run, SimpleNamespace(main=True), None)
    for step in range(1, 25):
        assert judge.gradient(step, math.inf, samples=1)  # the scaler leaves it out, and halves its scale
    assert judge.gradient(25, 1.0, samples=1)
    for step in range(26, 50):
        assert judge.gradient(step, math.inf, samples=1)
    with pytest.raises(RunError, match="not finite for 25 steps in a row") as caught:
        judge.gradient(50, math.inf, samples=1)
    assert "--precision bf16" in caught.value.fix
    short = Judge(run, SimpleNamespace(main=True), None)
    for step in (1, 2, 3):
        short.gradient(step, math.inf, samples=1)
    with pytest.raises(RunError, match="nothing was trained in 3 steps: each had a gradient too large for fp16"):
        short.end()
    mixed = Judge(run, SimpleNamespace(main=True), None)
    mixed.gradient(1, 0.0, samples=0)
    mixed.gradient(2, math.inf, samples=1)
    with pytest.raises(RunError, match="no sample's loss is finite in 1 of them, and no gradient in the others"):
        mixed.end()
    skip = SimpleNamespace(precision="bf16", settings=SimpleNamespace(on_nonfinite="skip"), steps=99)
    lossless = Judge(skip, SimpleNamespace(main=True), None)
    for step in range(1, 25):
        assert not lossless.gradient(step, 0.0, samples=0)
    with pytest.raises(RunError, match="no sample's loss is finite in 24 of them") as caught:
        lossless.gradient(25, math.inf, samples=1)
    assert "--on-nonfinite skip" not in caught.value.fix  # that was given
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_scale() * 0.5**24 < 1


@pytest.mark.parametrize(
    ("tensors", "finite"),
    [
        ([torch.ones(3), torch.zeros(0), torch.arange(3)], True),
        ([torch.tensor([1.0, math.nan, 2.0])], False),
        ([torch.tensor([1.0, -math.inf], dtype=torch.bfloat16)], False),
        ([torch.nn.Parameter(torch.tensor([math.inf], dtype=torch.float16))], False),
    ],
)
def test_what_is_finite(tensors, finite):
    assert all_finite(tensors) == finite
