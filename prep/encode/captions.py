"""T5 embeddings of captions: each distinct caption is encoded once, and kept on disk instead of in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cogcommon.model.text_encoder import CaptionFacts, TextEncoder

from ..store.locks import shard_disk_errors

if TYPE_CHECKING:
    import torch


class TextStore:
    """Embeddings by caption, in a scratch file that has no name: it goes with the process.

    Memory: about 150 bytes a distinct caption. Disk: one embedding each (1.8 MiB for T5-XXL in bf16).
    """

    def __init__(self, folder: Path) -> None:
        with shard_disk_errors(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by close()
        self._folder = folder
        self._facts: dict[str, tuple[int, CaptionFacts]] = {}
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None

    def fill(self, captions: Iterable[str], encoder: TextEncoder, done: Callable[[], None]) -> None:
        """Encode every caption that is not there yet; ``done`` is called after each of them.

        Raises:
            DiskError: the disk is full.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._facts]
        before: Callable[[], None] | None = None  # a batch is written while the device is at the next
        for start in range(0, len(new), encoder.batch):
            batch = new[start : start + encoder.batch]
            after = partial(self._add, batch, encoder.start(batch), done)
            if before is not None:
                before()
            before = after
        if before is not None:
            before()
        with shard_disk_errors(self._folder):
            self._file.flush()

    def _add(
        self,
        captions: Sequence[str],
        finish: Callable[[], list[tuple[torch.Tensor, CaptionFacts]]],
        done: Callable[[], None],
    ) -> None:
        import torch

        for caption, (text_LD, facts) in zip(captions, finish(), strict=True):
            self._shape, self._dtype = text_LD.shape, text_LD.dtype
            with shard_disk_errors(self._folder):
                self._file.write(text_LD.contiguous().view(torch.uint8).numpy().data)
            self._facts[caption] = (len(self._facts), facts)
            done()

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
