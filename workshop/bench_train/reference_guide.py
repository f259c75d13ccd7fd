"""The sixteen rows of the public guide's hardware table: ``configs/NN-*.toml``, as files of settings and as runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import resolve
from cogtrain.settings import LoraSettings, SftSettings, TrainSettings

# auto and low: --memory, and on one GPU our own offload in place of ZeRO's; file: as the file says; reference: plainly.
Way = Literal["auto", "low", "file", "reference"]

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the repository
_NAME = re.compile(r"(\d+)-(.+?)-(lora|sft)-.+")
_GUIDE = re.compile(r"guide to fine-tuning gives (\d+) GB")


@dataclass(frozen=True)
class GuideRow:
    """One row: its file, read."""

    number: int
    file: Path
    family: str
    settings: TrainSettings
    guide_gb: int  # GPU memory that the guide gives

    @property
    def method(self) -> str:
        return "lora" if isinstance(self.settings, LoraSettings) else "sft"

    @property
    def processes(self) -> int | None:
        """GPUs that the row is about; None: any number, each of which holds everything."""
        return self.settings.nproc

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
        words = ["cogtrain", self.method, "--config", f"configs/{self.file.name}"]
        for name, value in self.changes(way).items():
            if getattr(self.settings, name) != value:
                words += [f"--{name}", value]
        return shlex.join(words) + " --shards out/*.tar"


@lru_cache
def guide_rows() -> dict[int, GuideRow]:
    """The rows by number; it works in the repository, where the files are."""
    rows = {}
    for file in sorted(_CONFIGS.glob("*.toml")):
        name, guide = _NAME.fullmatch(file.stem), _GUIDE.search(file.read_text(encoding="utf-8"))
        assert name and guide, file
        settings = resolve(LoraSettings if name[3] == "lora" else SftSettings, {}, file)
        rows[int(name[1])] = GuideRow(int(name[1]), file, name[2], settings, int(guide[1]))
    return rows
