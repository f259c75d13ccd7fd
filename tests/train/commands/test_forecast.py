"""``cogtrain plan``: which settings fit a card, what it prints, and the two steps that check it."""

import dataclasses
import itertools
import json
import re
import shlex
import socket

import pytest
import torch

from cogcommon.errors import SettingError
from cogcommon.model.families import BY_NAME
from cogcommon.model.published import published
from cogtrain.commands import forecast, plan
from cogtrain.memory.cost import Speed
from cogtrain.memory.machine import Machine, machine_for
from cogtrain.memory.measured import REFERENCE, everything_measured, measured
from cogtrain.memory.seconds import H200
from cogtrain.settings.planning import ForecastSettings
from workshop.bench_train.hardware import computed_for

GIB = 2**30
LONG = {"model": "THUDM/CogVideoX1.5-5B", "resolution": "81x768x1360"}


@pytest.fixture
def plan_of():
    """plan_of(gib, gpus, host, speed, family, **settings): forecasts for a family's true shape at its native size."""

    def forecasts(gib, gpus=1, *, host=None, speed=H200, on="H200", name="a card", family="5b", **settings):
        host = None if host is None else int(host * GIB)
        machine = Machine(name, int(gib * GIB), gpus, host, speed, on)
        family = BY_NAME[family]
        runs = forecast.intents(ForecastSettings(**settings), published(family), [family.native], machine)
        return [line for run in runs for line in forecast.lines_of(run, machine)]

    return forecasts


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
    (line,) = [line for line in plan_of(80, name=oldest.gpu) if line.s_per_step]
    assert (line.method, line.memory) == ("lora", "auto")
    assert (line.s_per_step, line.measured_gib) == (oldest.s_per_step, oldest.peak_gib)
    for other in ({"name": oldest.gpu, "rank": 64}, {"name": "RTX 4090"}):
        assert not any(line.s_per_step or line.measured_gib for line in plan_of(80, **other))


def test_seconds_that_no_longer_hold_are_not_told(plan_of, monkeypatch):
    monkeypatch.setattr(forecast, "measured", lambda: (dataclasses.replace(measured()[-1], faster_since=True),))
    assert not any(line.s_per_step for line in plan_of(80, name=measured()[-1].gpu))


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
def test_seconds_are_within_6_percent_of_every_run_that_was_measured(run):
    if run.faster_since:
        assert computed_for(run)[1] < run.s_per_step
    else:
        assert computed_for(run)[1] == pytest.approx(run.s_per_step, rel=0.06)


def test_seconds_over_a_slower_link_are_within_6_percent_of_what_was_measured():
    held = [run for run in everything_measured() if run.link]
    assert held
    for run in held:
        assert computed_for(run)[1] == pytest.approx(run.s_per_step, rel=0.06)


def test_seconds_are_told_of_gpus_and_kernels_that_we_have_measured():
    run = next(run for run in measured() if run.row == "5b/low")
    assert computed_for(dataclasses.replace(run, gpu="GeForce RTX 4090"))[1] is None  # it has not been measured
    assert computed_for(dataclasses.replace(run, attention="torch"))[1] is None
    uncompiled = run.block_plan | {"compiled": False, "checkpointing": [["inputs", 42]]}
    assert computed_for(dataclasses.replace(run, block_plan=uncompiled))[1] is None


def test_seconds_are_told_of_what_we_have_measured_the_like_of(plan_of):
    lines = plan_of(24, 2)
    assert {(line.method, line.strategy, line.computed_s is not None) for line in lines} >= {
        ("lora", "ddp", True), ("lora", "zero2", True), ("sft", "zero3-offload", True),
    }  # fmt: skip
    times = {line.memory: line.computed_s for line in plan_of(80) if (line.method, line.strategy) == ("lora", "ddp")}
    assert times["fast"] < times["auto"] <= times["low"]
    assert {line.computed_on for line in lines} == {"H200"}


@pytest.mark.parametrize(("card", "rate"), [("4090", 165.2), ("l4", 121), ("a100-80", 312)])
def test_seconds_of_a_card_that_was_never_measured_are_by_its_published_rate_and_called_so(plan_of, card, rate):
    machine = machine_for(ForecastSettings(gpu=card))
    assert "from its published" in machine.computed_on and f"{rate:g} TFLOP/s" in machine.computed_on
    same = {"gib": 70, "method": "lora", "memory": "auto"}
    here, there = (
        next(line.computed_s for line in plan_of(70, method="lora", speed=speed))
        for speed in (H200, dataclasses.replace(machine.speed, link=1e12))
    )
    assert there / here == pytest.approx(989.4 / rate, rel=0.01), same
    assert not any(line.computed_s for line in plan_of(24, 2, speed=machine.speed) if line.strategy != "ddp")


