"""Signs of life: how a slow reader is told from one that hangs.

What reads a file says `beat` at every step that gets it further: a packet, a frame, a block.
In a decode process these reach the pool, which stops a process that has not said any for too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT_S = 300.0  # a network disk may well stall for a minute, and comes back
_EVERY_S = 0.25  # a beat costs a clock reading; only so often does one cross the pipe

_tell: Callable[[], object] | None = None
_next = 0.0


def on_beat(tell: Callable[[], object]) -> None:
    """Have ``tell`` called at the beats of this process, at most four times a second."""
    global _tell
    _tell = tell


def beat() -> None:
    """The work has got further."""
    global _next
    if _tell is not None and (now := time.monotonic()) >= _next:
        _next = now + _EVERY_S
        _tell()
