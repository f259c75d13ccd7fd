"""Reading video: the one module that knows PyAV.

What a player does is done here, once: the picture is turned upright, its pixels
made square, its colours converted by the matrix and range it was made with.
A file that cannot be trusted becomes a `Fault`; nothing here raises for a bad clip
but `BadClip`, which `probe` and `decode.decode_clip` turn into that value.

Measured facts behind the choices (PyAV 18, one core): untagged HD decoded as BT.601
is up to 23/255 wrong; flipped bytes decode without an error unless ``err_detect``
is ``explode``; one scaler thread does 636 frames/s where automatic threads do 315.
"""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from .clip import ClipFacts, Fault

__all__ = ["BadClip", "ClipFacts", "Fault", "Pixels", "Video", "hash_file", "probe", "refuse_special"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# The file protocol alone: a playlist called clip.mp4 must not reach other files or the network.
_OPTIONS = {"protocol_whitelist": "file"}
_NO_VIDEO = {"ansi", "bintext", "xbin", "idf"}  # FFmpeg "plays" text files as video
_HEADED = ("matroska", "mov", "flv", "avi")  # formats whose header states a duration that can be believed
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# AVColorSpace and AVColorTransferCharacteristic, ITU-T H.273.
_RGB, _BT709, _UNSPECIFIED, _FCC, _BT470BG, _SMPTE170M, _SMPTE240M, _BT2020 = 0, 1, 2, 4, 5, 6, 7, 9
_MATRICES = {
    _BT709: ("bt709", Colorspace.ITU709),
    _FCC: ("fcc", Colorspace.FCC),
    _BT470BG: ("bt601", Colorspace.ITU601),
    _SMPTE170M: ("bt601", Colorspace.ITU601),
    _SMPTE240M: ("smpte240m", Colorspace.SMPTE240M),
    _BT2020: ("bt2020", Colorspace.BT2020),
}
_HDR = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}


class BadClip(Exception):
    """A clip that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class _Colour:
    matrix: Colorspace
    range: ColorRange
    decision: str


@dataclass(frozen=True)
class _Turn:
    """From the stored picture to the upright one: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    degrees: int = 0  # clockwise, for the record

    def apply(self, pixels_HWC: Pixels) -> Pixels:
        turned = pixels_HWC.swapaxes(0, 1) if self.transpose else pixels_HWC
        return turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def probe(path: Path) -> ClipFacts | Fault:
    """The facts of a clip from its packets, its first frame and its bytes; milliseconds a file.

    Every packet is read but only one frame is decoded, so a file that ends early is
    found, and damage inside a picture is not (decoding finds that).
    """
    try:
        with Video(path) as video:
            return video.facts()
    except BadClip as bad:
        return Fault(str(bad))


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def refuse_special(path: Path) -> os.stat_result:
    """Look before opening: a pipe or a device would block for ever.

    Raises:
        BadClip: missing, unreadable, empty, or no regular file.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise BadClip("a folder, not a file")
        if not stat.S_ISREG(info.st_mode):
            raise BadClip("not a regular file (a pipe, socket or device)")
        if info.st_size == 0:
            raise BadClip("the file is empty (0 bytes)")
        with path.open("rb"):
            return info
    except FileNotFoundError:
        dangling = path.is_symlink()
        raise BadClip("a link that points nowhere" if dangling else "the file is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise BadClip(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


class Video:
    """One open video stream. Use as a context manager.

    Raises:
        BadClip: from any method, when the file cannot be used; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = refuse_special(path)
        try:
            # "file:" keeps a colon or a percent sign in a name from meaning something;
            # a title that is not UTF-8 is no reason to refuse a clip.
            self._container = av.open(f"file:{path}", options=_OPTIONS, metadata_errors="ignore")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise BadClip(f"not a video that can be opened: {_words(error)}") from error
        try:
            streams = [
                stream
                for stream in self._container.streams.video
                # the cover picture of a song is no clip
                if not stream.disposition & av.stream.Disposition.attached_pic
                and stream.codec_context is not None
                and stream.codec_context.name not in _NO_VIDEO
            ]
            if not streams:
                sound = bool(self._container.streams.audio)
                raise BadClip("there is only sound in it, no video" if sound else "there is no video in it")
            self._stream = streams[0]
            codec = self._stream.codec_context
            codec.thread_count = 1  # the pool runs one file per core; set before the first decode
            codec.options = {"err_detect": "explode"}
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
        packets, first_key, keyed = 0, None, False
        try:
            for packet in self._container.demux():
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    raise BadClip(f"damaged or cut short: packet {packets} is incomplete")
                if packet.pts is not None:
                    last_end = max(last_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != self._stream.index:
                    continue
                packets += 1
                # Before the first key frame nothing can be decoded; an edit list hides what it discards.
                if packet.is_keyframe and not keyed:
                    keyed, first_key = True, packet.pts
                hidden = codec == "vp8" and not bytes(packet)[0] & 0x10  # the show_frame bit, RFC 6386 9.1
                if keyed and not packet.is_discard and not hidden:
                    stamps.append(packet.pts)
        except av.error.FFmpegError as error:
            raise BadClip(f"damaged or cut short after {packets} packets: {_words(error)}") from error
        promised = len(self._stream.index_entries) or self._stream.frames
        if "matroska" not in self._container.format.name and packets < promised:
            raise BadClip(f"cut short: {packets} of {promised} frames are in the file")
        self._check_end(last_end)
        known = [stamp for stamp in stamps if stamp is not None]
        if len(known) == len(stamps) and len(set(known)) == len(known):
            self._stamps: list[int] | None = sorted(stamp for stamp in known if first_key is None or stamp >= first_key)
            self.times_s = tuple(stamp * base for stamp in self._stamps)
        else:  # no time stamps to trust (old AVI): the mean rate is all there is
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
    def colour(self) -> _Colour:
        return _colour_of(self.first_frame)

    @cached_property
    def turn(self) -> _Turn:
        return _turn_of(self.first_frame)

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
            codec=self._stream.codec_context.name,
            colour=self.colour.decision,
            size=self._stat.st_size,
            mtime_ns=self._stat.st_mtime_ns,
            sha256=digest,
        )

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
            yield self.turn.apply(_to_rgb(scaler, frame, across, down, self.colour))
            next_wanted = next(wanted, None)
            if next_wanted is None:
                return
        if next_wanted is not None:
            raise BadClip(f"frame {next_wanted} of {len(self.times_s)} cannot be decoded")

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        """Every frame with its index into ``times_s``, from the first on."""
        expected = 0
        try:
            # backward to the first packet, whatever its time
            self._container.seek(-(2**62), backward=True, any_frame=False, stream=self._stream)
            for frame in self._container.decode(self._stream):
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


