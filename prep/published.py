"""The five published checkpoints as our table has them: for questions about sizes and number types, no file is read."""

from __future__ import annotations

from pathlib import Path

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import FAMILIES


def published_geometry(name: str) -> Checkpoint | None:
    """A published checkpoint by its hub id, without a revision, weights or network; None for any other name.

    Its configs hold what says how large things are, and no more.
    """
    family = next((family for family in FAMILIES if family.hub_id == name), None)
    if family is None or Path(name).is_dir():
        return None
    height, width = family.sample
    return Checkpoint(
        name=name,
        root=Path(name),
        revision=None,
        family=family,
        transformer_config={
            "in_channels": family.in_channels,
            "out_channels": family.latent_channels,
            "num_layers": family.layers,
            "num_attention_heads": family.heads,
            "attention_head_dim": family.head_dim,
            "patch_size": family.patch,
            "patch_size_t": family.patch_t,
            "max_text_seq_length": family.text_tokens,
            "text_embed_dim": family.text_dim,
            "sample_frames": family.native.frames,
            "sample_height": height,
            "sample_width": width,
        },
        vae_config={"scaling_factor": family.scaling_factor},
        text_config={"d_model": family.text_dim},
        scheduler_config={},
        on_hub=True,
    )
