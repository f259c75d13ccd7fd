"""The training loop, in the order things happen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogcommon.contract import tool_version
from cogcommon.errors import CogError, RunError

from . import checkpoint as checkpoints
from .card import write_card
from .data import Batch, Collator, prefetch
from .draws import seed_of
from .inputs import Objective
from .optim import learning_rate, make_optimizer
from .order import Slot, rank_slots
from .progress import RunLog, cut_metrics, peak_gib
from .report import write_report
from .run import Run, run_folder, settings_json, write_config
from .run_folder import CONFIG_FILE, Facts, StepLine, read_run
from .signals import StopRequest
from .strategy import Runtime, start
from .validate import Validation

if TYPE_CHECKING:
    import torch

_AHEAD = 4  # batches in the making


class Stopped(Exception):
    """The run was asked to stop; it has saved. ``code`` is what to exit with."""

    def __init__(self, code: int, command: str) -> None:
        super().__init__(command)
        self.code = code
        self.command = command


def train(run: Run, stop: StopRequest) -> Path:
    """Train, and export what was trained.

    Returns:
        The run's folder.

    Raises:
        CogError: the run cannot go on.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    import torch

    settings = run.settings
    runtime = start(settings, run.strategy, run.precision, cpu=not torch.cuda.is_available())
    folder = Path(runtime.tell(str(run_folder(run))))
    if runtime.main:
        write_config(run, folder)
        cut_metrics(folder, run.resume.state.step if run.resume else 0)
    transformer = run.checkpoint.load_transformer(run.method.weight_dtype(runtime.dtype, runtime.sharded))
    run.method.apply(transformer)
    if settings.memory != "fast":
        transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    transformer.to(runtime.device)
    optimizer = make_optimizer(trained, settings, runtime.device, on_host=run.strategy.endswith("-offload"))
    model, optimizer = runtime.prepare(transformer, optimizer)
    done = run.resume.state.step if run.resume else 0
    log = RunLog(folder if runtime.main else None, run.steps, done)
    validation = Validation.begin(run, runtime, model, folder, log)  # it measures the base model, so before the resume
    if run.resume is not None:
        runtime.load_state(model, optimizer, run.resume.folder)
    objective = Objective.of(run.checkpoint, settings.min_snr_gamma if settings.loss_weighting == "min-snr" else None)
    batches = prefetch(
        run.shards,
        _places(run, runtime, done),
        _collator(run, objective),
        ahead=_AHEAD,
        pin=runtime.device.type == "cuda",
    )
    trainable = sum(_size(parameter) for parameter in trained)
    if runtime.main:
        _facts(run, runtime, trainable).write(folder)
    with log, ExitStack() as closing:
        closing.callback(batches.close)
        _greet(run, log, folder, done, trainable)
        for step in range(done + 1, run.steps + 1):
            began = time.perf_counter()
            torch.manual_seed(seed_of(settings.seed, step, str(runtime.rank), "dropout"))  # in the network
            rate = learning_rate(step, run.steps, settings)
            runtime.set_rate(optimizer, rate)
            losses: list[float] = []
            for _ in range(settings.accumulate):
                batch = _next(batches, runtime).to(runtime.device)
                with runtime.accelerator.accumulate(model):
                    losses_B = objective.losses(model, batch, runtime.dtype)
                    losses += _checked(losses_B, step, run, runtime)
                    runtime.accelerator.backward(losses_B.mean())
                    if runtime.accelerator.sync_gradients:
                        norm = runtime.accelerator.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))
                    optimizer.step()
                    optimizer.zero_grad()
            seconds = time.perf_counter() - began
            log.step(
                StepLine(
                    step=step,
                    epoch=(step - 1) // run.order.steps_per_epoch,
                    loss=sum(losses) / len(losses),
                    lr=rate,
                    grad_norm=float(norm),
                    s_per_step=seconds,
                    samples_per_s=run.global_batch / seconds,
                    peak_gib=peak_gib(runtime.device),
                )
            )
            signal = runtime.agree(stop.signal)
            if validation and not signal and (step % settings.validate_every == 0 or step == run.steps):
                log.validation(validation.measure(model, step))
            if signal or step % settings.save_every == 0 or step == run.steps:
                state = checkpoints.RunState(step, runtime.world, run.facts(), settings_json(settings))
                saved = checkpoints.save(runtime, model, optimizer, None, state, folder, settings.keep)
                log.say(f"saved {saved}")
                if runtime.main:
                    write_report(folder)
            if signal and step < run.steps:
                raise Stopped(128 + signal, f"cogtrain {run.method.name} --config {folder / CONFIG_FILE}")
    _export(run, runtime, model, folder)
    return folder


