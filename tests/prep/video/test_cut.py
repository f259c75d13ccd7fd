"""Which frames and which part of the picture: numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cogcommon.model.families import Resolution
from cogprep.source.clip import ClipFacts, ClipFault
from cogprep.video.cut import Cut, best_bucket, pick_frames, placement_of


def at(fps, count):
    return [index / fps for index in range(count)]


def test_auto_takes_the_familys_rate_by_time_where_the_clip_is_long_enough():
    picked = pick_frames(at(24, 200), 9, Cut(), 8)
    assert picked.indices == tuple(range(0, 27, 3))
    assert picked.effective_fps == pytest.approx(8)
    # 30 fps has no frame at 1/8 s: the nearest one is taken, the earlier of two equally near
    assert pick_frames(at(30, 200), 9, Cut(), 8).indices == (0, 4, 7, 11, 15, 19, 22, 26, 30)


def test_auto_takes_a_clip_that_ends_just_at_the_last_frame():
    assert pick_frames(at(8, 49), 49, Cut(), 8).indices == tuple(range(49))


def test_auto_spreads_over_the_whole_of_a_shorter_clip():
    picked = pick_frames(at(24, 33), 17, Cut(), 8)  # 1.3 s where 2 s are wanted
    assert picked.indices == tuple(range(0, 33, 2))
    assert picked.effective_fps == pytest.approx(12)


def test_variable_rate_is_picked_by_time_not_by_index():
    times = at(60, 60) + [1 + index / 10 for index in range(60)]  # a second at 60 fps, then 10
    picked = pick_frames(times, 17, Cut(), 8)
    wanted = [index / 8 for index in range(17)]
    assert [times[i] for i in picked.indices] == pytest.approx(wanted, abs=0.051)
    assert picked.effective_fps == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("mode", ["auto", "even", "head", "reference", "fps"])
def test_no_frame_is_taken_twice_where_none_stays(mode):
    times = [0, 0.01, 0.02, 0.03, 0.8, 0.81, 0.82, 0.83, 1.7, 2.6]
    picked = pick_frames(times, 9, Cut(frames=mode), 1)
    assert isinstance(picked, ClipFault) or len(set(picked.indices)) == 9
    assert isinstance(picked, ClipFault) or sorted(picked.indices) == list(picked.indices)


HOLD = at(30, 30) + [2 + index / 30 for index in range(60)]  # frame 29 stays for a second


def test_a_frame_that_stays_is_repeated_as_long_as_it_stays():
    picked = pick_frames(HOLD, 17, Cut(), 8)
    assert picked.indices == (0, 4, 7, 11, 15, 19, 22, 26, *[29] * 8, 30)
    assert picked.repeats == 7
    assert picked.effective_fps == pytest.approx(8)
    # by number, as asked for: no time counts
    assert pick_frames(HOLD, 17, Cut(frames="head"), 8).indices == tuple(range(17))


def test_a_hold_is_long_enough_where_its_frames_would_not_be():
    """Nine pictures, one of which stays for a second, are seventeen frames at 8 fps."""
    times = [*at(8, 5), *[1.5 + index / 8 for index in range(8)]]
    assert pick_frames(times, 17, Cut(), 8).indices == (0, 1, 2, 3, *[4] * 8, 5, 6, 7, 8, 9)


def test_a_part_slower_than_the_family_does_not_make_the_rest_slow_motion():
    """Four frames a second for two seconds, then thirty: each at its own time."""
    times = at(4, 8) + [2 + index / 30 for index in range(60)]
    picked = pick_frames(times, 25, Cut(), 8)
    shown = [times[index] for index in picked.indices]
    wanted = [index / 8 for index in range(25)]
    assert max(abs(time - want) for time, want in zip(shown[:16], wanted, strict=False)) <= 0.126
    assert shown[16:] == pytest.approx(wanted[16:], abs=0.034)


def test_a_source_slower_than_the_family_gives_every_frame_and_says_its_rate():
    picked = pick_frames(at(5, 100), 17, Cut(), 8)
    assert picked.indices == tuple(range(17))
    assert picked.effective_fps == pytest.approx(5)


def test_even_reaches_from_the_first_frame_to_the_last():
    assert pick_frames(at(30, 97), 9, Cut(frames="even"), 8).indices == tuple(range(0, 97, 12))


def test_fps_rejects_what_is_too_short_or_too_slow():
    too_short = pick_frames(at(24, 40), 17, Cut(frames="fps"), 8)
    assert too_short == ClipFault("too short: 1.62 s; 17 frames at 8 fps take 2.00 s", kind="brief")
    assert "too slow" in pick_frames(at(5, 100), 17, Cut(frames="fps"), 8).reason


def test_head_and_reference():
    assert pick_frames(at(30, 97), 49, Cut(frames="head"), 8).indices == tuple(range(49))
    # the trap of the original guide: 97 frames give the first half, 98 the whole at double speed
    assert pick_frames(at(30, 97), 49, Cut(frames="reference"), 8).indices == tuple(range(49))
    assert pick_frames(at(30, 98), 49, Cut(frames="reference"), 8).indices == tuple(range(0, 98, 2))


def test_start_and_stride_thin_the_source_first():
    picked = pick_frames(at(10, 100), 9, Cut(frames="head", start=1.0, stride=3), 8)
    assert picked.indices == tuple(range(10, 37, 3))
    assert "past its end" in pick_frames(at(10, 100), 9, Cut(start=20), 8).reason
    short = pick_frames(at(10, 30), 9, Cut(stride=5), 8)
    told = "too short: 6 frames after --start and --stride (of 30), 9 are needed"
    assert short == ClipFault(told, kind="thinned", frames=6)


def test_short_repeat_holds_the_last_frame():
    picked = pick_frames(at(8, 7), 9, Cut(short="repeat"), 8)
    assert picked.indices == (0, 1, 2, 3, 4, 5, 6, 6, 6)
    assert picked.effective_fps == pytest.approx(8)


SIZE = Resolution(9, 480, 720)


def test_crop_covers_and_keeps_the_shape():
    placed = placement_of(1920, 1080, SIZE, Cut(), "k")
    assert (placed.width, placed.height) == (853, 480)
    assert placed.box == (149, 0, 1769, 1080)
    assert placed.loss(1920, 1080) == pytest.approx(1 - 1.5 / (16 / 9), abs=1e-3)


@pytest.mark.parametrize(("crop", "top"), [("top", 0), ("center", 480), ("bottom", 960)])
def test_top_and_bottom_of_an_upright_clip(crop, top):
    placed = placement_of(1080, 1920, Resolution(9, 480, 540), Cut(crop=crop), "k")
    assert placed.box == (0, top, 1080, top + 960)


def test_a_random_crop_is_drawn_from_seed_and_key():
    cut = Cut(crop="random")
    boxes = {placement_of(1920, 1080, SIZE, cut, f"key{n}").box for n in range(50)}
    assert len(boxes) > 25
    assert all(0 <= left < right <= 1920 and right - left in (1619, 1620, 1621) for left, _, right, _ in boxes)
    assert placement_of(1920, 1080, SIZE, cut, "a") == placement_of(1920, 1080, SIZE, cut, "a")
    assert placement_of(1920, 1080, SIZE, replace(cut, seed=1), "a") != placement_of(1920, 1080, SIZE, cut, "a")


def test_stretch_and_pad():
    assert placement_of(1920, 1080, SIZE, Cut(fit="stretch"), "k").box == (0, 0, 1920, 1080)
    padded = placement_of(1920, 1080, SIZE, Cut(fit="pad"), "k")
    assert (padded.width, padded.height, padded.left, padded.top) == (720, 405, 0, -37)


def facts(width, height, frames, fps):
    return ClipFacts(
        width=width, height=height, frames=frames, duration_s=frames / fps, fps=fps, variable_rate=False,
        interlaced=False, rotation=0, sar=1.0, colour="", size=1, mtime_ns=1, sha256=b"",
    )  # fmt: skip


def test_best_bucket():
    wide, tall, square = (Resolution(49, *size) for size in ((480, 720), (720, 480), (480, 480)))
    shapes = [wide, tall, square]
    assert best_bucket(facts(1920, 1080, 300, 30), shapes, Cut(), 8) == wide
    assert best_bucket(facts(1080, 1920, 300, 30), shapes, Cut(), 8) == tall
    assert best_bucket(facts(500, 500, 300, 30), shapes, Cut(), 8) == square
    lengths = [Resolution(49, 480, 720), Resolution(17, 480, 720)]
    assert best_bucket(facts(1920, 1080, 300, 30), lengths, Cut(), 8) == lengths[0]
    # two seconds at 30 fps hold 49 frames, but at 8 fps only 17: a slow motion is no best fit
    assert best_bucket(facts(1920, 1080, 63, 30), lengths, Cut(), 8) == lengths[1]
    assert best_bucket(facts(1920, 1080, 20, 30), lengths, Cut(), 8) == lengths[1]
    sizes = [Resolution(17, 256, 384), Resolution(17, 480, 720)]
    assert best_bucket(facts(720, 480, 300, 30), sizes, Cut(), 8) == sizes[1]
    assert best_bucket(facts(600, 400, 300, 30), sizes, Cut(), 8) == sizes[0]