@pytest.mark.parametrize("card", ["T4", "v100", "2080ti", "24GB", "22GiB"])
def test_seconds_are_left_out_where_they_would_be_a_guess(plan_of, card):
    machine = machine_for(ForecastSettings(gpu=card))
    assert machine.speed is None and machine.computed_on is None
    assert not any(line.computed_s for line in plan_of(22, speed=None, on=None))


def test_a_card_without_bf16_is_told_so(tmp_path, make_shards, capsys):
    make_shards(tmp_path / "out", samples=2)
    make_shards(tmp_path / "2b", "tiny-2b", samples=2)
    for shards, gpu, told in (("out", "t4", True), ("out", "l4", False), ("2b", "t4", False)):  # 2B is fp16's
        plan.run(ForecastSettings(shards=[str(tmp_path / shards)], gpu=gpu, method="lora"))
        said = capsys.readouterr().out
        assert ("T4 has no bf16 in hardware" in said and "--precision fp16" in said) is told, (shards, gpu)


def test_what_fits_fits_the_host_too(plan_of):
    """5B's LoRA takes 10.4 GiB of host memory to load, beside the process itself, and on a small card to train."""
    for gib in (24, 80):
        large, small = (of(plan_of(gib, host=host, method="lora"), "lora", "ddp")["auto"] for host in (120, 14))
        assert large.fits and not small.fits and small.lacks == "host memory"
    eight = of(plan_of(80, 8, host=60, method="lora"), "lora", "ddp")["auto"]
    assert eight.lacks == "host memory" and eight.host_total_gib > 8 * 10.4  # each loads the model
    assert of(plan_of(80, 8, host=240, method="lora"), "lora", "ddp")["auto"].fits
    tiny = of(plan_of(3, host=8, method="lora"), "lora", "ddp")["auto"]
    assert tiny.lacks == "GPU and host memory" and not tiny.fits


def test_what_is_parked_is_what_the_host_has_room_for(plan_of):
    """On 24 GB, the middle of the feed-forward layer waits on the host if that has 26 GiB to lock."""
    peaks = {host: of(plan_of(12, host=host, method="lora"), "lora", "ddp")["auto"] for host in (120, 60, 30)}
    locked = [peaks[host].host_gib for host in (120, 60, 30)]
    assert locked == sorted(locked, reverse=True) and locked[0] > 1.5 * locked[-1]
    assert all(line.host_gib <= 0.8 * host for host, line in peaks.items())


def test_what_is_parked_is_chosen_by_what_it_costs(plan_of):
    """A slow link moves less: nothing that the card has room for, and at last recomputes instead."""
    fast, slow, slowest = (
        of(plan_of(24, method="lora", speed=Speed(2.0, link)), "lora", "ddp")["auto"] for link in (24e9, 6e9, 0.5e9)
    )
    assert fast.host_gib > slow.host_gib > slowest.host_gib == 0
    assert fast.computed_s <= slow.computed_s <= slowest.computed_s < 1.5 * fast.computed_s
    low = of(plan_of(24, method="lora", speed=Speed(2.0, 0.5e9)), "lora", "ddp")["low"]  # asked for, and honest
    assert low.host_gib > 10 and low.computed_s > 30


def test_a_slower_link_than_the_cards_own_is_planned_for():
    def line(memory, **settings):
        settings = ForecastSettings(gpu="h200", method="lora", **settings)
        machine = machine_for(settings)
        family = BY_NAME["5b"]
        (run,) = forecast.intents(settings, published(family), [family.native], machine)
        return of(forecast.lines_of(run, machine), "lora", "ddp")[memory]

    own, slow = line("low"), line("low", link=6)
    newest = next(run for run in measured() if run.row == "5b/low")
    assert own.s_per_step == newest.s_per_step and slow.s_per_step is None  # measured over an H200's own link
    assert slow.computed_s > 2 * own.computed_s and slow.command == own.command
    assert line("fast", link=6) == line("fast")  # it copies nothing
    for settings, said in (
        ({"gpu": "none", "link": 12}, "--link changes seconds alone, and there are none"),
        ({"link": 0}, "no link copies 0 GB/s"),
    ):
        with pytest.raises(SettingError, match=said):
            machine_for(ForecastSettings(**{"gpu": "h200"} | settings))


