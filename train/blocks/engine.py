"""Applies a plan to a diffusers transformer by replacing its blocks' forward methods, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import move

from ..offload.activations import ActivationOffload, Offloaded
from ..offload.block_swap import BlockSwap, SwappedView
from ..offload.cpu_training import CpuTraining
from .block import BlockFunction, Layout, block_function
from .checkpointing import Checkpointing, with_checkpointing
from .compiler import compiled, import_compiler, in_one_line, is_compilers
from .plan import BlockPlan
from .trial import attention_kernel, forget_trials, qk_norm_fault

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel


class BlockEngine:
    """Runs the blocks of one transformer as a plan says.

    Names, parameters and the state dict of the transformer stay as they are.
    Where the plan swaps blocks, their frozen parameters stay in host memory; of the blocks that
    it trains on the host all parameters do, and ``cpu_training`` has them.

    Args:
        transformer: on the CPU, adapters attached, what is trained chosen.
        dtype: that the blocks compute in.
        partitioned: the parameters are partitioned by DeepSpeed (ZeRO-3), which gathers a block's while it computes
            (`zero.gather_by_block`) and frees them after it. Autograd then saves the parameters themselves; views of
            them are computed again.
        say: is told what costs speed: that the compiler fails on the blocks, after which they run uncompiled, or ours
            on the norm of queries and keys.
    """

    def __init__(
        self, transformer: CogVideoXTransformer3DModel, plan: BlockPlan, device: torch.device, dtype: torch.dtype,
        say: Callable[[str], None] = print, *, partitioned: bool = False,
    ) -> None:  # fmt: skip
        blocks = transformer.transformer_blocks
        self.plan = plan
        self._device = device
        self._dtype = dtype
        self._say = say
        self.kernel = attention_kernel(device, dtype, plan.compiled)
        self.fused = False
        if plan.compiled and device.type == "cuda":
            fault = qk_norm_fault(device, dtype)
            self.fused = fault is None
            if fault:
                say(f"note: the compiler makes the kernels of the norm of queries and keys; ours do not work ({fault})")
        self._functions: dict[tuple[Layout, Checkpointing | None, bool], BlockFunction] = {}
        self._layouts = [Layout.of(block) for block in blocks]
        self._weights = [tuple(block.parameters()) for block in blocks]
        self._offload = ActivationOffload(device) if plan.offload_activations else None
        # The last blocks: their gradients come first, and the next step needs their weights last.
        self._first_moved = len(blocks) - plan.train_on_cpu if plan.train_on_cpu else 0
        self.cpu_training: CpuTraining | None = None
        self._block_swap: BlockSwap | None = None
        moved: list[list[torch.nn.Parameter]] = []
        if plan.train_on_cpu:
            moved = [list(weights) for weights in self._weights[self._first_moved :]]
            self.cpu_training = CpuTraining(moved, device, dtype)
            self._block_swap = self.cpu_training.block_swap
        elif plan.swap_blocks:
            moved = [[p for p in weights if not p.requires_grad] for weights in self._weights]
            self._block_swap = BlockSwap(moved, device) if all(moved) else None
        swapped = {id(p) for weights in moved for p in weights} if self._block_swap else set()
        if not partitioned:
            move(transformer, device, swapped, import_compiler if plan.compiled else lambda: None)
        if swapped:
            # What DDP would otherwise copy from rank 0 and refuse to see on two devices.
            transformer._ddp_params_and_buffers_to_ignore = [
                name for name, parameter in transformer.named_parameters() if id(parameter) in swapped
            ]
        for index, block in enumerate(blocks):
            block.forward = self._forward_of(index, block)

    def offload_all(self) -> None:
        """Offload small tensors, too, so that a small model exercises the same code."""
        if self._offload:
            self._offload = ActivationOffload(self._device, smallest=1)

    def unlock(self) -> None:
        """Give back the host memory that is locked for block swapping. The transformer can no longer be run."""
        if self._block_swap:
            self._block_swap.unlock()

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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a kernel raises whose libraries have changed since it was tried
            forget_trials(self._device)
            # Compiling failed before the block computed or kept anything, so running it again is safe.
            if not (self.plan.compiled and is_compilers(error)):
                raise
            self.plan, self.fused = self.plan.uncompiled, False  # the compiler makes those kernels, too
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
            if not training or not (self._offload or self._block_swap):
                return function(*inputs, *weights)
            if self._offload:
                self._offload.begin(index)
            stay = {tensor.data_ptr() for tensor in (*inputs[2:], *self._weights[index])}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: self._pack(index, tensor, stay), lambda kept: self._unpack(index, kept)
            ):
                return function(*inputs, *weights)

    def _function(self, index: int, training: bool, rotary: bool) -> BlockFunction:
        """A block's function, made once. Only training's is compiled: validation has too many shapes."""
        layout = self._layouts[index]
        policy = self.plan.checkpointing[index] if training else None
        key = (layout, policy, rotary)
        if key not in self._functions:
            function = block_function(
                layout, self.kernel, rotary=rotary, training=training, chunks=self.plan.chunks,
                fused=self.fused and training,
            )  # fmt: skip
            if policy is not None:
                linears = (*layout.modulate, *layout.qkv, layout.out, layout.up, layout.down)
                function = with_checkpointing(function, policy, dropout=any(linear.dropout for linear in linears))
                if self.plan.compiled:
                    function = compiled(function)
            self._functions[key] = function
        return self._functions[key]

    def _weights_of(self, index: int, training: bool) -> tuple[torch.Tensor, ...]:
        moved = index - self._first_moved
        if self._block_swap is None or moved < 0:
            return self._weights[index]
        if self.cpu_training:
            return tuple(self.cpu_training.take(moved, then=moved + 1, training=training))
        swapped = iter(self._block_swap.take(moved, then=moved + 1))
        return tuple(weight if weight.requires_grad else next(swapped) for weight in self._weights[index])

    def _pack(self, index: int, tensor: torch.Tensor, stay: set[int]) -> torch.Tensor | Offloaded | SwappedView:
        if self._block_swap and (reference := self._block_swap.refer(tensor)):
            return reference
        if self._offload and tensor.data_ptr() not in stay and self._offload.takes(tensor):
            return self._offload.offload(index, tensor)
        return tensor

    def _unpack(self, index: int, kept: torch.Tensor | Offloaded | SwappedView) -> torch.Tensor:
        if self._offload:
            self._offload.fetch(index)
        tensor = kept
        if isinstance(kept, Offloaded):
            assert self._offload
            tensor = self._offload.take(kept)
        elif isinstance(kept, SwappedView):
            assert self._block_swap
            tensor = self._block_swap.resolve(kept, then=index - self._first_moved - 1)
        if self._offload:
            self._offload.fetch(index - 1)
        return tensor  # type: ignore[return-value]
