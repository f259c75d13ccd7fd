"""What one process writes into a checkpoint: the trained weights, their moving average, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import downloaded

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights.safetensors"  # what is trained, under the transformer's own names
EMA = "average.safetensors"
OPTIMIZER = "optimizer.pt"
STATE_FILE = "state.json"  # beside them, of the whole run; by it a folder is known to be a checkpoint


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a checkpoint, live or copied; ``average`` has the names of ``weights``.

    ``state`` holds ``state_dict``s, of the optimizer and of fp16's gradient scaler.
    """

    weights: Mapping[str, torch.Tensor]
    average: Mapping[str, torch.Tensor] | None
    state: Mapping[str, Any]

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.weights.values()
        yield from (self.average or {}).values()
        yield from _tensors_in(self.state)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: of the files, and of host memory that a copy takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def plain(self) -> bool:
        """Whether a copy can be made: an 8-bit optimizer's states may be tensors of a type of their own."""
        import torch

        return all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in self.tensors)

    def copied(self) -> Snapshot:
        """The same in host memory, where no step changes it."""
        copies = iter(downloaded(list(self.tensors)))

        def take(_tensor: torch.Tensor) -> torch.Tensor:
            return next(copies)

        weights = {name: next(copies) for name in self.weights}
        average = None if self.average is None else {name: next(copies) for name in self.average}
        return Snapshot(weights, average, _replaced(self.state, take))

    def write(self, folder: Path) -> None:
        """Write the files; whoever wants them durable fsyncs them."""
        import safetensors.torch
        import torch

        for file, tensors in ((WEIGHTS, self.weights), (EMA, self.average)):
            if tensors is not None:
                named = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(named, folder / file)
        with (folder / OPTIMIZER).open("wb") as stream:  # a file that torch opens itself loses the system's error
            torch.save(self.state, stream)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """In the order of `_replaced`."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)


def _replaced(value: Any, new: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with other tensors in their places; nothing of the old is part of it."""
    import torch

    if isinstance(value, torch.Tensor):
        return new(value)
    if isinstance(value, Mapping):
        return {name: _replaced(part, new) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(part, new) for part in value)
    return value
