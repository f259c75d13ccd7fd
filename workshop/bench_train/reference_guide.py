"""The sixteen rows of the public guide's hardware table, and one for image-to-video, of which the second says the same:
as settings, as files in ``configs/``, and as runs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cogcommon.model.families import BY_NAME
from cogtrain.settings.training import LoraSettings, SftSettings, TrainSettings

# auto and low: --memory, and on one GPU our own offload in place of ZeRO's; file: as the file says; reference: plainly.
Way = Literal["auto", "low", "file", "reference"]

# Model, method, strategy, GPUs (0: all there are, each of which holds everything), precision, and the GB of each GPU
# that the guide gives. Row n is line n.
_ROWS: tuple[tuple[str, str, str, int, str, int], ...] = (
    ("2b", "lora", "ddp", 0, "fp16", 16),
    ("5b", "lora", "ddp", 0, "bf16", 24),
    ("1.5-5b", "lora", "ddp", 0, "bf16", 35),
    ("2b", "sft", "ddp", 0, "fp16", 36),
    ("2b", "sft", "zero2-offload", 1, "fp16", 17),
    ("2b", "sft", "zero2", 8, "fp16", 17),
    ("2b", "sft", "zero3", 8, "fp16", 19),
    ("2b", "sft", "zero3-offload", 8, "bf16", 14),
    ("5b", "sft", "zero2-offload", 1, "bf16", 42),
    ("5b", "sft", "zero2", 8, "bf16", 42),
    ("5b", "sft", "zero3", 8, "bf16", 43),
    ("5b", "sft", "zero3-offload", 8, "bf16", 28),
    ("1.5-5b", "sft", "zero2-offload", 1, "bf16", 56),
    ("1.5-5b", "sft", "zero2", 8, "bf16", 55),
    ("1.5-5b", "sft", "zero3", 8, "bf16", 55),
    ("1.5-5b", "sft", "zero3-offload", 8, "bf16", 40),
    ("5b-i2v", "lora", "ddp", 0, "bf16", 24),
)
_MODELS = {
    "2b": ("CogVideoX-2B, text-to-video", "THUDM/CogVideoX-2b"),
    "5b": ("CogVideoX-5B, text-to-video or image-to-video", "THUDM/CogVideoX-5b (or -5b-I2V)"),
    "5b-i2v": ("CogVideoX-5B-I2V, image-to-video", "THUDM/CogVideoX-5b-I2V"),
    "1.5-5b": ("CogVideoX1.5-5B, text-to-video or image-to-video", "THUDM/CogVideoX1.5-5B (or -5B-I2V)"),
}
_SPREAD = {
    "ddp": "every GPU holds everything",
    "zero2-offload": "optimizer states in host memory",
    "zero2": "optimizer states and gradients spread over the GPUs",
    "zero3": "weights, gradients and optimizer states spread over the GPUs",
    "zero3-offload": "weights and optimizer states in host memory",
}
_ALONE = {
    "ddp": "On one GPU --memory low takes the least of it.",
    "zero2-offload": "On one GPU --strategy ddp takes less time, and less of the host; with --memory low the least of "
    "the GPU, too.",
}


@dataclass(frozen=True)
class GuideRow:
    """One row of the guide's table, as we run it."""

    number: int
    family: str
    method: Literal["lora", "sft"]
    given: dict[str, Any]  # the settings that its file gives
    guide_gb: int  # GPU memory that the guide gives

    @property
    def settings(self) -> TrainSettings:
        return (LoraSettings if self.method == "lora" else SftSettings)(**self.given, config=Path(self.file))

    @property
    def processes(self) -> int | None:
        """GPUs that the row is about; None: any number, each of which holds everything."""
        return self.given.get("nproc")

    @property
    def gpus(self) -> int:
        """GPUs on which it is shown: as many as it is about, else one."""
        return self.processes or 1

    @property
    def file(self) -> str:
        """Its file, from the repository's root."""
        gpus = f"-{self.processes}gpu" if self.processes else ""
        return f"configs/{self.number:02}-{self.family}-{self.method}-{self.given['strategy']}{gpus}.toml"

    def changes(self, way: Way) -> dict[str, str]:
        """What a way of running the row changes in its file."""
        if way not in ("auto", "low"):
            return {}
        strategy = {"strategy": "ddp"} if self.processes == 1 else {}
        return {**strategy, "memory": way}

    def settings_for(self, way: Way) -> TrainSettings:
        return replace(self.settings, **self.changes(way))  # type: ignore[arg-type]

    def command(self, way: Way) -> str:
        """What a user types."""
        words = ["cogtrain", self.method, "--config", self.file]
        for name, value in self.changes(way).items():
            if self.given[name] != value:
                words += [f"--{name}", value]
        return shlex.join(words) + " --shards out/*.tar"

    def toml(self, takes: str) -> str:
        """The text of its file.

        Args:
            takes: memory and seconds, and what they were measured or computed on; one line.
        """
        model, name = _MODELS[self.family]
        strategy = self.given["strategy"]
        what = f"LoRA of rank {self.given['rank']}" if self.method == "lora" else "all weights"
        gpus = f"{self.processes} GPU{'s' * (self.processes > 1)}" if self.processes else "all GPUs"
        alone = _ALONE.get(strategy) if self.method == "sft" else None
        lines = [
            self.command("file"),
            "",
            f"{model}: {what}, {self.given['precision']}, {gpus}; {_SPREAD[strategy]}.",
            takes,
            f"The public guide to fine-tuning gives {self.guide_gb} GB a GPU for this row.",
            f"Shards: cogprep encode --data-root ds/ --resolution {BY_NAME[self.family].native} --model {name}",
            *([alone] if alone else []),
        ]
        comment = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return comment + "\n" + "".join(f"{name} = {_toml_value(value)}\n" for name, value in self.given.items())


def _toml_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-")
    return f'"{value}"' if isinstance(value, str) else str(value)


@lru_cache
def guide_rows() -> dict[int, GuideRow]:
    """The rows by number."""
    rows = {}
    for number, (family, method, strategy, gpus, precision, guide_gb) in enumerate(_ROWS, start=1):
        lora = method == "lora"
        given: dict[str, Any] = {"strategy": strategy, "precision": precision}
        given |= {"nproc": gpus} if gpus else {}
        given |= {"rank": 128} if lora else {}
        given |= {"lr": (LoraSettings if lora else SftSettings)().lr, "batch_size": 1, "memory": "auto"}
        rows[number] = GuideRow(number, family, "lora" if lora else "sft", given, guide_gb)
    return rows
