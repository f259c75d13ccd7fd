"""The decode pool: order, a bounded window, and children that crash, hang or raise."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pool_tasks
import pytest
from places import CHILDREN
from waiting import wait_until

from cogcommon.errors import CogError
from cogprep.processes import pool as pool_module
from cogprep.processes.child import BEAT
from cogprep.processes.pool import Pool
from cogprep.source.clip import ClipFault


@pytest.fixture(autouse=True)
def _imported_when_ready(monkeypatch):
    monkeypatch.setattr(pool_module, "answer_calls", pool_tasks.answer_calls)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The pool's time, in which nothing takes any but a beat, which takes 0.3 s: however slow the machine is."""
    now, take = [0.0], pool_module._Child.take

    def taken(child):
        result = take(child)
        now[0] += 0.3 * (result == BEAT)
        return result

    monkeypatch.setattr(pool_module._Child, "take", taken)
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    return now


def test_results_keep_the_order_of_the_tasks_and_runs_follow_each_other():
    with Pool(2) as pool:
        assert list(pool.run(pool_tasks.square, ((n,) for n in range(20)))) == [n * n for n in range(20)]
        assert list(pool.run(pool_tasks.square, [])) == []
        assert list(pool.run(pool_tasks.square, [(3,)])) == [9]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_what_goes_to_the_whole_group_is_not_for_a_child_not_even_while_it_starts(number, monkeypatch):
    start = SpawnProcess.start

    def start_and_hit(process):
        start(process)
        os.kill(process.pid, number)

    monkeypatch.setattr(SpawnProcess, "start", start_and_hit)
    with Pool(1) as pool:
        assert list(pool.run(pool_tasks.square, [(3,)])) == [9]


def test_arrays_arrive_whole_and_writable():
    with Pool(1) as pool:
        for number, result in enumerate(pool.run(pool_tasks.array_of, ((n,) for n in range(5)))):
            assert result["array"].shape == (300, 300)
            assert (result["array"] == number).all()
            assert result["empty"].shape == (0, 3)
            result["array"] += 1


def test_a_crash_a_hang_and_an_exception_cost_one_task_each():
    with Pool(2, timeout_s=2.0) as pool:
        tasks = ["a", "crash", "b", "hang", "c", "raise", "exit", "d"]
        results = list(pool.run(pool_tasks.act, ((task,) for task in tasks)))
    assert [r for r in results if not isinstance(r, ClipFault)] == ["a", "b", "c", "d"]
    assert "signal 11 SIGSEGV" in results[1].reason
    assert "no sign of life for 2 s" in results[3].reason
    assert "ValueError: an odd file" in results[5].reason
    assert "exit code 3" in results[6].reason


def test_slow_work_that_gets_on_is_not_stopped(clock):
    with Pool(1, timeout_s=1.0) as pool:
        assert list(pool.run(pool_tasks.work_slowly, [(6,)])) == ["done"]
    assert clock[0] > 1.7


def test_the_time_in_which_the_pool_itself_was_stopped_counts_for_no_child(clock, monkeypatch):
    """As by Ctrl-Z: it wakes later than its children's time is up, and the next beat is still to come."""
    wait, stopped = pool_module.wait, []

    def stop_twice(pipes, timeout):
        # A child has begun; were it stopped, it would be tried once more.
        if timeout is not None and timeout <= 1.0 and len(stopped) < 2:
            stopped.append(timeout)
            clock[0] += 1.5
            return []
        return wait(pipes, timeout)

    monkeypatch.setattr(pool_module, "wait", stop_twice)
    with Pool(1, timeout_s=1.0) as pool:
        assert list(pool.run(pool_tasks.work_slowly, [(4,)])) == ["done"]
    assert len(stopped) == 2


