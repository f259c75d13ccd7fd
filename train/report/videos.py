"""A folder of videos of one prompt, as `generate` and `compare` make them: each is written as soon as it is there."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cogcommon.errors import SettingError
from cogcommon.files.atomic import scratch_file
from cogcommon.files.failures import check_writable, disk_errors
from cogcommon.files.ownership import Made, check_own_folder, take_output
from cogcommon.media.video import Frames, write_mp4

from ..runs.folder import SHEET_FILE
from .sheet import Column, contact_sheet

SHEET = "contact sheet"


def file_name(name: str) -> str:
    """The file of a video: ``side by side`` is ``side-by-side.mp4``."""
    return f"{name.replace(' ', '-')}.mp4"


class VideoFolder:
    """The folder of --out, or one below it.

    Args:
        by: what makes the files in it.
        asked: all that the videos depend on.
        fps: frames a second.

    Attributes:
        files: those that were written, by their names in words.
    """

    def __init__(self, folder: Path, by: str, asked: str, fps: float) -> None:
        self.folder, self.asked = folder, asked
        self.files: dict[str, Path] = {}
        self._by, self._fps = by, fps

    def made_before(self, *names: str) -> Made | None:
        """The record of what has been made for the same request; None where there is nothing yet.

        Args:
            names: of the files that will be written.

        Raises:
            SettingError: the folder is somebody's, or another request's, or one of the files is.
            DiskError: nothing may be written there.
        """
        check_writable(self.folder)
        before = check_own_folder(self.folder, self._by, "--out")
        if before and before.request != self.asked:
            raise SettingError(
                "this folder holds a video of another prompt, or of other settings or weights",
                where=f"--out {self.folder}",
                fix="--out with another folder, or leave it out: every prompt gets a folder of its own",
            )
        if before:
            before.refuse_foreign(*names)
        return before

    def add(self, name: str, frames_FHWC: Frames) -> None:
        """Write a video, whole or not at all."""
        with self._taken() as made, scratch_file(made.folder) as scratch:
            write_mp4(scratch, frames_FHWC, self._fps)
            self.files[name] = made.commit(scratch, file_name(name))

    def add_sheet(self, title: str, facts: str, columns: Sequence[Column]) -> None:
        """Write the `contact_sheet`."""
        sheet = io.BytesIO()
        contact_sheet(title, facts, columns, self._fps).save(sheet, "PNG")
        with self._taken() as made:
            self.files[SHEET] = made.commit_bytes(SHEET_FILE, sheet.getvalue())

    @contextmanager
    def _taken(self) -> Iterator[Made]:
        with disk_errors(self.folder):
            yield take_output(self.folder, self._by, "--out", self.asked)
