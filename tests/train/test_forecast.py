"""``cogtrain plan``: which settings fit a card, what it prints, and the two steps that check it."""

import dataclasses
import json
import shlex

import pytest
import torch

from cogcommon.errors import SettingError
from cogcommon.families import BY_NAME
from cogtrain import forecast
from cogtrain.bench.hardware import computed_for
from cogtrain.bench.subject import random_checkpoint, random_shards
from cogtrain.measured import REFERENCE, measured
from cogtrain.run import open_run
from cogtrain.settings import PlanSettings

GIB = 2**30


@pytest.fixture
def plan_of(tmp_path, make_shards, monkeypatch):
    """plan_of(gib, gpus, **settings): forecasts for a 5B of true shape at its native size."""

    def open_large(settings, device, world):
        run = open_run(settings, device, world)
        checkpoint = random_checkpoint("5b")
        shards = random_shards(checkpoint, BY_NAME["5b"].native, samples=1)
        return dataclasses.replace(run, checkpoint=checkpoint, shards=shards, precision="bf16")

    make_shards(tmp_path / "out", samples=8)
    monkeypatch.setattr(forecast, "open_run", open_large)
    return lambda gib, gpus=1, **settings: forecast.forecasts(
        PlanSettings(shards=[str(tmp_path / "out")], **settings), int(gib * GIB), gpus
    )


def of(lines, method, strategy):
    return {line.memory: line for line in lines if (line.method, line.strategy) == (method, strategy)}


def test_a_card_of_24_gb_and_of_12(plan_of):
    large, small = (of(plan_of(gib), "lora", "ddp") for gib in (24, 12))
    assert large["auto"].fits and large["low"].fits and large["low"].peak_gib < large["auto"].peak_gib
    assert small["auto"].fits and small["low"].fits and small["low"].peak_gib == large["low"].peak_gib
    smallest = of(plan_of(5.6), "lora", "ddp")
    assert (
        list(smallest) == ["auto"] and smallest["auto"].fits
    )  # where all that can moves anyway, the dial has one place


def test_full_fine_tuning_of_5b_is_spread_or_offloaded(plan_of):
    one, eight = plan_of(80, method="sft"), plan_of(80, 8, method="sft")
    assert {line.method for line in one} == {"sft"}
    assert not any(line.fits for line in of(eight, "sft", "ddp").values())  # 16 bytes for each of 5.6 billion weights
    assert any(line.fits for line in of(one, "sft", "zero2-offload").values())
    assert not of(one, "sft", "zero3") and of(eight, "sft", "zero3")["auto"].fits
    peaks = [of(eight, "sft", strategy)["auto"].peak_gib for strategy in ("ddp", "zero1", "zero2", "zero3")]
    assert peaks == sorted(peaks, reverse=True)
    # Offloaded: weight, gradient and two moments in fp32.
    assert of(one, "sft", "zero2-offload")["auto"].host_gib >= 16 * 5.57e9 / GIB


def test_full_fine_tuning_of_5b_in_host_memory_fits_half_of_a_small_card(plan_of):
    low = of(plan_of(24, method="sft"), "sft", "ddp")["low"]
    assert low.fits and low.peak_gib < 12
    # fp32 masters and two moments, bf16 copies and gradients; and what the blocks keep.
    assert 16 * 5.5e9 / GIB < low.host_gib < 16 * 5.57e9 / GIB + 10


def test_seconds_stand_only_where_they_were_measured(plan_of, monkeypatch):
    oldest = measured()[-1]
    assert (oldest.family, oldest.method, oldest.rank, oldest.memory) == ("5b", "lora", 128, "auto")
    monkeypatch.setattr(forecast, "measured", lambda: (oldest,))
    (line,) = [line for line in plan_of(80) if line.s_per_step]
    assert (line.method, line.memory, line.measured_on) == ("lora", "auto", oldest.gpu)
    assert (line.s_per_step, line.measured_gib) == (oldest.s_per_step, oldest.peak_gib)
    assert not any(line.s_per_step for line in plan_of(80, rank=64))


def test_seconds_that_no_longer_hold_are_not_told(plan_of, monkeypatch):
    monkeypatch.setattr(forecast, "measured", lambda: (dataclasses.replace(measured()[-1], faster_since=True),))
    assert not any(line.s_per_step for line in plan_of(80))


