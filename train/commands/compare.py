"""`cogtrain compare`: checkpoints of a run beside one another and the base model, of one seed, at several strengths.

The text encoder and the VAE are loaded once, and so is the base model; the LoRAs of all checkpoints hang on it at the
same time. Full fine-tuning has another transformer for each checkpoint.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import RunError, SettingError
from cogcommon.files.atomic import scratch_file
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import check_own_folder, state_of, take_output
from cogcommon.media.video import write_mp4
from cogcommon.model.device import default_precision, dtype_of, pick_device, quiet_libraries

from ..data.prompts import named_after
from ..model.method import Lora, Method, method_of, of_checkpoint
from ..report.renew import renew_report
from ..report.sheet import Column, contact_sheet, grid
from ..runs.checkpoint import checkpoint_name, find_checkpoint, list_checkpoints, step_of
from ..runs.folder import COMPARED, SHEET_FILE, RecordedRun, lowest, open_base, read_run, trained_settings
from ..settings import CompareSettings, GenerateSettings
from ..validation.pipeline import Request, generate_video, move_pipeline, pipeline_of, step_bytes
from ..validation.tuned import Tuned
from . import generate

if TYPE_CHECKING:
    import torch

_COMPARISON = "a comparison of checkpoints"  # what made the files of a folder
_GRID = "grid.mp4"


@dataclass(frozen=True)
class Cell:
    """The weights of one video: of a step, acting with a strength; step 0 is the base model."""

    step: int
    strength: float = 1.0
    label: str = "base model"


@dataclass
class _Asked:
    """A prompt, where its files go, and its videos as they are drawn."""

    request: Request
    text: str  # all that they depend on
    folder: Path
    drawn: dict[Cell, Column] = field(default_factory=dict)


def run(settings: CompareSettings) -> None:
    """Draw, write the files, and say where they are.

    Raises:
        SettingError, RunError, ModelError: the options do not go together, or there is no such run or checkpoint.
    """
    if settings.run is None:
        raise SettingError("no run was named", where="RUN", fix="cogtrain compare RUN --prompt ...")
    recorded = read_run(settings.run)
    full = recorded.facts.method == "sft"
    method = method_of(trained_settings(settings.run, recorded.facts.method))
    steps, strengths = _steps(settings, recorded), _strengths(settings, full)
    rows = layout(steps, strengths)
    cells = [Cell(0), *(cell for row in rows for cell in row if cell and cell.step)]
    checkpoint = open_base(settings.model, recorded.facts.model, recorded.facts.revision, settings.run)
    tuned = Tuned(checkpoint, (), None, recorded.facts.size)
    device = pick_device()
    precision = settings.precision or default_precision(checkpoint.family, device)
    fps = settings.fps or float(checkpoint.family.fps)
    asked = list(_asked(settings, tuned, cells, precision, fps))
    console = Console(stderr=settings.json)
    for note in generate.cut_texts([one.request for one in asked], checkpoint):
        console.print(f"note: {note}", soft_wrap=True)

    quiet_libraries()
    started = time.monotonic()
    with stage("loading the model"):
        pipeline = _Pipeline(settings.run, method, tuned, dtype_of(precision), device, asked[0].request, steps)
    number = 0
    for cell in cells:
        with stage(f"preparing {cell.label}"):
            pipeline.use(cell)
        for one in asked:
            number += 1
            label = f"video {number}/{len(cells) * len(asked)}, {cell.label}"
            with stage(label, settings.steps, "step") as bar:
                one.drawn[cell] = Column(cell.label, generate_video(pipeline.pipeline, one.request, bar.advance))
    facts = (
        f"{settings.run} on {checkpoint.name}  ·  {asked[0].request.resolution}  ·  {settings.steps} steps  ·  "
        f"guidance {settings.guidance:g}  ·  seed {settings.seed}  ·  {precision}"
    )
    with stage("writing the grids"):
        files = [_write(one, rows, facts, fps) for one in asked]
    seconds = round(time.monotonic() - started, 1)
    if settings.json:
        told = [{"prompt": one.request.prompt, "files": found} for one, found in zip(asked, files, strict=True)]
        print(json_text({"videos": told, "seconds": seconds}))
    for one, found in [] if settings.json else zip(asked, files, strict=True):
        console.print(one.request.prompt, soft_wrap=True)
        for name, file in found.items():
            console.print(f"{name:<14} {file}", soft_wrap=True)
    renew_report(settings.run, [one.folder for one in asked], partial(console.print, soft_wrap=True))


def layout(steps: Sequence[int], strengths: Sequence[float]) -> list[list[Cell | None]]:
    """Rows of cells: a column a step and a row a strength, or a column a strength where there is one step.

    The base model comes first, once; there is nothing below it.
    """
    names = {strength: f" at {strength:g}" if len(strengths) > 1 or strength != 1 else "" for strength in strengths}
    rows = [[Cell(step, strength, f"step {step:,}{names[strength]}") for step in steps] for strength in strengths]
    if len(steps) == 1:
        rows = [[cell for row in rows for cell in row]]
    return [[Cell(0) if number == 0 else None, *row] for number, row in enumerate(rows)]


class _Pipeline:
    """The diffusers pipeline, in which the weights of one cell at a time act."""

    def __init__(
        self, run: Path, method: Method, tuned: Tuned, dtype: torch.dtype, device: torch.device, request: Request,
        steps: Sequence[int],
    ) -> None:  # fmt: skip
        self._run, self._method, self._tuned, self._dtype = run, method, tuned, dtype
        self._device, self._request, self._step = device, request, 0
        checkpoint = tuned.checkpoint
        checkpoint.check_weights("text_encoder", "vae")
        self.pipeline: Any = pipeline_of(checkpoint, checkpoint.load_transformer(dtype), dtype)
        if isinstance(method, Lora):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the one before it
                for step in steps:
                    self.pipeline.load_lora_weights(
                        method.file_of(run / checkpoint_name(step)), adapter_name=_name(step)
                    )
        self._move()

    def use(self, cell: Cell) -> None:
        if isinstance(self._method, Lora):
            if cell.step:
                self.pipeline.enable_lora()
                self.pipeline.set_adapters([_name(cell.step)], [cell.strength])
            else:
                self.pipeline.disable_lora()
        elif cell.step != self._step:
            self._step = cell.step
            self.pipeline.remove_all_hooks()
            self.pipeline.transformer = None  # first let the other one go
            kept = self._run / checkpoint_name(cell.step)
            transformer = of_checkpoint(self._method, self._tuned.checkpoint, kept, self._dtype)
            self.pipeline.register_modules(transformer=transformer.requires_grad_(False).eval())
            self._move()

    def _move(self) -> None:
        request = self._request
        step = step_bytes(self._tuned.checkpoint, request.resolution, request.guidance, self._dtype.itemsize)
        move_pipeline(self.pipeline, self._device, request.resolution, step)


def _name(step: int) -> str:
    """Of a checkpoint's adapters."""
    return f"step-{step}"


