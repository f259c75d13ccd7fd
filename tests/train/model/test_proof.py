"""The proof of an exported LoRA on the model that was trained: as hard as one on a model that is loaded anew."""

import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import RunError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.model import lora
from cogtrain.model.compare import Frozen, output_on_noise
from cogtrain.model.method import Lora, Written
from cogtrain.settings.training import LoraSettings

CPU = torch.device("cpu")


def trained(tmp_path, dtype=torch.float32):
    """A method, its model after a step of training, and what was written of it; blocks run by another's forward."""
    checkpoint = open_checkpoint("random-tiny")
    method = Lora(LoraSettings(rank=4, alpha=1.0))
    transformer = checkpoint.load_transformer(dtype)
    method.apply(transformer)
    method.watch(runtime_of(dtype), transformer)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora.adapted(transformer):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    for module in (transformer, *transformer.transformer_blocks):
        module.forward = types.MethodType(type(module).forward, module)
    state, expected = lora.state_dict(transformer), output_on_noise(transformer)
    written = Written(lora.save(state, tmp_path, {}), state, expected)
    return checkpoint, method, transformer, written


def runtime_of(dtype):
    return types.SimpleNamespace(
        main=True, sharded=False, dtype=dtype, plain=lambda model: model, room_of=lambda model: CPU
    )  # fmt: skip


def prove(checkpoint, method, transformer, written, dtype=torch.float32):
    return method.verify(runtime_of(dtype), transformer, checkpoint, written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_a_fresh_model_gives_and_loads_none(tmp_path, monkeypatch, dtype):
    checkpoint, method, transformer, written = trained(tmp_path, dtype)
    fresh = lora.check(written.path, checkpoint, written.state, written.expected, CPU, dtype)
    monkeypatch.setattr(type(checkpoint), "load_transformer", None)
    assert prove(checkpoint, method, transformer, written, dtype).difference == fresh
    assert not any("forward" in vars(module) for module in transformer.modules())  # diffusers' own have answered


def test_a_file_that_lost_its_scale_is_refused(tmp_path):
    checkpoint, method, transformer, written = trained(tmp_path)
    lost = {key: t * 4 if "lora_B" in key else t for key, t in load_file(written.path).items()}
    save_file(lost, written.path)
    with pytest.raises(RunError, match=r"8 weights act otherwise"):
        prove(checkpoint, method, transformer, written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_training_has_changed_is_refused(tmp_path, dtype):
    checkpoint, method, transformer, written = trained(tmp_path, dtype)
    weight = transformer.transformer_blocks[1].attn1.to_q.base_layer.weight.data
    weight[[0, 1]] = weight[[1, 0]]  # the same numbers, elsewhere
    name = "transformer_blocks.1.attn1.to_q.base_layer.weight"
    assert method._frozen.changed(transformer) == [name]
    written = Written(written.path, written.state, output_on_noise(transformer))
    with pytest.raises(RunError, match=r"1 weights act otherwise"):
        prove(checkpoint, method, transformer, written, dtype)


def test_weights_of_any_shape_are_told_apart():
    model = torch.nn.ParameterDict({"odd": torch.ones(3, 5), "one": torch.tensor(1.0), "line": torch.ones(7)})
    model.requires_grad_(False)
    frozen = Frozen(model)
    assert frozen.changed(model) == []
    for name in model:
        before = model[name].clone()
        model[name].reshape(-1)[-1:] += 1e-6
        assert frozen.changed(model) == [name]
        model[name].copy_(before)
    model["odd"].requires_grad_(True)
    assert frozen.changed(model) == ["odd"]
