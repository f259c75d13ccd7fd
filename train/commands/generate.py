"""`cogtrain generate`: a video from the tuned model, and the same seed from the base model beside it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError
from cogcommon.files.atomic import scratch_file
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import Made, check_own_folder, state_of, take_output
from cogcommon.media.image import BadImage, read_upright, scale_to_cover
from cogcommon.media.video import write_mp4
from cogcommon.model.device import default_precision, dtype_of, pick_device, quiet_libraries
from cogcommon.model.families import Resolution

from ..report.sheet import Column, contact_sheet, side_by_side
from ..runs.folder import GENERATED
from ..settings import GenerateSettings
from ..validation.pipeline import Request, generate_video, load_pipeline, move_pipeline, step_bytes, to_base
from ..validation.tuned import Tuned, find_tuned

_VIDEOS = "generated videos"  # what made the files of a folder


def run(settings: GenerateSettings) -> None:
    """Generate, write the files, and say where they are.

    Raises:
        SettingError, ModelError, RunError: the options do not go together, or weights are missing.
    """
    tuned = find_tuned(settings.run, settings.lora, settings.transformer, settings.model)
    checkpoint = tuned.checkpoint
    request = _request(settings, tuned)
    device = pick_device()
    precision = settings.precision or default_precision(checkpoint.family, device)
    fps = settings.fps or float(checkpoint.family.fps)
    asked = request_text(settings, tuned, request, fps, precision)
    folder = settings.out or default_folder(settings, asked)
    before = check_own_folder(folder, _VIDEOS, "--out")
    if before and before.request != asked:
        raise SettingError(
            "this folder holds a video of another prompt, or of other settings or weights",
            where=f"--out {folder}",
            fix="--out with another folder, or leave it out: every prompt gets a folder of its own",
        )
    names = ["tuned.mp4", "contact-sheet.png", *(["base.mp4", "side-by-side.mp4"] if settings.base else [])]
    if before:
        before.refuse_foreign(*names)
    console = Console(stderr=settings.json)

    quiet_libraries()
    dtype = dtype_of(precision)
    step = step_bytes(checkpoint, request.resolution, request.guidance, dtype.itemsize)
    pipeline = load_pipeline(tuned, dtype)
    move_pipeline(pipeline, device, request.resolution, step)
    started = time.monotonic()
    with _progress(console, "tuned", settings.steps) as advance:
        columns = [Column("tuned", generate_video(pipeline, request, advance))]
    if settings.base:
        to_base(pipeline, tuned, dtype)
        move_pipeline(pipeline, device, request.resolution, step)
        with _progress(console, "base", settings.steps) as advance:
            columns.append(Column("base", generate_video(pipeline, request, advance)))
    seconds = time.monotonic() - started

    weights = tuned.lora_file or tuned.transformer_folder
    facts = (
        f"{weights} on {checkpoint.name}  ·  {request.resolution}  ·  {settings.steps} steps  ·  "
        f"guidance {settings.guidance:g}  ·  seed {settings.seed}  ·  {precision}"
    )
    with disk_errors(folder):
        made = take_output(folder, _VIDEOS, "--out", asked)
        files = _write(made, columns, fps)
        sheet = io.BytesIO()
        contact_sheet(request.prompt, facts, columns, fps).save(sheet, "PNG")
        files["contact sheet"] = made.commit_bytes("contact-sheet.png", sheet.getvalue())
    if settings.json:
        print(json_text({"files": {name: str(file) for name, file in files.items()}, "seconds": round(seconds, 1)}))
        return
    for name, file in files.items():
        console.print(f"{name:<14} {file}", soft_wrap=True)


def _write(made: Made, columns: list[Column], fps: float) -> dict[str, Path]:
    """The videos, each whole or not at all."""
    videos = {column.label: column.frames_FHWC for column in columns}
    if len(columns) > 1:
        videos["side by side"] = side_by_side(columns)
    files = {}
    for label, frames_FHWC in videos.items():
        with scratch_file(made.folder) as scratch:
            write_mp4(scratch, frames_FHWC, fps)
            files[label] = made.commit(scratch, f"{label.replace(' ', '-')}.mp4")
    return files


def _request(settings: GenerateSettings, tuned: Tuned) -> Request:
    if not settings.prompt.strip():
        raise SettingError("there is no prompt", where="--prompt", fix='--prompt "what the video shows"')
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
        try:
            upright = read_upright(settings.image)
        except BadImage as bad:
            raise SettingError(
                f"the image cannot be used: {bad}", where=str(settings.image), fix="--image FILE, a PNG or JPEG"
            ) from None
        # Scaled to cover and cut, as the encoder does; the pipeline alone would stretch it.
        image = scale_to_cover(upright, resolution.width, resolution.height)
    return Request(
        prompt=settings.prompt,
        image=image,
        resolution=resolution,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        text_tokens=int(checkpoint.transformer_config["max_text_seq_length"]),
        dynamic_guidance=not family.ddim,
    )


def request_text(settings: GenerateSettings, tuned: Tuned, request: Request, fps: float, precision: str) -> str:
    """All that a video depends on, weights and image by their content."""
    weights = tuned.lora_file or tuned.transformer_folder
    assert weights
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    image = None if settings.image is None else state_of(settings.image)
    asked = {
        "prompt": request.prompt, "image": image, "resolution": str(request.resolution), "steps": request.steps,
        "guidance": request.guidance, "seed": request.seed, "fps": fps, "precision": precision, "base": settings.base,
        "model": tuned.checkpoint.name, "weights": [state_of(file) for file in files],
    }  # fmt: skip
    return json.dumps(asked, ensure_ascii=False)


def default_folder(settings: GenerateSettings, asked: str) -> Path:
    """A folder of its own for each request, named after the prompt in whatever letters."""
    prompt = unicodedata.normalize("NFC", settings.prompt).lower()
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")[:40].rstrip("-")
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return (settings.run or Path()) / GENERATED / f"{words or 'video'}-{settings.seed}-{digest}"


@contextmanager
def _progress(console: Console, label: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; elsewhere ten plain lines."""
    if console.is_terminal:
        from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

        with Progress(*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn(),
                      console=console) as bar:  # fmt: skip
            task = bar.add_task(label, total=steps)
            yield lambda: bar.advance(task)
        return
    done, started = 0, time.monotonic()

    def advance() -> None:
        nonlocal done
        done += 1
        if done % max(1, steps // 10) == 0 or done == steps:
            console.print(f"{label}: step {done}/{steps}, {(time.monotonic() - started) / done:.2f} s/step")

    yield advance
