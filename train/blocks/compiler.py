"""torch.compile for the blocks, and the time that it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from cogcommon.libraries import importing

from .block import BlockFunction

# One function serves all blocks, but is compiled for each bucket. torch's own limit is 8.
_VARIANTS = 128


def compiled(function: BlockFunction) -> BlockFunction:
    """The function under torch.compile as one graph, compiled at the first call with each shape."""
    import torch
    import torch._dynamo

    # Under DDP torch would cut a graph where a bucket of gradients is full, and refuses one with a checkpoint inside
    # (torch 2.11, pytorch/pytorch#104674). Ours is one block, whose gradients DDP sends as soon as they are there.
    torch._dynamo.config.optimize_ddp = False
    # It asks, once, for a region without in-place operations; ours has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 4 * _VARIANTS
    )
    return torch.compile(function, fullgraph=True, dynamic=False, options=_options())


def import_compiler() -> None:
    """What the first compilation imports: a second on an H200's host."""
    with suppress(Exception), importing():  # whoever compiles says what is wrong
        import_module("torch._inductor.compile_fx")


def _options() -> dict[str, Any]:
    """One fusion of torch 2.10 to 2.13 gives wrong gradients of shifts and scales that are parts of one tensor, as a
    block's are, over 16,000 tokens or so (pytorch/pytorch#193061). On an H200, torch 2.11, those of ``norm1.linear``
    were off by 69 to 165%, or not finite; a LoRA asks for none of them.
    """
    import torch._inductor.config as inductor

    return {"triton.mix_order_reduction": False} if hasattr(inductor.triton, "mix_order_reduction") else {}


def end_workers() -> None:
    """Have the compiler's processes end, in a thread: nothing more will be compiled in this run.

    Until they have, this process's own end would wait for them, for two seconds.
    """
    import sys
    import threading

    # Private to torch; where they are not so, the processes end with this one.
    module: Any = sys.modules.get("torch._inductor.async_compile")
    pools, begin_anew = [*getattr(module, "_pool_set", ())], getattr(module, "after_fork", None)
    if not pools or begin_anew is None:
        return
    begin_anew()  # a run that follows in this process would else give its work to those that end, and compile nothing

    def work() -> None:
        for pool in pools:
            with suppress(Exception):  # it then ends with this process
                pool.shutdown()

    threading.Thread(target=work, daemon=True, name="cogtrain-compiler").start()


def seconds_so_far() -> float:
    """Wall time that this process has spent compiling."""
    import sys

    # Private to torch; where it is not, compiling is counted with the step that it happens in.
    spent: Callable[[], dict[str, float]] = getattr(
        sys.modules.get("torch._dynamo.utils"), "calculate_time_spent", dict
    )
    return float(spent().get("total_wall_time", 0.0))


def is_compilers(error: Exception) -> bool:
    """Whether an error comes from the compiler, and not from the compiled code."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def in_one_line(error: Exception) -> str:
    """The first line of the inner error; a compiler's own message goes on for pages."""
    error = getattr(error, "inner_exception", error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
