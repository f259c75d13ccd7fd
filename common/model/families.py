"""The five CogVideoX families, one row each, and the sizes that each can take.

A row holds what must be known before any weight is opened; everything else is
read from the checkpoint's own JSON. No other file says what a CogVideoX is: how
many frames and pixels a latent stands for, its channels, how many tokens of text.
A checkpoint belongs to the family whose
structure its transformer config has, so fine-tuned and built-in checkpoints are
recognised the same way as the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..errors import ModelError, SettingError

Task = Literal["t2v", "i2v"]
Positions = Literal["sincos", "rope", "rope+learned", "rope-slice"]


@dataclass(frozen=True, order=True)
class Resolution:
    """Frames x height x width of a clip, in pixels: ``49x480x720``."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Read ``FxHxW``; which of the families takes it is asked later, by `check_resolution`.

        Raises:
            SettingError: the text is not three numbers, or a size that no family
                takes. The message names the nearest legal sizes.
        """
        match = re.fullmatch(r"\s*([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})\s*", text)
        if not match:
            raise SettingError(
                f"{text!r} is not a resolution",
                where="--resolution",
                fix="give frames x height x width, for example --resolution 49x480x720",
            )
        resolution = cls(*(int(part) for part in match.groups()))
        faults = [family.misfit(resolution) for family in FAMILIES]
        if all(faults):
            assert faults[0]
            raise faults[0]
        return resolution

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def turned(self) -> Resolution:
        """With height and width changed for each other."""
        return Resolution(self.frames, self.width, self.height)


class LatentShape(NamedTuple):
    """Of a clip's latent, (C, F', h, w)."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def still(self) -> LatentShape:
        """Of one frame's."""
        return self._replace(frames=1)


