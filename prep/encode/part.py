"""One process's part of `cogprep encode`, in the order things happen::

    lists -> contract -> survey (probe, hash) -> plan -> questions, refusals
          -> engine: T5 over captions, then decode -> VAE -> shards
             (before the first shard, when all models are there: drop what is gone)
          -> report

Until then nothing that the folder holds is changed, so a run that is refused or that
cannot load its models leaves everything as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from cogcommon import __version__
from cogcommon.cli.progress import say, stage
from cogcommon.errors import CogError
from cogcommon.files.readers import Readers
from cogcommon.model.checkpoint import Checkpoint, WeightedPart, WeightsIdentity
from cogcommon.model.device import DTYPES, Dtype, default_precision
from cogcommon.model.published import scaled_otherwise
from cogcommon.shards.contract import EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import SampleRow
from cogcommon.words import counted

from ..dataset.advice import in_quotes
from ..dataset.lists import DataSet
from ..plan.folder import SPLITS, Committed, check_contract, scan, split_folder
from ..plan.holdout import Holdout, ask_to_move
from ..plan.origin import Origin, guard_other_data, read_origin, remembered_holdout
from ..plan.plan import Drop, EncodePlan, make_plan, sample_bytes
from ..plan.probe_cache import SurveyCache
from ..plan.slice import Slice, choose_slice
from ..plan.survey import Survey, survey
from ..processes.pool import Pool, default_workers
from ..settings.encode import EncodeSettings, PlanSettings
from ..source.clip_cache import default_cache
from ..store.locks import ShardBusy, at_work, lack_of_room, shard_disk_errors
from ..store.outlet import Outlet, open_outlet
from ..store.proof import ORIGIN_FILE
from ..store.rewrite import drop_samples, recover_folder
from .clock import Clock
from .engine import Engine, Job, LocalEngine, scratch_bytes
from .outcome import Outcome
from .pipeline import AT_ONCE
from .report import Report, make_report


def encode_slice(settings: EncodeSettings, engine: Engine | None = None) -> Report:
    """Encode this process's slice of the planned shards.

    Args:
        engine: where; on one device of this machine, if there is none.

    Raises:
        DataRootError: the lists cannot be trusted.
        SettingError: the folder was encoded with other settings; a size that the model cannot take.
        ModelError: the model cannot be had.
        ShardError: a committed shard is damaged.
        DiskError: the disk is full.
    """
    part = choose_slice(settings.worker, os.environ)
    settings.keep_clips()
    lists = settings.prompts, settings.videos
    with open_outlet(settings.out, cache=settings.cache or default_cache(), slice_=str(part), lists=lists) as outlet:
        return _encode_slice(replace(settings, out=outlet.folder), part, outlet, engine or LocalEngine())


def _encode_slice(settings: EncodeSettings, part: Slice, outlet: Outlet, engine: Engine) -> Report:
    """As `encode_slice`, in a folder of this machine."""
    clock = Clock()
    checkpoint = settings.open_model()
    planned = Origin.of(settings, Holdout()).state_of_lists()
    data = settings.read_lists(checkpoint.family.task).trusted()
    if data.images_unused:
        say(f"{settings.images or 'images.txt'} is not used: {checkpoint.name} is a text-to-video model")
    for note in scaled_otherwise(checkpoint):
        say(f"note: {note}")
    if quoted := sum(in_quotes(sample.caption) for sample in data.samples):
        say(f"note: {counted(quoted, 'caption')} in quotes, which are trained as a part of them")
    device_type = engine.device_type()
    precision = settings.precision or default_precision(checkpoint.family, device_type)
    with clock("weights"):
        contract = make_contract(settings, checkpoint, DTYPES[precision], check_and_hash(checkpoint))

    out = settings.out
    outcome = Outcome()
    with at_work(out), Pool(settings.workers or default_workers(), timeout_s=settings.clip_timeout) as pool:
        established = check_contract(out, contract)
        with shard_disk_errors(out):
            for split in SPLITS:
                recover_folder(split_folder(out, split))
        with clock("probe"):
            cache = survey_cache(settings, checkpoint, part)
            committed = scan(out, retry_rejected=settings.retry_rejected)
            found, plan = survey_and_plan(settings, data, contract, committed, pool, cache)
        origin = Origin.of(settings, found.holdout)
        try:
            if not settings.replace:
                guard_other_data(out, origin, plan.lost)
            ask_to_move(
                remembered_holdout(out, committed), found.holdout, outlet.place, settings.yes,
                held=found.clips & committed.clips("val"), trained=found.clips & committed.clips("train"),
            )  # fmt: skip
        except CogError:
            cache.discard()
            raise
        shards = part.of(plan.shards)
        sizes = [len(shard.samples) * sample_bytes(contract, shard.bucket) for shard in shards]
        needed = sum(sizes if outlet.keeps else sorted(sizes)[-AT_ONCE:])
        if lack := lack_of_room(out, needed + scratch_bytes(shards, contract)):
            say(f"note: {lack}")
        dropped = 0

        def begin() -> None:
            nonlocal dropped
            dropped = _begin(outlet, origin, part.of(plan.drops), outcome, clock, planned)

        if shards or (established and not (out / EMPTY_CAPTION_FILE).exists()):
            engine.encode(Job(settings, checkpoint, precision, contract, shards, pool, begin, clock, outcome, outlet))
        else:
            begin()
    report = make_report(settings, checkpoint, part, found, plan, outcome, dropped, clock.seconds(), device_type)
    report = replace(report, out=outlet.place)
    if not report.unfinished:
        cache.discard()
    return report


def survey_cache(settings: PlanSettings, checkpoint: Checkpoint, part: Slice) -> SurveyCache:
    """What earlier runs of the same settings have found out about the clips."""
    depend_on = f"{settings.buckets} {settings.cut} {checkpoint.family.fps}"
    return SurveyCache(settings.out, settings.root, depend_on, part)


def survey_and_plan(
    settings: PlanSettings, data: DataSet, contract: Contract, committed: Committed, pool: Pool, cache: SurveyCache
) -> tuple[Survey, EncodePlan]:
    """Identify every sample of the data root and place it.

    Args:
        data: the lists, which can be trusted.

    Raises:
        SettingError: every clip would be held out.
        ShardError: a record is damaged.
    """
    with stage("checking", len({sample.source for sample in data.samples}), "clip") as bar:
        found = survey(
            data,
            committed,
            contract,
            buckets=settings.buckets,
            cut=settings.cut,
            holdout=settings.holdout,
            before=remembered_holdout(settings.out, committed),
            pool=pool,
            advance=bar.advance,
            cache=cache,
        )
    settings.check_holdout(held=len(found.holdout.clips & found.clips), of=len(found.clips))
    chunk = {bucket: settings.samples_a_shard(sample_bytes(contract, bucket)) for bucket in settings.buckets}
    plan = make_plan(
        found.candidates,
        found.keys,
        found.splits,
        found.buckets,
        committed,
        bucket_order=settings.buckets,
        chunk=chunk,
        kept=[one.key for one in found.kept],
    )
    # No clip at all can be read: rather a disk that is not there than an order to drop everything.
    return found, plan if found.candidates else replace(plan, drops=[])


@dataclass(frozen=True)
class Weights:
    """Which ones an encode uses."""

    vae: WeightsIdentity
    text_encoder: WeightsIdentity


@stage("checking the weights")
def check_and_hash(checkpoint: Checkpoint) -> Weights:
    """Check the weights of an encode, before hours of reading clips and not after, and hash them: in threads, beside
    the imports of the check.

    Raises:
        ModelError: some are not those that their model has.
    """
    parts: tuple[WeightedPart, ...] = ("vae", "text_encoder")
    for part in parts:
        checkpoint.folder(part)  # fetched one after the other, if the checkpoint lives on the hub
    with closing(Readers(len(parts), "hashing")) as threads:  # which do not hold a refusal back
        vae, text_encoder = (threads.submit(checkpoint.identity, part) for part in parts)
        checkpoint.check_weights("text_encoder", "vae")
        return Weights(vae.result(), text_encoder.result())


def make_contract(
    settings: PlanSettings, checkpoint: Checkpoint, dtype: Dtype, weights: Weights | Contract
) -> Contract:
    """What shards of these settings and weights promise.

    Args:
        weights: those of the checkpoint; or a contract of which it is taken that it has the same.
    """
    family = checkpoint.family
    cut: dict[str, object] = {
        "resolution": sorted(map(str, settings.buckets)),
        "id_token": settings.id_token,
        "frames": settings.frames,
        "start": settings.start,
        "stride": settings.stride,
        "short": settings.short,
        "fit": settings.fit,
        "crop": settings.crop,
    }
    if settings.crop == "random" or settings.posterior == "sample" or family.task == "i2v":
        cut["seed"] = settings.seed
    return Contract(
        family=family.name,
        task=family.task,
        model=checkpoint.name,
        revision=checkpoint.revision,
        vae=weights.vae,
        text_encoder=weights.text_encoder,
        scaling_factor=checkpoint.vae_config["scaling_factor"],
        posterior=settings.posterior,
        image_variants=settings.image_variants if family.task == "i2v" else 0,
        tiling=settings.tiling,
        dtype=dtype,
        text_tokens=family.text_tokens,
        text_dim=checkpoint.text_config["d_model"],
        settings=cut,
        tool_version=__version__,
    )


def _begin(
    outlet: Outlet,
    origin: Origin,
    drops: Sequence[Drop],
    outcome: Outcome,
    clock: Clock,
    planned: tuple[str, ...],
) -> int:
    """The first change to what the folder holds: whose its samples are, and what goes.

    Args:
        planned: the state of the lists that the plan was made of. If it is another by now, nothing goes: another run
            may count on it.

    Returns:
        The samples dropped.
    """
    with clock("drop"), shard_disk_errors(outlet.folder):
        if origin != read_origin(outlet.folder):
            origin.write(outlet.folder)
            outlet.put(ORIGIN_FILE)
        return _drop_gone(outlet, drops, outcome, lambda: origin.state_of_lists() == planned)


def _drop_gone(outlet: Outlet, drops: Sequence[Drop], outcome: Outcome, unchanged: Callable[[], bool]) -> int:
    """Rewrite the shards that have lost samples; returns how many samples were dropped."""
    dropped: list[str] = []
    for drop in drops:
        try:
            keep = partial(_keeps, drop, unchanged, dropped)
            folder = split_folder(outlet.folder, drop.split)
            outlet.prepare(folder, drop.number, rewrite=True)
            drop_samples(folder, drop.number, keep)
            outlet.publish(folder, drop.number)
        except ShardBusy:
            outcome.busy.append((drop.split, drop.number))
    return len(dropped)


def _keeps(drop: Drop, unchanged: Callable[[], bool], dropped: list[str], row: SampleRow) -> bool:
    """Whether a sample stays, by the plan or by what has changed since; notes the key of one with tensors that goes."""
    stays = drop.keeps(row) or not unchanged()
    if not stays and row.status == "ok":
        dropped.append(row.key)
    return stays
