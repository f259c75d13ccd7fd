"""The training loop, in the order things happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import command_line
from cogcommon.errors import CogError, DiskError, RunError
from cogcommon.files.failures import disk_errors
from cogcommon.model.copies import CopyStream

from ..blocks.attention import Kernel
from ..blocks.plan import BlockPlan
from ..data.batches import Collator, prefetch
from ..data.sample_rng import seed_of
from ..data.sampler import Slot, rank_slots
from ..distributed.leaving import PeerFailed
from ..distributed.optimizer import clip_gradients, finish_update, learning_rate, make_optimizer
from ..distributed.peers import Peers, meet
from ..distributed.signals import Stopped, StopRequest
from ..distributed.strategy import Runtime, start
from ..memory.disk import check_room, writes
from ..memory.install import install
from ..memory.room import common_room
from ..model.batch import Batch
from ..model.ema import EMA
from ..model.method import Written
from ..model.objective import Objective
from ..report.card import write_card
from ..report.page import write_report
from ..runs import agreement
from ..runs import checkpoint as checkpoints
from ..runs.claim import claimed
from ..runs.folder import CARD_FILE, CONFIG_FILE, read_run
from ..runs.log import RunLog, cut_metrics
from ..runs.run import Run, run_folder, settings_json, write_config
from ..runs.tracker import open_tracker
from ..validation.validate import Validation
from . import announce
from .clock import StepClock
from .failures import out_of_memory
from .step_check import Judge, listed, not_finite, stop_for
from .step_log import StepLog, can_defer, skip_if_not_finite

if TYPE_CHECKING:
    import torch

_AHEAD = 4  # batches in the making


def train(run: Run, stop: StopRequest, peers: Peers | None = None) -> Path:
    """Train, and export what was trained.

    Args:
        stop: is asked after each step, and meanwhile takes signals.
        peers: all processes of the run, each of which calls this; None: those that the environment tells of.

    Returns:
        The run's folder.

    Raises:
        CogError: the run cannot go on.
        Stopped: by a signal, after a checkpoint.
    """
    import torch

    settings = run.settings
    done = run.resume.state.step if run.resume else 0
    peers = peers or meet()
    agreement.check_ranks_alike(run, peers)
    folder = Path(peers.broadcast(str(run_folder(run))))
    go_on = partial(checkpoints.how_to_go_on, folder, run.method.name)
    with disk_errors(folder, go_on=go_on), ExitStack() as closing:
        try:
            peers.together(lambda: closing.enter_context(claimed(folder)) if peers.main else None)
            agreement.check_shared(folder, peers)
            runtime = start(
                settings, run.strategy, run.precision, cpu=not torch.cuda.is_available(), autocast=run.method.full,
                peers=peers,
            )  # fmt: skip
            abandoned = peers.together(lambda: _move_in(run, folder, done) if peers.main else [])
            tracker = open_tracker(settings.tracker, folder, settings_json(settings)) if runtime.main else None
            log = closing.enter_context(RunLog(folder if runtime.main else None, run.steps, done, tracker))
            for note in peers.together(lambda: check_room(run, folder) if peers.main else []):
                log.say(f"note: {note}")
            model, optimizer, trained, plan, attention = _model(run, runtime, log)
            if abandoned:
                log.say(f"removed {', '.join(abandoned)}: their steps are made again")
            trainable = announce.count_weights(trained)
            announce.beginning(run, log, folder, trainable)
            if runtime.main:
                announce.run_facts(run, runtime, trainable, plan, attention).write(folder)
            # It measures the base model, so it comes before the resume.
            validation = Validation.begin(run, runtime, model, folder, log, stop)
            ema = EMA(trained, settings.ema) if settings.ema else None
            shadow = ema.shadow if ema else None
            if run.resume is not None:
                checkpoints.load(runtime, model, optimizer, shadow, run.resume.folder)
            objective = Objective.of(
                run.checkpoint, settings.min_snr_gamma if settings.loss_weighting == "min-snr" else None
            )
            batches = prefetch(
                run.shards, _places(run, runtime, done), _collator(run, objective),
                ahead=_AHEAD, pin=runtime.device.type == "cuda",
            )  # fmt: skip
            closing.callback(batches.close)
            copies = CopyStream(runtime.device)
            deferred = can_defer(run, runtime, optimizer)
            judge = Judge(run, runtime, log)
            step_log = StepLog(run, runtime, log, judge if deferred else None)
            closing.enter_context(stop.listening())  # before this there is nothing to save
            written: Written | None = None
            unsaved: CogError | None = None
            for step in range(done + 1, run.steps + 1):
                clock = StepClock(runtime.device)
                torch.manual_seed(seed_of(settings.seed, step, str(runtime.rank), "dropout"))
                rate = learning_rate(step, run.steps, settings)
                runtime.set_rate(optimizer, rate)
                losses: list[torch.Tensor] = []
                makes = True
                for micro in range(settings.accumulate):
                    batch = peers.together(lambda: next(batches)).upload(copies)
                    clock.end("data")
                    with runtime.accelerator.accumulate(model):
                        loss, found = _loss(model, batch, objective, run, runtime, log, step, micro, deferred)
                        losses.append(found)
                        clock.end("forward")
                        runtime.accelerator.backward(loss)
                        clock.end("backward")
                        if runtime.accelerator.sync_gradients:
                            norm = clip_gradients(runtime, optimizer, trained, settings)
                            step_log.flush()  # the step before: if it was not finite, nothing is trained after it
                            if deferred:
                                skip_if_not_finite(optimizer, losses, norm)
                            else:
                                makes = judge.gradient(step, float(norm), samples=sum(map(len, losses)))
                        if makes:
                            optimizer.step()
                        optimizer.zero_grad()
                if ema:
                    ema.update(step)
                clock.end("optimizer")
                step_log.add(step, rate, losses, norm, clock)
                signal = runtime.all_reduce_max(stop.signal)
                validates = validation and not signal and (step % settings.validate_every == 0 or step == run.steps)
                saves = signal or step % settings.save_every == 0 or step == run.steps
                if validates or saves or not deferred:
                    step_log.flush()
                if step == run.steps:  # first of all, and in its smallest form
                    judge.end()
                    finish_update(optimizer)
                    written = _write(run, runtime, model, ema, folder, step)
                if validation and validates:
                    with ema.in_place() if ema else nullcontext():  # what would be exported
                        line = validation.measure(model, step)
                    if line is not None:
                        log.validation(line)
                    signal = runtime.all_reduce_max(stop.signal)
                if saves or signal:
                    unsaved = _save(run, runtime, model, optimizer, ema, folder, step, log, exported=written)
                    if runtime.main:
                        write_report(folder)
                    signal = signal or runtime.all_reduce_max(
                        stop.signal
                    )  # one that came meanwhile: this checkpoint will do
                if signal and step < run.steps:
                    raise Stopped(
                        128 + signal, command_line("cogtrain", run.method.name, "--config", folder / CONFIG_FILE)
                    )
            if written is None:  # nothing was left to train
                written = _write(run, runtime, model, ema, folder, run.steps)
            if runtime.main:
                exported = run.method.verify(runtime, model, run.checkpoint, written)
                if not write_card(folder, read_run(folder), "transformer" if run.method.full else "lora", run.steps):
                    log.say(f"{folder / CARD_FILE} was changed by somebody, and stays as it is")
                write_report(folder)
                announce.ending(run, log, folder, exported, unsaved)
            peers.barrier()  # rank 0 may yet fail
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, run) from error
    return folder


def _move_in(run: Run, folder: Path, done: int) -> list[str]:
    """Bring the run's folder into the state after step ``done``; names of checkpoints removed."""
    write_config(run, folder)
    cut_metrics(folder, done)
    return checkpoints.clear(folder, after=done)


