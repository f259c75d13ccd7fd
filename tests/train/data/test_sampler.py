import numpy as np
import pytest

from cogtrain.data.sampler import WINDOW, Sampler, group_slots


def sampler(samples=100, per_shard=7, buckets=1, batch=4, seed=3):
    index = np.arange(samples)
    return Sampler(index // per_shard, index // per_shard % buckets, batch, seed)


def test_an_epoch_takes_every_sample_once_but_for_the_rest():
    of = sampler(samples=103)
    batches = of.epoch(0)
    assert batches.shape == (of.steps_per_epoch, 4) == (25, 4)
    assert len(set(batches.flat)) == 100 and of.left_over == 3
    left_out = [set(range(103)) - set(of.epoch(epoch).flat) for epoch in range(5)]
    assert len(set.union(*left_out)) > 3  # other ones each epoch


def test_it_depends_on_seed_and_epoch():
    of = sampler()
    assert np.array_equal(of.epoch(1), sampler().epoch(1))
    assert not np.array_equal(of.epoch(0), of.epoch(1))
    assert not np.array_equal(of.epoch(0), sampler(seed=4).epoch(0))


def test_a_batch_has_one_bucket():
    of = sampler(samples=200, buckets=3)
    seen = set()
    for batch in of.epoch(0):
        assert len(set(of.bucket_of[batch])) == 1
        seen.add(int(of.bucket_of[batch[0]]))
    assert seen == {0, 1, 2}
    first = [int(of.bucket_of[batch[0]]) for batch in of.epoch(0)]
    assert first != sorted(first)  # and buckets take turns


def test_samples_are_mixed_across_the_shards_of_a_window_only():
    of = sampler(samples=40 * WINDOW, per_shard=10, batch=1)
    shards = of.shard_of[of.epoch(0).ravel()]
    windows = shards.reshape(-1, 10 * WINDOW)
    assert all(len(set(window)) == WINDOW for window in windows)
    assert len(set(windows[0][:20])) > 5


def test_small_buckets_are_named():
    of = Sampler(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]), 2, 0)
    assert of.too_small_buckets() == [1] and of.steps_per_epoch == 1


@pytest.mark.parametrize(("world", "size", "accumulate"), [(1, 8, 1), (2, 4, 1), (4, 1, 2), (1, 1, 8), (2, 2, 2)])
def test_ranks_share_a_global_batch_whatever_their_number(world, size, accumulate):
    batch = sampler(batch=8).epoch(0)[0]
    places = [
        place
        for micro in range(accumulate)
        for rank in range(world)
        for place in group_slots(batch, 5, micro=micro, group=rank, groups=world, size=size)
    ]
    assert [place.sample for place in places] == list(batch)
    assert [place.slot for place in places] == list(range(8)) and {place.epoch for place in places} == {5}
