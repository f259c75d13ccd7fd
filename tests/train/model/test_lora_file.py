"""LoRA files of other tools, read; and ours as ComfyUI's own CogVideoX reads it, by its loader's rule."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import ModelError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.distributed.snapshot import STATE_FILE, WEIGHTS
from cogtrain.model import lora
from cogtrain.model.compare import difference, output_on_noise
from cogtrain.model.lora_file import PEFT_CONFIG, PEFT_FILE, base_of, file_metadata, lora_in, read_lora
from cogtrain.model.method import outline

ALL_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear",
              "norm_out.linear", "proj_out", "text_proj", "patch_embed.proj", "time_embedding.linear_1",
              "time_embedding.linear_2", "ofs_embedding.linear_1", "ofs_embedding.linear_2"]  # fmt: skip
# The linear layers of comfy/ldm/cogvideo/model.py, of its module `diffusion_model`, by diffusers' names.
COMFYUI_BLOCK = {
    "norm1.linear": "norm1.linear", "attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out", "norm2.linear": "norm2.linear", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
}  # fmt: skip
COMFYUI_TOP = {
    "patch_embed.proj": "patch_embed.proj", "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1", "time_embedding.linear_2": "time_embedding_linear_2",
    "ofs_embedding.linear_1": "ofs_embedding_linear_1", "ofs_embedding.linear_2": "ofs_embedding_linear_2",
    "norm_out.linear": "norm_out.linear", "proj_out": "proj_out",
}  # fmt: skip


def comfyui_weights(transformer) -> dict[str, torch.nn.Parameter]:
    """The weights of linear layers as they are called in the state dict of ComfyUI's model."""
    found = {f"diffusion_model.{theirs}.weight": transformer.get_submodule(ours).weight
             for ours, theirs in COMFYUI_TOP.items()}  # fmt: skip
    for number, block in enumerate(transformer.transformer_blocks):
        for ours, theirs in COMFYUI_BLOCK.items():
            found[f"diffusion_model.blocks.{number}.{theirs}.weight"] = block.get_submodule(ours).weight
    return found


def merge_as_comfyui_does(file, transformer, strength=1.0) -> int:
    """Add a LoRA to the weights by the rule of comfy/lora.py and comfy/weight_adapter/lora.py; layers that were found.

    A weight is known by its name without `.weight`, and as `lora_unet_` with underscores for dots. Its pair is
    `lora_up`/`lora_down` or `lora_B`/`lora_A`, its scale alpha/rank, or 1 without alpha.
    """
    tensors = load_file(file)
    used = set()
    found = 0
    for name, weight in comfyui_weights(transformer).items():
        key = name.removesuffix(".weight")
        for known in (key, "lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_")):
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                names = f"{known}.{up}.weight", f"{known}.{down}.weight"
                if names[0] not in tensors:
                    continue
                found += 1
                b, a = (tensors[name] for name in names)
                scale = float(tensors[f"{known}.alpha"]) / len(a) if f"{known}.alpha" in tensors else 1.0
                used |= {*names, f"{known}.alpha"}
                with torch.no_grad():
                    weight += strength * scale * (b @ a)
    assert set(tensors) <= used, sorted(set(tensors) - used)[:3]  # ComfyUI logs: lora key not loaded
    return found


def test_comfyui_finds_every_layer_and_at_strength_1_acts_as_the_live_model(tmp_path, live_model):
    checkpoint, transformer = live_model("tiny-1.5-i2v", target_modules=ALL_LINEAR)
    linear = [layer for layer in outline(checkpoint.transformer_config).modules() if isinstance(layer, torch.nn.Linear)]
    state = lora.state_dict(transformer)
    file = lora.save(lora.for_comfyui(state), tmp_path, {}, "mine-2-comfyui.safetensors")
    plain = checkpoint.load_transformer(torch.float32)
    expected = output_on_noise(transformer)
    assert difference(expected, output_on_noise(plain)) > 0.05
    assert merge_as_comfyui_does(file, plain) == len(linear) == len(state) / 2
    assert difference(expected, output_on_noise(plain)) < 1e-5
    back = checkpoint.load_transformer(torch.float32)
    lora.load(file, checkpoint, back)
    assert difference(expected, output_on_noise(back)) == 0


def spelled(state, layer_name, sides=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    """A `state_dict` with other names."""
    named = {}
    for name, tensor in state.items():
        layer, side = name.removeprefix("transformer.").rsplit(".lora_", 1)
        named[f"{layer_name(layer)}.{sides['AB'.index(side[0])]}.weight"] = tensor
    return named


def with_alpha(tensors, alpha) -> dict[str, torch.Tensor]:
    layers = {name.rsplit(".lora", 1)[0] for name in tensors}
    return tensors | {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}


def flat(layer) -> str:
    return "lora_unet__" + layer.replace(".", "_")


def comfyui(layer) -> str:
    number, inside = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer).groups()
    return f"diffusion_model.blocks.{number}.{COMFYUI_BLOCK[inside]}"


