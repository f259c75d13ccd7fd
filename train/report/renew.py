"""Writes ``report.html`` of a run anew, for a command that has drawn videos into the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cogcommon.errors import RunError

from ..runs.claim import claimed
from ..runs.folder import FACTS_FILE, REPORT_FILE
from .page import write_report


def renew_report(run: Path | None, drawn: Iterable[Path], say: Callable[[str], None]) -> None:
    """Write the report of a run anew if videos were drawn into its folder. It never fails: the videos are there.

    While another process trains in the folder nothing is written: that process writes the report at its end.

    Args:
        run: its folder; None, or one without facts, as a checkpoint's or one that is not a run's: nothing is done.
        drawn: the folders of the videos.
        say: is told where the page is, or why it is not new.
    """
    if run is None or not (run / FACTS_FILE).is_file():
        return
    if not any(folder.resolve().is_relative_to(run.resolve()) for folder in drawn):
        return
    try:
        with claimed(run):
            say(f"{'report':<14} {write_report(run)}")
    except RunError as error:
        say(f"note: {run / REPORT_FILE} does not show it yet: {error.what}")
    except Exception as error:  # whatever is wrong with the page, the videos are there
        say(f"note: {run / REPORT_FILE} does not show it: {getattr(error, 'what', error)}")
