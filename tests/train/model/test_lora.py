"""The LoRA file gives the model that was trained, through diffusers' own pipelines."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import ModelError, RunError, SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import pick_device
from cogcommon.model.families import BUILTIN_NAMES
from cogtrain.model import lora
from cogtrain.model.compare import difference, output_on_noise
from cogtrain.model.lora_file import read_facts

CPU = pick_device()
RANK, ALPHA = 4, 1.0  # alpha/rank = 0.25: lost, the adapter acts four times too strongly


def pipeline_of(checkpoint):
    import diffusers

    name = "CogVideoXImageToVideoPipeline" if checkpoint.family.task == "i2v" else "CogVideoXPipeline"
    return getattr(diffusers, name).from_pretrained(checkpoint.root)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_the_file_loads_through_the_pipeline_and_answers_as_the_live_model(tmp_path, name, live_model):
    checkpoint, transformer = live_model(name)
    expected = output_on_noise(transformer)
    base = output_on_noise(checkpoint.load_transformer(torch.float32))
    assert difference(base, expected) > 0.05, "the adapter must matter, or the test shows nothing"

    file = lora.save(lora.state_dict(transformer), tmp_path, {"family": checkpoint.family.name})
    pipeline = pipeline_of(checkpoint)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output_on_noise(pipeline.transformer), expected, atol=1e-5, rtol=1e-5)
    assert lora.check(file, checkpoint, lora.state_dict(transformer), expected, CPU, torch.float32) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_without_the_folded_scale_is_refused(tmp_path, live_model, dtype):
    checkpoint, transformer = live_model()
    file = lora.save(lora.state_dict(transformer), tmp_path, {})
    lost = {key: t * (RANK / ALPHA) if "lora_B" in key else t for key, t in load_file(file).items()}
    save_file(lost, file)
    with pytest.raises(RunError, match=r"8 weights act otherwise"):
        lora.check(file, checkpoint, lora.state_dict(transformer), output_on_noise(transformer), CPU, dtype)


def test_the_file_is_fp32_without_alpha_keys_even_from_a_half_precision_base(tmp_path):
    checkpoint = open_checkpoint("random-tiny")
    transformer = checkpoint.load_transformer(torch.bfloat16)
    lora.attach(transformer, RANK, ALPHA)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert transformer.transformer_blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16

    state = load_file(lora.save(lora.state_dict(transformer), tmp_path, {"base_model": "tiny"}))
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert len(state) == 2 * 4 * 2  # A and B, four projections, two layers
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in state)
    assert read_facts(tmp_path / lora.FILE) == {"base_model": "tiny"}
    for others, read in ((["tiny"], {}), ({"family": ["5b"], "rank": 4, "alpha": "2"}, {"alpha": "2"})):
        save_file(state, tmp_path / "other.safetensors", metadata={"cogtune": json.dumps(others)})
        assert read_facts(tmp_path / "other.safetensors") == read
    found = lora.check(
        tmp_path / lora.FILE,
        checkpoint,
        lora.state_dict(transformer),
        output_on_noise(transformer),
        CPU,
        torch.bfloat16,
    )
    assert found < 1e-2


def test_the_start_depends_on_the_seed_and_the_layer_alone(live_model):
    torch.manual_seed(1)
    first = lora.state_dict(live_model(seed=3)[1])
    torch.manual_seed(2)
    again = lora.state_dict(live_model(seed=3)[1])
    other = lora.state_dict(live_model(seed=4)[1])
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("to_q", "to_k")])


def test_merged_weights_answer_as_the_adapters_do(tmp_path, live_model):
    checkpoint, transformer = live_model()
    lora.save(lora.state_dict(transformer), tmp_path, {})
    loaded = checkpoint.load_transformer(torch.float32)
    lora.load(tmp_path / lora.FILE, checkpoint, loaded)
    lora.merge(loaded)
    assert not any("lora" in name for name in loaded.state_dict())
    assert difference(output_on_noise(transformer), output_on_noise(loaded)) < 1e-5


def test_merging_into_half_precision_rounds_once(tmp_path, live_model):
    checkpoint, transformer = live_model()
    state = lora.state_dict(transformer)
    lora.save(state, tmp_path, {})
    loaded = checkpoint.load_transformer(torch.bfloat16)
    name = "transformer_blocks.1.attn1.to_out.0"
    weight = loaded.get_submodule(name).weight.clone()
    lora.load(tmp_path / lora.FILE, checkpoint, loaded)
    lora.merge(loaded)
    delta = state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
    assert torch.equal(loaded.get_submodule(name).weight, (weight.float() + delta).bfloat16())


def test_a_lora_of_another_model_is_refused_in_words(tmp_path, live_model):
    _, transformer = live_model("random-tiny")
    state = lora.state_dict(transformer)
    i2v = open_checkpoint("tiny-1.5-i2v")
    # Shapes of 5B T2V and I2V are the same: only the file's own facts tell them apart.
    lora.save(state, tmp_path, {"family": "5b"})
    with pytest.raises(ModelError, match="trained for 5b"):
        lora.load(tmp_path / lora.FILE, i2v, i2v.load_transformer(torch.float32))

    wider = {key: torch.cat([t, t], 1) if "lora_A" in key else t for key, t in state.items()}
    lora.save(wider, tmp_path, {})
    tiny = open_checkpoint("random-tiny")
    with pytest.raises(ModelError, match="32 wide in the model and 64 in the file"):
        lora.load(tmp_path / lora.FILE, tiny, tiny.load_transformer(torch.float32))

    deeper = {key.replace("blocks.1", "blocks.7"): t for key, t in state.items()}
    lora.save(deeper, tmp_path, {})
    with pytest.raises(ModelError, match=r"no linear layer transformer_blocks\.7\.attn1"):
        lora.load(tmp_path / lora.FILE, tiny, tiny.load_transformer(torch.float32))


def test_what_is_no_lora_file_is_refused_in_words(tmp_path):
    tiny = open_checkpoint("tiny")
    transformer = tiny.load_transformer(torch.float32)
    file = tmp_path / lora.FILE
    file.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="the file is damaged or cut short"):
        lora.load(file, tiny, transformer)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"not a LoRA of a CogVideoX"):
        lora.load(file, tiny, transformer)


def test_bad_settings_are_refused_in_words():
    transformer = open_checkpoint("tiny").load_transformer(torch.float32)
    with pytest.raises(SettingError, match="no linear layer called 'to_x'") as caught:
        lora.attach(transformer, 4, 2, ["to_q", "to_x"])
    assert "to_out.0" in caught.value.fix


def test_other_targets_and_the_metadata_reach_the_file(tmp_path, live_model):
    from safetensors import safe_open

    checkpoint, transformer = live_model(target_modules=["to_q", "ff.net.2"])
    file = lora.save(lora.state_dict(transformer), tmp_path, {"rank": "4"})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        names = set(opened.keys())
    # No `lora_adapter_metadata`: diffusers would scale folded weights a second time.
    assert set(metadata) == {"format", "cogtune"}
    assert json.loads(metadata["cogtune"]) == {"rank": "4"}
    assert "transformer.transformer_blocks.1.ff.net.2.lora_B.weight" in names
    assert (
        lora.check(file, checkpoint, lora.state_dict(transformer), output_on_noise(transformer), CPU, torch.float32)
        < 1e-5
    )
