"""What a step works on, by arithmetic: bytes and operations from shapes alone, before any weight is on the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CpuTrained:
    """Bytes of one block whose weights are trained in host memory (`CpuTraining`); masters are there already.

    ``block`` are its weights as computed, on the GPU; ``states`` what it would take there if it were trained there;
    ``host`` copies, gradients, their sums and moments.
    """

    block: int
    states: int
    host: int


@dataclass(frozen=True)
class Load:
    """What a step works on, in bytes, but for what a block's forward pass multiplies.

    ``attention`` and ``products`` are its floating-point operations, in the attention and in
    its linear layers. ``activation`` is one tensor of all tokens by the width; ``block`` and ``rest``
    are what is not trained, of one block and outside the blocks; ``trained`` is masters,
    gradients and optimizer states, and of it ``arriving`` what is there only once all blocks have gone backward:
    gradients, where there are as many as weights. ``can_swap``: frozen weights may live on the host.
    ``cpu_trained`` is set where all weights are trained, and may be in host memory. ``frozen``: adapters are trained
    beside the blocks' own weights, and ``adapters`` is what a block keeps between the two matrices of each;
    ``latents`` are a batch's, in fp32.
    """

    layers: int
    activation: int
    block: int
    rest: int
    trained: int
    attention: int
    products: int
    arriving: int = 0
    can_swap: bool = True
    cpu_trained: CpuTrained | None = None
    frozen: bool = True
    adapters: int = 0
    latents: int = 0

    @property
    def blocks(self) -> int:
        """Of all blocks, what is not trained."""
        return self.layers * self.block

    @property
    def whole(self) -> int:
        """Of the model, what is not trained."""
        return self.blocks + self.rest

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        tokens: int,
        *,
        batch: int,
        size: int,
        trained: int,
        arriving: int = 0,
        frozen: bool = True,
        can_swap: bool = True,
        accumulate: int | None = None,
        rank: int = 0,
        latents: int = 0,
    ) -> Load:
        """The load of a transformer's ``config.json`` on samples of one bucket.

        Args:
            tokens: of a sample (`Family.tokens`).
            batch: samples of one forward pass.
            size: bytes of a number as computed.
            trained: bytes of what is trained: masters, gradients, optimizer states.
            arriving: of them, gradients that come in the backward pass.
            frozen: the checkpoint's own weights are, and what is trained lies beside them.
            can_swap: frozen weights may live on the host.
            accumulate: accumulation steps, where all weights are trained and may live on the host.
            rank: of a block's adapters, in sum.
            latents: numbers of a sample's latents, padded.
        """
        width = config["num_attention_heads"] * config["attention_head_dim"]
        # Attention 4, feed-forward 8; two modulations of 6 outputs each; what is left is small.
        block = (12 * width**2 + 12 * width * config["time_embed_dim"]) * size
        rest = (config["text_embed_dim"] * width + 2 * width * config["time_embed_dim"]) * size
        # A model without rotary tables adds one of positions, which is held as the weights are.
        positions = 0 if config["use_rotary_positional_embeddings"] else tokens * width * (size if frozen else 4)
        cpu_trained = None
        if accumulate is not None:
            numbers = block // size
            cpu_trained = CpuTrained(
                block=block,
                states=numbers * 16,  # master, gradient, two moments, fp32
                host=numbers * (2 * size + 8 + (4 if accumulate > 1 else 0)),
            )
        return cls(
            layers=config["num_layers"],
            activation=batch * tokens * width * size,
            block=block if frozen else 0,
            rest=(rest if frozen else 0) + positions,
            trained=trained,
            arriving=arriving,
            attention=4 * batch * tokens**2 * width,
            products=24 * batch * tokens * width**2,
            can_swap=frozen and can_swap,
            cpu_trained=cpu_trained,
            frozen=frozen,
            adapters=4 * batch * tokens * rank,
            latents=4 * batch * latents,
        )
