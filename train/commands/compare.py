"""`cogtrain compare`: checkpoints of a run beside one another and the base model, of one seed, at several strengths.

The text encoder and the VAE are loaded once, and so is the base model; the LoRAs of all checkpoints hang on it at the
same time. Full fine-tuning has another transformer for each checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import quoted
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import RunError, SettingError
from cogcommon.files.ownership import refuse_data_root, state_of
from cogcommon.libraries import quiet_libraries
from cogcommon.media.video import read_mp4
from cogcommon.model.device import default_precision, dtype_of, pick_device
from cogcommon.words import counted

from ..data.prompts import given_twice, named_after, read_prompts
from ..model.method import Lora, Method, method_of, of_checkpoint
from ..report.renew import renew_report
from ..report.sheet import Column, grid
from ..report.videos import SHEET, VideoFolder, file_name
from ..runs.checkpoint import checkpoint_name, find_checkpoint, list_checkpoints, run_and_checkpoint, step_of
from ..runs.folder import COMPARED, SHEET_FILE, RecordedRun, lowest, open_base, read_run, trained_settings
from ..settings.results import CompareSettings, GenerateSettings
from ..validation.pipeline import Request, generate_video, move_pipeline, pipeline_of, step_bytes
from ..validation.tuned import Tuned
from . import generate

if TYPE_CHECKING:
    import torch

_COMPARISON = "a comparison of checkpoints"  # what made the files of a folder
_GRID = "grid"


@dataclass(frozen=True)
class Cell:
    """The weights of one video: of a step, acting with a strength; step 0 is the base model."""

    step: int
    strength: float = 1.0
    label: str = "base model"

    @property
    def name(self) -> str:
        """Of its video's file, in words."""
        return self.label.replace(",", "")


class _Asked(VideoFolder):
    """What is drawn for a prompt.

    Attributes:
        left: cells whose videos are not there yet; all of them where everything is.
    """

    def __init__(self, request: Request, asked: str, folder: Path, fps: float, cells: Sequence[Cell]) -> None:
        super().__init__(folder, _COMPARISON, asked, fps)
        self.request = request
        files = {cell: file_name(cell.name) for cell in cells}
        made = self.made_before(file_name(_GRID), SHEET_FILE, *files.values())
        left = [cell for cell in cells if not (made and made.owns(files[cell]))]
        whole = not left and made and made.owns(file_name(_GRID)) and made.owns(SHEET_FILE)
        self.left = list(cells) if whole else left

    def finish(self, rows: Sequence[Sequence[Cell | None]], facts: str) -> Mapping[str, Path]:
        """Write the grid and the sheet, of the videos as they are there; what there is now, by names in words."""
        cells = sorted({cell for row in rows for cell in row if cell}, key=lambda cell: (cell.step, cell.strength))
        columns = {cell: Column(cell.label, read_mp4(self.folder / file_name(cell.name))) for cell in cells}
        self.add(_GRID, grid([[columns[cell] if cell else None for cell in row] for row in rows]))
        self.add_sheet(self.request.prompt, facts, list(columns.values()))
        return {_GRID: self.files[_GRID], SHEET: self.files[SHEET], "each video": self.folder}


