"""What a CogVideoX block computes, as a function of its tensors.

The same arithmetic as ``diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock``
with PEFT's LoRA layers in it, but told what it computes with: weights may come
from anywhere (`BlockSwap`), masters of adapters stay fp32 while the products
run in the type of the activations, no autocast decides anything, and nothing is
written in place, so that all of it can be recomputed and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .attention import Kernel, attend
from .known import check_all_used, check_layers

if TYPE_CHECKING:
    import torch

# What a block's function takes: video (B, S, D), text (B, L, D), time embedding (B, T), the two rotary tables
# (S, head dim) where there are any, then the block's tensors in the order of `Layout.names`. It gives video and text.
BlockFunction = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Linear:
    """Places of a linear layer's tensors in the block's list; ``scale`` is alpha/rank of its adapter."""

    weight: int
    bias: int | None
    lora_A: int | None = None
    lora_B: int | None = None
    scale: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Norm:
    """Places of a layer norm's tensors, and its width."""

    weight: int | None
    bias: int | None
    width: int
    eps: float


@dataclass(frozen=True)
class Layout:
    """A block's tensors by name, and where each layer finds its own."""

    names: tuple[str, ...]  # as in ``block.named_parameters()``
    heads: int
    modulate: tuple[Linear, Linear]
    norm: tuple[Norm, Norm]
    qkv: tuple[Linear, Linear, Linear]
    norm_q: Norm | None
    norm_k: Norm | None
    out: Linear
    up: Linear
    down: Linear

    @classmethod
    def of(cls, block: Any) -> Layout:
        """The layout of a diffusers block, adapters attached or not.

        Raises:
            RunError: it has layers, or weights, that `block_function` would leave out.
        """
        check_layers(block)
        names = tuple(name for name, _ in block.named_parameters())
        place = {name: index for index, name in enumerate(names)}

        def linear(name: str) -> Linear:
            layer = block.get_submodule(name)
            if not hasattr(layer, "lora_A"):
                return Linear(place[f"{name}.weight"], place.get(f"{name}.bias"))
            (adapter,) = layer.lora_A.keys()
            return Linear(
                place[f"{name}.base_layer.weight"],
                place.get(f"{name}.base_layer.bias"),
                place[f"{name}.lora_A.{adapter}.weight"],
                place[f"{name}.lora_B.{adapter}.weight"],
                float(layer.scaling[adapter]),
                float(getattr(layer.lora_dropout[adapter], "p", 0.0)),
            )

        def norm(name: str) -> Norm:
            layer = block.get_submodule(name)
            (width,) = layer.normalized_shape
            return Norm(place.get(f"{name}.weight"), place.get(f"{name}.bias"), width, layer.eps)

        found = cls(
            names=names,
            heads=block.attn1.heads,
            modulate=(linear("norm1.linear"), linear("norm2.linear")),
            norm=(norm("norm1.norm"), norm("norm2.norm")),
            qkv=(linear("attn1.to_q"), linear("attn1.to_k"), linear("attn1.to_v")),
            norm_q=norm("attn1.norm_q") if block.attn1.norm_q is not None else None,
            norm_k=norm("attn1.norm_k") if block.attn1.norm_k is not None else None,
            out=linear("attn1.to_out.0"),
            up=linear("ff.net.0.proj"),
            down=linear("ff.net.2"),
        )
        check_all_used(names, {names[index] for index in found.places()})
        return found

    def places(self) -> set[int]:
        """Of all tensors that are computed with."""
        layers = (*self.modulate, *self.norm, *self.qkv, self.norm_q, self.norm_k, self.out, self.up, self.down)
        held = [
            place
            for layer in layers
            if layer is not None
            for place in (layer.weight, layer.bias, getattr(layer, "lora_A", None), getattr(layer, "lora_B", None))
        ]
        return {place for place in held if place is not None}