def test_a_child_that_dies_while_it_starts_costs_nothing(monkeypatch):
    """The first two end before they are ready, as if memory had been short."""
    starts = iter([pool_tasks.die, pool_tasks.die])
    monkeypatch.setattr(pool_module, "_PAUSE_S", 0.0)

    class Child(pool_module._Child):
        def __init__(self):
            monkeypatch.setattr(pool_module, "answer_calls", next(starts, pool_tasks.answer_calls))
            super().__init__()

    monkeypatch.setattr(pool_module, "_Child", Child)
    with Pool(1) as pool:
        assert list(pool.run(pool_tasks.square, ((n,) for n in range(3)))) == [0, 1, 4]


def test_children_that_never_start_are_one_message(monkeypatch):
    monkeypatch.setattr(pool_module, "answer_calls", pool_tasks.die)
    monkeypatch.setattr(pool_module, "_PAUSE_S", 0.0)
    with Pool(2) as pool, pytest.raises(CogError, match="cannot start: it was killed"):
        list(pool.run(pool_tasks.square, [(1,)]))


def test_a_process_that_cannot_be_made_now_is_made_later(monkeypatch):
    refusals = iter([OSError(11, "Resource temporarily unavailable")] * 2)

    class Child(pool_module._Child):
        def __init__(self):
            if refusal := next(refusals, None):
                raise refusal
            super().__init__()

    monkeypatch.setattr(pool_module, "_Child", Child)
    with Pool(1) as pool:
        assert list(pool.run(pool_tasks.square, [(3,)])) == [9]


def test_tasks_are_read_no_further_ahead_than_the_window():
    read = []

    def tasks():
        for number in range(100):
            read.append(number)
            yield (number,)

    with Pool(1) as pool:
        results = pool.run(pool_tasks.square, tasks(), window=3)
        for taken in range(1, 11):
            next(results)
            assert len(read) <= taken + 3
        results.close()  # a caller that stops early leaves a pool that still works
        assert list(pool.run(pool_tasks.square, [(5,)])) == [25]


def test_children_end_with_the_pool():
    with Pool(2) as pool:
        ids = set(pool.run(pool_tasks.process_id, [() for _ in range(4)]))
        assert all(Path(f"/proc/{i}").exists() for i in ids)
    assert not any(Path(f"/proc/{i}").exists() for i in ids)


_HANGING_PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import pool_tasks
from cogprep.processes.pool import Pool
if __name__ == "__main__":
    with Pool(1) as pool:
        print(next(pool.run(pool_tasks.process_id, [()])), flush=True)
        next(pool.run(pool_tasks.hang_from, [(Path("busy"),)]))
"""


def test_a_busy_child_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(_HANGING_PARENT.format(folder=str(CHILDREN)))
    words = [sys.executable, tmp_path / "parent.py"]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    child = Path("/proc") / parent.stdout.readline().strip()
    assert child.exists()
    wait_until((tmp_path / "busy").exists)
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.exists(), seconds=20)


_CHILD = """
import sys
from multiprocessing.connection import Connection
from cogprep.processes.child import answer_calls
answer_calls(Connection(int(sys.argv[1])))
"""


def test_a_child_whose_parent_goes_without_reading_its_answer_says_nothing():
    """The kernel tells it of a reset connection then, not of an end."""
    parents, childs = socket.socketpair()
    with childs:
        words = [sys.executable, "-c", _CHILD, str(childs.fileno())]
        child = subprocess.Popen(words, pass_fds=[childs.fileno()], stderr=subprocess.PIPE, text=True)
    assert select.select([parents], [], [], 60)[0]
    parents.close()
    assert child.communicate(timeout=60)[1] == "" and child.returncode == 0


def test_a_shared_mapping_is_freed_with_its_last_array():
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads /proc")

    def mapped(place):
        """Whether a clip's memory is there; others of this process may hold clips of their own."""
        areas = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "cogprep-clip" in line]
        ends = [[int(end, 16) for end in area[0].split("-")] for area in areas]
        return any(start <= place < end for start, end in ends)

    with Pool(1) as pool:
        result = next(pool.run(pool_tasks.array_of, [(1,)]))
        assert isinstance(result["array"], np.ndarray)
        place = result["array"].ctypes.data
        assert mapped(place)
        del result
        wait_until(lambda: not mapped(place), seconds=5)
