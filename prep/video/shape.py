"""The shape of a clip as a player shows it."""

from __future__ import annotations

from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .colour import turn_of


def sar_of(stream: VideoStream) -> float:
    """Width of a pixel over its height."""
    ratio = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return ratio if 0.05 < ratio < 20 else 1.0  # beyond that it is a broken header


def size_as_shown(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Width and height, in square pixels, and turned."""
    width, height = max(1, round(frame.width * sar_of(stream))), frame.height
    return (height, width) if turn_of(frame).transpose else (width, height)
