"""Loads what is trained, and its optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cogcommon.cli.progress import stage

from ..blocks.engine import BlockEngine
from ..distributed.optimizer import make_optimizer
from ..distributed.strategies import STRATEGIES
from ..distributed.strategy import Runtime
from ..memory.install import install
from ..memory.room import common_room
from ..runs.log import RunLog
from ..runs.run import Run

if TYPE_CHECKING:
    import torch


@stage("loading the transformer")
def load_model(run: Run, runtime: Runtime, log: RunLog) -> tuple[Any, Any, list[torch.nn.Parameter], BlockEngine]:
    """The transformer and its optimizer, ready to train, the weights that are trained, and what runs the blocks."""
    room = common_room(runtime.peers, runtime.device, runtime.dtype)
    transformer = run.checkpoint.load_transformer(run.method.weight_dtype(runtime.dtype, runtime.sharded))
    run.method.apply(transformer)
    if run.resume is None and (begun := run.method.start(transformer, run.checkpoint)):
        log.say(begun)
    transformer.train()
    engine = install(transformer, run, runtime, log, room)
    run.method.watch(runtime, transformer)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    offload_optimizer = STRATEGIES[run.strategy].offloads
    optimizer = make_optimizer(
        trained, run.settings, runtime.device, offload_optimizer=offload_optimizer, cpu_training=engine.cpu_training
    )
    model, optimizer = runtime.prepare(transformer, optimizer, saved_by=run.resume.state.world if run.resume else None)
    return model, optimizer, trained, engine
