"""The settings of what shows a run and uses what was trained: `cogtrain watch`, `generate`, `compare` and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import setting
from cogcommon.model.device import Precision

STEPS, GUIDANCE, SEED = 50, 6.0, 42  # of a video, as diffusers' pipelines have them; validation draws with the same

_WEIGHTS, _VIDEO = "Weights", "Video"


@dataclass(frozen=True)
class WatchSettings:
    """Settings of ``cogtrain watch``."""

    runs: list[Path] = setting([], "run folders", shown="required", positional=True)
    port: int | None = setting(None, "port on this machine", shown="8420, or any other that is free")


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of ``cogtrain generate``."""

    run: Path | None = setting(
        None, "run folder to take weights and model from, or a checkpoint-N in it, or the address of its mirror "
        "(s3://...)", section=_WEIGHTS,
    )  # fmt: skip
    strength: float = setting(1.0, "how strongly the run's LoRA acts; 1: as trained", section=_WEIGHTS)
    lora: list[str] = setting(
        [], "LoRA files, instead of a run, each with its strength or as trained: mine.safetensors=0.8; names of "
        "diffusers, PEFT, kohya or ComfyUI", section=_WEIGHTS,
    )  # fmt: skip
    transformer: Path | None = setting(None, "diffusers transformer folder, instead of a run", section=_WEIGHTS)
    model: str | None = setting(
        None, "base checkpoint: a built-in form, a folder, or a hub id", shown="as trained", section=_WEIGHTS
    )
    prompt: list[str] = setting(
        [],
        "what the video shows; with the --id-token, if the clips were encoded with one; give it again for more videos",
        shown="required",
        section=_VIDEO,
        prose=True,
        one_word=True,
    )
    prompts: Path | None = setting(None, "text file with a prompt in each line", section=_VIDEO)
    negative_prompt: str = setting("", "what the video should not show", shown="none", section=_VIDEO, prose=True)
    image: Path | None = setting(None, "first frame (image-to-video only), cut to the video's shape", section=_VIDEO)
    resolution: str | None = setting(
        None, "FxHxW of the video", section=_VIDEO,
        shown="the run's, of several the one that keeps most of --image; else the model's own",
    )  # fmt: skip
    steps: int = setting(STEPS, "sampling steps", section=_VIDEO)
    guidance: float = setting(GUIDANCE, "scale of classifier-free guidance; 1: none", section=_VIDEO)
    seed: int = setting(SEED, "seed of the noise, the same for tuned and base", section=_VIDEO)
    fps: float | None = setting(None, "frames a second of the video", shown="the family's", section=_VIDEO)
    base: bool = setting(True, "also draw the video of the base model", section=_VIDEO)
    precision: Precision | None = setting(
        None, "number type the model computes in", shown="the family's on a GPU, fp32 on a CPU"
    )
    out: Path | None = setting(
        None, "folder for the videos", shown="RUN/generated/PROMPT-SEED-HASH, the hash of all settings"
    )
    json: bool = setting(False, "print the result as JSON")


@dataclass(frozen=True)
class CompareSettings:
    """Settings of ``cogtrain compare``."""

    run: Path | None = setting(
        None, "folder of a run, or a checkpoint-N in it", shown="required", positional=True
    )  # fmt: skip
    checkpoints: str | None = setting(
        None, "steps of its checkpoints, with commas; also last, and best: the lowest held-out loss of those there are",
        shown="the one that RUN names, else all",
    )  # fmt: skip
    strengths: str = setting("1", "strengths of the LoRA, with commas, as 0.6,0.8,1")
    prompt: list[str] = setting(
        [],
        "what the videos show; again, for more than one",
        shown="those of --validate-prompt",
        prose=True,
        one_word=True,
    )
    prompts: Path | None = setting(None, "text file with a prompt in each line")
    image: Path | None = setting(None, "first frame (image-to-video only), cut to the videos' shape")
    model: str | None = setting(None, "base checkpoint, if it is elsewhere now", shown="as trained")
    resolution: str | None = setting(
        None, "FxHxW of the videos", shown="the run's, of several the one that keeps most of --image"
    )
    steps: int = setting(STEPS, "sampling steps")
    guidance: float = setting(GUIDANCE, "scale of classifier-free guidance; 1: none")
    seed: int = setting(SEED, "seed of the noise, the same for all videos")
    fps: float | None = setting(None, "frames a second", shown="the family's")
    precision: Precision | None = setting(
        None, "number type the model computes in", shown="the family's on a GPU, fp32 on a CPU"
    )
    out: Path | None = setting(None, "folder in which each prompt gets one", shown="RUN/compared")
    json: bool = setting(False, "print the result as JSON")


@dataclass(frozen=True)
class ExportSettings:
    """Settings of ``cogtrain export``."""

    run: Path | None = setting(
        None, "run folder, or the address of its mirror (s3://...), or a checkpoint-N in it", shown="required"
    )
    to: Literal["diffusers", "comfyui", "peft", "merged"] = setting(
        "diffusers",
        "diffusers: the LoRA file, or the transformer folder of sft; comfyui: a LoRA file with the names of ComfyUI's "
        "own CogVideoX; peft: a PEFT adapter folder; merged: a transformer folder with the LoRA merged in",
    )
    model: str | None = setting(None, "base checkpoint, if it is elsewhere now", shown="as trained")
    precision: Precision | None = setting(None, "number type of merged weights", shown="the run's")
    out: Path | None = setting(None, "folder to write", shown="RUN/exported/<to>")
    json: bool = setting(False, "print the result as JSON")
