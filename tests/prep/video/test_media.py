"""Every odd kind of clip gets its reason or its right pixels; none raises."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import (
    BT601,
    BT709,
    BT2020,
    FPS,
    FRAMES,
    FULL,
    HEIGHT,
    LIMITED,
    WIDTH,
    assert_shows,
    card,
    cards,
    cut_short,
    damage,
    index_shown,
    write,
    write_sound,
)
from PIL import Image

from cogcommon.model.families import Resolution
from cogprep.dataset import probe
from cogprep.processes.pool import Pool
from cogprep.source.clip import ClipFacts, ClipFault
from cogprep.source.source_file import ClipSource
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip
from cogprep.video.media import Video

SIZE = Resolution(9, 64, 96)
OPAQUE = [np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]) for picture in cards()]
SD = {"matrix": BT601, "tag": None}


def decode(path: Path, cut: Cut | None = None, resolution: Resolution = SIZE) -> Clip | ClipFault:
    return decode_clip(path, resolution, cut or Cut(), 8, "key")


def facts_of(path: Path) -> ClipFacts:
    with ClipSource(path) as file, Video(file) as video:
        return video.facts()


FAST = {"crf": "6", "preset": "ultrafast"}


def enlarged(pictures: list[np.ndarray], times: int) -> list[np.ndarray]:
    return [picture.repeat(times, 0).repeat(times, 1) for picture in pictures]


def rotated(quarter_turns: int) -> list[np.ndarray]:
    return [np.rot90(picture, quarter_turns) for picture in cards()]


def times_at_two_rates() -> list[float]:
    return [index / 24 if index < 15 else 15 / 24 + (index - 15) / 8 for index in range(FRAMES)]


def with_edit_list(folder: Path) -> Path:
    """A copy that begins in the middle of a group of pictures: an edit list hides what leads up to it."""
    source, path = write(folder / "whole.mp4", cards()), folder / "edited.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        ticks = round(6 / FPS / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts -= ticks
                packet.dts -= ticks
                packet.stream = stream
                new.mux(packet)
    return path


def with_bad_title(folder: Path) -> Path:
    path = folder / "title.mkv"
    write(folder / "plain.mp4", cards())
    with av.open(str(folder / "plain.mp4")) as old, av.open(str(path), "w") as new:
        new.metadata["title"] = "ABCDEFGH"
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"ABCDEFGH", b"\xff\xfe\xe9\xe8\xff\xfe\xe9\xe8"))
    return path


def linked(folder: Path) -> Path:
    (folder / "link.mp4").symlink_to(write(folder / "target.mp4", cards()))
    return folder / "link.mp4"


def renamed(folder: Path, name: str) -> Path:
    return Path(shutil.copy(write(folder / "a.mp4", cards()), folder / name))


# A clip that can be used: how it is made, and how its colours are decided.
GOOD = {
    "h264 in mp4": (lambda d: write(d / "a.mp4", cards()), "bt709 limited (tagged)"),
    "index at the end": (lambda d: write(d / "a.mp4", cards(), movflags=""), "bt709 limited (tagged)"),
    "fragmented mp4": (lambda d: write(d / "a.mp4", cards(), movflags="frag_keyframe+empty_moov"), "bt709"),
    "with sound": (lambda d: write(d / "a.mp4", cards(), sound=True), "bt709"),
    "open groups of pictures": (
        lambda d: write(d / "a.mp4", cards(), options={"crf": "6", "x264-params": "open-gop=1:keyint=8:bframes=3"}),
        "bt709",
    ),
    "rotated by 90": (lambda d: write(d / "a.mp4", rotated(-1), rotate=90), "bt709"),
    "rotated by 180": (lambda d: write(d / "a.mp4", rotated(2), rotate=180), "bt709"),
    "rotated by 270": (lambda d: write(d / "a.mp4", rotated(1), rotate=-90), "bt709"),
    "mirrored": (lambda d: write(d / "a.mp4", [p[:, ::-1] for p in cards()], mirror=True), "bt709"),
    "wide pixels": (lambda d: write(d / "a.mp4", cards(WIDTH // 2, HEIGHT), sar=Fraction(2)), "bt709"),
    "wide pixels, rotated": (
        lambda d: write(d / "a.mp4", [np.rot90(p, -1) for p in cards(WIDTH, HEIGHT // 2)], rotate=90, sar=Fraction(2)),
        "bt709",
    ),
    "odd width and height": (lambda d: write(d / "a.mkv", cards(WIDTH + 3, HEIGHT + 3), codec="ffv1"), "bt709"),
    "4K": (lambda d: write(d / "a.mp4", enlarged(cards(960, 640, 9), 4), fps=8, options=FAST), "bt709"),
    "10 bit h264": (lambda d: write(d / "a.mp4", cards(), pix_fmt="yuv420p10le"), "bt709"),
    "10 bit hevc": (lambda d: write(d / "a.mp4", cards(), codec="libx265", pix_fmt="yuv420p10le"), "bt709"),
    "4:2:2": (lambda d: write(d / "a.mp4", cards(), pix_fmt="yuv422p"), "bt709"),
    "4:4:4": (lambda d: write(d / "a.mp4", cards(), pix_fmt="yuv444p"), "bt709"),
    "full range": (lambda d: write(d / "a.mp4", cards(), range_=FULL), "bt709 full (tagged)"),
    "tagged bt601": (lambda d: write(d / "a.mp4", cards(), matrix=BT601, tag=BT601), "bt601 limited (tagged)"),
    "tagged bt2020, not HDR": (lambda d: write(d / "a.mp4", cards(), matrix=BT2020, tag=BT2020), "bt2020"),
    "untagged SD": (lambda d: write(d / "a.mp4", cards(), tag_range=False, **SD), "bt601 limited (untagged SD)"),
    "mjpeg": (
        lambda d: write(
            d / "a.avi", cards(), codec="mjpeg", pix_fmt="yuvj420p", range_=FULL,
            options={"qmin": "1", "qmax": "2"}, **SD,
        ),
        "bt601 full",
    ),
    "alpha in prores": (
        lambda d: write(d / "a.mov", OPAQUE, codec="prores_ks", pix_fmt="yuva444p10le", options={"profile": "4"}),
        "bt709 limited, alpha over black (tagged)",
    ),
    "alpha in png": (
        lambda d: write(d / "a.mov", OPAQUE, codec="png", pix_fmt="rgba", tag=None),
        "rgb full, alpha over black",
    ),
    "rgb, run lengths": (lambda d: write(d / "a.mov", OPAQUE, codec="qtrle", pix_fmt="argb", tag=None), "rgb full"),
    "vp9 in webm": (lambda d: write(d / "a.webm", cards(), codec="libvpx-vp9", options={"crf": "10"}), "bt709"),
    "vp8 with hidden frames": (
        lambda d: write(
            d / "a.webm", cards(), codec="libvpx",
            options={"crf": "4", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16"}, **SD,
        ),
        "bt601",
    ),
    "av1 in mkv": (
        lambda d: write(d / "a.mkv", cards(), codec="libsvtav1", options={"crf": "10", "preset": "10"}), "bt709"
    ),
    "gif": (lambda d: write(d / "a.gif", cards(), codec="gif", pix_fmt="rgb8", tag=None, fps=25), "rgb full"),
    "mpeg-4 in avi": (
        lambda d: write(d / "a.avi", cards(), codec="mpeg4", options={"qmin": "1", "qmax": "2"}, **SD), "bt601"
    ),
    "b frames in avi": (lambda d: write(d / "a.avi", cards(), options={"crf": "6", "bf": "3"}), "bt709"),
    "mpeg-2, interlaced": (
        lambda d: write(
            d / "a.mpg", cards(), codec="mpeg2video", fps=25,
            options={"flags": "+ilme+ildct", "qmin": "1", "qmax": "2"}, **SD,
        ),
        "bt601",
    ),
    "mpeg transport stream": (lambda d: write(d / "a.ts", cards()), "bt709"),
    "raw h264": (lambda d: write(d / "a.h264", cards()), "bt709"),
    "mkv": (lambda d: write(d / "a.mkv", cards()), "bt709"),
    "two rates": (lambda d: write(d / "a.mp4", cards(), times=times_at_two_rates()), "bt709"),
    "wrong extension": (lambda d: renamed(d, "a.txt"), "bt709"),
    "no extension": (lambda d: renamed(d, "clip"), "bt709"),
    "a name in unicode": (lambda d: renamed(d, "été 雪 🎬.mp4"), "bt709"),
    "a name with spaces and dots": (lambda d: renamed(d, "a clip.v1.final.mp4"), "bt709"),
    "a name that looks like a pattern": (lambda d: renamed(d, "http:%03d*?.mp4"), "bt709"),
    "a link": (linked, "bt709"),
    "a title that is not UTF-8": (with_bad_title, "bt709"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_clip_gives_its_right_pixels(kind, tmp_path):
    make, colour = GOOD[kind]
    path = make(tmp_path)
    frames = 9 if kind == "4K" else FRAMES
    facts = facts_of(path)
    assert facts.width / facts.height == pytest.approx(1.5, abs=0.04)
    assert facts.frames == frames
    clip = decode(path)
    assert isinstance(clip, Clip), clip
    assert clip.frames_FHWC.shape == (9, 64, 96, 3)
    assert clip.colour == facts.colour
    assert clip.colour.startswith(colour)
    for index, picture in zip(clip.indices, clip.frames_FHWC, strict=True):
        # gif has 256 colours only
        if kind != "gif":
            assert_shows(picture, index, frames)
        else:
            assert index_shown(picture) == pytest.approx(index, abs=0.6)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"crf": "6", "g": "10", "bf": "0", "sc_threshold": "0"}),
        ("libx264", {"crf": "6", "x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=none:scenecut=0"}),
        ("libx265", {"crf": "6", "x265-params": "log-level=none:open-gop=1:keyint=10:bframes=3:scenecut=0"}),
    ],
    ids=["h264", "h264, open groups", "hevc, open groups"],
)
def test_a_stream_that_begins_inside_a_group_of_pictures_begins_at_its_first_key_frame(codec, options, tmp_path):
    """As a recording of a broadcast does: what comes before the key frame is not there to be picked."""
    whole = write(tmp_path / "a.ts", cards(), codec=codec, options=options)
    with av.open(str(whole)) as container:
        start = [packet.pos for packet in container.demux(video=0) if packet.size][4]
    (tmp_path / "b.ts").write_bytes(whole.read_bytes()[start:])
    facts = facts_of(tmp_path / "b.ts")
    assert 15 <= facts.frames <= FRAMES - 6
    clip = decode(tmp_path / "b.ts", Cut(frames="head"))
    assert isinstance(clip, Clip), clip
    for index, picture in enumerate(clip.frames_FHWC, FRAMES - facts.frames):
        assert_shows(picture, index)


def test_an_edit_list_hides_frames_as_it_does_in_a_player(tmp_path):
    path = with_edit_list(tmp_path)
    with av.open(str(path)) as container:
        played = sum(1 for _ in container.decode(video=0))
    assert facts_of(path).frames == played
    clip = decode(path, Cut(frames="head"))
    assert_shows(clip.frames_FHWC[0], FRAMES - played)


def cut_by_edits(source: Path, path: Path, edits: list[tuple[float, float]]) -> Path:
    """A copy that shows only these stretches, from and to in seconds, as QuickTime trims; its index is at the end."""
    data = bytearray(source.read_bytes())
    at = data.index(b"elst") - 4
    size, first = int.from_bytes(data[at : at + 4], "big"), int.from_bytes(data[at + 20 : at + 24], "big")
    with av.open(str(source)) as file:
        ticks = round(1 / file.streams.video[0].time_base)
    entries = [
        struct.pack(">IIHH", round((to - from_) * 1000), round(from_ * ticks) + first, 1, 0) for from_, to in edits
    ]
    data[at : at + size] = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits)) + b"".join(entries)
    for box in (b"edts", b"trak", b"moov"):
        place = data.rindex(box, 0, at + 4) - 4
        length = int.from_bytes(data[place : place + 4], "big") + 12 * (len(edits) - 1)
        data[place : place + 4] = length.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def test_several_edits_show_what_a_player_shows(tmp_path):
    """The second one begins to be decoded at a key frame long before it, whose times were there already."""
    source = write(tmp_path / "a.mp4", cards(), movflags="", options={"crf": "6", "bf": "2"})
    path = cut_by_edits(source, tmp_path / "b.mp4", [(0, 6 / FPS), (18 / FPS, 27 / FPS)])
    assert facts_of(path).frames == 15
    clip = decode(path, Cut(frames="head"))
    assert isinstance(clip, Clip), clip
    for index, picture in zip([*range(6), *range(18, 21)], clip.frames_FHWC, strict=True):
        assert_shows(picture, index)
    part = decode(path.with_name(f"{path.name}#t={6 / FPS}"), Cut(frames="head"))
    assert isinstance(part, Clip), part
    for index, picture in enumerate(part.frames_FHWC, 18):
        assert_shows(picture, index)


def test_two_rates_are_picked_by_time(tmp_path):
    path = write(tmp_path / "a.mp4", cards(), times=times_at_two_rates())
    clip = decode(path)
    assert facts_of(path).variable_rate
    assert clip.indices == (0, 3, 6, 9, 12, 15, 16, 17, 18)
    assert clip.effective_fps == pytest.approx(8, abs=0.01)


def zero_frames(folder: Path) -> Path:
    path = folder / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        file.start_encoding()
    return path


def cover_picture(folder: Path) -> Path:
    """A song with a cover picture, as ID3 stores it: FFmpeg shows it as a video stream of one frame."""
    cover = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(cover, "JPEG")
    body = b"\0image/jpeg\0\3\0" + cover.getvalue()
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    silence = (b"\xff\xfb\x90\x00" + bytes(413)) * 40  # MPEG-1 layer 3, 128 kbit/s, 44.1 kHz
    path = folder / "song.mp3"
    path.write_bytes(b"ID3\3\0\0" + size + frame + silence)
    return path


def with_text(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def two_sizes(folder: Path) -> Path:
    first, second = write(folder / "a.h264", cards(frames=20)), write(folder / "b.h264", cards(96, 64))
    (folder / "c.h264").write_bytes(first.read_bytes() + second.read_bytes())
    return folder / "c.h264"


def special(folder: Path, make) -> Path:
    make(folder / "clip.mp4")
    return folder / "clip.mp4"


def picture(folder: Path) -> Path:
    Image.fromarray(card(0)).save(folder / "a.png")
    return (folder / "a.png").rename(folder / "a.mp4")


def concatenation(folder: Path) -> Path:
    write(folder / "b.mp4", cards())
    return with_text(folder, "a.txt", "ffconcat version 1.0\nfile b.mp4\n")


def row_of_pictures(folder: Path) -> Path:
    """FFmpeg takes this name for a pattern, and would read frame00.png to frame29.png."""
    for index, one in enumerate(cards()):
        Image.fromarray(one).save(folder / f"frame{index:02d}.png")
    return with_text(folder, "frame%02d.png", "x")


def animated_webp(folder: Path) -> Path:
    first, *others = map(Image.fromarray, cards())
    first.save(folder / "a.webp", save_all=True, append_images=others, duration=40)
    return folder / "a.webp"


def unknown_codec(folder: Path) -> Path:
    path = write(folder / "a.avi", cards(), codec="mpeg4", **SD)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"QQQQ").replace(b"fmp4", b"qqqq"))
    return path


def cut_in_index(source: Path, path: Path) -> Path:
    data = source.read_bytes()
    begin = data.index(b"moov") - 4
    path.write_bytes(data[: begin + int.from_bytes(data[begin : begin + 4], "big") // 2])
    return path


def without_index(source: Path, path: Path) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    return path


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/etc/hostname\n#EXT-X-ENDLIST\n"
TOO_SHORT = r"too short: 1 frame, 9 are needed"

# A clip that cannot be used: how it is made, and the reason it gets.
BAD = {
    "empty": (lambda d: with_text(d, "a.mp4", ""), r"the file is empty \(0 bytes\)"),
    "text": (lambda d: with_text(d, "a.mp4", "not a video\n" * 50), "not a video, or damaged"),
    "a list as a clip": (lambda d: with_text(d, "a.txt", "not a video\n" * 50), "no video|not a video"),
    "a web page": (lambda d: with_text(d, "a.mp4", "<!doctype html><h1>404</h1>"), "a web page, not a video"),
    "a playlist of other files": (lambda d: with_text(d, "a.m3u8", PLAYLIST), r"a playlist \(m3u8\)"),
    "a playlist called mp4": (lambda d: with_text(d, "a.mp4", "\ufeff" + PLAYLIST), r"a playlist \(m3u8\)"),
    "a list of clips to join": (concatenation, r"a list of other files \(ffconcat\).* ffmpeg -i CLIP -c copy"),
    "a playlist in XML": (
        lambda d: with_text(d, "a.mpd", '<?xml version="1.0"?>\n<MPD xmlns="urn:x"></MPD>'), r"a playlist \(DASH"),
    "a row of pictures": (row_of_pictures, "not a picture"),
    "a Git LFS pointer": (
        lambda d: with_text(d, "a.mp4", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "a HEIC picture": (
        lambda d: with_text(d, "a.heic", "\0\0\0\x1cftypmif1\0\0\0\0mif1miafheic"), r"a HEIC .*open\('CLIP'\)"),
    "an animated WebP": (animated_webp, "an animated WebP, .* python -c"),
    "an unknown codec": (unknown_codec, "its codec cannot be decoded here"),
    "only a header": (
        lambda d: cut_short(write(d / "b.mp4", cards()), d / "a.mp4", 0.001), "not a video"),
    "cut short, index at the end": (
        lambda d: cut_short(write(d / "b.mp4", cards(), movflags=""), d / "a.mp4"),
        "cut short: its 'mdat' box"),
    "cut inside its index, at the end": (
        lambda d: cut_in_index(write(d / "b.mp4", cards(), movflags=""), d / "a.mp4"), "cut short: its 'moov' box"),
    "cut inside its index, in front": (
        lambda d: cut_in_index(write(d / "b.mp4", cards()), d / "a.mp4"), "cut short: its 'moov' box"),
    "a recording without its index": (
        lambda d: without_index(write(d / "b.mp4", cards(), movflags=""), d / "a.mp4"), "it has no index"),
    "cut short, index in front": (
        lambda d: cut_short(write(d / "b.mp4", cards()), d / "a.mp4"), "cut short"),
    "cut short by one percent": (
        lambda d: cut_short(write(d / "b.mp4", cards()), d / "a.mp4", 0.99), "cut short"),
    "cut short between two frames": (lambda d: cut_between(write(d / "b.mp4", cards()), d / "a.mp4"), "cut short"),
    "cut short, fragmented": (
        lambda d: cut_short(write(d / "b.mp4", cards(), movflags="frag_keyframe+empty_moov"), d / "a.mp4"),
        "cut short"),
    "cut short, mkv": (
        lambda d: cut_short(write(d / "b.mkv", cards()), d / "a.mkv"), r"the header says 1\.\d s, the data ends at"),
    "cut short, webm": (
        lambda d: cut_short(write(d / "b.webm", cards(), codec="libvpx-vp9"), d / "a.webm"), "cut short"),
    "cut short, avi": (
        lambda d: cut_short(write(d / "b.avi", cards(), codec="mpeg4", **SD), d / "a.avi"), "cut short"),
    "flipped bytes": (lambda d: damage(write(d / "b.mp4", cards()), d / "a.mp4"), "damaged"),
    "an unfinished download": (lambda d: damage(write(d / "b.mp4", cards()), d / "a.mp4", zeros=True), "damaged"),
    "only sound": (lambda d: write_sound(d / "a.m4a"), "only sound"),
    "a song with a cover": (cover_picture, "only sound"),
    "zero frames": (zero_frames, "no frames|no video"),
    "one frame": (lambda d: write(d / "a.mp4", cards()[:1]), TOO_SHORT),
    "a picture": (picture, TOO_SHORT),
    "turned by 45 degrees": (lambda d: write(d / "a.mp4", cards(), rotate=45), "only quarter turns"),
    "a size that changes": (two_sizes, r"the picture size changes at frame \d+, to 96x64"),
    "missing": (lambda d: d / "a.mp4", "the file is missing"),
    "a link to nothing": (lambda d: special(d, lambda p: p.symlink_to("nowhere")), "a link that points nowhere"),
    "a link to itself": (lambda d: special(d, lambda p: p.symlink_to(p)), "symbolic links|link"),
    "a folder": (lambda d: special(d, Path.mkdir), "a folder, not a file"),
    "a pipe": (lambda d: special(d, os.mkfifo), "not a regular file"),
    "a device": (lambda d: special(d, lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "a file as a folder": (lambda d: with_text(d, "a", "x") / "b.mp4", "Not a directory"),
    "a name of 300 letters": (lambda d: d / ("a" * 300 + ".mp4"), "File name too long"),
    "a NUL in the name": (lambda d: d / "a\0.mp4", "null byte"),
}  # fmt: skip


def cut_between(source: Path, path: Path) -> Path:
    """Cut where a packet ends, so that no packet is incomplete."""
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        end = packets[19].pos + packets[19].size
    path.write_bytes(source.read_bytes()[:end])
    return path


@pytest.mark.parametrize("matrix", range(8))
def test_every_display_matrix_is_undone(matrix, tmp_path):
    """Quarter turns and mirrors, with pixels that are twice as wide as high: the card stands upright."""
    transpose, mirror_x, mirror_y = matrix & 4, matrix & 2, matrix & 1
    stored = cards(WIDTH if transpose else WIDTH // 2, HEIGHT // 2 if transpose else HEIGHT)
    # what is stored, so that: transposed first, then mirrored, it is the card
    stored = [picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1] for picture in stored]
    stored = [picture.swapaxes(0, 1) for picture in stored] if transpose else stored
    x, y = (-1 if mirror_x else 1) << 16, (-1 if mirror_y else 1) << 16
    rows = [0, y, 0, x, 0, 0] if transpose else [x, 0, 0, 0, y, 0]
    path = write(tmp_path / "a.mp4", stored, sar=Fraction(2), display=[*rows, 0, 0, 1 << 30])
    facts = facts_of(path)
    assert (facts.width, facts.height) == (WIDTH, HEIGHT)
    clip = decode(path)
    for index, picture in zip(clip.indices, clip.frames_FHWC, strict=True):
        assert_shows(picture, index)


def two_videos(path: Path, *, default: int | None, small: int = 0) -> Path:
    """Two streams in one file, one of them a small negative; perhaps one marked as default."""
    large = write(path.with_name("large.mkv"), cards())
    negative = write(path.with_name("negative.mkv"), [255 - picture for picture in cards(48, 32)])
    with av.open(str(path), "w") as new:
        files = [av.open(str(file)) for file in ((negative, large) if small == 0 else (large, negative))]
        streams = [new.add_stream_from_template(file.streams.video[0]) for file in files]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        for file, stream in zip(files, streams, strict=True):
            for packet in file.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
            file.close()
    return path


@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("default", [None, 0, 1])
def test_of_several_videos_the_default_is_taken_else_the_largest(default, small, tmp_path):
    """As players do: the preview of a dash camera, in front of its film, is not what people mean."""
    path = two_videos(tmp_path / "a.mkv", default=default, small=small)
    facts = facts_of(path)
    assert facts.videos == 2
    if default == small:
        assert (facts.width, facts.height) == (48, 32)
    else:
        assert_shows(decode(path).frames_FHWC[0], 0)


def test_a_cover_that_is_not_marked_as_one_is_not_taken_for_the_film(tmp_path):
    """It is larger, and in front, and marked default as the first stream is."""
    film, cover = write(tmp_path / "film.mp4", cards()), write(tmp_path / "cover.mp4", cards(480, 320)[:1])
    with av.open(str(film)) as one, av.open(str(cover)) as other, av.open(str(tmp_path / "a.mp4"), "w") as new:
        streams = [new.add_stream_from_template(file.streams.video[0]) for file in (other, one)]
        for file, stream in zip((other, one), streams, strict=True):
            for packet in file.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
    facts = facts_of(tmp_path / "a.mp4")
    assert (facts.width, facts.frames, facts.videos) == (WIDTH, FRAMES, 2)


def test_colours_that_change_are_followed(tmp_path):
    """Joined streams, the second of full range: every frame is converted by its own tags."""
    first, second = write(tmp_path / "a.h264", cards(frames=20)), write(tmp_path / "b.h264", cards(), range_=FULL)
    (tmp_path / "c.h264").write_bytes(first.read_bytes() + second.read_bytes())
    clip = decode(tmp_path / "c.h264", Cut(frames="even"))
    assert clip.indices[-1] == 49
    assert_shows(clip.frames_FHWC[0], 0, 20)
    assert_shows(clip.frames_FHWC[-1], 29)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_clip_gives_its_reason(kind, tmp_path):
    make, reason = BAD[kind]
    path = make(tmp_path)
    fault = decode(path)
    assert isinstance(fault, ClipFault), kind
    assert re.search(reason, fault.reason), fault.reason
    probe.probe_clips([path], [SIZE], Cut(), 8)[0]  # may find it already; must not raise
    assert str(tmp_path) not in fault.reason  # whoever reports it names the file


def test_a_file_that_may_not_be_read(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("private") / "a.mp4", cards())
    path.chmod(0)
    reason = as_nobody(lambda: probe.probe_clips([path], [SIZE], Cut(), 8)[0].reason)
    assert reason == "cannot be read: Permission denied"


def as_nobody(ask) -> str:
    """The answer of a child that is not root, since root may read everything."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            os.write(into, ask().encode())
        finally:
            os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    with os.fdopen(out) as answer:
        return answer.read()


