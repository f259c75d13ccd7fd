"""One plan for all processes: the smallest share that any of them found, before any took some."""

import pytest

from cogtrain.memory.room import Room, smallest

GIB = 2**30


@pytest.mark.parametrize("cards", [2, 4, 8])
def test_the_processes_of_a_machine_share_its_memory_alike(cards):
    host = 128 * GIB
    found = smallest([("a", host - rank * GIB, 24 * GIB) for rank in range(cards)])
    assert found == Room(host - (cards - 1) * GIB, 24 * GIB, together=cards)


def test_the_poorest_machine_and_the_poorest_card_decide():
    large, small = ("a", 512 * GIB), ("b", 64 * GIB)
    found = smallest([(*large, 80 * GIB)] * 8 + [(*small, 80 * GIB), (*small, 23 * GIB)])
    assert found == Room(64 * GIB, 23 * GIB, together=2)
