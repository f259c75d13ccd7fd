"""A run's folder that is older than records goes on where it is; what is somebody's in it stays theirs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from cogcommon.errors import RunError, SettingError
from cogcommon.files.ownership import Made
from cogtrain.commands import export
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.runs.claim import claimed
from cogtrain.settings.results import ExportSettings
from cogtrain.settings.training import LoraSettings

OPTIONS = {"rank": 4, "lr": 1e-2, "steps": 6, "save_every": 1, "keep": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_shards) -> Path:
    """A run of six steps that nothing happened to."""
    import torch
    from accelerate.state import AcceleratorState

    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.opening import open_run
    from cogtrain.trainer.trainer import train

    top = tmp_path_factory.mktemp("claim")
    make_shards(top / "out", samples=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = LoraSettings(shards=[str(top / "out")], out=top / "whole", **OPTIONS)
    return train(open_run(settings, torch.device("cpu"), 1), StopRequest())


@pytest.fixture
def older(whole, tmp_path) -> Path:
    """A run of before there were records, killed in its fifth step."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(".cogtune.json", ".lock", "checkpoint-[56]"))
    for name in ("README.md", "pytorch_lora_weights.safetensors"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    config = (run / "config.toml").read_text().replace(str(whole), str(run))
    (run / "config.toml").write_text(config)
    return run


def test_an_older_run_goes_on_and_somebodys_files_stay(older, whole, train_here, losses):
    names = ("notes.txt", "checkpoint-3/notes.txt", "checkpoint-3/state/mine.pt", "checkpoint-4-mine/weights.bin",
             "README.md", "transformer.txt", ".checkpoint-9.tmp/mine")  # fmt: skip
    for name in names:
        (older / name).parent.mkdir(exist_ok=True)
        (older / name).write_text("mine")
    shutil.copytree(older / "checkpoint-4", older / "checkpoint-99")  # its name is not the step that it says
    settings = (older / "config.toml").read_bytes()
    options = {"shards": [str(whole.parent / "out")], "out": older} | OPTIONS
    with pytest.raises(RunError, match="not one that this run has made"):
        train_here(LoraSettings(**options | {"resume": str(older / "checkpoint-4")}))
    assert (older / "checkpoint-99" / "optimizer.pt").exists()
    shutil.rmtree(older / "checkpoint-99")
    train_here(LoraSettings(**options | {"keep": 2}))
    assert losses(older) == losses(whole)
    assert all((older / name).read_text() == "mine" for name in names)
    assert (older / "checkpoint-3").exists() and not (older / "checkpoint-3" / "state.json").exists()
    assert [path.name for path in checkpoints.list_checkpoints(older)] == ["checkpoint-5", "checkpoint-6"]
    assert settings in [path.read_bytes() for path in older.glob("config-yours*")]


def test_a_run_from_anothers_checkpoint_can_be_made_again(whole, tmp_path, train_here, losses):
    """The newest checkpoint of that one says nothing of those that lie in this folder."""
    options = {"shards": [str(whole.parent / "out")], "out": tmp_path / "b", "resume": str(whole)}
    options = OPTIONS | options | {"steps": 7}
    first = losses(train_here(LoraSettings(**options)))
    assert 7 in first and losses(train_here(LoraSettings(**options))) == first


def damage_header(run: Path) -> None:
    (run / "config.toml").write_text((run / "config.toml").read_text().partition("\n")[2])


def damage_settings(run: Path) -> None:
    (run / "config.toml").write_text((run / "config.toml").read_text() + 'colour = "red"\n')


def damage_facts(run: Path) -> None:
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(facts | {"steps": "six"}))


def leave_no_facts(run: Path) -> None:
    (run / "facts.json").unlink()


def call_it_full(run: Path) -> None:
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(facts | {"method": "sft"}))


def link_the_settings(run: Path) -> None:
    (run / "config.toml").rename(run.parent / "config.toml")
    (run / "config.toml").symlink_to(run.parent / "config.toml")


def make_it_a_data_root(run: Path) -> None:
    (run / "prompts.txt").write_text("a cat\n")


def put_a_record(run: Path) -> None:
    (run / ".cogtune.json").write_text("{}")


def edit_the_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "mine": 2}\n')


def empty_the_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def edit_the_report(run: Path) -> None:
    (run / "report.html").write_text("<!doctype html><p>mine")


def replace_the_weights(run: Path) -> None:
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"mine")


@pytest.mark.parametrize(
    "spoil",
    [damage_header, damage_settings, damage_facts, leave_no_facts, call_it_full, link_the_settings,
     make_it_a_data_root, put_a_record, edit_the_metrics, empty_the_metrics, edit_the_report,
     replace_the_weights],
)  # fmt: skip
def test_what_does_not_prove_to_be_a_runs_is_not_taken(spoil, older):
    spoil(older)
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    with pytest.raises(SettingError), claimed(older):
        pass
    assert {path: path.read_bytes() for path in before} == before


def test_an_older_program_that_trains_there_is_not_disturbed(older):
    descriptor = os.open(older, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # what it did
    with pytest.raises(RunError, match="another process trains"), claimed(older):
        pass
    assert not (older / ".cogtune.json").exists()
    os.close(descriptor)
    with claimed(older):
        pass


def test_an_older_export_is_made_again(whole, tmp_path):
    out = tmp_path / "export"
    export.run(ExportSettings(run=whole, out=out, json=True))
    (out / ".cogtune.json").unlink()
    (out / "whole-6.safetensors").unlink()  # the second name is newer than records
    (out / "README.md").write_text("mine")
    export.run(ExportSettings(run=whole, out=out, json=True))
    assert (out / "README.md").read_text() == "mine"
    assert Made.read(out).owns("pytorch_lora_weights.safetensors") and not Made.read(out).owns("README.md")
    (out / ".cogtune.json").unlink()
    with pytest.raises(SettingError, match="another export"):
        export.run(ExportSettings(run=whole / "checkpoint-5", out=out, json=True))
