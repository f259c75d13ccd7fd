"""How a program's process begins: until it is ready to answer Ctrl-C, that ends it as it ends any program."""

from __future__ import annotations

import signal
from importlib import import_module


def begin(program: str) -> None:
    """Import the command line of a program (its ``cli``), and run it, which ends this process.

    Ctrl-C ends the process while it imports, where it would show a traceback; nothing has been done yet.
    """
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job does not
    if hears:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(f"{program}.cli").main
    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
