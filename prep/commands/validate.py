"""`cogprep validate`: every fault before a GPU is used, then the plan.

In the order things happen::

    model's JSON -> lists -> a look at every clip (in the pool) -> captions (tokenizer) -> advice -> plan
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import DataRootError, ModelError
from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import DTYPES, item_bytes
from cogcommon.model.families import BUILTIN_NAMES, Family, Resolution
from cogcommon.model.published import scaled_otherwise
from cogcommon.store.address import as_shown
from cogcommon.words import counted

from ..dataset.advice import Looked, advise, cut_captions
from ..dataset.guesses import Guess, guess_folders, guess_moved, guess_turned, guess_uncaptioned, turned_sizes
from ..dataset.lists import DataSet, check_root
from ..dataset.probe import Look, look_at
from ..dataset.remedies import Remedies, recorded
from ..plan.plan import tensor_bytes
from ..processes.by_file import run_by_file
from ..processes.pool import Pool, default_workers
from ..settings.encode import ValidateSettings
from ..source.clip import ClipFault
from ..source.part import file_named
from ..vae.seconds import VaeSpeed, vae_speed
from ..video.decode import Picture, look_at_picture
from .foretell import EncodeForecast, foretell
from .verdict import REFUSES, BucketPlan, Finding, Refusal, Uncaptioned, Verdict, show


def run(settings: ValidateSettings) -> None:
    """The command: look, show, and fail if there is any fault."""
    verdict = validate(settings)
    if settings.json:
        print(verdict.to_json())
    else:
        show(verdict, Console())
    if verdict.faults:
        raise _error(settings, verdict)


def _error(settings: ValidateSettings, verdict: Verdict) -> DataRootError:
    """What ends the command; the page has said it all, JSON is for programs, so there the remedy stands here, too."""
    first, count = verdict.faults[0], counted(len(verdict.faults), "fault")
    if isinstance(first, Refusal):
        fix = first.fix if settings.json else "what is said above"
        return DataRootError(f"{count}: {REFUSES}", where=first.place, fix=fix)
    usual = "mend what is listed above (->); `cogprep encode` leaves bad clips out, but lists must pair up"
    fixes = [guess.fix for guess in verdict.guesses] or [first.fix or usual if settings.json else usual]
    where = f"{as_shown(settings.root)}: {first.place} {first.entry}".rstrip()
    return DataRootError(f"{count}; the first: {first.what}", where=where, fix=fixes[0])


def validate(settings: ValidateSettings) -> Verdict:
    """Look at a data root. Decodes a few key frames of each clip and loads no weights.

    Raises:
        DataRootError: the data root is no folder, or has no lists.
        SettingError: a size that the model cannot take, a holdout of every clip, or a card that we do not know.
        ModelError: the model cannot be had.
    """
    begun = time.perf_counter()
    settings.keep_clips()
    check_root(settings.root, settings.prompts, settings.videos)  # before a model is looked for on the hub
    checkpoint = settings.open_model(geometry=True)
    family = checkpoint.family
    speed = None if checkpoint.name in BUILTIN_NAMES else vae_speed(settings.gpu)
    data = settings.read_lists(family.task)
    looks, images, hashes = look_at_all(settings, data, family.fps)
    faults = find_faults(settings, family, data, looks, images)
    looked = [
        Looked(sample, found, image)
        for sample in data.paired
        if isinstance(found := looks[sample.source], Look)
        and not isinstance(image := images.get(sample.image), ClipFault)
    ]
    quiet_libraries("transformers")
    tokenizer, notes = _tokenizer(checkpoint)
    cuts = cut_captions([one.sample for one in looked], tokenizer, family.text_tokens)
    turned = turned_sizes(checkpoint, settings.buckets)
    usable = [] if data.faults else [one.look.facts.sha256 for one in looked]
    forecast = foretell(settings, checkpoint, data, looks, hashes, usable)
    faults += find_refusals(settings, family, forecast)
    held = forecast.holdout
    return Verdict(
        data_root=as_shown(settings.root),
        model=checkpoint.name,
        family=family.name,
        family_fps=family.fps,
        precision=settings.precision or family.precision,
        lines=max(map(len, data.columns.values()), default=0),
        usable=len(looked),
        validation=sum(one.look.facts.sha256 in held for one in looked),
        faults=faults,
        guesses=list(find_guesses(settings, checkpoint, data, looks, images)),
        advice=advise(looked, cuts, family, settings.cut, settings.buckets, turned) if looked else (),
        plan=plan_buckets(settings, checkpoint, looked, held, speed) if looked else (),
        gpu=speed.card if speed else None,
        encode={
            "new": forecast.new,
            "reused": forecast.reused,
            "kept": forecast.kept,
            "dropped": forecast.dropped,
        },
        notes=[*_notes(settings, checkpoint, data, looked, speed), *notes, *_notes_on_the_folder(settings, forecast)],
        seconds=time.perf_counter() - begun,
    )


def look_at_all(
    settings: ValidateSettings, data: DataSet, family_fps: float
) -> tuple[Mapping[str, Look | ClipFault], Mapping[str, Picture | ClipFault], Mapping[str, bytes | ClipFault]]:
    """Every distinct clip and image of the lists, by entry, also where the lists cannot be paired.

    Returns:
        What was seen of each clip, of each image, and the content hash of each image.
    """
    clips = list(dict.fromkeys(filter(None, data.columns.get("clips", ()))))
    images = list(dict.fromkeys(filter(None, data.columns.get("images", ()))))
    looks: dict[str, Look | ClipFault] = {}
    workers = min(settings.workers or default_workers(), max(1, len(clips)))
    with Pool(workers, timeout_s=settings.clip_timeout) as pool, stage("checking", len(clips), "clip") as bar:
        parts_of_one = partial(look_at, buckets=settings.buckets, cut=settings.cut, family_fps=family_fps)
        for entry, found in run_by_file(pool, parts_of_one, data.root, sorted(clips, key=file_named)):
            looks[entry] = found
            bar.advance()
        seen: dict[str, Picture | ClipFault] = {}
        hashes: dict[str, bytes | ClipFault] = {}
        pictures = pool.run(look_at_picture, ((data.root / entry,) for entry in images))
        for entry, picture in zip(images, pictures, strict=True):
            hashes[entry], seen[entry] = (picture, picture) if isinstance(picture, ClipFault) else picture
        return looks, seen, hashes


def find_faults(
    settings: ValidateSettings,
    family: Family,
    data: DataSet,
    looks: Mapping[str, Look | ClipFault],
    images: Mapping[str, Picture | ClipFault],
) -> list[Finding]:
    """Faults of the lists, then of single clips and images, each where the list names it, and with its remedy."""
    fixes = Remedies((one for one in looks.values() if isinstance(one, ClipFault)), settings.buckets, family)
    kinds: Mapping[bool, type[Finding]] = {True: Uncaptioned, False: Finding}
    found = [
        kinds[fault.kind == "uncaptioned"](fault.file, fault.line, "", fault.what, fixes.of(fault))
        for fault in data.faults
    ]
    bad: Mapping[str, Mapping[str, object]] = {"clips": looks, "images": images}
    names = {"clips": settings.videos, "images": settings.images or "images.txt"}
    for column, results in bad.items():
        for line, entry in enumerate(data.columns.get(column, ()), 1):
            result = results.get(entry)
            if isinstance(result, ClipFault):
                fix = fixes.of(result) if column == "clips" else fixes.of_picture(result, settings.images is None)
                found.append(Finding(names[column], line, entry, result.reason, fix))
    return found


def find_guesses(
    settings: ValidateSettings,
    checkpoint: Checkpoint,
    data: DataSet,
    looks: Mapping[str, Look | ClipFault],
    images: Mapping[str, Picture | ClipFault],
) -> Iterator[Guess]:
    """What was probably meant, where many lines or the size are wrong in one way."""
    results: Mapping[str, Mapping[str, object]] = {settings.videos: looks, settings.images or "images.txt": images}
    for (name, found), column in zip(results.items(), ("clips", "images"), strict=True):
        bad = [entry for entry, result in found.items() if isinstance(result, ClipFault)]
        for guess in (guess_folders, guess_moved):
            yield from guess(data.root, name, data.columns.get(column, ()), bad)
    names = settings.prompts, settings.videos
    yield from guess_uncaptioned(data.root, names, data.columns.get("captions", ()), len(data.columns.get("clips", ())))
    yield from guess_turned(checkpoint, settings.buckets, looks.values())


def find_refusals(settings: ValidateSettings, family: Family, forecast: EncodeForecast) -> list[Finding]:
    """What `encode` would object to because of what the output folder holds."""
    rejected = [(one.sample, recorded(one.reason)) for one in forecast.rejected_before]
    fixes = Remedies((fault for _, fault in rejected), settings.buckets, family)
    found = [
        Finding(
            settings.videos, sample.line, sample.source,
            f"rejected when it was decoded: {fault.reason}", fixes.of(fault),
        )
        for sample, fault in rejected
    ]  # fmt: skip
    if forecast.refusal:
        what, where, fix = forecast.refusal.what, forecast.refusal.where, forecast.refusal.fix
        found.append(Refusal(as_shown(settings.out), 0, "", f"{REFUSES}: {what}", fix or "", where or ""))
    return found


def plan_buckets(
    settings: ValidateSettings,
    checkpoint: Checkpoint,
    looked: Sequence[Looked],
    held: Collection[bytes],
    speed: VaeSpeed | None = None,
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
                gpu_s=len(inside) * clip_seconds(settings, checkpoint, bucket, speed) if speed else None,
            )
        )
    return rows


def clip_seconds(settings: ValidateSettings, checkpoint: Checkpoint, bucket: Resolution, speed: VaeSpeed) -> float:
    """Seconds of the VAE for one clip, I2V's extra first frames included."""
    frames = bucket.frames + (settings.image_variants + 1 if checkpoint.family.task == "i2v" else 0)
    return speed.seconds(frames, bucket.height, bucket.width, tiled=settings.tiling == "on")


