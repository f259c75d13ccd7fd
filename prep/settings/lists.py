"""The settings of the commands that write lists: `cogprep init`, `split` and `caption`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcommon.cli.settings import check_least, setting
from cogcommon.errors import SettingError

from .encode import DEFAULT_MODEL

CaptionForm = Literal["long", "short"]


@dataclass(frozen=True)
class InitSettings:
    """Every option of `cogprep init`."""

    ds: Path | None = setting(None, "folder with clips, and their captions", shown="required", positional=True)
    add: bool = setting(False, "append to the lists that are there what none of their lines names yet")
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
        check_least(self, every=0.1, shortest=0.1, longest=0.1, workers=1)
        most, flag = (self.longest, "--longest") if self.every is None else (self.every, "--every")
        if most < self.shortest:
            raise SettingError(
                f"{flag} {most:g} is shorter than --shortest {self.shortest:g}: nothing would be left",
                where=f"{flag}, --shortest",
                fix=f"{flag} {most:g} --shortest {most:g}",
            )

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
        check_least(self, frames=1, workers=1)

    @property
    def root(self) -> Path:
        assert self.ds is not None  # __post_init__
        return self.ds