def test_fast_is_advised_where_it_saves_time_and_leaves_room(plan_of):
    def command(gib, **options):
        line = plan.advised(plan_of(gib, method="lora", **options), "lora")
        return shlex.split(line.command)

    assert "fast" in command(80)  # 57 GiB, a tenth faster
    for options in ({"gib": 62}, {"gib": 24}, {"gib": 80, "speed": None, "on": None}):  # no room; nothing is known
        assert "--memory" not in command(**options), options


def test_plan_says_why_it_gives_no_seconds(capsys):
    plan.run(ForecastSettings(gpu="a100 80gb", gpus=8, method="sft"))
    said = capsys.readouterr().out
    assert "seconds are not known" in said and "s a step" not in said
    plan.run(ForecastSettings(gpu="h200", gpus=8, method="sft"))
    assert "seconds are not known" not in (said := capsys.readouterr().out) and "s a step" in said


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        ("24GB", "name yours for them, as --gpu RTX-3090, RTX-4090 or A10G"),
        ("22GiB", "name yours for them, as --gpu RTX-3090, RTX-4090 or A10G"),
        ("T4", "no seconds of T4 are known, which has no bf16 in hardware; `cogtrain plan --check`"),
        ("none", "no seconds of CPUs are known"),
    ],
)
def test_a_machine_without_seconds_says_why_and_has_none_of_another_card(gpu, why, capsys):
    """And the cards that it names have seconds."""
    settings = ForecastSettings(gpu=gpu, host="512GB", method="lora")
    plan.run(settings)
    said = capsys.readouterr().out
    assert why in said and "s a step" not in said and "measured" not in said
    plan.run(dataclasses.replace(settings, json=True))
    for line in json.loads(capsys.readouterr().out):
        assert not any(line[name] for name in ("computed_s", "s_per_step", "measured_gib", "flash4_s"))
        assert why in line["no_seconds"]
    for card in re.findall(r"RTX-\d+|A10G", said):
        plan.run(dataclasses.replace(settings, gpu=card))
        assert "s a step" in capsys.readouterr().out


def test_fewer_gpus_are_planned_where_the_host_is_too_small_for_all(capsys):
    settings = ForecastSettings(gpu="4090", gpus=8, host="64GB")
    plan.run(settings)
    lora, sft = capsys.readouterr().out.split("Full fine-tuning")
    assert "LoRA: fits on 4 GPUs of 8, in 1" in lora and "global batches of 4" in lora and "--nproc 4" in lora
    assert "on all 8 nothing fits; with --host 121GB it would" in lora
    assert sft.startswith(": nothing fits") and "sft  zero3-offload low       8 " in sft
    plan.run(dataclasses.replace(settings, json=True))
    lines = json.loads(capsys.readouterr().out)
    assert {(line["gpus"], line["fits"]) for line in lines if line["method"] == "lora"} == {(8, False), (4, True)}
    assert all(f"--nproc {line['gpus']}" in line["command"] for line in lines)
    plan.run(dataclasses.replace(settings, gpus=16, method="lora"))  # of which eight share a host
    assert "fits on 4 GPUs of 16, in 1" in capsys.readouterr().out
    plan.run(dataclasses.replace(settings, host="128GB", method="lora"))
    assert "LoRA: fits, in 1" in capsys.readouterr().out


