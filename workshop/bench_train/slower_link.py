"""A slower link between host and GPU than the machine's, for rows with ``--link``.

After each copy its direction goes on copying, bytes that nobody needs, until copy and rest have taken as long as the
copy alone would at the wanted rate; only then does whoever waits for it go on. So the link itself is what is busy, as
on a machine where it is slower, and no multiprocessor of the GPU waits for anything. Each direction is held for
itself, as PCIe sends and receives at once, and carries one copy after the other, whichever stream queued it. A link
gives less in each direction while both are busy, so those copies have a pace of their own; where that is a third
less, a pass is within 3% of what is asked for, and a step, of both passes, nearer (`test_slower_link`).

Held are the copies of `CopyStream`: of swapped blocks, of parked activations, of weights that are trained in host
memory; and those by which the program times its link, so that ``--memory auto`` plans for the slower one. Not held
are a batch's upload (13 MB) and what DeepSpeed copies.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from cogcommon.model import copies
from cogtrain.offload.pinned import page_locked

if TYPE_CHECKING:
    import torch

_PIECE = 32 << 20  # bytes of a copy that nobody needs
_LEAST = 256 << 10  # fewer are owed until there are more: a copy of few bytes takes longer than its bytes
_LOOKED_AT = 2 << 30  # needed bytes from which the rest that the next ones need is found anew
_NEAR = 2, 300 << 20  # copies, or bytes, of one direction between two of the other: both are busy; more than a block's
_TRIED = 1 << 30  # bytes copied at first to find out what the machine's own link gives


class Pace:
    """How much more than what is needed one direction copies, found from how long copies have taken.

    Args:
        rate: bytes/s that needed bytes are to move at.
        link: bytes/s of the machine's own link, as well as it is known.
    """

    def __init__(self, rate: float, link: float) -> None:
        self._rate = rate
        self._more = max(0.0, link / rate - 1)
        self._owed = 0.0
        self._seen = self._seen_with_more = self._seconds = 0.0
        self.bytes = self.seconds = 0.0  # of all needed bytes so far, and what they took

    def more(self, size: int) -> int:
        """Bytes to copy after ``size`` needed ones."""
        self._owed += size * self._more
        if self._owed < _LEAST:
            return 0
        more, self._owed = int(self._owed), 0.0
        return more

    def took(self, size: int, more: int, seconds: float) -> None:
        """Hear how long a copy took with what came after it."""
        self.bytes, self.seconds = self.bytes + size, self.seconds + seconds
        self._seen, self._seconds = self._seen + size, self._seconds + seconds
        self._seen_with_more += size + more
        if self._seen >= _LOOKED_AT and self._seconds > 0:
            self._more = max(0.0, self._seen_with_more / self._seconds / self._rate - 1)
            self._seen = self._seen_with_more = self._seconds = 0.0


class _Direction:
    """One direction of the link.

    Args:
        target, source: of the copies that nobody needs.
    """

    def __init__(self, target: torch.Tensor, source: torch.Tensor, rate: float) -> None:
        import torch

        self._target, self._source = target, source
        self._going: deque[tuple[Any, Any, int, int, Pace]] = deque()
        self._last: Any = None
        self.queued = 0  # needed bytes
        self.since = _NEAR  # copies and bytes since the last copy of the other direction
        self.alone = self.beside = Pace(rate, rate)  # by whether the other direction copies, too
        for _ in range(_TRIED // _PIECE):
            self.copy(target, source, beside=False)
        torch.cuda.synchronize()
        self.look()
        self.own = self.alone.bytes / self.alone.seconds  # bytes/s that the machine's link gives
        self.alone, self.beside = Pace(rate, self.own), Pace(rate, self.own)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, beside: bool) -> None:
        import torch

        self.look()
        pace = self.beside if beside else self.alone
        stream = torch.cuda.current_stream()
        if self._last is not None:
            stream.wait_event(self._last)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        target.copy_(source, non_blocking=True)
        size = source.numel() * source.element_size()
        self.queued += size
        more = left = pace.more(size)
        while left > 0:
            piece = min(left, _PIECE)
            self._target[:piece].copy_(self._source[:piece], non_blocking=True)
            left -= piece
        end.record(stream)
        self._last = end
        self._going.append((begin, end, size, more, pace))

    def look(self) -> None:
        """Hear of the copies that have ended."""
        while self._going and self._going[0][1].query():
            begin, end, size, more, pace = self._going.popleft()
            pace.took(size, more, begin.elapsed_time(end) / 1000)


class SlowerLink:
    """Holds copies between a GPU and the host to a rate, in bytes/s.

    Raises:
        ValueError: the machine's own link is slower than that.
    """

    def __init__(self, device: torch.device, rate: float) -> None:
        import torch

        host = page_locked(_PIECE, device)
        there = torch.empty(_PIECE, dtype=torch.uint8, device=device)
        self._out, self._back = _Direction(host, there, rate), _Direction(there, host, rate)
        for name, direction in (("to the host", self._out), ("from the host", self._back)):
            if direction.own < rate:
                own = f"{direction.own / 1e9:.1f} GB/s"
                raise ValueError(f"--link {rate / 1e9:g}: copies {name} go at {own} here; give less than that")

    def __call__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        this, other = (self._back, self._out) if target.device.type == "cuda" else (self._out, self._back)
        copied, size = this.since
        this.copy(target, source, beside=copied < _NEAR[0] or size < _NEAR[1])
        if source.numel() * source.element_size() >= _LEAST:
            this.since, other.since = (copied + 1, size + source.numel() * source.element_size()), (0, 0)

    def begin(self) -> None:
        """Count from here on."""
        for direction in (self._out, self._back):
            direction.look()
            direction.queued = 0
            for pace in (direction.alone, direction.beside):
                pace.bytes = pace.seconds = 0.0

    def found(self, steps: int) -> dict[str, float]:
        """Of each direction: GB that one of so many steps has copied, and GB/s at which they went, alone and beside
        copies of the other."""
        found = {}
        for name, direction in (("out", self._out), ("back", self._back)):
            direction.look()
            found[f"{name}_gb"] = direction.queued / steps / 1e9
            for how, pace in (("alone", direction.alone), ("beside", direction.beside)):
                if pace.seconds:
                    found[f"{name}_{how}_gb_s"] = pace.bytes / pace.seconds / 1e9
        return found


def hold(device: torch.device, rate: float) -> SlowerLink:
    """Hold this process's copies to a rate, in bytes/s, from now on."""
    link = SlowerLink(device, rate)
    copies.queue_copy = link
    return link
