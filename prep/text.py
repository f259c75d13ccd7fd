"""Captions as the transformer wants them: each distinct one encoded once, kept on disk, not in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cogcommon.checkpoint import Checkpoint

from .shards import disk_errors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CaptionFacts:
    tokens: int  # before truncation, with the end token
    truncated: bool


class TextEncoder:
    """T5 and its tokenizer, on a device, until the object goes."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._tokenizer = checkpoint.load_tokenizer()
        self._model = checkpoint.load_text_encoder(dtype).to(device)
        self._length = checkpoint.family.text_tokens
        self._device = device

    def encode(self, caption: str) -> tuple[torch.Tensor, CaptionFacts]:
        """The last hidden state (L, D), on the CPU.

        Padded to L and without an attention mask, as CogVideoX was trained: all L positions carry
        signal. One caption at a time: in a batch the last bits of a caption would depend on its
        neighbours, and with them on how the work was divided.
        """
        import torch

        tokens = len(self._tokenizer(caption).input_ids)
        padded = self._tokenizer(
            caption, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            text_LD = self._model(padded.input_ids.to(self._device))[0][0]
        return text_LD.cpu(), CaptionFacts(tokens, tokens > self._length)


class TextStore:
    """Embeddings by caption, in a scratch file that has no name: it goes with the process.

    Memory: about 150 bytes a distinct caption. Disk: one embedding each (1.8 MiB for T5-XXL in bf16).
    """

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by close()
        self._folder = folder
        self._facts: dict[str, tuple[int, CaptionFacts]] = {}
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None

    def fill(self, captions: Iterable[str], encoder: TextEncoder, done: Callable[[], None]) -> None:
        """Encode every caption that is not there yet; ``done`` is called after each.

        Raises:
            ShardError: the disk is full.
        """
        import torch

        for caption in dict.fromkeys(captions):
            if caption not in self._facts:
                text_LD, facts = encoder.encode(caption)
                self._shape, self._dtype = text_LD.shape, text_LD.dtype
                with disk_errors(self._folder):
                    self._file.write(text_LD.contiguous().view(torch.uint8).numpy().data)
                self._facts[caption] = (len(self._facts), facts)
            done()
        with disk_errors(self._folder):
            self._file.flush()

    def read(self, caption: str) -> tuple[torch.Tensor, CaptionFacts]:
        """An embedding (L, D) and what is known of its caption. Threads may read at once."""
        import torch

        assert self._shape is not None and self._dtype is not None
        index, facts = self._facts[caption]
        size = self._shape.numel() * self._dtype.itemsize
        data = bytearray(os.pread(self._file.fileno(), size, index * size))
        return torch.frombuffer(data, dtype=self._dtype).reshape(self._shape), facts

    def __enter__(self) -> TextStore:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()