def test_the_whole_corpus_through_the_pool_ends_no_run(tmp_path):
    kinds = {**BAD, **{kind: GOOD[kind] for kind in ("h264 in mp4", "gif", "rotated by 90")}}
    paths = []
    for number, (make, _) in enumerate(kinds.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(make(tmp_path / str(number)))
    with Pool(2) as pool:
        results = list(pool.run(decode_clip, ((path, SIZE, Cut(), 8, "key", None) for path in paths)))
    assert [isinstance(result, ClipFault) for result in results] == [True] * len(BAD) + [False] * 3
    assert not any("the decoder crashed" in result.reason for result in results[: len(BAD)])


def test_encode_names_every_bad_clip_and_encodes_the_rest(tmp_path):
    from cogprep.commands.encode import encode
    from cogprep.settings.encode import EncodeSettings

    makers = {kind: make for kind, (make, _) in BAD.items() if kind != "a NUL in the name"}  # the lists refuse that
    makers |= {kind: GOOD[kind][0] for kind in ("rotated by 90", "vp9 in webm")}
    entries = []
    for number, make in enumerate(makers.values()):
        (tmp_path / str(number)).mkdir()
        entries.append(str(make(tmp_path / str(number)).relative_to(tmp_path)))
    (tmp_path / "videos.txt").write_text("\n".join(entries))
    (tmp_path / "prompts.txt").write_text("\n".join(makers))
    settings = EncodeSettings(data_root=tmp_path, out=tmp_path / "out", resolution=["9x64x96"], model="tiny", workers=2)
    report = encode(settings)
    assert (report.encoded, report.rejected) == (2, len(BAD) - 1)
    for rejection in report.rejections:
        assert re.search(BAD[rejection.caption][1], rejection.reason), rejection
    again = encode(settings)  # what was rejected is remembered or found again, never encoded
    assert (again.encoded, again.reused, again.rejected) == (0, 2, len(BAD) - 1)


def test_alpha_is_laid_over_black(tmp_path):
    half = [np.dstack([picture, np.full(picture.shape[:2], 128, np.uint8)]) for picture in cards()]
    clip = decode(write(tmp_path / "a.mov", half, codec="png", pix_fmt="rgba", tag=None))
    whole = decode(write(tmp_path / "b.mov", OPAQUE, codec="png", pix_fmt="rgba", tag=None))
    assert np.abs(clip.frames_FHWC - whole.frames_FHWC * (128 / 255)).max() <= 1.5


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_the_alpha_of_a_webm_is_seen(codec, tmp_path):
    """It lies beside the pictures, and what they hide is white."""
    hidden = [np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]) for picture in cards()]
    for picture in hidden:
        picture[:, :72] = (255, 255, 255, 0)
    options = {"crf": "4", "b": "2M", "auto-alt-ref": "0"}
    path = write(tmp_path / "a.webm", hidden, codec=codec, pix_fmt="yuva420p", options=options, **SD)
    clip = decode(path)
    assert "alpha over black" in clip.colour
    assert clip.frames_FHWC[:, :, 4:40].max() <= 12
    assert_shows(np.concatenate([card(24, 96, 64)[:, :48], clip.frames_FHWC[-1, :, 48:]], 1), 24)
    assert len(probe.look_at([path], [SIZE], Cut(), 8)[0].facts.colour) > 0


