"""Opens a video file with PyAV: one file, its one video stream, or the reason why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import cast

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cogcommon.media.image import told_of_heic

from ..source.clip import BadClip, Kind
from ..source.source_file import Source
from .aperture import Aperture

_NO_VIDEO = {"ansi", "bintext", "xbin", "idf"}  # FFmpeg "plays" text files as video
_PICTURES = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails  # a song's cover is no clip

_FIRST_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"pnot"}

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Formats that only say which other files to read. A content hash does not see what those hold.
_READ_OTHERS = {"concat", "hls", "image2", "mlv", "sdp", "vobsub"}
_JOIN = "its content hash would not see the files that it names; to make one file: ffmpeg -i CLIP -c copy OUT.mp4"
_BIT_1 = re.escape(bytes(flags for flags in range(256) if flags & 2))  # of VP8X: the WebP is animated
_WEBP = """python -c "from PIL import Image; Image.open('CLIP').save('OUT.png', save_all=True)\""""

# How a file begins that FFmpeg would open wrongly or refuse without a true word.
_KNOWN: tuple[tuple[bytes, str, Kind], ...] = (
    (rb"#EXTM3U", f"a playlist (m3u8), not a video: {_JOIN}", "told"),
    (rb"ffconcat version", f"a list of other files (ffconcat), not a video: {_JOIN}", "told"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<MPD\b", f"a playlist (DASH), not a video: {_JOIN}", "told"),
    (rb"v=0\r?\no=", "the description of a network stream (SDP), not a video", "no video"),
    (rb"MLVI", "a Magic Lantern recording, which may go on in other files; convert it to mp4 first", "told"),
    (
        rb"RIFF....WEBPVP8X....[" + _BIT_1 + rb"]",
        f"an animated WebP, which FFmpeg cannot decode; to convert it: {_WEBP}",
        "told",
    ),
    (
        rb"version https://git-lfs\.github\.com/spec",
        "a Git LFS pointer, not the video itself; type: git lfs pull",
        "told",
    ),
    (rb"(<!--.*?-->\s*)?<(!doctype html|html)\b", "a web page, not a video: the download went wrong", "no video"),
)


def open_video(source: Source) -> tuple[InputContainer, VideoStream]:
    """The file and its video stream: of several the one marked default, else the largest, as players take it.

    One of a single picture comes last: a cover that is not marked as one, or the still of an animated AVIF.

    Raises:
        BadClip: it cannot be opened, has no video, or would read further files.
    """
    _refuse_known(source)
    options = {
        "protocol_whitelist": "file",  # a playlist called clip.mp4 must not reach the network,
        "format_whitelist": _formats(),  # nor other files
    }
    try:
        # A title that is not UTF-8 is no reason to refuse a clip.
        container = av.open(source.stream(), "r", options=options, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if cut := _cut_in_a_box(source):
            raise BadClip(cut, "damaged") from error
        raise BadClip(f"not a video, or damaged: {said_by_ffmpeg(error)}", "no video") from error
    try:
        stream = _choose(container, source)
    except BadClip:
        container.close()
        raise
    codec = stream.codec_context
    codec.thread_count = 1  # the pool runs one file per core; set before the first decode
    codec.options = {"err_detect": "explode"}
    return container, stream


def video_streams(container: InputContainer) -> list[VideoStream]:
    """The streams that are films: no cover pictures, no text."""
    return [
        stream
        for stream in container.streams.video
        if not stream.disposition & _PICTURES
        and (stream.codec_context is None or stream.codec_context.name not in _NO_VIDEO)
    ]


def decode_frames(
    container: InputContainer, stream: VideoStream, skip: int | None = None, lead: int = 0
) -> Iterator[VideoFrame]:
    """The frames from where the container stands, cut to what is shown of them.

    Args:
        skip: leave out packets of pictures that are shown before this time, in units of the stream, or at none; but
            not what an edit list hides, which others may need.
        lead: leave out so many packets first.

    A WebM's transparency lies beside its pictures, where only libvpx looks for it; without it the colours
    that are hidden there would be shown.
    """
    aperture = Aperture(container, stream)
    reader = _WITH_ALPHA.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if reader is None and skip is None and not lead:
        yield from map(aperture.cut, container.decode(stream))
        return
    decoder = None if reader is None else cast(VideoCodecContext, av.CodecContext.create(reader, "r"))
    if decoder is not None:
        decoder.thread_count = 1
    for number, packet in enumerate(container.demux(stream)):
        early = skip is not None and not packet.is_discard and (packet.pts is None or packet.pts < skip)
        if packet.size and (number < lead or early):
            continue
        frames = packet.decode() if decoder is None else decoder.decode(packet if packet.size else None)
        yield from map(aperture.cut, frames)


def said_by_ffmpeg(error: Exception) -> str:
    """What FFmpeg says, without its number and the path."""
    if isinstance(error, av.error.FFmpegError):
        return str(error.strerror or type(error).__name__)
    return getattr(error, "strerror", None) or str(error)


def _choose(container: InputContainer, source: Source) -> VideoStream:
    streams = video_streams(container)
    usable = [stream for stream in streams if stream.codec_context is not None]
    if usable:
        return max(usable, key=_rank)
    if cut := _cut_in_a_box(source):
        raise BadClip(cut, "damaged")
    if streams:
        raise BadClip(
            "its codec cannot be decoded here; to convert it, where that is known: ffmpeg -i CLIP OUT.mp4", "told"
        )
    said = "there is only sound in it, no video" if container.streams.audio else "there is no video in it"
    raise BadClip(said, "no video")


def _rank(stream: VideoStream) -> tuple[bool, bool, int]:
    default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.frames != 1, default, stream.width * stream.height


@cache
def _formats() -> str:
    return ",".join(sorted(av.formats_available - _READ_OTHERS))


def _refuse_known(source: Source) -> None:
    try:
        start = bytes(source.read(0, 1024)).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise BadClip(f"cannot be read: {error.strerror}", "unreached") from error
    for pattern, reason, kind in _KNOWN:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise BadClip(reason, kind)
    if heic := told_of_heic(start, "CLIP"):  # FFmpeg would take one of the tiles that it is made of for a film
        raise BadClip(heic, "told")


def _cut_in_a_box(source: Source) -> str | None:
    """Why an mp4 or mov has no readable index: the file ends before its last box does, or has no moov box."""
    names = []
    try:
        for name, end in _boxes(source):
            names.append(name)
            if end > source.size:
                return (
                    f"damaged or cut short: its '{name}' box should end at byte {end:,}, "
                    f"the file ends at {source.size:,}"
                )
    except OSError:
        return None
    if names and not {"moov", "moof", "meta"} & set(names):
        return "damaged or cut short: it has no index (no 'moov' box), as when a recording was not finished"
    return None


def _boxes(source: Source) -> Iterator[tuple[str, int]]:
    """Name and end of every box at the top level of an ISO file (ISO/IEC 14496-12, 4.2)."""
    start = 0
    while start + 8 <= source.size:
        head = bytes(source.read(start, 16))
        name = head[4:8]
        if name not in _FIRST_BOXES if start == 0 else not re.fullmatch(rb"[A-Za-z0-9 ]{4}", name):
            return
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # to the end of the file
            length = source.size - start
        if length < 8:
            return
        yield name.decode(), start + length
        start += length
