"""The trained weights know what they should be fed: anything else costs them, and this notices."""

import dataclasses

import pytest
import torch

from cogcommon.checkpoint import open_checkpoint
from cogtrain.inputs import Objective
from cogtrain.pretrain.transformer import batch_at, encode_world, split_scenes

# A third or so above what each form has here; 2B's schedule leaves it more to guess.
LIMIT = {"tiny": 0.07, "tiny-2b": 0.15, "tiny-i2v": 0.02, "tiny-1.5": 0.07, "tiny-1.5-i2v": 0.02}


@pytest.fixture(scope="module")
def losses():
    """losses(form, objective) -> mean loss on eight clips of four scenes that no form was trained on."""
    made = {}

    def make(form, change=lambda objective: objective):
        if form not in made:
            checkpoint = open_checkpoint(form)
            scenes = split_scenes()[1][:4]
            world = encode_world(checkpoint, scenes, torch.device("cpu"), checkpoint.family.text_tokens)
            made[form] = checkpoint, world, checkpoint.load_transformer(torch.float32)
        checkpoint, world, transformer = made[form]
        objective = change(Objective.of(checkpoint))
        batch = batch_at(world, Objective.of(checkpoint), 0, size=8, seed=0)
        with torch.no_grad():
            return float(objective.losses(transformer, batch, torch.float32).mean())

    return make


class PaddedAtTheEnd(Objective):
    def clean(self, latent_BFCHW):
        scaled = latent_BFCHW * self.scaling_factor
        missing = self.padded_frames(scaled.shape[1]) - scaled.shape[1]
        return torch.cat([scaled] + [scaled[:, -1:]] * missing, dim=1)


class ShiftedPositions(Objective):
    def rope(self, *size, device):
        return tuple(torch.roll(table, 1, 0) for table in super().rope(*size, device=device))


def as_class(cls):
    def change(objective):
        return cls(**{field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)})

    return change


SABOTAGES = {
    "x0 without the scaling factor": ("tiny", lambda objective: dataclasses.replace(objective, scaling_factor=1.0)),
    "x0 scaled twice": ("tiny-2b", lambda o: dataclasses.replace(o, scaling_factor=o.scaling_factor**2)),
    "image latent multiplied, not divided": (
        "tiny-1.5-i2v",
        lambda o: dataclasses.replace(o, image_scale=o.scaling_factor),
    ),
    "frames padded at the end": ("tiny-1.5", as_class(PaddedAtTheEnd)),
    "positions shifted by one token": ("tiny", as_class(ShiftedPositions)),
}


@pytest.mark.parametrize("form", LIMIT)
def test_what_the_project_feeds_is_what_each_form_was_trained_on(losses, form):
    assert losses(form) < LIMIT[form]


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_sabotage_of_the_objective_costs_the_trained_model(losses, sabotage):
    form, change = SABOTAGES[sabotage]
    assert losses(form, change) > 1.3 * losses(form)
