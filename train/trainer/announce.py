"""What a run prints at its start and its end, and the facts it writes into its folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon import __version__
from cogcommon.cli.names import command_line
from cogcommon.errors import CogError
from cogcommon.store.store import FAULTS
from cogcommon.words import counted

from ..blocks.attention import Kernel
from ..blocks.plan import BlockPlan
from ..distributed.strategy import Runtime
from ..model.method import Exported
from ..runs.checkpoint import ASIDE, checkpoint_name, set_aside
from ..runs.folder import REPORT_FILE, RunFacts, ValidationLine, loss_text, lowest, run_facts
from ..runs.log import RunLog
from ..runs.run import Run
from .best import Best

if TYPE_CHECKING:
    import torch


def beginning(
    run: Run, log: RunLog, folder: Path, trainable: int, abandoned: Sequence[str], *, kept: bool = False
) -> None:  # fmt: skip
    """The first lines.

    Args:
        abandoned: names of checkpoints of steps that are made again.
        kept: the run has finished, and nothing of it is to be written.
    """
    waiting = {path.name for path in set_aside(folder)}
    if aside := [name for name in abandoned if name in waiting]:
        log.say(f"set aside in {folder / ASIDE} until there is a new checkpoint: {', '.join(aside)}")
    if removed := [name for name in abandoned if name not in waiting]:
        log.say(f"removed {', '.join(removed)}: their steps are made again")
    log.say(
        f"{run.method.name} of {run.checkpoint.name} ({run.checkpoint.family.name}): {trainable:,} weights trained, "
        f"{run.precision}, {run.strategy}, {counted(run.world, 'process', 'processes')}"
    )
    buckets = ", ".join(str(bucket) for bucket in run.shards.buckets)
    log.say(
        f"{run.shards.described} of {buckets} in {counted(len(run.shards.shards), 'shard')}; "
        f"global batch {run.global_batch:,}, {counted(run.steps, 'step')}, {run.sampler.steps_per_epoch:,} per epoch"
        + " for now (--follow)"
        * bool(run.followed)
    )
    if run.sampler.draw:
        log.say(f"each epoch trains one caption of each of {counted(run.shards.clips, 'clip')} (--captions one)")
    if run.repeated:
        log.say(run.repeated)
    for note in run.notes:
        log.say(f"note: {note}")
    if run.resume is not None:
        done = run.resume.state.step
        log.say(f"continues {run.resume.folder} after step {done:,}")
        if done >= run.steps:
            log.say(f"nothing is left to train: all {done:,} steps are done; a larger --steps goes on")
    if not kept:
        log.say(f"writes {folder}; {folder / REPORT_FILE} has its curves and videos, live: {watch(folder)}")


def new_epoch(run: Run, log: RunLog, folder: Path) -> None:
    """With --follow, write down what an epoch is over, before its first step, and say what is new; on rank 0."""
    if run.followed is None:
        return
    run.followed.write(folder)
    if told := run.followed.told():
        log.say(told)
        newest = {name: value for name, value in _samples(run).items() if name != "samples_at_start"}
        dataclasses.replace(run_facts(folder), **newest).write(folder)


def watch(folder: Path) -> str:
    """The command that shows a run as it trains."""
    return command_line("cogtrain", "watch", folder)


def ending(
    run: Run, log: RunLog, folder: Path, exported: Exported, best: Best, done: int, unsaved: CogError | None
) -> None:
    """The last lines.

    Args:
        done: the last step that was made.
        unsaved: why the last checkpoint was not written, if it was not.
    """
    if best.enough and done < run.steps:
        log.say(f"ended after step {done:,} of {run.steps:,}: {best.why()}; a larger --patience goes on")
    if unsaved:
        log.say(
            f"note: there is no checkpoint of step {done:,}: {unsaved.what}. The weights are whole; only a larger "
            "--steps would need it, and goes on from an older one"
        )
    if faults := str(FAULTS):
        log.say(faults)
    chosen = f", step {best.line.step:,} of {done:,}: {best.line}" if best.line else ""
    log.say(f"wrote {exported.path}{chosen}; {checked(exported)}")
    if run.held_out and done == run.steps and all(line.step != done for line in best.lines):
        log.say(f"note: a signal came before step {done:,} was validated; the same command does it")
    if note := _advice(best, done, folder):
        log.say(f"note: {note}")
    log.say(f"look at {folder / REPORT_FILE}")
    image = " --image FIRST_FRAME.png" if run.checkpoint.family.task == "i2v" else ""
    log.say(f'next: {command_line("cogtrain", "generate", "--run", folder)} --prompt "..."{image}')


def _advice(best: Best, done: int, folder: Path) -> str:
    """What the held-out losses say of what was exported."""
    found = lowest(best.lines)
    if found is None:
        return ""
    if found.change is not None and found.change >= 0:
        return "no validation was better than the base model: fewer steps, a lower --lr, or more clips"
    if best.line or found.step == done:
        return ""
    where = folder / checkpoint_name(found.step)
    do = f"; {command_line('cogtrain', 'export', '--run', where)} exports it" if found.step in best.kept else ""
    return f"the held-out loss was lowest at step {found.step:,} ({loss_text(found.val_loss)}){do}; --keep-best does so"


def checked(exported: Exported) -> str:
    """How the weights did that were loaded back."""
    if exported.difference == 0:
        return "loaded back, the weights answer exactly as the trained model does"
    return f"loaded back, the weights answer within {exported.difference:.0e} of the trained model"


def write_facts(
    run: Run, folder: Path, runtime: Runtime, trainable: int, plan: BlockPlan, attention: Kernel
) -> None:  # fmt: skip
    """Write ``facts.json``; a run that is resumed has begun when it first did, and what it has exported is there."""
    begun, exported = time.time(), 0
    if run.resume is not None:
        with suppress(CogError):
            before = run_facts(folder)
            begun, exported = before.begun, before.exported
    _facts(run, runtime, trainable, plan, attention, begun, exported).write(folder)


def write_finished(folder: Path, done: int) -> None:
    """Write into ``facts.json`` that a run's end is whole on the disk, after all else of it (`finished`)."""
    dataclasses.replace(run_facts(folder), finished=done).write(folder)