# Saturated colours at 720p: the wrong matrix is off by more than 10 in one of them.
PATCHES = [(200, 30, 30), (30, 180, 40), (30, 40, 200), (200, 180, 20)]


def patches() -> list[np.ndarray]:
    picture = np.repeat(np.array(PATCHES, np.uint8)[None], 4, 0).repeat(180, 0).repeat(320, 1)
    return [picture] * 9


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"matrix": BT709, "tag": BT709}, "bt709 limited (tagged)"),
        ({"matrix": BT709, "tag": None, "tag_range": False}, "bt709 limited (untagged HD)"),
        ({"matrix": BT601, "tag": BT601}, "bt601 limited (tagged)"),
        ({"matrix": BT709, "tag": BT709, "range_": FULL}, "bt709 full (tagged)"),
        ({"matrix": BT2020, "tag": BT2020, "range_": LIMITED}, "bt2020 limited (tagged)"),
    ],
)
def test_colours_of_hd_clips(written, said, tmp_path):
    path = write(tmp_path / "a.mp4", patches(), fps=8, options={"crf": "4", "preset": "ultrafast"}, **written)
    clip = decode(path, resolution=Resolution(9, 720, 1280))
    assert clip.colour == said
    found = clip.frames_FHWC[4, 360, 160::320].astype(int)
    assert np.abs(found - PATCHES).max() <= 3, found


