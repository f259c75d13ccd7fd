"""`cogprep validate`: every fault before a GPU is used, then the plan.

In the order things happen::

    model's JSON -> lists -> a look at every clip (in the pool) -> captions (tokenizer) -> advice -> plan
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import DTYPES, item_bytes, quiet_libraries
from cogcommon.model.families import BUILTIN_NAMES, Resolution
from cogcommon.words import counted

from ..dataset.advice import Looked, advise, cut_captions
from ..dataset.lists import DataSet, check_root
from ..dataset.probe import Look, look
from ..plan.plan import tensor_bytes
from ..processes.pool import Pool, default_workers
from ..settings import ValidateSettings
from ..show.progress import Progress
from ..source.clip import ClipFault
from ..video.decode import image_size
from .foretell import EncodeForecast, foretell
from .verdict import BucketPlan, Finding, Verdict, show

# The VAE on one H200, bf16, whole frames, as diffusers has it; time goes with the pixels (measured
# 4.97 times the arithmetic at 81x768x1360, which has 5.00 times the pixels).
_H200_CLIP_S = 0.96
_H200_CLIP = Resolution(49, 480, 720)


def run(settings: ValidateSettings) -> None:
    """The command: look, show, and fail if there is any fault."""
    verdict = validate(settings)
    if settings.json:
        print(verdict.to_json())
    else:
        show(verdict, Console())
    if verdict.faults:
        first = verdict.faults[0]
        count = len(verdict.faults)
        raise DataRootError(
            f"{counted(count, 'fault')}; the first: {first.what}",
            where=f"{settings.root}: {first.place} {first.entry}".rstrip(),
            fix="mend what is listed above; `cogprep encode` leaves bad clips out, but lists must pair up",
        )


def validate(settings: ValidateSettings) -> Verdict:
    """Look at a data root. Decodes a few key frames of each clip and loads no weights.

    Raises:
        DataRootError: the data root is no folder, or has no lists.
        SettingError: a size that the model cannot take, or a holdout of every clip.
        ModelError: the model cannot be had.
    """
    begun = time.perf_counter()
    check_root(settings.root, settings.prompts, settings.videos)  # before a model is looked for on the hub
    checkpoint = settings.open_model()
    family = checkpoint.family
    data = settings.read_lists(family.task)
    looks, images = look_at_all(settings, data, family.fps)
    faults = find_faults(settings, data, looks, images)
    looked = [
        Looked(sample, found, image)
        for sample in data.samples
        if isinstance(found := looks[sample.source], Look)
        and not isinstance(image := images.get(sample.image), ClipFault)
    ]
    quiet_libraries()
    cuts = cut_captions([one.sample for one in looked], checkpoint.load_tokenizer(), family.text_tokens)
    forecast = foretell(settings, checkpoint, data, looks, [one.look.facts.sha256 for one in looked])
    faults += find_refusals(settings, forecast)
    held = forecast.holdout
    return Verdict(
        data_root=str(settings.root),
        model=checkpoint.name,
        family=family.name,
        family_fps=family.fps,
        precision=settings.precision or family.precision,
        lines=max(map(len, data.columns.values()), default=0),
        usable=len(looked),
        validation=sum(one.look.facts.sha256 in held for one in looked),
        faults=faults,
        advice=advise(looked, cuts, family, settings.cut) if looked else (),
        plan=plan_buckets(settings, checkpoint, looked, held) if looked else (),
        encode={
            "new": forecast.new,
            "reused": forecast.reused,
            "kept": forecast.kept,
            "dropped": forecast.dropped,
        },
        notes=[*_notes(settings, checkpoint, data, looked), *_notes_on_the_folder(settings, forecast)],
        seconds=time.perf_counter() - begun,
    )


def look_at_all(
    settings: ValidateSettings, data: DataSet, family_fps: float
) -> tuple[Mapping[str, Look | ClipFault], Mapping[str, tuple[int, int] | ClipFault]]:
    """Every distinct clip and image of the lists, by entry, also where the lists cannot be paired."""
    clips = list(dict.fromkeys(filter(None, data.columns.get("clips", ()))))
    images = list(dict.fromkeys(filter(None, data.columns.get("images", ()))))
    looks: dict[str, Look | ClipFault] = {}
    workers = min(settings.workers or default_workers(), max(1, len(clips)))
    with Pool(workers, timeout_s=settings.clip_timeout) as pool, Progress("Checking", len(clips)) as bar:
        one = partial(look, buckets=settings.buckets, cut=settings.cut, family_fps=family_fps)
        for entry, found in zip(clips, pool.run(one, ((data.root / entry,) for entry in clips)), strict=True):
            looks[entry] = found
            bar.advance()
        sizes = pool.run(image_size, ((data.root / entry,) for entry in images))
        return looks, dict(zip(images, sizes, strict=True))


def find_faults(
    settings: ValidateSettings,
    data: DataSet,
    looks: Mapping[str, Look | ClipFault],
    images: Mapping[str, tuple[int, int] | ClipFault],
) -> list[Finding]:
    """Faults of the lists, then of single clips and images, each where the list names it."""
    found = [Finding(fault.file, fault.line, "", fault.what) for fault in data.faults]
    bad: Mapping[str, Mapping[str, object]] = {"clips": looks, "images": images}
    names = {"clips": settings.videos, "images": settings.images or "images.txt"}
    for column, results in bad.items():
        for line, entry in enumerate(data.columns.get(column, ()), 1):
            result = results.get(entry)
            if isinstance(result, ClipFault):
                found.append(Finding(names[column], line, entry, result.reason))
    return found


def find_refusals(settings: ValidateSettings, forecast: EncodeForecast) -> list[Finding]:
    """What `encode` would object to because of what the output folder holds."""
    found = [
        Finding(settings.videos, one.sample.line, one.sample.source, f"rejected when it was decoded: {one.reason}")
        for one in forecast.rejected_before
    ]
    if forecast.refusal:
        found.append(Finding(str(settings.out), 0, "", f"encode would refuse: {forecast.refusal}"))
    return found


def plan_buckets(
    settings: ValidateSettings, checkpoint: Checkpoint, looked: Sequence[Looked], held: Collection[bytes]
) -> list[BucketPlan]:
    """What each bucket would hold after a first encode."""
    rows = []
    for bucket in settings.buckets:
        inside = [one for one in looked if one.look.bucket == bucket]
        size = tensor_bytes(
            checkpoint.family,
            bucket,
            item_bytes=item_bytes(DTYPES[settings.precision or checkpoint.family.precision]),
            posterior=settings.posterior,
            image_variants=settings.image_variants,
            text_dim=checkpoint.text_config["d_model"],
        )
        chunk = settings.samples_a_shard(size)
        validation = sum(one.look.facts.sha256 in held for one in inside)
        frames = [one.look.facts.frames for one in inside]
        rates = [one.look.picked.effective_fps for one in inside]
        losses = [one.look.loss for one in inside]
        rows.append(
            BucketPlan(
                resolution=bucket,
                clips=len(inside),
                source_frames=(min(frames, default=0), max(frames, default=0)),
                fps=(min(rates, default=0.0), max(rates, default=0.0)),
                loss=(sum(losses) / max(1, len(losses)), max(losses, default=0.0)),
                shards=-(-validation // chunk) + -(-(len(inside) - validation) // chunk),
                bytes=size * len(inside),
                gpu_s=gpu_seconds(settings, checkpoint, bucket, len(inside)),
            )
        )
    return rows


def gpu_seconds(settings: ValidateSettings, checkpoint: Checkpoint, bucket: Resolution, clips: int) -> float | None:
    """Seconds of the VAE on an H200, I2V's extra first frames included; none for a built-in model."""
    if checkpoint.name in BUILTIN_NAMES:
        return None
    frames = bucket.frames + (settings.image_variants + 1 if checkpoint.family.task == "i2v" else 0)
    pixels = frames * bucket.height * bucket.width
    return clips * _H200_CLIP_S * pixels / (_H200_CLIP.frames * _H200_CLIP.height * _H200_CLIP.width)


