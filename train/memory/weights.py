"""How many weights a run trains, from its checkpoint's config: no library is imported for it, and no model made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..settings.training import LoraSettings

if TYPE_CHECKING:
    from cogcommon.model.device import Precision

    from .estimate import Trains


def trained_weights(run: Trains) -> int:
    """How many weights a run trains."""
    config, settings = run.checkpoint.transformer_config, run.settings
    if not isinstance(settings, LoraSettings):
        return all_weights(config)
    sides = sum(
        into + out
        for name, into, out in linear_layers(config)
        if any(name == target or name.endswith(f".{target}") for target in settings.target_modules)
    )
    return settings.rank * sides


def all_weights(config: Mapping[str, Any]) -> int:
    """Of a CogVideoX transformer; position tables are none."""
    width, head = _width(config), config["attention_head_dim"]
    weights = sum(into * out + out for _, into, out in linear_layers(config))
    norms = config["num_layers"] * (2 * 2 * width + 2 * 2 * head) + 2 * 2 * width
    if config.get("patch_size_t") is None:  # a convolution
        weights += config["in_channels"] * config.get("patch_size", 2) ** 2 * width
        weights += width if config.get("patch_bias", True) else 0
    return int(weights + norms)


def linear_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, and length of what goes in and of what comes out, of each linear layer of the transformer."""
    width, times = _width(config), config["time_embed_dim"]
    patch = config.get("patch_size", 2) ** 2 * (config.get("patch_size_t") or 1)
    if config.get("patch_size_t") is not None:
        yield "patch_embed.proj", config["in_channels"] * patch, width
    yield "patch_embed.text_proj", config["text_embed_dim"], width
    yield "time_embedding.linear_1", width, times
    yield "time_embedding.linear_2", times, times
    if offset := config.get("ofs_embed_dim"):
        yield "ofs_embedding.linear_1", offset, offset
        yield "ofs_embedding.linear_2", offset, offset
    for block in range(config["num_layers"]):
        name = f"transformer_blocks.{block}."
        yield name + "norm1.linear", times, 6 * width
        yield name + "norm2.linear", times, 6 * width
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{name}attn1.{layer}", width, width
        yield name + "ff.net.0.proj", width, 4 * width
        yield name + "ff.net.2", 4 * width, width
    yield "norm_out.linear", times, 2 * width
    yield "proj_out", width, config["out_channels"] * patch


def text_encoder_bytes(config: Mapping[str, Any], precision: Precision) -> int:
    """Of T5's encoder as it is loaded; transformers leaves the last layer of each feed-forward in fp32 beside fp16."""
    width, inner, middle = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    into = 2 if config.get("feed_forward_proj", "gated-gelu").startswith("gated") else 1
    layer = 4 * width * inner + into * width * middle + 2 * width
    table = config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    out = config["num_layers"] * middle * width
    rest = config["vocab_size"] * width + table + config["num_layers"] * layer + width
    return int((2 if precision == "bf16" else 4) * out + (4 if precision == "fp32" else 2) * rest)


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])
