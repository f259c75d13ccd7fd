"""Several captions a clip: which of them an epoch trains, and what a run makes of it."""

import json

import numpy as np
import pyarrow as pa
import pytest

from cogcommon.errors import RunError
from cogtrain.commands import plan
from cogtrain.data.caption_draw import CaptionDraw, hash_words
from cogtrain.data.sampler import Sampler
from cogtrain.data.shards import open_shards
from cogtrain.distributed.snapshot import STATE_FILE
from cogtrain.runs.folder import read_run
from cogtrain.settings.planning import ForecastSettings
from cogtrain.settings.training import LoraSettings


def draw_of(counts, seed=0, first=0):
    """A draw for clips of so many captions each; the clips are called ``first``, ``first`` + 1, ..."""
    clip_of = np.repeat(np.arange(len(counts)), counts)
    keys = [f"{first + clip} {caption}" for clip, count in enumerate(counts) for caption in range(count)]
    return CaptionDraw(clip_of, hash_words(keys), seed)


def test_each_epoch_takes_one_caption_of_each_clip_and_no_caption_twice_before_all_once():
    counts = [1, 2, 3, 5]
    draw = draw_of(counts)
    epochs = [draw(epoch) for epoch in range(30)]
    assert all((draw.clip_of[taken] == range(4)).all() for taken in epochs)
    for clip, count in enumerate(counts):
        mine = [int(taken[clip]) for taken in epochs]
        for start in range(0, 30, count):
            assert len(set(mine[start : start + count])) == count
    assert len({tuple(taken[3] for taken in epochs[start : start + 5]) for start in range(0, 30, 5)}) > 1


def test_every_caption_is_as_likely_as_any_other_and_clips_are_independent():
    draws = np.array([draw_of([3] * 400, seed)(epoch) % 3 for seed in range(5) for epoch in (0, 4)])
    counts = np.bincount(draws.ravel(), minlength=3)
    assert (abs(counts - 4000 / 3) < 4 * (4000 * 2 / 9) ** 0.5).all()
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.2 and abs(np.corrcoef(draws[0], draws[2])[0, 1]) < 0.2


def test_a_clips_draw_depends_on_no_other_clip_nor_on_the_order_of_samples():
    many, few = draw_of([4] * 10), draw_of([4] * 3, first=7)
    assert all((few(epoch) + 28 == many(epoch)[7:]).all() for epoch in range(9))
    turned = CaptionDraw(many.clip_of[::-1].copy(), many.words[::-1].copy(), 0)
    assert all((np.sort(39 - turned(epoch)) == many(epoch)).all() for epoch in range(9))


def test_with_one_caption_a_clip_the_order_is_the_same_as_without_a_draw():
    shard_of, bucket_of = np.arange(40) // 7, np.arange(40) // 14
    plain, drawn = (Sampler(shard_of, bucket_of, 4, 3, draw) for draw in (None, draw_of([1] * 40)))
    assert all((plain.epoch(epoch) == drawn.epoch(epoch)).all() for epoch in range(3))


def test_samples_whose_record_was_rebuilt_are_clips_of_their_own(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=6, captions_each=3)
    shards = open_shards([str(tmp_path / "out")])
    assert shards.clips == 2 and shards.described == "6 samples (captions of 2 clips)"
    at = shards.table.schema.get_field_index("source_sha256")
    object.__setattr__(shards, "table", shards.table.set_column(at, "source_sha256", pa.array([b""] * 6, pa.binary())))
    shards.__dict__.pop("clip_of")
    assert shards.clips == shards.of_no_clip == 6 and shards.described == "6 samples"


@pytest.fixture
def here(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=6, captions_each=3)

    def run(**settings):
        common = {"shards": [str(tmp_path / "out")], "out": tmp_path / "run", "rank": 4, "lr": 1e-2, "captions": "one"}
        return train_here(LoraSettings(**common | settings))

    return run


def test_an_epoch_is_as_long_as_there_are_clips_and_a_resume_is_exact(here, tmp_path, losses, capsys, make_shards):
    whole = here(epochs=3, out=tmp_path / "whole")
    said = capsys.readouterr().out
    assert "6 samples (captions of 2 clips)" in said and "one caption of each of 2 clips" in said
    assert [line.epoch for line in read_run(whole).steps] == [0, 0, 1, 1, 2, 2]
    here(steps=3)
    assert losses(here(epochs=3)) == losses(whole)
    with pytest.raises(RunError, match="--captions: one then, all now"):
        here(steps=8, captions="all")
    # A checkpoint from before there was a choice trained all.
    state = tmp_path / "run" / "checkpoint-6" / STATE_FILE
    values = json.loads(state.read_text())
    del values["facts"]["--captions"]
    state.write_text(json.dumps(values))
    with pytest.raises(RunError, match="--captions: all then, one now"):
        here(steps=8)
    plan.run(ForecastSettings(shards=[str(tmp_path / "out")], gpu="24GB", method="lora"))
    assert "6 samples (captions of 2 clips) of 17x64x96" in capsys.readouterr().out
