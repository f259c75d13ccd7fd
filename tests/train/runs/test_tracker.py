"""Trackers: plain values, and nobody imports them unasked."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from forked import Forked

from cogcommon.errors import SettingError
from cogtrain.runs import tracker
from cogtrain.runs.folder import read_metrics
from cogtrain.settings.training import LoraSettings


def test_tensorboard_gets_the_numbers_of_the_metrics_and_the_settings(tmp_path, make_shards, train_here):
    """The settings hold a Path, a list and None, each of which tensorboard refuses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_shards(tmp_path / "out", samples=2)
    make_shards(tmp_path / "held", samples=1, seed=3, captions=("held out",))
    settings = {"shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "held")], "rank": 4}
    run = train_here(LoraSettings(**settings, steps=2, tracker="tensorboard", out=tmp_path / "run"))
    log = EventAccumulator(str(run / "tensorboard"))
    log.Reload()
    steps, (validation,) = read_metrics(run / "metrics.jsonl")
    for name in ("loss", "lr", "grad_norm", "peak_gib"):
        seen = [(event.step, event.value) for event in log.Scalars(name)]
        assert seen == [(line.step, pytest.approx(getattr(line, name), rel=1e-6)) for line in steps]
    assert log.Scalars("val_loss")[0].value == pytest.approx(validation.val_loss, rel=1e-6)
    assert "rank: 4" in next(run.rglob("hparams.yml")).read_text()
    train_here(LoraSettings(**settings, steps=1, tracker="tensorboard", out=run, resume="never"))
    log = EventAccumulator(str(run / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("loss")] == [1]


def test_neither_is_imported_unasked(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=1)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from cogtrain.cli import app\n"
        "app(['lora', '--shards', 'out', '--steps', '1', '--rank', '4', '--out', 'run'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('wandb', 'tensorboard', 'tensorboardX')])\n"
    )
    code, out, err = Forked([script], tmp_path).end()
    assert code == 0 and out.splitlines()[-1] == "[]", out + err


def test_one_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="--tracker wandb needs a package"):
        tracker.check_tracker_installed("wandb")


def test_runs_of_wandb_are_runs_of_one_project(monkeypatch, tmp_path):
    from accelerate import PartialState

    begun = []
    PartialState(cpu=True)  # accelerate's loggers ask which process they are in
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.config = SimpleNamespace(update=lambda *values, **options: None)
    wandb.init = lambda **named: begun.append(named) or SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("one", "two"):
        tracker.open_tracker("wandb", tmp_path / name, {}, 0)
    assert [(one["project"], one["name"]) for one in begun] == [("cogtrain", "one"), ("cogtrain", "two")]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker.open_tracker("wandb", tmp_path / "three", {}, 0)
    assert begun[-1]["project"] == "mine"