def block_function(
    layout: Layout, kernel: Kernel, *, rotary: bool, training: bool = True, chunks: int = 1, fused: bool = False
) -> BlockFunction:
    """The function of all blocks with one layout.

    Args:
        rotary: the rotary tables are among the arguments.
        training: adapters' dropout is on.
        chunks: parts in which the tokens go through the feed-forward layer, whose middle is
            four times as wide as anything else; more parts need less memory.
        fused: queries and keys are normalised and turned by `qk_norm`.
    """
    import torch
    import torch.nn.functional as F

    from .qk_norm import angles, qk_norm, turned

    # Not F.linear: for ZeRO-3 DeepSpeed puts a function of its own in its place, and torch 2.11 compiles that
    # with zeros for gradients (2.13 does not).
    multiply = torch.ops.aten.linear.default

    def products(
        x: torch.Tensor, at: Linear, weights: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the layer gives, and what its adapter adds."""
        bias = None if at.bias is None else weights[at.bias].to(x.dtype)
        y = multiply(x, weights[at.weight].to(x.dtype), bias)
        if at.lora_A is None or at.lora_B is None:
            return y, None
        x = F.dropout(x, at.dropout) if training and at.dropout else x
        low = multiply(x, weights[at.lora_A].to(x.dtype))
        return y, multiply(at.scale * low, weights[at.lora_B].to(x.dtype))

    def linear(x: torch.Tensor, at: Linear, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        y, added = products(x, at, weights)
        return y if added is None else y + added

    def normed(x: torch.Tensor, at: Norm, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weight = None if at.weight is None else weights[at.weight].to(x.dtype)
        bias = None if at.bias is None else weights[at.bias].to(x.dtype)
        return F.layer_norm(x, (at.width,), weight, bias, at.eps)

    def modulated(
        which: int, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, weights: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens, text first, and the gates of video and text."""
        parts = linear(F.silu(temb), layout.modulate[which], weights)[:, None].chunk(6, dim=2)
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        video = normed(video, layout.norm[which], weights) * (1 + scale) + shift
        text = normed(text, layout.norm[which], weights) * (1 + text_scale) + text_shift
        return torch.cat([text, video], dim=1), gate, text_gate

    def heads(x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD.unflatten(-1, (layout.heads, -1))

    def rotated(x_BHSD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
        return (x_BHSD.float() * cos_SD + turned(x_BHSD).float() * sin_SD).to(x_BHSD.dtype)

    def placed(
        x: torch.Tensor, at: Linear, norm: Norm | None, tables: tuple[torch.Tensor, ...], length: int,
        weights: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:  # fmt: skip
        """Queries or keys, (B, H, S, D): normalised, and turned by their position, but for the text's."""
        y, added = products(x, at, weights)
        if fused and norm and norm.weight is not None and norm.bias is not None:
            weight, bias = weights[norm.weight].to(x.dtype), weights[norm.bias].to(x.dtype)
            more = None if added is None else heads(added)
            return qk_norm(heads(y), more, weight, bias, *(tables or (None, None)), length, norm.eps).transpose(1, 2)
        y_BHSD = heads(y if added is None else y + added).transpose(1, 2)
        y_BHSD = y_BHSD if norm is None else normed(y_BHSD, norm, weights)
        if not tables:
            return y_BHSD
        return rotated(y_BHSD, *angles(tables[0], tables[1], length))

    def forward(
        video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables, weights = (rest[:2], rest[2:]) if rotary else ((), rest)
        length = text.shape[1]

        tokens, gate, text_gate = modulated(0, video, text, temb, weights)
        q = placed(tokens, layout.qkv[0], layout.norm_q, tables, length, weights)
        k = placed(tokens, layout.qkv[1], layout.norm_k, tables, length, weights)
        v = heads(linear(tokens, layout.qkv[2], weights)).transpose(1, 2)
        attended = attend(kernel, q, k, v).transpose(1, 2).flatten(2)
        attended = linear(attended, layout.out, weights)
        video = video + gate * attended[:, length:]
        text = text + text_gate * attended[:, :length]

        tokens, gate, text_gate = modulated(1, video, text, temb, weights)
        fed = [
            linear(F.gelu(linear(part, layout.up, weights), approximate="tanh"), layout.down, weights)
            for part in tokens.chunk(chunks, dim=1)
        ]
        tokens = fed[0] if len(fed) == 1 else torch.cat(fed, dim=1)
        return video + gate * tokens[:, length:], text + text_gate * tokens[:, :length]

    return forward
