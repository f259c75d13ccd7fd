"""Pictures among clips in training, and ``--repeat``: so often an epoch, drawn for anew each time, resumed exactly."""

import json

import numpy as np
import pytest

from cogcommon.errors import RunError, SettingError, ShardError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogtrain.commands import plan
from cogtrain.data.batches import Collator, read_sample
from cogtrain.data.caption_draw import CaptionDraw, hash_words
from cogtrain.data.prompts import Prompt, without_token
from cogtrain.data.repeats import of_clips, times_of
from cogtrain.data.sampler import Sampler, Slot, group_slots
from cogtrain.data.shards import open_shards
from cogtrain.distributed.snapshot import STATE_FILE
from cogtrain.model.objective import Objective
from cogtrain.runs.folder import read_run
from cogtrain.settings.planning import ForecastSettings
from cogtrain.settings.training import LoraSettings

SIZES = (Resolution(9, 64, 96), Resolution(1, 64, 96))


@pytest.fixture(scope="module")
def out(tmp_path_factory, make_shards):
    """Two clips and two pictures of 1.5, which puts a latent frame before each: a shard of each size."""
    folder = tmp_path_factory.mktemp("mixed") / "out"
    make_shards(folder, "tiny-1.5", resolutions=SIZES, samples=2)
    return folder


