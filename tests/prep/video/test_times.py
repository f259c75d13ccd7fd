"""When a picture is shown: dropped frames, held pictures, packed bitstreams, joined recordings."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import FPS, HEIGHT, WIDTH, card, cards, index_shown, write

from cogcommon.model.families import Resolution
from cogprep.source.clip import ClipFault
from cogprep.source.source_file import ClipSource
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip
from cogprep.video.media import Video

SIZE = Resolution(9, 64, 96)
HELD = [*range(10), *range(22, 30)]  # card 9 stays for half a second, and a frame
VOP = b"\0\0\1\xb6"  # how a coded picture of MPEG-4 begins


def decode(path: Path, cut: Cut | None = None) -> Clip | ClipFault:
    return decode_clip(path, SIZE, cut or Cut(), 8, "key")


def shown(clip: Clip | ClipFault) -> list[int]:
    """The cards that the pictures show, read from the pixels."""
    assert isinstance(clip, Clip), clip
    return [round(index_shown(picture)) for picture in clip.frames_FHWC]


def coded(pictures: list[np.ndarray], codec: str, **options: str) -> list[bytes]:
    """The packets of an encoder, in the order of decoding."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height = WIDTH, HEIGHT
    context.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    context.time_base = Fraction(1, FPS)
    context.options = options
    packets = []
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=context.pix_fmt)
        frame.pts = index
        packets += context.encode(frame)
    return [bytes(packet) for packet in [*packets, *context.encode(None)]]


