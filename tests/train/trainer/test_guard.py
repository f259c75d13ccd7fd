"""Losses that are not finite, and memory that is not enough."""

import dataclasses
import math

import pytest
import torch

from cogcommon.errors import RunError
from cogtrain.data import batches
from cogtrain.data.sampler import Sampler
from cogtrain.data.shards import open_shards
from cogtrain.runs.folder import read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.trainer.failures import out_of_memory


@pytest.fixture
def spoil(monkeypatch):
    """spoil(index): that sample becomes NaN when it is read."""
    read = batches.read_sample

    def make(spoilt):
        def read_spoilt(shards, index, stop=None):
            sample = read(shards, index)
            return dataclasses.replace(sample, text=sample.text * math.nan) if index == spoilt else sample

        monkeypatch.setattr(batches, "read_sample", read_spoilt)

    return make


def test_a_loss_that_is_not_finite_stops_and_names_the_sample(tmp_path, make_shards, train_here, losses, spoil):
    make_shards(tmp_path / "out", samples=4)
    shards = open_shards([str(tmp_path / "out")])
    step = [int(batch[0]) for batch in Sampler(shards.shard_of, shards.bucket_of, 1, 42).epoch(0)].index(2) + 1
    spoil(2)
    with pytest.raises(RunError, match="loss of 1 sample is not finite") as caught:
        train_here(LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "run", epochs=1, rank=2))
    extent = shards.extent(2)
    assert extent.key in caught.value.where and shards.shards[extent.shard].shown in caught.value.where
    assert f"step {step}" in caught.value.where and "--on-nonfinite skip" in caught.value.fix
    assert len(losses(tmp_path / "run")) == step - 1  # nothing was trained on it


def test_skip_leaves_it_out_and_goes_on(tmp_path, make_shards, train_here, spoil, capsys):
    make_shards(tmp_path / "out", samples=4)
    spoil(2)
    settings = LoraSettings(
        shards=[str(tmp_path / "out")], out=tmp_path / "run", epochs=2, rank=2, on_nonfinite="skip", accumulate=2
    )
    steps = read_run(train_here(settings)).steps
    assert len(steps) == 4 and all(line.loss and math.isfinite(line.grad_norm) for line in steps)
    assert open_shards([str(tmp_path / "out")]).extent(2).key in capsys.readouterr().out


@pytest.mark.parametrize(
    "strategies",
    [pytest.param(["ddp"], id="ddp"), pytest.param(["zero2", "zero3"], id="zero", marks=pytest.mark.full)],
)
def test_skip_on_two_processes(tmp_path, make_shards, run_ranks, losses, strategies):
    make_shards(tmp_path / "out", samples=6)
    settings = {"shards": [str(tmp_path / "out")], "epochs": 1, "on_nonfinite": "skip"}
    cases = [
        {"name": name, "method": "sft", "spoil": 1, "settings": settings | {"strategy": name, "out": tmp_path / name}}
        for name in strategies
    ]
    run_ranks(2, cases, tmp_path / "ranks")
    for name in strategies:
        found = [*losses(tmp_path / name).values()]
        assert len(found) == 3 and found.count(None) == 1  # the step whose only accumulation was left out


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (LoraSettings(memory="fast"), ["--memory auto"]),
        (LoraSettings(), ["--memory low"]),
        (LoraSettings(batch_size=2, accumulate=2), ["--batch-size 1 --accumulate 4", "--memory low"]),
        # zero2-offload begins with all weights twice on the GPU: 5B took 20.75 GiB, and ddp with --memory low 3.56.
        (SftSettings(strategy="zero2"), ["--strategy ddp: about", "--strategy ddp --memory low: about"]),
        (SftSettings(strategy="zero2", optimizer="adamw8bit"), ["--strategy ddp: about"]),  # none on the host
        (SftSettings(strategy="zero3", memory="low"), ["--strategy ddp"]),
        (SftSettings(strategy="zero2-offload", memory="low"), ["--strategy ddp: about"]),
        (SftSettings(memory="low"), ["smaller --resolution"]),  # the least there is
    ],
)
def test_out_of_memory_says_what_lowers_the_peak_and_by_how_much(tmp_path, make_shards, settings, advice):
    make_shards(tmp_path, samples=4)
    run = open_run(dataclasses.replace(settings, shards=[str(tmp_path)]), torch.device("cpu"), 1)
    error = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), run)
    assert all(part in error.fix for part in advice)
    assert "GiB" in error.fix or "resolution" in error.fix
    assert error.where == "CUDA out of memory. Tried to allocate 2 GiB."


def test_out_of_memory_in_a_step_becomes_that_message(tmp_path, make_shards, train_here, monkeypatch):
    from cogtrain.model.objective import Objective

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    make_shards(tmp_path / "out", samples=2)
    monkeypatch.setattr(Objective, "losses", full)
    with pytest.raises(RunError, match="out of GPU memory"):
        train_here(LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=1, rank=2))
