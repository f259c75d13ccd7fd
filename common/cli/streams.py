"""What becomes of a program when its output can be written no more: `| head` has enough, `tee` is gone, a disk is full.

A command that prints its result ends there. One that writes files goes on: hours of training are not lost with a pipe
(`outlive_output`). Both are held where bytes leave the process, for all that prints: us, rich, libraries.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

_NAMES = {1: "the standard output", 2: "the standard error"}
_FOR_A_WHILE = (errno.ENOSPC, errno.EDQUOT)  # there may be room again


class Output(io.FileIO):
    """The end of standard output or error at which bytes leave the process.

    Attributes:
        outlived: what cannot be written is dropped, which is said once on the other stream. Otherwise the first such
            error is raised, with the stream's name as its ``filename``, and what comes later is dropped.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.outlived = False
        self._told = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _FOR_A_WHILE or not self.outlived:
                self._leave()
            if not self.outlived:
                error.filename = _NAMES[self.fileno()]
                raise
            self._tell(error)
            return memoryview(data).nbytes

    def _leave(self) -> None:
        """Write nowhere from now on; nor do the programs that we start, such as compilers, which would die of it."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)

    def _tell(self, error: OSError) -> None:
        if self._told:
            return
        self._told = True
        name = _NAMES[self.fileno()]
        line = f"note: {name} cannot be written ({error.strerror}): the work goes on without it\n"
        with suppress(OSError):  # past Python's streams: this thread may hold one, and another wait for it
            other = next(number for number in _NAMES if number != self.fileno())
            os.write(other, (b"\r\x1b[K" if os.isatty(other) else b"") + line.encode())


def guard_output() -> None:
    """Put an `Output` below ``sys.stdout`` and ``sys.stderr``, where these are the process's own."""
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if stream is original and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _guarded(stream))


def outlive_output() -> None:
    """Go on, from now, where the output can be written no more; without `guard_output` before, nothing changes."""
    for stream in (sys.stdout, sys.stderr):
        if (end := _end_of(stream)) is not None:
            end.outlived = True


@contextmanager
def result_alone(wanted: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that takes the result; it is printed, alone on stdout, at the end of the ``with``.

    What is printed meanwhile goes to stderr: what libraries print, in C too, and the processes that are started.

    Args:
        wanted: else nothing is changed.
    """
    result: list[str] = []
    if not wanted:
        yield result.append
        return
    try:
        with _as_descriptor_2(), redirect_stdout(sys.stderr):
            yield result.append
    finally:
        for text in result:
            print(text, flush=True)


@contextmanager
def _as_descriptor_2() -> Iterator[None]:
    """Let descriptor 1 be 2, inside the ``with``; nothing where one of them is closed."""
    _flush()
    try:
        os.fstat(2)
        before = os.dup(1)
    except OSError:
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(before, 1)
        os.close(before)


def _flush() -> None:
    """Write out what Python's stdout and C's hold."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    flush_c()


def flush_c() -> None:
    """Write out what libraries in C have printed."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).fflush(None)


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    end = Output(stream.fileno())
    return io.TextIOWrapper(
        end if stream.write_through else io.BufferedWriter(end),  # type: ignore[arg-type]  # as Python's own, with -u
        encoding=stream.encoding, errors=stream.errors, newline="\n", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


def _end_of(stream: TextIO | None) -> Output | None:
    buffer = getattr(stream, "buffer", None)
    end = getattr(buffer, "raw", buffer)
    return end if isinstance(end, Output) else None
