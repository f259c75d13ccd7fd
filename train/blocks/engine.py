"""Applies a plan to a diffusers transformer by replacing its blocks' forward methods, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..offload.activations import Parked, Parking
from ..offload.block_swap import Reference, Streaming
from ..offload.cpu_training import HostTraining
from .block import BlockFunction, Layout, block_function
from .checkpointing import Keep, keeping
from .compiler import compiled, in_one_line, is_compilers
from .plan import Plan
from .trial import attention_kernel, qk_norm_works

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel


class Engine:
    """Runs the blocks of one transformer as a plan says.

    Names, parameters and the state dict of the transformer stay as they are.
    Where the plan streams, the blocks' frozen parameters stay in host memory; of the blocks that
    it trains on the host all parameters do, and ``hosted`` has them.

    Args:
        transformer: on the CPU, adapters attached, what is trained chosen.
        dtype: that the blocks compute in.
        lent: DeepSpeed places the weights, and gathers a block's for as long as it computes (`zero.gather_by_block`).
            What autograd keeps are the parameters themselves, whose memory is given back in between; views of them are
            computed again.
        say: is told when the compiler fails on the blocks, after which they run uncompiled.
    """

    def __init__(
        self, transformer: CogVideoXTransformer3DModel, plan: Plan, device: torch.device, dtype: torch.dtype,
        say: Callable[[str], None] = print, *, lent: bool = False,
    ) -> None:  # fmt: skip
        blocks = transformer.transformer_blocks
        self.plan = plan
        self._device = device
        self._dtype = dtype
        self._say = say
        self.kernel = attention_kernel(device, dtype, plan.compiled)
        self.fused = plan.compiled and qk_norm_works(device, dtype)
        self._functions: dict[tuple[Layout, Keep | None, bool], BlockFunction] = {}
        self._layouts = [Layout.of(block) for block in blocks]
        self._weights = [tuple(block.parameters()) for block in blocks]
        self._parking = Parking(device) if plan.park else None
        # The last blocks: their gradients come first, and the next step needs their weights last.
        self._first_moved = len(blocks) - plan.train_on_host if plan.train_on_host else 0
        self.hosted: HostTraining | None = None
        self._streaming: Streaming | None = None
        moved: list[list[torch.nn.Parameter]] = []
        if plan.train_on_host:
            moved = [list(weights) for weights in self._weights[self._first_moved :]]
            self.hosted = HostTraining(moved, device, dtype)
            self._streaming = self.hosted.streaming
        elif plan.stream:
            moved = [[p for p in weights if not p.requires_grad] for weights in self._weights]
            self._streaming = Streaming(moved, device) if all(moved) else None
        streamed = {id(p) for weights in moved for p in weights} if self._streaming else set()
        if not lent:
            _move(transformer, device, stay=streamed)
        if streamed:
            # What DDP would otherwise copy from rank 0 and refuse to see on two devices.
            transformer._ddp_params_and_buffers_to_ignore = [
                name for name, parameter in transformer.named_parameters() if id(parameter) in streamed
            ]
        for index, block in enumerate(blocks):
            block.forward = self._forward_of(index, block)

    def park_all(self) -> None:
        """Park small tensors too, so that a small model exercises the same code."""
        if self._parking:
            self._parking = Parking(self._device, smallest=1)

    def unlock(self) -> None:
        """Give back the host memory that is locked for streaming. The transformer can no longer be run."""
        if self._streaming:
            self._streaming.unlock()

    def _forward_of(self, index: int, block: torch.nn.Module) -> Callable[..., Any]:
        def forward(
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            temb: torch.Tensor,
            image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
            attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert not attention_kwargs, attention_kwargs
            tables = image_rotary_emb or ()
            return self._run(index, block.training, hidden_states, encoder_hidden_states, temb, *tables)

        return forward

    def _run(
        self, index: int, training: bool, video: torch.Tensor, text: torch.Tensor, temb: torch.Tensor,
        *tables: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        import torch

        training = training and torch.is_grad_enabled()
        if training and index == 0:
            # The first block's inputs are slices of one tensor and, under LoRA, need no gradient. Made contiguous and
            # differentiable, like those of every later block, they use the same compiled function.
            video, text = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (video, text))
            video, text = (tensor if tensor.requires_grad else tensor.requires_grad_() for tensor in (video, text))
        inputs = (video.to(self._dtype), text.to(self._dtype), temb.to(self._dtype), *tables)
        try:
            return self._compute(index, training, inputs, rotary=bool(tables))
        except RuntimeError as error:
            # Compiling failed before the block computed or kept anything, so running it again is safe.
            if not (self.plan.compiled and is_compilers(error)):
                raise
            self.plan = self.plan.uncompiled
            self._functions.clear()
            self._say(f"note: blocks are not compiled, a step takes longer and more memory ({in_one_line(error)})")
            return self._compute(index, training, inputs, rotary=bool(tables))

    def _compute(
        self, index: int, training: bool, inputs: tuple[torch.Tensor, ...], rotary: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        function = self._function(index, training, rotary)
        weights = self._weights_of(index, training)
        with torch.autocast(self._device.type, enabled=False):  # the function itself says what runs in which type
            if not training or not (self._parking or self._streaming):
                return function(*inputs, *weights)
            if self._parking:
                self._parking.begin(index)
            stay = {tensor.data_ptr() for tensor in (*inputs[2:], *self._weights[index])}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: self._pack(index, tensor, stay), lambda kept: self._unpack(index, kept)
            ):
                return function(*inputs, *weights)

    def _function(self, index: int, training: bool, rotary: bool) -> BlockFunction:
        """A block's function, made once. Only training's is compiled: validation has too many shapes."""
        layout = self._layouts[index]
        keep = self.plan.keep[index] if training else None
        key = (layout, keep, rotary)
        if key not in self._functions:
            function = block_function(
                layout, self.kernel, rotary=rotary, training=training, chunks=self.plan.chunks,
                fused=self.fused and training,
            )  # fmt: skip
            if keep is not None:
                linears = (*layout.modulate, *layout.qkv, layout.out, layout.up, layout.down)
                function = keeping(function, keep, dropout=any(linear.dropout for linear in linears))
                if self.plan.compiled:
                    function = compiled(function)
            self._functions[key] = function
        return self._functions[key]

    def _weights_of(self, index: int, training: bool) -> tuple[torch.Tensor, ...]:
        moved = index - self._first_moved
        if self._streaming is None or moved < 0:
            return self._weights[index]
        if self.hosted:
            return tuple(self.hosted.take(moved, then=moved + 1, training=training))
        streamed = iter(self._streaming.take(moved, then=moved + 1))
        return tuple(weight if weight.requires_grad else next(streamed) for weight in self._weights[index])

    def _pack(self, index: int, tensor: torch.Tensor, stay: set[int]) -> torch.Tensor | Parked | Reference:
        if self._streaming and (reference := self._streaming.refer(tensor)):
            return reference
        if self._parking and tensor.data_ptr() not in stay and self._parking.takes(tensor):
            return self._parking.park(index, tensor)
        return tensor

    def _unpack(self, index: int, kept: torch.Tensor | Parked | Reference) -> torch.Tensor:
        if self._parking:
            self._parking.fetch(index)
        tensor = kept
        if isinstance(kept, Parked):
            assert self._parking
            tensor = self._parking.take(kept)
        elif isinstance(kept, Reference):
            assert self._streaming
            tensor = self._streaming.resolve(kept, then=index - self._first_moved - 1)
        if self._parking:
            self._parking.fetch(index - 1)
        return tensor  # type: ignore[return-value]


def _move(transformer: torch.nn.Module, device: torch.device, stay: set[int]) -> None:
    """Move all parameters and buffers to the device, but for the parameters in ``stay`` (by id)."""
    import torch

    with torch.no_grad():
        for module in transformer.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in stay:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
