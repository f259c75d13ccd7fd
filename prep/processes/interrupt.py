"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a library's bare ``except:`` or in a
destructor it is dropped, which one in about a hundred was while the models' libraries were being imported. So it is
remembered, and raised again when the next piece of work is done.
"""

from __future__ import annotations

import signal
from types import FrameType

from cogcommon.cli.stages import before_each

_asked = False


def catch_interrupts() -> None:
    """Remember SIGINT from now on. Where it is ignored, as in a shell's background job, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
        before_each(raise_if_interrupted)


def raise_if_interrupted() -> None:
    """Raise an interrupt that was dropped.

    Raises:
        KeyboardInterrupt: there was one.
    """
    if _asked:
        raise KeyboardInterrupt


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