def _model(run: Run, runtime: Runtime, log: RunLog) -> tuple[Any, Any, list[torch.nn.Parameter], BlockPlan, Kernel]:
    """The transformer and its optimizer, ready to train, the weights that are trained, and how the blocks are run."""
    settings = run.settings
    room = common_room(runtime.peers, runtime.device, runtime.dtype)
    transformer = run.checkpoint.load_transformer(run.method.weight_dtype(runtime.dtype, runtime.sharded))
    run.method.apply(transformer)
    transformer.train()
    engine = install(transformer, run, runtime, log, room)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    offload_optimizer = run.strategy.endswith("-offload")
    optimizer = make_optimizer(
        trained, settings, runtime.device, offload_optimizer=offload_optimizer, cpu_training=engine.cpu_training
    )
    model, optimizer = runtime.prepare(transformer, optimizer, saved_by=run.resume.state.world if run.resume else None)
    return model, optimizer, trained, engine.plan, engine.kernel


def _write(
    run: Run, runtime: Runtime, model: Any, ema: EMA | None, folder: Path, step: int, *, into: str = ""
) -> Written:
    """Write what was trained into the run's folder, or one in it, as it is exported; every rank calls it."""
    facts = announce.weights_file_facts(run, step)
    go_on = partial(checkpoints.how_to_go_on, folder, run.method.name)
    with ema.in_place() if ema else nullcontext():
        return run.method.write(runtime, model, run.checkpoint, folder / into, facts, go_on)


