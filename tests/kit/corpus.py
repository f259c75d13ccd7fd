"""Clips of every odd kind, drawn and written by the tests themselves.

Every clip shows the same card: four coloured quarters, a disc that only an undistorted
picture keeps round, and a bar that moves to the right frame by frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WIDTH, HEIGHT, FRAMES, FPS = 144, 96, 30, 24
CORNERS = np.array([[[200, 40, 40], [40, 180, 60]], [[50, 60, 200], [190, 180, 50]]], np.float64)
FULL, LIMITED = 2, 1
BT709, BT601, BT2020 = 1, 6, 9
PQ, HLG, BT2020_10_BIT = 16, 18, 14


def card(index: int, width: int = WIDTH, height: int = HEIGHT, frames: int = FRAMES) -> np.ndarray:
    """(height, width, 3) uint8 RGB of frame ``index``; drawn in the unit square, so any size shows the same."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = (x + 0.5) / width, (y + 0.5) / height
    picture = CORNERS[(y > 0.5).astype(int), (x > 0.5).astype(int)]
    bar = (index + 0.5) / frames
    picture[np.abs(x - bar) < 0.04] = 235
    return picture.astype(np.uint8)


def cards(width: int = WIDTH, height: int = HEIGHT, frames: int = FRAMES) -> list[np.ndarray]:
    return [card(index, width, height, frames) for index in range(frames)]


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """SVT-AV1, run as root, gives the calling process real-time priority and never takes it back.

    From then on a child that busy-waits for its own child (py-cpuinfo, which DeepSpeed
    asks) starves it for ever.
    """
    try:
        yield
    finally:
        if hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def write(
    path: Path,
    pictures: list[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: float = FPS,
    times: list[float] | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
    movflags: str = "faststart",
    matrix: int = BT709,
    tag: int | None = BT709,
    range_: int = LIMITED,
    tag_range: bool = True,
    trc: int | None = None,
    rotate: int | None = None,
    mirror: bool = False,
    display: list[int] | None = None,
    sar: Fraction | None = None,
    sound: bool = False,
) -> Path:
    """Encode RGB (or RGBA) pictures.

    Args:
        matrix, range_: what the pixels are really converted with.
        tag, tag_range: what the file says of it; None or False leaves it untagged.
        rotate: degrees counter-clockwise that a player is told to turn the picture.
        display: the whole display matrix, nine numbers.
    """
    height, width = pictures[0].shape[:2] if pictures else (HEIGHT, WIDTH)
    quality = {"libx264": {"crf": "6"}, "libx265": {"crf": "6", "x265-params": "log-level=none"}}.get(codec, {})
    mov = format in (None, "mp4", "mov") and path.suffix in (".mp4", ".mov", ".m4v")
    muxer = {"movflags": movflags} if mov and movflags else {}
    with ordinary_scheduling(), av.open(str(path), "w", format=format, options=muxer) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {**quality, **(options or {})}
        context = stream.codec_context
        if times is not None:
            context.time_base = Fraction(1, 1000)
        if tag is not None:
            context.colorspace, context.color_primaries = tag, tag
            context.color_trc = BT2020_10_BIT if tag == BT2020 else tag
        if trc is not None:
            context.color_trc = trc
        if tag_range:
            context.color_range = range_
        if sar is not None:
            context.sample_aspect_ratio = sar
        if rotate is not None or mirror:
            stream.set_display_rotation(rotate or 0, mirror)
        if display is not None:
            stream.set_display_matrix(display)
        audio = _add_sound(file) if sound else None
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture), format="rgba" if picture.shape[2] == 4 else "rgb24"
            )
            yuv = frame.reformat(
                format=pix_fmt,
                dst_colorspace=matrix if matrix != BT601 else 5,
                src_color_range=FULL,
                dst_color_range=range_,
                interpolation="BICUBIC",
            )
            yuv.color_range = range_ if tag_range else 0
            yuv.colorspace = tag if tag is not None else 2
            yuv.pts = index
            if times is not None:
                yuv.pts, yuv.time_base = round(times[index] * 1000), Fraction(1, 1000)
            file.mux(stream.encode(yuv))
        file.mux(stream.encode(None))
        if audio is not None:
            _mux_sound(file, audio)
    return path


def _add_sound(file):
    return file.add_stream("aac", rate=44100)


def _mux_sound(file, stream, seconds: float = 1.0) -> None:
    for start in range(0, int(44100 * seconds), 1024):
        tone = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, start
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        _mux_sound(file, _add_sound(file))
    return path


def cut_short(source: Path, path: Path, share: float = 0.6) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damage(source: Path, path: Path, *, seed: int = 0, bytes_: int = 200, zeros: bool = False) -> Path:
    """Flip bytes all over the second half, or fill it with zeros as an unfinished download has it."""
    data = bytearray(source.read_bytes())
    half = len(data) // 2
    if zeros:
        data[half:] = bytes(len(data) - half)
    else:
        for place in np.random.default_rng(seed).integers(half, len(data), bytes_):
            data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def index_shown(picture_HWC: np.ndarray) -> float:
    """The index of the card a picture shows, from where its white bar is."""
    bright = picture_HWC.astype(float).min(axis=2).mean(axis=0)
    columns = np.flatnonzero(bright > (bright.max() + np.median(bright)) / 2)
    return (columns.mean() + 0.5) / picture_HWC.shape[1] * FRAMES - 0.5


def assert_shows(picture_HWC: np.ndarray, index: int, frames: int = FRAMES) -> None:
    """The picture is card ``index``: colours, place and direction of everything."""
    height, width = picture_HWC.shape[:2]
    expected = card(index, width, height, frames).astype(float)
    found = picture_HWC.astype(float)
    # the colours away from edges, where chroma subsampling blurs
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    far_x = (np.abs(x - 0.5) > 0.08) & (np.abs(x - (index + 0.5) / frames) > 0.11) & (x > 0.04) & (x < 0.96)
    far_y = (np.abs(y - 0.5) > 0.08) & (y > 0.04) & (y < 0.96)
    flat = np.ix_(far_y, far_x)
    assert np.abs(found[flat] - expected[flat]).max() <= 14
    assert np.abs(found[flat] - expected[flat]).mean() <= 4
    assert index_shown(picture_HWC) * frames / FRAMES == pytest.approx(index, abs=0.6)