def test_the_colour_test_would_notice_a_wrong_matrix_or_range(tmp_path):
    for wrong in ({"matrix": BT601, "tag": BT709}, {"matrix": BT709, "tag": BT709, "range_": FULL, "tag_range": False}):
        path = write(tmp_path / "a.mp4", patches(), fps=8, options={"crf": "4", "preset": "ultrafast"}, **wrong)
        clip = decode(path, resolution=Resolution(9, 720, 1280))
        assert np.abs(clip.frames_FHWC[4, 360, 160::320].astype(int) - PATCHES).max() > 10


def disc(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.25 * min(width, height)) ** 2
    return np.where(inside[..., None], 230, 25).astype(np.uint8).repeat(3, 2)


def roundness(picture_HWC: np.ndarray) -> float:
    bright = picture_HWC[..., 1] > 128
    return float(bright.any(axis=0).sum() / bright.any(axis=1).sum())


@pytest.mark.parametrize("size", [(640, 360), (360, 640), (400, 400), (720, 300)])
def test_a_disc_stays_round(size, tmp_path):
    path = write(tmp_path / "a.mp4", [disc(*size)] * 9, fps=8)
    resolution = Resolution(9, 240, 360)
    for fit in ("crop", "pad"):
        assert roundness(decode(path, Cut(fit=fit), resolution).frames_FHWC[0]) == pytest.approx(1, abs=0.03)
    stretched = roundness(decode(path, Cut(fit="stretch"), resolution).frames_FHWC[0])
    assert abs(stretched - 1) > 0.1  # so this test does notice a stretch


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((found.astype(float) - expected) ** 2).mean()))


