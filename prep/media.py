"""Reading video: the one module that opens files with PyAV.

A file that cannot be trusted becomes a `clip.Fault`; nothing here raises for a bad clip
but `BadClip`, which `look` and `decode` turn into that value.

Measured facts behind the choices (PyAV 18, one core): untagged HD decoded as BT.601
is up to 23/255 wrong; flipped bytes decode without an error unless ``err_detect``
is ``explode``; one scaler thread does 636 frames/s where automatic threads do 315.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .clip import BadClip, ClipFacts
from .picture import Colour, Pixels, Turn, colour_of, to_rgb, turn_of
from .source_file import hash_file, refuse_special

# The file protocol alone: a playlist called clip.mp4 must not reach other files or the network.
_OPTIONS = {"protocol_whitelist": "file"}
_NO_VIDEO = {"ansi", "bintext", "xbin", "idf"}  # FFmpeg "plays" text files as video
_HEADED = ("matroska", "mov", "flv", "avi")  # formats whose header states a duration that can be believed


class Video:
    """One open video stream. Use as a context manager.

    Raises:
        BadClip: from any method, when the file cannot be used; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = refuse_special(path)
        self._container, self._stream = _open(path)
        try:
            self._read_packets()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def _read_packets(self) -> None:
        """Read every packet without decoding: the frames' times, and whether the file ends early."""
        codec = self._stream.codec_context.name
        base = float(self._stream.time_base or 0)
        stamps: list[int | None] = []
        last_end = 0.0
        packets, first_key, skipped = 0, None, None
        promised = len(self._stream.index_entries) or self._stream.frames
        try:
            for packet in self._container.demux():
                if packet.size == 0:
                    continue
                if packet.pts is not None:
                    last_end = max(last_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != self._stream.index:
                    continue
                if packet.is_corrupt:
                    of = f" of {promised}" if promised > packets else ""
                    raise BadClip(f"damaged or cut short: frame {packets}{of} is incomplete")
                packets += 1
                if packet.is_keyframe and skipped is None:
                    skipped, first_key = len(stamps), packet.pts
                hidden = codec == "vp8" and not bytes(packet)[0] & 0x10  # the show_frame bit, RFC 6386 9.1
                if not packet.is_discard and not hidden:  # an edit list discards what it hides
                    stamps.append(packet.pts)
        except av.error.FFmpegError as error:
            raise BadClip(f"damaged or cut short after {packets} frames: {_words(error)}") from error
        if "matroska" not in self._container.format.name and packets < promised:
            raise BadClip(f"cut short: {packets} of {promised} frames are in the file")
        self._check_end(last_end)
        stamps = stamps[skipped or 0 :]  # before the first key frame nothing can be decoded
        known = [stamp for stamp in stamps if stamp is not None]
        ordered = self._container.format.name != "avi"  # AVI stores no order of display; FFmpeg counts packets
        if ordered and len(known) == len(stamps) and len(set(known)) == len(known):
            self._stamps: list[int] | None = sorted(stamp for stamp in known if first_key is None or stamp >= first_key)
            self.times_s = tuple(stamp * base for stamp in self._stamps)
        else:  # no times to trust: the mean rate is all there is
            rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
            self._stamps = None
            self.times_s = tuple(index / rate for index in range(len(stamps)))
        if not self.times_s:
            raise BadClip("there are no frames in it")

    def _check_end(self, last_end_s: float) -> None:
        """A header that promises much more than the file holds: the copy was cut."""
        if self._container.duration is None or not self._container.format.name.startswith(_HEADED):
            return
        start = (self._container.start_time or 0) / av.time_base
        promised = self._container.duration / av.time_base
        if promised - (last_end_s - start) > max(0.5, 0.1 * promised):
            raise BadClip(f"cut short: the header says {promised:.1f} s, the data ends at {last_end_s - start:.1f} s")

    @property
    def interval_s(self) -> float:
        """The usual time from one frame to the next."""
        if len(self.times_s) > 1:
            return median(after - before for before, after in pairwise(self.times_s))
        return 1 / float(self._stream.average_rate or self._stream.guessed_rate or 25)

    @cached_property
    def first_frame(self) -> VideoFrame:
        """The first decoded frame: what it says of colour, rotation and shape is what counts."""
        for _index, frame in self._decode():
            return frame
        raise BadClip("not one frame can be decoded")

    @cached_property
    def colour(self) -> Colour:
        return colour_of(self.first_frame)

    @cached_property
    def turn(self) -> Turn:
        return turn_of(self.first_frame)

    @cached_property
    def sar(self) -> float:
        ratio = float(self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio or 1)
        return ratio if 0.05 < ratio < 20 else 1.0  # beyond that it is a broken header

    @cached_property
    def display_size(self) -> tuple[int, int]:
        """Width and height as a player shows them."""
        width, height = max(1, round(self.first_frame.width * self.sar)), self.first_frame.height
        return (height, width) if self.turn.transpose else (width, height)

    def facts(self) -> ClipFacts:
        """See `ClipFacts`. Reads the file once more for its hash."""
        width, height = self.display_size
        intervals = [after - before for before, after in pairwise(self.times_s)]
        usual = self.interval_s
        odd = sum(abs(interval - usual) > max(0.25 * usual, 0.002) for interval in intervals)
        duration = self.times_s[-1] - self.times_s[0] + usual
        try:
            digest = hash_file(self.path)
        except OSError as error:
            raise BadClip(f"cannot be read: {error.strerror}") from error
        return ClipFacts(
            width=width,
            height=height,
            frames=len(self.times_s),
            duration_s=duration,
            fps=len(self.times_s) / duration,
            variable_rate=odd > 0.01 * len(intervals),
            interlaced=self.first_frame.interlaced_frame,
            rotation=self.turn.degrees,
            sar=self.sar,
            colour=self.colour.decision,
            size=self._stat.st_size,
            mtime_ns=self._stat.st_mtime_ns,
            sha256=digest,
        )

    def glimpses(self, count: int, size: int = 320) -> list[Pixels]:
        """Up to ``count`` key frames from all over the clip: upright RGB, the long side at most ``size`` pixels."""
        scaler = VideoReformatter()
        width, height = self.display_size
        scale = min(1.0, size / max(width, height))
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        across, down = (height, width) if self.turn.transpose else (width, height)
        found = {0: self.first_frame}
        self._stream.codec_context.skip_frame = "NONKEY"
        with suppress(av.error.FFmpegError):  # not every format can be wound; the first frame is there
            for part in range(1, count):
                index = len(self.times_s) * part // count
                self._container.seek(self._stamps[index] if self._stamps else 0, stream=self._stream)
                frame = next(self._container.decode(self._stream), None)
                if frame is not None and frame.pts is not None:
                    found[frame.pts] = frame
        return [self.turn.apply(to_rgb(scaler, frame, across, down, self.colour)) for frame in found.values()]

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
        for index, frame in self._decode():
            if index != next_wanted:
                continue
            if (frame.width, frame.height) != (self.first_frame.width, self.first_frame.height):
                raise BadClip(f"the picture size changes at frame {index}, to {frame.width}x{frame.height}")
            yield self.turn.apply(to_rgb(scaler, frame, across, down, self.colour))
            next_wanted = next(wanted, None)
            if next_wanted is None:
                return
        if next_wanted is not None:
            raise BadClip(f"frame {next_wanted} of {len(self.times_s)} cannot be decoded")

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        """Every frame with its index into ``times_s``, from the first on."""
        container, stream = _open(self.path)  # anew: not every format can be wound back
        expected = 0
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise BadClip(f"frame {expected} is damaged")
                if self._stamps is not None:
                    if frame.pts is None or frame.pts < self._stamps[0]:
                        continue  # pictures before the first key frame
                    index = bisect_left(self._stamps, frame.pts)
                    if index != expected:
                        raise BadClip(f"frame {expected} of {len(self._stamps)} cannot be decoded")
                yield expected, frame
                expected += 1
        except av.error.FFmpegError as error:
            raise BadClip(f"damaged: frame {expected} cannot be decoded ({_words(error)})") from error
        finally:
            container.close()


def _open(path: Path) -> tuple[InputContainer, VideoStream]:
    """The file and its video stream.

    Raises:
        BadClip: it cannot be opened, or has no video.
    """
    try:
        # "file:" keeps a colon in a name from meaning a protocol;
        # a title that is not UTF-8 is no reason to refuse a clip.
        container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadClip(f"not a video, or damaged: {_words(error)}") from error
    streams = [
        stream
        for stream in container.streams.video
        # the cover picture of a song is no clip
        if not stream.disposition & av.stream.Disposition.attached_pic
        and stream.codec_context is not None
        and stream.codec_context.name not in _NO_VIDEO
    ]
    if not streams:
        sound = bool(container.streams.audio)
        container.close()
        raise BadClip("there is only sound in it, no video" if sound else "there is no video in it")
    codec = streams[0].codec_context
    codec.thread_count = 1  # the pool runs one file per core; set before the first decode
    codec.options = {"err_detect": "explode"}
    return container, streams[0]


def _words(error: Exception) -> str:
    """What FFmpeg says, without its number and the path."""
    if isinstance(error, av.error.FFmpegError):
        return str(error.strerror or type(error).__name__)
    return str(error)
