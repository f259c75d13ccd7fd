"""A part of a checkpoint whose files do not hold exactly its weights is refused, by name; a whole one loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import ModelError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint

Weights = dict[str, torch.Tensor]
FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
FIRST = {
    "vae": "encoder.conv_in.conv.weight",
    "transformer": "transformer_blocks.0.attn1.to_q.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
}
PARTS = pytest.mark.parametrize("part", FILES)


@pytest.fixture
def model(tmp_path) -> Path:
    """A local checkpoint of links, so that a test can replace one file of it."""
    folder = tmp_path / "model"
    shutil.copytree(open_checkpoint("random-tiny").root, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    return folder


def change(model: Path, part: str, change: Callable[[Weights], object]) -> Path:
    """Write the part's weights anew, changed."""
    file = model / part / FILES[part]
    weights = dict(load_file(file))
    change(weights)
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    return file


def refusal(model: Path, part: str) -> str:
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(ModelError) as caught:
        checkpoint.check_weights(part)
    with pytest.raises(ModelError, match=part):
        load(checkpoint, part)
    return str(caught.value)


def load(checkpoint: Checkpoint, part: str) -> torch.nn.Module:
    return getattr(checkpoint, f"load_{part}")(torch.float32)


@PARTS
def test_a_missing_weight_is_named(model, part):
    change(model, part, lambda weights: weights.pop(FIRST[part]))
    told = refusal(model, part)
    assert f"the {part} of" in told and "lacks 1 weight of its" in told and FIRST[part] in told


@PARTS
def test_renamed_weights_are_both_missing_and_too_many(model, part):
    change(model, part, lambda weights: weights.update({"model." + FIRST[part]: weights.pop(FIRST[part])}))
    told = refusal(model, part)
    assert f"the first {FIRST[part]}" in told and f"the first model.{FIRST[part]}" in told


def test_a_block_more_than_the_config_has(model):
    def one_more(weights: Weights) -> None:
        weights |= {
            name.replace("blocks.1.", "blocks.2."): weight.clone()
            for name, weight in weights.items()
            if "transformer_blocks.1." in name
        }

    change(model, "transformer", one_more)
    assert "the first transformer_blocks.2." in refusal(model, "transformer")


@PARTS
def test_another_shape_or_a_type_that_cannot_be(model, part):
    change(model, part, lambda weights: weights.update({FIRST[part]: torch.zeros(3, 5)}))
    assert f"has {FIRST[part]} of shape 3x5" in refusal(model, part)
    whole = load_file(open_checkpoint("random-tiny").root / part / FILES[part])[FIRST[part]]
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")):
        change(model, part, lambda weights, dtype=dtype: weights.update({FIRST[part]: whole.to(dtype)}))
        assert f"has {FIRST[part]} in {name}" in refusal(model, part)


@PARTS
@pytest.mark.parametrize("size", [0, 5, 300, 0.5, -1])
def test_a_file_cut_short(model, part, size):
    file = model / part / FILES[part]
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: int(len(data) * size) if isinstance(size, float) else size])
    assert "damaged or cut short" in refusal(model, part)


@PARTS
def test_only_a_variant_or_only_a_pickle(model, part):
    file = model / part / FILES[part]
    variant = file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))
    file.rename(variant)
    told = refusal(model, part)
    assert f"only a variant, {variant.name}" in told and f"rename it to {file.name}" in told
    variant.unlink()
    torch.save({}, file.with_suffix(".bin"))
    assert "is a pickle" in refusal(model, part)
    file.with_suffix(".bin").unlink()
    assert "has no weights" in refusal(model, part)


def shard(model: Path, part: str) -> list[Path]:
    """Spread a part over two files and an index, as save_pretrained does with a large one."""
    file = model / part / FILES[part]
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    halves = {
        f"{file.stem}-00001-of-00002.safetensors": names[: len(names) // 2],
        f"{file.stem}-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for name, inside in halves.items():
        save_file({key: weights[key] for key in inside}, file.with_name(name), metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    of = {key: name for name, inside in halves.items() for key in inside}
    index = file.with_name(file.name + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": of}))
    return [file.with_name(name) for name in halves]


@PARTS
def test_weights_in_several_files(model, part):
    files = shard(model, part)
    there, here = (load(open_checkpoint(name), part).state_dict() for name in ("random-tiny", str(model)))
    assert all(torch.equal(weight, here[name]) for name, weight in there.items())
    files[1].unlink()
    assert f"lacks 1 file of its 2: {files[1].name}" in refusal(model, part)
    index = model / part / (FILES[part] + ".index.json")
    for damaged in ("[]", "{", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'):
        index.write_text(damaged)
        assert "is damaged" in refusal(model, part)


def test_what_real_checkpoints_have_beside_their_weights_is_no_fault(model):
    """A whole T5 with decoder and head; T5's embedding under either of its names; positions that are computed."""

    def whole_t5(weights: Weights) -> None:
        weights |= {"lm_head.weight": torch.zeros(2), "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2)}
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()

    before = load(open_checkpoint("random-tiny"), "text_encoder").shared.weight
    change(model, "text_encoder", whole_t5)
    assert torch.equal(load(open_checkpoint(str(model)), "text_encoder").encoder.embed_tokens.weight, before)
    change(model, "text_encoder", lambda weights: weights.pop("shared.weight"))
    t5 = load(open_checkpoint(str(model)), "text_encoder")
    assert torch.equal(t5.encoder.embed_tokens.weight, before) and t5.shared.weight is t5.encoder.embed_tokens.weight

    shutil.copytree(open_checkpoint("random-tiny-2b").root, model.parent / "2b")
    positions = load(open_checkpoint("random-tiny-2b"), "transformer").patch_embed.pos_embedding
    change(model.parent / "2b", "transformer", lambda weights: weights.update({"patch_embed.pos_embedding": positions}))
    assert torch.equal(
        load(open_checkpoint(str(model.parent / "2b")), "transformer").patch_embed.pos_embedding, positions
    )


@pytest.mark.parametrize("form", ["tiny", "tiny-2b", "tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_every_built_in_form_is_whole(form):
    open_checkpoint(form).check_weights("transformer", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "num_layers", "two"),
        ("transformer", "out_channels", {}),
        ("transformer", "in_channels", [16]),
        ("transformer", "sample_height", None),
        ("transformer", "patch_size", "x"),
        ("vae", "scaling_factor", "0.7"),
        ("vae", "scaling_factor", 0),
        ("vae", "block_out_channels", 3),
        ("text_encoder", "d_model", True),
        ("text_encoder", "num_layers", "x"),
    ],
)
def test_a_config_that_cannot_be_is_one_message(model, part, key, value):
    file = model / part / "config.json"
    config = json.loads(file.read_text()) | {key: value}
    file.unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=part):
        open_checkpoint(str(model)).check_weights(part)
