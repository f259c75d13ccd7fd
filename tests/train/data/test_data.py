import itertools
from dataclasses import replace

import pytest
import torch

from cogcommon.errors import ShardError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, Resolution
from cogtrain.data.batches import Collator, prefetch, read_sample
from cogtrain.data.sample_rng import SampleRNG
from cogtrain.data.sampler import Slot
from cogtrain.data.shards import open_shards
from cogtrain.model.conditions import CONDITIONS
from cogtrain.model.objective import Objective


def opened(tmp_path, make_shards, form="tiny", **options):
    make_shards(tmp_path / "out", form, **options)
    shards = open_shards([str(tmp_path / "out")])
    return shards, Objective.of(open_checkpoint(form))


@pytest.mark.parametrize("form", ["tiny", "tiny-1.5-i2v"])
def test_a_batch_is_the_samples_and_their_draws(tmp_path, make_shards, form):
    shards, objective = opened(tmp_path, make_shards, form, samples=2)
    samples = [read_sample(shards, index) for index in (1, 0)]
    batch = Collator(objective, seed=7)(samples, [Slot(1, 3, 0), Slot(0, 3, 1)])
    assert batch.keys == tuple(sample.key for sample in samples)
    for row, sample in enumerate(samples):
        rng = SampleRNG(7, 3, sample.key)
        expected = sample.latent_mean + sample.latent_std * rng.normal(tuple(sample.latent_mean.shape), "posterior")
        assert torch.equal(batch.latent_BFCHW[row], expected.transpose(0, 1))
        assert torch.equal(batch.noise_BFCHW[row], rng.normal(tuple(batch.noise_BFCHW[row].shape), "noise"))
        assert batch.timestep_B[row] == rng.timestep(1000)
        assert torch.equal(batch.text_BLD[row], sample.text)
    assert batch.noise_BFCHW.shape[1] == (6 if form == "tiny-1.5-i2v" else 5)
    assert set(batch.conditions) == (set() if form == "tiny" else {"image"})


