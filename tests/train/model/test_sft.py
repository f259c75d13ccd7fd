"""Full fine-tuning's folder: what diffusers loads is what was trained."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogcommon.errors import ModelError, RunError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogcommon.model.families import BUILTIN_NAMES
from cogtrain.model import sft
from cogtrain.model.compare import difference, output_on_noise

CPU = pick_device()


def tuned(name):
    checkpoint = open_checkpoint(name)
    transformer = checkpoint.load_transformer(torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(transformer.named_parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return checkpoint, transformer


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_the_folder_gives_the_trained_model(tmp_path, name):
    checkpoint, transformer = tuned(name)
    assert difference(output_on_noise(checkpoint.load_transformer(torch.float32)), output_on_noise(transformer)) > 0.02
    state = sft.state_dict(transformer, torch.float32)
    folder = sft.save(state, checkpoint, tmp_path)
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    # Equal weights, below; a matrix product may still round otherwise where they lie at another alignment.
    assert difference(output_on_noise(loaded), output_on_noise(transformer)) < 1e-5
    for (name, mine), (_, theirs) in zip(
        sorted(transformer.state_dict().items()), sorted(loaded.state_dict().items()), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert sft.check(folder, checkpoint, state, output_on_noise(transformer), CPU) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_half_precision_rounds_once_and_replaces_an_older_folder(tmp_path):
    checkpoint, transformer = tuned("tiny")
    sft.save(sft.state_dict(transformer, torch.float32), checkpoint, tmp_path)
    state = sft.state_dict(transformer, torch.bfloat16)
    folder = sft.save(state, checkpoint, tmp_path)
    loaded = sft.load(folder, checkpoint, torch.bfloat16)
    weights = dict(transformer.named_parameters())
    assert all(torch.equal(p, weights[name].bfloat16()) for name, p in loaded.named_parameters())
    assert 0 < sft.check(folder, checkpoint, state, output_on_noise(transformer), CPU) < 2e-2


def test_wrong_weights_are_refused_in_words(tmp_path):
    checkpoint, transformer = tuned("tiny")
    state = sft.state_dict(transformer, torch.float32)
    folder = sft.save(state, checkpoint, tmp_path)
    with pytest.raises(RunError, match="1 weights act otherwise"):
        sft.check(
            folder,
            checkpoint,
            state | {"proj_out.bias": state["proj_out.bias"] + 1e-6},
            output_on_noise(transformer),
            CPU,
        )
    with pytest.raises(RunError, match="off"):
        sft.check(folder, checkpoint, state, output_on_noise(checkpoint.load_transformer(torch.float32)), CPU)
    with pytest.raises(ModelError, match=r"not one of tiny-2b: "):
        sft.load(folder, open_checkpoint("tiny-2b"), torch.float32)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cut short"):
        sft.load(folder, checkpoint, torch.float32)


def test_ranks_that_only_help_keep_nothing():
    _, transformer = tuned("tiny")
    seen = []
    assert sft.state_dict(transformer, torch.float32, lambda p: seen.append(p) or p.detach(), keep=False) == {}
    assert len(seen) == len(list(transformer.parameters()))
