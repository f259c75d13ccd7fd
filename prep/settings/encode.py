"""The settings of `cogprep encode` and `validate`: what is encoded, how it is cut, and how the work is spread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import check_least, setting, size_of
from cogcommon.errors import ModelError, SettingError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.device import Precision
from cogcommon.model.families import FAMILIES, Resolution, Task
from cogcommon.model.published import known_checkpoint
from cogcommon.words import counted

from ..dataset.lists import DataSet, read_lists
from ..source.clip_cache import default_cache, use_cache
from ..source.heartbeat import TIMEOUT_S
from ..video.cut import Crop, Cut, Fit, FrameMode, HdrMode, Short

DEFAULT_MODEL: dict[Task, str] = {"t2v": "THUDM/CogVideoX-5b", "i2v": "THUDM/CogVideoX-5b-I2V"}

_RATES = " or ".join(str(rate) for rate in sorted({family.fps for family in FAMILIES}))  # 8 or 16
_A_MODEL: dict[Task, str] = {"t2v": "a text-to-video model", "i2v": "an image-to-video model"}

Posterior = Literal["moments", "sample"]
Tiling = Literal["off", "on", "auto"]
Encoder = Literal["auto", "diffusers"]
EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class PlanSettings:
    """What decides the plan: `validate` shows it, `encode` carries it out."""

    data_root: Path | None = setting(
        None,
        "folder with prompts.txt, videos.txt and the clips, or an address: s3://bucket/ds",
        shown="required",
        section="Data",
    )
    prompts: str = setting("prompts.txt", "name of the list of captions, one per line", section="Data")
    videos: str = setting(
        "videos.txt",
        "name of the list of clips and pictures, one path per line, or a part: a.mp4#t=12.5,18",
        section="Data",
    )
    images: str | None = setting(
        None,
        "name of the list of first frames (image-to-video)",
        shown="images.txt if present, else the first used frame",
        section="Data",
    )
    id_token: str = setting(
        "", "word put in front of every caption that does not begin with it", shown="none", section="Data"
    )
    out: Path = setting(Path("out"), "folder for the shards, or an address: s3://bucket/out, gs://...", section="Data")
    cache: Path | None = setting(
        None,
        "folder of this machine for shards on their way to an address, and for clips from one",
        shown="~/.cache/cogprep",
        section="Data",
    )
    cache_size: str = setting("50GB", "bytes of clips from addresses that are kept there, as 500MB", section="Data")

    model: str | None = setting(
        None,
        "hub id, diffusers folder, or built in: tiny, tiny-2b, tiny-i2v, tiny-1.5, tiny-1.5-i2v",
        shown=f"{DEFAULT_MODEL['t2v']}, or -5b-I2V with --task i2v",
        section="Model",
    )
    task: Task | None = setting(None, "text-to-video or image-to-video", shown="the model's", section="Model")

    resolution: list[str] = setting(
        [],
        "frames x height x width; several make buckets, and each clip goes to the one whose shape fits it best; "
        "pictures go to those of one frame, as 1x480x720",
        shown="required",
        section="Cut",
        commas=True,
    )
    frames: FrameMode = setting(
        "auto",
        "which frames are used, none twice unless it stays on screen. auto: at the family's "
        f"{_RATES} fps where the clip is long enough, else spread over the clip; even: always spread; fps: at the "
        "family's rate, or the clip is rejected; head: the first ones in a row; reference: every (n // F)-th, as in "
        "the original guide",
        section="Cut",
    )
    start: float = setting(0.0, "seconds to skip at the beginning of every clip", section="Cut")
    stride: int = setting(1, "use only every n-th source frame", section="Cut")
    short: Short = setting("reject", "reject a clip with too few frames, or repeat its last frame", section="Cut")
    fit: Fit = setting(
        "crop", "scale to cover and cut off the rest (crop), distort (stretch), or add black bars (pad)", section="Cut"
    )
    crop: Crop = setting(
        "center", "which part --fit crop keeps; random depends on --seed and the clip's content", section="Cut"
    )

    hdr: HdrMode = setting(
        "tonemap",
        "PQ and HLG: map their light to SDR's (BT.2390, reference white 203 cd/m2, BT.2020 to BT.709), or reject them",
        section="Cut",
    )

    holdout: int | None = setting(
        None,
        "clips to set aside in OUT/val for validation, chosen by content",
        shown="as many as before, at first none",
        section="Shards",
    )
    shard_samples: int | None = setting(None, "samples per shard", shown="by --shard-bytes", section="Shards")
    shard_bytes: str = setting("1GB", "size of a shard, as 500MB or 2GB", section="Shards")
    posterior: Posterior = setting(
        "moments", "store the posterior's mean and std (moments), or one sample", section="Encode"
    )
    tiling: Tiling = setting(
        "auto", "run the VAE in tiles, which takes less memory; auto: only where it is needed", section="Encode"
    )
    image_variants: int = setting(4, "pre-noised first frames to store per clip (image-to-video)", section="Encode")
    precision: Precision | None = setting(
        None, "number type of the VAE and T5", shown="the family's on a GPU, fp32 on a CPU", section="Encode"
    )
    seed: int = setting(42, "seed of every random choice", section="Encode")
    workers: int | None = setting(None, "processes that decode clips", shown="by cores and free memory", section="Work")
    clip_timeout: float = setting(
        TIMEOUT_S,
        "seconds that a clip's decoder may take without getting any further, before it is stopped",
        section="Work",
    )

    def __post_init__(self) -> None:
        if self.data_root is None:
            raise SettingError("no data root", where="--data-root", fix="--data-root FOLDER, the one with prompts.txt")
        if not self.resolution:
            raise SettingError("no resolution", where="--resolution", fix="for example --resolution 49x480x720")
        check_least(self, start=0, stride=1, holdout=0, shard_samples=1, image_variants=1, workers=1)
        if not self.clip_timeout > 0:
            raise SettingError(
                f"{self.clip_timeout:g} is too small", where="--clip-timeout", fix=f"--clip-timeout {TIMEOUT_S:g}"
            )
        if self.out.resolve() == self.root.resolve():
            raise SettingError(
                "the shards would lie among your clips",
                where=f"--out {self.out} is the data root",
                fix="--out takes a folder of its own, for example --out out",
            )
        _ = self.shard_size, self.buckets, self.cache_bytes

    @property
    def root(self) -> Path:
        assert self.data_root is not None  # __post_init__
        return self.data_root

    @property
    def buckets(self) -> tuple[Resolution, ...]:
        """The resolutions, each once, in the order given."""
        return tuple(dict.fromkeys(Resolution.parse(text) for text in self.resolution))

    @property
    def shard_size(self) -> int:
        """--shard-bytes in bytes."""
        return size_of(self, "shard_bytes", "500MB")

    @property
    def cache_bytes(self) -> int:
        """--cache-size in bytes."""
        return size_of(self, "cache_size", "50GB")

    def keep_clips(self) -> None:
        """Have clips behind addresses kept in --cache, by this process and those that it starts."""
        use_cache(self.cache or default_cache(), self.cache_bytes)

    def samples_a_shard(self, sample_bytes: int) -> int:
        """As asked for by number, else as many of this size as --shard-bytes takes, at least one."""
        return self.shard_samples or max(1, self.shard_size // sample_bytes)

    @property
    def cut(self) -> Cut:
        """How clips are cut in time and space."""
        return Cut(
            frames=self.frames,
            start=self.start,
            stride=self.stride,
            short=self.short,
            fit=self.fit,
            crop=self.crop,
            seed=self.seed,
            hdr=self.hdr,
        )

    def check_holdout(self, held: int, of: int) -> None:
        """Refuse to hold out every clip: nothing would be left to train on.

        Args:
            held: clips that are held out.
            of: clips in all, each content once.
        """
        if held and held >= of:
            raise SettingError(
                f"all {counted(of, 'clip')} are set aside for validation; none is left to train on",
                where="--holdout",
                fix=f"--holdout {of - 1} or less" if of > 1 else "--holdout 0",
            )

    def read_lists(self, task: Task) -> DataSet:
        """The data root's lists, with their faults (`lists.read_lists`)."""
        return read_lists(
            self.root,
            task=task,
            prompts=self.prompts,
            videos=self.videos,
            images=self.images,
            id_token=self.id_token,
        )

    def open_model(self, *, geometry: bool = False) -> Checkpoint:
        """Open the checkpoint, checked against task and resolutions. No weights are read.

        Args:
            geometry: only sizes and number types will be asked for; a published model then needs no network.

        Raises:
            ModelError: there is no such model.
            SettingError: the model is of the other task, or cannot take a size.
        """
        name = self.model or DEFAULT_MODEL[self.task or "t2v"]
        if not geometry:
            return self._checked(open_checkpoint(name))
        try:
            return self._checked(known_checkpoint(name))
        except SettingError as misfit:  # our table has the least of 1.5's sizes; its own config may know larger ones
            try:
                return self._checked(open_checkpoint(name))
            except ModelError:
                raise misfit from None

    def _checked(self, checkpoint: Checkpoint) -> Checkpoint:
        family = checkpoint.family
        if self.task and self.task != family.task:
            raise SettingError(
                f"{checkpoint.name} is {_A_MODEL[family.task]}",
                where=f"--task {self.task}",
                fix=f"leave --task out, or name {_A_MODEL[self.task]}, for example --model {DEFAULT_MODEL[self.task]}",
            )
        for bucket in self.buckets:
            checkpoint.check_resolution(bucket)
        return checkpoint


