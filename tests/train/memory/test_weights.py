"""Weights are counted from a config as the model that is made of it has them."""

import types

import pytest
import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BUILTIN_NAMES, FAMILIES
from cogcommon.model.published import published
from cogtrain.memory.weights import all_weights, linear_layers, trained_weights
from cogtrain.model.lora import targets
from cogtrain.model.method import outline
from cogtrain.settings.training import LoraSettings, SftSettings

CHECKPOINTS = {
    **{family.name: lambda family=family: published(family) for family in FAMILIES},
    **{name: lambda name=name: open_checkpoint(name) for name in BUILTIN_NAMES},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_layer_is_counted(name):
    checkpoint = CHECKPOINTS[name]()
    config = checkpoint.transformer_config
    model = outline(config)
    layers = [(n, m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(linear_layers(config)) == sorted(layers)
    assert all_weights(config) == sum(parameter.numel() for parameter in model.parameters())
    for words in (LoraSettings().target_modules, ("to_q", "net.2", "norm_out.linear")):
        settings = LoraSettings(rank=3, target_modules=words)
        sides = sum(layer.in_features + layer.out_features for layer in targets(model, words).values())
        assert trained_weights(types.SimpleNamespace(checkpoint=checkpoint, settings=settings)) == 3 * sides
    run = types.SimpleNamespace(checkpoint=checkpoint, settings=SftSettings())
    assert trained_weights(run) == all_weights(config)
