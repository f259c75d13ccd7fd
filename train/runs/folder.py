"""What lies in a run folder, and how to read it back: settings, facts, metrics.

::

    config.toml      every setting, resolved
    facts.json       what the run worked on: shards, counts, processes (`RunFacts`)
    metrics.jsonl    one line a step; validation lines carry val_loss
    epochs.json      what each epoch was over, with --follow
    mirror.json      whose copy --mirror keeps
    checkpoint-N/    to resume from
    validation/      videos: clips/ as they are stored, step-000000/ by the base model, step-N/; prompts/ embedded
    generated/       what `cogtrain generate` has drawn
    compared/        what `cogtrain compare` has
    report.html, README.md (the model card), and the export
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from cogcommon.cli.settings import resolve
from cogcommon.cli.settings_file import parse_toml
from cogcommon.errors import ModelError, RunError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.locks import locked_elsewhere
from cogcommon.files.near import folders_like
from cogcommon.files.ownership import is_file
from cogcommon.files.typed import build, parse_object
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.families import Resolution
from cogcommon.words import did_you_mean

from ..data.shard_set import usual_sizes
from ..distributed.snapshot import STATE_FILE
from ..model import lora, sft
from ..model.adapters import ADAPTERS
from ..settings import training
from ..settings.training import AdapterName, LoraSettings, SftSettings, TrainSettings

RUNS = Path("runs")  # where folders lie that nobody has named
CONFIG_FILE = "config.toml"
FACTS_FILE = training.FACTS_FILE
METRICS_FILE = "metrics.jsonl"
EPOCHS_FILE = "epochs.json"  # of a run with --follow (`follow`)
MIRROR_FILE = "mirror.json"  # of a run with --mirror (`mirror`): which run it is; in the mirror, what is there
VALIDATION = "validation"
CAPTIONS_FILE = "captions.json"  # in it, of the samples that are drawn
CLIPS = "clips"  # in it, those samples themselves
PROMPTS = "prompts"  # in it, a person's prompts: the embedding of each, and its first frame
PROMPTS_FILE = "prompts.json"  # in it, those prompts by the names of their files (`drawn_prompts`)
GENERATED = "generated"  # `cogtrain generate`: a folder a request
COMPARED = "compared"  # `cogtrain compare`: a folder a prompt
SHEET_FILE = "contact-sheet.png"  # in each folder of these two, written last
STOP_FILE = ".stop"  # asks the run to save and stop (`cogtrain watch`)
REPORT_FILE = "report.html"
CARD_FILE = "README.md"
LOCK_FILE = ".lock"
# What a run writes over, again and again. The card and the settings are people's to change, so they are not among it.
RUN_FILES = (FACTS_FILE, METRICS_FILE, EPOCHS_FILE, MIRROR_FILE, REPORT_FILE, VALIDATION, lora.FILE)
A_RUN, A_CHECKPOINT = "a training run", "a checkpoint"  # what made a folder's files


@dataclass(frozen=True)
class RunFacts:
    """What a run worked on, for its report and its model card. Written at the start, again at a resume."""

    model: str
    revision: str | None
    family: str
    task: str
    method: Literal["lora", "sft"]
    contract_fingerprint: str  # how the samples were encoded
    shards_fingerprint: str  # which samples they are
    shards: int
    samples: dict[str, int]  # by bucket
    held_out: int  # samples for validation
    steps: int  # planned
    processes: int
    global_batch: int
    strategy: str
    precision: str
    device: str  # in words
    trainable: int  # weights
    version: str
    plan: str = ""  # how the blocks were run, in words; newer than some runs, as what follows
    attention: str = ""  # by which kernel (`blocks.attention.Kernel`)
    block_plan: dict[str, Any] | None = None  # `BlockPlan.fields`
    adapter: AdapterName | None = None  # of a LoRA run
    id_token: str = ""  # that stands before every caption; newer than some shards, too
    begun: float = 0.0  # when its first step was about to be made, in seconds since 1970; 0: not known
    exported: int = 0  # the step whose weights lie in the run's folder; 0: none yet, or not known
    ended: str = ""  # why it has ended before its last step, if it has
    finished: int | None = None  # its last step, once all of that is exported and told; 0: not yet; None: not known
    samples_at_start: int = 0  # with --follow; `samples` are those of the newest epoch then
    started_by: list[str] = dataclasses.field(default_factory=list)  # launchers, and a job of Slurm (`runs.resuming`)

    @property
    def title(self) -> str:
        """What people call the method."""
        return ADAPTERS[self.adapter or "lora"].title if self.method == "lora" else "Full fine-tuning"

    @property
    def size(self) -> Resolution:
        """Of its most clips; of its most pictures where it has no clips."""
        return self.sizes[0]

    @property
    def sizes(self) -> list[Resolution]:
        """Of its clips, those of the most first; of its pictures where it has no clips."""
        return usual_sizes({Resolution.parse(bucket): count for bucket, count in self.samples.items()})

    @property
    def exported_step(self) -> int:
        """The step whose weights lie in the run's folder, once it has ended."""
        return self.exported or self.steps

    def write(self, run: Path) -> None:
        commit_bytes(run / FACTS_FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())