def _colour_of(frame: VideoFrame) -> _Colour:
    """Matrix and range of a clip. Tags are trusted; without them the size decides.

    Raises:
        BadClip: HDR, which needs tone mapping that we do not do.
    """
    if frame.color_trc in _HDR:
        raise BadClip(
            f"HDR ({_HDR[frame.color_trc]}): the colours would come out flat and grey; convert it to SDR first"
        )
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    range_ = ColorRange.JPEG if full else ColorRange.MPEG
    words = "full" if full else "limited"
    if any(component.is_alpha for component in frame.format.components):
        words += ", alpha over black"
    if frame.format.is_rgb or frame.format.has_palette or frame.colorspace == _RGB:
        return _Colour(Colorspace.DEFAULT, ColorRange.JPEG, f"rgb {words.replace('limited', 'full')}")
    if frame.colorspace in _MATRICES:
        name, matrix = _MATRICES[frame.colorspace]
        return _Colour(matrix, range_, f"{name} {words} (tagged)")
    # Cameras and editors leave HD untagged and mean BT.709; swscale alone would take BT.601.
    if frame.height > 576 or frame.width >= 1280:
        return _Colour(Colorspace.ITU709, range_, f"bt709 {words} (untagged HD)")
    return _Colour(Colorspace.ITU601, range_, f"bt601 {words} (untagged SD)")


def _turn_of(frame: VideoFrame) -> _Turn:
    """The display matrix of a frame as a transpose and two mirrors.

    The matrix maps a stored point (x, y), y downward, to (a x + c y, b x + d y);
    ISO/IEC 14496-12, 8.3.2. A phone held upright writes a quarter turn.

    Raises:
        BadClip: an angle between quarter turns.
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return _Turn()
    a, b, _u, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if not b and not c and a and d:
        return _Turn(mirror_x=a < 0, mirror_y=d < 0, degrees=180 if a < 0 and d < 0 else 0)
    if not a and not d and b and c:
        return _Turn(transpose=True, mirror_x=c < 0, mirror_y=b < 0, degrees=90 if b > 0 else 270)
    raise BadClip(f"turned by {-frame.rotation} degrees; only quarter turns can be undone")


def _to_rgb(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int, colour: _Colour) -> Pixels:
    """Scale and convert in one pass: (height, width, 3) uint8 RGB, alpha laid over black as players do."""
    alpha = any(component.is_alpha for component in frame.format.components)
    scaled = scaler.reformat(
        frame,
        width=width,
        height=height,
        format="rgba" if alpha else "rgb24",
        src_colorspace=colour.matrix,
        src_color_range=colour.range,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALER,
        threads=1,
    )
    rgb: Pixels = scaled.to_ndarray().astype(np.uint8, copy=False)
    if alpha:
        opacity = rgb[..., 3:].astype(np.uint16)
        return ((rgb[..., :3] * opacity + 127) // 255).astype(np.uint8)
    return rgb


def _words(error: Exception) -> str:
    """What FFmpeg says, without its number and the path."""
    if isinstance(error, av.error.FFmpegError):
        return str(error.strerror or type(error).__name__)
    return str(error)
