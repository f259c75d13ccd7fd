"""`cogtrain generate`: videos from the tuned model, and of the same seed from the base model beside them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError
from cogcommon.files.ownership import refuse_data_root, state_of
from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import default_precision, dtype_of, pick_device
from cogcommon.model.families import Resolution
from cogcommon.model.published import scaled_otherwise
from cogcommon.words import counted

from ..data.prompts import (
    cut_notes,
    given_twice,
    lacking_token,
    named_after,
    read_first_frame,
    read_prompts,
    shortened,
    size_of,
)
from ..report.renew import renew_report
from ..report.sheet import Column, side_by_side
from ..report.videos import SHEET, VideoFolder, file_name
from ..runs.checkpoint import run_and_checkpoint
from ..runs.folder import GENERATED, SHEET_FILE
from ..runs.mirror.restore import local_run
from ..settings.results import GenerateSettings
from ..validation.pipeline import Request, generate_video, load_pipeline, move_pipeline, step_bytes, to_base
from ..validation.tuned import Tuned, find_tuned

_VIDEOS = "generated videos"  # what made the files of a folder
_BESIDE = "side by side"


def run(settings: GenerateSettings) -> None:
    """Generate, write the files, and say where they are.

    Raises:
        SettingError, ModelError, RunError: the options do not go together, or weights are missing.
    """
    named = local_run(settings.run)
    tuned = find_tuned(named, settings.lora, settings.transformer, settings.model, settings.strength)
    settings = dataclasses.replace(settings, run=run_and_checkpoint(named)[0] if named else None)
    checkpoint = tuned.checkpoint
    prompts = read_prompts(settings.prompt, settings.prompts, once=False)  # once: the file may be a pipe
    requests = requests_of(dataclasses.replace(settings, prompt=prompts, prompts=None), tuned)
    device = pick_device()
    precision = settings.precision or default_precision(checkpoint.family, device)
    fps = settings.fps or float(checkpoint.family.fps)
    if settings.out:
        refuse_data_root(settings.out, "--out")
    answers = [
        _Answer(request, request_text(settings, tuned, request, fps, precision), fps, settings, len(requests) > 1)
        for request in requests
    ]
    console = Console(stderr=settings.json)
    first = requests[0]
    for note in [*given_twice(prompts), *notes_on(requests, tuned)]:
        console.print(f"note: {note}", soft_wrap=True)

    quiet_libraries()
    dtype = dtype_of(precision)
    step = step_bytes(checkpoint, first.resolution, first.guidance, dtype.itemsize)
    with stage("loading the model"):
        pipeline = load_pipeline(tuned, dtype, lambda text: console.print(text, soft_wrap=True))
    facts = (
        f"{tuned} on {checkpoint.name}  ·  {first.resolution}  ·  {settings.steps} steps  ·  "
        f"guidance {settings.guidance:g}  ·  seed {settings.seed}  ·  {precision}"
    )
    left = [answer for answer in answers if not answer.before] or answers  # some are left where it was stopped
    for answer in answers:
        answer.files = {} if answer in left else answer.before
    started, labels = time.monotonic(), ["tuned", *(["base"] if settings.base else [])]
    try:
        for label in labels:
            with stage(f"preparing the {label} model"):
                if label == "base":
                    to_base(pipeline, tuned, dtype)
                move_pipeline(pipeline, device, first.resolution, step)
            for number, answer in enumerate(left, 1):
                of = f" {number}/{len(left)}" if len(left) > 1 else ""
                with stage(f"{label} video{of}", settings.steps, "step") as bar:
                    answer.show(Column(label, generate_video(pipeline, answer.request, bar.advance)))
                if label == labels[-1]:
                    answer.finish(facts)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_stopped(answers)) from None
    seconds = round(time.monotonic() - started, 1)

    told = [(answer.request.prompt, answer.files) for answer in answers]
    if settings.json and len(told) == 1:
        print(json_text({"files": in_text(answers[0].files), "seconds": seconds}))
    else:
        tell(told, seconds, console, as_json=settings.json)
    renew_report(settings.run, [answer.folder for answer in answers], partial(console.print, soft_wrap=True))


def tell(
    drawn: Sequence[tuple[str, Mapping[str, Path]]], seconds: float, console: Console, *, as_json: bool
) -> None:  # fmt: skip
    """Say which files there are for which prompt."""
    if as_json:
        told = [{"prompt": prompt, "files": in_text(files)} for prompt, files in drawn]
        print(json_text({"videos": told, "seconds": seconds}))
        return
    for prompt, files in drawn:
        if len(drawn) > 1:
            console.print(shortened(prompt, 72), soft_wrap=True)
        for name, file in files.items():
            console.print(f"{name:<14} {file}", soft_wrap=True)


def in_text(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(file) for name, file in files.items()}


class _Answer(VideoFolder):
    """What is drawn for one prompt, and its folder: --out, or one of its own in there if there are several prompts.

    Attributes:
        before: its files, where all of them are there already.
    """

    def __init__(self, request: Request, asked: str, fps: float, settings: GenerateSettings, several: bool) -> None:
        own = default_folder(settings, request.prompt, asked)
        folder = (settings.out / own.name if several else settings.out) if settings.out else own
        super().__init__(folder, _VIDEOS, asked, fps)
        self.request = request
        self.columns: list[Column] = []
        videos = ["tuned", *(["base", _BESIDE] if settings.base else [])]
        names = {name: file_name(name) for name in videos} | {SHEET: SHEET_FILE}
        made = self.made_before(*names.values())
        all_there = made and all(map(made.owns, names.values()))
        self.before = {name: folder / file for name, file in names.items()} if all_there else {}

    def show(self, column: Column) -> None:
        """Take in a video, and write it."""
        self.columns.append(column)
        self.add(column.label, column.frames_FHWC)

    @property
    def whole(self) -> bool:
        return SHEET in self.files

    @stage("writing the contact sheet")
    def finish(self, facts: str) -> None:
        """Write what shows the videos beside each other; the contact sheet last."""
        if len(self.columns) > 1:
            self.add(_BESIDE, side_by_side(self.columns))
        self.add_sheet(self.request.prompt, facts, self.columns)


def _stopped(answers: list[_Answer]) -> str:
    """What there is when somebody stops it, and how to have the rest."""
    half = [str(answer.folder) for answer in answers if answer.files and not answer.whole]
    whole = sum(answer.whole for answer in answers)
    there = f"{whole} of {counted(len(answers), 'prompt')} drawn"
    said = ["stopped", *([there] if len(answers) > 1 else []), *([f"not finished: {', '.join(half)}"] if half else [])]
    return f"{'; '.join(said)}; run the same command again to have the rest"


def notes_on(requests: Sequence[Request], tuned: Tuned) -> Iterator[str]:
    """What to know of the model's scales, of prompts that are longer than it reads, and of those that lack the word
    that stood before the captions of the run (`cogprep encode --id-token`)."""
    yield from scaled_otherwise(tuned.checkpoint)
    texts = [(shortened(request.prompt), request.prompt) for request in requests]
    yield from cut_notes([*texts, ("the negative prompt", requests[0].negative_prompt)], tuned.checkpoint)
    if lacking := lacking_token([request.prompt for request in requests], tuned.id_token):
        yield f"the run was trained with {tuned.id_token!r} in front of its captions; {lacking} does not have it"


def requests_of(settings: GenerateSettings, tuned: Tuned) -> list[Request]:
    """What to draw, a prompt each.

    Raises:
        SettingError: the options do not go together, or with the model.
    """
    prompts = read_prompts(settings.prompt, settings.prompts)
    checkpoint = tuned.checkpoint
    _check_numbers(settings, int(checkpoint.scheduler_config.get("num_train_timesteps", 1000)))
    sizes = [Resolution.parse(settings.resolution)] if settings.resolution else tuned.sizes
    resolution = size_of(settings.image if checkpoint.family.task == "i2v" else None, sizes)
    checkpoint.check_resolution(resolution)
    family = checkpoint.family
    image = None
    if family.task == "i2v" and settings.image is None:
        raise SettingError(
            f"{checkpoint.name} makes a video of an image; none was given", where="--image", fix="--image FILE"
        )
    if settings.image is not None:
        if family.task == "t2v":
            raise SettingError(
                f"{checkpoint.name} is a text-to-video model; it takes no image",
                where=f"--image {settings.image}",
                fix="leave --image out, or use weights of an I2V model",
            )
        image = read_first_frame(settings.image, resolution)
    if settings.negative_prompt and settings.guidance <= 1:
        raise SettingError(
            "a negative prompt acts through guidance, and there is none",
            where=f"--negative-prompt, --guidance {settings.guidance:g}",
            fix="--guidance above 1",
        )
    return [
        Request(
            prompt=prompt,
            image=image,
            resolution=resolution,
            steps=settings.steps,
            guidance=settings.guidance,
            seed=settings.seed,
            text_tokens=int(checkpoint.transformer_config["max_text_seq_length"]),
            dynamic_guidance=not family.ddim,
            negative_prompt=settings.negative_prompt,
        )
        for prompt in prompts
    ]


def _check_numbers(settings: GenerateSettings, most_steps: int) -> None:
    """Refuse numbers that sampling cannot take, or no player shows.

    Args:
        most_steps: that the model's scheduler has.

    Raises:
        SettingError: names the first such option.
    """
    fps = settings.fps
    faults = {
        "--steps": (not 1 <= settings.steps <= most_steps, f"1 to {most_steps}, as --steps 50"),
        "--guidance": (not math.isfinite(settings.guidance), "a number, as --guidance 6"),
        "--seed": (not -(2**63) <= settings.seed < 2**64, "a whole number below 2^64, as --seed 42"),
        "--fps": (fps is not None and not 0.1 <= fps <= 1000, "0.1 to 1000, or leave it out"),
    }
    for option, (wrong, fix) in faults.items():
        if wrong:
            value = getattr(settings, option[2:])
            raise SettingError(f"{value} cannot be", where=f"{option} {value}", fix=f"{option} takes {fix}")


def request_text(settings: GenerateSettings, tuned: Tuned, request: Request, fps: float, precision: str) -> str:
    """All that a video depends on, weights and image by their content."""
    strengths = [one.strength for one in tuned.loras]
    image = None if settings.image is None else state_of(settings.image)
    asked = {
        "prompt": request.prompt, "image": image, "resolution": str(request.resolution), "steps": request.steps,
        "guidance": request.guidance, "seed": request.seed, "fps": fps, "precision": precision, "base": settings.base,
        "model": tuned.checkpoint.name, "weights": tuned.states(),
        # Newer than some folders, which stay those of their requests.
        **({"negative": request.negative_prompt} if request.negative_prompt else {}),
        **({"strengths": strengths} if any(strength != 1 for strength in strengths) else {}),
        **({} if tuned.step is None else {"step": tuned.step}),  # for the report, when these weights are gone
    }  # fmt: skip
    return json.dumps(asked, ensure_ascii=False)


def default_folder(settings: GenerateSettings, prompt: str, asked: str) -> Path:
    """A folder of its own for each request."""
    return (settings.run or Path()) / GENERATED / named_after(prompt, settings.seed, asked)