def report_head(facts: RunFacts) -> str:
    """How the page of a run begins; by this it is known to be one."""
    return page_head(f"{facts.title} of {facts.model}")


def page_head(title: str) -> str:
    """How a page begins, up to its style."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>"
    )


@dataclass(frozen=True)
class StepLine:
    """One optimizer step. Times in seconds, memory in GiB."""

    step: int
    epoch: int
    loss: float | None  # None, here and below: not finite
    lr: float
    grad_norm: float | None
    s_per_step: float
    samples_per_s: float
    peak_gib: float
    data_s: float = 0.0  # waiting for a batch; with the next three it makes s_per_step
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    compile_s: float = 0.0  # beside them, once a resolution
    kept_gib: float = 0.0  # of the GPU's memory, held between the forward and the backward pass


@dataclass(frozen=True)
class ValidationLine:
    """One validation. ``base_val_loss`` is the untouched base model's, on the same samples and noise."""

    step: int
    val_loss: float | None
    base_val_loss: float | None
    val_peak_gib: float = 0.0  # of memory held meanwhile
    best_step: int | None = None  # the step that `--keep-best` keeps, as it was then

    @property
    def change(self) -> float | None:
        """Per cent from the base model's loss; None where one of the two is not finite."""
        if self.val_loss is None or not self.base_val_loss:
            return None
        return 100 * (self.val_loss / self.base_val_loss - 1)

    def __str__(self) -> str:
        tuned, base = (loss_text(loss) for loss in (self.val_loss, self.base_val_loss))
        change = f" ({self.change:+.1f} %)" if self.change is not None else ""
        return f"held-out loss {tuned}, base model {base}{change}"


def embedding_file(run: Path, name: str) -> Path:
    """Where the embedding of a prompt is kept, by its name; its first frame lies beside it, as a PNG."""
    return run / VALIDATION / PROMPTS / f"{name}.safetensors"