def _notes(settings: ValidateSettings, checkpoint: Checkpoint, data: DataSet, looked: Sequence[Looked]) -> list[str]:
    notes = []
    if data.faults:
        notes.append("the lists do not pair up, so captions were not checked and there is no plan")
    if data.images_unused:
        name = settings.images or "images.txt"
        notes.append(f"{name} is not used: {checkpoint.name} is a text-to-video model")
    if looked:
        precision = settings.precision or checkpoint.family.precision
        said = f"Sizes are for {precision}" + (", the family's on a GPU" if settings.precision is None else "")
        if checkpoint.name not in BUILTIN_NAMES:
            said += (
                f"; GPU time is an estimate: the VAE on one H200, {_H200_CLIP_S} s a clip of {_H200_CLIP}, "
                "scaled by pixels"
            )
        notes.append(
            said + ". Damage in the middle of a clip shows only when encode decodes it; that clip is then left out."
        )
    return notes


def _notes_on_the_folder(settings: ValidateSettings, forecast: EncodeForecast) -> Iterator[str]:
    if forecast.question:
        yield f"encode would ask first: {forecast.question}"
    parts = {
        "reuse": forecast.reused,
        "keep without their clips": forecast.kept,
        "drop": forecast.dropped,
    }
    if any(parts.values()) and not forecast.refusal:
        said = ", ".join(f"{what} {count}" for what, count in parts.items() if count)
        yield f"{settings.out} holds shards already: encode would encode {forecast.new}, {said}"
