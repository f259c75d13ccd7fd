"""Whether a built-in form still learns: the commands that teach it a motion, as a user would type them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cogcommon.model.checkpoint import open_checkpoint

from ..draw import write_data_set
from .exam import motion_for

NEW, KNOWN = 28, 72  # clips
LORA = "lora --rank 64 --lr 2e-3"
CASES = {
    "tiny": LORA,
    "tiny-i2v": LORA,
    "tiny-1.5": "lora --rank 64 --lr 6e-3",  # at 2e-3 it learns two thirds of the motion in so few steps
    "tiny-1.5-i2v": "lora --rank 64 --lr 4e-3",  # at 2e-3 four fifths of it
    "tiny by sft": "sft --lr 3e-4 --strategy ddp",
}


def lessons(
    folder: Path, form: str, method: str, *, new: int = NEW, known: int = KNOWN, steps: int = 360, seed: int = 42
) -> Iterator[list[str]]:
    """Draw clips of the new motion and known ones; then the commands, run in ``folder``, that make ``folder/run``.

    They are encoded each by themselves and trained on together.
    """
    write_data_set(folder / "new", new, seed=0, new=motion_for(open_checkpoint(form).family))
    if known:
        write_data_set(folder / "known", known, seed=0)
    encode = f"cogprep encode --resolution 17x64x96 --model {form}"
    yield f"{encode} --data-root new --holdout 4 --out shards/new".split()
    if known:
        yield f"{encode} --data-root known --out shards/known".split()
    yield (
        f"cogtrain {method} --shards shards/*/*.tar --validate-shards shards/new/val/*.tar --validate-every {steps} "
        f"--steps {steps} --batch-size 4 --lr-schedule cosine --ema 0.98 --timesteps stratified --seed {seed} "
        "--out run"
    ).split()


def method_of(case: str, lr: float | None = None) -> str:
    """What teaches a case: words of ``cogtrain``, with this learning rate if told."""
    words = CASES[case].split()
    if lr is not None:
        words[words.index("--lr") + 1] = f"{lr:g}"
    return " ".join(words)


def teach(folder: Path, case: str, lr: float | None = None) -> Path:
    """The run folder of a case, taught by processes of their own.

    Args:
        lr: learning rate; the case's unless told.

    Raises:
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    folder.mkdir(parents=True)
    for program, *words in lessons(folder, case.split()[0], method_of(case, lr)):
        subprocess.run([sys.executable, "-m", program, *words], cwd=folder, check=True)
    return folder / "run"
