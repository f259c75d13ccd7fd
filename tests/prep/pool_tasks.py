"""What the children of the pool tests run; a spawned child must be able to import it."""

from __future__ import annotations

import os
import signal
import time

import numpy as np


def square(number):
    return number * number


def array_of(number):
    return {"number": number, "array": np.full((300, 300), number, np.uint8), "empty": np.zeros((0, 3))}


def act(what):
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(60)
    if what == "raise":
        raise ValueError("an odd file")
    if what == "exit":
        os._exit(3)
    return what


def process_id():
    return os.getpid()
