"""What `encode` would do to the output folder as it is, from what `validate` has looked at.

It asks the same functions as `encode`, so that it cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cogcommon.errors import CogError
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import DTYPES
from cogcommon.shards.contract import Contract

from ..dataset.lists import DataSet
from ..dataset.probe import Look, Probed
from ..encode.part import make_contract
from ..plan.folder import check_contract, read_contract, scan
from ..plan.holdout import Holdout, choose_holdout, describe_moves
from ..plan.origin import Origin, guard_other_data, remembered_holdout
from ..plan.plan import Rejected, make_plan, sample_bytes
from ..plan.survey import sort_samples
from ..settings.encode import PlanSettings, ValidateSettings
from ..source.clip import ClipFault, Hashed
from ..store.outlet import open_image


@dataclass(frozen=True)
class EncodeForecast:
    """Samples by what becomes of them, and what `encode` would say."""

    holdout: frozenset[bytes]  # clips set aside
    new: int
    reused: int = 0
    kept: int = 0
    dropped: int = 0
    rejected_before: Sequence[Rejected] = ()  # when they were decoded, with the same content and settings
    refusal: CogError | None = None  # why it would not begin
    question: str = ""  # what it would ask first


def foretell(
    settings: ValidateSettings,
    checkpoint: Checkpoint,
    data: DataSet,
    looks: Mapping[str, Look | ClipFault],
    images: Mapping[str, bytes | ClipFault],
    usable: Sequence[bytes],
) -> EncodeForecast:
    """See the module. Reads the folder's records and no weights: they are taken to be the same.

    Args:
        looks: what was seen of each clip, by the name in the lists.
        images: the content hash of each picture, likewise.
        usable: the content hash of the clip of every sample that can be used.

    Raises:
        SettingError: every clip would be held out.
    """
    clips: dict[str, Hashed | Probed | ClipFault] = {
        source: found if isinstance(found, ClipFault) else Probed(_hashed(found), found.bucket)
        for source, found in looks.items()
    }
    with open_image(settings.out, "--out") as image:
        forecast = _foretell(replace(settings, out=image.folder), checkpoint, data, looks, clips, images, usable)
        if forecast.refusal:
            image.retell(forecast.refusal)
        return replace(forecast, question=image.told(forecast.question))


def _foretell(
    settings: ValidateSettings,
    checkpoint: Checkpoint,
    data: DataSet,
    looks: Mapping[str, Look | ClipFault],
    clips: Mapping[str, Hashed | Probed | ClipFault],
    images: Mapping[str, bytes | ClipFault],
    usable: Sequence[bytes],
) -> EncodeForecast:
    """As `foretell`, of a folder of this machine."""
    first = choose_holdout(settings.holdout, Holdout(), set(usable), ())
    try:
        theirs = read_contract(settings.out)
        if theirs is None:
            settings.check_holdout(held=len(first.clips), of=len(set(usable)))
            return EncodeForecast(first.clips, len(usable))
        contract = check_settings(settings, checkpoint, theirs)
        committed = scan(settings.out)
    except CogError as error:
        return EncodeForecast(first.clips, 0, refusal=error)
    before = remembered_holdout(settings.out, committed)
    found = sort_samples(data.samples, clips, images, committed, contract, settings.holdout, before)
    settings.check_holdout(held=len(found.holdout.clips & found.clips), of=len(found.clips))
    buckets = {
        key: look.bucket
        for key, candidate in zip(found.keys, found.candidates, strict=True)
        if isinstance(look := looks[candidate.sample.source], Look)
    }
    plan = make_plan(
        found.candidates,
        found.keys,
        found.splits,
        buckets,
        committed,
        bucket_order=settings.buckets,
        chunk={bucket: settings.samples_a_shard(sample_bytes(contract, bucket)) for bucket in settings.buckets},
        kept=[one.key for one in found.kept],
    )
    dropped = plan.dropped if found.candidates else 0
    refusal = None
    try:
        guard_other_data(settings.out, Origin.of(settings, found.holdout), plan.lost if found.candidates else 0)
    except CogError as error:
        refusal = error
    moves = describe_moves(
        before, found.holdout, str(settings.out),
        held=found.clips & committed.clips("val"), trained=found.clips & committed.clips("train"),
    )  # fmt: skip
    kept = sum(one.status == "ok" for one in found.kept)
    return EncodeForecast(found.holdout.clips, plan.new, plan.reused, kept, dropped, plan.rejected, refusal, moves)


def check_settings(settings: PlanSettings, checkpoint: Checkpoint, theirs: Contract) -> Contract:
    """What shards of these settings promise, as far as it can be told without reading weights.

    Args:
        theirs: the contract of the output folder. Weights, and a precision that is not given, are taken to be its own.

    Raises:
        SettingError: the folder was encoded with other settings.
    """
    dtype = DTYPES[settings.precision] if settings.precision else theirs.dtype
    contract = make_contract(settings, checkpoint, dtype, weights=theirs)
    check_contract(settings.out, contract)
    return contract


def _hashed(look: Look) -> Hashed:
    return Hashed(look.facts.size, look.facts.mtime_ns, look.facts.sha256)
