"""DeepSpeed's files: written so that an error keeps its reason, read without running anything that they ask for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# What DeepSpeed's files hold beside tensors and plain values: an enumeration, and classes of numbers.
_KNOWN = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Files(CheckpointEngine):  # type: ignore[misc]
    """What DeepSpeed's engine writes and reads its files with.

    After they have written, its processes wait for each other. So ``fault``, the first error, waits until they have
    met: one that were raised at once would leave the others waiting.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.fault: Exception | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        self.fault = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._waiting():
            Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        with self._waiting(), Path(path).open("wb") as stream:  # in files that torch opens, errors are lost
            torch.save(state_dict, stream)
            stream.flush()
            os.fsync(stream.fileno())  # here, where it was written: process 0, which seals the checkpoint, may not

    def load(self, path: str, map_location: Any = None) -> Any:
        with numbers_only():
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return self.fault is None

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.fault = self.fault or error


@contextlib.contextmanager
def numbers_only() -> Iterator[None]:
    """Have `torch.load` build tensors, plain values and what is known to be harmless, and run nothing.

    DeepSpeed calls it with ``weights_only=False``, which runs whatever a file asks for.

    Raises:
        pickle.UnpicklingError: a file that is read in it asks for more.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        # One of these may stand inside another, and torch, when it leaves the inner one, would forget for both.
        known = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([one for one in _KNOWN if one not in known]):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
