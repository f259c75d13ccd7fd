"""Which layers the blocks know (`block`): what they do not would be left out of the computation without a word."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cogcommon.errors import RunError

_ADAPTED = "peft.tuners.lora.layer.Linear"
# By exact class: a subclass computes something else.
_KNOWN = frozenset({
    _ADAPTED,
    "diffusers.models.activations.GELU",
    "diffusers.models.attention.FeedForward",
    "diffusers.models.attention_processor.Attention",
    "diffusers.models.normalization.CogVideoXLayerNormZero",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.ParameterDict",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.LayerNorm",
})  # fmt: skip
_PROCESSOR = "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0"


def check_layers(block: Any) -> None:
    """Refuse a block with layers of another class than diffusers' and PEFT's plain LoRA.

    Raises:
        RunError: names the layer.
    """
    for name, module in block.named_modules():
        kind = _class_of(module)
        if kind not in _KNOWN:
            raise _unknown(name, kind)
        if kind == _ADAPTED:
            _check_adapter(name, module)
    if (kind := _class_of(block.attn1.processor)) != _PROCESSOR:
        raise _unknown("attn1.processor", kind)


def check_all_used(names: Collection[str], used: Collection[str]) -> None:
    """Refuse weights that are not computed with, such as an adapter's bias.

    Raises:
        RunError: names one.
    """
    if left := sorted(set(names) - set(used)):
        raise _unknown(left[0], "a weight of its own")


def _check_adapter(name: str, layer: Any) -> None:
    if variants := [type(variant).__name__ for variant in layer.lora_variant.values()]:
        raise _unknown(name, variants[0])  # DoRA and others, in a layer of the same class
    if len(layer.lora_A) != 1:
        raise _unknown(name, f"{len(layer.lora_A)} adapters")
    if layer.merged or layer.disable_adapters:
        raise _unknown(name, "an adapter that is merged or switched off")


def _class_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _unknown(name: str, kind: str) -> RunError:
    return RunError(
        f"the transformer has a layer that would be computed wrongly: {kind}",
        where=f"{name} of a block",
        fix="train with plain LoRA layers or none, and diffusers' own attention",
    )