KOHYA = ("lora_down", "lora_up")
# name of the form -> how its layers are called, its sides, where its alpha stands
FORMS = {
    "diffusers": (lambda layer: f"transformer.{layer}", ("lora_A", "lora_B"), "metadata"),
    "PEFT": (lambda layer: f"base_model.model.{layer}", ("lora_A.default", "lora_B.default"), "beside"),
    "kohya": (flat, KOHYA, "tensors"),
    "kohya of ComfyUI's names": (
        lambda layer: comfyui(layer).replace("diffusion_model.", "lora_unet_").replace(".", "_"), KOHYA, "tensors"
    ),
    "ComfyUI": (comfyui, KOHYA, "tensors"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_and_place_of_alpha_acts_the_same(tmp_path, live_model, form):
    """alpha 1 at rank 4: 0.25 of what the tensors say."""
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    raw = {name: tensor * 4 if "lora_B" in name else tensor for name, tensor in state.items()}
    name, sides, place = FORMS[form]
    tensors, metadata = spelled(raw, name, sides), None
    if place == "tensors":
        tensors = with_alpha(tensors, 1.0)
    elif place == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1})}
    else:
        config = {"r": 4, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_[qkv]|to_out.0": 0.5}}
        (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    save_file(tensors, tmp_path / PEFT_FILE, metadata=metadata)
    found = read_lora(lora_in(tmp_path), checkpoint, fresh(checkpoint))
    assert found.form == form.split()[0]
    if place == "beside":
        assert base_of(lora_in(tmp_path)) == ("tiny", None)
    assert found.alpha
    assert found.rank == 4
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 1, "target_modules": ["to_q"]})},
        {"transformer.r": "4", "transformer.lora_alpha": "1"},
        {"r": "4", "lora_alpha": "1.0"},
        {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4}), "lora_alpha": "1"},
    ],
)
def test_the_alpha_that_trainers_write_into_the_metadata_is_read(tmp_path, live_model, metadata):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    save_file(state, tmp_path / "x.safetensors", metadata=metadata)
    found = read_lora(tmp_path / "x.safetensors", checkpoint, fresh(checkpoint))
    assert found.alpha == "in its metadata"
    assert all(torch.equal(found.state[n], t / 4 if "lora_B" in n else t) for n, t in state.items())


def fresh(checkpoint):
    return outline(checkpoint.transformer_config)


def test_without_alpha_a_file_acts_as_in_diffusers_and_says_so(tmp_path, live_model):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    save_file(state, tmp_path / "theirs.safetensors")
    found = read_lora(tmp_path / "theirs.safetensors", checkpoint, fresh(checkpoint))
    assert "no alpha, so it acts with scale 1, as in diffusers" in str(found)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())
    by_diffusers = checkpoint.load_transformer(torch.float32)
    by_diffusers.load_lora_adapter(load_file(tmp_path / "theirs.safetensors"), prefix="transformer")
    by_us = checkpoint.load_transformer(torch.float32)
    lora.load(tmp_path / "theirs.safetensors", checkpoint, by_us)
    assert difference(output_on_noise(by_diffusers), output_on_noise(by_us)) == 0


def test_layers_of_different_ranks_are_padded(tmp_path, live_model):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    smaller = {}
    for name, tensor in state.items():
        keep = 2 if ".to_k." in name else 4
        smaller[name] = (tensor[:keep] if "lora_A" in name else tensor[:, :keep]).contiguous()
    save_file(smaller, tmp_path / "mixed.safetensors")
    found = read_lora(tmp_path / "mixed.safetensors", checkpoint, fresh(checkpoint))
    assert {min(tensor.shape) for tensor in found.state.values()} == {4}
    for name in state:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            assert torch.allclose(found.state[b] @ found.state[name], smaller[b] @ smaller[name], atol=1e-6)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["transformer.transformer_blocks.0.attn1.to_q.dora_scale"], "it is a DoRA"),
        (["lora_unet_blocks_0_q.hada_w1_a"], "LoHa or LoKr"),
        (["transformer.layers.0.attention.query_key_value.matrix_A.0"], "it has SAT's names"),
        (["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"], "text encoder"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_B.bias"], "more than linear layers"),
        (
            ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
            "the model has no linear layer lora_",
        ),
    ],
)
def test_what_is_no_plain_lora_of_the_transformer_is_refused_by_name(tmp_path, live_model, names, said):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    save_file(state | dict.fromkeys(names, torch.zeros(4, 4)), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=said):
        read_lora(tmp_path / "x.safetensors", checkpoint, fresh(checkpoint))


