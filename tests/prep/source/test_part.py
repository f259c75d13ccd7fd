"""Parts of clips: exactly the pictures that they name, reached without decoding what comes before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import card, write

from cogcommon.model.families import Resolution
from cogcommon.shards.records import SampleRow, read_record
from cogprep.commands.init import init
from cogprep.commands.validate import validate
from cogprep.commands.verify import verify
from cogprep.settings.encode import ValidateSettings
from cogprep.show.source_view import SourceView, view_source
from cogprep.source import source_file
from cogprep.source.clip import BadClip, ClipFault
from cogprep.source.part import Part, locate, read_part
from cogprep.source.source_file import ClipSource, Source
from cogprep.video import media
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, decode_clip
from cogprep.video.media import Video

SIZE = Resolution(9, 64, 96)
COUNT, FPS = 96, 24


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Cards with noise, so that no two pictures are equal."""
    chance = np.random.default_rng(0)
    cards = [card(index % 30).astype(int) for index in range(COUNT)]
    return [np.clip(one + chance.integers(-20, 20, one.shape), 0, 255).astype(np.uint8) for one in cards]


# ---- what a fragment says


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("12.5,18", (12.5, 18)), ("12.5", (12.5, math.inf)), (",18", (0, 18)), ("0", (0, math.inf)),
        ("npt:10,20", (10, 20)), ("1:02,1:00:00", (62, 3600)), ("npt:00:01:02.5", (62.5, math.inf)), ("7.,8", (7, 8)),
    ],
)  # fmt: skip
def test_times_as_the_w3c_writes_them(text, part):
    assert read_part(text) == Part(*part)


@pytest.mark.parametrize(
    "text",
    ["", ",", "5,", "nan", "nan,3", "inf", "-1,2", "1:99", "99:00", "1e3", "1,2,3", "10,20&xywh=1,2,3,4", "smpte:0:10",
     "\u0661,\u0662", "9" * 400, "0x1", " 1", "1 ,2", "10s", "\0"],
)  # fmt: skip
def test_what_is_no_part_says_what_to_type(text):
    with pytest.raises(BadClip, match=r"is no part of a clip: type #t=12\.5,18 for"):
        read_part(text)


def test_a_part_that_ends_before_it_begins():
    with pytest.raises(BadClip, match=r"#t=18,12.5 ends before it begins; the other way round it is #t=12.5,18"):
        read_part("18,12.5")
    with pytest.raises(BadClip, match="#t=3,3 ends where it begins"):
        read_part("3,3")


def test_a_file_of_that_very_name_wins(tmp_path):
    named = tmp_path / "a.mp4#t=1,2"
    assert locate(named).file == tmp_path / "a.mp4"
    named.write_bytes(b"x")
    assert (locate(named).file, locate(named).part) == (named, None)
    (tmp_path / "clips#t=3").mkdir()
    assert locate(tmp_path / "clips#t=3" / "a.mp4").part is None
    assert locate(tmp_path / "#t=3").part is None
    assert [locate(tmp_path / f"{folder}#t=3").file for folder in (".", "..")] == [tmp_path, tmp_path / ".."]


def identity(path: Path) -> bytes:
    with ClipSource(path) as source:
        return source.identity


def test_two_ways_to_write_a_part_are_one_clip_and_two_parts_are_two(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    hashes = [
        identity(tmp_path / f"a.mp4{end}") for end in ("", "#t=0", "#t=5,9", "#t=npt:0:05,9.000", "#t=5,9.5", "#t=5")
    ]
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3]
    assert len(set(hashes)) == 4


# ---- its pictures