def test_a_shard_is_whole_wherever_its_last_sample_ends(tmp_path, make_shards):
    """A tar's end is two blocks of zeros or more, up to a multiple of 20 blocks: 2 to 21."""
    captions = tuple("x" * (512 * blocks) for blocks in range(20))
    shards, _ = opened(tmp_path, make_shards, samples=20, per_shard=1, captions=captions)
    ends = {size // 512 % 20 for size in shards.table["size"].to_pylist()}
    assert ends == set(range(20))


def test_an_image_variant_is_drawn_by_epoch_and_the_clean_one_is_for_validation(tmp_path, make_shards):
    shards, objective = opened(tmp_path, make_shards, "tiny-i2v", samples=1, image_variants=3, posterior="sample")
    sample = read_sample(shards, 0)
    seen = set()
    for epoch in range(30):
        image = Collator(objective, 0)([sample], [Slot(0, epoch, 0)]).conditions["image"][0, 0]
        (match,) = [k for k in range(3) if torch.equal(image, sample.conditions["image_mean"][k, :, 0])]
        seen.add(match)
    assert seen == {0, 1, 2}
    held_out = Collator(objective, 0, held_out=True)([sample], [Slot(0, 0, 0)])
    assert torch.equal(held_out.conditions["image"][0, 0], sample.conditions["image_clean_mean"][:, 0])
    assert torch.equal(held_out.latent_BFCHW[0].transpose(0, 1), sample.latent_mean)


def test_caption_dropout_takes_the_stored_empty_caption_as_often_as_asked(tmp_path, make_shards):
    shards, objective = opened(tmp_path, make_shards, samples=1)
    sample = read_sample(shards, 0)
    empty = torch.zeros_like(sample.text)
    collate = Collator(objective, 0, caption_dropout=0.3, empty_text=empty)
    dropped = sum(bool((collate([sample], [Slot(0, epoch, 0)]).text_BLD == 0).all()) for epoch in range(200))
    assert 40 <= dropped <= 80  # 60 expected, standard deviation 6.5
    plain = Collator(objective, 0)([sample], [Slot(0, 0, 0)])
    assert torch.equal(collate([sample], [Slot(0, 0, 0)]).noise_BFCHW, plain.noise_BFCHW)  # nothing else moves


def test_prefetch_keeps_the_order_and_raises_when_the_turn_comes(tmp_path, make_shards):
    shards, objective = opened(tmp_path, make_shards, samples=6)
    places = [[Slot(index, 0, 0)] for index in (4, 2, 0, 5, 1, 3)]
    collate = Collator(objective, 0)
    batches = list(prefetch(shards, iter(places), collate, ahead=3, pin=False))
    assert [batch.keys[0] for batch in batches] == [shards.extent(place[0].sample).key for place in places]
    bad = shards.shards[shards.extent(0).shard]
    with open(bad.path, "r+b") as stream:
        stream.seek(shards.extent(0).offset + 3000)
        stream.write(b"x" * 8)
    reading = prefetch(shards, iter(places), collate, ahead=3, pin=False)
    assert len(list(itertools.islice(reading, 2))) == 2
    with pytest.raises(ShardError, match="not what was written") as caught:
        next(reading)
    assert caught.value.where == bad.shown


def test_prefetch_reads_only_so_far_ahead(tmp_path, make_shards):
    shards, objective = opened(tmp_path, make_shards, samples=6)
    taken = []

    def places():
        for index in range(6):
            taken.append(index)
            yield [Slot(index, 0, 0)]

    reading = prefetch(shards, places(), Collator(objective, 0), ahead=2, pin=False)
    next(reading)
    assert len(taken) == 3
    reading.close()


def test_buckets_keep_their_shapes(tmp_path, make_shards):
    sizes = (Resolution(17, 64, 96), Resolution(9, 96, 64))
    shards, objective = opened(tmp_path, make_shards, resolutions=sizes, samples=2)
    assert set(shards.buckets) == set(sizes)
    for index in range(4):
        bucket = shards.buckets[shards.bucket_of[index]]
        batch = Collator(objective, 0)([read_sample(shards, index)], [Slot(index, 0, 0)])
        latent = BY_NAME["5b"].latent(bucket)
        assert batch.latent_BFCHW.shape == (1, latent.frames, latent.channels, latent.height, latent.width)


def test_a_second_condition_travels_from_a_shard_to_the_transformer(tmp_path, make_shards, monkeypatch):
    """A mask, as a row of the table: no file but the table's knows of it."""
    from diffusers import CogVideoXTransformer3DModel

    monkeypatch.setitem(CONDITIONS, "mask", lambda objective, noisy, mask: mask.expand_as(noisy))
    latent = BY_NAME["5b"].latent(Resolution(17, 64, 96))
    shards, plain = opened(tmp_path, make_shards, samples=2, more={"mask": latent._replace(channels=1)})
    family = replace(BY_NAME["5b"], conditions=("mask",))
    objective = replace(plain, family=family)
    samples, slots = [read_sample(shards, index) for index in (0, 1)], [Slot(0, 0, 0), Slot(1, 0, 1)]
    batch = Collator(objective, 0)(samples, slots)
    assert set(batch.conditions) == {"mask"} and Collator(plain, 0)(samples, slots).conditions == {}
    for row, sample in enumerate(samples):
        assert torch.equal(batch.conditions["mask"][row], sample.conditions["mask"].transpose(0, 1))
    assert not torch.equal(batch.conditions["mask"][0], batch.conditions["mask"][1])

    torch.manual_seed(0)
    config = dict(open_checkpoint("tiny").transformer_config) | {"in_channels": family.in_channels}
    transformer = CogVideoXTransformer3DModel.from_config(config).eval()
    with torch.no_grad():
        seen, blank = (
            objective.losses(transformer, replace(batch, conditions=conditions), torch.float32)
            for conditions in (batch.conditions, batch.blank().conditions)
        )
    assert seen.isfinite().all() and (seen - blank).abs().min() > 1e-4