def lanczos_psnr(path: Path, resolution: Resolution) -> float:
    """Our crop-resize against PIL's Lanczos on the same decoded frames; the worst frame."""
    clip = decode(path, Cut(frames="head"), resolution)
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), 9)]
    worst = np.inf
    for found, picture_HWC in zip(clip.frames_FHWC, pictures, strict=True):
        height, width = picture_HWC.shape[:2]
        scale = max(resolution.width / width, resolution.height / height)
        scaled = Image.fromarray(picture_HWC).resize((round(width * scale), round(height * scale)), Image.LANCZOS)
        left, top = (scaled.width - resolution.width) // 2, (scaled.height - resolution.height) // 2
        cut = scaled.crop((left, top, left + resolution.width, top + resolution.height))
        worst = min(worst, psnr(found, np.asarray(cut)))
    return worst


def landscape(width: int, height: int, shift: int) -> np.ndarray:
    """Noise with the spectrum of natural pictures (amplitude 1/f), moving sideways."""
    rng = np.random.default_rng(3)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / (np.hypot(fx, fy) + 1 / width)
    picture = np.fft.irfft2(spectrum, (height, width))
    picture = np.clip(128 + 45 * picture / picture.std(), 0, 255)
    return np.roll(picture, shift, 1)[..., None].repeat(3, 2).astype(np.uint8)


