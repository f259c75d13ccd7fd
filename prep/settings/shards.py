"""The settings of the commands that take a folder of shards: `cogprep inspect`, `verify`, `preview`, `index` and
`clean-cache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.settings import check_least, setting
from cogcommon.errors import SettingError
from cogcommon.model.families import FAMILIES, Family


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
        check_least(self, samples=1)
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
        check_least(self, reencode=0, workers=1)
