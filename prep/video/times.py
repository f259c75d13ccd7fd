"""When each picture of a clip is shown, from its packets alone: nothing is decoded here.

A container that stores the time of display (pts) is believed. AVI and ASF do not: what FFmpeg
gives as pts there is a guess from the kinds of the pictures, wrong for DivX's packed bitstreams.
The place of a chunk in an AVI is a time, though, and one that counts the empty chunks of dropped
frames: a decoder that holds back N pictures shows picture K when chunk K + N comes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Literal

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..source.clip import BadClip
from ..source.heartbeat import beat
from .container import said_by_ffmpeg
from .fields import FieldPairs

_HEADED = ("matroska", "mov", "flv", "avi")  # formats whose header states a duration that can be believed

_DECODED_AT = ("avi", "asf")  # formats that store when a packet is decoded, and nothing else
_TWICE = 0.1  # of the pictures, at most, may have the time of another, for times to be believed
_BACK_S = 0.2  # packets come in the order of decoding; what steps back further than a slip is another recording


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """A key frame, in units of the stream."""

    shown: int
    decoded: int  # at this time, before it is shown


@dataclass(frozen=True)
class FrameTimes:
    """The pictures of a clip in the order in which they are shown.

    ``by`` says what marks a decoded picture's place: its own time of display (``pts``), the
    packet that brought it out of the decoder (``dts``), or only how many came before (``count``).
    """

    times_s: tuple[float, ...]
    by: Literal["pts", "dts", "count"]
    stamps: tuple[int, ...] = ()  # ascending, in units of the stream; empty where pictures are counted
    lead: int = 0  # packets before the first key frame
    first_key: int | None = None  # when that is shown, where `by` is pts; nothing before it can be decoded
    delay: int = 0  # pictures that the decoder holds back, where `by` is dts
    keys: tuple[Key, ...] = ()  # the pictures that need no other, ascending
    last_s: float = 0.0  # how long the last picture stays; 0 where the file does not say

    def index_of(self, frame: VideoFrame, expected: int) -> int | None:
        """The place of a decoded picture; None for one before the first that counts.

        Args:
            expected: its place if every picture since the first was decoded.
        """
        stamp = frame.pts if self.by == "pts" else frame.dts
        if self.by == "pts" and stamp is None:
            return None
        if self.by == "count" or stamp is None:  # the last pictures of a decoder that holds back some have no dts
            return expected
        if stamp < self.stamps[self.delay]:
            return None
        if stamp in self.stamps[expected : expected + 1]:  # of several with one time, the next
            return expected
        return bisect_left(self.stamps, stamp) - self.delay

    def keys_before(self, index: int) -> Iterator[Key]:
        """Where to begin to decode for the sake of a picture, the nearest first; after the last, from the beginning.

        From the key frame before it on, a picture is right in a sound file. One key frame more is taken: then those
        are right, too, that are shown before a key frame and decoded after it (open groups), and those of a file that
        renews its picture piece by piece, which calls the first piece a key frame. Some decoders cannot begin at every
        key frame, so further ones follow, each twice as far away.
        """
        if self.by != "pts":
            return  # without times of display nothing tells which picture a decoder gives after a jump
        place, step = bisect_right(self.keys, self.stamps[index], key=lambda key: key.shown) - 2, 1
        while place > 0:
            yield self.keys[place]
            place, step = place - step, 2 * step

    def after_delay(self, first: VideoFrame, time_base: float) -> FrameTimes:
        """The times by dts, once the first decoded picture has shown how many the decoder holds back."""
        if self.by != "dts" or first.dts is None:
            return self
        delay = min(bisect_left(self.stamps, first.dts), len(self.stamps) - 1)
        step = median(after - before for before, after in pairwise(self.stamps)) if len(self.stamps) > 1 else 1
        shown = [*self.stamps[delay:], *(self.stamps[-1] + step * (place + 1) for place in range(delay))]
        return replace(self, times_s=tuple(stamp * time_base for stamp in shown), delay=delay)


def read_times(container: InputContainer, stream: VideoStream) -> FrameTimes:
    """Read every packet: the times of the pictures, and whether the file ends early.

    Raises:
        BadClip: the file is damaged or cut short, or its times start anew in the middle.
    """
    codec = stream.codec_context.name
    shown: list[tuple[int | None, int | None, int]] = []  # pts, dts and duration
    keys: list[Key] = []
    last_end = 0.0
    packets, first_key, lead, skipped = 0, None, 0, None
    pairs = FieldPairs(stream.codec_context)
    promised = len(stream.index_entries) or stream.frames
    latest: int | None = None
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            if packet.pts is not None:
                last_end = max(last_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            if packet.is_corrupt:
                of = f" of {promised}" if promised > packets else ""
                joined = ", or joined byte by byte" if container.format.name == "mpegts" else ""
                raise BadClip(f"damaged or cut short{joined}: frame {packets}{of} is incomplete", "damaged")
            if packet.dts is not None and not packet.is_discard:  # each edit of an mp4 begins at a key frame before it
                if latest is not None and (latest - packet.dts) * packet.time_base > _BACK_S:
                    raise BadClip(
                        f"its times start anew at frame {packets}, as where recordings were joined byte by byte; "
                        "to give it one clock: ffmpeg -i CLIP OUT.mp4",
                        "told",
                    )
                latest = packet.dts
            packets += 1
            beat()
            if packet.is_keyframe and skipped is None:
                skipped, first_key, lead = len(shown), packet.pts, packets - 1
            if pairs.ends_picture(packet):
                continue
            hidden = codec == "vp8" and not bytes(packet)[0] & 0x10  # the show_frame bit, RFC 6386 9.1
            if not packet.is_discard and not hidden:  # an edit list discards what it hides
                shown.append((packet.pts, packet.dts, packet.duration or 0))
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(Key(packet.pts, packet.pts if packet.dts is None else packet.dts))
    except (av.error.FFmpegError, OSError) as error:
        raise BadClip(f"damaged or cut short after {packets} frames: {said_by_ffmpeg(error)}", "damaged") from error
    if "matroska" not in container.format.name and packets < promised:
        raise BadClip(f"cut short: {packets} of {promised} frames are in the file", "damaged")
    _check_end(container, last_end)
    shown = shown[skipped or 0 :]  # before the first key frame nothing can be decoded
    if not shown:
        raise BadClip("there are no frames in it")
    return replace(_times_of(container, stream, shown, first_key), keys=tuple(sorted(keys)), lead=lead)


def _times_of(
    container: InputContainer,
    stream: VideoStream,
    shown: Sequence[tuple[int | None, int | None, int]],
    first_key: int | None,
) -> FrameTimes:
    base = float(stream.time_base or 0)
    if "matroska" in container.format.name and first_key is not None:
        # FFmpeg gives no time to what would be shown before 0: of a copy from an open group what leads its key frame
        shown = [packet for packet in shown if packet[:2] != (None, None)]
    pts = [stamp for stamp, _, _ in shown if stamp is not None]
    timed = container.format.name not in _DECODED_AT and len(pts) == len(shown)
    dts = [stamp for _, stamp, _ in shown if stamp is not None]
    in_order = len(dts) == len(shown) and all(before < after for before, after in pairwise(dts))
    twice = len(pts) - len(set(pts))
    if timed and (not twice or (not in_order and twice <= _TWICE * len(pts))):
        stamps = tuple(sorted(stamp for stamp in pts if first_key is None or stamp >= first_key))
        # An mp4 stores the time from one packet to the next; where pictures are reordered, the last is still the end's.
        last = shown[-1] if "mp4" in container.format.name else max(shown, key=lambda packet: packet[0] or 0)
        times_s = tuple(stamp * base for stamp in stamps)
        return FrameTimes(times_s, "pts", stamps, first_key=first_key, last_s=last[2] * base)
    if in_order:
        return FrameTimes(tuple(stamp * base for stamp in dts), "dts", tuple(dts))
    rate = usual_rate(stream)  # no times to trust: the mean rate is all there is
    told = float(stream.codec_context.framerate or 0)
    if not (pts or dts) and 1 <= told <= 1000:  # a bare bitstream, whose mean FFmpeg takes to be 25
        rate = told
    return FrameTimes(tuple(index / rate for index in range(len(shown))), "count")


def usual_rate(stream: VideoStream) -> float:
    """Frames a second, as the header or FFmpeg's guess has it."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def _check_end(container: InputContainer, last_end_s: float) -> None:
    """A header that promises much more than the file holds: the copy was cut."""
    if container.duration is None or not container.format.name.startswith(_HEADED):
        return
    start = (container.start_time or 0) / av.time_base
    promised = container.duration / av.time_base
    end = max(last_end_s, last_end_s - start)  # Matroska counts from zero, also where the clip begins later
    if promised - end > max(0.5, 0.1 * promised):
        raise BadClip(f"cut short: the header says {promised:.1f} s, the data ends at {end:.1f} s", "damaged")
