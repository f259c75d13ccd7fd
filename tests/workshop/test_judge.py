import av
import numpy as np
import pytest

from cogcommon.media.video import write_mp4
from workshop.judge import judge
from workshop.scenes import BACKGROUNDS, COLOURS, MOTIONS, NEW_MOTIONS, Scene, draw, scenes

TIMES = [index / 16 for index in range(17)]


def clip(scene, times=TIMES):
    return draw(scene, times, 64, 96)


def blurred(video, passes=3):
    soft = video.astype(float)
    for _ in range(passes):
        for axis in (1, 2):
            soft = (np.roll(soft, 1, axis) + soft + np.roll(soft, -1, axis)) / 3
    return soft


def through_h264(video, folder):
    write_mp4(folder / "clip.mp4", video, 8, crf=30)
    with av.open(folder / "clip.mp4") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_drawn_clips_are_named_exactly():
    for scene in scenes(40, seed=3):
        verdict = judge(clip(scene))
        assert verdict.scene == scene
        assert verdict.error < 0.6  # the rounding to whole numbers, and sums in fp32


def test_the_new_shape_is_named_and_not_taken_for_a_known_one():
    for motion, place in zip(MOTIONS, [*BACKGROUNDS] * 2, strict=False):
        scene = Scene("star", "yellow", motion, place)
        assert judge(clip(scene)).scene == scene


@pytest.mark.parametrize("end", [1.0, 0.5])  # the forms at 16 fps see half of a motion
def test_the_new_motions_are_named_and_not_taken_for_known_ones(end):
    times = [time * end for time in TIMES]
    for scene in scenes(10, seed=2, motions=NEW_MOTIONS):
        assert judge(clip(scene, times), times).scene == scene


def test_blur_noise_and_h264_do_not_change_the_names(tmp_path):
    rng = np.random.default_rng(0)
    for scene in scenes(12, seed=4):
        noisy = np.clip(blurred(clip(scene)) + rng.normal(0, 40, (17, 64, 96, 3)), 0, 255).astype(np.uint8)
        assert judge(noisy).scene == scene
        assert judge(through_h264(clip(scene), tmp_path)).scene == scene


def test_a_clip_a_few_pixels_off_its_path_is_still_named():
    for scene in scenes(12, seed=6):
        assert judge(np.roll(clip(scene), (3, -3), (1, 2))).scene == scene


def test_half_of_a_motion_is_named_when_told_so():
    half = [time / 2 for time in TIMES]
    scene = Scene("ring", "purple", "circles around the centre", "warm sand")
    assert judge(clip(scene, half), half).scene == scene


@pytest.mark.parametrize("kind", ["noise", "background", "wrong colour", "backwards"])
def test_what_is_not_the_scene_is_not_named_so(kind):
    scene = Scene("cross", "red", "moves from left to right", "warm sand")
    right = clip(scene)
    if kind == "noise":
        assert judge(np.random.default_rng(1).integers(0, 256, right.shape).astype(np.uint8)).error > 60
    elif kind == "background":
        assert judge(np.broadcast_to(right[:, :1, :1], right.shape)).error > 10
    elif kind == "wrong colour":
        green = judge(right[..., [1, 0, 2]]).scene.colour
        assert green in COLOURS and green != "red"
    else:
        assert judge(right[::-1]).scene.motion == "moves from right to left"
