"""tensorboard and wandb, through accelerate; neither is imported unless asked for."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from cogcommon.errors import SettingError

_PROJECT = "cogtrain"  # where all runs are found together

Name = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    def log(self, values: Mapping[str, Any], step: int | None) -> None: ...

    def finish(self) -> None: ...


def check_tracker_installed(name: Name) -> None:
    """Raises:
    SettingError: the package is not there.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise SettingError(
            f"--tracker {name} needs a package that is not installed", where="--tracker", fix=f"pip install {name}"
        )


def open_tracker(name: Name, folder: Path, settings: Mapping[str, Any], done: int) -> Tracker | None:
    """A tracker of the run in ``folder``, told the settings; on rank 0.

    Args:
        settings: of the run, of any types.
        done: the step after which the run goes on; tensorboard hides what it has of later ones.
    """
    if name == "none":
        return None
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        threading.excepthook = _say_once
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=done + 1)
    else:
        # What accelerate calls the run's name is wandb's project.
        tracker = WandBTracker(os.environ.get("WANDB_PROJECT", _PROJECT), name=folder.name, dir=str(folder))
    tracker.start()
    tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})
    return tracker  # type: ignore[no-any-return]


def _say_once(args: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of tensorboard's writing thread, which hands its error to whoever writes next."""
    if getattr(args.thread, "exception", None) is not args.exc_value:
        threading.__excepthook__(args)


def _plain(value: Any) -> int | float | str | bool:
    """A value as tensorboard's hyper-parameters take it; a Path or a list makes it raise at the start of the run."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, int | float | str | bool) else str(value)
