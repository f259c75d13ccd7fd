"""Writing H.264 mp4: what `cogtrain generate` shows, and the clips that demo and tests draw; and reading it back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..files.atomic import whole

Frames = np.ndarray[Any, np.dtype[np.uint8]]


def write_mp4(path: Path, frames_FHWC: Frames, fps: float, *, crf: int = 18, preset: str = "medium") -> None:
    """Encode RGB frames as an upright, BT.709-tagged H.264 mp4 that browsers play. It is there whole or not at all.

    Args:
        frames_FHWC: uint8 RGB; height and width even.
        fps: frames a second.
        crf: x264 quality, 0 (lossless) to 51.
        preset: of x264; "veryfast" is five times as fast and the file larger.
    """
    count, height, width, channels = frames_FHWC.shape
    assert channels == 3 and height % 2 == 0 and width % 2 == 0 and count > 0, frames_FHWC.shape
    with (
        whole(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # mbtree off: with it x264 gave 17 different files in 100 for the same frames, without it 1 in 300.
        stream.options = {
            "crf": str(crf),
            "preset": preset,
            "mbtree": "0",
            "colorprim": "bt709",
            "transfer": "bt709",
            "colormatrix": "bt709",
        }
        for name in ("color_primaries", "color_trc", "colorspace"):
            setattr(stream.codec_context, name, 1)  # 1 is BT.709
        stream.codec_context.color_range = 1  # limited
        for frame_HWC in frames_FHWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> Frames:
    """The frames of a video that `write_mp4` has written: uint8 RGB (F, H, W, 3), as near as its quality is."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