def _tokenizer(checkpoint: Checkpoint) -> tuple[object | None, list[str]]:
    """The tokenizer of the model, and a note where it cannot be had."""
    try:
        return checkpoint.load_tokenizer(), []
    except ModelError:
        if checkpoint.revision or not checkpoint.on_hub:  # it is not our table's
            raise
        return None, [f"The tokenizer of {checkpoint.name} is not here, so the lengths of captions are guessed."]


def _notes(
    settings: ValidateSettings,
    checkpoint: Checkpoint,
    data: DataSet,
    looked: Sequence[Looked],
    speed: VaeSpeed | None,
) -> list[str]:
    notes = []
    if data.uncaptioned:
        notes.append("The plan is for when all captions are there; until then encode refuses the lists.")
    elif data.faults:
        notes.append("the lists do not pair up, so captions were not checked and there is no plan")
    if data.images_unused:
        name = settings.images or "images.txt"
        notes.append(f"{name} is not used: {checkpoint.name} is a text-to-video model")
    notes += scaled_otherwise(checkpoint)
    if looked:
        precision = settings.precision or checkpoint.family.precision
        said = f"Sizes are for {precision}" + (", the family's on a GPU" if settings.precision is None else "")
        if speed is not None:
            said += f"; GPU time is {speed}"
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
        yield f"{as_shown(settings.out)} holds shards already: encode would encode {forecast.new}, {said}"