def test_a_narrow_terminal_breaks_lines_of_the_table_and_cuts_no_cell(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    plan.run(ForecastSettings(gpu="4090", gpus=8, host="64GB"))
    said = capsys.readouterr().out
    assert "…" not in said and "zero3-offload low" in said and "host too small" in said


def test_a_quick_link_changes_no_plan(plan_of):
    for family, gib in itertools.product(("2b", "5b", "1.5-5b"), (12, 24, 80)):
        known, unknown = (plan_of(gib, family=family, speed=speed) for speed in (H200, None))
        assert {(x.strategy, x.memory, x.peak_gib) for x in known} == {
            (x.strategy, x.memory, x.peak_gib) for x in unknown
        }


@pytest.mark.parametrize(("optimizer", "bytes_less"), [("adamw8bit", 6), ("prodigy", -8)])
def test_the_optimizer_that_is_chosen_counts(plan_of, optimizer, bytes_less):
    usual, chosen = (
        of(plan_of(80, method="lora", optimizer=name), "lora", "ddp")["auto"] for name in ("adamw", optimizer)
    )
    assert usual.peak_gib - chosen.peak_gib == pytest.approx(bytes_less * 132_120_576 / GIB, abs=0.03)
    assert f"--optimizer {optimizer}" in chosen.command
    assert ("--lr 1" in chosen.command) is (optimizer == "prodigy")


def test_a_moving_average_counts_and_is_ddps(plan_of):
    usual, averaged = (plan_of(80, 2, ema=ema) for ema in (0.0, 0.99))
    usual, averaged = of(usual, "lora", "ddp")["auto"], of(averaged, "lora", "ddp")["auto"]
    assert averaged.peak_gib - usual.peak_gib == pytest.approx(4 * 132_120_576 / GIB, abs=0.02)
    assert "--ema 0.99" in averaged.command
    assert {line.strategy for line in plan_of(80, 2, ema=0.99)} == {"ddp"}
    assert {line.strategy for line in plan_of(80, 2, optimizer="prodigy")} == {"ddp"}


def test_what_a_shell_made_of_a_glob_is_a_glob_again(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=4)
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    machine = Machine("a card", 24 * GIB, 1)
    (run,) = forecast.wanted_runs(ForecastSettings(shards=tars, method="lora"), machine)
    line = forecast.lines_of(run, machine)[0]
    assert len(tars) > 1 and str(tmp_path / "out" / "*.tar") in shlex.split(line.command)


def test_the_command_prints_commands_that_run(tmp_path, make_shards, capsys):
    make_shards(tmp_path / "my out", samples=2)
    settings = ForecastSettings(shards=[str(tmp_path / "my out")], gpu="24GB", rank=4, method="lora")
    plan.run(settings)
    said = capsys.readouterr().out
    assert "  writes up to " in said and "LoRA: fits" in said and "s a step" not in said
    assert "checkpoints: written beside steps where " in said  # no --host: as much as it takes
    plan.run(ForecastSettings(gpu="H200", host="64GB"))
    lora, sft = capsys.readouterr().out.split("Full fine-tuning")[:2]
    assert "checkpoints: written beside steps since 1.59 GB more of host memory is free" in lora
    assert "training waits while a checkpoint is written" in sft
    plan.run(dataclasses.replace(settings, json=True))
    lines = [forecast.TrainForecast(**line) for line in json.loads(capsys.readouterr().out)]
    assert lines[0].command in said and "--rank 4" in lines[0].command and lines[0].fits
    plan.check(lines[:1])  # the whole command, in a process of its own
    assert "checked: lora ddp auto: peak" in capsys.readouterr().err


def test_seconds_are_told_of_both_attention_kernels_where_both_were_measured(capsys):
    settings = ForecastSettings(model="THUDM/CogVideoX-5b", gpu="h200")

    def line(**changes):
        machine = dataclasses.replace(machine_for(settings), **changes)
        return forecast.lines_of(forecast.wanted_runs(settings, machine)[0], machine)[0]

    fast = line()
    known = {run.attention: run.s_per_step for run in reversed(measured()) if run.row == "5b/fast"}
    assert (fast.memory, fast.s_per_step, fast.flash4_s) == ("fast", known["cudnn"], known["flash4"])
    assert line(kernel="flash4").flash4_s is None  # it is what is told
    plan.run(settings)
    assert f"{known['flash4']:.2f} s with FlashAttention 4: pip install 'cogtune[attention]'" in capsys.readouterr().out
    plan.run(dataclasses.replace(settings, gpu="4090"))
    assert "FlashAttention" not in capsys.readouterr().out  # it has no kernels for that card


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_first_answer_needs_no_shards_no_network_and_80_columns(gpus, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    settings = ForecastSettings(model="THUDM/CogVideoX-5b", resolution="49x480x720", gpu="4090", gpus=gpus, steps=300)
    plan.run(settings)
    first, _, _, answer, time, *said = capsys.readouterr().out.splitlines()
    together = "  600 samples in global batches of 2: as many as 600 steps on one GPU"
    assert said.count(together) == (2 if gpus == 2 else 0)  # a LoRA and full fine-tuning
    assert first.startswith("THUDM/CogVideoX-5b at 49x480x720") and answer.startswith("LoRA: fits, in 1")
    assert "for 300 steps, by the card's published speed" in time and "cogtrain lora" in " ".join(said)
    lines = [line for line in said if line.startswith(("lora", "sft "))]
    assert 3 <= len(lines) <= 5 and all(line.rstrip().endswith("fits") for line in lines)
    plan.run(dataclasses.replace(settings, all=True))
    every = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("lora", "sft ")) for line in every) > 5
    assert max(map(len, [first, answer, time, *said, *every])) <= 80


def test_where_nothing_fits_the_smallest_is_shown_and_what_it_lacks(capsys):
    plan.run(ForecastSettings(gpu="4090", host="32GB", method="sft"))
    said = capsys.readouterr().out
    assert "Full fine-tuning: nothing fits; with --host 111GB it would" in said
    assert "host too small" in said


