"""The built-in model: a complete small CogVideoX that needs no download.

``--model tiny`` (and four more forms, one a family) is written once into the
user's cache as an ordinary diffusers folder: tokenizer, T5 encoder, VAE,
transformer, scheduler, in the real classes. From there on it is loaded like
any other checkpoint. VAE and transformer are trained and generate drawn shapes
that move (``builtin/README.md`` says how they were made); the T5 encoder is
random, and the same on every machine: each tensor comes from a generator seeded
with its own name. ``random-tiny``, ... are the same forms smaller and all random,
for tests where only shapes matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..libraries import quiet_libraries
from .families import FAMILIES, RANDOM, Family, Resolution

if TYPE_CHECKING:
    import torch

NATIVE = Resolution(17, 64, 96)
_TEXT_DIM = 64
# 1.5 cuts its positions from a table of this many latents; large enough for 49x480x720.
_SLICE_SAMPLE = (96, 170)

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": FAMILIES[0].latent_channels,  # of all families
    "norm_num_groups": 8,
    "sample_height": 480,  # tile sizes derive from these; small ones break shapes
    "sample_width": 720,
}
_T5: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": _TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 4,
    "time_embed_dim": 64,
    "text_embed_dim": _TEXT_DIM,
}
# As small as can be: a LoRA step at 49x480x720 takes 2.5 s on two cores.
_RANDOM_TRANSFORMER = _TRANSFORMER | {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def cache_root() -> Path:
    """Where built-in models are kept: ``$COGTUNE_CACHE``, else the user's cache folder."""
    if explicit := os.environ.get("COGTUNE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogtune"


def builtin_folder(name: str) -> Path:
    """The diffusers folder of a built-in form; made at first use, then only looked up.

    Args:
        name: ``tiny``, ``tiny-2b``, ``tiny-i2v``, ``tiny-1.5`` or ``tiny-1.5-i2v``; or ``random-`` and one of these.
    """
    family = next(family for family in FAMILIES if family.builtin == name.removeprefix(RANDOM))
    trained = {} if name.startswith(RANDOM) else _trained(family)
    # All that goes in names the folder, so that a newer version of this file never meets old weights.
    parts = [str(family).encode(), Path(__file__).read_bytes(), _file("tiny_vocab.json").read_bytes()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in [*parts, *trained.values()])).hexdigest()
    folder = cache_root() / f"{name}-{digest[:12]}"
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _write(family, scratch, trained, _RANDOM_TRANSFORMER if name.startswith(RANDOM) else _TRANSFORMER)
        try:
            scratch.rename(folder)  # whole or not at all; another process may have been first
        except OSError:
            if not (folder / "model_index.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _file(name: str) -> Traversable:
    """A file of this package.

    tiny_vocab.json: 2,000 pieces learned with tokenizers' UnigramTrainer from the docstrings of
    Python 3.11's standard library and a list of words for scenes; the captions of real data sets,
    500 to 600 characters long, take 190 to 220 of them.
    """
    return resources.files(__package__).joinpath(name)


def _trained(family: Family) -> dict[str, bytes]:
    """The weights that this package brings, by component."""
    files = {"vae": "vae", "transformer": family.builtin}
    return {part: _file(f"builtin/{name}.safetensors").read_bytes() for part, name in files.items()}


def _write(family: Family, folder: Path, trained: dict[str, bytes], transformer_config: dict[str, Any]) -> None:
    quiet_libraries()
    import diffusers
    import safetensors.torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [(piece, score) for piece, score in json.loads(_file("tiny_vocab.json").read_bytes())]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=family.text_tokens)

    vae = diffusers.AutoencoderKLCogVideoX(
        scaling_factor=family.scaling_factor, invert_scale_latents=family.invert_image_scale, **VAE_CONFIG
    )
    text_encoder = T5EncoderModel(T5Config(**_T5))
    height, width = _SLICE_SAMPLE if family.patch_t else family.latent(NATIVE)[2:]
    transformer = diffusers.CogVideoXTransformer3DModel(
        in_channels=family.in_channels,
        out_channels=family.latent_channels,
        sample_height=height,
        sample_width=width,
        sample_frames=NATIVE.frames,
        patch_size=family.patch,
        patch_size_t=family.patch_t,
        patch_bias=family.patch_t is None,
        ofs_embed_dim=_TEXT_DIM if family.ofs else None,
        max_text_seq_length=family.text_tokens,
        use_rotary_positional_embeddings=family.positions != "sincos",
        use_learned_positional_embeddings=family.positions == "rope+learned",
        **transformer_config,
    )
    for model in (vae, text_encoder, transformer):
        _fill(model)
    for name, model in {"vae": vae, "transformer": transformer}.items():
        if name in trained:
            model.load_state_dict(safetensors.torch.load(trained[name]))
    scheduler_class = diffusers.CogVideoXDDIMScheduler if family.ddim else diffusers.CogVideoXDPMScheduler
    scheduler = scheduler_class(snr_shift_scale=family.snr_shift, **SCHEDULER)
    pipeline_class = diffusers.CogVideoXImageToVideoPipeline if family.task == "i2v" else diffusers.CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.save_pretrained(folder)


def _fill(model: torch.nn.Module) -> None:
    """Matrices and kernels normal with variance 1/fan_in, norms one, biases zero."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
            generator = torch.Generator().manual_seed(seed)
            if tensor.ndim >= 2:
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values / math.sqrt(math.prod(tensor.shape[1:])))
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
