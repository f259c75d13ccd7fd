"""`cogprep split`: cuts where scenes change, to the picture, and lists that name the parts between them."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path

import av
import numpy as np
import pytest

from cogcommon.errors import DataRootError, SettingError
from cogcommon.media.video import write_mp4
from cogprep.commands.split import split
from cogprep.dataset.lists import read_lists
from cogprep.settings.lists import SplitSettings
from cogprep.source.part import Part
from cogprep.source.source_file import ClipSource
from cogprep.split.cuts import Cuts, find_cuts
from cogprep.split.film import Film, Stretch
from cogprep.split.parts import BLACK, DAMAGED, DISSOLVES, SHORT, STILL, Lengths, choose
from cogprep.video.media import Video

FPS = 25


def shot(seed: int, frames: int, height: int = 27, width: int = 48, speed: float = 1.0) -> np.ndarray:
    """A picture of waves of many sizes that moves steadily; every seed is another one. Floats."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / width
    picture = np.tile(chance.uniform(70, 190, 3), (frames, height, width, 1))
    shift = speed * np.arange(frames)[:, None, None] / FPS * 0.2
    for _ in range(6):
        (down, across), phase = chance.normal(0, 25, 2), chance.uniform(0, 6.3)
        picture += np.sin(across * (x + shift) + down * y + phase)[..., None] * chance.uniform(5, 20, 3)
    return picture


def film_of(*shots: np.ndarray) -> np.ndarray:
    return np.clip(np.concatenate(shots), 0, 255).astype(np.uint8)


def dissolve(before: np.ndarray, after: np.ndarray, frames: int) -> list[np.ndarray]:
    share = np.arange(1, frames + 1)[:, None, None, None] / (frames + 1)
    return [before[:-frames], before[-frames:] * (1 - share) + after[:frames] * share, after[frames:]]


def places(flags: np.ndarray) -> list[int]:
    return np.flatnonzero(flags).tolist()


@pytest.mark.parametrize("speed", [0, 1, 2])
def test_hard_cuts_are_found_to_the_picture_and_no_others(speed):
    chance = np.random.default_rng(0)
    lengths = chance.integers(10, 80, 60)
    found = find_cuts(film_of(*(shot(seed, count, speed=speed) for seed, count in enumerate(lengths))), FPS)
    assert places(found.begins) == np.cumsum(lengths)[:-1].tolist()
    assert not found.between.any() and not found.blank.any()


def test_cuts_of_dark_scenes_are_found_and_what_moves_there_is_not_still():
    lengths = [40, 60, 30, 50]
    found = find_cuts(film_of(*(shot(seed, count) * 0.2 for seed, count in enumerate(lengths))), FPS)
    assert places(found.begins) == [40, 100, 130]
    assert not found.still.any() and not found.blank.any()


