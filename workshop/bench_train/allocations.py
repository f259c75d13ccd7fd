"""Who holds the GPU's memory when most of it is held, from the allocator's own record of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

_SHOWN, _FRAMES, _EVENTS = 40, 4, 400_000
_MIB = 2**20


class Allocations:
    """Every allocation of a step. What was held before it has no known place."""

    name, steps = "allocations", 1

    def begin(self) -> None:
        import torch

        self._before = torch.cuda.memory._snapshot()["segments"]
        torch.cuda.memory._record_memory_history(context="alloc", max_entries=_EVENTS, stacks="python")

    def end(self) -> list[str]:
        import torch

        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        events = snapshot["device_traces"][torch.cuda.current_device()]
        return at_the_peak(held(self._before), events)


def held(segments: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Bytes of what is held, by address."""
    found = {}
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"].startswith("active"):
                found[block.get("address", address)] = block["size"]
            address += block["size"]
    return found


def at_the_peak(before: Mapping[int, int], events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines ``MiB  count  where``, largest first, of what is held when most is.

    Args:
        before: bytes by address that were held when the record began.
        events: of the allocator, as in torch's memory snapshot.
    """
    live = {address: (size, "held before the step") for address, size in before.items()}
    total = sum(before.values())
    peak, then = total, dict(live)
    grown = False
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _place(event.get("frames", ())))
            total += event["size"]
            grown = True
        elif event["action"] == "free_completed" and event["addr"] in live:
            if grown and total > peak:  # a summit: noted on the way down, so that not every step up is copied
                peak, then = total, dict(live)
            grown = False
            total -= live.pop(event["addr"])[0]
    if total > peak:
        peak, then = total, live
    groups: dict[str, list[int]] = defaultdict(list)
    for size, place in then.values():
        groups[place].append(size)
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))[:_SHOWN]
    return [f"{peak / _MIB:9.1f} MiB at the peak"] + [
        f"{sum(sizes) / _MIB:9.1f} MiB {len(sizes):5d} x {place}" for place, sizes in largest
    ]


def _place(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost frames outside torch's own code, and of that what it has generated."""
    shown = [
        f"{frame['name']} ({'/'.join(frame['filename'].split('/')[-2:])}:{frame['line']})"
        for frame in frames
        if "/torch/" not in frame["filename"] and frame["filename"] not in ("", "??")
    ]
    return " < ".join(shown[:_FRAMES]) or "torch"
