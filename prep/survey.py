"""Surveys a data set: every clip's content hash and bucket, and which clips cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogcommon.contract import Contract
from cogcommon.families import Resolution

from .clip import BadClip, Fault, Hashed
from .cut import Cut
from .lists import DataSet, Sample
from .look import Probed, probe
from .output import Committed, Split
from .plan import Candidate, Rejected, choose_splits, with_keys
from .pool import Pool
from .source_file import hash_file, refuse_special
from .survey_cache import SurveyCache


@dataclass(frozen=True)
class Survey:
    """Every sample of a data set: a candidate with its key and split, or rejected."""

    candidates: Sequence[Candidate]
    keys: Sequence[str]
    splits: Sequence[Split]
    buckets: dict[str, Resolution]  # by key, of the candidates that are not committed
    rejected: Sequence[Rejected]


def survey(
    data: DataSet,
    committed: Committed,
    contract: Contract,
    *,
    buckets: Sequence[Resolution],
    cut: Cut,
    holdout: int,
    pool: Pool,
    advance: Callable[[], None],
    cache: SurveyCache,
) -> Survey:
    """Identify every sample by content, opening only clips that have not been seen before.

    A file whose size and time have not changed keeps its hash; others are probed in the pool.

    Args:
        committed: remembers hashes, and says what needs no bucket.
        advance: called for each distinct file, opened or not.
        cache: what this worker and others have already probed.
    """
    root = data.root
    sources = dict.fromkeys(sample.source for sample in data.samples)
    known: dict[str, Hashed] = {}
    for source in sources:
        if (before := committed.hashes.get(source)) and _unchanged(root / source, before):
            known[source] = before
            advance()
    look = partial(probe, buckets=buckets, cut=cut, family_fps=contract.family_row.fps)
    probed = cache.find(sources.keys() - known.keys(), sources, look, pool, advance)
    images = _hash_images(data.samples, root, pool)
    candidates, rejected = _candidates(data.samples, known, probed, images)
    keys, splits = with_keys(candidates, contract), choose_splits(candidates, holdout, committed)
    if len(buckets) > 1:
        # An edited caption: the clip's hash is known, but its bucket is not.
        unseen = {
            candidate.sample.source
            for candidate, key, split in zip(candidates, keys, splits, strict=True)
            if key not in committed.samples[split] and candidate.sample.source not in probed
        }
        probed |= cache.find(unseen, sources, look, pool, advance)
        candidates, rejected = _candidates(data.samples, known, probed, images)
        keys, splits = with_keys(candidates, contract), choose_splits(candidates, holdout, committed)

    chosen: dict[str, Resolution] = {}
    for candidate, key, split in zip(candidates, keys, splits, strict=True):
        if key in committed.samples[split]:
            continue
        if len(buckets) == 1:
            chosen[key] = buckets[0]
        else:
            found = probed[candidate.sample.source]
            assert isinstance(found, Probed)
            chosen[key] = found.bucket
    return Survey(candidates, keys, splits, chosen, rejected)


def _hash_images(samples: Sequence[Sample], root: Path, pool: Pool) -> dict[str, bytes | Fault]:
    distinct = list(dict.fromkeys(sample.image for sample in samples if sample.image))
    return dict(zip(distinct, pool.run(_image_hash, ((root / image,) for image in distinct)), strict=True))


def _image_hash(path: Path) -> bytes | Fault:
    try:
        refuse_special(path)
        return hash_file(path)
    except BadClip as bad:
        return Fault(f"image: {bad}")
    except OSError as error:
        return Fault(f"image: cannot be read: {error.strerror}")


def _candidates(
    samples: Sequence[Sample],
    known: dict[str, Hashed],
    probed: dict[str, Probed | Fault],
    images: dict[str, bytes | Fault],
) -> tuple[list[Candidate], list[Rejected]]:
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for sample in samples:
        found = probed.get(sample.source) or known[sample.source]
        image = images[sample.image] if sample.image else b""
        if isinstance(found, Fault):
            rejected.append(Rejected(sample, found.reason))
        elif isinstance(image, Fault):
            rejected.append(Rejected(sample, image.reason))
        else:
            candidates.append(Candidate(sample, found.clip if isinstance(found, Probed) else found, image))
    return candidates, rejected


def _unchanged(path: Path, before: Hashed) -> bool:
    try:
        now = path.stat()
    except (OSError, ValueError):
        return False
    return (now.st_size, now.st_mtime_ns) == (before.size, before.mtime_ns)
