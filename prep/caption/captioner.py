"""A vision-language model that describes clips: any that transformers' image-text-to-text classes load."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import quoted
from cogcommon.errors import ModelError
from cogcommon.files.memory import free_gpu_memory, free_host_memory
from cogcommon.libraries import quiet_libraries
from cogcommon.model.device import has_bf16, pick_device
from cogcommon.model.families import BUILTIN_NAMES, RANDOM
from cogcommon.model.hub import fetch
from cogcommon.words import first_line, in_bytes

from .frames import Seen

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
SMALL_MODEL = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_OTHER = f"--model {DEFAULT_MODEL} is one that can, {SMALL_MODEL} a small one"
_BESIDE = 3 << 29  # bytes on a GPU beside the weights: its libraries, and the tokens of some frames


class Captioner:
    """A model on this machine's GPU, or its CPU.

    Args:
        name: hub id, or a folder with weights, config and processor.

    Raises:
        ModelError: it cannot be had, cannot see, takes no instructions, or is too large for the memory here.
    """

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        quiet_libraries()
        self.name, self.device = name, pick_device()
        folder = _folder_of(name, _FILES)
        _check_sees(name, folder)
        self._processor = _processor(name, folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._dtype = self._dtype_for(size)
        self._check_room(size, torch.finfo(self._dtype).bits // 8)
        with self._room():
            try:
                model, report = AutoModelForImageTextToText.from_pretrained(
                    folder, dtype=self._dtype, use_safetensors=True, output_loading_info=True
                )
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise _unusable(name, folder, f"cannot be loaded: {first_line(error)}", "fetch it again") from error
            if lacking := sorted(report["missing_keys"]):
                raise _unusable(name, folder, f"lacks weights, the first of them {lacking[0]}", "fetch it again")
            self._model = model.eval().requires_grad_(False).to(self.device)
        self._takes_video = getattr(self._processor, "video_processor", None) is not None

    def describe(self, seen: Seen, instruction: str, *, tokens: int, seed: int = 0) -> tuple[str, bool]:
        """The model's answer, and whether it came to an end.

        Args:
            instruction: what is asked of it.
            tokens: of its own, at most, that it answers.
            seed: 0: the likeliest words; else words are drawn, so that a second caption of a clip is another one.

        Raises:
            ModelError: the GPU has too little memory.
        """
        import torch

        with self._room(), torch.inference_mode():
            inputs = self._inputs(seen, instruction).to(self.device, dtype=self._dtype)
            torch.manual_seed(seed)
            drawn = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if seed else _LIKELIEST
            answer = self._model.generate(**inputs, max_new_tokens=tokens, **drawn)[0]
        if not self._model.config.is_encoder_decoder:
            answer = answer[inputs["input_ids"].shape[1] :]
        return self._tokenizer.decode(answer, skip_special_tokens=True), len(answer) < tokens

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._processor, "tokenizer", self._processor)

    def _inputs(self, seen: Seen, instruction: str) -> Any:
        """What the model takes: frames as a video where its processor takes one, else as pictures; and the words."""
        frames = list(seen.frames_FHWC)
        as_video = self._takes_video and not seen.still
        shown = [{"type": "video"}] if as_video else [{"type": "image"}] * len(frames)
        asked = [{"role": "user", "content": [*shown, {"type": "text", "text": instruction}]}]
        text = self._processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        if not as_video:
            return self._processor(text=[text], images=frames, return_tensors="pt")
        metadata = {
            "fps": seen.fps,
            "total_num_frames": len(frames),
            "duration": len(frames) / seen.fps,
            "frames_indices": list(range(len(frames))),
            "height": frames[0].shape[0],
            "width": frames[0].shape[1],
        }
        return self._processor(
            text=[text], videos=[seen.frames_FHWC], video_metadata=[metadata], do_sample_frames=False,
            return_tensors="pt",
        )  # fmt: skip

    def _dtype_for(self, size: int) -> torch.dtype:
        """Half precision on a GPU, and on a CPU that computes in it or has no room for fp32.

        A sixth of the default model's layers on one core with AVX512_BF16, 613 tokens: bf16 8.0 s and 0.05 s a word,
        fp32 38 s and 0.43 s.

        Args:
            size: of the files, bytes.
        """
        import torch

        if self.device.type == "cuda":
            return torch.bfloat16 if has_bf16(self.device) else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() or 2.5 * size > free_host_memory() else torch.float32

    def _check_room(self, size: int, item_bytes: int) -> None:
        """Refuse weights that do not fit, before minutes go into reading them.

        Args:
            size: of the files, bytes; two a number, as such models are published.
        """
        needs = size * item_bytes // 2 + _BESIDE
        free = free_gpu_memory(self.device) if self.device.type == "cuda" else free_host_memory()
        if needs > free:
            raise self._too_large(f"it takes {in_bytes(needs)}, and {in_bytes(free)} are free")

    def _too_large(self, why: str) -> ModelError:
        where = "the GPU" if self.device.type == "cuda" else "this machine"
        return ModelError(
            f"{where} has too little memory for {self.name}: {why}",
            where=f"--model {quoted(self.name)}",
            fix=f"a smaller one, for example --model {SMALL_MODEL}; fewer --frames; or CUDA_VISIBLE_DEVICES= in front "
            "of the command, to run on the CPU",
        )

    @contextmanager
    def _room(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._too_large("it ran out of it") from error


# Against a model's own generation settings, which may draw words.
_LIKELIEST: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices of bf16 in hardware (AMX or AVX512_BF16); False where torch cannot say."""
    import torch

    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def ask_for(name: str) -> None:
    """See whether a model can be had, by its smallest file, before much is fetched or read.

    Raises:
        ModelError: it cannot.
    """
    _folder_of(name, ["config.json"])


def _folder_of(name: str, files: list[str]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.removeprefix(RANDOM) in BUILTIN_NAMES:
        raise ModelError(
            f"the built-in model {name} makes videos, and cannot see them",
            where=f"--model {name}",
            fix=f"write the captions yourself, into the blank lines of prompts.txt; {_OTHER}",
        )
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ModelError(f"no model {name!r}", where="it is neither a folder nor a hub id (owner/name)", fix=_OTHER)
    return fetch(
        name, files, kind="captioning model",
        instead="captions can also be written by hand, each into its blank line of prompts.txt, or come from files "
        "(`cogprep init`)",
    )  # fmt: skip


def _check_sees(name: str, folder: Path) -> None:
    """Refuse what is no model for pictures and words, by its config."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        why = "has no config.json that transformers knows"
        raise _unusable(name, folder, f"{why}: {first_line(error)}", _OTHER) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _unusable(name, folder, f"is no vision-language model ({config.model_type}): it cannot see", _OTHER)


def _processor(name: str, folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        if "torchvision" in str(error).lower() and importlib.util.find_spec("torchvision") is None:
            fix = "pip install torchvision, of the version that goes with your torch (or this project's extra: caption)"
            raise _unusable(name, folder, "takes videos, for which transformers needs torchvision", fix) from error
        raise _unusable(name, folder, f"cannot be used: {first_line(error)}", "install what it asks for") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last of a torchvision that misfits
        raise _unusable(name, folder, f"has no whole processor: {first_line(error)}", "fetch it again") from error
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
        raise _unusable(name, folder, "takes no instructions about pictures: it has no chat template", _OTHER)
    return processor


def _unusable(name: str, folder: Path, what: str, fix: str) -> ModelError:
    return ModelError(f"{name} {what}", where=str(folder), fix=fix)