@pytest.mark.parametrize("run", [run for run in measured() if run.memory != REFERENCE], ids=lambda run: run.row)
def test_every_run_that_was_measured_is_within_a_tenth_of_what_is_computed(run):
    assert computed_for(run)[0].peak / GIB == pytest.approx(run.peak_gib, rel=0.1)


@pytest.mark.parametrize(
    "run", [run for run in measured() if run.memory != REFERENCE and run.host_gib], ids=lambda run: run.row
)
def test_host_memory_is_within_a_tenth_or_a_few_gigabytes(run):
    ourselves = 4 * run.gpus  # Python, torch, CUDA and the samples, for each process
    assert computed_for(run)[0].host * run.gpus / GIB + ourselves == pytest.approx(run.host_gib, rel=0.1, abs=4)


def test_a_run_is_computed_at_its_own_size_and_for_its_own_model():
    run = next(run for run in measured() if run.row == "5b/low")
    native, small, images = (
        computed_for(dataclasses.replace(run, **changes))[0].load
        for changes in ({}, {"resolution": "33x320x512"}, {"family": "5b-i2v"})
    )
    tokens = 9 * 20 * 32 + 226
    assert small.activation == tokens * 3072 * 2 < native.activation == images.activation


@pytest.mark.parametrize("run", [run for run in measured() if run.memory != REFERENCE], ids=lambda run: run.row)
def test_seconds_are_within_a_tenth_of_every_run_that_was_measured(run):
    if run.faster_since:
        assert computed_for(run)[1] < run.s_per_step
    else:
        assert computed_for(run)[1] == pytest.approx(run.s_per_step, rel=0.1)


def test_seconds_are_told_of_gpus_and_kernels_that_we_have_measured():
    run = next(run for run in measured() if run.row == "5b/low")
    assert computed_for(dataclasses.replace(run, gpu="GeForce RTX 4090"))[1] is None
    assert computed_for(dataclasses.replace(run, attention="torch"))[1] is None
    uncompiled = run.plan.replace("blocks compiled", "not compiled").replace("all but the attention", "everything")
    assert computed_for(dataclasses.replace(run, plan=uncompiled))[1] is None


def test_seconds_are_told_of_what_we_have_measured_the_like_of(plan_of):
    lines = plan_of(24, 2)
    assert {(line.method, line.strategy, line.computed_s is not None) for line in lines} >= {
        ("lora", "ddp", True), ("lora", "zero2", True), ("sft", "zero3-offload", True),
    }  # fmt: skip
    times = {line.memory: line.computed_s for line in plan_of(80) if (line.method, line.strategy) == ("lora", "ddp")}
    assert times["fast"] < times["auto"] <= times["low"]
    assert {line.computed_on for line in lines} == {"H200"}


def test_what_a_shell_made_of_a_glob_is_a_glob_again(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=4)
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    line = forecast.forecasts(PlanSettings(shards=tars, method="lora"), 24 * GIB, 1)[0]
    assert len(tars) > 1 and str(tmp_path / "out" / "*.tar") in shlex.split(line.command)


def test_the_command_prints_commands_that_run(tmp_path, make_shards, capsys):
    make_shards(tmp_path / "my out", samples=2)
    settings = PlanSettings(shards=[str(tmp_path / "my out")], gpu="24GB", rank=4, method="lora")
    forecast.run(settings)
    said = capsys.readouterr().out
    assert "all is computed" in said and "s/step, H200" in said and "fits" in said
    forecast.run(dataclasses.replace(settings, json=True))
    lines = [forecast.Forecast(**line) for line in json.loads(capsys.readouterr().out)]
    assert lines[0].command in said and "--rank 4" in lines[0].command and lines[0].fits
    forecast.check(lines[:1])  # the whole command, in a process of its own
    assert "checked: lora ddp auto: peak" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (PlanSettings(gpu="much"), "--gpu"),
        (PlanSettings(gpu="0GB"), "--gpu"),
        (PlanSettings(), "--gpu"),
        (PlanSettings(gpu="24GB", check=True), "--check"),
        (PlanSettings(gpu="24GB", gpus=0), "--gpus"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, where, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingError) as caught:
        forecast.run(settings)
    assert caught.value.where == where and caught.value.fix
