"""Training, in the order things happen: `Trainer` sets a run up, makes its steps, and finishes it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cogcommon.cli.names import command_line
from cogcommon.errors import CogError
from cogcommon.files.failures import disk_errors
from cogcommon.model.copies import CopyStream

from ..data.sample_rng import seed_of
from ..distributed.optimizer import clip_gradients, learning_rate
from ..distributed.peers import Peers, meet
from ..distributed.signals import BY_A_PERSON, Stopped, StopRequest
from ..distributed.strategy import start
from ..memory.disk import check_room, has_room_beside
from ..model.batch import Batch
from ..model.ema import EMA
from ..model.objective import Objective
from ..report.card import write_card
from ..report.page import write_report
from ..runs import agreement
from ..runs import checkpoint as checkpoints
from ..runs.claim import claimed, move_in
from ..runs.config import settings_json
from ..runs.folder import CARD_FILE, CONFIG_FILE, asked_to_stop, read_run
from ..runs.log import RunLog
from ..runs.resuming import seconds_to_wait
from ..runs.run import Run, run_folder
from ..runs.tracker import open_tracker
from ..validation.embed import embed_prompts
from ..validation.validate import Validation
from . import announce, finished
from .best import Best
from .clock import StepClock
from .failures import memory_errors
from .feed import Feed
from .load import load_model
from .readout import Readout
from .saver import Saver, finish_mirror, open_mirror

if TYPE_CHECKING:
    import torch


def train(
    run: Run, stop: StopRequest, peers: Peers | None = None, *, after_step: Callable[[int], None] | None = None
) -> Path:
    """Train, and export what was trained.

    Args:
        stop: is asked after each step, and meanwhile takes signals.
        peers: all processes of the run, each of which calls this; None: those that the environment tells of.
        after_step: called with the number of each step, from 1, when it has been queued; the GPU may still compute it.

    Returns:
        The run's folder.

    Raises:
        CogError: the run cannot go on.
        Stopped: by a signal, after a checkpoint.
    """
    peers = peers or meet()
    agreement.check_ranks_alike(run, peers)
    folder = Path(peers.broadcast(str(run_folder(run))))
    go_on = partial(checkpoints.how_to_go_on, folder, run.method.name)
    with disk_errors(folder, go_on=go_on), ExitStack() as closing, memory_errors(run):
        trainer = Trainer(run, folder, peers, stop, closing)
        if not trainer.kept:
            with trainer.log.training():
                trainer.make_steps(after_step)
            trainer.finish()
        finish_mirror(trainer.mirror, peers, trainer.log)  # in which rank 0 may yet fail
    return folder


class Trainer:
    """One process's part of a run.

    Attributes:
        done: steps that were made, and those before, by the run that this one resumes.
        kept: the step that was exported, of a run that had finished before and stays as it is; else 0.
    """

    def __init__(self, run: Run, folder: Path, peers: Peers, stop: StopRequest, closing: ExitStack) -> None:
        """Set the run up, to where its next step can be made.

        Args:
            closing: gets what must be closed when the run ends, however it ends.
        """
        import torch

        self.run, self.folder, self.stop = run, folder, stop
        self.done = run.resume.state.step if run.resume else 0
        settings = run.settings
        claim = claimed(folder, seconds_to_wait(folder, peers))
        peers.together(lambda: closing.enter_context(claim) if peers.main else None)
        agreement.check_shared(folder, peers)
        self.runtime = runtime = start(
            settings, run.strategy, run.precision, cpu=not torch.cuda.is_available(), autocast=run.method.full,
            peers=peers,
        )  # fmt: skip
        self.kept = peers.broadcast(finished.exported_before(run, folder, self.done) if peers.main else 0)
        abandoned = peers.together(lambda: self._move_in() if peers.main else [])
        tracker = open_tracker(settings.tracker, folder, settings_json(settings), self.done) if runtime.main else None
        self.log = log = closing.enter_context(RunLog(folder if runtime.main else None, run.steps, self.done, tracker))
        for note in peers.together(lambda: check_room(run, folder) if peers.main else []):
            log.say(f"note: {note}")
        self.mirror = peers.together(lambda: open_mirror(run, folder, self.done, log, closing) if peers.main else None)
        prompts = embed_prompts(run, runtime, folder, log)  # T5 has gone before the transformer comes
        self.validation = Validation.of(run, runtime, folder, log, stop, prompts)
        self.kept = self.kept and finished.stays(run, folder, peers, self.validation, self.kept, log)
        if not self.kept:
            self._load(abandoned, closing)

    def _load(self, abandoned: list[str], closing: ExitStack) -> None:
        """Load the model, and make ready to train it."""
        run, runtime, folder, log, settings = self.run, self.runtime, self.folder, self.log, self.run.settings
        self.model, self.optimizer, self.trained, engine = load_model(run, runtime, log)
        trainable = announce.count_weights(self.trained)
        announce.beginning(run, log, folder, trainable, abandoned)
        if runtime.main:
            announce.write_facts(run, folder, runtime, trainable, engine.plan, engine.kernel)
        if self.validation:  # it measures the base model, so it comes before the resume
            self.validation = self.validation.begin(self.model)
        self.best = Best.of(settings, folder, runtime.peers, self.validation)
        self.ema = ema = EMA(self.trained, settings.ema) if settings.ema else None
        self.saver = Saver(run, runtime, self.model, self.optimizer, ema, folder, log, engine, closing, self.mirror)
        if run.resume:
            self.saver.resume(run.resume)
        gamma = settings.min_snr_gamma if settings.loss_weighting == "min-snr" else None
        self.objective = Objective.of(run.checkpoint, gamma)
        self.feed = Feed(run, runtime, self.objective, self.done, partial(announce.new_epoch, run, log, folder))
        closing.callback(self.feed.close)
        self.copies = CopyStream(runtime.device)
        self.readout = Readout(run, runtime, self.optimizer, log)
        closing.enter_context(self.stop.listening())  # before this there is nothing to save

    def _move_in(self) -> list[str]:
        aside = has_room_beside(self.run, self.folder)
        return move_in(self.run, self.folder, self.done, aside=aside, kept=bool(self.kept))

    def make_steps(self, after_step: Callable[[int], None] | None) -> None:
        """Make the steps that are left, and validate and save between them."""
        if self.validation and self.validation.lacks(self.done, self.best.lines):
            self.validate_and_save(self.done)  # before it was stopped, the run had no time for it
        while (step := self.done + 1) <= self.run.steps and not self.best.enough and not self.run.nothing_left:
            self.step(step)
            if after_step:
                after_step(step)
            self.validate_and_save(step)

    def step(self, step: int) -> None:
        """Make an optimizer step: forward and backward over its micro-batches, clip, update, average."""
        import torch

        run, runtime, settings = self.run, self.runtime, self.run.settings
        clock = StepClock(runtime.device)
        torch.manual_seed(seed_of(settings.seed, step, str(run.groups.of(runtime.rank)), "dropout"))
        rate = learning_rate(step, run.steps, settings)
        runtime.set_rate(self.optimizer, rate)
        losses: list[torch.Tensor] = []
        for micro in range(settings.accumulate):
            batch = self._batch(step).upload(self.copies)
            clock.end("data")
            with runtime.accelerator.accumulate(self.model):  # the ranks' gradients meet in the last one
                loss, found = self.readout.loss(self._losses, batch, step, micro)
                losses.append(found)
                clock.end("forward")
                runtime.accelerator.backward(loss)
                clock.end("backward")
        norm = clip_gradients(runtime, self.optimizer, self.trained, settings)
        if self.readout.may_step(step, losses, norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(step)
        clock.end("optimizer")
        self.readout.take(step, rate, losses, norm, clock)

    def validate_and_save(self, step: int) -> None:
        """After a step: validate, save and stop, where it is time for it or a signal asks for it.

        Raises:
            Stopped: by a signal, once a checkpoint is there.
        """
        self.done = step
        settings, last = self.run.settings, step == self.run.steps
        stop = self._signal()
        validates = self.validation and not stop and self.validation.due(step)
        saves = stop or last or step % settings.save_every == 0 or self.saver.due()
        if validates or saves:
            self.readout.catch_up()
        self.saver.settle(step, wait=bool(validates or saves))
        if last:  # first of all, and in its smallest form
            self._export(step)
        if self.validation and validates:
            with self.saver.exporter.averaged():
                line = self.validation.measure(self.model, step, self.best.lines)
            if line:
                self.log.validation(self.best.take(line))
            stop, saves = self._signal(), saves or self.best.step == step
            if self.best.enough and not last:
                last = saves = True
                self._export(step)
        if saves or stop:
            self.saver.checkpoint(step, self.best.step)
            stop = stop or self._signal()  # one that came meanwhile: this checkpoint will do
        if stop and not last:
            self.saver.leave(step)
            again = command_line("cogtrain", self.run.method.name, "--config", self.folder / CONFIG_FILE)
            raise Stopped(128 + stop % BY_A_PERSON, again, self.folder, for_good=stop > BY_A_PERSON)

    def _export(self, step: int) -> None:
        self.readout.end()
        self.saver.exporter.export(step)

    def finish(self) -> None:
        """Load back what is exported, of the last step or of the best, and say so."""
        run, folder, best, done = self.run, self.folder, self.best, self.done
        if checked := self.saver.finish(done, best.line):
            announce.write_end(folder, best.step or done, best.why() if best.enough and done < run.steps else "")
            if not write_card(folder, read_run(folder), "transformer" if run.method.full else "lora"):
                self.log.say(f"{folder / CARD_FILE} was changed by somebody, and stays as it is")
            write_report(folder)
            announce.write_finished(folder, done)
            announce.ending(run, self.log, folder, checked, best, done, self.saver.unsaved)

    def _batch(self, step: int) -> Batch:
        try:
            return self.feed.next(step)
        except CogError:  # a shard was replaced, say: what was trained until then is no worse for it
            self.readout.catch_up()
            self.saver.keep(self.done, self.best.step)
            raise

    def _losses(self, batch: Batch) -> torch.Tensor:
        return self.objective.losses(self.model, batch, self.runtime.dtype)

    def _signal(self) -> int:
        """The number of a signal that has asked any rank to stop; 0: none has. `ask_to_stop` counts as one, and adds
        `BY_A_PERSON`."""
        asked = BY_A_PERSON + signal.SIGTERM if self.runtime.main and asked_to_stop(self.folder) else 0
        return self.runtime.all_reduce_max(self.stop.signal or asked)
