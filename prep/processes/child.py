"""The loop of a decode process: take a call, answer it, until the parent is gone."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import threading
import time
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..source import heartbeat
from ..source.clip import ClipFault

BEAT = "beat"  # in place of an answer: the work gets on


def answer_calls(pipe: Connection) -> None:
    """Answer calls from the pipe; the first answer, None, says that we are here."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    heartbeat.on_beat(lambda: pipe.send(BEAT))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        _answer(pipe, None)
        _answer_all(pipe)


def _answer_all(pipe: Connection) -> None:
    while True:
        function, task = pickle.loads(pipe.recv_bytes())
        try:
            result = function(*task)
        except MemoryError:
            result = ClipFault("out of memory", passing=True)
        except Exception as error:  # one clip's oddity must not end a run of days; nor is our defect its fault
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            result = ClipFault(f"unexpected {type(error).__name__}: {error} ({where})", passing=True)
        _answer(pipe, result)


def _answer(pipe: Connection, result: object) -> None:
    """Send a result; its arrays go out of band (PEP 574), through a file in memory."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if not sum(sizes):
        pipe.send((body if not views else pickle.dumps(result, protocol=5), []))
        return
    with _memory_file() as file:
        for view in views:
            file.write(view)
        file.flush()
        pipe.send((body, sizes))
        reduction.send_handle(pipe, file.fileno(), os.getppid())


def _memory_file() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("cogprep-clip"), "w+b")
    return tempfile.TemporaryFile()


def _follow(parent: int) -> None:
    """End with the parent, also while a file keeps the decoder busy for ever."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)
