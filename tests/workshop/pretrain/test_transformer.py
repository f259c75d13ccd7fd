import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.model.objective import Objective
from workshop.pretrain.exam import examine
from workshop.pretrain.transformer import batch_at, train_transformer
from workshop.pretrain.world import OFF, encode_world, path_off, times
from workshop.scenes import HELD_OUT, MOTIONS, Scene, draw, every_scene, split_scenes


def test_held_out_scenes_are_not_trained_on():
    train, held_out = split_scenes()
    assert len(held_out) == HELD_OUT and len(train) == 864 - HELD_OUT
    assert not {scene.caption for scene in train} & {scene.caption for scene in held_out}


def test_elsewhere_every_motion_begins_where_any_may():
    """So that an I2V form cannot know the motion from its first frame."""
    rng = np.random.default_rng(0)
    begins = {name: np.array(at(0)[:2]) * (48, 32) for name, at in MOTIONS.items()}  # pixels from the middle
    for name, own in begins.items():
        scene = Scene("ring", "red", name, "warm sand")
        places = np.array([own + path_off(scene, rng, elsewhere=True) for _ in range(60)])
        for place in begins.values():
            assert (abs(places - place).max(1) <= OFF).any()
        assert all(abs(np.array(path_off(scene, rng, elsewhere=False))).max() <= OFF for _ in range(60))


@pytest.mark.parametrize("form", ["random-tiny", "random-tiny-1.5-i2v"])
def test_a_batch_feeds_the_projects_own_loss(form):
    checkpoint = open_checkpoint(form)
    world = encode_world(checkpoint, every_scene(0)[:3], torch.device("cpu"), variants=4, strange=2)
    objective = Objective.of(checkpoint)
    batch = batch_at(world, objective, 7, size=40, seed=1)
    again = batch_at(world, objective, 7, size=40, seed=1)
    assert torch.equal(batch.noise_BFCHW, again.noise_BFCHW) and torch.equal(batch.timestep_B, again.timestep_B)
    dropped = (batch.text_BLD == world.empty_text_LD).flatten(1).all(1)
    assert 0 < dropped.sum() < 20
    own = (batch.text_BLD[:, None] == world.text_STLD[:, 0]).flatten(2).all(2).any(1)
    assert 5 < (~own & ~dropped).sum() < 20  # strange captions
    short = batch_at(world, objective, 7, size=40, seed=1, text_tokens=40)
    assert torch.equal(short.text_BLD, batch.text_BLD[:, :40])
    assert sorted(batch.timestep_B // 25) == list(range(40))  # one from each fortieth
    tensors = {name: value[:2] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    few = dataclasses.replace(
        batch, **tensors, conditions={name: value[:2] for name, value in batch.conditions.items()}
    )
    with torch.no_grad():
        losses_B = objective.losses(checkpoint.load_transformer(torch.float32), few, torch.float32)
    assert losses_B.shape == (2,) and torch.isfinite(losses_B).all()


def test_a_form_learns_and_its_weights_load(tmp_path):
    checkpoint = open_checkpoint("random-tiny")
    train_transformer(
        checkpoint,
        every_scene(0)[:2],
        tmp_path,
        steps=150,
        batch_size=8,
        lr=2e-3,
        seed=0,
        device=torch.device("cpu"),
        variants=4,
    )
    first, *_, last = (json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert last < 0.95 * first  # random latents are mostly noise to it; it learns the rest
    transformer = checkpoint.load_transformer(torch.float32)
    transformer.load_state_dict(safetensors.torch.load_file(tmp_path / "tiny.safetensors"))


@pytest.mark.parametrize(("form", "right"), [("random-tiny", True), ("random-tiny", False), ("random-tiny-i2v", True)])
def test_the_exam_marks_a_generator_by_what_it_shows(form, right):
    checkpoint = open_checkpoint(form)
    scenes = every_scene(5)[:6]
    by_caption = {scene.caption: scene for scene in scenes}

    def pipeline(prompt, height, width, **_):
        """Draws what the captions say; or else always the colour and motion of none of them."""
        shown = [by_caption[caption] for caption in prompt]
        if not right:
            shown = [dataclasses.replace(scene, colour=other(scene)) for scene in shown]
        frames = [draw(scene, times(checkpoint.family), height, width) / 255 for scene in shown]
        return SimpleNamespace(frames=np.stack(frames))

    def other(scene):
        return "blue" if scene.colour != "blue" else "red"

    marks, shown = examine(pipeline, checkpoint, scenes, steps=1, guidance=1, seed=0, batch=4)
    assert shown.shape == (6, 17, 64, 96, 3)
    assert marks.shape == marks.motion == 1
    assert marks.colour == marks.shape_and_colour == marks.all_three == float(right)
    assert (marks.first_frame is not None) == ("i2v" in form)
