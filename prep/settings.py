"""The settings of `cogprep`: what is encoded, how it is cut, and how the work is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import setting
from cogcommon.errors import ModelError, SettingError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.device import Precision
from cogcommon.model.families import FAMILIES, Family, Resolution, Task
from cogcommon.model.published import known_checkpoint
from cogcommon.words import bytes_of, counted

from .dataset.lists import DataSet, read_lists
from .source.clip_cache import default_cache, use_cache
from .source.heartbeat import TIMEOUT_S
from .video.cut import Crop, Cut, Fit, FrameMode, HdrMode, Short

DEFAULT_MODEL: dict[Task, str] = {"t2v": "THUDM/CogVideoX-5b", "i2v": "THUDM/CogVideoX-5b-I2V"}

_RATES = " or ".join(str(rate) for rate in sorted({family.fps for family in FAMILIES}))  # 8 or 16
_A_MODEL: dict[Task, str] = {"t2v": "a text-to-video model", "i2v": "an image-to-video model"}

Posterior = Literal["moments", "sample"]
Tiling = Literal["off", "on", "auto"]
Encoder = Literal["auto", "diffusers"]
EngineName = Literal["local", "ray"]
CaptionForm = Literal["long", "short"]


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
    id_token: str = setting("", "word put in front of every caption", shown="none", section="Data")
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
        for name, least in {
            "start": 0, "stride": 1, "holdout": 0, "shard_samples": 1, "image_variants": 1, "workers": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):  # a NaN neither
                flag = "--" + name.replace("_", "-")
                raise SettingError(f"{value} is too small", where=flag, fix=f"{flag} {least} or more")
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
        size = bytes_of(self.shard_bytes)
        if size is None:
            raise SettingError(
                f"{self.shard_bytes!r} is not a size", where="--shard-bytes", fix="for example --shard-bytes 500MB"
            )
        return size

    @property
    def cache_bytes(self) -> int:
        """--cache-size in bytes."""
        size = bytes_of(self.cache_size)
        if size is None:
            raise SettingError(
                f"{self.cache_size!r} is not a size", where="--cache-size", fix="for example --cache-size 50GB"
            )
        return size

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

    gpu: str | None = setting(
        None,
        "the card whose time is foretold, as 4090, l4 or a100-80",
        shown="this machine's, else an H200",
        section="Work",
    )
    json: bool = setting(False, "print everything as JSON", section="Work")


@dataclass(frozen=True)
class InitSettings:
    """Every option of `cogprep init`."""

    ds: Path | None = setting(None, "folder with clips, and their captions", shown="required", positional=True)
    json: bool = setting(False, "print what was found and written as JSON")

    def __post_init__(self) -> None:
        if self.ds is None:
            raise SettingError("no folder", where="DS", fix="name the folder that your clips are in: cogprep init ds")

    @property
    def root(self) -> Path:
        assert self.ds is not None  # __post_init__
        return self.ds


@dataclass(frozen=True)
class SplitSettings:
    """Every option of `cogprep split`."""

    film: Path | None = setting(None, "a long video, or a folder of them", shown="required", positional=True)
    out: Path | None = setting(None, "folder for the lists of its parts, and the sheets of the cuts", shown="required")
    scenes: bool = setting(False, "cut where the scene changes, which is what is done without --every, too")
    every: float | None = setting(None, "cut every so many seconds instead, wherever scenes change")
    shortest: float = setting(2.0, "seconds that a part must last")
    longest: float = setting(10.0, "seconds that a part may last; a longer scene is divided into equal parts")
    workers: int | None = setting(None, "processes that decode", shown="by cores and free memory")
    json: bool = setting(False, "print what was found and written as JSON")

    def __post_init__(self) -> None:
        if self.film is None:
            raise SettingError("no video", where="FILM", fix="cogprep split film.mp4 --out ds")
        if self.out is None:
            raise SettingError("no folder for the lists", where="--out", fix="--out ds, a folder of its own")
        if self.scenes and self.every is not None:
            raise SettingError("scenes, or pieces of one length?", where="--scenes, --every", fix="give one of the two")
        for name in ("every", "shortest", "longest"):
            value = getattr(self, name)
            if value is not None and not 0.1 <= value < float("inf"):
                raise SettingError(f"{value:g} s is too short", where=f"--{name}", fix=f"--{name} 0.1 or more")
        most, flag = (self.longest, "--longest") if self.every is None else (self.every, "--every")
        if most < self.shortest:
            raise SettingError(
                f"{flag} {most:g} is shorter than --shortest {self.shortest:g}: nothing would be left",
                where=f"{flag}, --shortest",
                fix=f"{flag} {most:g} --shortest {most:g}",
            )
        if self.workers is not None and self.workers < 1:
            raise SettingError(f"{self.workers} is too small", where="--workers", fix="--workers 1 or more")

    @property
    def source(self) -> Path:
        assert self.film is not None  # __post_init__
        return self.film

    @property
    def root(self) -> Path:
        """The new data root."""
        assert self.out is not None  # __post_init__
        return self.out


@dataclass(frozen=True)
class CaptionSettings:
    """Every option of `cogprep caption`."""

    ds: Path | None = setting(None, "folder with videos.txt and prompts.txt", shown="required", positional=True)
    model: str = setting(
        "Qwen/Qwen2.5-VL-3B-Instruct", "vision-language model: hub id or folder, of any kind that transformers loads"
    )
    form: CaptionForm = setting("long", "a paragraph, which CogVideoX was trained with, or a sentence")
    instruction: str = setting("", "what to ask of the model instead", shown="by --form", prose=True)
    prefix: str = setting("", "word to put in front of every caption", shown="none")
    frames: int = setting(8, "frames of each clip that the model sees, spread over it")
    target: str = setting(DEFAULT_MODEL["t2v"], "the CogVideoX that captions are for; its tokenizer says what fits")
    prompts: str = setting("prompts.txt", "name of the list whose blank lines are filled")
    videos: str = setting("videos.txt", "name of the list of clips and pictures")
    workers: int = setting(2, "processes that decode clips")
    json: bool = setting(False, "print what was done as JSON")

    def __post_init__(self) -> None:
        if self.ds is None:
            raise SettingError("no folder", where="DS", fix="name the folder of your lists: cogprep caption ds")
        for name in ("frames", "workers"):
            if getattr(self, name) < 1:
                raise SettingError(f"{getattr(self, name)} is too small", where=f"--{name}", fix=f"--{name} 1 or more")

    @property
    def root(self) -> Path:
        assert self.ds is not None  # __post_init__
        return self.ds


@dataclass(frozen=True)
class CleanSettings:
    """Every option of `cogprep clean-cache`."""

    out: Path = setting(Path("out"), "folder with the shards")
    all: bool = setting(False, "remove everything that was made here, not only what is stale or half-written")
    dry_run: bool = setting(False, "only list what would be removed")
    yes: bool = setting(False, "remove without asking")
    json: bool = setting(False, "print the list as JSON")


@dataclass(frozen=True)
class PreviewSettings:
    """Every option of `cogprep preview`."""

    out: Path = setting(Path("out"), "folder with the shards", positional=True)
    to: Path | None = setting(None, "folder for the page and the sheets", shown="OUT/preview")
    samples: int | None = setting(
        None, "samples to show, from all over the folder", shown="8, or 3 of a large size on a CPU"
    )
    frames: int = setting(9, "frames to decode of each sample, from its first: 9, 17, ...")
    model: str | None = setting(None, "checkpoint to decode with", shown="the one that encoded the folder")
    json: bool = setting(False, "print paths and PSNR as JSON")

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise SettingError(f"{self.samples} is too small", where="--samples", fix="--samples 1 or more")
        self.check_frames(FAMILIES)

    def check_frames(self, families: Sequence[Family]) -> None:
        """Refuse a number of frames that none of the families' VAEs decodes.

        Raises:
            SettingError: with two numbers near it.
        """
        faults = [family.frames_fault(self.frames) for family in families]
        if self.frames == 1 or all(faults):
            low, high = families[0].frames_near(self.frames)
            fault = faults[0] or "1 frame: the first three of a clip's latent are decoded together"
            raise SettingError(fault, where=f"--frames {self.frames}", fix=f"--frames {low} or {high}")


@dataclass(frozen=True)
class InspectSettings:
    """Every option of `cogprep inspect`."""

    out: Path = setting(Path("out"), "folder with the shards", positional=True)
    json: bool = setting(False, "print everything as JSON")


@dataclass(frozen=True)
class IndexSettings:
    """Every option of `cogprep index`."""

    out: Path = setting(Path("out"), "folder with the shards", positional=True)
    json: bool = setting(False, "print what was put back as JSON")


@dataclass(frozen=True)
class VerifySettings:
    """Every option of `cogprep verify`."""

    out: Path = setting(Path("out"), "folder with the shards", positional=True)
    reencode: int = setting(0, "encode this many samples again and report the largest difference")
    workers: int = setting(1, "processes that decode clips for --reencode")
    model: str | None = setting(None, "checkpoint for --reencode, if it is elsewhere now", shown="as encoded")
    json: bool = setting(False, "print the result as JSON")

    def __post_init__(self) -> None:
        if self.reencode < 0 or self.workers < 1:
            raise SettingError(
                "a number is too small", where="--reencode, --workers", fix="--reencode 0 or more, --workers 1 or more"
            )
