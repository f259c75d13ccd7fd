"""How a program's process ends: as the interpreter would end it, but without taking apart all that it holds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from .streams import flush_c


def run_and_leave(run: Callable[[], None]) -> None:
    """Run a program, and end this process.

    Exit code, output and ``atexit`` functions are as ever; only then the interpreter would free one by one the modules
    of torch and what they hold of memory and of the GPU, for a second or more, which the system does at once. An error
    that is neither `SystemExit` nor Ctrl-C ends the process the interpreter's way, and so does multiprocessing a
    process of its own.
    """
    code = 0
    try:
        run()
    except SystemExit as ended:
        if multiprocessing.parent_process() is not None or not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    except KeyboardInterrupt:  # between the program's first line and its command, which would say what becomes of it
        if multiprocessing.parent_process() is not None:
            raise
        code = 128 + signal.SIGINT
    else:
        if multiprocessing.parent_process() is not None:
            return
    # Private to Python, which calls it first of all at its end. Ctrl-C ends the wait, and what was done stays done.
    with suppress(AttributeError, KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]
    with suppress(Exception, KeyboardInterrupt):  # it has said it
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start, `>&-`
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # as the interpreter's own end does
    flush_c()
    os._exit(code & 0xFF)
