"""Interlaced H.264 whose fields are coded one after the other, as camcorders (AVCHD) and broadcasters write it.

FFmpeg gives such a picture as two packets, each half the lines of it, and its decoder makes one frame of them (ITU-T
H.264, 7.4.3: field_pic_flag). Which packet ends a picture that another has begun is said by its first bits alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

_SLICES, _SPS = (1, 5), 7  # nal_unit_type, table 7-1
_HEAD = 32  # bytes of a slice that say which field it is of
_HIGH = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}  # profiles with more in their header, 7.3.2.1.1


@dataclass(frozen=True)
class _Sequence:
    """What a sequence parameter set says of how its slices begin."""

    frame_num_bits: int
    planes_apart: bool


class FieldPairs:
    """Finds the second packets of pictures that come in two. Of a stream without such pictures it reads nothing.

    Args:
        codec: of the stream, not decoded yet.
    """

    def __init__(self, codec: VideoCodecContext) -> None:
        self._sequence: _Sequence | None = None
        self._begun: tuple[int, int] | None = None  # number and parity of a field that waits for its other
        header = bytes(codec.extradata or b"") if codec.name == "h264" else b""
        avcc = len(header) > 6 and header[0] == 1  # ISO/IEC 14496-15, 5.3.3.1
        self._length_bytes = (header[4] & 3) + 1 if avcc else 0
        if avcc:
            header = header[8 : 8 + int.from_bytes(header[6:8], "big")] if header[5] & 31 else b""
        for nal in [header] if avcc else _split(header):
            if nal and nal[0] & 31 == _SPS:
                self._sequence = _read_sequence(nal)

    def ends_picture(self, packet: Packet[Any]) -> bool:
        """Whether a packet, of all in their order, only has the other field of the one before."""
        if self._sequence is None:
            return False
        fields = {_field_of(nal, self._sequence) for nal in self._nals(bytes(packet)) if nal and nal[0] & 31 in _SLICES}
        alone = next(iter(fields)) if len(fields) == 1 else None  # else it has both
        begun, self._begun = self._begun, alone
        if alone is None or begun is None or alone != (begun[0], 1 - begun[1]):
            return False
        self._begun = None
        return True

    def _nals(self, data: bytes) -> Iterator[bytes]:
        """The beginnings of the packet's units (7.3.1)."""
        if not self._length_bytes:
            yield from _split(data)
            return
        at = 0
        while at + self._length_bytes < len(data):
            begin = at + self._length_bytes
            yield data[begin : begin + _HEAD]
            at = begin + int.from_bytes(data[at:begin], "big")


def _split(data: bytes) -> Iterator[bytes]:
    """The units of a byte stream (annex B); of each its beginning, but a parameter set whole."""
    for mark in re.finditer(rb"\x00\x00\x01", data):
        size = 1024 if mark.end() < len(data) and data[mark.end()] & 31 == _SPS else _HEAD
        yield data[mark.end() : mark.end() + size]


def _field_of(nal: bytes, sequence: _Sequence) -> tuple[int, int] | None:
    """The number of a slice's picture and its parity, 1 for the bottom field; None of a slice of a whole frame."""
    bits = _Bits(nal)
    bits.golomb(3)  # first_mb_in_slice, slice_type, pic_parameter_set_id
    bits.number(2 * sequence.planes_apart)
    frame_num = bits.number(sequence.frame_num_bits)
    return (frame_num, bits.number(1)) if bits.number(1) else None


def _read_sequence(nal: bytes) -> _Sequence | None:
    """A sequence parameter set (7.3.2.1.1); None where every picture is a whole frame."""
    bits = _Bits(nal)
    profile = bits.number(24) >> 16
    bits.golomb()  # its name
    planes_apart, chroma = False, 1
    if profile in _HIGH:
        chroma = bits.golomb()
        planes_apart = chroma == 3 and bool(bits.number(1))
        bits.golomb(2)  # bit depths
        bits.number(1)
        if bits.number(1):
            for index in range(12 if chroma == 3 else 8):
                if bits.number(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_num_bits = min(bits.golomb(), 12) + 4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.number(1)
        bits.golomb(2)
        bits.golomb(min(bits.golomb(), 255))
    bits.golomb()  # reference frames
    bits.number(1)
    bits.golomb(2)  # width and height
    return None if bits.number(1) else _Sequence(frame_num_bits, planes_apart)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    """See 7.3.2.1.1.1."""
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            following = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
        last = following or last


class _Bits:
    """The bits of a unit behind its first byte; past its end they are 0."""

    def __init__(self, nal: bytes) -> None:
        payload = nal[1:].replace(b"\x00\x00\x03", b"\x00\x00")  # 7.4.1
        self._value, self._left = int.from_bytes(payload, "big"), 8 * len(payload)

    def number(self, bits: int) -> int:
        """An unsigned number of so many bits."""
        self._left -= bits
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << bits) - 1)

    def golomb(self, count: int = 1) -> int:
        """The last of so many numbers in Exp-Golomb code (9.1)."""
        value = 0
        for _ in range(count):
            zeros = 0
            while zeros < 32 and self._left > 0 and not self.number(1):
                zeros += 1
            value = (1 << zeros) - 1 + self.number(zeros)
        return value
