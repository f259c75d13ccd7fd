"""Interlaced H.264 whose fields are coded one after the other: camcorders, broadcasts. No encoder at hand writes it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import FPS, FRAMES, card, index_shown

from cogcommon.model.families import Resolution
from cogprep.dataset.probe import Look, look_at
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip

SIZE = Resolution(9, 64, 96)
WIDTH, HEIGHT = 96, 64


class Bits:
    def __init__(self) -> None:
        self.text = ""

    def u(self, bits: int, *values: int) -> Bits:
        self.text += "".join(f"{value:0{bits}b}" for value in values)
        return self

    def ue(self, *values: int) -> Bits:
        for value in values:
            self.text += f"{value + 1:0{2 * (value + 1).bit_length() - 1}b}"
        return self

    def data(self) -> bytes:
        return bytes(int(self.text[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(self.text), 8))


def unit(head: int, payload: bytes) -> bytes:
    """A unit of a byte stream, its payload so that it holds no start code (H.264, 7.4.1)."""
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = 0 if byte else zeros + 1
    return b"\0\0\0\1" + bytes([head]) + bytes(out)


def parameter_sets(profile: int) -> bytes:
    sequence = Bits().u(8, profile, 0, 30).ue(0)
    if profile == 100:  # High, with a scaling matrix whose first list ends at once, as an encoder may write it
        sequence.ue(1, 0, 0).u(1, 0, 1, 1).ue(16).u(1, *[0] * 7)  # -8 in signed code: no further number follows
    sequence.ue(0, 0, 4, 1).u(1, 0).ue(WIDTH // 16 - 1, HEIGHT // 32 - 1).u(1, 0, 0, 1, 0, 0, 1)
    picture = Bits().ue(0, 0).u(1, 0, 0).ue(0, 0, 0).u(1, 0, 0, 0).ue(0, 0, 0).u(1, 1, 0, 0, 1)
    return unit(0x67, sequence.data()) + unit(0x68, picture.data())


def coded(luma: np.ndarray, number: int, field: int | None) -> bytes:
    """A slice of macroblocks that are not compressed (I_PCM): a frame, or a field, 1 for the bottom one."""
    first = number == 0 and field != 1  # of an IDR picture
    head = Bits().ue(0, 7, 0).u(4, number % 16).u(1, *((0,) if field is None else (1, field)))
    if first:
        head.ue(0)
    head.u(8, (2 * number + (field or 0)) % 256).u(1, *((0, 0) if first else (0,))).ue(0, 1)
    blocks = luma.reshape(luma.shape[0] // 16, 16, -1, 16).swapaxes(1, 2).reshape(-1, 256)
    data = b"".join(
        (head if at == 0 else Bits()).ue(25).data() + block.tobytes() + bytes([128]) * 128
        for at, block in enumerate(blocks)
    )
    return unit(0x65 if first else 0x61, data + b"\x80")


def film(path: Path, profile: int, together: bool) -> Path:
    """The cards in gray; every third a whole frame, the others two fields.

    Args:
        together: both fields are in one packet, as mkvmerge puts them; else each in its own.
    """
    packets = []
    for index in range(FRAMES):
        luma = card(index, WIDTH, HEIGHT).mean(axis=2).astype(np.uint8)
        if index % 3 == 2:
            parts = [coded(luma, index, None)]
        else:
            parts = [coded(luma[field::2].copy(), index, field) for field in (0, 1)]
        parts[0] = (parameter_sets(profile) if index == 0 else b"") + parts[0]
        parts = [b"".join(parts)] if together else parts
        packets += [(index, part, len(parts), place) for place, part in enumerate(parts)]
    raw = path.with_name("raw.h264")
    raw.write_bytes(b"".join(data for _, data, _, _ in packets))
    with av.open(str(raw)) as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for index, data, parts, place in packets:
            packet = av.Packet(data)
            packet.pts = packet.dts = 2 * index + place
            packet.duration, packet.time_base = 2 // parts, Fraction(1, 2 * FPS)
            packet.stream, packet.is_keyframe = stream, index == 0 and place == 0
            file.mux(packet)
    return path


@pytest.mark.parametrize(
    ("kind", "profile", "together"),
    [("ts", 77, False), ("ts", 100, False), ("mp4", 77, False), ("mp4", 100, False), ("mkv", 100, True)],
)
def test_two_fields_are_one_picture(kind, profile, together, tmp_path):
    path = film(tmp_path / f"a.{kind}", profile, together)
    look = look_at([path], [SIZE], Cut(), 8)[0]
    assert isinstance(look, Look), look
    assert (look.facts.frames, look.facts.interlaced) == (FRAMES, True)
    assert look.facts.fps == pytest.approx(FPS, rel=0.03)  # an mp4 does not say how long the last picture stays
    clip = decode_clip(path, SIZE, Cut(), 8, "key")
    assert isinstance(clip, Clip), clip
    assert [round(index_shown(picture)) for picture in clip.frames_FHWC] == list(range(0, 27, 3))
    assert clip.indices == look.picked.indices