def test_dissolves_are_found_and_their_pictures_left_out():
    lengths = [6, 10, 12, 15, 20, 25, 30, 40] * 3
    shots = [shot(seed, 120, speed=0.3) for seed in range(len(lengths) + 1)]
    pieces, middles = [shots[0]], []
    for after, length in zip(shots[1:], lengths, strict=True):
        pieces[-1:] = dissolve(pieces[-1], after, length)
        middles.append(sum(map(len, pieces[:-2])) + length // 2)
    found = find_cuts(film_of(*pieces), FPS)
    hit = [place for place in middles if found.between[place]]
    assert len(hit) >= 22, sorted(set(middles) - set(hit))
    assert found.begins.sum() == len(hit)


def test_a_cut_through_blended_pictures_leaves_them_out():
    for light in (1, 0.25):
        found = find_cuts(film_of(*(light * shots for shots in dissolve(shot(1, 60), shot(2, 60), 2))), FPS)
        assert (places(found.between), places(found.begins)[-1]) == ([58, 59], 60)


@pytest.mark.parametrize("end", [0, 255])
def test_fades_go_with_the_black_or_white_between_them(end):
    down = np.linspace(0, 1, 20)[:, None, None, None]
    one, other = shot(1, 100), shot(2, 100)
    fade = one[-20:] * (1 - down) + end * down, np.full((5, *one.shape[1:]), end), other[:20] * down + end * (1 - down)
    found = find_cuts(film_of(one[:-20], *fade, other[20:]), FPS)
    blank = places(found.blank)
    assert blank == list(range(blank[0], blank[-1] + 1))
    assert abs(blank[0] - 80) <= 2 and abs(blank[-1] - 124) <= 2


def test_what_is_no_cut_is_none():
    """A flash, a pan, a film of eight pictures a second in 25, a slow change of light, grain."""
    flash = shot(3, 100)
    flash[50:52] += 150
    light = shot(4, 100) * np.linspace(0.5, 1.3, 100)[:, None, None, None]
    grain = shot(6, 100) + np.random.default_rng(0).normal(0, 4, (100, 27, 48, 3))
    for frames in (flash, light, grain, shot(7, 100, speed=8), shot(5, 40, speed=4).repeat(3, axis=0)):
        found = find_cuts(film_of(frames), FPS)
        assert not found.begins.any() and not found.between.any()


def test_a_picture_that_stays_is_still_and_a_mouth_that_moves_is_not():
    frozen = shot(1, 1).repeat(100, axis=0)
    assert find_cuts(film_of(frozen + np.random.default_rng(0).normal(0, 0.7, frozen.shape)), FPS).still.all()
    frozen[:, 10:12, 20:22] += np.random.default_rng(1).normal(0, 20, (100, 1, 1, 1))
    assert find_cuts(film_of(frozen), FPS).still.mean() < 0.5


# ---- which parts


def seen(count: int, begins: tuple[int, ...] = (), **flags: tuple[range, ...]) -> tuple[Film, list[Stretch]]:
    """A film of ``count`` pictures and what was seen of it."""
    found = Cuts(*(np.zeros(count, bool) for _ in range(4)))
    found.begins[list(begins)] = True
    for name, ranges in flags.items():
        for one in ranges:
            getattr(found, name)[one.start : one.stop] = True
    return Film(tuple(place / FPS for place in range(count)), 1 / FPS, count / FPS, True), [Stretch(0, found, {})]


def test_parts_are_no_longer_and_no_shorter_than_asked_for():
    film, stretches = seen(25 * 60, (25, 100, 225, 750))
    chosen = choose(film, stretches, Lengths(2, 10))
    assert [str(part) for part in chosen.parts] == [
        "#t=1,4", "#t=4,9", "#t=9,16", "#t=16,23", "#t=23,30", "#t=30,40", "#t=40,50", "#t=50,60",
    ]  # fmt: skip
    assert chosen.left_out[SHORT].pieces == 1 and chosen.shots == 5
    assert [(part.begin_s, part.end_s) for part in choose(film, stretches, Lengths(9, 10)).parts] == [
        (9, 19), (20.5 - 1.5, 29), (30, 40), (40, 50), (50, 60),
    ]  # fmt: skip


def test_every_so_many_seconds_cuts_are_left_alone():
    film, stretches = seen(25 * 20, (30, 100), blank=(range(150, 160),))
    chosen = choose(film, stretches, Lengths(2, 10, 3))
    assert [str(part) for part in chosen.parts] == ["#t=0,3", "#t=3,6", "#t=6.4,9.4", "#t=9.4,12.4", "#t=12.4,15.4",
                                                    "#t=15.4,18.4"]  # fmt: skip


def test_what_is_left_out_is_counted():
    film, stretches = seen(25 * 40, (250,), blank=(range(50),), between=(range(490, 500),), still=(range(250, 490),))
    chosen = choose(film, [*stretches, range(750, 1000)], Lengths(2, 10))
    assert {why: (left.pieces, round(left.seconds, 2)) for why, left in chosen.left_out.items()} == {
        BLACK: (1, 2), DISSOLVES: (1, 0.4), STILL: (1, 9.6), DAMAGED: (1, 10),
    }  # fmt: skip
    assert [str(part) for part in chosen.parts] == ["#t=2,10", "#t=20,30"]


@pytest.mark.parametrize("rate", [24000 / 1001, 25, 30000 / 1001, 60, 80])
def test_a_part_names_the_very_pictures_that_were_meant(rate):
    count = 4000
    times = [place / rate for place in range(count)]
    film, stretches = seen(count, tuple(range(101, count, 101)))
    film = Film(tuple(times), 1 / rate, count / rate, True)
    for pictures, part in zip(*(getattr(choose(film, stretches, Lengths(1, 10)), name) for name in ("ranges", "parts")),
                              strict=True):  # fmt: skip
        assert Part(*(float(time) for time in str(part)[3:].split(","))).of(times, 1 / rate) == pictures


# ---- the command


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """Seven shots, of which one is black, one does not move, one is short and one is long."""
    black = np.zeros((30, 27, 48, 3))
    still = shot(9, 1).repeat(60, axis=0)
    frames = film_of(
        *(shot(count, count) for count in (60, 70)), black, shot(80, 80), still, shot(20, 20), shot(300, 300)
    )
    path = tmp_path_factory.mktemp("film") / "a film.mp4"
    write_mp4(path, frames[:, :26].repeat(4, axis=1).repeat(4, axis=2), FPS, preset="veryfast")
    return path


def test_a_film_becomes_lists_that_name_its_scenes(film, tmp_path):
    told = split(SplitSettings(film=film, out=tmp_path / "ds", workers=1))
    lines = (tmp_path / "ds" / "videos.txt").read_text().splitlines()
    times = ["0,2.4", "2.4,5.2", "6.4,9.6", "12.8,18.8", "18.8,24.8"]
    assert lines == [f"{film}#t={time}" for time in times]
    assert (tmp_path / "ds" / "prompts.txt").read_text() == "\n" * 5
    assert told.written == ["videos.txt", "prompts.txt", "cuts/a film-1.png"]
    assert {why: left.pieces for why, left in told.films[0].left_out.items()} == {BLACK: 1, STILL: 1, SHORT: 1}
    (tmp_path / "ds" / "prompts.txt").write_text("waves\n" * 5)
    samples = read_lists(tmp_path / "ds", task="t2v").trusted().samples
    for sample, frames in zip(samples, [60, 70, 80, 150, 150], strict=True):
        with ClipSource(tmp_path / "ds" / sample.source) as source, Video(source) as video:
            assert len(video.times_s) == frames
    with pytest.raises(DataRootError, match=r"a videos\.txt and a prompts\.txt already, and no list is overwritten"):
        split(SplitSettings(film=film, out=tmp_path / "ds"))
    assert (tmp_path / "ds" / "prompts.txt").read_text() == "waves\n" * 5


def test_a_folder_of_films_named_from_where_they_lie(film, tmp_path):
    """In stretches, one of them damaged; a film that is none; the data root around them."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.mp4").write_bytes(film.read_bytes())
    (tmp_path / "b" / "2.mp4").write_bytes(b"no film")
    told = split(SplitSettings(film=tmp_path, out=tmp_path, every=4, workers=1))
    assert (tmp_path / "videos.txt").read_text().splitlines()[0] == "b/1.mp4#t=0,4"
    assert "not a video" in told.films[1].faults[0]


def test_where_no_part_is_left_it_says_what_to_type(tmp_path):
    (tmp_path / "films").mkdir()
    with pytest.raises(DataRootError, match=r"no videos in this folder[\s\S]* files that end in .*\.mp4"):
        split(SplitSettings(film=tmp_path / "films", out=tmp_path / "ds"))
    write_mp4(tmp_path / "films" / "a.mp4", film_of(shot(1, 1, 28)), FPS)
    with pytest.raises(DataRootError, match=r"a.mp4: 1 shorter than 2 s \(0.0 s\)\s+do: +--shortest 1 takes") as one:
        split(SplitSettings(film=tmp_path / "films", out=tmp_path / "ds", workers=1))
    assert "--every" not in str(one.value)  # it is too short for that, too


def _film_of_packets(path: Path, minutes: int) -> list[int]:
    """A film of 1080p out of a few scenes that are encoded once, in a drawn order; where the scenes begin."""
    chance = np.random.default_rng(0)
    scenes = []
    for seed in range(12):
        one = path.with_name(f"{seed}.mp4")
        frames = film_of(shot(seed, int(chance.integers(40, 260)), 135, 240))
        write_mp4(one, frames.repeat(8, axis=1).repeat(8, axis=2), FPS, preset="veryfast", crf=23)
        scenes.append(one)
    begins, at = [], 0
    before = -1
    with av.open(str(path), "w") as out:
        with av.open(str(scenes[0])) as first:
            stream = out.add_stream_from_template(first.streams.video[0], opaque=True)
        while at < minutes * 60 * FPS:
            before = int(chance.choice([place for place in range(12) if place != before]))
            begins.append(at)
            with av.open(str(scenes[before])) as scene:
                packets = [packet for packet in scene.demux(video=0) if packet.size]
                base, first_dts = packets[0].time_base, packets[0].pts
                for packet in packets:
                    shift = round(at / FPS / base) - first_dts
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    out.mux(packet)
                at += len(packets)
    return begins


@pytest.mark.full
def test_a_film_of_90_minutes_in_full_hd(tmp_path, capsys):
    """All cuts to the picture; the time and the memory that it takes are printed."""
    path = tmp_path / "film.mp4"
    begins = _film_of_packets(path, 90)
    started = time.monotonic()
    told = split(SplitSettings(film=path, out=tmp_path / "ds", shortest=0.1, longest=1000))
    took_s = time.monotonic() - started
    kib = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    with capsys.disabled():
        print(f"\n{len(begins)} scenes, {path.stat().st_size / 1e6:.0f} MB: {took_s:.0f} s; MiB at most: "
              f"this process {kib[0] // 1024}, a decode process {kib[1] // 1024}")  # fmt: skip
    lines = (tmp_path / "ds" / "videos.txt").read_text().splitlines()
    found = [round(float(line.rpartition("#t=")[2].split(",")[0]) * FPS) for line in lines]
    assert found == begins
    assert told.films[0].left_out == {}


def test_settings_that_leave_nothing_are_refused():
    for wrong in ({"every": 1}, {"longest": 1}, {"every": 5, "scenes": True}, {"shortest": math.nan}, {"out": None}):
        with pytest.raises(SettingError):
            SplitSettings(**{"film": Path("a.mp4"), "out": Path("ds"), **wrong})