def run(settings: CompareSettings) -> None:
    """Draw, write the files, and say where they are.

    Raises:
        SettingError, RunError, ModelError: the options do not go together, or there is no such run or checkpoint.
    """
    if settings.run is None:
        raise SettingError("no run was named", where="RUN", fix="cogtrain compare RUN --prompt ...")
    settings = _named(settings, settings.run)
    assert settings.run
    recorded = read_run(settings.run)
    full = recorded.facts.method == "sft"
    trained = trained_settings(settings.run, recorded.facts.method)
    method = method_of(trained)
    steps, strengths = _steps(settings, recorded), _strengths(settings, full)
    rows = layout(steps, strengths)
    cells = [Cell(0), *(cell for row in rows for cell in row if cell and cell.step)]
    trained_on = recorded.facts
    checkpoint = open_base(settings.model, trained_on.model, trained_on.revision, settings.run, trained_on.family)
    tuned = Tuned(checkpoint, (), None, trained_on.sizes, id_token=trained_on.id_token)
    device = pick_device()
    precision = settings.precision or default_precision(checkpoint.family, device)
    fps = settings.fps or float(checkpoint.family.fps)
    watched_by = trained.validate_prompt, trained.validate_prompts
    if any(watched_by) and not (settings.prompt or settings.prompts):
        prompts = read_prompts(*watched_by, "--validate-prompt")
    else:
        prompts = read_prompts(settings.prompt, settings.prompts, once=False)  # once: the file may be a pipe
    asked = list(_asked(dataclasses.replace(settings, prompt=prompts), tuned, cells, precision, fps))
    console = Console(stderr=settings.json)
    notes = generate.notes_on([one.request for one in asked], tuned)
    for note in [*given_twice(prompts), *notes]:
        console.print(f"note: {note}", soft_wrap=True)

    quiet_libraries()
    started = time.monotonic()
    if any(one.left for one in asked):
        with stage("loading the model"):
            pipeline = _Pipeline(settings.run, method, tuned, dtype_of(precision), device, asked[0].request, steps)
        _draw(pipeline, cells, asked, settings.steps)
    facts = (
        f"{settings.run} on {checkpoint.name}  ·  {asked[0].request.resolution}  ·  {settings.steps} steps  ·  "
        f"guidance {settings.guidance:g}  ·  seed {settings.seed}  ·  {precision}"
    )
    with stage("writing the grids"):
        told = [(one.request.prompt, one.finish(rows, facts)) for one in asked]
    generate.tell(told, round(time.monotonic() - started, 1), console, as_json=settings.json)
    renew_report(settings.run, [one.folder for one in asked], partial(console.print, soft_wrap=True))


def _named(settings: CompareSettings, named: Path) -> CompareSettings:
    """With the run, and where RUN/checkpoint-N was named with that checkpoint."""
    run, kept = run_and_checkpoint(named)
    if kept is None:
        return settings
    step = str(find_checkpoint(kept).state.step)
    if settings.checkpoints not in (None, step):
        raise SettingError(
            "checkpoints were named twice",
            where=f"RUN {named}, --checkpoints {settings.checkpoints}",
            fix=f"cogtrain compare {quoted(run)} --checkpoints {settings.checkpoints}",
        )
    return dataclasses.replace(settings, run=run, checkpoints=step)


def _draw(pipeline: _Pipeline, cells: Sequence[Cell], asked: Sequence[_Asked], steps: int) -> None:
    """Draw what is left, each of the weights once for all prompts, and write each video before the next."""
    number, total = 0, sum(len(one.left) for one in asked)
    try:
        for cell in cells:
            if not any(cell in one.left for one in asked):
                continue
            with stage(f"preparing {cell.label}"):
                pipeline.use(cell)
            for one in asked:
                if cell in one.left:
                    with stage(f"video {number + 1}/{total}, {cell.label}", steps, "step") as bar:
                        one.add(cell.name, generate_video(pipeline.pipeline, one.request, bar.advance))
                    number += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; {number} of {counted(total, 'video')} drawn; run the same command again to have the rest"
        ) from None


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
        guidance=settings.guidance, seed=settings.seed, fps=settings.fps,
    )  # fmt: skip
    if settings.out:
        refuse_data_root(settings.out, "--out")
    for request in generate.requests_of(wanted, tuned):
        text = json.dumps(
            {"prompt": request.prompt, "resolution": str(request.resolution), **shared}, ensure_ascii=False
        )
        folder = (settings.out or settings.run / COMPARED) / named_after(request.prompt, settings.seed, text)
        yield _Asked(request, text, folder, fps, cells)