def mux(path: Path, codec: str, chunks: dict[int, bytes], last: int = 1) -> Path:
    """One packet at each place, the last of them for so long; an AVI gets an empty chunk where there is none."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=FPS)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for place, chunk in chunks.items():
            packet = av.Packet(chunk)
            packet.pts = packet.dts = place
            packet.time_base, packet.stream = Fraction(1, FPS), stream
            packet.duration = last if place == max(chunks) else 1
            packet.is_keyframe = place == 0
            file.mux(packet)
    return path


MPEG4 = {"qmin": "1", "qmax": "2", "g": "100", "sc_threshold": "1000000"}
# At 8 fps of 24 every third; card 9 stays from 0.375 s to 0.917 s.
BY_TIME = [0, 3, 6, 9, 9, 9, 9, 9, 24]


@pytest.mark.parametrize(
    ("container", "codec", "options", "held_back"),
    [
        ("avi", "mjpeg", {"qmin": "1", "qmax": "1"}, 0),
        ("avi", "mpeg4", MPEG4, 0),
        ("avi", "mpeg4", MPEG4 | {"bf": "2", "b_strategy": "0"}, 1),
        ("avi", "libx264", {"crf": "4", "bf": "3", "b-adapt": "0", "b-pyramid": "none"}, 1),
        ("asf", "libx264", {"crf": "4", "bf": "3", "b-adapt": "0", "b-pyramid": "none"}, 1),
    ],
)
def test_frames_that_an_avi_dropped_keep_their_time(container, codec, options, held_back, tmp_path):
    """Its empty chunks are times. With B frames the gap lies later in the file than on screen."""
    packets = coded([card(index) for index in HELD], codec, **options)
    places = [place for place in range(len(packets) + 12) if not 10 + held_back <= place < 22 + held_back]
    path = mux(tmp_path / f"a.{container}", codec, dict(zip(places, packets, strict=False)))
    clip = decode(path)
    assert shown(clip) == BY_TIME
    assert clip.effective_fps == pytest.approx(8)


def not_coded(packet: bytes) -> bytes:
    """A VOP that is not coded, at the time of this one; 24 frames a second take 5 bits of a time."""
    head = f"{int.from_bytes(packet[packet.index(VOP) + 4 :][:8], 'big'):064b}"
    end = head.index("0", 2) + 1 + 1 + 5 + 1  # kind, seconds, marker, time, marker; then: coded
    bits = head[:end] + "00"
    return VOP + int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")


def packed(packets: list[bytes]) -> list[bytes]:
    """As DivX writes B frames to an AVI: behind the picture they refer to, and an empty VOP in their own place."""
    first = packets[0]
    begin = first.index(b"\0\0\1\xb2")
    end = first.index(b"\0\0\1", begin + 4)
    chunks = [first[:begin] + b"\0\0\1\xb2DivX503b1393p" + first[end:]]
    for later, between in zip(packets[1::2], packets[2::2], strict=True):
        chunks += [later + between, not_coded(later)]
    return chunks


def test_divx_packed_bitstreams_keep_their_order_and_rate(tmp_path):
    chunks = packed(coded(cards()[:29], "mpeg4", **MPEG4, bf="1", b_strategy="0"))
    assert sum(chunk.count(VOP) == 2 for chunk in chunks) == 14
    path = mux(tmp_path / "a.avi", "mpeg4", dict(enumerate(chunks)))
    clip = decode(path)
    assert shown(clip) == list(clip.indices) == list(range(0, 25, 3))
    assert clip.effective_fps == pytest.approx(8)
    assert shown(decode(path, Cut(frames="head"))) == list(range(9))


@pytest.mark.parametrize("container", ["avi", "mp4"])
def test_pictures_that_are_not_coded_repeat_the_one_before(container, tmp_path):
    packets = coded([card(index) for index in HELD], "mpeg4", **MPEG4)
    chunks = [*packets[:10], *[not_coded(packets[10])] * 12, *packets[10:]]
    assert shown(decode(mux(tmp_path / f"a.{container}", "mpeg4", dict(enumerate(chunks))))) == BY_TIME


@pytest.mark.parametrize("start", [0.0, 100.0])
def test_a_picture_that_stays_is_repeated_as_long_as_it_stays(start, tmp_path):
    """A screen recording, an animation; wherever its clock begins."""
    times = [start + index / FPS for index in HELD]
    clip = decode(write(tmp_path / "a.mkv", [card(index) for index in HELD], times=times))
    assert shown(clip) == BY_TIME
    assert clip.indices == (0, 3, 6, 9, 9, 9, 9, 9, 12)
    assert clip.effective_fps == pytest.approx(8, abs=0.1)


def changed(source: Path, path: Path, change: Callable[[int, av.Packet], bool]) -> Path:
    """A copy of a stream's packets as another container has them.

    Args:
        change: of each packet, which it may change; false leaves it out.
    """
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and change(number, packet):
                packet.stream = stream
                new.mux(packet)
    return path


def test_a_hold_is_seen_though_two_pictures_have_one_time(tmp_path):
    """As a screen recorder's may; the other times are still those of the pictures."""
    whole = write(tmp_path / "a.mkv", [card(i) for i in HELD], times=[i / FPS for i in HELD], options={"bf": "0"})

    def repeat(number: int, packet: av.Packet) -> bool:
        if number == 5:
            packet.pts = packet.dts = round(4 / FPS * 1000)
        return True

    path = changed(whole, tmp_path / "b.mkv", repeat)
    with av.open(str(path)) as container:
        assert len({packet.pts for packet in container.demux(video=0) if packet.size}) == len(HELD) - 1
    assert shown(decode(path)) == BY_TIME
    assert shown(decode(path, Cut(frames="head"))) == list(range(9))


def test_what_leads_the_first_key_frame_of_a_copied_mkv_is_not_there(tmp_path):
    """Copied from an open group on, it is shown before 0: FFmpeg gives it no time, and no decoder can make it."""
    groups = {"crf": "6", "x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=none:scenecut=0"}
    whole = write(tmp_path / "a.mp4", [card(i) for i in HELD], times=[i / FPS for i in HELD], options=groups)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    begin = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
    zero = packets[begin].pts

    def shift(number: int, packet: av.Packet) -> bool:
        packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
        return number >= begin

    path = changed(whole, tmp_path / "b.mkv", shift)
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stamps[0] == 0 and None in stamps
    with ClipSource(path) as source, Video(source) as video:
        assert len(video.times_s) == len(stamps) - stamps.count(None)
    count = len(stamps) - stamps.count(None)
    clip = decode_clip(path, Resolution(count, 64, 96), Cut(frames="head"), 8, "key")
    assert shown(clip) == HELD[-count:]