def _places(run: Run, runtime: Runtime, done: int) -> Iterator[list[Slot]]:
    """This rank's places from step ``done`` on, one accumulation step at a time."""
    size = run.settings.batch_size
    for epoch in itertools.count(done // run.order.steps_per_epoch):
        batches = run.order.epoch(epoch)
        first = max(0, done - epoch * run.order.steps_per_epoch)
        for step, batch in enumerate(batches[first:], start=epoch * run.order.steps_per_epoch + first):
            if step == run.steps:
                return
            for micro in range(run.settings.accumulate):
                yield rank_slots(batch, epoch, micro=micro, rank=runtime.rank, world=runtime.world, size=size)


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


def _next(batches: Iterator[Batch], runtime: Runtime) -> Batch:
    """The next batch; when any rank has none, all stop together."""
    fault: CogError | None = None
    batch = None
    try:
        batch = next(batches)
    except CogError as error:
        fault = error
    if runtime.agree(int(fault is not None)):
        raise fault or PeerFailed()
    assert batch is not None
    return batch


class PeerFailed(RunError):
    """Another rank has an error, and says it."""

    def __init__(self) -> None:
        super().__init__("another process of the run has failed")


def _checked(losses_B: torch.Tensor, step: int, run: Run, runtime: Runtime) -> list[float]:
    """The losses of all ranks' samples."""
    losses: list[float] = runtime.accelerator.gather(losses_B.detach()).tolist()
    return losses


def _greet(run: Run, log: RunLog, folder: Path, done: int, trained: int) -> None:
    log.say(
        f"{run.method.name} of {run.checkpoint.name} ({run.checkpoint.family.name}): {trained:,} weights trained, "
        f"{run.precision}, {run.strategy}, {run.world} process{'es' * (run.world > 1)}"
    )
    buckets = ", ".join(str(bucket) for bucket in run.shards.buckets)
    log.say(
        f"{len(run.shards)} samples of {buckets} in {len(run.shards.shards)} shards; global batch {run.global_batch}, "
        f"{run.order.steps_per_epoch} steps an epoch, {run.steps} steps"
    )
    for note in run.notes:
        log.say(f"note: {note}")
    log.say(f"continues {run.resume.folder} after step {done}" if run.resume else f"writes {folder}")


def _size(parameter: torch.nn.Parameter) -> int:
    """Numbers in a weight, also where ZeRO-3 has left a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _facts(run: Run, runtime: Runtime, trainable: int) -> Facts:
    import torch

    counts = np.bincount(run.shards.bucket_of, minlength=len(run.shards.buckets))
    gpu = runtime.device.type == "cuda"
    return Facts(
        model=run.checkpoint.name,
        revision=run.checkpoint.revision,
        family=run.checkpoint.family.name,
        task=run.checkpoint.family.task,
        method=run.method.name,
        contract_fingerprint=run.shards.contract.fingerprint,
        shards_fingerprint=run.shards.fingerprint,
        shards=len(run.shards.shards),
        samples={str(bucket): int(count) for bucket, count in zip(run.shards.buckets, counts, strict=True)},
        held_out=len(run.held_out) if run.held_out else 0,
        steps=run.steps,
        processes=run.world,
        global_batch=run.global_batch,
        strategy=run.strategy,
        precision=run.precision,
        device=torch.cuda.get_device_name(runtime.device) if gpu else "CPU",
        trainable=trainable,
        version=tool_version(),
    )


def _export(run: Run, runtime: Runtime, model: Any, folder: Path) -> None:
    facts = {
        "base_model": run.checkpoint.name,
        "revision": run.checkpoint.revision or "",
        "family": run.checkpoint.family.name,
        "method": run.method.name,
        "steps": str(run.steps),
        "shards": run.shards.fingerprint,
        "contract": run.shards.contract.fingerprint,
    }
    exported = run.method.export(runtime, model, run.checkpoint, folder, facts)
    if exported is not None:
        write_card(folder, read_run(folder), "transformer" if run.method.full else "lora", run.steps)
        log = RunLog(folder, run.steps, run.steps)
        log.say(
            f"wrote {exported.path}; loaded back, its answer is within {exported.difference:.1e} of the trained model's"
        )
        log.say(f'next: cogtrain generate --run {folder} --prompt "..."')
