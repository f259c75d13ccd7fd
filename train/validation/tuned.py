"""Finds tuned weights: in a run folder, LoRA files, or a transformer folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.errors import RunError, SettingError
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Resolution

from ..model import lora, sft
from ..model.lora_file import base_of, lora_in
from ..runs.folder import FACTS_FILE, open_base, read_settings, run_facts


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA file, and how strongly it acts; 1: as it was trained."""

    file: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return str(self.file) if self.strength == 1 else f"{self.file} at {self.strength:g}"


@dataclass(frozen=True)
class Tuned:
    """Tuned weights and the checkpoint they belong to."""

    checkpoint: Checkpoint
    loras: tuple[AppliedLora, ...]  # these, or a transformer
    transformer_folder: Path | None
    resolution: Resolution  # the run's, of its most samples; else the checkpoint's own

    def __str__(self) -> str:
        return ", ".join(map(str, self.loras)) or str(self.transformer_folder)


def find_tuned(
    run: Path | None, loras: Sequence[str], transformer: Path | None, model: str | None, strength: float = 1.0
) -> Tuned:
    """Find the weights that exactly one of the three names.

    Args:
        run: a run folder with its export.
        loras: LoRA files, or folders with one each, as `applied_lora` reads them.
        transformer: a diffusers ``transformer`` folder.
        model: the base checkpoint; else what the run or the first file that knows says.
        strength: of the run's LoRA.

    Raises:
        SettingError: none or several were given, or a strength where there is none to set.
        RunError: nothing to use there.
        ModelError: a file is missing, or the base checkpoint cannot be had.
    """
    given = [flag for flag, path in (("--run", run), ("--lora", loras), ("--transformer", transformer)) if path]
    if len(given) != 1:
        raise SettingError(
            "no tuned weights were named" if not given else "tuned weights were named twice",
            where=" and ".join(given) or "--run, --lora, --transformer",
            fix="give one of --run RUN, --lora FILE (again for more), --transformer DIR",
        )
    applied = tuple(applied_lora(word) for word in loras)
    trained: str | None = None
    revision, said_by = None, run or transformer
    facts = run_facts(run) if run and (run / FACTS_FILE).exists() else None
    if run:
        trained, revision = read_settings(run).get("model"), facts.revision if facts else None
        applied = (AppliedLora(run / lora.FILE, strength),) if (run / lora.FILE).is_file() else ()
        transformer = run / sft.FOLDER if (run / sft.FOLDER / "config.json").is_file() else None
        if not applied and not transformer:
            raise RunError(
                "the run has no exported weights yet",
                where=str(run),
                fix="let it finish, or export a checkpoint: `cogtrain export --run RUN/checkpoint-N`",
            )
    elif applied:
        trained, revision = next((found for one in applied if (found := base_of(one.file))[0]), (None, None))
        said_by = applied[0].file
    elif transformer and not (transformer / "config.json").is_file():
        raise RunError("not a transformer folder", where=str(transformer), fix="--transformer RUN/transformer")
    if strength != 1 and not (run and applied and math.isfinite(strength)):
        raise SettingError(
            "it says how strongly the LoRA of a --run acts",
            where=f"--strength {strength:g}",
            fix="--lora FILE=0.8 for a file; weights of full fine-tuning have none",
        )
    if not (model or trained):
        raise SettingError(
            "the base model is not known: these weights do not say it",
            where=", ".join(map(str, applied)) or str(transformer),
            fix="--model NAME, the checkpoint that they were trained on",
        )
    checkpoint = open_base(model, trained or "", revision, said_by or Path())
    trained_at = facts.size if facts else checkpoint.native
    return Tuned(checkpoint, applied, None if applied else transformer, trained_at)


def applied_lora(word: str) -> AppliedLora:
    """A LoRA as it is typed: ``FILE``, or ``FILE=0.8``. A file that has just this name is meant first.

    Raises:
        ModelError: no such file.
        SettingError: the strength is no number.
    """
    name, equals, number = word.rpartition("=")
    if equals and not Path(word).exists():
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise SettingError(f"{number!r} is no strength", where=f"--lora {word}", fix=f"--lora {name}=0.8")
        return AppliedLora(lora_in(Path(name)), strength)
    return AppliedLora(lora_in(Path(word)))
