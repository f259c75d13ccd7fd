"""A pool of child processes for work that may crash or hang in native code.

FFmpeg reads whatever files people have. One that makes it crash or loop must
cost only that clip, so every clip is read in a spawned child. A child that dies, or
gives no sign of life for too long (`heartbeat`), is replaced and its task is tried once
more; then it becomes a `ClipFault` that is no verdict on the clip. Results come in
the order of the tasks through a window of fixed length, so memory is bounded by
the window however many clips there are.

Large arrays do not pass through the pipe: the child lays them into an anonymous
file in memory and passes its descriptor, which the parent maps (49x480x720 frames
are 51 MB; /dev/shm, which containers limit to 64 MB, is not used).
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import reduction
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from cogcommon.cli.interrupt import unheard
from cogcommon.errors import CogError
from cogcommon.files.memory import free_host_memory

from ..source.clip import ClipFault
from ..source.heartbeat import TIMEOUT_S
from ..source.source_file import IN_MEMORY
from .child import BEAT, answer_calls

R = TypeVar("R")

# What a decode process takes, at most: its clip and the sample's own first frame, each held whole, and 365 MB more
# for 4K (17x480x720 of 3840x2160 H.264; 130 MB for 49x480x720 of 640x360).
WORKER_BYTES = 2 * IN_MEMORY + 384 * 2**20

_START_S = 180.0  # a child that has not imported its modules by then never will
_TRIES = 2  # of a task whose child died, hung, or ran out of memory
_STARTS = 4  # children in a row that died while they started, none of them running: it is not chance
_PAUSE_S = 1.0  # before the next start after one that failed


@cache
def default_workers() -> int:
    """One decode worker per core that this process may use, and no more than its free memory holds. Counted once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_host_memory() // WORKER_BYTES))


@dataclass(eq=False)
class Task(Generic[R]):
    """A call for a child: waiting, given to one, then done with a result or a fault."""

    call: bytes
    done: threading.Event = field(default_factory=threading.Event)
    result: R | ClipFault | None = None
    tries: int = 0

    def finish(self, result: R | ClipFault) -> None:
        self.result = result
        self.call = b""
        self.done.set()


