"""Held-out loss and videos: right, the same on any number of processes, and no trace in training."""

import functools
import json
import math
import shutil

import av
import pytest
import torch
from forked import ForkedRanks

from cogcommon.errors import ShardError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.data.batches import read_sample
from cogtrain.data.sample_rng import SampleRNG
from cogtrain.data.shards import open_shards
from cogtrain.model import lora
from cogtrain.model.diffusion import Schedule
from cogtrain.model.objective import Objective
from cogtrain.runs.folder import read_metrics, read_run
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.validation import validate
from cogtrain.validation.validate import TIMESTEPS
from cogtrain.validation.videos import Conditions, denoise


def lines(run):
    return read_metrics(run / "metrics.jsonl")


@pytest.fixture
def shards(tmp_path, make_shards):
    """Folders of training and of held-out shards; three held-out samples, so that two ranks share unequally."""
    make_shards(tmp_path / "out", samples=4)
    make_shards(tmp_path / "held", samples=3, seed=9, captions=("a", "b", "c"))
    return {"shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "held")]}


def stated_loss(held_out, lora_file=None):
    """The held-out loss of the base model, or with a LoRA file on it, stated anew."""
    checkpoint = open_checkpoint("tiny")
    transformer, objective = checkpoint.load_transformer(torch.float32).eval(), Objective.of(checkpoint)
    if lora_file:
        lora.load(lora_file, checkpoint, transformer)
    abar = Schedule.from_config(checkpoint.scheduler_config).abar_T
    losses = []
    for index in range(len(held_out)):
        stored = read_sample(held_out, index)
        x0 = 0.7 * stored.latent_mean.transpose(0, 1)[None]
        noise = SampleRNG(0, 0, stored.key).normal(tuple(x0.shape[1:]), "noise")[None]
        for t in TIMESTEPS:
            a, s = float(abar[t].sqrt()), float((1 - abar[t]).sqrt())
            inputs = objective.model_inputs(a * x0 + s * noise, {}, stored.text[None], torch.tensor([t]), torch.float32)
            with torch.no_grad():
                predicted = transformer(**inputs, return_dict=False)[0]
            losses.append(float((predicted - (a * noise - s * x0)).square().mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", [LoraSettings, SftSettings])
def test_the_base_line_is_the_base_models_and_an_untrained_run_stays_on_it(tmp_path, shards, train_here, method):
    run = train_here(method(**shards, out=tmp_path / "run", steps=1, lr=0.0))
    _, (line,) = lines(run)
    assert line.val_loss == line.base_val_loss
    assert math.isclose(line.base_val_loss, stated_loss(open_shards(shards["validate_shards"])), rel_tol=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_last_value_is_that_of_the_exported_weights(tmp_path, shards, train_here, ema):
    run = train_here(LoraSettings(**shards, out=tmp_path / "run", steps=4, lr=0.1, rank=4, ema=ema))
    _, (line,) = lines(run)
    assert line.val_loss != line.base_val_loss
    stated = stated_loss(open_shards(shards["validate_shards"]), run / lora.FILE)
    assert math.isclose(line.val_loss, stated, rel_tol=1e-6)


def test_training_does_not_notice_a_validation(tmp_path, shards, train_here, monkeypatch):
    """Losses are bit-equal; and there is no text encoder to be had."""
    monkeypatch.setattr("cogtrain.validation.drawing.denoise", functools.partial(denoise, steps=2))
    base = tmp_path / "model"
    shutil.copytree(open_checkpoint("tiny").root, base)
    for weights in (base / "text_encoder").glob("*.safetensors"):
        weights.unlink()
    common = {"shards": shards["shards"], "model": str(base), "steps": 2, "rank": 4, "lr": 1e-2, "lora_dropout": 0.1}
    without = train_here(LoraSettings(**common, out=tmp_path / "without"))
    settings = {"validate_shards": shards["validate_shards"], "validate_every": 1, "validate_videos": 1}
    run = train_here(LoraSettings(**common, **settings, out=tmp_path / "with"))

    steps, validations = lines(run)
    expected, none = lines(without)
    assert [(s.loss, s.grad_norm) for s in steps] == [(s.loss, s.grad_norm) for s in expected]
    assert (without / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert not none
    assert [v.step for v in validations] == [1, 2]
    assert len({v.val_loss for v in validations}) == 2
    assert len({v.base_val_loss for v in validations}) == 1

    assert sorted(p.name for p in (run / "validation").glob("step-*")) == [f"step-00000{n}" for n in range(3)]
    for video in ("step-000002/0.mp4", "clips/0.mp4"):
        with av.open(str(run / "validation" / video)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 17
    assert len(json.loads((run / "validation/captions.json").read_text())) == 1
    page = (run / "report.html").read_text()
    assert 'src="validation/step-000000/0.mp4"' in page
    assert "base model, held out" in page
    assert read_run(run).facts.held_out == 3


def test_its_memory_is_counted_apart_from_trainings(tmp_path, shards, train_here, monkeypatch):
    """Measured first, the base model would else hide by how much each later validation passes training."""
    held = [0.0]
    loss = validate.Validation.loss

    def takes_more_each_time(self, model):
        held[0] = max(held[0], 3 + len(taken))
        taken.append(held[0])
        return loss(self, model)

    taken = []
    monkeypatch.setattr(validate.Validation, "loss", takes_more_each_time)
    monkeypatch.setattr(validate, "peak_gib", lambda device: held[0])
    monkeypatch.setattr(validate, "reset_peak", lambda device: held.__setitem__(0, 0.0))
    run = train_here(LoraSettings(**shards, out=tmp_path / "run", steps=2, rank=4, validate_every=1))
    assert [line.val_peak_gib for line in lines(run)[1]] == [4, 5]
    assert held == [0]


@pytest.mark.parametrize("form", [pytest.param("tiny-i2v", marks=pytest.mark.full), "tiny-1.5-i2v"])  # 10 s each
def test_videos_start_from_the_stored_image(tmp_path, make_shards, train_here, monkeypatch, form):
    """The clean one, with the stored caption; 17 frames come out, the padding is gone."""
    monkeypatch.setattr("cogtrain.validation.drawing.denoise", functools.partial(denoise, steps=2))
    make_shards(tmp_path / "out", form, samples=1)
    make_shards(tmp_path / "held", form, samples=2, seed=9, captions=("a", "b"))
    given = {"shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "held")], "rank": 4}
    seen = []
    monkeypatch.setattr("cogtrain.validation.drawing.Conditions", lambda *args: seen.append(args) or Conditions(*args))
    run = train_here(LoraSettings(**given, steps=1, validate_videos=2, out=tmp_path / "run"))
    held_out = open_shards(given["validate_shards"])
    for index in range(2):
        stored = read_sample(held_out, index)
        _, text, _, conditions = seen[index]
        assert torch.equal(text[0], stored.text)
        assert torch.equal(conditions["image"][0], stored.conditions["image_clean_mean"].transpose(0, 1))
        with av.open(str(run / f"validation/step-000001/{index}.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 17


def test_the_base_line_of_full_fine_tuning_is_remembered(tmp_path, shards, train_here, monkeypatch):
    settings = {**shards, "out": tmp_path / "run", "validate_every": 1, "lr": 1e-2}
    train_here(SftSettings(**settings, steps=1))
    remembered = json.loads((tmp_path / "run/validation/base.json").read_text())
    run = train_here(SftSettings(**settings, steps=2))
    _, validations = lines(run)
    assert [v.step for v in validations] == [1, 2]
    assert {v.base_val_loss for v in validations} == {remembered["loss"]}
    assert (run / "validation/base.json").read_text() == json.dumps(remembered)


def test_other_held_out_shards_are_measured_anew(tmp_path, shards, train_here, make_shards):
    settings = {"shards": shards["shards"], "out": tmp_path / "run", "rank": 4}
    train_here(LoraSettings(**settings, validate_shards=shards["validate_shards"], steps=1, lr=1e-2))
    make_shards(tmp_path / "other", samples=2, seed=5, captions=("x", "y"))
    run = train_here(LoraSettings(**settings, validate_shards=[str(tmp_path / "other")], steps=2, lr=1e-2))
    _, (first, second) = lines(run)
    assert first.base_val_loss != second.base_val_loss
    # The base model was measured although the run had already trained a step.
    assert math.isclose(second.base_val_loss, stated_loss(open_shards([str(tmp_path / "other")])), rel_tol=1e-6)


def test_a_damaged_held_out_sample_is_named(tmp_path, shards, train_here):
    tar = tmp_path / "held/000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="not what was written") as caught:
        train_here(LoraSettings(**shards, out=tmp_path / "run", steps=1))
    assert "held/000001.tar" in caught.value.where


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.full)])  # 20 s
def test_two_processes_find_what_one_finds(tmp_path, shards, train_here, strategy):
    """The base line to the rounding of fp32; and each video is drawn once, under ZeRO-3 from gathered weights."""
    one = train_here(LoraSettings(**shards, out=tmp_path / "one", steps=1, batch_size=2, lr=1e-2, validate_videos=0))
    words = ["cogtrain", "lora", "--shards", *shards["shards"], "--validate-shards", *shards["validate_shards"]]
    words += ["--batch-size", 1, "--lr", 1e-2, "--steps", 1, "--strategy", strategy, "--out", tmp_path / "two"]
    words += ["--validate-videos", 2] if strategy == "zero3" else []
    ended = ForkedRanks(2, words, tmp_path).end()
    assert all(code == 0 for code, *_ in ended), ended
    (_, (mine,)), (_, (theirs,)) = lines(one), lines(tmp_path / "two")
    assert math.isclose(theirs.base_val_loss, mine.base_val_loss, rel_tol=1e-7)
    assert math.isclose(theirs.val_loss, mine.val_loss, rel_tol=1e-5)
    assert theirs.val_loss != theirs.base_val_loss
    if strategy == "zero3":
        for step in ("step-000000", "step-000001"):
            assert sorted(p.name for p in (tmp_path / "two/validation" / step).iterdir()) == ["0.mp4", "1.mp4"]
