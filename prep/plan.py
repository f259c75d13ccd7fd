"""The plan: which sample goes to which shard, what is reused, what is dropped.

A pure function of the lists, the content of the clips, the settings and the
committed shards. What exists keeps its shard; what is new is grouped by bucket
in list order, cut into chunks, and given the lowest free numbers. Committed
shards are whole chunks, so after a kill, or under another division among
workers, the rest is cut at the same places and gets the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogcommon.contract import Contract
from cogcommon.families import Family, Resolution
from cogcommon.records import SampleRow

from .clip import Hashed
from .lists import Sample
from .output import SPLITS, Committed, Split


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


@dataclass(frozen=True)
class Drop:
    """A committed shard that has lost samples; ``keep`` may be empty."""

    split: Split
    number: int
    keep: frozenset[str]
    dropped: int

    def keeps(self, row: SampleRow) -> bool:
        return row.key in self.keep


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sample that gets no tensors, and why."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Plan:
    shards: Sequence[PlannedShard]
    drops: Sequence[Drop]
    reused: int
    rejected: Sequence[Rejected]  # by an earlier run, with the same content and settings

    @property
    def new(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def dropped(self) -> int:
        return sum(drop.dropped for drop in self.drops)


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


def choose_splits(candidates: Sequence[Candidate], holdout: int, committed: Committed) -> list[Split]:
    """Which split each candidate belongs to.

    ``holdout`` clips with the smallest content hash go to validation, with all their captions, so
    that no clip is in both. Those that are there already stay, so that a new clip never moves one.
    """
    present = {candidate.clip.sha256 for candidate in candidates}
    stay = sorted({placed.source_sha256 for placed in committed.samples["val"].values()} & present)[:holdout]
    fill = sorted(present - set(stay))[: holdout - len(stay)]
    chosen = {*stay, *fill}
    return ["val" if candidate.clip.sha256 in chosen else "train" for candidate in candidates]


def make_plan(
    candidates: Sequence[Candidate],
    keys: Sequence[str],
    splits: Sequence[Split],
    buckets: Mapping[str, Resolution],
    committed: Committed,
    *,
    bucket_order: Sequence[Resolution],
    chunk: Mapping[Resolution, int],
) -> Plan:
    """See the module.

    Args:
        candidates: in list order.
        keys: of each candidate.
        splits: of each candidate.
        buckets: by key, of every candidate that is not committed in its split.
        committed: what the folder holds.
        bucket_order: in which buckets get their numbers.
        chunk: samples a shard, by bucket.
    """
    shards: list[PlannedShard] = []
    drops: list[Drop] = []
    rejected: list[Rejected] = []
    reused = 0
    for split in SPLITS:
        placed = committed.samples[split]
        kept: dict[int, set[str]] = defaultdict(set)
        new: dict[Resolution, list[PlannedSample]] = defaultdict(list)
        for candidate, key, chosen in zip(candidates, keys, splits, strict=True):
            if chosen != split:
                continue
            if there := placed.get(key):
                kept[there.number].add(key)
                if there.reason:
                    rejected.append(Rejected(candidate.sample, there.reason))
                else:
                    reused += 1
            else:
                bucket = buckets[key]
                new[bucket].append(PlannedSample(key, candidate.sample, candidate.clip, candidate.image_sha256, bucket))
        sizes = Counter(there.number for there in placed.values())
        drops += [
            Drop(split, number, frozenset(kept[number]), size - len(kept[number]))
            for number, size in sorted(sizes.items())
            if len(kept[number]) < size
        ]
        free = (number for number in itertools.count() if not kept.get(number))
        for bucket in bucket_order:
            waiting = new[bucket]
            for start in range(0, len(waiting), chunk[bucket]):
                shards.append(PlannedShard(split, next(free), bucket, waiting[start : start + chunk[bucket]]))
    return Plan(shards, drops, reused, rejected)


def sample_bytes(
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
    frame = family.latent_channels * bucket.latent_height * bucket.latent_width
    images = image_variants + 1 if family.task == "i2v" else 0
    return item_bytes * (parts * frame * (bucket.latent_frames + images) + family.text_tokens * text_dim)
