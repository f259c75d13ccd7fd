"""T5 embeddings of texts: what a CogVideoX model reads of a caption or a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli.progress import say
from ..files.memory import free_gpu_memory
from ..words import in_gib
from .checkpoint import Checkpoint
from .copies import download, move

if TYPE_CHECKING:
    import torch


_GPU_BATCH = 8  # captions
# What a batch of T5-XXL takes beside the weights: CUDA's libraries, and the middle of a feed-forward layer.
_BESIDE = 1 << 30


@dataclass(frozen=True, slots=True)
class CaptionFacts:
    tokens: int  # before truncation, with the end token
    truncated: bool


class TextEncoder:
    """T5 and its tokenizer, on a device, until the object goes.

    On a GPU that is too small for the weights they stay in host memory, and a layer at a time comes over.

    Args:
        meanwhile: called while the weights go to a GPU (`copies.move`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self._tokenizer = checkpoint.load_tokenizer()
        self._model = checkpoint.load_text_encoder(dtype)
        size = sum(parameter.nbytes for parameter in self._model.parameters())
        free = _free(device)
        self._whole = size + _BESIDE <= free
        if self._whole:
            move(self._model, device, meanwhile=meanwhile)
        else:
            from accelerate import cpu_offload

            say(f"T5 takes {in_gib(size)} and the GPU has {in_gib(free)} free: it gets one layer at a time")
            cpu_offload(self._model, device)
        self._length = checkpoint.family.text_tokens
        self._device = device
        # A caption alone reads 9.5 GB of weights on the GPU, which takes longer than its arithmetic.
        self.batch = _GPU_BATCH if device.type == "cuda" else 1

    def make_room(self) -> None:
        """Leave the GPU; the weights stay in host memory, for `come_back`."""
        if self._whole:
            self._model.to("cpu")

    def come_back(self) -> None:
        """Go to the device again, after `make_room`."""
        if self._whole:
            self._model.to(self._device)

    def encode(self, caption: str) -> tuple[torch.Tensor, CaptionFacts]:
        """One caption; see `encode_batch`."""
        return self.encode_batch([caption])[0]

    def encode_batch(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, CaptionFacts]]:
        """The last hidden state (L, D) of each caption, on the CPU; at most ``batch`` captions.

        Padded to L and without an attention mask, as CogVideoX was trained: all L positions carry
        signal. The model always sees ``batch`` rows: how many captions are left would change the
        kernels, and with them the last bits. On a CPU that is one row, and the bits are the same
        however the work is divided.
        """
        return self.start(captions)()

    def start(self, captions: Sequence[str]) -> Callable[[], list[tuple[torch.Tensor, CaptionFacts]]]:
        """Begin with captions; what comes back waits for the device, and gives what `encode_batch` does."""
        import torch

        assert 0 < len(captions) <= self.batch
        filled = [*captions] + [captions[0]] * (self.batch - len(captions))
        padded = self._tokenizer(
            filled, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            text_BLD = download(self._model(padded.input_ids.to(self._device))[0])
        there = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

        def finish() -> list[tuple[torch.Tensor, CaptionFacts]]:
            tokens = [len(self._tokenizer(caption).input_ids) for caption in captions]
            if there is not None:
                there.synchronize()
            return [
                (text_LD, CaptionFacts(count, count > self._length))
                for text_LD, count in zip(text_BLD, tokens, strict=False)
            ]

        return finish


def _free(device: torch.device) -> float:
    """Bytes that weights may take of a device."""
    return free_gpu_memory(device) if device.type == "cuda" else float("inf")
