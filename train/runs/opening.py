"""Opens a run: everything that can be refused is refused here, before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogcommon.cli.progress import stage
from cogcommon.errors import ModelError, SettingError, ShardError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.device import EMULATED, Precision, default_precision, has_bf16, is_gpu
from cogcommon.model.families import Resolution
from cogcommon.model.published import scaled_otherwise

from ..data.compatibility import check_model, check_shards_alike, lost_tars
from ..data.prompts import Prompt, read_prompts, validation_prompts, without_token
from ..data.shard_set import ShardSet, usual_sizes
from ..data.shards import open_shards
from ..distributed.groups import DataGroups, data_groups
from ..distributed.optimizer import check_optimizer, told_of_schedule
from ..distributed.peers import ALONE, Peers
from ..distributed.zero_config import check_strategy, choose_strategy, deepspeed_config
from ..model.method import Method, method_of
from ..settings.training import Strategy, TrainSettings
from ..store.cache import SampleCache
from .agreement import agree_on_resume
from .checkpoint import SavedCheckpoint, check_same
from .claim import check_claimable
from .config import told_of_move
from .follow import open_followed
from .global_batch import told_of_another, with_accumulation
from .resuming import as_it_began, as_trained, changes_since, find_resume, has_nothing_left
from .run import REVISION, Run
from .sampling import check_sampler, make_sampler
from .tracker import check_tracker_installed

if TYPE_CHECKING:
    import torch

DEFAULT_EPOCHS = 10


@stage("opening shards")
def open_run(
    settings: TrainSettings, device: torch.device | str, world: int, peers: Peers = ALONE
) -> Run:  # fmt: skip
    """Check the settings, the shards and the model against each other.

    Args:
        device: that this process trains on; its type, where it is that of another machine.
        world: processes of the run.
        peers: those of them that have met; each calls this, and each may find a fault that the others do not.

    Raises:
        CogError: anything that the user can put right.
    """
    notes = [moved] if (moved := told_of_move(settings)) else []
    resume = agree_on_resume(
        lambda: find_resume(settings, peers), peers
    )  # together, so before anything that may fail here
    given, groups = settings, data_groups(world)
    # Together, so that none waits for shards, or for one that has a fault.
    settings, method, strategy = peers.together(lambda: _without_shards(given, resume, device, groups, peers, notes))
    followed = open_followed(settings, resume, groups.count, peers) if settings.follow else None
    held_out: ShardSet | None = None
    if followed:
        cache, shards, held_out = followed.cache, followed.newest.shards, followed.held_out
    else:
        cache = SampleCache(settings.cache, settings.cache_bytes) if settings.cache else None
        shards = open_shards(settings.shards, cache=cache)
    if cache is not None and not any(shard.file.remote for shard in shards.shards):
        notes.append("--cache has nothing to do: these shards are on this machine")
    if lost := lost_tars(shards):
        names = ", ".join(lost[:4]) + " ..." * (len(lost) > 4)
        notes.append(f"missing beside these shards, and not trained: {names} (`cogprep encode` makes them anew)")
    checkpoint = _base_model(settings, shards, resume)
    check_model(shards.contract, checkpoint, shards.shards[0].shown)
    notes += scaled_otherwise(checkpoint)
    precision = _check_training(settings, method, checkpoint, strategy, device, world, new=resume is None)
    if precision == "bf16" and not has_bf16(device):
        notes.append(EMULATED.format("this GPU"))
    _check_buckets(shards.contract.buckets if followed else shards.buckets, shards, checkpoint)
    if settings.caption_dropout or _draws(settings):  # guidance needs it too
        shards.empty_caption()
    if followed is None and settings.validate_shards:
        held_out = open_shards(settings.validate_shards, "--validate-shards", cache)
        total = len(shards)
        shards = shards.without(held_out)
        if len(shards) < total:
            notes.append(f"{total - len(shards)} samples of --shards are held out for validation and not trained")
    if held_out:
        check_shards_alike(shards.contract, held_out.contract, held_out.shards[0].shown)
        _check_buckets(held_out.buckets, held_out, checkpoint)
    prompts = _prompts(settings, checkpoint, usual_sizes(shards.samples), precision)
    notes += without_token(prompts, *shards.id_tokens)
    _check_weights(settings, checkpoint)
    sampler = followed.newest.sampler if followed else make_sampler(settings, shards, groups.count)
    if followed is None:
        notes += check_sampler(sampler, given, shards, groups.count)
    if resume is None:
        notes += told_of_another(given, sampler.global_batch)
    steps = settings.steps or (settings.epochs or DEFAULT_EPOCHS) * sampler.steps_per_epoch
    if resume is not None and resume.state.step > steps:
        notes.append(f"{steps} steps are asked for, and {resume.state.step} have been made")
        steps = resume.state.step
    nothing_left = resume is not None and has_nothing_left(settings, resume, steps)
    if resume is not None and not nothing_left:
        then = resume.state.settings
        before = then.get("steps") or (then.get("epochs") or DEFAULT_EPOCHS) * sampler.steps_per_epoch
        notes += told_of_schedule(settings, resume.state.step, before, steps)
    if settings.warmup is not None and settings.warmup >= steps and not nothing_left:
        notes.append(f"all of the run is warm-up: {settings.warmup:,} steps to the rate of --lr, {steps:,} in all")
    if settings.lr == 0 and not nothing_left:
        notes.append("--lr 0 trains nothing")
    run = Run(
        settings=settings,
        given=given,
        method=method,
        shards=shards,
        held_out=held_out,
        checkpoint=checkpoint,
        sampler=sampler,
        steps=steps,
        strategy=strategy,
        precision=precision,
        world=world,
        resume=resume,
        notes=tuple(notes),
        followed=followed,
        nothing_left=nothing_left,
        prompts=prompts,
    )
    if run.new_prompts:
        _check_text_encoder(checkpoint)
    if run.resume is not None:
        check_same(run.resume, run.resume_facts(), groups.count, given)
        if changed := ", ".join(changes_since(run.resume, settings)):
            notes.append(
                f"no step is made with these, so the run stays as it was: {changed}; a larger --steps goes on with them"
                if nothing_left
                else f"changed since the checkpoint: {changed}"
            )
        if nothing_left:
            run = dataclasses.replace(
                run, settings=as_trained(settings, run.resume), given=as_trained(given, run.resume)
            )
    return dataclasses.replace(run, notes=tuple(notes))


def _without_shards(
    given: TrainSettings, resume: SavedCheckpoint | None, device: torch.device | str, groups: DataGroups, peers: Peers,
    notes: list[str],
) -> tuple[TrainSettings, Method, Strategy]:  # fmt: skip
    """Settle and check what can be before there are shards, which may be hours away with --follow.

    Raises:
        CogError: as `open_run`.
    """
    world = groups.world
    settings = with_accumulation(given, groups, resume, peers.here if peers.world > 1 else world, notes)
    settings = as_it_began(settings, resume)
    method = method_of(settings)
    strategy = choose_strategy(settings, full=method.full, gpus=world if is_gpu(device) else 0)
    _check_settings(settings, strategy, device)
    if resume is None:
        method.check_files()
    if settings.follow and settings.model:  # which the shards may name, too, once there are some
        checkpoint = _open_model(settings.model, None, resume)
        precision = _check_training(settings, method, checkpoint, strategy, device, world, new=resume is None)
        _prompts(settings, checkpoint, [checkpoint.native], precision)
        if not checkpoint.on_hub:  # which may have a newer revision than the shards were made with
            _check_weights(settings, checkpoint)
    return settings, method, strategy


def _base_model(settings: TrainSettings, shards: ShardSet, resume: SavedCheckpoint | None) -> Checkpoint:
    """The checkpoint to train: at the revision that the run began with, or that the shards were made with. The hub may
    have a newer one by now."""
    contract = shards.contract
    name = settings.model or contract.model
    made_for = f"the contract of {shards.shards[0].shown}"
    revision = contract.revision if name == contract.model else None
    return _open_model(name, revision, resume, named_by=None if settings.model else made_for)


def _open_model(
    name: str, revision: str | None, resume: SavedCheckpoint | None, *, named_by: str | None = None
) -> Checkpoint:
    if resume is not None:
        revision = resume.state.facts.get(REVISION)
    return open_checkpoint(name, revision, named_by=named_by)


def _check_settings(settings: TrainSettings, strategy: Strategy, device: torch.device | str) -> None:
    """Refuse what is wrong whatever the shards and the model: shards that are followed may be hours away."""
    check_strategy(settings, strategy)
    check_optimizer(settings, strategy)
    check_tracker_installed(settings.tracker)
    check_validation(settings)
    if settings.validate_prompts:
        read_prompts(settings.validate_prompt, settings.validate_prompts, "--validate-prompt")
    if settings.precision == "fp16" and not is_gpu(device):
        raise SettingError("fp16 needs a GPU", where="--precision fp16", fix="--precision bf16 or fp32")
    if settings.out is not None:
        check_claimable(settings.out)


def _check_training(
    settings: TrainSettings, method: Method, checkpoint: Checkpoint, strategy: Strategy, device: torch.device | str,
    world: int, *, new: bool,
) -> Precision:  # fmt: skip
    """Refuse what cannot be done to a model; the precision in which it is computed with.

    Args:
        new: the run resumes nothing.
    """
    method.check(checkpoint)
    if new:
        method.check_start(checkpoint)
    precision = settings.precision or default_precision(checkpoint.family, device)
    deepspeed_config(settings, strategy, precision, world)
    return precision


def _draws(settings: TrainSettings) -> bool:
    """Whether validation makes videos."""
    return bool(settings.validate_videos or settings.validate_prompt or settings.validate_prompts)


def _prompts(
    settings: TrainSettings, checkpoint: Checkpoint, sizes: Sequence[Resolution], precision: Precision
) -> tuple[Prompt, ...]:  # fmt: skip
    return validation_prompts(
        settings.validate_prompt, settings.validate_prompts, settings.validate_image, checkpoint, sizes, precision
    )


def _check_weights(settings: TrainSettings, checkpoint: Checkpoint) -> None:
    checkpoint.check_weights("transformer")
    if _draws(settings):
        checkpoint.check_weights("vae")


def _check_buckets(buckets: Sequence[Resolution], shards: ShardSet, checkpoint: Checkpoint) -> None:
    """Refuse samples of a size that the model cannot take, wherever they come from."""
    for bucket in buckets:
        try:
            checkpoint.check_resolution(bucket)
        except SettingError as error:
            raise ShardError(
                f"samples of {bucket}: {error.what}",
                where=shards.shards[0].shown,
                fix=f"other shards, or encode these clips again with {error.fix}",
            ) from error


def _check_text_encoder(checkpoint: Checkpoint) -> None:
    try:
        checkpoint.check_weights("text_encoder")
    except ModelError as error:
        raise ModelError(
            f"{error.what}: T5, which embeds the prompts of --validate-prompt",
            where=error.where,
            fix=f"{error.fix}; or leave --validate-prompt out",
        ) from error


def check_validation(settings: TrainSettings) -> None:
    """Refuse what needs held-out samples, where there are none.

    Raises:
        SettingError: names the option.
    """
    asked = {
        "--validate-videos": (settings.validate_videos, "make videos of"),
        "--keep-best": (settings.keep_best, "find the best checkpoint by"),
        "--patience": (settings.patience, "end the run by"),
    }
    for option, (given, purpose) in asked.items():
        if given and not settings.validate_shards:
            raise SettingError(
                f"there are no held-out samples to {purpose}",
                where=option,
                fix=f"--validate-shards with some that `cogprep encode --holdout` set aside, or leave {option} out",
            )
