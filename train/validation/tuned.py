"""Finds tuned weights: in a run folder, LoRA files, or a transformer folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import quoted
from cogcommon.errors import RunError, SettingError
from cogcommon.files.ownership import state_of
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Resolution
from cogcommon.store.address import address_of

from ..model import sft
from ..model.lora_file import base_of, digest_of, lora_in
from ..model.method import Lora, Method, method_of
from ..runs.checkpoint import find_checkpoint, list_checkpoints, run_and_checkpoint, states_of
from ..runs.folder import FACTS_FILE, exported_weights, open_base, read_settings, run_facts, trained_settings


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
    sizes: Sequence[Resolution]  # the run's, that of its most samples first; else the checkpoint's own
    method: Method | None = None  # of the run, where a checkpoint-N of it stands for the LoRA file or the transformer
    step: int | None = None  # of the run's training, after which it had these weights; None: not known
    id_token: str = ""  # that stood before the captions of the run

    def __str__(self) -> str:
        return ", ".join(map(str, self.loras)) or str(self.transformer_folder)

    def states(self) -> list[str]:
        """What the weights are, by their content."""
        folder = self.transformer_folder
        return [state for one in ([folder] if folder else [one.file for one in self.loras]) for state in states_of(one)]


def find_tuned(
    run: Path | None, loras: Sequence[str], transformer: Path | None, model: str | None, strength: float = 1.0
) -> Tuned:
    """Find the weights that exactly one of the three names.

    Args:
        run: a run folder with its export, or a checkpoint-N in one.
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
    method, step = None, None
    run, kept = run_and_checkpoint(run) if run else (None, None)
    facts = run_facts(run) if run and (kept or (run / FACTS_FILE).exists()) else None
    if run and facts and kept:
        trained, revision = facts.model, facts.revision
        method = method_of(trained_settings(run, facts.method))
        applied = (AppliedLora(kept, strength),) if isinstance(method, Lora) else ()
        transformer = None if applied else kept
        step = find_checkpoint(kept).state.step
    elif run:
        trained, revision = read_settings(run).get("model"), facts.revision if facts else None
        weights = exported_weights(run)
        if not weights:
            raise _not_exported(run)
        applied = (AppliedLora(weights, strength),) if weights.is_file() else ()
        transformer = None if applied else weights
        step = facts.exported_step if facts else None
    elif applied:
        _refuse_twice(applied)
        trained, revision = next((found for one in applied if (found := base_of(one.file))[0]), (None, None))
        said_by = applied[0].file
    elif transformer and not (transformer / "config.json").is_file():
        inside = transformer / sft.FOLDER
        there = inside if (inside / "config.json").is_file() else f"RUN/{sft.FOLDER}"
        raise RunError("not a transformer folder", where=str(transformer), fix=f"--transformer {there}")
    if not math.isfinite(strength):
        raise SettingError(f"{strength:g} is no strength", where="--strength", fix="--strength 0.8")
    if strength != 1 and not (run and applied):
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
    checkpoint = open_base(model, trained or "", revision, said_by or Path(), facts.family if facts else None)
    trained_at = facts.sizes if facts else [checkpoint.native]
    token = facts.id_token if facts else ""
    return Tuned(checkpoint, applied, None if applied else transformer, trained_at, method, step, token)


def _not_exported(run: Path) -> RunError:
    kept = list_checkpoints(run)
    return RunError(
        "the run has no exported weights yet",
        where=f"--run {run}",
        fix=f"let it finish, or take its newest checkpoint: --run {quoted(kept[-1])}"
        if kept
        else "let it run on: it has no checkpoint either",
    )


def _refuse_twice(loras: Sequence[AppliedLora]) -> None:
    """Refuse one LoRA under two names, which would act twice; ``export`` writes such, and a shell's pattern finds both.

    Raises:
        SettingError: names both.
    """
    seen: dict[str, AppliedLora] = {}
    for one in loras:
        before = seen.setdefault(state_of(one.file), one)
        if before is not one and digest_of(before.file) == digest_of(one.file):
            both = f"{before.file}={before.strength + one.strength:g}"
            raise SettingError(
                "the same LoRA is given twice, and would act twice",
                where=f"--lora {before.file} {one.file}",
                fix=f"give it once; if its double strength is meant, as --lora {both}",
            )


def applied_lora(word: str) -> AppliedLora:
    """A LoRA as it is typed: ``FILE``, or ``FILE=0.8``. A file that has just this name is meant first.

    Raises:
        ModelError: no such file.
        SettingError: the strength is no number.
    """
    name, equals, number = word.rpartition("=")
    if not equals or Path(word).exists() or address_of(word) or not Path(name).exists():
        return AppliedLora(lora_in(Path(word)))
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise SettingError(f"{number!r} is no strength", where=f"--lora {word}", fix=f"--lora {name}=0.8")
    return AppliedLora(lora_in(Path(name)), strength)