def _steps(settings: CompareSettings, run: RecordedRun) -> list[int]:
    """The steps of --checkpoints, each of which there is, in order."""
    there = [step_of(path) for path in list_checkpoints(run.folder)]
    if not there:
        raise RunError("the run has no checkpoint yet", where=str(run.folder), fix="let it come to its first one")
    best = lowest([line for line in run.validations if line.step in there])
    named = {"last": there[-1], **({"best": best.step} if best else {})}
    found = set()
    for word in (settings.checkpoints or ",".join(map(str, there))).split(","):
        step = named.get(word.strip()) or (int(word) if word.strip().isdecimal() else 0)
        if step not in there:
            needs = "; best needs a run with --validate-shards, and a checkpoint of a step that was validated"
            raise SettingError(
                f"there is no checkpoint {word.strip()!r}",
                where=f"--checkpoints {settings.checkpoints}",
                fix=f"some of {', '.join(map(str, there))}, {', '.join(named)}; --keep says how many a run keeps"
                + needs * (word.strip() == "best"),
            )
        found.add(step)
    return sorted(found)


def _strengths(settings: CompareSettings, full: bool) -> list[float]:
    if full and settings.strengths != "1":
        raise SettingError(
            "full fine-tuning has no strength: its weights are the model's own",
            where=f"--strengths {settings.strengths}",
            fix="leave it out",
        )
    try:
        found = sorted({float(word) for word in settings.strengths.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < strength <= 10 for strength in found):
        raise SettingError(
            "these are no strengths", where=f"--strengths {settings.strengths}", fix="as --strengths 0.6,0.8,1"
        )
    return found


def _asked(
    settings: CompareSettings, tuned: Tuned, cells: Sequence[Cell], precision: str, fps: float
) -> Iterator[_Asked]:
    """What is drawn for each prompt; a folder that is not ours, or holds another comparison, is refused."""
    assert settings.run
    kept = {str(step): find_checkpoint(settings.run / checkpoint_name(step)).state.identity
            for step in sorted({cell.step for cell in cells} - {0})}  # fmt: skip
    shared = {
        "image": None if settings.image is None else state_of(settings.image), "steps": settings.steps,
        "guidance": settings.guidance, "seed": settings.seed, "fps": fps, "precision": precision,
        "model": tuned.checkpoint.name, "checkpoints": kept,
        "strengths": sorted({cell.strength for cell in cells if cell.step}),
    }  # fmt: skip
    wanted = GenerateSettings(
        prompt=settings.prompt, image=settings.image, resolution=settings.resolution, steps=settings.steps,
        guidance=settings.guidance, seed=settings.seed,
    )  # fmt: skip
    for request in generate.requests_of(wanted, tuned):
        text = json.dumps(
            {"prompt": request.prompt, "resolution": str(request.resolution), **shared}, ensure_ascii=False
        )
        folder = (settings.out or settings.run / COMPARED) / named_after(request.prompt, settings.seed, text)
        if before := check_own_folder(folder, _COMPARISON, "--out"):
            before.refuse_foreign(_GRID, SHEET_FILE)
        yield _Asked(request, text, folder)


def _write(one: _Asked, rows: Sequence[Sequence[Cell | None]], facts: str, fps: float) -> Mapping[str, str]:
    """The grid and the sheet, each whole or not at all."""
    columns = [one.drawn[cell] for cell in sorted(one.drawn, key=lambda cell: (cell.step, cell.strength))]
    shown = [[one.drawn[cell] if cell else None for cell in row] for row in rows]
    with disk_errors(one.folder):
        made = take_output(one.folder, _COMPARISON, "--out", one.text)
        with scratch_file(made.folder) as scratch:
            write_mp4(scratch, grid(shown), fps)
            video = made.commit(scratch, _GRID)
        sheet = io.BytesIO()
        contact_sheet(one.request.prompt, facts, columns, fps).save(sheet, "PNG")
        picture = made.commit_bytes(SHEET_FILE, sheet.getvalue())
    return {"grid": str(video), "contact sheet": str(picture)}