def shown(path: Path) -> list[np.ndarray]:
    with ClipSource(path) as source, Video(source) as video:
        return list(video.frames(range(len(video.times_s)), 72, 48))


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many pictures each pass over a file has decoded."""
    counts: list[int] = []
    decode = media.decode_frames

    def counting(*given: object) -> Iterator[object]:
        counts.append(0)
        for frame in decode(*given):
            counts[-1] += 1
            yield frame

    monkeypatch.setattr(media, "decode_frames", counting)
    return counts


OPEN = "open-gop=1:keyint=12:min-keyint=12:bframes=3"
KINDS = {
    "closed.mp4": {"options": {"g": "12", "bf": "3"}},
    "open.mp4": {"options": {"x264-params": f"{OPEN}:b-pyramid=2"}},
    "open.mkv": {"options": {"x264-params": OPEN}},
    "open.ts": {"options": {"x264-params": OPEN}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"log-level=none:{OPEN}"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "negative.mp4": {"options": {"g": "12", "bf": "3"}, "movflags": "negative_cts_offsets"},
    "fragmented.mp4": {"options": {"g": "12", "bf": "3"}, "movflags": "frag_keyframe"},
    "variable.mp4": {"options": {"g": "12", "bf": "3"}, "times": True},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_jump_gives_the_pictures_that_decoding_from_the_start_gives(tmp_path, pictures, decoded, name):
    kind = dict(KINDS[name])
    if kind.pop("times", None):
        kind["times"] = list(np.cumsum(np.random.default_rng(1).integers(20, 90, COUNT)) / 1000)
    path = write(tmp_path / name, pictures, **kind)
    with ClipSource(path) as source, Video(source) as video:
        times = [time - video.times_s[0] for time in video.times_s]
    whole = shown(path)
    assert len(whole) == COUNT
    for first in (0, 12, 37, 58, 59, 60, 61, 90):
        decoded.clear()
        part = shown(Path(f"{path}#t={times[first]:.6f},{times[first + 4]:.6f}"))
        assert len(part) == 4
        assert all((one == other).all() for one, other in zip(part, whole[first:], strict=False)), first
        assert max(decoded) <= min(first, 2 * 12) + 4 + 12, (first, decoded)


@pytest.mark.parametrize("kind", ["intra-refresh=1:keyint=12", "damaged"])
def test_where_no_jump_ends_well_the_file_is_decoded_from_its_start(tmp_path, pictures, kind, decoded):
    path = write(tmp_path / "a.mp4", pictures, options={"x264-params": kind} if "=" in kind else {"g": "12"})
    if kind == "damaged":  # inside the part: no jump helps, and the reason is the whole file's
        data = bytearray(path.read_bytes())
        with av.open(str(path)) as file:
            packet = [packet for packet in file.demux(video=0) if packet.size][70]
            data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
        path.write_bytes(data)
        with pytest.raises(BadClip, match="damaged"):
            shown(path)
        with pytest.raises(BadClip, match="damaged"):
            shown(Path(f"{path}#t=2.8,3.2"))
        assert len(shown(Path(f"{path}#t=1,2"))) == FPS
    else:
        whole = shown(path)
        for first in (30, 61, 62, 90):
            part = shown(Path(f"{path}#t={first / FPS:.4f},{(first + 3) / FPS:.4f}"))
            assert np.array_equal(part, whole[first : first + 3])


def test_an_edit_list_moves_the_times_and_not_the_pictures(tmp_path, pictures):
    """The file begins in the middle of a group of pictures: its first shown picture is at 0 s."""
    source, path = write(tmp_path / "whole.mp4", pictures, options={"g": "12", "bf": "3"}), tmp_path / "edited.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        ticks = round(6 / FPS / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, stream
                new.mux(packet)
    whole = shown(path)
    assert len(whole) < COUNT
    for first in (0, 1, 33, 60, 80):
        part = shown(Path(f"{path}#t={first / FPS:.4f},{(first + 3) / FPS:.4f}"))
        assert np.array_equal(part, whole[first : first + 3])


def only(source: Path, path: Path, frames: range) -> Path:
    """A clip that holds only these packets of an intra-coded one."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        begin = packets[frames.start].pts
        for packet in packets[frames.start : frames.stop]:
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.pts - begin, stream
            new.mux(packet)
    return path


@pytest.mark.parametrize("cut", [Cut(), Cut(frames="even"), Cut(start=0.25, stride=2, frames="head")], ids=str)
@pytest.mark.parametrize(("codec", "pix_fmt"), [("ffv1", "yuv420p"), ("mjpeg", "yuvj420p")])
def test_a_part_is_bit_for_bit_the_clip_that_holds_only_it(tmp_path, pictures, cut, codec, pix_fmt):
    whole = write(tmp_path / "a.mkv", pictures, codec=codec, pix_fmt=pix_fmt, options={"g": "1"})
    alone = decode_clip(only(whole, tmp_path / "b.mkv", range(24, 66)), SIZE, cut, 8, "key")
    part = decode_clip(Path(f"{whole}#t=1,2.75"), SIZE, cut, 8, "key")
    assert isinstance(alone, Clip) and isinstance(part, Clip)
    assert np.array_equal(alone.frames_FHWC, part.frames_FHWC)
    assert (part.indices, part.crop_box, part.colour) == (alone.indices, alone.crop_box, alone.colour)
    assert part.effective_fps == pytest.approx(alone.effective_fps, rel=1e-9)


def test_a_part_outside_its_clip_says_how_long_the_clip_is(tmp_path, pictures):
    path = write(tmp_path / "a.mp4", pictures)
    for part, reason in {
        "#t=4,5": "#t=4,5 begins at or past the end of the clip, which is 4.000 s long",
        "#t=3,5": "#t=3,5 ends past the end of the clip, which is 4.000 s long; #t=3 is all from there",
        "#t=1.01,1.02": "#t=1.01,1.02 holds no picture: the clip has one every 0.0417 s",
        "#t=1,1.2": "too short: 5 frames, 9 are needed",
    }.items():
        found = decode_clip(Path(f"{path}{part}"), SIZE, Cut(), 8, "key")
        assert isinstance(found, ClipFault) and found.reason == reason
    assert len(shown(Path(f"{path}#t=3,4"))) == FPS  # its very end
    missing = decode_clip(tmp_path / "b.mp4#t=1,2", SIZE, Cut(), 8, "key")
    assert isinstance(missing, ClipFault) and missing.reason.startswith("the file is missing")


