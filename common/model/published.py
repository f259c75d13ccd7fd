"""The five published checkpoints, as far as they are known without asking anybody: the configs of their parts.

What is only computed (does it fit, how long, how many tokens) needs no network and no file. The numbers are the
published ``config.json`` files'; where those of one family disagree (the size at which 1.5's positions end), the
native size stands, which every one of them takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .families import FAMILIES, Family
from .tiny import SCHEDULER

_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
_VAE = {"block_out_channels": [128, 256, 256, 512], "layers_per_block": 3, "norm_num_groups": 32}
_TIME_DIM = 512


def published(family: Family) -> Checkpoint:
    """A family's checkpoint by its hub id. Its configs are from our table; its weights are wherever they are."""
    latent = family.latent(family.native)
    transformer: dict[str, Any] = {
        "in_channels": family.in_channels,
        "out_channels": family.latent_channels,
        "num_layers": family.layers,
        "num_attention_heads": family.heads,
        "attention_head_dim": family.head_dim,
        "time_embed_dim": _TIME_DIM,
        "text_embed_dim": _T5_XXL["d_model"],
        "max_text_seq_length": family.text_tokens,
        "sample_frames": family.native.frames,
        "sample_height": latent.height,
        "sample_width": latent.width,
        "patch_size": family.patch,
        "patch_size_t": family.patch_t,
        "patch_bias": family.patch_t is None,
        "ofs_embed_dim": _TIME_DIM if family.ofs else None,
        "use_rotary_positional_embeddings": family.positions != "sincos",
        "use_learned_positional_embeddings": family.positions == "rope+learned",
    }
    vae = _VAE | {
        "latent_channels": family.latent_channels,
        "scaling_factor": family.scaling_factor,
        "invert_scale_latents": family.invert_image_scale,
        "sample_height": 480,
        "sample_width": 720,
    }
    return Checkpoint(
        name=family.hub_id, root=Path(family.hub_id), revision=None, family=family, transformer_config=transformer,
        vae_config=vae, text_config=_T5_XXL, scheduler_config=SCHEDULER | {"snr_shift_scale": family.snr_shift},
        on_hub=True,
    )  # fmt: skip


# How latents and noise are scaled: what a fine-tuned checkpoint has no reason to change, by part.
_SCALES = (
    ("vae", "scaling_factor"), ("vae", "invert_scale_latents"), ("scheduler", "snr_shift_scale"),
    ("scheduler", "beta_start"), ("scheduler", "beta_end"), ("scheduler", "rescale_betas_zero_snr"),
    ("scheduler", "num_train_timesteps"),
)  # fmt: skip


def scaled_otherwise(checkpoint: Checkpoint) -> list[str]:
    """A note where a checkpoint scales latents or noise otherwise than its family's published one; else nothing.

    Its own values count everywhere: latents are stored unscaled, and training, validation and `generate` read its JSON.
    """
    family, theirs = checkpoint.family, published(checkpoint.family)
    found = []
    for part, key in _SCALES:
        own, usual = (getattr(of, f"{part}_config").get(key, False) for of in (checkpoint, theirs))
        if own != usual and (key != "invert_scale_latents" or family.task == "i2v"):  # of image latents alone
            found.append(f"{part}/{key} {own} ({usual} in {family.hub_id})")
    if not found:
        return []
    return [
        f"{checkpoint.name} has values of its own, and encode, training and generate go by them: {', '.join(found)}; "
        f"if that is not meant, take the JSON of {family.hub_id}"
    ]


def known_checkpoint(name: str) -> Checkpoint:
    """A published checkpoint from our table, by its hub id (of any owner, for it has moved); any other is opened.

    Raises:
        ModelError: as `open_checkpoint`.
    """
    if not Path(name).expanduser().is_dir():
        for family in FAMILIES:
            if name.count("/") == 1 and name.split("/")[1].lower() == family.hub_id.split("/")[1].lower():
                return published(family)
    return open_checkpoint(name)
