"""`cogtrain generate`: videos from the tuned model, and of the same seed from the base model beside them."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError
from cogcommon.files.atomic import scratch_file
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import Made, check_own_folder, state_of, take_output
from cogcommon.media.video import Frames, write_mp4
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import default_precision, dtype_of, pick_device, quiet_libraries
from cogcommon.model.families import Resolution
from cogcommon.words import counted

from ..data.prompts import cut_notes, named_after, read_first_frame, read_prompts, shortened
from ..report.renew import renew_report
from ..report.sheet import Column, contact_sheet, side_by_side
from ..runs.folder import GENERATED, SHEET_FILE
from ..runs.restore import local_run
from ..settings import GenerateSettings
from ..validation.pipeline import Request, generate_video, load_pipeline, move_pipeline, step_bytes, to_base
from ..validation.tuned import Tuned, find_tuned

_VIDEOS = "generated videos"  # what made the files of a folder


def run(settings: GenerateSettings) -> None:
    """Generate, write the files, and say where they are.

    Raises:
        SettingError, ModelError, RunError: the options do not go together, or weights are missing.
    """
    settings = dataclasses.replace(settings, run=local_run(settings.run))
    tuned = find_tuned(settings.run, settings.lora, settings.transformer, settings.model, settings.strength)
    checkpoint = tuned.checkpoint
    requests = requests_of(settings, tuned)
    device = pick_device()
    precision = settings.precision or default_precision(checkpoint.family, device)
    fps = settings.fps or float(checkpoint.family.fps)
    answers = [
        _Answer(request, request_text(settings, tuned, request, fps, precision), fps, settings, len(requests) > 1)
        for request in requests
    ]
    for answer in answers:
        answer.check_folder()
    console = Console(stderr=settings.json)
    first = requests[0]
    for note in cut_texts(requests, checkpoint):
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
                    answer.add(Column(label, generate_video(pipeline, answer.request, bar.advance)))
                if label == labels[-1]:
                    answer.finish(facts)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_stopped(answers)) from None
    seconds = round(time.monotonic() - started, 1)

    if settings.json:
        told = [{"prompt": a.request.prompt, "files": {n: str(file) for n, file in a.files.items()}} for a in answers]
        print(json_text({"files": told[0]["files"], "seconds": seconds} if len(told) == 1 else
                        {"videos": told, "seconds": seconds}))  # fmt: skip
    for answer in [] if settings.json else answers:
        if len(answers) > 1:
            console.print(answer.request.prompt, soft_wrap=True)
        for name, file in answer.files.items():
            console.print(f"{name:<14} {file}", soft_wrap=True)
    renew_report(settings.run, [answer.folder for answer in answers], partial(console.print, soft_wrap=True))


class _Answer:
    """What is drawn for one prompt, and its folder: --out, or one of its own in there if there are several prompts."""

    def __init__(self, request: Request, asked: str, fps: float, settings: GenerateSettings, several: bool) -> None:
        self.request, self.asked, self.fps = request, asked, fps
        own = default_folder(settings, request.prompt, asked)
        self.folder = (settings.out / own.name if several else settings.out) if settings.out else own
        self.names = ["tuned.mp4", SHEET_FILE, *(["base.mp4", "side-by-side.mp4"] if settings.base else [])]
        self.columns: list[Column] = []
        self.files: dict[str, Path] = {}
        self.before: dict[str, Path] = {}  # its files, where all of them are there already

    def check_folder(self) -> None:
        """Refuse a folder of somebody's, or of another request, before a model is loaded.

        Raises:
            SettingError: it is one.
        """
        before = check_own_folder(self.folder, _VIDEOS, "--out")
        if before and before.request != self.asked:
            raise SettingError(
                "this folder holds a video of another prompt, or of other settings or weights",
                where=f"--out {self.folder}",
                fix="--out with another folder, or leave it out: every prompt gets a folder of its own",
            )
        if before:
            before.refuse_foreign(*self.names)
            if all(before.owns(name) for name in self.names):
                self.before = {Path(name).stem.replace("-", " "): self.folder / name for name in self.names}

    def add(self, column: Column) -> None:
        """Write a video as soon as it is there, whole or not at all."""
        self.columns.append(column)
        with disk_errors(self.folder):
            self._write(take_output(self.folder, _VIDEOS, "--out", self.asked), column.label, column.frames_FHWC)

    @property
    def whole(self) -> bool:
        return "contact sheet" in self.files

    @stage("writing the contact sheet")
    def finish(self, facts: str) -> None:
        """Write what shows the videos beside each other; the contact sheet last."""
        with disk_errors(self.folder):
            made = take_output(self.folder, _VIDEOS, "--out", self.asked)
            if len(self.columns) > 1:
                self._write(made, "side by side", side_by_side(self.columns))
            sheet = io.BytesIO()
            contact_sheet(self.request.prompt, facts, self.columns, self.fps).save(sheet, "PNG")
            self.files["contact sheet"] = made.commit_bytes(SHEET_FILE, sheet.getvalue())

    def _write(self, made: Made, label: str, frames_FHWC: Frames) -> None:
        with scratch_file(made.folder) as scratch:
            write_mp4(scratch, frames_FHWC, self.fps)
            self.files[label] = made.commit(scratch, f"{label.replace(' ', '-')}.mp4")


def _stopped(answers: list[_Answer]) -> str:
    """What there is when somebody stops it, and how to have the rest."""
    half = [str(answer.folder) for answer in answers if answer.files and not answer.whole]
    whole = sum(answer.whole for answer in answers)
    there = f"{whole} of {counted(len(answers), 'prompt')} drawn"
    said = ["stopped", *([there] if len(answers) > 1 else []), *([f"not finished: {', '.join(half)}"] if half else [])]
    return f"{'; '.join(said)}; run the same command again to have the rest"


def cut_texts(requests: list[Request], checkpoint: Checkpoint) -> Iterator[str]:
    """What to know of prompts that are longer than the model reads."""
    texts = [(shortened(request.prompt), request.prompt) for request in requests]
    return cut_notes([*texts, ("the negative prompt", requests[0].negative_prompt)], checkpoint)


def requests_of(settings: GenerateSettings, tuned: Tuned) -> list[Request]:
    """What to draw, a prompt each.

    Raises:
        SettingError: the options do not go together, or with the model.
    """
    prompts = read_prompts(settings.prompt, settings.prompts)
    if settings.steps < 1:
        raise SettingError(f"{settings.steps} sampling steps are too few", where="--steps", fix="--steps 50")
    checkpoint = tuned.checkpoint
    resolution = Resolution.parse(settings.resolution) if settings.resolution else tuned.resolution
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


def request_text(settings: GenerateSettings, tuned: Tuned, request: Request, fps: float, precision: str) -> str:
    """All that a video depends on, weights and image by their content."""
    folder = tuned.transformer_folder
    files = sorted(folder.glob("*.safetensors")) if folder else [one.file for one in tuned.loras]
    strengths = [one.strength for one in tuned.loras]
    image = None if settings.image is None else state_of(settings.image)
    asked = {
        "prompt": request.prompt, "image": image, "resolution": str(request.resolution), "steps": request.steps,
        "guidance": request.guidance, "seed": request.seed, "fps": fps, "precision": precision, "base": settings.base,
        "model": tuned.checkpoint.name, "weights": [state_of(file) for file in files],
        # Newer than some folders, which stay those of their requests.
        **({"negative": request.negative_prompt} if request.negative_prompt else {}),
        **({"strengths": strengths} if any(strength != 1 for strength in strengths) else {}),
    }  # fmt: skip
    return json.dumps(asked, ensure_ascii=False)


def default_folder(settings: GenerateSettings, prompt: str, asked: str) -> Path:
    """A folder of its own for each request."""
    return (settings.run or Path()) / GENERATED / named_after(prompt, settings.seed, asked)