def _save(
    run: Run, runtime: Runtime, model: Any, optimizer: Any, ema: EMA | None, folder: Path, step: int,
    log: RunLog, *, exported: Written | None,
) -> CogError | None:  # fmt: skip
    """Write a checkpoint; every rank calls it. What is trained is kept, even where a checkpoint finds no room.

    Args:
        exported: the weights, if they have been written: then the checkpoint is for a resume only.

    Returns:
        Why there is none, if that costs only the resume.

    Raises:
        CogError: there is no room for it, and training ends here; says where the weights are.
    """
    settings = run.settings
    state = checkpoints.RunState(step, runtime.world, run.resume_facts(), settings_json(settings))
    shadow = ema.shadow if ema else None
    try:
        saved = checkpoints.save(
            runtime, model, optimizer, shadow, state, folder, settings.keep, needs=writes(run).checkpoint
        )
        log.say(f"saved {saved}")
        return None
    except checkpoints.NotSaved as failed:
        fault = failed.fault
    if exported:
        return fault
    try:
        rescued = _write(run, runtime, model, ema, folder, step, into=f"step-{step}")
        kept = f"; the weights after step {step} are in {rescued.path}"
    except CogError:
        kept = f"; the weights after step {step} found no room either"
    if runtime.main:
        raise DiskError(fault.what, where=fault.where, fix=f"{fault.fix}{kept}") from fault
    raise fault


def _loss(
    model: Any, batch: Batch, objective: Objective, run: Run, runtime: Runtime, log: RunLog, step: int, micro: int,
    deferred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss to go backward from, and the losses of all ranks' samples, less those that are not finite.

    Args:
        deferred: `StepLog` finds those a step later; do not wait for the GPU here.
    """
    losses_B = objective.losses(model, batch, runtime.dtype)
    gathered: torch.Tensor = runtime.accelerator.gather(losses_B.detach())
    if deferred:
        return losses_B.mean(), gathered
    losses = gathered.tolist()
    epoch, place = divmod(step - 1, run.sampler.steps_per_epoch)
    first = micro * len(losses)
    bad = not_finite(losses, run.sampler.epoch(epoch)[place][first : first + len(losses)], run)
    if not bad:
        return losses_B.mean(), gathered
    if run.settings.on_nonfinite == "stop":
        raise stop_for(bad, step, runtime.main)
    del losses_B  # and with it all that the first pass has kept
    log.say(f"step {step}: the loss is not finite; left out, with the rest of its batch: {listed(bad)}")
    # Every rank goes through the model once more, on zeros, so that gradients exist and add nothing.
    nothing = objective.losses(model, batch.blank(), runtime.dtype).mean()
    if runtime.all_reduce_max(int(not bool(nothing.isfinite()))):
        raise (
            RunError(
                "the model's output is not finite even for zeros: its weights are ruined",
                where=f"step {step}",
                fix="resume the last checkpoint with a lower --lr, or with --precision bf16",
            )
            if runtime.main
            else PeerFailed()
        )
    return nothing * 0, gathered[:0]


def _places(run: Run, runtime: Runtime, done: int) -> Iterator[list[Slot]]:
    """This rank's places after step ``done``, one accumulation step at a time."""
    for step in range(done, run.steps):
        epoch, place = divmod(step, run.sampler.steps_per_epoch)
        batch = run.sampler.epoch(epoch)[place]
        for micro in range(run.settings.accumulate):
            yield rank_slots(
                batch, epoch, micro=micro, rank=runtime.rank, world=runtime.world, size=run.settings.batch_size
            )


def _collator(run: Run, objective: Objective) -> Collator:
    import safetensors.torch

    settings = run.settings
    return Collator(
        objective,
        settings.seed,
        stratify=run.global_batch if settings.timesteps == "stratified" else None,
        caption_dropout=settings.caption_dropout,
        empty_text=safetensors.torch.load(run.shards.empty_caption())["text"] if settings.caption_dropout else None,
    )
