"""What a run writes is foretold, and compared with the free room before a weight is loaded."""

import pytest
import torch

from cogcommon.errors import DiskError
from cogcommon.model.checkpoint import Checkpoint
from cogtrain.memory import disk
from cogtrain.memory.disk import check_room, writes
from cogtrain.model import lora
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings


@pytest.fixture
def shards(tmp_path, make_shards):
    make_shards(tmp_path / "shards", samples=2)
    return [str(tmp_path / "shards")]


def open_here(settings):
    return open_run(settings, torch.device("cpu"), 1)


def size_of(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LoraSettings, {"ema": 0.9}),
        (LoraSettings, {"optimizer": "prodigy", "lr": 1.0}),
        (LoraSettings, {"precision": "bf16"}),
        (SftSettings, {"precision": "bf16", "memory": "low"}),
        (SftSettings, {"optimizer": "prodigy", "lr": 1.0, "ema": 0.9}),
    ],
)
def test_sizes_are_as_foretold(tmp_path, shards, train_here, cls, settings):
    """Those of ZeRO: test_ranks."""
    rank = {"rank": 64} if cls is LoraSettings else {}
    wanted = cls(shards=shards, out=tmp_path / "run", steps=1, **rank, **settings)
    foretold = writes(open_here(wanted))
    run = train_here(wanted)
    assert size_of(run / "checkpoint-1") == pytest.approx(foretold.checkpoint, rel=0.02)
    assert size_of(run / (lora.FILE if rank else "transformer")) == pytest.approx(foretold.export, rel=0.02)


@pytest.mark.parametrize(
    ("checkpoints", "keep", "says"),
    [
        (4.1, 3, None),
        (3.9, 3, "--keep 2 has room"),
        (2.1, 3, "--keep 1 has room"),
        (2.1, 1, None),
        (1.9, 3, "--save-every 9 has room for one, at the end"),
        (0.5, 1, "--save-every 9 trains to the end without one"),
    ],
)
def test_checkpoints_without_room_are_told_with_what_has_room(tmp_path, shards, monkeypatch, checkpoints, keep, says):
    run = open_here(LoraSettings(shards=shards, out=tmp_path / "run", steps=9, save_every=1, rank=2, keep=keep))
    needs = writes(run)
    monkeypatch.setattr(disk, "room_of", lambda path: int(needs.least + checkpoints * needs.checkpoint))
    notes = check_room(run, tmp_path / "run")
    assert notes == [] if says is None else says in notes[0], notes


def test_a_resumed_run_counts_the_checkpoints_that_are_there(tmp_path, shards, train_here, monkeypatch):
    settings = {"shards": shards, "out": tmp_path / "run", "save_every": 1, "rank": 2, "keep": 2}
    train_here(LoraSettings(steps=2, **settings))
    run = open_here(LoraSettings(steps=4, **settings))
    needs = writes(run)
    monkeypatch.setattr(disk, "room_of", lambda path: int(needs.least + 1.1 * needs.checkpoint))
    assert check_room(run, tmp_path / "run") == []
    monkeypatch.setattr(disk, "room_of", lambda path: int(needs.least + 0.9 * needs.checkpoint))
    assert "--save-every 4" in check_room(run, tmp_path / "run")[0]


def test_a_run_whose_weights_find_no_room_is_refused_before_it_is_loaded(tmp_path, shards, train_here, monkeypatch):
    monkeypatch.setattr(disk, "room_of", lambda path: 10_000)
    monkeypatch.setattr(Checkpoint, "load_transformer", lambda *args: pytest.fail("a weight was loaded"))
    with pytest.raises(DiskError, match="the trained weights would find no room") as caught:
        train_here(LoraSettings(shards=shards, out=tmp_path / "run", steps=1, rank=2))
    assert "of room, or give --out on another disk" in str(caught.value)
