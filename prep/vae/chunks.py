"""Which frames a norm is over: a clip's chunks, as diffusers cuts them, and how many the encoder takes together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunks:
    """Frames in a row that belong to chunks: ``first`` of them, then ``more`` times ``rest``."""

    first: int
    rest: int = 0
    more: int = 0

    @property
    def count(self) -> int:
        return 1 + self.more

    @property
    def frames(self) -> int:
        return self.first + self.more * self.rest

    def halved(self) -> Chunks:
        """After pairs of frames have become one; an odd first frame stays alone, as only the first chunk may have."""
        assert self.rest % 2 == 0, f"chunks of {self.rest} frames have a frame without a partner"
        return Chunks((self.first + 1) // 2, self.rest // 2, self.more)

    def passes(self, at_once: int) -> Iterator[tuple[int, Chunks]]:
        """So many chunks at a time; each with the number of its first frame."""
        lengths = [self.first] + [self.rest] * self.more
        for start in range(0, self.count, at_once):
            together = lengths[start : start + at_once]
            yield sum(lengths[:start]), Chunks(together[0], self.rest if together[1:] else 0, len(together) - 1)


def chunks_of(frames: int, most: int) -> Chunks:
    """A clip's chunks, as diffusers' AutoencoderKLCogVideoX._encode cuts them: the first has what is left over, too."""
    count = max(frames // most, 1)
    return Chunks(frames - (count - 1) * most, most if count > 1 else 0, count - 1)


@dataclass(frozen=True)
class Together:
    """How many chunks go through a layer together: up to the first downsampling, and behind it.

    One by one, six chunks move 39 GB of context at 49x480x720, and behind the second downsampling each has too few
    pixels to fill an H200.
    """

    wide: int = 1
    deep: int = 1


def bytes_together(frames: int, height: int, width: int, channels: int, item: int) -> int:
    """With so much room all chunks of a clip go through every layer together (`together`), and more changes nothing.

    Args:
        height, width, channels: of the first layer.
        item: bytes of a number.
    """
    return 3 * (frames + 2) * height * width * channels * item


def together(chunks: Chunks, height: int, width: int, channels: int, item: int, free: float) -> Together:
    """As many as ``free`` bytes have room for, at least one.

    Args:
        height, width, channels: of the first layer.
        item: bytes of a number.
    """
    frame = height * width * channels * item
    # A layer has an input, a convolution's input, and its output. Behind the first downsampling a frame of the clip
    # takes a quarter: the pixels are an eighth, the channels twice as many.
    wide = _at_once(chunks, free / (3 * frame))
    return Together(wide, max(wide, _at_once(chunks, 4 * free / (3 * frame))))


def _at_once(chunks: Chunks, frames: float) -> int:
    fitting = [count for count in range(1, chunks.count + 1) if _longest(chunks, count) + 2 <= frames]
    return max(fitting, default=1)


def _longest(chunks: Chunks, at_once: int) -> int:
    return max(part.frames for _, part in chunks.passes(at_once))