@pytest.mark.parametrize(
    ("settings", "do"),
    [
        ({"batch_size": 64}, "with --batch-size 1 it would"),
        ({"optimizer": "prodigy"}, "with --optimizer adamw it would"),
        ({"ema": 0.9, "batch_size": 64}, "with --batch-size 1 and without --ema it would"),
        ({"gpu": "6GB", "method": "lora", "rank": 4096}, "with --rank 16 it would"),
        ({"gpu": "none", "host": "64GB"}, "with --host 135GB it would"),
        ({"gpu": "3060", "method": "lora", **LONG, "host": "32GB"}, "with --rank 16 it would, or with --host 33GB"),
    ],
)
def test_what_would_fit_is_said_where_nothing_does(settings, do, capsys):
    """A smaller picture does not help where the weights alone are too many."""
    plan.run(ForecastSettings(**{"gpu": "4090", "gpus": 1, "method": "sft"} | settings))
    assert f"nothing fits; {do}" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["16GB", "30GiB", "32GB"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gpu": "3060", "method": "lora", **LONG},
        {"gpu": "4090", "gpus": 8, "method": "sft"},
        {"gpu": "none", "method": "sft"},
    ],
)
def test_the_host_that_is_named_where_nothing_fits_does_and_one_gb_less_does_not(settings, host, capsys):
    """And is the same whatever host was asked for."""
    plan.run(ForecastSettings(host=host, **settings))
    (named,) = re.findall(r"nothing fits; .*with --host (\d+)GB", capsys.readouterr().out)
    plan.run(ForecastSettings(host=f"{named}GB", **settings))
    assert "nothing fits" not in capsys.readouterr().out
    plan.run(ForecastSettings(host=f"{int(named) - 1}GB", **settings))
    assert f"with --host {named}GB" in capsys.readouterr().out


def test_host_memory_that_is_missing_here_is_named_as_free_and_as_typed(monkeypatch, capsys):
    monkeypatch.setattr("cogtrain.memory.machine._here", lambda: 16 * GIB)
    plan.run(ForecastSettings(gpu="none", method="lora"))
    assert "nothing fits; with 31.6 GiB of host memory free (--host 34GB) it would" in capsys.readouterr().out


def test_lighter_settings_and_a_larger_host_are_named_together_where_neither_does_alone(capsys):
    settings = {"gpu": "6GB", "method": "lora"}
    plan.run(ForecastSettings(**settings, host="16GB", rank=4096))
    assert "nothing fits; with --rank 16 and with --host 22GB it would" in capsys.readouterr().out
    plan.run(ForecastSettings(**settings, host="22GB", rank=16))
    assert "LoRA: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (ForecastSettings(gpu="24GB", steps=0), "--steps"),
        (ForecastSettings(gpu="4090", resolution="50x480x720"), "--resolution 50x480x720"),
        (ForecastSettings(gpu="4090", resolution="49x480x720", shards=["out"]), "--shards, --resolution"),
        (ForecastSettings(gpu="much"), "--gpu"),
        (ForecastSettings(gpu="0GB"), "--gpu"),
        (ForecastSettings(), "--gpu"),
        (ForecastSettings(gpu="24GB", check=True), "--check"),
        (ForecastSettings(gpu="24GB", gpus=0), "--gpus"),
        (ForecastSettings(gpu="4091"), "--gpu"),
        (ForecastSettings(gpu="4090", host="much"), "--host"),
        (ForecastSettings(gpu="4090", host="1GB"), "--host"),
        (ForecastSettings(gpu="4090", host="64PB"), "--host"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, where, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingError) as caught:
        plan.run(settings)
    assert caught.value.where == where and caught.value.fix


def test_a_run_on_cpus_is_planned_with_all_that_it_holds(tmp_path, make_shards, capsys):
    make_shards(tmp_path / "out", samples=2)
    settings = ForecastSettings(shards=[str(tmp_path / "out")], gpu="none", host="8GB", json=True)
    totals = []
    for batch in (1, 2):
        plan.run(dataclasses.replace(settings, batch_size=batch))
        lines = json.loads(capsys.readouterr().out)
        assert all(line["peak_gib"] == 0 and line["fits"] and line["precision"] == "fp32" for line in lines)
        totals.append(lines[0]["host_total_gib"])
    assert 0.3 < totals[0] < totals[1] < 0.6  # Python and its libraries are the most of it
    plan.run(dataclasses.replace(settings, json=False))
    assert "on 1 process of CPUs\n7.4 GiB of host memory free" in capsys.readouterr().out