class _Child:
    """A spawned process, the pipe to it, and the task it works on."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=answer_calls, args=(far_end,), name="cogprep-decode", daemon=True)
        try:
            with unheard():
                self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            far_end.close()
        self.ready = False
        self.task: Task[Any] | None = None
        self.deadline = time.monotonic() + _START_S

    def give(self, task: Task[Any], timeout_s: float) -> None:
        self.task = task
        self.deadline = time.monotonic() + timeout_s
        self.pipe.send_bytes(task.call)

    def take(self) -> Any:
        """The result that lies in the pipe, or `BEAT`. Raises EOFError or OSError when the child died."""
        message = self.pipe.recv()
        if message == BEAT:
            return BEAT
        body, sizes = message
        if not sizes:
            return pickle.loads(body)
        # The parent holds the only reference: the mapping goes when the last array over it goes.
        descriptor = reduction.recv_handle(self.pipe)
        try:
            memory = memoryview(mmap.mmap(descriptor, sum(sizes)))
        finally:
            os.close(descriptor)
        buffers, start = [], 0
        for size in sizes:
            buffers.append(memory[start : start + size])
            start += size
        return pickle.loads(body, buffers=buffers)

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)  # one that waits for a dead network disk cannot even be killed
        self.pipe.close()


class Pool:
    """``workers`` children that run functions of importable modules.

    Use as a context manager; leaving it kills the children. `run` may be called many
    times, one run at a time.

    Args:
        workers: child processes.
        timeout_s: a child that gives no sign of life for longer is stopped.
    """

    def __init__(self, workers: int, *, timeout_s: float = TIMEOUT_S) -> None:
        assert workers > 0
        self.workers = workers
        self.timeout_s = timeout_s
        self._waiting: deque[Task[Any]] = deque()
        self._children: list[_Child] = []
        self._failure: CogError | None = None
        self._failed_starts = 0  # in a row
        self._next_start = 0.0  # not before this time
        self._closing = False
        self._wake_out, self._wake_in = os.pipe()
        self._thread = threading.Thread(target=self._pump, name="cogprep-pool", daemon=True)

    def __enter__(self) -> Pool:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def begin(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> Task[R]:
        """Begin ``function(*arguments)``, which a `run` will ask for; a task that none does is for `drop`."""
        task: Task[R] = Task(pickle.dumps((function, arguments), protocol=5))
        self._waiting.append(task)
        self._wake()
        return task

    def drop(self, tasks: Iterable[Task[Any]]) -> None:
        """Do not start what nobody will read."""
        for task in tasks:
            with contextlib.suppress(ValueError):
                self._waiting.remove(task)

    def run(
        self, function: Callable[..., R], tasks: Iterable[tuple[Any, ...] | Task[R]], *, window: int | None = None
    ) -> Iterator[R | ClipFault]:
        """``function(*task)`` for every task, in order.

        Args:
            function: importable in a child; its exceptions become passing `ClipFault`s.
            tasks: argument tuples, or calls that are begun, read as the window moves on, in the caller's thread.
            window: tasks under way or finished and not yet taken; twice the workers by default.

        Raises:
            CogError: the children cannot start at all.
        """
        window = window or 2 * self.workers
        under_way: deque[Task[R]] = deque()
        source = iter(tasks)
        try:
            while True:
                while len(under_way) < window and (task := next(source, None)) is not None:
                    under_way.append(task if isinstance(task, Task) else self.begin(function, task))
                if not under_way:
                    return
                first = under_way.popleft()
                first.done.wait()
                if self._failure is not None:
                    raise self._failure
                assert first.result is not None
                yield first.result
        finally:  # the caller stopped early: do not start what it will not read
            self.drop(under_way)

    def _wake(self) -> None:
        os.write(self._wake_in, b".")

    def _pump(self) -> None:
        """The pool's own thread: hand out tasks, collect results, bury and replace children."""
        try:
            while not self._closing:
                self._hand_out()
                now = time.monotonic()
                due = [child.deadline for child in self._children if child.task is not None or not child.ready]
                if self._waiting and self._next_start > now:
                    due.append(self._next_start)
                patience = max(min(due) - now, 0) if due else None
                pipes = {child.pipe: child for child in self._children}
                events = wait([*pipes, self._wake_out], patience)
                if patience is not None:
                    self._allow_for(time.monotonic() - now - patience)
                for event in events:
                    if event == self._wake_out:
                        os.read(self._wake_out, 65536)
                    else:
                        self._collect(pipes[event])  # type: ignore[index]
                self._stop_late()
        except CogError as error:
            self._failure = error
        except BaseException as error:  # a defect of ours; the caller must not wait for ever
            self._failure = CogError(f"the decode pool failed: {error!r}")
            traceback.print_exc()
        finally:
            for child in self._children:
                child.stop()
                if child.task is not None:
                    child.task.finish(ClipFault("the pool was closed"))
            while not self._closing:  # failed: let every caller know
                while self._waiting:
                    self._waiting.popleft().finish(ClipFault("the pool failed"))
                time.sleep(0.05)

    def _hand_out(self) -> None:
        while self._waiting:
            idle = [child for child in self._children if child.task is None and child.ready]
            if idle:
                try:
                    task = self._waiting.popleft()
                except IndexError:  # the caller has taken it back
                    return
                try:
                    idle[0].give(task, self.timeout_s)
                except OSError:  # it died while idle, so it is not the task's doing
                    idle[0].task = None
                    self._waiting.appendleft(task)
                    self._bury(idle[0], "")
                continue
            starting = sum(not child.ready for child in self._children)
            if (
                len(self._children) < self.workers
                and starting < len(self._waiting)
                and time.monotonic() >= self._next_start
            ):
                self._start()
                continue
            return

    def _start(self) -> None:
        try:
            self._children.append(_Child())
        except OSError as error:  # no more processes, memory or descriptors, for now
            self._count_failed_start(error.strerror or str(error))

    def _collect(self, child: _Child) -> None:
        try:
            result = child.take()
        except (EOFError, OSError):
            child.process.join(5)
            self._bury(child, f"the decoder crashed on it: {_ending(child.process.exitcode)}")
            return
        if result is BEAT:
            child.deadline = time.monotonic() + self.timeout_s
            return
        if not child.ready:
            child.ready = True
            self._failed_starts = 0
            return
        task, child.task = child.task, None
        if task is not None:
            self._settle(task, result)

    def _settle(self, task: Task[Any], result: Any) -> None:
        """A task has its result, unless that is a passing fault of its first try."""
        task.tries += 1
        if isinstance(result, ClipFault) and result.passing and task.tries < _TRIES:
            self._waiting.appendleft(task)
        else:
            task.finish(result)

    def _allow_for(self, overslept: float) -> None:
        """Give the children their time anew where this process, and mostly they with it, was stopped (Ctrl-Z, a host
        that froze): it woke later than it had meant to."""
        if overslept > self.timeout_s / 10:
            for child in self._children:
                child.deadline = max(child.deadline, time.monotonic() + self.timeout_s)

    def _stop_late(self) -> None:
        now = time.monotonic()
        for child in list(self._children):
            if (child.task is not None or not child.ready) and now > child.deadline:
                self._bury(child, f"gave no sign of life for {self.timeout_s:g} s; the decoder was stopped")

    def _bury(self, child: _Child, why: str) -> None:
        """Part with a child; the task that it had is tried once more, or has a fault."""
        self._children.remove(child)
        child.stop()
        if not child.ready:
            self._count_failed_start(_ending(child.process.exitcode))
        elif child.task is not None:
            self._settle(child.task, ClipFault(why, passing=True))

    def _count_failed_start(self, why: str) -> None:
        """It may be the moment (memory was short), unless no child comes up any more.

        Raises:
            CogError: then.
        """
        self._failed_starts += 1
        self._next_start = time.monotonic() + _PAUSE_S
        if self._failed_starts >= _STARTS and not any(child.ready for child in self._children):
            raise CogError(
                f"the decode processes cannot start: {why}",
                fix="look at the messages above; often it is too little memory for --workers processes",
            )


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name if -exitcode in signal.Signals._value2member_map_ else ""
        if name == "SIGKILL":
            return "it was killed (SIGKILL; often the system, out of memory)"
        return f"it crashed with signal {-exitcode} {name}".rstrip()
    return f"it ended with exit code {exitcode}"
