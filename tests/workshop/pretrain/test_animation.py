import numpy as np
from PIL import Image, ImageSequence

from workshop.judge import judge
from workshop.pretrain.animation import CELL, Row, animate
from workshop.scenes import Scene, draw

SCENES = [
    Scene("ring", "red", "grows slowly", "warm sand"),
    Scene("cross", "blue", "shrinks slowly", "a plain gray background"),
]


def test_the_animation_plays_each_clip_in_its_row_and_column(tmp_path):
    times = np.linspace(0, 1, 5)
    rows = [
        Row(label, "", np.stack([draw(scene, times, 64, 96) for scene in order]))
        for label, order in (("asked for", SCENES), ("base model", SCENES[::-1]))
    ]
    file = tmp_path / "concept.webp"
    animate("A new motion", [scene.caption for scene in SCENES], rows, fps=8).save(file)
    with Image.open(file) as image:
        assert image.info["loop"] == 0  # for ever
        frames = [(np.asarray(frame.convert("RGB")), image.info["duration"]) for frame in ImageSequence.Iterator(image)]
    assert [duration for _, duration in frames] == [125, 125, 125, 125, 900]
    film = np.stack([frame for frame, _ in frames])
    lefts, tops = (32, 32 + CELL + 12), (32 + 44 + 54 + 34, 32 + 44 + 54 + 34 + 128 + 12 + 34)
    for top, order in zip(tops, (SCENES, SCENES[::-1]), strict=True):
        for left, scene in zip(lefts, order, strict=True):
            cell = film[:, top : top + 128, left : left + CELL]
            assert judge(cell, times).scene == scene
