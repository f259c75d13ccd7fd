"""`cogtrain lora` from shards to weights, as a user starts it."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file

from cogcommon.cli.command import parse
from cogcommon.cli.settings import resolve
from cogcommon.errors import ModelError, RunError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.commands.generate import notes_on, requests_of
from cogtrain.model import lora
from cogtrain.model.objective import Objective
from cogtrain.runs.claim import claimed
from cogtrain.runs.config import write_config
from cogtrain.runs.folder import read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.results import GenerateSettings
from cogtrain.settings.training import LoraSettings
from cogtrain.validation.tuned import Tuned
from cogtrain.validation.videos import scheduler_of


def cogtrain(*words, cwd):
    code, out, err = Forked(["cogtrain", *words], cwd, {"COLUMNS": "200"}).end()
    assert code == 0, out + err
    return out


def test_two_steps_from_several_words(tmp_path, make_shards):
    tars = make_shards(tmp_path / "out")
    assert len(tars) == 3
    out = cogtrain("lora", "--shards", *tars, "--steps", 2, "--rank", 4, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    steps = read_run(run).steps
    assert [line.step for line in steps] == [1, 2] and all(line.loss > 0 and line.grad_norm > 0 for line in steps)
    state = load_file(run / lora.FILE)
    assert len(state) == 2 * 4 * 4  # A and B, four blocks, four layers each
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)
    assert out.splitlines()[-1].startswith("next: cogtrain generate --run runs/")


def test_a_model_that_scales_otherwise_trains_and_draws_by_its_own_values(tmp_path, make_shards):
    model = tmp_path / "model"
    shutil.copytree(open_checkpoint("tiny").root, model)
    for file, changes in (
        ("vae/config.json", {"scaling_factor": 0.9}),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}),
    ):
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
    make_shards(tmp_path / "out", str(model), samples=2)
    run = open_run(LoraSettings(shards=[str(tmp_path / "out")]), torch.device("cpu"), 1)
    assert any("vae/scaling_factor 0.9 (0.7 in" in note for note in run.notes)
    objective = Objective.of(run.checkpoint)
    usual = Objective.of(open_checkpoint("tiny"))
    assert (objective.scaling_factor, usual.scaling_factor) == (0.9, 0.7)
    assert objective.schedule.abar_T[500] < 0.5 * usual.schedule.abar_T[500]
    drawn = scheduler_of(run.checkpoint).alphas_cumprod
    assert torch.allclose(drawn.double(), objective.schedule.abar_T, atol=1e-5)
    tuned = Tuned(run.checkpoint, (), None, run.buckets)
    asked = requests_of(GenerateSettings(prompt=["a ball"]), tuned)
    assert any("scheduler/snr_shift_scale 3.0 (1.0 in" in note for note in notes_on(asked, tuned))


def test_full_fine_tuning(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=2)
    cogtrain("sft", "--shards", "out", "--steps", 2, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "transformer" / "config.json").exists()


def test_the_settings_of_a_run_mean_the_same_in_every_working_folder(tmp_path, make_shards, monkeypatch):
    """config.toml is what "to resume" names: its paths are absolute. So is a local model in the shards' contract."""
    start, elsewhere = tmp_path / "a & b", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(open_checkpoint("random-tiny").root, start / "model")
    monkeypatch.chdir(start)
    make_shards(start / "out", form="./model", samples=2)
    Path("own.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"reduce_bucket_size": 1000}}')
    Path("windows.toml").write_bytes(
        b'\xef\xbb\xbfshards = ["out/*.tar"]\r\nsteps = 1\r\nout = "run"\r\n'
        b'deepspeed = "own.json"\r\nstrategy = "zero2"'
    )
    run = open_run(resolve(LoraSettings, {}, Path("windows.toml")), torch.device("cpu"), 1)
    with claimed(Path("run")):
        write_config(run, Path("run"))

    monkeypatch.chdir(elsewhere)
    config = start / "run" / "config.toml"
    again = open_run(resolve(LoraSettings, {}, config), torch.device("cpu"), 1)
    assert again.resume_facts() == run.resume_facts() and again.settings.out == start / "run"
    assert again.settings.deepspeed == start / "own.json" and again.checkpoint.root == start / "model"
    assert shlex.split(config.read_text().splitlines()[0]) == ["#", "cogtrain", "lora", "--config", str(config)]

    (start / "model").rename(start / "moved")
    with pytest.raises(ModelError) as caught:
        open_run(LoraSettings(shards=[str(start / "out")]), torch.device("cpu"), 1)
    assert str(start / "out") in caught.value.where and "--model FOLDER" in caught.value.fix
    open_run(LoraSettings(shards=[str(start / "out")], model=str(start / "moved")), torch.device("cpu"), 1)


def opened(*words):
    return open_run(parse("cogtrain", "lora", LoraSettings, [*map(str, words)]), torch.device("cpu"), 1)


def test_a_run_that_was_moved_or_copied_goes_on_where_its_settings_lie(tmp_path, make_shards, monkeypatch, train_here):
    """Its config.toml says where it was: a run there would be another one, or the original."""
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "out", samples=2)
    first, copy, moved = (tmp_path / name for name in ("first", "a copy", "moved"))
    train_here(LoraSettings(shards=["out/*.tar"], steps=1, rank=4, out=Path("first"), mirror="memory://a/first"))
    shutil.copytree(first, copy)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"a copy of .*first, which has the same mirror") as refused:
        opened("--config", copy / "config.toml")
    assert "--mirror with an address of its own" in refused.value.fix

    run = opened("--config", "a copy/config.toml", "--mirror", "memory://a/copy", "--steps", 2, "--lr", 1e-5)
    assert run.settings.out == copy and run.resume.folder == copy / "checkpoint-1"
    assert f"this run is a copy: was {first}, which stays as it is; is {copy}" in run.notes
    train_here(run.given)
    assert [line.step for line in read_run(copy).steps] == [1, 2]
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert not any(note.startswith("this run") for note in opened("--config", "a copy/config.toml").notes)
    assert resolve(LoraSettings, {"out": first}, copy / "config.toml").out == first

    first.rename(moved)
    monkeypatch.chdir(moved)
    run = opened("--config", "config.toml")
    assert run.settings.out == moved and run.resume.state.step == 1
    assert f"this run has moved: was {first}, is {moved}" in run.notes
    first.symlink_to(moved)  # the same folder
    assert opened("--config", first / "config.toml").notes == opened("--config", moved / "config.toml").notes == ()


