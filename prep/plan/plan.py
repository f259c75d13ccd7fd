"""The plan: which sample goes to which shard, what is reused, what is dropped.

A pure function of the lists, the content of the clips, the settings and the
committed shards. What exists keeps its shard; what a shard still waits for gets
its place in it; what is new is grouped by bucket
in list order, cut into chunks, and given the lowest free numbers. Committed
shards are whole chunks, so after a kill, or under another division among
workers, the rest is cut at the same places and gets the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cogcommon.model.device import item_bytes
from cogcommon.model.families import Family, Resolution
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow

from ..dataset.lists import Sample
from ..source.clip import Hashed
from .folder import SPLITS, Committed, Split


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample whose clip could be read: its content is known."""

    sample: Sample
    clip: Hashed
    image_sha256: bytes  # empty without an image


@dataclass(frozen=True, slots=True)
class PlannedSample:
    key: str
    sample: Sample
    clip: Hashed
    image_sha256: bytes
    bucket: Resolution


@dataclass(frozen=True)
class PlannedShard:
    split: Split
    number: int
    bucket: Resolution
    samples: Sequence[PlannedSample]
    completes: bool = False  # it is committed, and lacks these samples


@dataclass(frozen=True)
class Drop:
    """A committed shard that has lost samples; ``keep`` may be empty. ``dropped`` counts those with tensors."""

    split: Split
    number: int
    keep: frozenset[str]
    dropped: int

    def keeps(self, row: SampleRow) -> bool:
        return row.key in self.keep


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sample that gets no tensors, and why; a passing reason is no verdict, and the next run tries again."""

    sample: Sample
    reason: str
    passing: bool = False
    refused: bool = False  # by a setting: what was encoded of it goes


@dataclass(frozen=True)
class EncodePlan:
    shards: Sequence[PlannedShard]
    drops: Sequence[Drop]
    reused: int
    rejected: Sequence[Rejected]  # by an earlier run, with the same content and settings
    moved: int = 0  # of those that are dropped, in the data as before, but now on the other side of `--holdout`

    @property
    def new(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def dropped(self) -> int:
        return sum(drop.dropped for drop in self.drops)

    @property
    def lost(self) -> int:
        """Samples that are dropped because they are not in the data."""
        return self.dropped - self.moved


def sample_key(fingerprint: str, clip_sha256: bytes, caption: str, image_sha256: bytes) -> str:
    """A sample's name: a hash of everything that decides its tensors, 32 hex digits."""
    content = json.dumps([fingerprint, clip_sha256.hex(), caption, image_sha256.hex()])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def with_keys(candidates: Sequence[Candidate], contract: Contract) -> list[str]:
    """The key of each candidate; the k-th exact repeat of a sample gets the suffix ``_k``."""
    fingerprint = contract.fingerprint
    seen: Counter[str] = Counter()
    keys = []
    for candidate in candidates:
        key = sample_key(fingerprint, candidate.clip.sha256, candidate.sample.caption, candidate.image_sha256)
        keys.append(f"{key}_{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return keys


def make_plan(
    candidates: Sequence[Candidate],
    keys: Sequence[str],
    splits: Sequence[Split],
    buckets: Mapping[str, Resolution],
    committed: Committed,
    *,
    bucket_order: Sequence[Resolution],
    chunk: Mapping[Resolution, int],
    kept: Collection[str] = (),
) -> EncodePlan:
    """See the module.

    Args:
        candidates: in list order.
        keys: of each candidate.
        splits: of each candidate.
        buckets: by key, of every candidate that is not committed in its split.
        committed: what the folder holds.
        bucket_order: in which buckets get their numbers.
        chunk: samples a shard, by bucket.
        kept: keys of committed samples that stay although they are no candidates.
    """
    shards: list[PlannedShard] = []
    drops: list[Drop] = []
    rejected: list[Rejected] = []
    reused = moved = 0
    current = set(keys)
    for split in SPLITS:
        placed = committed.samples[split]
        waiting = committed.waiting[split]
        stay: dict[int, set[str]] = defaultdict(set)
        for key in kept:
            if key in placed:
                stay[placed[key].number].add(key)
        complete: dict[int, list[PlannedSample]] = defaultdict(list)
        new: dict[Resolution, list[PlannedSample]] = defaultdict(list)
        for candidate, key, chosen in zip(candidates, keys, splits, strict=True):
            if chosen != split:
                continue
            if there := placed.get(key):
                stay[there.number].add(key)
                if there.reason:
                    rejected.append(Rejected(candidate.sample, there.reason))
                else:
                    reused += 1
            else:
                bucket = buckets[key]
                planned = PlannedSample(key, candidate.sample, candidate.clip, candidate.image_sha256, bucket)
                if key in waiting:
                    complete[waiting[key].number].append(planned)
                else:
                    new[bucket].append(planned)
        for number, samples in sorted(complete.items()):
            samples.sort(key=lambda planned: waiting[planned.key].place)
            shards.append(PlannedShard(split, number, samples[0].bucket, samples, completes=True))
        again = {number: sum(waiting[one.key].rejected for one in samples) for number, samples in complete.items()}
        gone = [key for key, there in placed.items() if not there.reason and key not in stay[there.number]]
        lost = Counter(placed[key].number for key in gone)
        moved += sum(key in current for key in gone)
        drops += [
            Drop(split, number, frozenset(stay[number] | {planned.key for planned in complete[number]}), lost[number])
            for number, rows in sorted(committed.rows[split].items())
            if len(stay[number]) + again.get(number, 0) < rows
        ]
        free = (number for number in itertools.count() if not stay.get(number) and not complete.get(number))
        for bucket in bucket_order:
            todo = new[bucket]
            for start in range(0, len(todo), chunk[bucket]):
                shards.append(PlannedShard(split, next(free), bucket, todo[start : start + chunk[bucket]]))
    shards.sort(key=lambda shard: shard.split == "train")  # held out first: a run that follows validates from the start
    return EncodePlan(shards, drops, reused, rejected, moved)


def sample_bytes(contract: Contract, bucket: Resolution) -> int:
    """Size of the tensors of a contract's sample."""
    return tensor_bytes(
        contract.family_row,
        bucket,
        item_bytes=item_bytes(contract.dtype),
        posterior=contract.posterior,
        image_variants=contract.image_variants,
        text_dim=contract.text_dim,
    )


def tensor_bytes(
    family: Family, bucket: Resolution, *, item_bytes: int, posterior: str, image_variants: int, text_dim: int
) -> int:
    """Size of a sample's tensors.

    Args:
        item_bytes: of one number: 2 for bf16 and fp16, 4 for fp32.
        posterior: "moments" stores two numbers a latent, "sample" one.
        image_variants: pre-noised first frames, beside the clean one (I2V only).
        text_dim: width of T5's hidden state.
    """
    parts = 2 if posterior == "moments" else 1
    channels, frames, height, width = family.latent(bucket)
    images = image_variants + 1 if family.task == "i2v" else 0
    return item_bytes * (parts * channels * height * width * (frames + images) + family.text_tokens * text_dim)