def drawn_prompts(run: Path) -> dict[str, str]:
    """The prompts whose videos validation has made, by their names: those of now, then those of before."""
    try:
        found = parse_object((run / VALIDATION / PROMPTS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: str(prompt) for name, prompt in found.items() if not {"/", "\0"} & {*name}}


def drawn_step(folder: Path) -> int:
    """The step of a folder of validation's videos, by its name; -1 of any other folder."""
    match = re.fullmatch("step-([0-9]+)", folder.name)
    return int(match[1]) if match else -1


def loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def lowest(lines: Sequence[ValidationLine]) -> ValidationLine | None:
    """The validation with the lowest loss; of equal ones the first. None where no loss is finite."""
    finite_ones = [line for line in lines if line.val_loss is not None]
    return min(finite_ones, key=lambda line: line.val_loss or 0.0, default=None)


def ask_to_stop(run: Path) -> None:
    """Ask the process that trains in a folder to save and stop after its step, wherever it runs.

    Raises:
        RunError: none does.
    """
    if not locked_elsewhere(run / LOCK_FILE):
        raise RunError("no process trains in this folder", where=str(run))
    commit_bytes(run / STOP_FILE, b"")


def asked_to_stop(run: Path) -> bool:
    return is_file(run / STOP_FILE)


def forget_stop(run: Path) -> None:
    """Take back what `ask_to_stop` has asked: it is an empty file."""
    if asked_to_stop(run) and (run / STOP_FILE).stat().st_size == 0:
        (run / STOP_FILE).unlink(missing_ok=True)


def finite(value: float) -> float | None:
    """The number, or None for one that JSON cannot write (NaN, infinity)."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class RecordedRun:
    """A run folder, read."""

    folder: Path
    settings: Mapping[str, Any]
    facts: RunFacts
    steps: list[StepLine]
    validations: list[ValidationLine]

    @property
    def exported(self) -> int:
        """As `RunFacts.exported_step`."""
        return self.facts.exported_step

    def validation_at(self, step: int) -> ValidationLine | None:
        return next((line for line in self.validations if line.step == step), None)


def exported_weights(run: Path) -> Path | None:
    """What a run has exported into its folder: a LoRA file, or a transformer folder; None: nothing yet."""
    if (run / lora.FILE).is_file():
        return run / lora.FILE
    return run / sft.FOLDER if (run / sft.FOLDER / "config.json").is_file() else None


def read_settings(run: Path) -> Mapping[str, Any]:
    """The resolved settings of a run, or of the run that a checkpoint lies in.

    Raises:
        RunError: no run folder.
    """
    for folder in (run, *([run.absolute().parent] if (run / STATE_FILE).is_file() else [])):
        if (folder / CONFIG_FILE).is_file():
            try:
                return parse_toml((folder / CONFIG_FILE).read_bytes())
            except (OSError, ValueError) as error:
                raise RunError(
                    f"the settings of the run are damaged: {error}", where=str(folder / CONFIG_FILE)
                ) from error
    raise RunError(
        f"not a run folder: there is no {CONFIG_FILE}" if run.is_dir() else "there is no such run or checkpoint",
        where=str(run),
        fix=did_you_mean(folders_like(run, _is_one), "give the folder of a run, or a checkpoint-N that is in it"),
    )


def _is_one(folder: Path) -> bool:
    """Whether a folder is a run's, or a checkpoint's."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, FACTS_FILE)) or (folder / STATE_FILE).is_file()


def trained_settings(folder: Path, method: Literal["lora", "sft"]) -> TrainSettings:
    """The settings of a run as the command line takes them.

    Raises:
        SettingError: they are none that this version knows.
    """
    cls = LoraSettings if method == "lora" else SftSettings
    return resolve(cls, {}, folder / CONFIG_FILE, command=f"cogtrain {method}")


def open_base(named: str | None, trained: str, revision: str | None, said_by: Path, family: str | None) -> Checkpoint:
    """The checkpoint that tuned weights go on.

    Args:
        named: by --model, which counts before all else.
        trained: the one that they were trained on, as the run or their file says, and its revision.
        said_by: the run or the file, for messages.
        family: whose weights they are; None: not known.

    Raises:
        ModelError: it cannot be had, or is of another family.
    """
    found = open_checkpoint(named) if named else open_checkpoint(trained, revision or None, named_by=str(said_by))
    if family not in (None, found.family.name):
        raise ModelError(
            f"these weights were trained for {family}, and {found.name} is {found.family.name}",
            where=str(said_by),
            fix="leave --model out, or give the one that they were trained on",
        )
    return found


def run_facts(run: Path) -> RunFacts:
    """The facts in a run's folder.

    Raises:
        RunError: they are missing, or damaged.
    """
    try:
        return build(RunFacts, parse_object((run / FACTS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"the facts of the run are missing or damaged: {getattr(error, 'strerror', None) or error}",
            where=str(run / FACTS_FILE),
            fix="give the folder of a run, not one that lies in it; a run that stopped at its start begins anew",
        ) from error


def read_run(run: Path) -> RecordedRun:
    """Read everything but weights.

    Raises:
        RunError: no run folder, or a damaged one.
    """
    settings, facts = read_settings(run), run_facts(run)
    steps, validations = read_metrics(run / METRICS_FILE)
    return RecordedRun(run, settings, facts, steps, validations)


def read_metrics(path: Path) -> tuple[list[StepLine], list[ValidationLine]]:
    """Steps and validations in order. Of a step that was repeated after a resume the last line counts.

    A last line cut short by a kill is passed over.
    """
    steps: dict[int, StepLine] = {}
    validations: dict[int, ValidationLine] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
            if "val_loss" in values:
                validations[values["step"]] = _pick(ValidationLine, values)
            else:
                steps[values["step"]] = _pick(StepLine, values)
        except (ValueError, KeyError):
            continue
    return [steps[n] for n in sorted(steps)], [validations[n] for n in sorted(validations)]


def _pick(cls: Any, values: Mapping[str, Any]) -> Any:
    # A field with a default may be newer than the run.
    needed = [f.name for f in dataclasses.fields(cls) if f.name in values or f.default is dataclasses.MISSING]
    return cls(**{name: values[name] for name in needed})