def write_end(folder: Path, exported: int, ended: str) -> None:
    """Write into ``facts.json`` how a run has ended.

    Args:
        exported: the step whose weights were.
        ended: why before its last step, if it has.
    """
    dataclasses.replace(run_facts(folder), exported=exported, ended=ended).write(folder)


def _facts(
    run: Run, runtime: Runtime, trainable: int, plan: BlockPlan, attention: Kernel, begun: float, exported: int
) -> RunFacts:  # fmt: skip
    import torch

    gpu = runtime.device.type == "cuda"
    return RunFacts(
        model=run.checkpoint.name,
        revision=run.checkpoint.revision,
        family=run.checkpoint.family.name,
        task=run.checkpoint.family.task,
        method=run.method.name,
        contract_fingerprint=run.shards.contract.fingerprint,
        **_samples(run),
        held_out=len(run.held_out) if run.held_out else 0,
        steps=run.steps,
        processes=run.world,
        global_batch=run.global_batch,
        strategy=run.strategy,
        precision=run.precision,
        device=torch.cuda.get_device_name(runtime.device) if gpu else "CPU",
        trainable=trainable,
        version=__version__,
        plan=str(plan),
        attention=attention,
        block_plan=plan.fields(),
        adapter=run.method.adapter,
        id_token=run.shards.id_token,
        begun=begun,
        exported=exported,
        finished=0,
        started_by=list(runtime.peers.started_by),
    )


def _samples(run: Run) -> dict[str, Any]:
    """The facts of what is trained; with --follow of the newest epoch."""
    shards = run.newest.shards
    return {
        "shards_fingerprint": shards.fingerprint,
        "shards": len(shards.shards),
        "samples": {str(bucket): count for bucket, count in shards.samples.items()},
        "samples_at_start": run.followed.samples_at_start if run.followed else 0,
    }


def weights_file_facts(run: Run, step: int, line: ValidationLine | None = None) -> dict[str, str]:
    """What an exported file says of where it comes from.

    Args:
        line: the validation of that step, if that is why it is exported.
    """
    losses = {} if line is None else {"held_out_loss": line.val_loss, "base_held_out_loss": line.base_val_loss}
    return {
        **{name: loss_text(loss) for name, loss in losses.items()},
        "base_model": run.checkpoint.name,
        "revision": run.checkpoint.revision or "",
        "family": run.checkpoint.family.name,
        "method": run.method.name,
        "steps": str(step),
        "shards": run.newest.shards.fingerprint,
        "contract": run.shards.contract.fingerprint,
    }


def count_weights(trained: list[torch.nn.Parameter]) -> int:
    """Numbers in some weights, also where ZeRO-3 has left a part of them here."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained)