@pytest.mark.parametrize("resolution", [Resolution(9, 480, 720), Resolution(9, 256, 384)], ids=str)
def test_scaling_equals_lanczos_above_40_db(resolution, tmp_path):
    pictures = [landscape(1280, 720, 4 * index) for index in range(9)]
    path = write(tmp_path / "a.mp4", pictures, fps=8, options={"crf": "10", "preset": "ultrafast"})
    assert lanczos_psnr(path, resolution) > 40


@pytest.mark.parametrize("resolution", [Resolution(9, 480, 720), Resolution(9, 256, 384)], ids=str)
def test_scaling_of_real_clips_equals_lanczos_above_40_db(resolution, real_clips):
    for path in real_clips:
        assert lanczos_psnr(path, resolution) > 40


def test_flipped_bytes_are_found(tmp_path):
    """30 files with 20 flipped bytes each: every one is refused, or its used frames are unharmed."""
    source = write(tmp_path / "a.mp4", cards())
    whole = decode(source, Cut(frames="even")).frames_FHWC
    refused = 0
    for seed in range(30):
        result = decode(damage(source, tmp_path / "b.mp4", seed=seed, bytes_=20), Cut(frames="even"))
        refused += isinstance(result, ClipFault)
        assert isinstance(result, ClipFault) or psnr(result.frames_FHWC, whole) > 30
    assert refused >= 27


