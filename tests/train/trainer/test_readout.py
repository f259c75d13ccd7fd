"""Losses read one step late: what is not finite is named, and has not touched the weights."""

import dataclasses

import pytest
import torch

from cogcommon.cli import progress
from cogcommon.errors import RunError
from cogtrain.data import batches
from cogtrain.data.sampler import Sampler
from cogtrain.data.shards import open_shards
from cogtrain.runs.folder import StepLine, read_run
from cogtrain.runs.log import RunLog
from cogtrain.settings.training import LoraSettings
from cogtrain.trainer import announce


@pytest.fixture
def late(monkeypatch):
    """The fused optimizer of a GPU, with which losses may be read late."""
    monkeypatch.setattr(torch.optim, "AdamW", _Fused)


class _Fused(torch.optim.AdamW):
    def __init__(self, parameters, **options):
        super().__init__(parameters, **(options | {"fused": True}))


def settings(tmp_path, **options):
    given = {"shards": [str(tmp_path / "out")], "out": tmp_path / "run", "rank": 2, "epochs": 1}
    return LoraSettings(**(given | options))


def test_what_a_step_takes_and_what_is_left_are_of_one_median(tmp_path, capsys):
    log = RunLog(tmp_path, 20, 0)
    for step in range(1, 18):
        log.step(StepLine(step, 0, 1.0, 0.1, 1.0, 4.0 if step < 13 else 11.16, 1.0, 1.0))
        log._last_line = -9.0  # each is said
    said = capsys.readouterr().out.splitlines()
    assert said[11].endswith("4.00 s/step  peak 1.0 GiB  ETA 0:32") and said[12].endswith("ETA 0:28")
    assert said[16].endswith("11.16 s/step  peak 1.0 GiB  ETA 0:33")


def test_the_last_line_of_the_steps_comes_before_what_is_next(tmp_path, make_shards, train_here, monkeypatch):
    make_shards(tmp_path / "out", samples=2)
    shown, real = [], announce.ending

    def ending(*words):
        shown.append([one.name for one in progress._display.stages if one.total])
        real(*words)

    monkeypatch.setattr(announce, "ending", ending)
    train_here(settings(tmp_path), after_step=lambda _: shown.append([one.name for one in progress._display.stages]))
    assert shown[0] == ["training"] and shown[-1] == []


def test_late_reading_changes_nothing(tmp_path, make_shards, train_here, late):
    make_shards(tmp_path / "out", samples=4)
    found = []
    for options in ({}, {"out": tmp_path / "at once", "on_nonfinite": "skip"}):
        steps = read_run(train_here(settings(tmp_path, accumulate=2, epochs=2, **options))).steps
        found.append([(line.step, line.loss, line.grad_norm, line.lr, line.epoch) for line in steps])
    assert len(found[0]) == 4 and found[0] == found[1]


def test_parts_of_a_step_make_the_step(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=4)
    for line in read_run(train_here(settings(tmp_path))).steps:
        parts = [line.data_s, line.forward_s, line.backward_s, line.optimizer_s]
        assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(line.s_per_step)


def test_a_spoilt_step_is_held_back_and_named_one_step_late(
    tmp_path, make_shards, train_here, losses, late, monkeypatch
):
    make_shards(tmp_path / "out", samples=6)
    shards = open_shards([str(tmp_path / "out")])
    places = [int(batch[0]) for batch in Sampler(shards.shard_of, shards.bucket_of, 1, 42).epoch(0)]
    spoilt, read = places[3], batches.read_sample
    seen = []

    def read_spoilt(shards, index, stop=None):
        sample = read(shards, index)
        return dataclasses.replace(sample, text=sample.text * float("nan")) if index == spoilt else sample

    monkeypatch.setattr(batches, "read_sample", read_spoilt)
    step = _Fused.step

    def watched(self, closure=None):
        step(self, closure)
        seen.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    monkeypatch.setattr(_Fused, "step", watched)
    with pytest.raises(RunError, match="loss of 1 sample is not finite") as caught:
        train_here(settings(tmp_path))
    assert shards.extent(spoilt).key in caught.value.where and "step 4" in caught.value.where
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert len(seen) == 4  # the fourth is queued, and does nothing; there is no fifth
    assert all(torch.equal(before, after) for before, after in zip(seen[2], seen[3], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(seen[1], seen[2], strict=True))


def test_the_checkpoint_of_a_step_is_not_written_before_its_loss_is_known(
    tmp_path, make_shards, train_here, late, monkeypatch
):
    make_shards(tmp_path / "out", samples=4)
    read = batches.read_sample

    def read_spoilt(shards, index, stop=None):
        sample = read(shards, index)
        return dataclasses.replace(sample, text=sample.text * float("nan"))

    monkeypatch.setattr(batches, "read_sample", read_spoilt)
    with pytest.raises(RunError, match="not finite"):
        train_here(settings(tmp_path, save_every=1))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_held_step_leaves_the_optimizer_where_it_was():
    from cogtrain.trainer.readout import skip_if_not_finite

    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    nan = float("nan")
    for losses, gradient in (([1.0], 1.0), ([1.0, nan], nan), ([1.0, 1.0], nan), ([1.0, nan], 1.0), ([2.0], 1.0)):
        weight.grad = torch.full((4,), gradient)
        skip_if_not_finite(optimizer, [torch.tensor(losses)], torch.tensor(2 * gradient))
        optimizer.step()
    undisturbed = torch.nn.Parameter(torch.ones(4))
    other = torch.optim.AdamW([undisturbed], lr=0.1, fused=True)
    for _ in range(2):
        undisturbed.grad = torch.ones(4)
        other.step()
    assert torch.equal(weight, undisturbed)
    assert optimizer.state[weight]["step"] == 2


def test_fp16s_scaler_skips_the_step_whose_loss_is_not_finite():
    from cogtrain.trainer.readout import skip_if_not_finite

    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved = []
    for factor in (1.0, float("nan"), float("inf"), 1.0):
        before = weight.detach().clone()
        loss = (weight * factor).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        skip_if_not_finite(optimizer, [loss.detach().reshape(1)], weight.grad.norm())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, weight))
    assert moved == [True, False, False, True]
    assert optimizer.state[weight]["step"] == 2
