"""The global batch stays, whatever the number of processes: its accumulation steps follow, or it says what divides."""

import json
import tomllib

import pytest
import torch

from cogcommon.cli.settings import resolve
from cogcommon.errors import RunError, SettingError
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_shards, train_here):
    """A folder of shards, and of a run of one step that two samples make up."""
    top = tmp_path_factory.mktemp("batch")
    make_shards(top / "out", samples=12)
    given = {"shards": [str(top / "out")], "rank": 2, "out": top / "run"}
    train_here(LoraSettings(**given, steps=1, batch_size=1, accumulate=6))
    return given


def test_accumulation_follows_from_the_global_batch(place):
    for world, steps in ((1, 12), (2, 6), (3, 4), (12, 1)):
        run = open_run(LoraSettings(**place | {"out": None}, global_batch=12), CPU, world)
        assert (run.settings.accumulate, run.global_batch) == (steps, 12)
    config = resolve(LoraSettings, {"accumulate": 3}, None)
    assert (config.accumulate, config.global_batch) == (3, None)
    with pytest.raises(SettingError, match="both say how large"):
        LoraSettings(global_batch=4, accumulate=2)


def test_a_resume_on_other_processes_keeps_it_and_says_so(place):
    for world, steps in ((1, 6), (2, 3), (3, 2), (6, 1)):
        run = open_run(LoraSettings(**place, accumulate=6), CPU, world)
        assert run.resume and (run.settings.accumulate, run.global_batch) == (steps, 6)
        told = [note for note in run.notes if " the global batch of 6" in note]
        assert len(told) == (world > 1)
    with pytest.raises(RunError, match="another global batch"):  # somebody wants another one
        open_run(LoraSettings(**place, accumulate=3), CPU, 1)
    run = open_run(LoraSettings(**place, batch_size=3, global_batch=6), CPU, 2)
    assert run.settings.accumulate == 1
    run = open_run(LoraSettings(**place, accumulate=6, batch_size=2), CPU, 1)
    assert (run.settings.accumulate, run.global_batch) == (3, 6)
    assert "with --batch-size 2 instead of 1: 3 accumulation steps of 2 keep the global batch of 6" in run.notes


def test_the_config_of_a_run_goes_on_with_any_number_of_processes(place):
    file = place["out"] / "config.toml"
    values = tomllib.loads(file.read_text())
    assert values["accumulate"] == 6 and "global_batch" not in values
    assert open_run(resolve(LoraSettings, {}, file), CPU, 2).settings.accumulate == 3
    with pytest.raises(RunError, match="another global batch"):
        open_run(resolve(LoraSettings, {"accumulate": 2}, file), CPU, 1)


def test_the_config_of_a_run_begins_another_with_what_the_line_says(place, tmp_path):
    """It names no global batch that was not asked for: another batch size, or more processes, could not begin."""
    file = place["out"] / "config.toml"
    for given, world, size in (({}, 1, 6), ({}, 2, 12), ({"batch_size": 2}, 1, 12), ({"accumulate": 1}, 1, 1),
                               ({"batch_size": 2, "accumulate": 1}, 2, 4), ({"global_batch": 6}, 3, 6)):  # fmt: skip
        run = open_run(resolve(LoraSettings, {"out": tmp_path / "new", "config": file} | given, file), CPU, world)
        assert run.resume is None and run.global_batch == size, given
        (*told,) = (note for note in run.notes if "--global-batch 6 takes as many" in note)
        assert len(told) == (size != 6) and all(f"a step takes {size} sample" in note for note in told)
    with pytest.raises(SettingError, match="cannot be divided among 4 processes") as caught:
        open_run(resolve(LoraSettings, {"out": tmp_path / "new", "global_batch": 6}, file), CPU, 4)
    assert "or --global-batch 8" in caught.value.fix


def test_the_config_of_a_run_begins_another_with_its_own_strategy(place, tmp_path, train_here):
    """Full fine-tuning on one GPU is ddp, and on two zero2, as without the file."""
    run = train_here(SftSettings(shards=place["shards"], out=tmp_path / "run", steps=1))
    again = resolve(SftSettings, {"out": tmp_path / "new"}, run / "config.toml")
    assert open_run(again, "cuda", 2).strategy == "zero2" and open_run(again, "cuda", 1).strategy == "ddp"


def test_what_does_not_divide_names_what_does(place, monkeypatch):
    with pytest.raises(SettingError, match="6 cannot be divided among 4 processes with --batch-size 1") as caught:
        open_run(LoraSettings(**place, accumulate=6), CPU, 4)
    assert "1, 2, 3 or 6 processes" in caught.value.fix
    assert caught.value.where.startswith("--batch-size, ") and str(place["out"]) in caught.value.where
    with pytest.raises(SettingError) as caught:
        open_run(LoraSettings(**place | {"out": None}, batch_size=4, global_batch=12), CPU, 2)
    assert "1 or 3 processes" in caught.value.fix and "--batch-size 1, 2, 3 or 6 on 2 processes" in caught.value.fix
    with pytest.raises(SettingError) as caught:
        open_run(LoraSettings(**place | {"out": None}, batch_size=8, global_batch=4), CPU, 1)
    assert "--batch-size 1, 2 or 4 on 1 process" in caught.value.fix


def test_hosts_are_counted_where_there_are_several():
    from cogtrain.runs.global_batch import what_divides

    assert what_divides(32, 1, 24, here=8).startswith("start 8, 16 or 32 processes (1, 2 or 4 hosts of 8)")
    assert "--batch-size" not in what_divides(32, 1, 24, here=8).partition(";")[2]  # none divides 32 by 24
    assert what_divides(3, 1, 4, here=4) == "start 1 or 3 processes"
    assert what_divides(5, 8, 4, here=4) == "start 1 or 5 processes with --batch-size 1"


def test_what_was_chosen_for_the_first_processes_stays(place, tmp_path, train_here, make_shards):
    """Full fine-tuning chooses zero2 on several GPUs, and ddp on one."""
    settings = SftSettings(shards=place["shards"], out=tmp_path / "run", steps=1, precision="fp32")
    run = train_here(settings)
    state = run / "checkpoint-1" / "state.json"
    values = json.loads(state.read_text())
    values["facts"] |= {"--strategy": "zero2", "--precision": "bf16"}
    state.write_text(json.dumps(values))
    again = open_run(SftSettings(shards=place["shards"], out=run, steps=2), CPU, 1)
    assert (again.strategy, again.precision) == ("zero2", "bf16")
    with pytest.raises(RunError, match="another --strategy: zero2 then, ddp now"):
        open_run(SftSettings(shards=place["shards"], out=run, steps=2, strategy="ddp"), CPU, 1)
