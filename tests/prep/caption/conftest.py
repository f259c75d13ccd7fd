"""Vision-language models of real classes, small and random, with processors made here; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<|end|>", "<|start|>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>"]
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}BEGIN<{{ c.type }}>END{% endif %}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_WORDS = "a red ring moves to the left over warm sand while the camera stands still. the blue square grows slowly."


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    return _make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    pytest.importorskip("torchvision")
    return _make_qwen(tmp_path_factory.mktemp("qwen"))


def _make_llava(folder: Path) -> Path:
    """A LLaVA: it takes pictures, and needs no torchvision."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = _tokenizer(image_token="<image>")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("BEGIN", "").replace("END", ""),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            eos_token_id=0, pad_token_id=0,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    return _save(LlavaForConditionalGeneration, config, processor, folder)


def _make_qwen(folder: Path, **text: int) -> Path:
    """A Qwen2.5-VL, the default model's class: it takes videos, for which transformers needs torchvision.

    Args:
        text: of its text_config; small where it says nothing.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = _tokenizer(image_token="<image>", video_token="<video>")
    template = _TEMPLATE.replace("BEGIN", "<|vision_start|>").replace("END", "<|vision_end|>")
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), chat_template=template)
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | text  # fmt: skip
    third = shape["hidden_size"] // shape["num_attention_heads"] // 8
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=shape | {
            "vocab_size": len(words), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2 * third, third, third],
            },
        },
        vision_config=vision | {"out_hidden_size": shape["hidden_size"]},
        **{f"{name.strip('<|>')}_token_id": words.convert_tokens_to_ids(name) for name in _SPECIAL[2:]},
    )  # fmt: skip
    return _save(Qwen2_5_VLForConditionalGeneration, config, processor, folder)


def _tokenizer(**more: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([_WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", padding_side="left",
        extra_special_tokens=more,
    )  # fmt: skip


def _save(cls, config, processor, folder: Path) -> Path:
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():  # of weights so small every token is about as likely; of these it says one thing, and says on
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