DAMAGED = {
    "mp4": {}, "mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, "mkv": {}, "ts": {}, "flv": {},
    "webm": {"codec": "libvpx-vp9"}, "avi": {"codec": "mpeg4", **SD}, "mpg": {"codec": "mpeg2video", "fps": 25},
    "gif": {"codec": "gif", "pix_fmt": "rgb8", "tag": None, "fps": 25},
}  # fmt: skip


def damage_and_read(suffix: str, folder: Path, files: int) -> tuple[int, int]:
    """How many of so many files, damaged in their headers or anywhere, gave a reason, and how many pictures."""
    whole = write(folder / f"whole.{suffix}", cards(), **DAMAGED[suffix]).read_bytes()
    faults = 0
    for seed in range(files):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for place in rng.integers(0, 1024 if seed % 2 else len(data), rng.integers(1, 12)):
            data[place % len(data)] = rng.integers(256)
        path = folder / f"a.{suffix}"
        path.write_bytes(bytes(data[: rng.integers(1, len(data))] if seed % 5 == 0 else data))
        looked, clip = probe.look_at([path], [SIZE], Cut(), 8)[0], decode(path)
        assert isinstance(looked, ClipFault | probe.Look)
        faults += isinstance(clip, ClipFault)
    return faults, files - faults


@pytest.mark.parametrize("suffix", DAMAGED)
def test_damage_gives_a_reason_or_pictures_and_raises_nothing(suffix, tmp_path):
    assert sum(damage_and_read(suffix, tmp_path, 5)) == 5


