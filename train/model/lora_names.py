"""What others call the layers of a CogVideoX transformer in LoRA files; diffusers' names are ours.

* diffusers: ``transformer.<layer>``; some tools leave the prefix out.
* PEFT: ``base_model.model.<layer>``.
* ComfyUI: its own CogVideoX (``comfy/ldm/cogvideo/model.py``) has other names, ``diffusion_model.blocks.0.q``; its
  loader (``comfy/lora.py``) takes the name of any weight of its model without ``.weight``.
* kohya: ``lora_unet_`` and the name with ``_`` for every dot, diffusers' or ComfyUI's; the trainer of CogVideoX-Fun
  (VideoX-Fun) writes two ``_`` behind the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Form = Literal["diffusers", "PEFT", "ComfyUI", "kohya"]

COMFYUI = "diffusion_model."
_OF_A_BLOCK = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
PREFIX = "transformer."  # of a name in diffusers' own form
_PREFIXES: dict[Form, tuple[str, ...]] = {
    "diffusers": (PREFIX, ""),
    "PEFT": ("base_model.model.", f"base_model.model.{PREFIX}"),
    "ComfyUI": (COMFYUI,),
    "kohya": ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"),
}


def comfyui_name(layer: str) -> str:
    """What ComfyUI's own CogVideoX calls a layer of diffusers' transformer."""
    if block := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer):
        number, inside = block.groups()
        return f"{COMFYUI}blocks.{number}.{_OF_A_BLOCK.get(inside, inside)}"
    return COMFYUI + re.sub(r"^(time|ofs)_embedding\.", r"\1_embedding_", layer)


def spellings(layers: Iterable[str]) -> dict[str, tuple[str, Form]]:
    """Each name that a LoRA file may have for one of these layers, with the layer and whose name it is."""
    found: dict[str, tuple[str, Form]] = {}
    for layer in layers:
        for form, prefixes in _PREFIXES.items():
            for name in (layer, comfyui_name(layer).removeprefix(COMFYUI)):
                if form == "kohya":
                    name = name.replace(".", "_")
                elif form != "ComfyUI" and name != layer:
                    continue
                found.update({prefix + name: (layer, form) for prefix in prefixes if prefix + name not in found})
    return found
