"""A finished run that is started again: what it says of itself stays true, whatever the line."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from cogtrain.model.lora_file import FILE, read_facts
from cogtrain.runs.checkpoint import list_checkpoints
from cogtrain.runs.folder import CARD_FILE, CONFIG_FILE, REPORT_FILE, read_run
from cogtrain.settings.training import LoraSettings
from cogtrain.trainer import trainer
from cogtrain.validation import validate


@pytest.fixture
def line(tmp_path, make_shards):
    """line(**settings) -> settings of a run of three steps in tmp_path / "run"."""
    make_shards(tmp_path / "out", samples=4)
    make_shards(tmp_path / "held", samples=1, seed=9, captions=("a",))
    plain = LoraSettings(
        shards=[str(tmp_path / "out")], validate_shards=[str(tmp_path / "held")], out=tmp_path / "run", rank=4,
        steps=3, save_every=1, validate_every=1,
    )  # fmt: skip
    return lambda **settings: dataclasses.replace(plain, **settings)


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")}


def test_a_shorter_line_changes_nothing_and_what_is_missing_is_made_as_it_was_trained(line, train_here, capsys):
    run = train_here(line(ema=0.9, lr=1e-3, lr_schedule="cosine"))
    before = contents(run)
    capsys.readouterr()
    train_here(line())
    said = capsys.readouterr().out
    assert contents(run) == before
    assert (
        "so the run stays as it was: --lr 0.001 -> 0.0001, --lr-schedule cosine -> constant, --ema 0.9 -> 0.0" in said
    )
    assert f"{run / FILE} and all that the run says of itself stay as they are (step 3)" in said
    assert "a larger --steps goes on" in said and f"cogtrain export --run {run}/checkpoint-3" in said
    averaged = load_file(run / FILE)
    for name in (FILE, CARD_FILE, CONFIG_FILE, REPORT_FILE):  # as a kill before the end leaves it
        (run / name).unlink()
    train_here(line())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_file(run / FILE).items())
    assert (run / CARD_FILE).read_bytes() == before[run / CARD_FILE]
    settings = read_run(run).settings
    assert (settings["lr"], settings["lr_schedule"], settings["ema"]) == (1e-3, "cosine", 0.9)
    train_here(line(steps=4))
    assert (read_run(run).settings["lr"], read_run(run).settings["ema"]) == (1e-4, 0.0)
    assert read_run(run).facts.finished == 4


def test_a_finished_run_says_so_before_its_model_is_loaded(line, train_here, monkeypatch, capsys):
    settings = line(validate_prompt=["a red fox"], keep_best=True)
    run = train_here(settings)
    before = contents(run)

    def load(*arguments):
        raise AssertionError("it is loaded")

    monkeypatch.setattr(trainer, "load_model", load)
    train_here(settings)
    said = capsys.readouterr().out
    assert "stay as they are (step " in said and "of 3 validations)" in said and contents(run) == before
    train_here(line(steps=2, validate_shards=[]))
    assert contents(run) == before
    (run / "validation" / "base.json").unlink()  # without it nobody knows what the losses are to be compared with
    with pytest.raises(AssertionError, match="it is loaded"):
        train_here(settings)


def test_a_new_prompt_of_a_finished_run_is_drawn_and_nothing_is_measured_again(line, train_here):
    run = train_here(line())
    trained, measured = load_file(run / FILE), read_run(run).validations
    train_here(line(validate_prompt=["a red fox"]))
    assert [len(list((run / "validation" / f"step-{step:06d}").glob("*fox*.mp4"))) for step in (0, 3)] == [1, 1]
    assert read_run(run).validations == measured and len(measured) == 3
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_file(run / FILE).items())


def test_the_best_step_stays_exported_without_the_option_and_the_option_exports_it(
    line, train_here, monkeypatch, capsys
):
    found = iter((0.5, 0.2, 0.9) * 2)

    def measure(self, model, step, lines):
        return validate.ValidationLine(step, next(found), self.base_loss)

    monkeypatch.setattr(validate.Validation, "measure", measure)
    run = train_here(line(keep_best=True))
    before = contents(run)
    train_here(line())
    assert contents(run) == before and read_facts(run / FILE)["steps"] == "2"
    assert "--keep-best True -> False" in capsys.readouterr().out
    (run / FILE).unlink()
    train_here(line(validate_shards=[]))
    assert read_facts(run / FILE)["steps"] == "2"

    later = train_here(line(out=run.with_name("later")))
    last = load_file(later / FILE)
    assert read_facts(later / FILE)["steps"] == "3"
    capsys.readouterr()
    train_here(line(out=later, keep_best=True))
    assert "note: --keep-best exports step 2 (held-out loss 0.2000" in capsys.readouterr().out
    assert read_facts(later / FILE)["steps"] == "2" and "2 of 3" in (later / CARD_FILE).read_text()
    assert any((load_file(later / FILE)[name] != last[name]).any() for name in last)
    assert [path.name for path in list_checkpoints(later)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    before = contents(later)
    train_here(line(out=later))
    assert contents(later) == before