@pytest.mark.parametrize("limit", [64 << 20, 0], ids=["in memory", "too large for memory"])
def test_a_film_of_many_parts_is_gone_through_once_until_it_changes(tmp_path, pictures, monkeypatch, limit):
    done: list[str] = []
    read_times, sha256 = media.read_times, Source.sha256.fget
    monkeypatch.setattr(source_file, "IN_MEMORY", limit)
    monkeypatch.setattr(media, "read_times", lambda *given: (done.append("times"), read_times(*given))[1])
    monkeypatch.setattr(Source, "sha256", property(lambda source: (done.append("hash"), sha256(source))[1]))
    path = write(tmp_path / "film.mp4", pictures)
    for second in range(4):
        with ClipSource(Path(f"{path}#t={second},{second + 1}")) as source, Video(source) as video:
            assert video.facts().frames == FPS
    assert sorted(done) == ["hash", "times"]
    write(path, pictures[:48])
    with ClipSource(Path(f"{path}#t=3,4")) as source, pytest.raises(BadClip, match=r"which is 2.000 s long"):
        Video(source)


# ---- through the commands


def rows_of(out: Path) -> list[SampleRow]:
    return [row for record in sorted(out.rglob("*.parquet")) for row in read_record(record).rows]


def test_parts_are_samples_of_their_own(root, run_encode, draw_clip, lay_lists, tmp_path):
    """Encoded, reused, verified, and changed by themselves; a part twice is what a clip twice is."""
    draw_clip(root / "film.mp4", 9, frames=60)
    (root / "3.mp4").rename(root / "3.mp4#t=0.5")  # a name, no part
    lines = ["film.mp4#t=0,2.5", "film.mp4#t=0:03,5.5", "film.mp4#t=0,2.5", "3.mp4#t=0.5", "0.mp4#t=0"]
    lay_lists(root, ["a", "a", "a", "b", "c"], lines)
    report = run_encode()
    assert (report.encoded, report.rejected) == (5, 0)
    rows = {row.source_line: row for row in rows_of(tmp_path / "out")}
    assert [rows[line].source for line in range(1, 6)] == lines
    assert rows[3].key == f"{rows[1].key}_1"
    assert len({rows[line].source_sha256 for line in (1, 2, 4, 5)}) == 4
    assert rows[5].source_sha256 == identity(root / "0.mp4")
    again = verify(tmp_path / "out", reencode=2).differences
    assert [(one.source, one.largest) for one in again] == [(lines[0], 0), (lines[2], 0)]
    for line in (1, 2):
        row = rows[line]
        view = view_source(root / row.source, row.source_sha256, SIZE, Cut(), 8, row.key, 9)
        clip = decode_clip(root / row.source, SIZE, Cut(), 8, row.key)
        assert isinstance(view, SourceView) and isinstance(clip, Clip)
        assert np.array_equal(view.frames_FHWC, clip.frames_FHWC)
    lay_lists(root, ["a", "a", "a", "b", "c"], ["film.mp4#t=npt:0,0:02.5", "film.mp4#t=3.125,5.5", *lines[2:]])
    report = run_encode()
    assert (report.encoded, report.reused, report.dropped) == (1, 4, 1)


def test_a_bad_part_is_a_fault_of_its_line(root, lay_lists, tmp_path):
    lay_lists(root, list("abcde"), ["0.mp4#t=1", "1.mp4#t=2,1", "2.mp4#t=nan", "3.mp4#t=77,78", "gone.mp4#t=1,2"])
    settings = ValidateSettings(data_root=root, resolution=["9x64x96"], model="tiny", out=tmp_path / "out", workers=1)
    verdict = validate(settings)
    assert (verdict.usable, [(fault.place, fault.entry) for fault in verdict.faults]) == (
        1, [(f"videos.txt:{line}", entry) for line, entry in
            [(2, "1.mp4#t=2,1"), (3, "2.mp4#t=nan"), (4, "3.mp4#t=77,78"), (5, "gone.mp4#t=1,2")]],
    )  # fmt: skip
    for fault, reason in zip(
        verdict.faults,
        ["it is #t=1,2", "type #t=12.5,18", "the clip, which is 2.5", "the file is missing"],
        strict=True,
    ):
        assert reason in fault.what


def test_init_takes_the_lines_of_parts_for_their_clips(tmp_path):
    for name in ("film.mp4", "a#t=1.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "film.txt").write_text("a film")
    (tmp_path / "videos.txt").write_text("film.mp4#t=1,2\nfilm.mp4#t=2,3\na#t=1.mp4\n")
    told = init(tmp_path)
    assert (tmp_path / "prompts.txt").read_text() == "a film\na film\n\n"
    assert told.unlisted == ["b.mp4"]
