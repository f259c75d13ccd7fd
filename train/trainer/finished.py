"""A finished run that is started again: whether its end is whole on the disk, and stays as it is."""

from __future__ import annotations

from pathlib import Path

from cogcommon.cli.names import command_line
from cogcommon.errors import CogError
from cogcommon.files.ownership import Made
from cogcommon.words import counted

from ..distributed.peers import Peers
from ..model.lora_file import read_facts
from ..runs.checkpoint import checkpoint_name
from ..runs.config import write_config
from ..runs.folder import CARD_FILE, CONFIG_FILE, REPORT_FILE, exported_weights, run_facts
from ..runs.log import RunLog
from ..runs.run import Run
from ..validation.validate import Validation
from . import announce
from .best import Best


def exported_before(run: Run, folder: Path, done: int) -> int:
    """The step whose weights a finished run has exported, where all of its end is there; 0: it is to be made (again).

    Args:
        done: the last step, after which nothing is left to train.
    """
    if not run.nothing_left or run.resume is None or run.resume.folder.parent.resolve() != folder.resolve():
        return 0
    try:
        facts = run_facts(folder)
        if done != (facts.exported if facts.finished is None else facts.finished) or not facts.exported:
            return 0
        weights = exported_weights(folder)
        if weights is None or not all((folder / name).is_file() for name in (CONFIG_FILE, CARD_FILE, REPORT_FILE)):
            return 0
        if weights.is_file():
            whole = read_facts(weights).get("steps") == str(facts.exported)
        else:
            made = Made.read(weights)
            whole = made is not None and all((weights / name).is_file() for name in made.files)
        return facts.exported if whole else 0
    except (CogError, OSError):
        return 0


def stays(run: Run, folder: Path, peers: Peers, validation: Validation | None, exported: int, log: RunLog) -> int:
    """Say of a finished run that it stays as it is, where there is nothing new to say; every rank calls it.

    Its files decide it: the model need not be loaded.

    Args:
        exported: the step whose weights lie there.

    Returns:
        That step; 0: there is something new, and the settings of now are the run's.
    """
    assert run.resume
    best = Best.of(run.settings, folder, peers, validation)
    # Before it was stopped, the run may have had no time to validate its last step.
    if not (validation and validation.lacks(run.resume.state.step, best.lines)):
        line = best.line
        if line is None or line.step == exported:
            _say(run, log, folder, exported, best)
            return exported
        log.say(f"note: --keep-best exports step {line.step:,} ({line}) in the place of step {exported:,}")
    peers.together(lambda: write_config(run, folder) if peers.main else None)
    return 0


def _say(run: Run, log: RunLog, folder: Path, exported: int, best: Best) -> None:
    assert run.resume
    facts, done = run_facts(folder), run.resume.state.step
    announce.beginning(run, log, folder, facts.trainable, [], kept=True)
    if facts.ended:
        log.say(f"ended after step {done:,} of {facts.steps:,}: {facts.ended}; a larger --patience goes on")
    chosen = f"step {exported:,} of {done:,}" if exported != done else f"step {done:,}"
    if best.line:
        chosen += f", the lowest loss of {counted(len(best.lines), 'validation')}"
    other = command_line("cogtrain", "export", "--run", folder / checkpoint_name(done))
    log.say(f"{exported_weights(folder)} and all that the run says of itself stay as they are ({chosen})")
    log.say(f"weights of a checkpoint, or in another form: {other} --to diffusers")
