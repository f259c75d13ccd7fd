"""--keep-best and --patience: which checkpoint stays, what is exported, and when a run ends."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from cogcommon.errors import SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.distributed.signals import Stopped
from cogtrain.memory.disk import writes
from cogtrain.model import lora, sft
from cogtrain.model.lora_file import FILE, read_facts
from cogtrain.runs.folder import read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.validation import validate


@pytest.fixture
def shards(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=4)
    make_shards(tmp_path / "held", samples=1, seed=9, captions=("a",))
    return {"shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "held")]}


@pytest.fixture
def held_out(monkeypatch):
    """held_out(loss, ...) -> the list of what was measured: real validations, whose results are replaced in turn."""

    def script(*losses):
        told, real, seen = iter(losses), validate.Validation.measure, []

        def measure(self, model, step, lines):
            line = real(self, model, step, lines)
            # What is measured is what is to be exported, averaged or not.
            seen.append(
                {n: p.detach().clone() for n, p in self.runtime.plain(model).named_parameters() if p.requires_grad}
            )
            return validate.dataclasses.replace(line, val_loss=next(told))

        monkeypatch.setattr(validate.Validation, "measure", measure)
        return seen

    return script


def settings_for(cls, tmp_path, shards, **changes):
    common = {"steps": 5, "save_every": 100, "keep": 1, "validate_every": 1, "keep_best": True, "out": tmp_path / "run"}
    rank = {"rank": 4, "lr": 1e-2} if cls is LoraSettings else {"lr": 1e-3}
    return cls(**{**shards, **common, **rank, **changes})


def checkpoints_of(run):
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (LoraSettings, {"ema": 0.5}),
        pytest.param(LoraSettings, {}, marks=pytest.mark.full),
        (SftSettings, {}),
        pytest.param(SftSettings, {"strategy": "zero2"}, marks=pytest.mark.full),
    ],
)
def test_the_step_with_the_lowest_loss_is_kept_and_exported(
    tmp_path, shards, held_out, train_here, capsys, cls, changes
):
    measured = held_out(0.5, 0.2, None, 0.2, 0.9)
    settings = settings_for(cls, tmp_path, shards, **changes)
    run = train_here(settings)
    assert checkpoints_of(run) == ["checkpoint-2", "checkpoint-5"]
    base = read_run(run).validations[0].base_val_loss
    if cls is LoraSettings:
        facts = read_facts(run / FILE)
        found = {name: facts[name] for name in ("steps", "held_out_loss", "base_held_out_loss")}
        assert found == {"steps": "2", "held_out_loss": "0.2000", "base_held_out_loss": f"{base:.4f}"}
        checkpoint = open_checkpoint("tiny")
        model = checkpoint.load_transformer(torch.float32)
        lora.attach(model, 4, 2.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(measured[1][name])
        expected, got = lora.state_dict(model), load_file(run / FILE)
    else:
        loaded = sft.load(run / sft.FOLDER, open_checkpoint("tiny"), torch.float32)
        got = {name: weight.detach() for name, weight in loaded.named_parameters()}
        expected = measured[1]
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in got)
    assert [line.best_step for line in read_run(run).validations] == [1, 2, 2, 2, 2]
    assert f"step 2 of 5: held-out loss 0.2000, base model {base:.4f}" in capsys.readouterr().out
    assert "0.2 at step 2; " in (run / "README.md").read_text()
    assert "| steps | 2 of 5 |" in (run / "README.md").read_text()
    assert "<b>step 2</b><span>is exported" in (run / "report.html").read_text()


def test_a_resume_knows_the_best_so_far_and_goes_on_from_the_last(tmp_path, shards, held_out, train_here, losses):
    held_out(0.3, 0.6, 0.4, 0.7)
    settings = settings_for(LoraSettings, tmp_path, shards, steps=2)
    run = train_here(settings)
    assert read_facts(run / FILE)["steps"] == "1"
    train_here(settings_for(LoraSettings, tmp_path, shards, steps=4))
    assert read_facts(run / FILE)["steps"] == "1"
    assert checkpoints_of(run) == ["checkpoint-1", "checkpoint-4"]
    whole = train_here(settings_for(LoraSettings, tmp_path, shards, steps=4, keep_best=False, validate_every=9,
                                    out=tmp_path / "whole", validate_shards=[]))  # fmt: skip
    assert losses(run) == losses(whole)


def test_patience_ends_a_run_and_a_larger_one_goes_on(tmp_path, shards, held_out, train_here, capsys):
    held_out(0.4, 0.5, 0.6, 0.3, 0.9, 0.8)
    run = train_here(settings_for(LoraSettings, tmp_path, shards, steps=9, patience=2))
    out = capsys.readouterr().out
    assert "ended after step 3 of 9: 2 validations without a lower held-out loss since step 1 (--patience)" in out
    assert read_facts(run / FILE)["steps"] == "1"
    assert "ended after 3 of 9 steps" in (run / "report.html").read_text()
    train_here(settings_for(LoraSettings, tmp_path, shards, steps=9, patience=2))  # as it was: nothing is trained
    assert read_run(run).steps[-1].step == 3
    assert "ended after step 3" in capsys.readouterr().out
    train_here(settings_for(LoraSettings, tmp_path, shards, steps=6, patience=3))
    assert read_run(run).steps[-1].step == 6
    assert read_facts(run / FILE)["steps"] == "4"
    assert read_run(run).facts.ended == ""
    assert checkpoints_of(run) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_validation_that_a_signal_has_kept_from_its_end_is_made_up_for(
    tmp_path, shards, train_here, monkeypatch, meanwhile, capsys
):
    def stop(step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    def of(name, steps=3):
        return settings_for(LoraSettings, tmp_path, shards, steps=steps, validate_every=2, out=tmp_path / name)

    measure = validate.Validation.measure

    def rising(self, model, step, lines):  # on any machine: which step is the best hangs on the validation of each
        line = measure(self, model, step, lines)
        return line and validate.dataclasses.replace(line, val_loss=line.val_loss + step)

    monkeypatch.setattr(validate.Validation, "measure", rising)
    whole = train_here(of("whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if meanwhile:
            real = validate.Validation.measure
            patch.setattr(validate.Validation, "measure", lambda self, *args: (stop(args[1]), real(self, *args))[1])
        train_here(of("parts"), after_step=None if meanwhile else stop)
    assert read_run(tmp_path / "parts").validations == []
    parts = train_here(of("parts"))
    found, expected = read_run(parts), read_run(whole)
    assert [(line.step, line.val_loss, line.best_step) for line in found.validations] == [
        (line.step, line.val_loss, line.best_step) for line in expected.validations
    ]
    assert found.exported == expected.exported == 2
    assert checkpoints_of(parts) == checkpoints_of(whole)

    capsys.readouterr()
    last = train_here(of("last", steps=2), after_step=stop)  # nothing is left to stop
    assert "note: a signal came before step 2 was validated; the same command does it" in capsys.readouterr().out
    train_here(of("last", steps=2))
    assert [line.step for line in read_run(last).validations] == [2]


def test_the_best_of_before_goes_where_a_validation_that_is_made_up_for_finds_a_better_one(
    tmp_path, shards, held_out, train_here
):
    held_out(0.5, 0.3)
    settings = settings_for(LoraSettings, tmp_path, shards, steps=2)
    run = train_here(settings, after_step=lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    assert checkpoints_of(run) == ["checkpoint-1", "checkpoint-2"]
    train_here(settings)
    assert checkpoints_of(run) == ["checkpoint-2"] and read_facts(run / FILE)["steps"] == "2"


@pytest.mark.parametrize(("changes", "option"), [({"keep_best": True}, "--keep-best"), ({"patience": 3}, "--patience")])
def test_without_held_out_samples_they_are_refused(tmp_path, shards, changes, option):
    with pytest.raises(SettingError, match="no held-out samples") as refused:
        open_run(LoraSettings(shards=shards["shards"], out=tmp_path / "run", **changes), torch.device("cpu"), 1)
    assert option in str(refused.value)


def test_its_room_is_counted(tmp_path, shards):
    plain, best = (
        writes(open_run(settings_for(LoraSettings, tmp_path, shards, keep_best=keep), torch.device("cpu"), 1))
        for keep in (False, True)
    )
    assert best.total - plain.total == plain.checkpoint + plain.export