def test_settings_that_lie_in_no_run_or_name_another_folder_mean_what_they_name(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=2)
    run = train_here(LoraSettings(shards=[str(tmp_path / "out")], steps=1, rank=4, out=tmp_path / "run"))
    config = (run / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config)  # the file alone
    assert resolve(LoraSettings, {}, tmp_path / "config.toml").out == run
    (run / "config.toml").write_text(config.replace(f'"{run}"', f'"{tmp_path}/next"'))  # somebody means another run
    assert resolve(LoraSettings, {}, run / "config.toml").out == tmp_path / "next"
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))  # as `cp -r run/* copy/`
    (tmp_path / "copy" / "config.toml").write_text(config)
    assert resolve(LoraSettings, {}, tmp_path / "copy" / "config.toml").out == tmp_path / "copy"


def test_what_opens_an_address_is_left_out_of_a_runs_settings_and_nothing_else(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=2)
    run = open_run(LoraSettings(shards=[str(tmp_path / "out")]), torch.device("cpu"), 1)
    signed = {
        "shards": ["https://me:secret@host/a/000000.tar?sig=a/b=="],
        "repeat": ["https://me:secret@host/a/000000.tar?sig=a/b===8", "9x64x96=2"],
    }
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, **signed))
    with claimed(tmp_path / "run"):
        write_config(run, tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "me:secret" not in text and "a/b=" not in text
    assert "are left out: give --shards, --repeat again." in text
    again = resolve(LoraSettings, {}, tmp_path / "run" / "config.toml")
    assert (again.shards, again.repeat) == (
        ["https://host/a/000000.tar"], ["https://host/a/000000.tar=8", "9x64x96=2"]
    )  # fmt: skip