@dataclass(frozen=True)
class EncodeSettings(PlanSettings):
    """Every option of `cogprep encode`."""

    encoder: Encoder = setting(
        "auto",
        "the VAE's encoder on a GPU. auto: fused kernels where they prove right, else diffusers'",
        section="Encode",
    )
    config: Path | None = setting(None, "TOML file of settings; what is given here as an option wins", section="Work")
    engine: EngineName = setting(
        "local", "who encodes: the GPUs of this host (local), or those of a Ray cluster (ray)", section="Work"
    )
    ray_address: str = setting(
        "auto",
        "the Ray cluster: auto, which is the one that runs on this host or that RAY_ADDRESS names, or HOST:6379",
        section="Work",
    )
    node_timeout: float = setting(
        120.0,
        "seconds that a GPU of the Ray cluster may give no sign of life before its shard goes to another",
        section="Work",
    )
    gpus: str = setting("all", "GPUs of this host to use: all, or a number", section="Work")
    worker: str | None = setting(
        None,
        "encode slice i of n of the planned shards, as 2/8",
        shown="1/1, or from RANK and WORLD_SIZE, an srun step, or JOB_COMPLETION_INDEX and JOB_COMPLETION_COUNT",
        section="Work",
    )
    strict: bool = setting(
        False, "exit with 2 if any clip was rejected, left for the next run, or kept without its file", section="Work"
    )
    retry_rejected: bool = setting(
        False, "try rejected clips again, which otherwise wait until their content or a setting changes", section="Work"
    )
    replace: bool = setting(
        False, "drop what another data root, or other lists, have put into OUT and these have not", section="Work"
    )
    yes: bool = setting(
        False, "do not ask before another --holdout moves clips between training and validation", section="Work"
    )
    json: bool = setting(False, "print the report as JSON", section="Work")


@dataclass(frozen=True)
class ValidateSettings(PlanSettings):
    """Every option of `cogprep validate`: the plan's, so that what is looked at is what is encoded."""

    config: Path | None = setting(
        None, "TOML file of settings, the one of encode; what is given here as an option wins", section="Work",
        file_of=EncodeSettings,
    )  # fmt: skip
    gpu: str | None = setting(
        None,
        "the card whose time is foretold, as 4090, l4 or a100-80",
        shown="this machine's, else an H200",
        section="Work",
    )
    json: bool = setting(False, "print everything as JSON", section="Work")
