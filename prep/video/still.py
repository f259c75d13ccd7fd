"""A picture among the clips: a clip of one frame, read as first frames are (`cogcommon.media.image`)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cogcommon.media.image import BadImage, is_animation, is_picture, show_upright

from ..source.clip import BadClip, ClipFacts
from ..source.source_file import ClipSource
from .colour import Pixels
from .container import decode_frames, open_video, said_by_ffmpeg
from .cut import HdrMode
from .media import Video, scaled_to
from .shape import size_as_shown


def open_clip(source: ClipSource, hdr: HdrMode = "tonemap") -> Video | Still:
    """What a line of videos.txt names, opened: a video, or a picture, which its name says. Use as a context manager.

    An animated PNG or WebP is a video.

    Raises:
        BadClip: it cannot be used; the message says why.
    """
    still = is_picture(source.path) and not is_animation(io.BufferedReader(source.stream()))
    return Still(source) if still else Video(source, hdr)


def glance(path: Path) -> tuple[int, int]:
    """Width and height of what a line of videos.txt names, as a player shows it: at most one frame is decoded.

    Raises:
        BadClip: it cannot be used.
    """
    with ClipSource(path) as source:
        if is_picture(source.path):
            with Still(source) as still:
                return still.display_size
        container, stream = open_video(source)
        try:
            with container:
                for frame in decode_frames(container, stream):
                    return size_as_shown(frame, stream)
        except (av.error.FFmpegError, OSError) as error:
            raise BadClip(f"damaged: {said_by_ffmpeg(error)}", "damaged") from error
    raise BadClip("not one frame can be decoded", "damaged")


class Still:
    """A picture, upright and in sRGB, with what `Video` tells of a clip.

    Raises:
        BadClip: it cannot be read, or its line names a part of it.
    """

    times_s: tuple[float, ...] = (0.0,)
    last_s = 0.0

    def __init__(self, source: ClipSource) -> None:
        if source.place.part is not None:
            raise BadClip(
                f"{source.place.part} is a part of a picture, which has none: take it out of the line", "told"
            )
        self._source = source
        try:
            self.image, self.profile_fault = show_upright(io.BufferedReader(source.stream()))
        except BadImage as bad:
            raise BadClip(str(bad)) from None

    def __enter__(self) -> Still:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.image.close()

    @property
    def colour(self) -> str:
        """What its colours were taken for."""
        return "sRGB (its profile cannot be applied)" if self.profile_fault else "sRGB"

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height as a viewer shows them."""
        return self.image.width, self.image.height

    @cached_property
    def _sha256(self) -> bytes:
        try:
            return self._source.identity
        except OSError as error:
            raise BadClip(f"cannot be read: {error.strerror}", "unreached") from error

    def facts(self) -> ClipFacts:
        """See `ClipFacts`."""
        return ClipFacts(
            width=self.image.width,
            height=self.image.height,
            frames=1,
            duration_s=0.0,
            fps=0.0,
            variable_rate=False,
            interlaced=False,
            rotation=0,
            sar=1.0,
            colour=self.colour,
            size=self._source.size,
            mtime_ns=self._source.info.st_mtime_ns,
            sha256=self._sha256,
            picture=True,
            profile_fault=self.profile_fault,
        )

    def glimpses(self, _count: int, size: int = 320) -> list[Pixels]:
        """The picture, the long side at most ``size`` pixels."""
        width, height = scaled_to(min(size, max(self.display_size)), *self.display_size)
        return list(self.frames((0,), width, height))

    def frames(self, indices: Sequence[int], width: int, height: int) -> Iterator[Pixels]:
        """The picture, scaled: (height, width, 3) uint8 RGB for each index, which is 0."""
        for _ in indices:
            yield np.asarray(self.image.resize((width, height), Image.Resampling.BICUBIC))
