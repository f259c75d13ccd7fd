"""Small files are asked for several at a time, and what comes back is as if they had been asked for one by one."""

from __future__ import annotations

import threading

import pytest
from waiting import wait_until

from cogcommon.files.readers import read_in_order


def test_the_order_is_the_items_whichever_is_ready_first():
    second = threading.Event()

    def call(item: int) -> int:
        if item == 0:
            wait_until(second.is_set, seconds=10)  # the first waits for the second, so both must be under way
        if item == 1:
            second.set()
        return item * item

    assert list(read_in_order(call, range(200), threads=3)) == [item * item for item in range(200)]


def test_items_are_read_a_few_ahead_of_what_is_taken():
    asked: list[int] = []

    def items():
        for item in range(1000):
            asked.append(item)
            yield item

    results = read_in_order(lambda item: item, items(), threads=2)
    assert next(results) == 0 and len(asked) <= 4
    for _ in range(10):
        next(results)
    assert len(asked) <= 14
    results.close()


def test_a_fault_is_raised_at_its_place():
    results = read_in_order(lambda item: 1 // (item - 3), range(10), threads=4)
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