def test_folders_with_and_without_a_word_and_of_other_sizes_train_together(tmp_path, make_shards, out, train_here):
    """As the first page says: your clips under a word of their own, beside known ones, and pictures in a folder."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    make_shards(mine, "tiny-1.5", resolutions=SIZES[:1], samples=2, settings={"id_token": "sks"})
    both = [str(mine), str(out)]
    shards = open_shards(both)
    assert (len(shards), set(shards.buckets)) == (6, set(SIZES))
    assert (shards.id_tokens, shards.id_token) == ({"", "sks"}, "sks")
    prompt = [Prompt("a ball", "a-ball", None, SIZES[0])]
    assert without_token(prompt, "sks") and not without_token(prompt, *shards.id_tokens)
    train_here(LoraSettings(shards=both, steps=1, rank=4, out=tmp_path / "run", repeat=[f"{mine}/=2"]))
    assert read_run(tmp_path / "run").facts.id_token == "sks"
    make_shards(other, "tiny-1.5", resolutions=SIZES[:1], samples=2, settings={"fit": "stretch"})
    with pytest.raises(ShardError, match="encoded differently: --fit"):
        open_shards([*both, str(other)])


def places(sampler, epoch):
    """(sample, turn) of an epoch, batch by batch."""
    turns = sampler.turns(epoch)
    batches = sampler.epoch(epoch)
    return np.stack([batches, np.zeros_like(batches) if turns is None else turns], axis=-1)


def test_each_time_is_in_each_epoch_once_and_no_batch_mixes_sizes():
    times = np.array([1, 3, 1, 2, 5, 1, 1, 4])
    bucket_of = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    sampler = Sampler(np.arange(8) // 2, bucket_of, 1, 7, times=times)
    everything = sorted((sample, turn) for sample, count in enumerate(times) for turn in range(count))
    for epoch in range(3):
        assert sorted(map(tuple, places(sampler, epoch).reshape(-1, 2).tolist())) == everything
    assert (sampler.epoch(0) != sampler.epoch(1)).any() and sampler.samples == len(everything)
    larger = Sampler(np.arange(8) // 2, bucket_of, 3, 7, times=times)
    assert (larger.steps_per_epoch, larger.left_over) == (2 + 3, 1 + 2)
    assert all(len(set(bucket_of[batch])) == 1 for batch in larger.epoch(0))
    # All groups and accumulation steps together train just these.
    batch, turns = larger.epoch(0)[1], larger.turns(0)[1]
    slots = [group_slots(batch, 0, micro=0, group=group, groups=3, size=1, turns=turns) for group in range(3)]
    assert [(slot.sample, slot.turn) for (slot,) in slots] == list(zip(batch, turns, strict=True))


def test_an_order_without_repeats_is_the_same_as_before_and_a_clips_captions_count_alike():
    shard_of, bucket_of = np.arange(40) // 7, np.arange(40) // 14
    plain = Sampler(shard_of, bucket_of, 4, 3)
    assert (plain.epoch(1) == Sampler(shard_of, bucket_of, 4, 3, times=np.ones(40, np.int64)).epoch(1)).all()
    draw = CaptionDraw(np.array([0, 0, 1, 1]), hash_words("abcd"), 0)
    times = of_clips(np.array([1, 6, 1, 1]), draw.clip_of)
    sampler = Sampler(np.zeros(4, np.int64), np.zeros(4, np.int64), 1, 0, draw, times)
    assert all(sorted(np.bincount(sampler.epoch(epoch).ravel(), minlength=4)) == [0, 0, 1, 6] for epoch in range(6))


def test_what_is_drawn_for_a_sample_is_drawn_anew_each_time(out):
    shards = open_shards([str(out)])
    sample = read_sample(shards, int(np.flatnonzero(shards.bucket_of == 0)[0]))
    collate = Collator(Objective.of(open_checkpoint("tiny-1.5")), seed=1)
    first, second, again = (collate([sample], [Slot(0, 0, 0, turn)]) for turn in (0, 1, 0))
    assert first.latent_BFCHW.shape == (1, 1, 16, 8, 12) and first.noise_BFCHW.shape == (1, 2, 16, 8, 12)
    assert (first.noise_BFCHW == again.noise_BFCHW).all()
    assert abs(np.corrcoef(first.noise_BFCHW.ravel(), second.noise_BFCHW.ravel())[0, 1]) < 0.1
    assert (first.latent_BFCHW != second.latent_BFCHW).any()


def test_a_mixed_run_resumes_exactly_and_says_what_it_repeats(out, tmp_path, train_here, losses, capsys, monkeypatch):
    monkeypatch.chdir(out.parent)

    def run(name, **settings):
        common = {"shards": ["out"], "out": tmp_path / name, "rank": 4, "lr": 1e-2, "repeat": ["out/*1.tar=3"]}
        return train_here(LoraSettings(**common | settings))

    whole = run("whole", steps=12)
    assert "each epoch trains 8 samples, of which 2 samples 3 times each (--repeat)" in capsys.readouterr().out
    assert [line.epoch for line in read_run(whole).steps] == [0] * 8 + [1] * 4
    run("one", steps=1, captions="one")
    said = capsys.readouterr().out
    assert "one caption of each of 4 clips" in said and "each epoch trains 8 clips" in said
    assert "--captions one changes nothing" in said
    run("halves", steps=5)
    # Named in another way, by its size.
    assert losses(run("halves", steps=12, repeat=["1x64x96=3"])) == losses(whole)
    with pytest.raises(RunError, match=r"another --repeat: 2 samples 3 times \(.{8}\) then, 2 samples 4 times"):
        run("halves", steps=14, repeat=["1x64x96=4"])
    assert f'repeat = ["{out}/*1.tar=3"]' in (whole / "config.toml").read_text()
    # A checkpoint from before there was a choice trained each once.
    state = tmp_path / "halves" / "checkpoint-12" / STATE_FILE
    values = json.loads(state.read_text())
    del values["facts"]["--repeat"]
    state.write_text(json.dumps(values))
    with pytest.raises(RunError, match="--repeat: none then, 2 samples 3 times"):
        run("halves", steps=14)


def test_the_plan_says_the_counts_and_repeats_in_its_command(out, capsys):
    plan.run(ForecastSettings(shards=[str(out)], gpu="24GB", method="lora", repeat=["1x64x96=8"]))
    said = capsys.readouterr().out
    assert "each epoch trains 18 samples, of which 2 samples 8 times each" in said and "--repeat 1x64x96=8" in said
    with pytest.raises(SettingError, match="no samples to repeat"):
        plan.run(ForecastSettings(gpu="24GB", repeat=["1x64x96=8"]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out"], "does not say how many"), (["out=0"], "does not say how many"), (["=3"], "does not say how many"),
        (["out=2.5"], "does not say how many"), (["5x64x96=3"], "one of 1x64x96, 9x64x96"),
        (["none/*=3"], "no shard matches none"), (["out=3", "1x64x96=2"], "named already"),
        (["otu/=8"], "did you mean out? give a folder of --shards, as --repeat out/=8"),
    ],
)  # fmt: skip
def test_a_repeat_that_cannot_be_meant_is_refused(out, words, told, monkeypatch):
    monkeypatch.chdir(out.parent)
    with pytest.raises((SettingError, ShardError)) as caught:
        times_of(words, open_shards(["out"]))
    assert told in str(caught.value) and "--repeat" in str(caught.value)


def test_shards_that_are_not_trained_cannot_be_repeated(out, tmp_path, make_shards):
    make_shards(tmp_path / "other", "tiny-1.5", samples=2)
    with pytest.raises(SettingError, match="none of the samples"):
        times_of([f"{tmp_path / 'other'}=2"], open_shards([str(out)]))
    assert times_of([f"{out}=1"], open_shards([str(out)])) is None
