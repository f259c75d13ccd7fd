"""The plan is a function of content: after any interruption the rest is cut at the same places."""

from __future__ import annotations

import itertools
import random

import pytest

from cogcommon.model.families import Resolution
from cogprep.dataset.lists import Sample
from cogprep.plan.folder import Committed, Hashed, Placed
from cogprep.plan.holdout import Holdout, choose_holdout
from cogprep.plan.plan import Candidate, make_plan, sample_key

WIDE, TALL = Resolution(9, 64, 96), Resolution(9, 96, 64)


def candidates(count: int) -> list[Candidate]:
    return [
        Candidate(Sample(n + 1, f"caption {n}", f"{n}.mp4", ""), Hashed(1, 1, bytes([n]) * 32), b"")
        for n in range(count)
    ]


def bucket_of(n: int) -> Resolution:
    return TALL if n % 3 == 1 else WIDE


def plan_of(count: int, committed: Committed, *, chunk: int = 3, holdout: int = 0):
    given = candidates(count)
    keys = [f"k{n}" for n in range(count)]
    splits = splits_of(given, holdout, committed)
    buckets = {key: bucket_of(n) for n, key in enumerate(keys)}
    return make_plan(
        given, keys, splits, buckets, committed, bucket_order=[WIDE, TALL], chunk={WIDE: chunk, TALL: chunk}
    )


def splits_of(given: list[Candidate], holdout: int, committed: Committed) -> list[str]:
    held = committed.clips("val")
    present = {one.clip.sha256 for one in given}
    chosen = choose_holdout(holdout, Holdout(len(held), frozenset(held)), present, committed.clips("train"))
    return ["val" if one.clip.sha256 in chosen.clips else "train" for one in given]


def nothing_yet() -> Committed:
    return Committed({"train": {}, "val": {}}, {})


def layout(plan) -> dict:
    return {(shard.split, shard.number): [sample.key for sample in shard.samples] for shard in plan.shards}


def committed_of(shards: dict) -> Committed:
    samples = {"train": {}, "val": {}}
    for (split, number), keys in shards.items():
        samples[split] |= {key: Placed(number, "", bytes([int(key[1:])]) * 32) for key in keys}
    rows = {
        split: {number: len(keys) for (there, number), keys in shards.items() if there == split} for split in samples
    }
    return Committed(samples, {}, rows=rows)


def test_buckets_do_not_mix_and_numbers_follow_their_order():
    assert layout(plan_of(7, nothing_yet())) == {
        ("train", 0): ["k0", "k2", "k3"],
        ("train", 1): ["k5", "k6"],
        ("train", 2): ["k1", "k4"],
    }


@pytest.mark.parametrize("seed", range(20))
def test_whatever_subset_is_committed_the_rest_is_planned_as_before(seed):
    draw = random.Random(seed)
    count, chunk, holdout = draw.randrange(1, 40), draw.randrange(1, 5), draw.randrange(0, 4)
    whole = layout(plan_of(count, nothing_yet(), chunk=chunk, holdout=holdout))
    done = {shard: keys for shard, keys in whole.items() if draw.random() < 0.5}
    rest = plan_of(count, committed_of(done), chunk=chunk, holdout=holdout)
    assert done | layout(rest) == whole
    assert rest.reused == sum(map(len, done.values())) and not rest.drops


def test_an_emptied_number_is_free_again_and_its_shard_is_dropped_first():
    committed = committed_of({("train", 0): ["k90", "k91"], ("train", 1): ["k0"]})
    plan = plan_of(3, committed)
    assert [(drop.number, drop.keep, drop.dropped) for drop in plan.drops] == [(0, frozenset(), 2)]
    assert layout(plan) == {("train", 0): ["k2"], ("train", 2): ["k1"]}


def test_key_depends_on_each_of_its_parts():
    parts = [("f", "g"), (b"a", b"b"), ("caption", "other"), (b"", b"i")]
    keys = {sample_key(*choice) for choice in itertools.product(*parts)}
    assert len(keys) == 16 and all(key.isalnum() for key in keys)


def test_holdout_is_by_content_and_what_is_held_out_stays():
    given = candidates(6)
    assert splits_of(given, 2, nothing_yet()) == ["val", "val", "train", "train", "train", "train"]
    held = committed_of({("val", 0): ["k4"]})
    assert splits_of(given, 2, held) == ["val", "train", "train", "train", "val", "train"]
    assert splits_of(given, 99, nothing_yet()) == ["val"] * 6
