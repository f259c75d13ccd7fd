"""How fast a GPU and its link are timed to be: by rounds that are long enough, once all is loaded."""

import pytest
import torch

from cogtrain.memory import link

SECOND = 0.0004  # of one act
LOADING = 0.3  # of the first one


@pytest.fixture
def clock(monkeypatch):
    """A GPU's events over a clock that only `act` moves."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return now


def test_the_first_time_which_loads_the_kernel_does_not_count(clock):
    done = []

    def act():
        clock[0] += SECOND if done else LOADING
        done.append(1)

    assert link._per_second(act) == pytest.approx(1 / SECOND)
    assert clock[0] < LOADING + 0.3
