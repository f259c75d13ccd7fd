"""Surveys a data set: every clip's content hash and bucket, and which clips cannot be used.

A clip whose decoder was killed or hung is not judged: if its bytes can be read it gets its place in
the plan, where the decoder tries it again. Of several buckets only a look tells which, so there it is
looked at once more, alone; if that fails, too, the clip has no place, and another run gives it the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cogcommon.files.readers import read_in_order
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import Contract

from ..dataset.lists import DataSet, Sample
from ..dataset.probe import Probed, probe_clips
from ..processes.pool import Pool
from ..source.clip import BadClip, ClipFault, Hashed
from ..source.source_file import hash_file, hash_whole, unchanged
from ..video.cut import Cut
from .folder import Committed, Split
from .holdout import Holdout, choose_holdout
from .kept import Kept, find_kept
from .plan import Candidate, Rejected, with_keys
from .probe_cache import SurveyCache

_TOGETHER = 64  # files that a thread asks after at a time
_ALONE = 8  # clips; each may hang for twice the time-out


@dataclass(frozen=True)
class Survey:
    """Every sample of a data set: a candidate with its key and split, kept, or rejected."""

    candidates: Sequence[Candidate]
    keys: Sequence[str]
    splits: Sequence[Split]
    holdout: Holdout
    buckets: dict[str, Resolution]  # by key, of the candidates that are not committed
    kept: Sequence[Kept]  # committed, and their clip cannot be read now
    rejected: Sequence[Rejected]  # all others that cannot be used

    @property
    def clips(self) -> set[bytes]:
        """Content hashes of all clips that are, or stay, in the shards."""
        return {one.clip.sha256 for one in self.candidates} | {one.clip_sha256 for one in self.kept}

    @property
    def current(self) -> set[str]:
        """Keys of every sample that has a line."""
        return {*self.keys, *(one.key for one in self.kept)}


def survey(
    data: DataSet,
    committed: Committed,
    contract: Contract,
    *,
    buckets: Sequence[Resolution],
    cut: Cut,
    holdout: int | None,
    before: Holdout,
    pool: Pool,
    advance: Callable[[], None],
    cache: SurveyCache,
) -> Survey:
    """Identify every sample by content, opening only clips that have not been seen before.

    A file whose size and time have not changed keeps its hash; others are probed in the pool.

    Args:
        committed: remembers hashes, and says what needs no bucket.
        holdout: clips to set aside; None for as many as before.
        before: the clips set aside so far.
        advance: called for each distinct file, opened or not.
        cache: what this worker and others have already probed.
    """
    root = data.root
    sources = dict.fromkeys(sample.source for sample in data.samples)
    # An HDR clip that is to be refused is looked at once more, which does it.
    refused = committed.tone_mapped if cut.hdr == "reject" else frozenset()
    known: dict[str, Hashed] = {}
    for source in _unchanged(root, committed.hashes, [source for source in sources if source not in refused]):
        known[source] = committed.hashes[source]
        advance()
    probe = partial(probe_clips, buckets=buckets, cut=cut, family_fps=contract.family_row.fps)

    def find(wanted: Set[str]) -> dict[str, Probed | ClipFault]:
        found = cache.find(wanted, sources, probe, pool, advance)
        if len(buckets) == 1:
            return found | _hash_unjudged(found, root, buckets[0], pool)
        return found | _probe_alone(found, root, probe, pool)

    probed = find(sources.keys() - known.keys())
    images = hash_images(data.samples, root, pool)

    def sort() -> Survey:
        return sort_samples(data.samples, {**known, **probed}, images, committed, contract, holdout, before)

    found = sort()
    if len(buckets) > 1:
        # An edited caption: the clip's hash is known, but its bucket is not.
        unseen = {
            candidate.sample.source
            for candidate, key, split in zip(found.candidates, found.keys, found.splits, strict=True)
            if key not in committed.samples[split] and candidate.sample.source not in probed
        }
        if unseen:
            probed |= find(unseen)
            found = sort()
    chosen: dict[str, Resolution] = {}
    for candidate, key, split in zip(found.candidates, found.keys, found.splits, strict=True):
        if key in committed.samples[split]:
            continue
        if len(buckets) == 1:
            chosen[key] = buckets[0]
        else:
            seen = probed[candidate.sample.source]
            assert isinstance(seen, Probed)
            chosen[key] = seen.bucket
    return replace(found, buckets=chosen)


def _unchanged(root: Path, hashes: Mapping[str, Hashed], sources: Sequence[str]) -> Iterator[str]:
    """The clips that are as they were when they were hashed, in their order; on a network disk each is a wait."""
    before = [source for source in sources if source in hashes]

    def still(start: int) -> list[str]:
        some = before[start : start + _TOGETHER]
        return [source for source in some if unchanged(root / source, hashes[source])]

    for some in read_in_order(still, range(0, len(before), _TOGETHER)):
        yield from some


def sort_samples(
    samples: Sequence[Sample],
    clips: Mapping[str, Hashed | Probed | ClipFault],
    images: Mapping[str, bytes | ClipFault],
    committed: Committed,
    contract: Contract,
    holdout: int | None,
    before: Holdout,
) -> Survey:
    """Which sample can be used, which is kept, which split each belongs to; buckets are left out.

    Args:
        clips: what was found out about each, by the name in the lists.
        images: the content hash of each, likewise.
        committed, contract, holdout, before: as in `survey`.
    """
    candidates: list[Candidate] = []
    unusable: list[Rejected] = []
    for sample in samples:
        found = clips[sample.source]
        image = images[sample.image] if sample.image else b""
        if isinstance(found, ClipFault):
            unusable.append(Rejected(sample, found.reason, found.passing, found.refused))
        elif isinstance(image, ClipFault):
            unusable.append(Rejected(sample, image.reason, image.passing))
        else:
            candidates.append(Candidate(sample, found.clip if isinstance(found, Probed) else found, image))
    keys = with_keys(candidates, contract)
    unread = [line for line in unusable if not line.refused]
    kept = find_kept(committed, unread, set(keys), {sample.source for sample in samples})
    present = {one.clip.sha256 for one in candidates} | ({one.clip_sha256 for one in kept} - {b""})
    set_aside = choose_holdout(holdout, before, present, committed.clips("train"))
    splits: list[Split] = ["val" if one.clip.sha256 in set_aside.clips else "train" for one in candidates]
    stay = {one.line for one in kept if one.status == "ok"}
    rejected = [line for line in unusable if line not in stay]
    return Survey(candidates, keys, splits, set_aside, {}, kept, rejected)


def _hash_unjudged(
    probed: Mapping[str, Probed | ClipFault], root: Path, bucket: Resolution, pool: Pool
) -> dict[str, Probed | ClipFault]:
    """Clips whose decoder did not come to an end, identified by their bytes alone."""
    unjudged = _unjudged(probed)
    hashes = pool.run(hash_whole, ((root / source,) for source in unjudged))
    return {
        source: Probed(found, bucket)
        for source, found in zip(unjudged, hashes, strict=True)
        if not isinstance(found, ClipFault)
    }


def _probe_alone(
    probed: Mapping[str, Probed | ClipFault],
    root: Path,
    probe: Callable[[Sequence[Path]], list[Probed | ClipFault]],
    pool: Pool,
) -> dict[str, Probed | ClipFault]:
    """Clips whose decoder did not come to an end, one at a time: beside others it may have lacked memory."""
    unjudged = _unjudged(probed)[:_ALONE]
    again = pool.run(probe, (([root / source],) for source in unjudged), window=1)
    return {
        source: found if isinstance(found, ClipFault) else found[0]
        for source, found in zip(unjudged, again, strict=True)
    }


def _unjudged(probed: Mapping[str, Probed | ClipFault]) -> list[str]:
    return [source for source, found in probed.items() if isinstance(found, ClipFault) and found.passing]


def hash_images(samples: Sequence[Sample], root: Path, pool: Pool) -> dict[str, bytes | ClipFault]:
    """The content hash of every image, by the name in the lists."""
    distinct = list(dict.fromkeys(sample.image for sample in samples if sample.image))
    return dict(zip(distinct, pool.run(hash_image, ((root / image,) for image in distinct)), strict=True))


def hash_image(path: Path) -> bytes | ClipFault:
    """The content hash of a picture, whatever is in it."""
    try:
        return hash_file(path)
    except BadClip as bad:
        return bad.named("image").fault()
    except OSError as error:
        return ClipFault(f"image: cannot be read: {error.strerror}", kind="unreached")