@pytest.mark.full
@pytest.mark.parametrize("suffix", DAMAGED)
def test_a_thousand_damaged_files(suffix, tmp_path):
    faults, read = damage_and_read(suffix, tmp_path, 1000 // len(DAMAGED))
    print(f"{suffix}: {faults} refused, {read} read")


def test_the_image_of_a_clip_goes_through_the_same_cut(tmp_path):
    pictures = cards(192, 96)
    path = write(tmp_path / "a.mp4", pictures)
    Image.fromarray(pictures[0]).resize((384, 192)).save(tmp_path / "a.png")
    for cut in (Cut(), Cut(crop="random"), Cut(fit="pad"), Cut(fit="stretch")):
        clip = decode_clip(path, SIZE, cut, 8, "key", tmp_path / "a.png")
        assert psnr(clip.image_HWC, clip.frames_FHWC[0]) > 22
    assert decode_clip(path, SIZE, Cut(), 8, "key", tmp_path / "b.png") == ClipFault(
        "image: the file is missing", kind="missing"
    )


def test_frames_are_bit_equal_on_a_second_run(tmp_path):
    path = write(tmp_path / "a.mp4", cards())
    first, second = decode(path), decode(path)
    assert np.array_equal(first.frames_FHWC, second.frames_FHWC)


def test_only_what_is_needed_is_decoded(tmp_path):
    """Damage behind the last used frame does no harm."""
    source = write(tmp_path / "a.mp4", cards(), options={"crf": "6", "g": "10", "bf": "0"})
    with ClipSource(source) as file, Video(file) as video:
        assert len(video.times_s) == FRAMES
    data = bytearray(source.read_bytes())
    data[-60:-20] = bytes(40)
    (tmp_path / "b.mp4").write_bytes(bytes(data))
    assert isinstance(decode(tmp_path / "b.mp4", Cut(frames="head")), Clip)
    assert isinstance(decode(tmp_path / "b.mp4", Cut(frames="even")), ClipFault)


def test_writing_the_corpus_leaves_the_scheduling_alone(tmp_path):
    before = os.sched_getscheduler(0)
    write(tmp_path / "a.mkv", cards(), codec="libsvtav1", options={"crf": "10", "preset": "10"})
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


def boxed(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """White around each: 32 pixels left, 16 right, 8 above, 24 below."""
    return [np.pad(picture, ((8, 24), (32, 16), (0, 0)), constant_values=255) for picture in pictures]


def with_clap(path: Path, width: int, height: int, across: int, down: int) -> Path:
    """An mp4 whose index is at its end, with a clean aperture (ISO/IEC 14496-12, 12.1.4) put into it."""
    data = bytearray(path.read_bytes())
    moov = data.index(b"moov")
    entry = data.index(b"avc1", data.index(b"stsd", moov)) - 4
    box = struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, across, 1, down, 1)
    end = entry + int.from_bytes(data[entry : entry + 4], "big")
    data[end:end] = box
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        at = data.index(name, moov, end) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(box)).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    return path


def with_pixel_crop(path: Path, **edges: int) -> Path:
    """A Matroska file with PixelCrop elements (RFC 9559, 5.1.4.1.28) in place of what it says of colour."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\x55\xb0")
    length = 3 + (data[start + 2] & 0x7F)
    ids = {"left": b"\x54\xcc", "right": b"\x54\xdd", "top": b"\x54\xbb", "bottom": b"\x54\xaa"}
    elements = b"".join(ids[side] + bytes([0x81, pixels]) for side, pixels in edges.items())
    filler = length - len(elements) - 2
    assert filler >= 0
    data[start : start + length] = elements + bytes([0xEC, 0x80 | filler]) + bytes(filler)
    path.write_bytes(bytes(data))
    return path


CROPPED = {
    "clap in mp4": lambda d: with_clap(write(d / "a.mp4", boxed(cards()), movflags=""), WIDTH, HEIGHT, 8, -8),
    "clap, 10 bits": lambda d: with_clap(
        write(d / "a.mp4", boxed(cards()), movflags="", pix_fmt="yuv420p10le"), WIDTH, HEIGHT, 8, -8
    ),
    "PixelCrop in mkv": lambda d: with_pixel_crop(
        write(d / "a.mkv", boxed(cards()), matrix=BT601, tag=BT601, trc=1), left=32, right=16, top=8, bottom=24
    ),
}


@pytest.mark.parametrize("kind", CROPPED)
def test_what_a_container_crops_is_not_there(kind, tmp_path):
    path = CROPPED[kind](tmp_path)
    facts = facts_of(path)
    assert (facts.width, facts.height, facts.cropped, facts.frames) == (WIDTH, HEIGHT, True, FRAMES)
    clip = decode(path)
    assert isinstance(clip, Clip), clip
    for index, picture in zip(clip.indices, clip.frames_FHWC, strict=True):
        assert_shows(picture, index)
    seen = probe.look_at([path], [SIZE], Cut(), 8)[0]
    assert isinstance(seen, probe.Look)
    assert (seen.facts, seen.picture) == (facts, None)


def test_a_crop_of_everything_is_refused(tmp_path):
    path = with_pixel_crop(write(tmp_path / "a.mkv", cards(), trc=1), left=100, right=100)
    assert isinstance(decode(path), ClipFault)
