"""The part of the stored picture that a container says is shown: mp4's and mov's `clap` box, Matroska's PixelCrop.

FFmpeg reads both and leaves the cutting to the player. They are side data of the stream (AV_PKT_DATA_FRAME_CROPPING,
since FFmpeg 7.1), to which PyAV 18 has no way but the description of the file that FFmpeg writes for people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import av
import av.filter
import av.logging
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..source.clip import BadClip

_STREAM = re.compile(r"^  Stream #0:(\d+)", re.MULTILINE)
_CROPPING = re.compile(r"^ +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Edges:
    """Pixels of the stored picture that are not shown, on each side."""

    left: int
    right: int
    top: int
    bottom: int


def edges_of(container: InputContainer, stream: VideoStream) -> Edges | None:
    """What the container says; None where the whole picture is shown."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # the description is a message of that level; here it is caught
    try:
        described = _STREAM.split(cast(Any, container).dumps_format())  # which its type stubs lack
    finally:
        av.logging.set_level(level)
    of_streams = dict(zip(described[1::2], described[2::2], strict=True))
    found = _CROPPING.search(of_streams.get(str(stream.index), ""))
    edges = Edges(*map(int, found.groups())) if found else None
    return edges if edges != Edges(0, 0, 0, 0) else None


class Aperture:
    """Cuts the frames of a stream to what is shown of them."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.edges = edges_of(container, stream)
        self._time_base = stream.time_base
        self._graph: av.filter.Graph | None = None
        self._made_for: tuple[int, int, str] | None = None

    def cut(self, frame: VideoFrame) -> VideoFrame:
        """The part of a frame that is shown, with all that is said of the frame.

        Raises:
            BadClip: nothing of it is shown.
        """
        if self.edges is None:
            return frame
        shape = frame.width, frame.height, frame.format.name
        if self._graph is None or shape != self._made_for:
            self._graph, self._made_for = self._make(frame, self.edges), shape
        self._graph.push(frame)
        cut = self._graph.pull()
        assert isinstance(cut, VideoFrame)
        return cut

    def _make(self, frame: VideoFrame, edges: Edges) -> av.filter.Graph:
        width, height = frame.width - edges.left - edges.right, frame.height - edges.top - edges.bottom
        if width <= 0 or height <= 0:
            raise BadClip(f"its container cuts all of its {frame.width}x{frame.height} pixels away ({edges})")
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self._time_base),
            graph.add("crop", f"{width}:{height}:{edges.left}:{edges.top}:exact=1"),
            graph.add("buffersink"),
        ).configure()
        return graph
