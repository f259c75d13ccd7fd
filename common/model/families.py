"""The five CogVideoX families, one row each, and the sizes that each can take.

A row holds what must be known before any weight is opened; everything else is
read from the checkpoint's own JSON. A checkpoint belongs to the family whose
structure its transformer config has, so fine-tuned and built-in checkpoints are
recognised the same way as the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ModelError, SettingError

Task = Literal["t2v", "i2v"]
Positions = Literal["sincos", "rope", "rope+learned", "rope-slice"]

VAE_SPATIAL = 8  # pixels per latent, height and width
VAE_TEMPORAL = 4  # frames per latent frame, after the first
PATCH = 2  # latents per transformer token, height and width
PIXEL_STEP = VAE_SPATIAL * PATCH


@dataclass(frozen=True, order=True)
class Resolution:
    """Frames x height x width of a clip, in pixels: ``49x480x720``."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Read ``FxHxW``.

        Raises:
            SettingError: the text is not three numbers, F is not 8N+1, or H or W
                is not a multiple of 16. The message names the nearest legal sizes.
        """
        match = re.fullmatch(r"\s*([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})\s*", text)
        if not match:
            raise SettingError(
                f"{text!r} is not a resolution",
                where="--resolution",
                fix="give frames x height x width, for example --resolution 49x480x720",
            )
        frames, height, width = (int(part) for part in match.groups())
        if width % PIXEL_STEP and width % 8 == 1 and not (frames % PIXEL_STEP or height % PIXEL_STEP):
            raise SettingError(
                f"{text} has the frames at the end; they come first",
                where=f"--resolution {text}",
                fix=f"--resolution {width}x{frames}x{height}, if {frames} is the height",
            )
        if frames < 9 or frames % 8 != 1:
            low = max(9, (frames - 1) // 8 * 8 + 1)
            raise SettingError(
                f"{frames} frames: CogVideoX takes 8N+1 frames (9, 17, 25, ... 49, ...)",
                where=f"--resolution {text}",
                fix=f"--resolution {low}x{height}x{width} or {low + 8}x{height}x{width}",
            )
        for name, size in (("height", height), ("width", width)):
            if size < PIXEL_STEP or size % PIXEL_STEP:
                raise SettingError(
                    f"{name} {size} is not a multiple of {PIXEL_STEP}",
                    where=f"--resolution {text}",
                    fix=f"--resolution {frames}x{_near16(height)}x{_near16(width)}",
                )
        return cls(frames, height, width)

    @property
    def latent_frames(self) -> int:
        """F' = (F-1)/4+1; odd for every legal F."""
        return (self.frames - 1) // VAE_TEMPORAL + 1

    @property
    def latent_height(self) -> int:
        return self.height // VAE_SPATIAL

    @property
    def latent_width(self) -> int:
        return self.width // VAE_SPATIAL

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def _near16(size: int) -> int:
    return max(PIXEL_STEP, round(size / PIXEL_STEP) * PIXEL_STEP)


@dataclass(frozen=True)
class Family:
    """One published CogVideoX model and the facts that must be typed.

    Numbers are from the published configs; ``scaling_factor`` multiplies an
    unscaled latent, ``snr_shift`` is the ``s`` of ``abar/(s+(1-s)*abar)``.
    """

    name: str
    hub_id: str
    builtin: str  # the form of the built-in model with the same structure
    task: Task
    layers: int
    heads: int
    head_dim: int
    patch_t: int | None  # latent frames per token; None for 1.0
    positions: Positions
    ofs: bool  # 1.5-I2V feeds an "ofs" embedding (2.0)
    text_tokens: int
    native: Resolution
    max_frames: int
    fps: int
    scaling_factor: float
    invert_image_scale: bool  # image latents are divided by the scaling factor
    snr_shift: float
    precision: Literal["fp16", "bf16"]
    latent_channels: int = 16

    @property
    def in_channels(self) -> int:
        """Channels of the transformer's input: I2V adds the image latent."""
        return self.latent_channels * (2 if self.task == "i2v" else 1)

    @property
    def ddim(self) -> bool:
        """Published sampler: DDIM for 2B, DPM with dynamic guidance for the others."""
        return self.positions == "sincos"


_V1: dict[str, Any] = {
    "patch_t": None, "ofs": False, "text_tokens": 226, "native": Resolution(49, 480, 720), "max_frames": 49, "fps": 8,
}  # fmt: skip
_V15: dict[str, Any] = {
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
        invert_image_scale=False, **_5B, **_V1,
    ),
    Family(
        name="1.5-5b", hub_id="THUDM/CogVideoX1.5-5B", builtin="tiny-1.5", task="t2v", positions="rope-slice",
        ofs=False, invert_image_scale=False, **_5B, **_V15,
    ),
    Family(
        name="1.5-5b-i2v", hub_id="THUDM/CogVideoX1.5-5B-I2V", builtin="tiny-1.5-i2v", task="i2v",
        positions="rope-slice", ofs=True, invert_image_scale=True, **_5B, **_V15,
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
    task: Task = "i2v" if get("in_channels") == 2 * (get("out_channels") or 16) else "t2v"
    for family in FAMILIES:
        if (family.positions, family.task, family.patch_t) != (positions, task, get("patch_size_t")):
            continue
        facts = {"in_channels": family.in_channels, "max_text_seq_length": family.text_tokens}
        for key, value in facts.items():
            if get(key) != value:
                raise ModelError(
                    f"a {family.name} transformer with {key} {get(key)}; the family has {value}",
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
        most_h = transformer_config["sample_height"] * VAE_SPATIAL // PIXEL_STEP * PIXEL_STEP
        most_w = transformer_config["sample_width"] * VAE_SPATIAL // PIXEL_STEP * PIXEL_STEP
        if resolution.height > most_h or resolution.width > most_w:
            fits = Resolution(resolution.frames, min(resolution.height, most_h), min(resolution.width, most_w))
            raise SettingError(
                f"{resolution.height}x{resolution.width}: this checkpoint's positions end at {most_h}x{most_w}",
                where=f"--resolution {resolution}",
                fix=f"--resolution {fits}",
            )