@dataclass(frozen=True)
class Family:
    """One published CogVideoX model and the facts that must be typed.

    Numbers are from the published configs; ``scaling_factor`` multiplies an
    unscaled latent, ``snr_shift`` is the ``s`` of ``abar/(s+(1-s)*abar)``.
    What follows from them for a clip of a given size is computed below.
    """

    name: str
    hub_id: str
    builtin: str  # the form of the built-in model with the same structure
    task: Task
    layers: int
    heads: int
    head_dim: int
    latent_channels: int
    temporal: int  # frames per latent frame, after the first
    spatial: int  # pixels per latent, height and width
    patch: int  # latents per token, height and width
    patch_t: int | None  # latent frames per token; None for 1.0
    positions: Positions
    ofs: float | None  # what 1.5-I2V was trained with in its "ofs" embedding, and its pipeline passes
    text_tokens: int
    native: Resolution
    max_frames: int
    fps: int
    scaling_factor: float
    invert_image_scale: bool  # image latents are divided by the scaling factor
    snr_shift: float
    precision: Literal["fp16", "bf16"]
    conditions: tuple[str, ...] = ()  # what is given beside the caption, by name; I2V: the first frame

    @property
    def frame_step(self) -> int:
        """A clip has a multiple of so many frames, and one: latent frames after the first come in twos."""
        return 2 * self.temporal

    @property
    def pixel_step(self) -> int:
        """Height and width are multiples of this: whole tokens."""
        return self.spatial * self.patch

    def latent_frames(self, frames: int) -> int:
        """F' = (F-1)/4+1; odd for every legal F."""
        return (frames - 1) // self.temporal + 1

    def latent(self, resolution: Resolution) -> LatentShape:
        """The shape of a clip's latent."""
        height, width = resolution.height // self.spatial, resolution.width // self.spatial
        return LatentShape(self.latent_channels, self.latent_frames(resolution.frames), height, width)

    def padded_frames(self, latent_frames: int) -> int:
        """Latent frames that the transformer sees: 1.5 puts some before a clip's, so that they make whole tokens."""
        return self.token_frames(latent_frames) * (self.patch_t or 1)

    def padded_latent(self, resolution: Resolution) -> LatentShape:
        """The shape of a clip's latent as the transformer sees it."""
        latent = self.latent(resolution)
        return latent._replace(frames=self.padded_frames(latent.frames))

    def token_frames(self, latent_frames: int) -> int:
        """Tokens of the transformer in time."""
        return -(-latent_frames // (self.patch_t or 1))

    def tokens(self, resolution: Resolution) -> int:
        """Tokens of the transformer for one clip, its caption included."""
        _, frames, height, width = self.latent(resolution)
        return self.token_frames(frames) * (height // self.patch) * (width // self.patch) + self.text_tokens

    def frames_fault(self, frames: int) -> str | None:
        """What is wrong with a number of frames. One frame is a picture, which a text-to-video model learns from, too.

        Its latent has one frame, which 1.5 puts before itself once more (`padded_frames`).
        """
        step = self.frame_step
        if frames % step == 1 and (frames > step or self.task == "t2v"):
            return None
        few = ", ".join(str(step * count + 1) for count in (1, 2, 3))
        if frames == 1:
            what = f"1 frame is a picture, and {self.name} makes a video of one"
            return f"{what}: it learns from clips of {step}N+1 frames ({few}, ...); text-to-video models take pictures"
        return f"{frames} frames: CogVideoX takes {step}N+1 frames ({few}, ... {6 * step + 1}, ...)"

    def frames_near(self, frames: int) -> tuple[int, int]:
        """Two numbers of frames that it takes, below and above one that it does not."""
        low = max(1, (frames - 1) // self.frame_step) * self.frame_step + 1
        return low, low + self.frame_step

    def misfit(self, resolution: Resolution) -> SettingError | None:
        """Why the VAE and the patches cannot take a size, and the nearest that they can."""
        frames, height, width = resolution.frames, resolution.height, resolution.width
        step, where = self.pixel_step, f"--resolution {resolution}"
        if width % step and not self.frames_fault(width) and not (frames % step or height % step):
            return SettingError(
                f"{resolution} has the frames at the end; they come first",
                where=where,
                fix=f"--resolution {width}x{frames}x{height}, if {frames} is the height",
            )
        if fault := self.frames_fault(frames):
            low, high = self.frames_near(frames)
            fix = f"--resolution {low}x{height}x{width} or {high}x{height}x{width}"
            return SettingError(fault, where=where, fix=fix)
        for name, size in (("height", height), ("width", width)):
            if size < step or size % step:
                near = [max(step, round(size / step) * step) for size in (height, width)]
                return SettingError(
                    f"{name} {size} is not a multiple of {step}",
                    where=where,
                    fix=f"--resolution {frames}x{near[0]}x{near[1]}",
                )
        return None

    @property
    def in_channels(self) -> int:
        """Channels of the transformer's input: each condition adds a latent's."""
        return self.latent_channels * (1 + len(self.conditions))

    @property
    def ddim(self) -> bool:
        """Published sampler: DDIM for 2B, DPM with dynamic guidance for the others."""
        return self.positions == "sincos"


_LATENTS: dict[str, Any] = {"latent_channels": 16, "temporal": 4, "spatial": 8, "patch": 2}
_V1: dict[str, Any] = _LATENTS | {
    "patch_t": None, "ofs": None, "text_tokens": 226, "native": Resolution(49, 480, 720), "max_frames": 49, "fps": 8,
}  # fmt: skip
_V15: dict[str, Any] = _LATENTS | {
    "patch_t": 2, "text_tokens": 224, "native": Resolution(81, 768, 1360), "max_frames": 161, "fps": 16,
}  # fmt: skip
_5B: dict[str, Any] = {
    "layers": 42, "heads": 48, "head_dim": 64, "scaling_factor": 0.7, "snr_shift": 1.0, "precision": "bf16",
}  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family(
        name="2b", hub_id="THUDM/CogVideoX-2b", builtin="tiny-2b", task="t2v", positions="sincos",
        layers=30, heads=30, head_dim=64, scaling_factor=1.15258426, snr_shift=3.0, precision="fp16",
        invert_image_scale=False, **_V1,
    ),
    Family(
        name="5b", hub_id="THUDM/CogVideoX-5b", builtin="tiny", task="t2v", positions="rope",
        invert_image_scale=False, **_5B, **_V1,
    ),
    Family(
        name="5b-i2v", hub_id="THUDM/CogVideoX-5b-I2V", builtin="tiny-i2v", task="i2v", positions="rope+learned",
        invert_image_scale=False, conditions=("image",), **_5B, **_V1,
    ),
    Family(
        name="1.5-5b", hub_id="THUDM/CogVideoX1.5-5B", builtin="tiny-1.5", task="t2v", positions="rope-slice",
        ofs=None, invert_image_scale=False, **_5B, **_V15,
    ),
    Family(
        name="1.5-5b-i2v", hub_id="THUDM/CogVideoX1.5-5B-I2V", builtin="tiny-1.5-i2v", task="i2v",
        positions="rope-slice", ofs=2.0, invert_image_scale=True, conditions=("image",), **_5B, **_V15,
    ),
)  # fmt: skip
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
BUILTIN_NAMES: tuple[str, ...] = tuple(family.builtin for family in FAMILIES)
RANDOM = "random-"  # before the name of a built-in form: the same model, and nothing in it is ever trained


def family_of(transformer_config: Mapping[str, Any], *, where: str) -> Family:
    """The family whose structure a transformer's ``config.json`` has.

    Raises:
        ModelError: no family has it, or a typed fact contradicts the config.
    """
    get = transformer_config.get
    positions: Positions
    if not get("use_rotary_positional_embeddings"):
        positions = "sincos"
    elif get("patch_size_t") is not None:
        positions = "rope-slice"
    else:
        positions = "rope+learned" if get("use_learned_positional_embeddings") else "rope"
    out_channels = get("out_channels") or FAMILIES[0].latent_channels
    task: Task = "i2v" if get("in_channels") == 2 * out_channels else "t2v"
    for family in FAMILIES:
        if (family.positions, family.task, family.patch_t) != (positions, task, get("patch_size_t")):
            continue
        facts = {
            "in_channels": family.in_channels,
            "max_text_seq_length": family.text_tokens,
            "patch_size": family.patch,
        }
        for key, value in facts.items():
            has = get(key, family.patch if key == "patch_size" else None)  # by default diffusers' own
            if has != value:
                raise ModelError(
                    f"a {family.name} transformer with {key} {has}; the family has {value}",
                    where=where,
                    fix="use an unmodified CogVideoX transformer config",
                )
        return family
    raise ModelError(
        f"not a CogVideoX transformer that we know (positions {positions}, task {task}, "
        f"temporal patch {get('patch_size_t')})",
        where=where,
        fix="use one of " + ", ".join(family.hub_id for family in FAMILIES),
    )


def check_resolution(
    family: Family, native: Resolution, transformer_config: Mapping[str, Any], resolution: Resolution
) -> None:
    """Refuse a size that the checkpoint cannot take, and name the sizes it can.

    1.0-I2V has learned positions: another height or width raises inside
    diffusers, another frame count silently swaps them for sincos. 1.5 slices
    its RoPE table, which ends at sample_height x sample_width.

    Raises:
        SettingError: with the sizes that are possible.
    """
    if misfit := family.misfit(resolution):
        raise misfit
    if family.positions == "rope+learned" and resolution != native:
        raise SettingError(
            f"{family.name} was trained with positions fixed at {native}; it cannot take {resolution}",
            where=f"--resolution {resolution}",
            fix=f"--resolution {native}",
        )
    if resolution.frames > family.max_frames:
        raise SettingError(
            f"{resolution.frames} frames: {family.name} takes at most {family.max_frames}",
            where=f"--resolution {resolution}",
            fix=f"--resolution {family.max_frames}x{resolution.height}x{resolution.width}",
        )
    if family.positions == "rope-slice":
        most_h, most_w = (
            transformer_config[name] * family.spatial // family.pixel_step * family.pixel_step
            for name in ("sample_height", "sample_width")
        )
        if resolution.height > most_h or resolution.width > most_w:
            fits = Resolution(resolution.frames, min(resolution.height, most_h), min(resolution.width, most_w))
            fix = f"--resolution {fits}"
            if resolution.width <= most_h and resolution.height <= most_w:
                fix += f"; or --resolution {resolution.turned}, if height and width changed places"
            raise SettingError(
                f"{resolution.height}x{resolution.width}: this checkpoint's positions end at {most_h}x{most_w}",
                where=f"--resolution {resolution}",
                fix=fix,
            )
