"""Finds tuned weights: in a run folder, a LoRA file, or a transformer folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcommon.errors import RunError, SettingError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.families import Resolution

from ..model import lora, sft
from ..model.lora_file import read_facts
from ..runs.folder import FACTS_FILE, read_run, read_settings


@dataclass(frozen=True)
class Tuned:
    """Tuned weights and the checkpoint they belong to."""

    checkpoint: Checkpoint
    lora_file: Path | None  # one of the two
    transformer_folder: Path | None
    resolution: Resolution  # the run's, of its most samples; else the checkpoint's own


def find_tuned(run: Path | None, lora_file: Path | None, transformer: Path | None, model: str | None) -> Tuned:
    """Find the weights that exactly one of the three names.

    Args:
        run: a run folder with its export.
        lora_file: a LoRA file, or a folder with one.
        transformer: a diffusers ``transformer`` folder.
        model: the base checkpoint; else what the run or the file says.

    Raises:
        SettingError: none or several were given.
        RunError: nothing to use there.
        ModelError: the base checkpoint cannot be had.
    """
    given = [flag for flag, path in (("--run", run), ("--lora", lora_file), ("--transformer", transformer)) if path]
    if len(given) != 1:
        raise SettingError(
            "no tuned weights were named" if not given else "tuned weights were named twice",
            where=" and ".join(given) or "--run, --lora, --transformer",
            fix="give one of --run RUN, --lora FILE, --transformer DIR",
        )
    revision = None
    given_model = model
    if run:
        model = model or read_settings(run).get("model")
        lora_file = run / lora.FILE if (run / lora.FILE).is_file() else None
        transformer = run / sft.FOLDER if (run / sft.FOLDER / "config.json").is_file() else None
        if not lora_file and not transformer:
            raise RunError(
                "the run has no exported weights yet",
                where=str(run),
                fix="let it finish, or export a checkpoint: `cogtrain export --run RUN/checkpoint-N`",
            )
    elif lora_file:
        lora_file = lora_file / lora.FILE if lora_file.is_dir() else lora_file
        if not lora_file.is_file():
            raise RunError("no such file", where=str(lora_file), fix=f"--lora RUN/{lora.FILE}")
        facts = read_facts(lora_file)
        model, revision = model or facts.get("base_model"), None if model else facts.get("revision")
    elif transformer and not (transformer / "config.json").is_file():
        raise RunError("not a transformer folder", where=str(transformer), fix="--transformer RUN/transformer")
    if not model:
        raise SettingError(
            "the base model is not known: these weights do not say it",
            where=str(lora_file or transformer),
            fix="--model NAME, the checkpoint that they were trained on",
        )
    checkpoint = open_checkpoint(model, revision or None, named_by=None if given_model else str(run or lora_file))
    trained_at = _resolution_of(run) if run else None
    return Tuned(checkpoint, lora_file, None if lora_file else transformer, trained_at or checkpoint.native)


def _resolution_of(run: Path) -> Resolution | None:
    if not (run / FACTS_FILE).exists():
        return None
    samples = read_run(run).facts.samples
    return Resolution.parse(max(samples, key=lambda bucket: samples[bucket]))
