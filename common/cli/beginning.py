"""How a program's process begins: until it is ready to answer Ctrl-C, that ends it as it ends any program."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_silently() -> Iterator[None]:
    """Let Ctrl-C end the process where it would show a traceback of its imports; nothing has been done yet."""
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job does not
    if hears:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)