def test_a_gif_with_a_hold_is_played_as_it_is_shown(tmp_path):
    times = [index / 25 for index in range(10)] + [1 + index / 25 for index in range(10)]
    options = {"codec": "gif", "pix_fmt": "rgb8", "tag": None, "fps": 25}
    clip = decode(write(tmp_path / "a.gif", cards()[:20], times=times, **options))
    assert clip.indices == (0, 3, 6, 9, 9, 9, 9, 9, 10)


def test_the_last_picture_stays_as_long_as_its_packet_says(tmp_path):
    path = mux(tmp_path / "a.mp4", "mpeg4", dict(enumerate(coded(cards()[:10], "mpeg4", **MPEG4))), last=20)
    clip = decode(path)
    assert shown(clip) == [0, 3, 6, 9, 9, 9, 9, 9, 9] and clip.effective_fps == pytest.approx(8)
    with ClipSource(path) as source, Video(source) as video:
        assert video.facts().duration_s == pytest.approx(29 / FPS)
    assert "too short" in decode(mux(tmp_path / "b.mp4", "mpeg4", dict(enumerate(coded(cards()[:8], "mpeg4"))))).reason
    options = {"codec": "gif", "pix_fmt": "rgb8", "tag": None, "fps": 25, "movflags": ""}
    with av.open(str(write(tmp_path / "a.gif", cards()[:10], **options))) as source:
        packets = [packet for packet in source.demux() if packet.size]
        with av.open(str(tmp_path / "b.gif"), "w", options={"final_delay": "100"}) as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in packets:
                packet.stream = stream
                file.mux(packet)
    assert decode(tmp_path / "b.gif").indices == (0, 3, 6, 9, 9, 9, 9, 9, 9)


def test_recordings_joined_byte_by_byte_are_refused_by_that_name(tmp_path):
    """Their times start anew; sorted, the two would be shuffled into each other."""
    options = {"codec": "mpeg2video", "fps": 25, "options": {"qmin": "1", "qmax": "2"}}
    one = write(tmp_path / "one.mpg", cards()[5:], **options).read_bytes()
    (tmp_path / "a.mpg").write_bytes(one + write(tmp_path / "other.mpg", cards(), **options).read_bytes())
    fault = decode(tmp_path / "a.mpg")
    assert isinstance(fault, ClipFault), shown(fault)
    assert "its times start anew at frame 25" in fault.reason
    stream = write(tmp_path / "one.ts", cards()).read_bytes()
    (tmp_path / "a.ts").write_bytes(stream * 2)
    assert "joined byte by byte" in decode(tmp_path / "a.ts").reason


@pytest.mark.parametrize(("kind", "codec"), [("h264", "libx264"), ("hevc", "libx265")])
def test_a_bare_bitstream_plays_at_its_own_rate(kind, codec, tmp_path):
    """As from a Raspberry Pi: it has no times, but says how many pictures a second it is made of."""
    path = write(tmp_path / f"a.{kind}", cards(), codec=codec, fps=60)
    with ClipSource(path) as source, Video(source) as video:
        assert video.facts().fps == pytest.approx(60)


def test_a_jump_of_hours_is_a_hold_that_takes_no_room(tmp_path):
    times = [index / FPS for index in range(10)] + [36_000 + index / FPS for index in range(20)]
    path = write(tmp_path / "a.mkv", cards(), times=times)
    assert shown(decode(path)) == [0, 3, 6, 9, 9, 9, 9, 9, 9]
    assert len(set(decode(path, Cut(frames="even")).indices)) == 3


def test_the_times_are_those_of_the_decoder(tmp_path):
    """For every container that stores times, ours from packets are the decoder's from frames."""
    for suffix in ("mp4", "mkv", "mov", "ts", "flv"):
        path = write(tmp_path / f"a.{suffix}", cards(), options={"crf": "6", "bf": "3"})
        with av.open(str(path)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        with ClipSource(path) as file, Video(file) as video:
            assert video.times_s == pytest.approx(times, abs=1e-6), suffix
