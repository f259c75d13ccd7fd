"""The sampler of a run: how its settings make batches of some shards, and what to say of them."""

from __future__ import annotations

from cogcommon.errors import ShardError
from cogcommon.words import counted

from ..data.repeats import of_clips, times_of
from ..data.sampler import Sampler
from ..data.shard_set import ShardSet
from ..settings.training import TrainSettings


def make_sampler(settings: TrainSettings, shards: ShardSet, groups: int) -> Sampler:
    """What divides samples into global batches.

    Args:
        groups: data-parallel ones, between which a global batch is divided.

    Raises:
        SettingError, ShardError: a word of --repeat names no sample.
    """
    size = groups * settings.batch_size * settings.accumulate
    draw = shards.caption_draw(settings.seed) if settings.captions == "one" else None
    times = times_of(settings.repeat, shards, growing=settings.follow)
    if draw and times is not None:
        times = of_clips(times, draw.clip_of)
    return Sampler(shards.shard_of, shards.bucket_of, size, settings.seed, draw, times)


def check_sampler(sampler: Sampler, settings: TrainSettings, shards: ShardSet, groups: int) -> list[str]:
    """Compare batches with samples.

    Args:
        settings: as they were given.

    Returns:
        Notes: what is never trained, or not in each epoch.

    Raises:
        ShardError: there are too few samples for a step.
    """
    notes: list[str] = []
    one, size, count = settings.captions == "one", sampler.global_batch, groups
    samples, noun = sampler.samples, "clip" if one else "sample"
    parts = f"{count} process{'es' * (count > 1)} x batch size {settings.batch_size}"
    parts += f" x accumulate {size // (count * settings.batch_size)}"
    asked = ("--global-batch",) if settings.global_batch else ("--batch-size", "--accumulate")
    if count > samples:
        raise ShardError(
            f"{count} processes and only {counted(samples, noun)} to train on",
            where="--nproc, --shards",
            fix=f"--nproc {samples} or fewer",
        )
    if sampler.steps_per_epoch == 0:
        raise ShardError(
            f"a step takes {size} {noun}s ({parts}), and no resolution has as many ({samples} in all)",
            where=f"{', '.join(asked)}, --shards",
            fix=f"a smaller {' or '.join(asked)}",
        )
    for index in sampler.too_small_buckets():
        notes.append(
            f"{int((shards.bucket_of == index).sum())} samples of {shards.buckets[index]} are never trained: "
            f"a step takes {size} {noun}s of one resolution"
        )
    if sampler.left_over:
        notes.append(f"each epoch leaves out {sampler.left_over} of {counted(samples, noun)}, different ones each time")
    if one and shards.of_no_clip:
        rebuilt = f"{counted(shards.of_no_clip, 'sample')} in records that `cogprep index` rebuilt"
        notes.append(f"--captions one takes {rebuilt} for clips of their own")
    if one and shards.clips == len(shards):
        notes.append("--captions one changes nothing: no clip of these shards has several captions")
    return notes