def test_half_a_pair_and_a_broken_alpha_are_refused(tmp_path, live_model):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    file = tmp_path / "x.safetensors"
    save_file({name: tensor for name, tensor in state.items() if "to_q.lora_A" not in name}, file)
    with pytest.raises(ModelError, match=r"attn1\.to_q are no pair"):
        read_lora(file, checkpoint, fresh(checkpoint))
    for alpha in (
        "[", '{"transformer.lora_alpha": "x"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', '{"lora_alpha": NaN}'
    ):  # fmt: skip
        save_file(state, file, metadata={"lora_adapter_metadata": alpha})
        with pytest.raises(ModelError, match="alpha cannot be read"):
            read_lora(file, checkpoint, fresh(checkpoint))


def test_an_alpha_that_is_no_number_and_two_loras_in_one_file_are_refused(tmp_path, live_model):
    checkpoint, transformer = live_model()
    state, file = lora.state_dict(transformer), tmp_path / "x.safetensors"
    for alpha in ([2.0, 2.0], []):
        save_file(with_alpha(state, alpha), file)
        with pytest.raises(ModelError, match="alpha cannot be read"):
            read_lora(file, checkpoint, fresh(checkpoint))
    both = {name.replace("lora_B", f"lora_B.{of}"): tensor.clone() for of in "ab" for name, tensor in state.items()}
    save_file(both, file)
    with pytest.raises(ModelError, match="two LoRAs of transformer_blocks"):
        read_lora(file, checkpoint, fresh(checkpoint))


def test_a_lora_that_goes_on_another_base_is_refused(tmp_path, live_model):
    """Of PiSSA and its like PEFT changes the base as well, when it loads them."""
    checkpoint, transformer = live_model()
    state = spelled(lora.state_dict(transformer), *FORMS["PEFT"][:2])
    save_file(state, tmp_path / PEFT_FILE)
    config = {"r": 4, "lora_alpha": 1, "init_lora_weights": True}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    assert read_lora(tmp_path / PEFT_FILE, checkpoint, fresh(checkpoint)).alpha
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ModelError, match="on another base"):
        read_lora(tmp_path / PEFT_FILE, checkpoint, fresh(checkpoint))


@pytest.mark.parametrize(
    ("data", "said", "do"),
    [
        (b"", "it is empty", "fetch it again"),
        (b"\x10\0\0\0\0\0\0\0{", "damaged or cut short", "fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page", "/resolve/"),
        (b"PK\x03\x04", "a pickle", "safetensors.torch"),
    ],
)
def test_what_a_file_is_instead_is_said_with_what_to_do(tmp_path, data, said, do):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=said) as caught:
        file_metadata(tmp_path / "x.safetensors")
    assert do in caught.value.fix


def test_the_command_that_converts_a_pickle_does(tmp_path, monkeypatch):
    file = tmp_path / "it's.bin"
    torch.save({"x.lora_A.weight": torch.ones(2, 3).T}, file)
    with pytest.raises(ModelError, match="a pickle") as caught:
        file_metadata(file)
    words = shlex.split(caught.value.fix.partition("convert it: ")[2])
    assert words[:2] == ["python", "-c"] and words[3:] == [str(file), str(file.with_suffix(".safetensors"))]
    monkeypatch.setattr(sys, "argv", words[2:])
    exec(words[2])
    assert torch.equal(load_file(file.with_suffix(".safetensors"))["x.lora_A.weight"], torch.ones(3, 2))


def test_the_file_of_a_folder(tmp_path):
    with pytest.raises(ModelError, match="holds no"):
        lora_in(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert lora_in(tmp_path).name == "b.safetensors"
    save_file({"x": torch.zeros(1)}, tmp_path / lora.FILE)
    assert lora_in(tmp_path).name == lora.FILE
    with pytest.raises(ModelError, match="no such file"):
        lora_in(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="no such file") as caught:
        lora_in(Path("somebody/a-lora"))
    assert "hf download somebody/a-lora --local-dir somebody/a-lora" in caught.value.fix
    with pytest.raises(ModelError, match="not from an address") as caught:
        lora_in(Path("https://a.example/x.safetensors"))
    assert caught.value.where == "https://a.example/x.safetensors"


def test_a_checkpoint_is_no_lora_file_for_its_alpha_stands_nowhere(tmp_path):
    """Its names would pass for a file's, which would act with scale 1: twice as strongly as trained, by default."""
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    (tmp_path / STATE_FILE).touch()
    for named in (tmp_path, tmp_path / WEIGHTS):
        with pytest.raises(ModelError, match="a checkpoint of a run") as caught:
            lora_in(named)
        assert f"cogtrain export --run {tmp_path}," in caught.value.fix


def test_a_lora_of_another_architecture_is_no_lora_of_cogvideox(tmp_path):
    checkpoint = open_checkpoint("tiny")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "sd.safetensors")
    with pytest.raises(ModelError, match="not a LoRA of a CogVideoX transformer"):
        read_lora(tmp_path / "sd.safetensors", checkpoint, fresh(checkpoint))
