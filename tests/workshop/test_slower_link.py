"""Copies held to a rate: exactly on a link whose speed changes, and on a GPU in wall-clock time."""

import time

import pytest
import torch

from cogcommon.model import copies
from workshop.bench_train import slower_link

MIB = 2**20


class Wire:
    """A GPU's link on which a byte takes a known time, each direction with a clock of its own."""

    def __init__(self, there, back):
        self.rate = {"cpu": there, "cuda": back}
        self.clock = {"cpu": 0.0, "cuda": 0.0}

    def tensor(self, size, device="cpu"):
        return Memory(self, size, device)

    def event(self, enable_timing):
        return Mark(self)


class Memory:
    def __init__(self, wire, size, device):
        self.wire, self.size, self.device = wire, size, torch.device(device)

    def __getitem__(self, piece):
        return Memory(self.wire, min(self.size, piece.stop), self.device)

    def numel(self):
        return self.size

    def element_size(self):
        return 1

    def copy_(self, source, non_blocking):
        assert non_blocking and source.size == self.size and source.device != self.device
        way = self.device.type
        self.wire.clock[way] += 4e-6 + self.size / self.wire.rate[way]


class Mark:
    def __init__(self, wire):
        self.wire = wire

    def record(self, stream):
        self.at = dict(self.wire.clock)

    def query(self):
        return True

    def elapsed_time(self, end):
        return 1000 * max(end.at[way] - self.at[way] for way in self.at)

    def wait_event(self, event):
        pass


@pytest.fixture
def wire(monkeypatch):
    wire = Wire(there=53e9, back=56e9)
    monkeypatch.setattr(slower_link, "page_locked", lambda size, device: wire.tensor(size))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: wire.tensor(size, device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Mark(wire))
    monkeypatch.setattr(torch.cuda, "Event", wire.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return wire


def test_each_direction_goes_at_the_rate_that_is_asked_for(wire):
    link = slower_link.SlowerLink(torch.device("cuda"), 12e9)
    for there, back in ((53e9, 56e9), (31e9, 40e9)):  # then the host computes, too
        wire.rate = {"cpu": there, "cuda": back}
        for block in range(100):
            if block == 50:  # the change has been followed
                link.begin()
                begun, sent = dict(wire.clock), {"cpu": 0, "cuda": 0}
            for size, way in ((250 * MIB, "cuda"), (109 * MIB, "cpu"), (6144, "cpu"), (3 * MIB, "cuda")):
                link(wire.tensor(size, way), wire.tensor(size, {"cpu": "cuda", "cuda": "cpu"}[way]))
                if block >= 50:
                    sent[way] += size
        found = link.found(50)
        for way, name in (("cpu", "out"), ("cuda", "back")):
            rate = sent[way] / (wire.clock[way] - begun[way])
            assert rate == pytest.approx(12e9, rel=0.01)
            assert found[f"{name}_beside_gb_s"] == pytest.approx(rate / 1e9, rel=0.01)
            assert found[f"{name}_gb"] == pytest.approx(sent[way] / 50 / 1e9)


def test_a_pass_that_only_fetches_keeps_the_pace_beside_one_that_sends_too(wire):
    link = slower_link.SlowerLink(torch.device("cuda"), 12e9)
    took = {"forward": [], "backward": []}
    for _ in range(6):
        for way, rate in (("forward", 38e9), ("backward", 56e9)):
            wire.rate, begun = {"cpu": rate, "cuda": rate}, wire.clock["cuda"]
            for _ in range(42):
                link(wire.tensor(250 * MIB, "cuda"), wire.tensor(250 * MIB))
                if way == "forward":
                    link(wire.tensor(218 * MIB), wire.tensor(218 * MIB, "cuda"))
            took[way].append(42 * 250 * MIB / (wire.clock["cuda"] - begun))
    assert took["forward"][2:] == pytest.approx([12e9] * 4, rel=0.04)
    assert took["backward"][2:] == pytest.approx([12e9] * 4, rel=0.04)  # its first copies count as the forward pass's


def test_a_link_that_is_slower_already_is_told(wire):
    with pytest.raises(ValueError, match=r"--link 55: copies to the host go at 5[0-3]\.\d GB/s here; give less"):
        slower_link.SlowerLink(torch.device("cuda"), 55e9)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [6e9, 12e9])
def test_a_gpu_waits_as_long_as_a_slower_link_would_take(rate, monkeypatch):
    from cogtrain.memory.link import timed_speed
    from cogtrain.offload.pinned import page_locked

    monkeypatch.setattr(copies, "queue_copy", copies.queue_copy)  # put back afterwards
    device = torch.device("cuda", 0)
    link = slower_link.hold(device, rate)
    there = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    out, back = page_locked(256 * MIB, device), page_locked(256 * MIB, device)
    up, down = copies.CopyStream(device), copies.CopyStream(device)
    for _ in range(10):  # finds its pace
        up.copy(there, back), down.copy(out, there)
    torch.cuda.synchronize()
    link.begin()
    began = time.perf_counter()
    for _ in range(4):
        up.copy(there, back), down.copy(out, there)
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert took == pytest.approx(4 * 256 * MIB / rate, rel=0.06)  # both at once: neither waits for the other
    assert link.found(4)["out_gb"] == pytest.approx(256 * MIB / 1e9)
    timed_speed.cache_clear()
    assert timed_speed(device, torch.bfloat16).link == pytest.approx(rate, rel=0.06)
    timed_speed.cache_clear()
