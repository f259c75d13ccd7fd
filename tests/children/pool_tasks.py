"""What the children of the pool tests run; a spawned child must be able to import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from cogprep.dataset import probe as probing
from cogprep.dataset.surveyed import decode_as_surveyed
from cogprep.processes import child
from cogprep.source.clip import ClipFault
from cogprep.source.heartbeat import beat


def answer_calls(pipe):
    """As the pool's own. A child that begins with this one has imported what is here before it says that it is ready:
    on a busy machine that takes as long as some tests let a task take."""
    child.answer_calls(pipe)


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


def work_slowly(beats):
    """With so many beats that reach the pool: so seldom that each does."""
    for _ in range(beats):
        time.sleep(0.26)
        beat()
    return "done"


def hang_from(path):
    """Does nothing more, once a file says so."""
    path.touch()
    time.sleep(60)


def disturb(name, path):
    """Beside a clip, a file CLIP.NAME-kill or CLIP.NAME-hang does that to the process.

    A digit in such a file is how many times more it happens.
    """
    for what in ("kill", "hang"):
        order = path.with_name(f"{path.name}.{name}-{what}")
        if order.exists() and (left := int(order.read_text())) > 0:
            order.write_text(str(left - 1))
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)


def decode(*arguments):
    disturb("decode", next(argument for argument in arguments if isinstance(argument, Path)))
    return decode_as_surveyed(*arguments)


def probe(paths, **named):
    for path in paths:
        disturb("probe", path)
    return probing.probe_clips(paths, **named)


def find_fault(*arguments):
    """A verdict of the decoder on every clip beside which there is a file CLIP.fault."""
    path = next(argument for argument in arguments if isinstance(argument, Path))
    return ClipFault("damaged") if path.with_name(f"{path.name}.fault").exists() else decode_as_surveyed(*arguments)


def process_id():
    return os.getpid()


def die(_pipe):
    os.kill(os.getpid(), signal.SIGKILL)
