"""A wish to stop that cannot get lost: Ctrl-C, and what schedulers send before they take a machine away.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a library's bare ``except:`` or in a
destructor it is dropped, which one in about a hundred was while the models' libraries were being imported. So it is
remembered, and raised again when the next piece of work is done.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .stages import before_each

# Ctrl-C; what Slurm and Kubernetes send (and process 1 of a container would never hear by itself); what
# `sbatch --signal` is told to send before the time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_asked = 0  # the signal that came first


def catch_interrupts() -> None:
    """Remember these signals from now on. One that is ignored, as in a shell's background job, stays ignored."""
    before_each(raise_if_interrupted)
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _interrupted)


def raise_if_interrupted() -> None:
    """Raise an interrupt that was dropped.

    Raises:
        KeyboardInterrupt: there was one.
    """
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def unheard() -> Iterator[None]:
    """Processes started within never hear Ctrl-C and USR1, which go to a whole group, or job: this one ends them."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it lets them through again where it starts with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def exit_code() -> Iterator[None]:
    """Let the process end with the code of the signal that has stopped it (USR1: 138), not always with Ctrl-C's."""
    try:
        yield
    except SystemExit as end:
        if _asked and end.code == 128 + signal.SIGINT:
            sys.exit(128 + _asked)
        raise


def _interrupted(number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = _asked or number
    raise KeyboardInterrupt
