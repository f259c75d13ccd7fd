"""Every setting of a training run (`cogtrain lora`, `sft`), once. Help, TOML and DeepSpeed's dict derive from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import check_least, flag_of, setting, size_of
from cogcommon.errors import SettingError
from cogcommon.model.device import Precision
from cogcommon.store.address import address_of, as_shown

Strategy = Literal["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]
StrategyChoice = Literal["auto", Strategy]
Memory = Literal["auto", "fast", "low"]
AdapterName = Literal["lora", "rslora"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
CaptionChoice = Literal["all", "one"]
LrSchedule = Literal["constant", "linear", "cosine"]

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")  # attention only: 59.0 M weights at rank 128 (2B), 132.1 M (5B)

FACTS_FILE = "facts.json"  # what a run worked on, in its folder (`runs.folder.RunFacts`)

_DATA, _RUN, _OPTIM, _LORA = "Data", "Run", "Optimization", "LoRA"
_HARDWARE, _SAVE, _VALIDATE = "Hardware", "Checkpoints", "Validation"


@dataclass(frozen=True)
class TrainSettings:
    """What LoRA and full fine-tuning have in common."""

    shards: list[str] = setting(
        [], "the training shards: tars, globs, brace ranges or URLs", shown="required", section=_DATA
    )
    model: str | None = setting(
        None, "another checkpoint of the same family", shown="the one the shards were made for", section=_DATA
    )
    cache: Path | None = setting(
        None, "folder on a local disk that keeps samples of shards behind URLs, for all runs of this host",
        section=_DATA,
    )  # fmt: skip
    cache_size: str = setting("200GB", "the most that --cache keeps", section=_DATA, only_with=("--cache FOLDER",))
    follow: bool = setting(
        False, "train while `cogprep encode` runs: each epoch is over the shards that are committed at its start; "
        "--shards names folders, and --steps when to end", section=_DATA,
    )  # fmt: skip
    captions: CaptionChoice = setting(
        "all", "of a clip with several captions, train all in each epoch, or one, another one each epoch", section=_DATA
    )
    repeat: list[str] = setting(
        [], "train the samples of a folder of --shards, or of one size, so many times an epoch: pictures/=8, "
        "1x480x720=8", shown="none", section=_DATA,
    )  # fmt: skip
    caption_dropout: float = setting(0.0, "share of samples trained with an empty caption", section=_DATA)
    config: Path | None = setting(None, "TOML file of settings; what is given here as an option wins", section=_RUN)
    out: Path | None = setting(
        None, "folder of the run", shown="runs/<family>-<method>-<time>", section=_RUN, beside=FACTS_FILE
    )
    steps: int | None = setting(
        None, "optimizer steps to train", shown="from --epochs", section=_RUN, instead_of="epochs"
    )
    epochs: int | None = setting(None, "passes over the samples", shown="10", section=_RUN, instead_of="steps")
    seed: int = setting(42, "seed of the order of samples and of everything drawn for them", section=_RUN)
    tracker: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "also send metrics to this tracker (metrics.jsonl is always written)", section=_RUN
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "when a loss or a gradient is not finite: stop, or skip the loss's samples, which both name, or the "
        "gradient's step", section=_RUN,
    )  # fmt: skip
    json: bool = setting(False, "print what came of it as JSON, and all else to stderr", section=_RUN)

    batch_size: int = setting(1, "samples per process and accumulation step", section=_OPTIM)
    accumulate: int = setting(1, "accumulation steps per optimizer step", section=_OPTIM, instead_of="global_batch")
    global_batch: int | None = setting(
        None, "samples per optimizer step over all processes, however many there are: --accumulate follows from it",
        shown="processes x batch size x accumulate", section=_OPTIM, instead_of="accumulate",
    )  # fmt: skip
    lr: float = setting(1e-4, "peak learning rate", section=_OPTIM)
    lr_schedule: LrSchedule = setting(
        "constant", "learning rate after the warm-up; linear and cosine reach zero at the last step", section=_OPTIM
    )
    warmup: int | None = setting(
        None, "steps of linear warm-up", shown="100, at most a tenth of the run", section=_OPTIM
    )
    optimizer: Optimizer = setting("adamw", "adamw8bit needs bitsandbytes; prodigy needs prodigyopt", section=_OPTIM)
    beta1: float = setting(0.9, "first beta of the optimizer", section=_OPTIM)
    beta2: float = setting(0.95, "second beta of the optimizer", section=_OPTIM)
    eps: float = setting(1e-8, "epsilon of the optimizer", section=_OPTIM)
    weight_decay: float = setting(1e-4, "decoupled weight decay", section=_OPTIM)
    max_grad_norm: float = setting(1.0, "clip the norm of all gradients to this; 0: do not clip", section=_OPTIM)
    timesteps: Literal["uniform", "stratified"] = setting(
        "uniform", "stratified spreads the timesteps of each global batch over the whole range", section=_OPTIM
    )
    loss_weighting: Literal["none", "min-snr"] = setting(
        "none", "how the loss is weighted over timesteps", section=_OPTIM
    )
    min_snr_gamma: float = setting(
        5.0, "gamma of --loss-weighting min-snr", section=_OPTIM, only_with=("--loss-weighting min-snr",)
    )
    ema: float = setting(
        0.0, "decay of an exponential moving average of the weights, which is then exported; 0: none",
        section=_OPTIM,
    )  # fmt: skip

    precision: Precision | None = setting(
        None, "number type the transformer computes in", section=_HARDWARE,
        shown="the family's on a GPU (2B fp16, else bf16), fp32 on a CPU",
    )  # fmt: skip
    strategy: StrategyChoice = setting(
        "auto", "how weights and optimizer states are spread over GPUs", section=_HARDWARE,
        shown="ddp for LoRA and on one GPU, else zero2",
    )  # fmt: skip
    deepspeed: Path | None = setting(
        None, "DeepSpeed JSON, merged into the one derived from these settings", section=_HARDWARE
    )
    nvme: Path | None = setting(
        None, "folder on a fast local disk for what zero3-offload moves off the GPU", section=_HARDWARE
    )
    memory: Memory = setting(
        "auto", "fast: recompute as little as fits; auto: recompute all but the attention, and move to host memory "
        "what does not fit; low: move all that can be moved", section=_HARDWARE,
    )  # fmt: skip
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "compile the transformer's blocks, once per resolution; auto: on a GPU, where a compiler is installed",
        section=_HARDWARE,
    )  # fmt: skip
    nproc: int | None = setting(None, "processes on this host", shown="one per GPU", section=_HARDWARE)

    resume: str = setting(
        "auto",
        "auto: continue what is in --out; never: start anew; or the path of a checkpoint to continue",
        section=_SAVE,
    )
    save_every: int = setting(200, "steps between checkpoints", section=_SAVE)
    save_minutes: float | None = setting(
        None, "also save when so many minutes have passed since the last checkpoint", section=_SAVE
    )
    mirror: str | None = setting(
        None, "address of a folder in an object store, as s3://bucket/runs/mine, that gets a copy of --out: of each "
        "checkpoint, and of what the run writes; where --out has none, the run goes on from there", section=_SAVE,
    )  # fmt: skip
    keep: int = setting(3, "checkpoints to keep", section=_SAVE)
    keep_best: bool = setting(
        False, "keep the checkpoint with the lowest held-out loss, too, and export that one's weights at the end",
        section=_SAVE,
    )  # fmt: skip

    validate_shards: list[str] = setting([], "held-out shards; their samples are never trained on", section=_VALIDATE)
    validate_every: int = setting(
        200, "steps between validations", section=_VALIDATE,
        only_with=("--validate-shards", "--validate-prompt", "--validate-prompts"),
    )  # fmt: skip
    validate_videos: int = setting(0, "videos of held-out captions to make at each validation", section=_VALIDATE)
    validate_prompt: list[str] = setting(
        [], "make a video of this prompt, too, and one by the base model; with the --id-token, if the clips were "
        "encoded with one; give it again for more videos; needs no --validate-shards", section=_VALIDATE, prose=True,
        one_word=True,
    )  # fmt: skip
    validate_prompts: Path | None = setting(None, "text file with such a prompt in each line", section=_VALIDATE)
    validate_image: list[Path] = setting(
        [], "first frame of these videos (image-to-video only), cut to their shape: one for all prompts, or one for "
        "each", section=_VALIDATE,
    )  # fmt: skip
    patience: int = setting(
        0, "end the run after so many validations in a row without a lower held-out loss; 0: train all steps",
        section=_VALIDATE,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise SettingError(
                f"--steps {self.steps} and --epochs {self.epochs} both say how long to train",
                where="--steps, --epochs",
                fix="give one of them",
            )
        if self.global_batch is not None and self.accumulate != 1:
            raise SettingError(
                f"--global-batch {self.global_batch} and --accumulate {self.accumulate} both say how large a step is",
                where="--global-batch, --accumulate",
                fix="give one of them",
            )
        if self.out is not None and (address := address_of(self.out)) is not None:
            raise SettingError(
                "a run's folder is on a disk; an object store gets a copy of it",
                where=f"--out {as_shown(self.out)}",
                fix=f"--out runs/{address.rpartition('/')[2]}, and --mirror {as_shown(self.out)}",
            )
        if self.mirror is not None and address_of(self.mirror) is None:
            raise SettingError(
                f"{self.mirror} is no address", where="--mirror", fix="for example --mirror s3://bucket/runs/mine"
            )
        if self.mirror is not None and self.out is None:
            raise SettingError(
                "a copy of the run's folder is wanted, and its folder is not named", where="--mirror",
                fix="--out runs/mine, too: there the run goes on, on this machine or another",
            )  # fmt: skip
        if self.validate_image and not (self.validate_prompt or self.validate_prompts):
            raise SettingError(
                "there is no prompt that it could be the first frame of",
                where=f"--validate-image {self.validate_image[0]}",
                fix='--validate-prompt "what the video shows", too',
            )
        if self.follow and self.steps is None:
            raise SettingError(
                "how long an epoch will be is not known while its shards are being encoded",
                where="--follow" + f", --epochs {self.epochs}" * (self.epochs is not None),
                fix="--steps 2000, for example: how long to train",
            )
        check_least(
            self, steps=1, epochs=1, batch_size=1, accumulate=1, global_batch=1, warmup=0, nproc=1, save_every=1,
            save_minutes=0, keep=1, validate_every=1, validate_videos=0, patience=0, lr=0, weight_decay=0,
            max_grad_norm=0, caption_dropout=0, beta1=0, beta2=0, ema=0,
        )  # fmt: skip
        for name in ("beta1", "beta2", "ema"):
            if (value := getattr(self, name)) >= 1:
                raise SettingError(f"{value} is too large", where=self.option(name), fix="a number below 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingError(f"{value} is not a finite number", where=flag_of(field), fix="a number")
        for name, why in (
            ("eps", "a weight without a gradient would be divided by zero"),
            ("min_snr_gamma", "every loss would be zero"),
        ):
            if not getattr(self, name) > 0:
                raise SettingError(
                    f"{getattr(self, name)} is too small: {why}", where=self.option(name), fix="a number above 0"
                )
        _ = self.cache_bytes
        if self.caption_dropout > 1:
            raise SettingError(f"{self.caption_dropout} is too large", where="--caption-dropout", fix="a share: 0 to 1")

    @property
    def cache_bytes(self) -> int:
        """--cache-size in bytes."""
        return size_of(self, "cache_size", "200GB")

    def option(self, name: str) -> str:
        """The option that sets a field, as typed."""
        return next(flag_of(field) for field in dataclasses.fields(self) if field.name == name)


@dataclass(frozen=True)
class LoraSettings(TrainSettings):
    """Settings of ``cogtrain lora``."""

    adapter: AdapterName = setting(
        "lora", "lora scales the adapters by alpha/rank; rslora by alpha/sqrt(rank), for large ranks", section=_LORA
    )
    rank: int = setting(128, "rank of the adapters", section=_LORA)
    alpha: float | None = setting(
        None, "strength of the adapters, as --adapter scales it", shown="rank/2; 8 for rslora", section=_LORA
    )
    init_lora: Path | None = setting(
        None, "LoRA file to begin with, of any rank, alpha and tool (names of diffusers, PEFT, kohya or ComfyUI)",
        section=_LORA,
    )  # fmt: skip
    target_modules: list[str] = setting(
        [*TARGET_MODULES], "linear layers that get an adapter", section=_LORA, commas=True
    )
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", section=_LORA)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, rank=1)
        if self.alpha is not None and not self.alpha > 0:
            raise SettingError(f"{self.alpha} is too small", where="--alpha", fix="a number above 0")
        if self.init_lora and self.nvme:
            raise SettingError(
                "adapters that begin with a file cannot be moved to a disk",
                where="--init-lora, --nvme",
                fix="leave one of them out",
            )
        if not 0 <= self.lora_dropout < 1:
            raise SettingError(f"{self.lora_dropout} is not a share", where="--lora-dropout", fix="from 0 to below 1")


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    """Settings of ``cogtrain sft``."""

    lr: float = setting(1e-5, "peak learning rate", section=_OPTIM)
