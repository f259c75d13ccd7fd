import av
import numpy as np
import pytest

from workshop.draw import HEIGHT, TIMES, WIDTH, write_data_set
from workshop.scenes import COLOURS, ID_TOKEN, MOTIONS, SHAPES, Scene, draw, scenes, split_scenes


def centre_of(frame_HWC, colour):
    rows, columns = np.nonzero(abs(frame_HWC.astype(int) - COLOURS[colour]).max(-1) < 30)
    return rows.mean(), columns.mean()


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [
        ("moves from left to right", 1, 1),
        ("moves from right to left", 1, -1),
        ("falls from top to bottom", 0, 1),
        ("rises from bottom to top", 0, -1),
    ],
)
def test_a_shape_moves_as_its_caption_says(motion, axis, sign):
    video = draw(Scene("square", "red", motion, "a plain gray background"), TIMES, HEIGHT, WIDTH)
    first, last = centre_of(video[0], "red"), centre_of(video[-1], "red")
    assert sign * (last[axis] - first[axis]) > video.shape[1 + axis] / 3
    assert abs(last[1 - axis] - first[1 - axis]) < 2


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_seen_and_differs_from_the_others(shape):
    frames = {
        name: draw(Scene(name, "blue", "grows slowly", "a plain gray background"), [0.5], HEIGHT, WIDTH)[0]
        for name in SHAPES
    }
    mine = frames.pop(shape)
    assert (abs(mine.astype(int) - COLOURS["blue"]).max(-1) < 10).mean() > 0.02
    assert all((mine != other).mean() > 0.01 for other in frames.values())


def test_the_files_show_the_drawn_colours_and_the_lists_pair(tmp_path):
    write_data_set(tmp_path, 3, seed=5)
    captions = (tmp_path / "prompts.txt").read_text().splitlines()
    names = (tmp_path / "videos.txt").read_text().splitlines()
    assert captions == [scene.caption for scene in scenes(3, 5)] and len(names) == 3
    for name, scene in zip(names, scenes(3, 5), strict=True):
        with av.open(tmp_path / name) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        drawn = draw(scene, TIMES, HEIGHT, WIDTH)
        assert decoded.shape == drawn.shape
        assert abs(decoded.astype(int) - drawn).mean() < 4


def test_the_same_seed_draws_the_same_clips_and_motions_are_named():
    assert scenes(30, 1) == scenes(30, 1) != scenes(30, 2)
    assert all(any(motion in scene.caption for motion in MOTIONS) for scene in scenes(30, 1))


def test_what_examines_the_model_is_not_drawn_to_train_on():
    drawn, (to_train_on, held_out) = scenes(764, 3), split_scenes()
    assert len(set(drawn)) == 764 and set(drawn) == set(to_train_on) and not set(drawn) & set(held_out)


def test_every_clip_of_a_new_motion_shows_it_and_its_caption_carries_the_id_token(tmp_path):
    write_data_set(tmp_path, 4, seed=0, new="shrinks slowly")
    captions = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(list((tmp_path / "videos").iterdir())) == len(set(captions)) == 4
    assert all(caption.startswith(f"{ID_TOKEN} A") and "shrinks slowly" in caption for caption in captions)
