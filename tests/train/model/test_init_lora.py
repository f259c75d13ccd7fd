"""--init-lora: a run begins with what a file adds, whatever its rank, alpha and tool."""

import dataclasses
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import ModelError, RunError, SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.model import lora
from cogtrain.model.compare import difference, output_on_noise
from cogtrain.model.init_lora import cut_to
from cogtrain.model.method import Lora
from cogtrain.runs.folder import read_metrics
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings


def kohya(state, alpha, rank):
    """A `state_dict` as kohya's trainers write it: alpha in tensors, not folded."""
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    named = {}
    for name, tensor in state.items():
        layer, side = name.removeprefix("transformer.").rsplit(".", 2)[:2]
        flat = f"lora_unet__{layer.replace('.', '_')}"
        named[f"{flat}.{sides[side]}.weight"] = tensor * (rank / alpha if side == "lora_B" else 1)
        named[f"{flat}.alpha"] = torch.tensor(alpha)
    return named


@pytest.fixture
def theirs(tmp_path, live_model):
    """A file of rank 4 in kohya's names, and the output of the model with it."""
    _, transformer = live_model("tiny")
    state = lora.state_dict(transformer)
    save_file(kohya(state, 8.0, 4), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors", output_on_noise(transformer), state


def begun(settings):
    method, checkpoint = Lora(settings), open_checkpoint("tiny")
    method.check_start(checkpoint)
    transformer = checkpoint.load_transformer(torch.float32)
    method.apply(transformer)
    return transformer, method.start(transformer, checkpoint)


@pytest.mark.parametrize(
    ("rank", "options", "said"),
    [
        (4, {"alpha": 1.0}, "rank 4, kohya names, alpha in its tensors"),
        (12, {"adapter": "rslora"}, "filled up to rank 12 with zeros"),
        (4, {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]}, "4 layers that the file does not"),
    ],
)
def test_at_any_rank_and_scale_the_run_begins_with_what_the_file_adds(theirs, rank, options, said):
    file, expected, _ = theirs
    transformer, told = begun(LoraSettings(rank=rank, init_lora=file, **options))
    assert said in told
    assert difference(expected, output_on_noise(transformer)) < 1e-5
    if rank > 4:  # what is new can learn: A is drawn, only B is zero
        layer = transformer.transformer_blocks[0].attn1.to_q
        assert (layer.lora_A["default"].weight[4:] != 0).any()
        assert (layer.lora_B["default"].weight[:, 4:] == 0).all()


def test_a_smaller_rank_takes_the_nearest_matrix(theirs):
    file, _, state = theirs
    transformer, told = begun(LoraSettings(rank=2, init_lora=file))
    assert "cut to rank 2: every layer keeps at least " in told
    cut = lora.state_dict(transformer)
    for name in (name for name in state if "lora_A" in name):
        b = name.replace("lora_A", "lora_B")
        u, sizes, vh = torch.linalg.svd((state[b] @ state[name]).double(), full_matrices=False)  # of the whole matrix
        nearest = (u[:, :2] * sizes[:2]) @ vh[:2]
        assert torch.allclose((cut[b] @ cut[name]).double(), nearest, atol=1e-5 * float(sizes[0]))
    assert cut_to(torch.zeros(4, 8), torch.zeros(8, 4), 2)[2] == 1


def test_a_run_begins_there_measures_the_base_without_it_and_goes_on(tmp_path, theirs, make_shards, train_here):
    make_shards(tmp_path / "out", samples=4)
    make_shards(tmp_path / "held", samples=1, seed=9)
    file, expected, _ = theirs
    settings = LoraSettings(
        shards=[str(tmp_path / "out")], validate_shards=[str(tmp_path / "held")], out=tmp_path / "run", steps=1,
        save_every=1, rank=8, lr=0.0, init_lora=file,
    )  # fmt: skip
    run = train_here(settings)
    loaded = open_checkpoint("tiny").load_transformer(torch.float32)
    lora.load(run / lora.FILE, open_checkpoint("tiny"), loaded)
    assert difference(expected, output_on_noise(loaded)) < 1e-5
    _, (with_it,) = read_metrics(run / "metrics.jsonl")
    assert with_it.val_loss != with_it.base_val_loss
    plain = train_here(dataclasses.replace(settings, out=tmp_path / "plain", init_lora=None))
    _, (without,) = read_metrics(plain / "metrics.jsonl")
    assert math.isclose(with_it.base_val_loss, without.base_val_loss, rel_tol=1e-6)

    on = dataclasses.replace(settings, steps=2)
    weights = load_file(file)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, file)
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.copy(file, elsewhere)
    for other in (elsewhere, None):
        with pytest.raises(RunError, match="made with another --init-lora") as caught:
            open_run(dataclasses.replace(on, init_lora=other), torch.device("cpu"), 1)
        assert caught.value.fix.startswith(f"--init-lora {file}, or ")
    # Its checkpoint has what is needed: the file may have been trained on since, or be gone.
    assert open_run(on, torch.device("cpu"), 1).resume
    file.unlink()
    assert open_run(on, torch.device("cpu"), 1).resume


def test_what_does_not_fit_is_refused_with_what_to_type(tmp_path, theirs, live_model):
    file, *_ = theirs
    with pytest.raises(SettingError, match="12 layers that this run would not train") as caught:
        begun(LoraSettings(init_lora=file, target_modules=["to_k"]))
    assert caught.value.fix == "--target-modules to_k to_out.0 to_q to_v"
    checkpoint = open_checkpoint("tiny-2b")
    with pytest.raises(ModelError, match="this LoRA is not for tiny-2b"):
        _, other = live_model("tiny-1.5")
        lora.save(lora.state_dict(other), tmp_path, {"family": "1.5-5b"})
        Lora(LoraSettings(init_lora=tmp_path)).check_start(checkpoint)
    with pytest.raises(ModelError, match="no such file"):
        begun(LoraSettings(init_lora=tmp_path / "none.safetensors"))
