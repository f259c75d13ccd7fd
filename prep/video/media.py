"""Reading video: the pictures of a clip, each in its place and as a player shows it.

A file that cannot be trusted becomes a `clip.ClipFault`; nothing here raises for a bad clip
but `BadClip`, which `look` and `decode_frames` turn into that value.

`container` opens the file, `times` finds out when each picture is shown, `picture` makes it RGB.

Measured facts behind the choices (PyAV 18, one core): untagged HD decoded as BT.601
is up to 23/255 wrong; flipped bytes decode without an error unless ``err_detect``
is ``explode``; one scaler thread does 636 frames/s where automatic threads do 315.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from types import TracebackType

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from ..source.clip import BadClip, ClipFacts, toned
from ..source.heartbeat import beat
from ..source.source_file import ClipSource
from . import in_parts
from .aperture import edges_of
from .colour import Colour, Pixels, Tags, Turn, colour_of, sketch, to_rgb, turn_of
from .container import decode_frames, open_video, said_by_ffmpeg, video_streams
from .cut import HdrMode
from .shape import sar_of, size_as_shown
from .times import FrameTimes, Key, read_times, usual_rate


class Video:
    """The video of a source, opened, or the part of it that is meant, which is then all that there is.

    Use as a context manager, inside the source's.

    Raises:
        BadClip: from any method, when the file cannot be used; the message says why.
    """

    def __init__(self, source: ClipSource, hdr: HdrMode = "tonemap") -> None:
        self._source = source
        self._hdr = hdr
        self._part = part = source.place.part
        self._rough = False
        self._container, self._stream = open_video(source)
        self._container_tags = Tags.of(self._stream.codec_context)  # before a frame is decoded and says more
        try:
            self._times = self._times_of_file() if part is None else in_parts.times(source, self._times_of_file)
            whole_s = self._times.times_s
            self._used = range(len(whole_s)) if part is None else part.of(whole_s, self._usual_interval(whole_s))
        except BaseException:
            self._container.close()
            raise

    def _times_of_file(self) -> FrameTimes:
        self._times = read_times(self._container, self._stream)
        if self._times.by != "dts":
            return self._times
        for _index, frame in self._indexed(None):
            return self._times.after_delay(frame, float(self._stream.time_base or 0))
        raise BadClip("not one frame can be decoded", "damaged")

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def times_s(self) -> tuple[float, ...]:
        """When each picture is shown, ascending, in seconds of the file's own clock."""
        return self._times.times_s[self._used.start : self._used.stop]

    @property
    def seekable(self) -> bool:
        """Whether a part is reached without decoding all that comes before it."""
        return self._times.by == "pts"

    @property
    def interval_s(self) -> float:
        """The usual time from one frame to the next."""
        return self._usual_interval(self.times_s)

    def _usual_interval(self, times_s: Sequence[float]) -> float:
        if len(times_s) > 1:
            return median(after - before for before, after in pairwise(times_s))
        return 1 / usual_rate(self._stream)

    @property
    def last_s(self) -> float:
        """How long the last picture stays. Less than the usual time only says that its writer did not know."""
        whole_s, next_one = self._times.times_s, self._used.stop
        stays_s = whole_s[next_one] - whole_s[next_one - 1] if next_one < len(whole_s) else self._times.last_s
        return max(stays_s, self.interval_s)

    @cached_property
    def first_frame(self) -> VideoFrame:
        """The first decoded frame: what it says of colour, rotation and shape is what counts."""
        for _index, frame in self._shown():
            return frame
        raise BadClip("not one frame can be decoded", "damaged")

    @cached_property
    def colour(self) -> Colour:
        return colour_of(self.first_frame, self._container_tags, self._hdr)

    @cached_property
    def turn(self) -> Turn:
        return turn_of(self.first_frame)

    @cached_property
    def display_size(self) -> tuple[int, int]:
        """Width and height as a player shows them."""
        return size_as_shown(self.first_frame, self._stream)

    def facts(self) -> ClipFacts:
        """See `ClipFacts`."""
        width, height = self.display_size
        intervals = [after - before for before, after in pairwise(self.times_s)]
        usual = self.interval_s
        odd = sum(abs(interval - usual) > max(0.25 * usual, 0.002) for interval in intervals)
        duration = self.times_s[-1] - self.times_s[0] + self.last_s
        try:
            digest = self._source.sha256 if self._part is None else in_parts.sha256(self._source)
        except OSError as error:
            raise BadClip(f"cannot be read: {error.strerror}", "unreached") from error
        identity = self._source.place.identity(digest)
        return ClipFacts(
            width=width,
            height=height,
            frames=len(self.times_s),
            duration_s=duration,
            fps=len(self.times_s) / duration,
            variable_rate=odd > 0.01 * len(intervals),
            interlaced=self.first_frame.interlaced_frame,
            rotation=self.turn.degrees,
            sar=sar_of(self._stream),
            colour=self.colour.decision,
            videos=len(video_streams(self._container)),
            cropped=edges_of(self._container, self._stream) is not None,
            size=self._source.size,
            mtime_ns=self._source.info.st_mtime_ns,
            tone_mapped=self.colour.light is not None,
            sha256=identity if self.colour.light is None else toned(identity),
        )

    def glimpses(self, count: int, size: int = 320) -> list[Pixels]:
        """Up to ``count`` key frames from all over the clip: upright RGB, the long side at most ``size`` pixels."""
        scaler = VideoReformatter()
        width, height = self.display_size
        width, height = scaled_to(min(size, max(width, height)), width, height)
        across, down = (height, width) if self.turn.transpose else (width, height)
        found = {0: self.first_frame}
        self._stream.codec_context.skip_frame = "NONKEY"
        with suppress(av.error.FFmpegError, OSError):  # not every format can be wound; the first frame is there
            for place in range(1, count):
                index = len(self._used) * place // count
                at = self._times.stamps[self._used[index]] if self._times.stamps else 0
                self._container.seek(at, stream=self._stream)
                frame = next(decode_frames(self._container, self._stream), None)
                if frame is not None and frame.pts is not None and self._is_of_part(frame):
                    found[frame.pts] = frame
        return [self.turn.apply(to_rgb(scaler, frame, across, down, self.colour)) for frame in found.values()]

    def sketches(self, side: int) -> Iterator[Pixels]:
        """Every picture, small and roughly, which is quicker than `frames`, and good for finding cuts.

        The decoder's deblocking is left out, and four pixels stand for all that a small one covers.

        Yields:
            (height, width, 3) uint8 RGB, upright; the longer of the two is ``side``.
        """
        scaler = VideoReformatter()
        across, down = scaled_to(side, round(self.first_frame.width * sar_of(self._stream)), self.first_frame.height)
        self._rough = True
        for _index, frame in self._shown():
            yield self.turn.apply(sketch(scaler, frame, across, down, self.colour))

    def frames(self, indices: Sequence[int], width: int, height: int) -> Iterator[Pixels]:
        """The frames at ``indices`` (ascending, distinct), upright, scaled to ``width`` x ``height``.

        Every frame up to the last one wanted must decode, and in its place; frames
        beyond it are never looked at. Only the wanted ones are converted.

        Yields:
            (height, width, 3) uint8 RGB.
        """
        scaler = VideoReformatter()
        across, down = (height, width) if self.turn.transpose else (width, height)
        wanted = iter(indices)
        next_wanted = next(wanted, None)
        for index, frame in self._shown():
            if index != next_wanted:
                continue
            if (frame.width, frame.height) != (self.first_frame.width, self.first_frame.height):
                raise BadClip(f"the picture size changes at frame {index}, to {frame.width}x{frame.height}", "shape")
            if turn_of(frame) != self.turn:
                raise BadClip(f"the picture is turned another way from frame {index} on", "shape")
            colour = colour_of(frame, self._container_tags, self._hdr)  # each its own: joined streams may change it
            if colour.light is not None and self.colour.light is not None:
                colour = replace(colour, light=self.colour.light)  # but no flicker where some frames say more of it
            yield self.turn.apply(to_rgb(scaler, frame, across, down, colour))
            next_wanted = next(wanted, None)
            if next_wanted is None:
                return
        if next_wanted is not None:
            raise BadClip(f"frame {next_wanted} of {len(self.times_s)} cannot be decoded", "damaged")

    def _shown(self) -> Iterator[tuple[int, VideoFrame]]:
        """Every frame with its index, as a player shows them.

        MPEG-4 has pictures that are not coded: the one before stays. Their packets give no frame.
        """
        last: VideoFrame | None = None
        expected = 0
        for index, frame in self._decode():
            while expected < index and last is not None and self._stream.codec_context.name == "mpeg4":
                yield expected, last
                expected += 1
            if index != expected:
                raise BadClip(f"frame {expected} of {len(self.times_s)} cannot be decoded", "damaged")
            yield index, frame
            expected, last = index + 1, frame

    def _is_of_part(self, frame: VideoFrame) -> bool:
        """Whether a key frame that a jump has found lies in the part."""
        if self._part is None:
            return True
        return self._times.by == "pts" and self._times.index_of(frame, 0) in self._used

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        """Every decoded frame with its index into ``times_s``, from the first on.

        Of a part nothing before it is decoded but two groups of pictures. Where such a jump does not end in the very
        frames that are looked for, one after the other, another is tried; the whole file from its beginning decides.
        """
        first, expected = self._used.start, self._used.start
        for key in self._times.keys_before(first) if first else ():
            with suppress(BadClip):
                frames = self._indexed(key)
                begun = next(frames, None)
                if begun is None or begun[1].pts != key.shown:
                    continue  # it has landed elsewhere
                for index, frame in frames:
                    if index > expected:
                        break
                    if index == expected:
                        yield index - first, frame
                        expected += 1
                        if expected == self._used.stop:
                            return
        for index, frame in self._indexed(None):
            if index >= self._used.stop:
                return
            if index >= expected:
                yield index - first, frame

    def _indexed(self, key: Key | None) -> Iterator[tuple[int, VideoFrame]]:
        """Decoded frames with their index in the whole file, from a key frame on or from the beginning."""
        expected = 0
        try:
            for frame in self._read(key):
                if frame.is_corrupt:
                    raise BadClip(f"frame {expected} is damaged", "damaged")
                index = self._times.index_of(frame, expected)
                if index is not None:
                    yield index, frame
                    expected = index + 1
        except (av.error.FFmpegError, OSError) as error:
            raise BadClip(
                f"damaged: frame {expected} cannot be decoded ({said_by_ffmpeg(error)})", "damaged"
            ) from error

    def _read(self, key: Key | None) -> Iterator[VideoFrame]:
        """Decoded frames as they come, from a key frame on or from the beginning."""
        container, stream = open_video(self._source)  # anew: not every format can be wound back
        if self._rough:
            stream.codec_context.options = {**stream.codec_context.options, "skip_loop_filter": "all"}
        try:
            if key is not None:
                container.seek(key.decoded, stream=stream)
            begin = (self._times.first_key, self._times.lead) if key is None else (key.shown, 0)
            for frame in decode_frames(container, stream, *begin):
                beat()
                yield frame
        finally:
            container.close()


def scaled_to(side: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of the same shape, the longer one ``side``."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
