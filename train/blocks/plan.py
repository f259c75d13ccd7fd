"""What a step needs, by arithmetic, and the plan that fits: what is kept, what is moved to the host.

Bytes are predicted from shapes alone, before any weight is on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from cogcommon.model.families import PATCH, Resolution
from cogcommon.words import counted

from .checkpointing import ACTIVATIONS, ALL_UNCOMPILED, Keep

Memory = Literal["fast", "auto", "low"]

_GIB = 2**30
# Of free memory, what a plan may fill: fragments, the CUDA libraries' workspaces and validation take the rest.
USABLE = 0.88
_HOST_USABLE = 0.8  # of host memory; what is locked cannot be swapped, and the batches in the making need some
# Activations on the GPU, beside what is kept, as one block's attention goes backward; that is when most is. Compiled:
# fitted to LoRAs of 5B, 1.5 and 2B (H200, torch 2.11). Plain is an estimate: what such a block keeps (17), gradients.
_WORK_COMPILED, _WORK_PLAIN = 12.3, 26.0
# Without gradients: in and out of the feed-forward's middle, and what a block computes them from. 5B with guidance at
# 49x480x720, in diffusers' own blocks, took 3 GiB: 14.7 activations of the two samples.
FORWARD = 15
# Where the attention is recomputed its inputs are there as the feed-forward goes backward; seen in one run, row 13.
_WORK_ATTENTION_AGAIN = 6.0
_PARKED_BESIDE = 8.2  # of what is parked, on its way out or back, beside one block's; fitted to the same runs
_HOSTED_IN_FLIGHT = 2  # of each of two blocks: its weights, its gradients
_AS_FAST = 1.1  # times the seconds of the fastest: no reason to move more memory
_CHUNKS = 4  # of the feed-forward layer, where memory counts: its middle is four activations wide


@dataclass(frozen=True)
class Hosted:
    """Bytes of one block whose weights are trained in host memory (``host_training``); masters are there already.

    ``block`` are its weights as computed, on the GPU; ``states`` what it would take there if it were trained there;
    ``host`` copies, gradients, their sums and moments.
    """

    block: int
    states: int
    host: int


@dataclass(frozen=True)
class Load:
    """What a step works on, in bytes, but for what a block's forward pass multiplies.

    ``attention`` and ``products`` are its floating-point operations, in the attention and in
    its linear layers. ``activation`` is one tensor of all tokens by the width; ``block`` and ``rest``
    are what is not trained, of one block and outside the blocks; ``trained`` is masters,
    gradients and optimizer states, and of it ``arriving`` what is there only once all blocks have gone backward:
    gradients, where there are as many as weights. ``streams``: frozen weights may live on the host.
    ``hosted`` is set where all weights are trained, and may be in host memory.
    """

    layers: int
    activation: int
    block: int
    rest: int
    trained: int
    attention: int
    products: int
    arriving: int = 0
    streams: bool = True
    hosted: Hosted | None = None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        bucket: Resolution,
        *,
        batch: int,
        size: int,
        trained: int,
        arriving: int = 0,
        frozen: bool = True,
        streams: bool = True,
        accumulate: int | None = None,
    ) -> Load:
        """The load of a transformer's ``config.json`` on one bucket.

        Args:
            batch: samples of one forward pass.
            size: bytes of a number as computed.
            trained: bytes of what is trained: masters, gradients, optimizer states.
            arriving: of them, gradients that come in the backward pass.
            frozen: the checkpoint's own weights are, and what is trained lies beside them.
            streams: frozen weights may live on the host.
            accumulate: accumulation steps, where all weights are trained and may live on the host.
        """
        width = config["num_attention_heads"] * config["attention_head_dim"]
        patch_t = config.get("patch_size_t") or 1
        grid = (bucket.latent_height // PATCH) * (bucket.latent_width // PATCH)
        tokens = -(-bucket.latent_frames // patch_t) * grid + config["max_text_seq_length"]
        # Attention 4, feed-forward 8; two modulations of 6 outputs each; what is left is small.
        block = (12 * width**2 + 12 * width * config["time_embed_dim"]) * size
        rest = (config["text_embed_dim"] * width + 2 * width * config["time_embed_dim"]) * size
        # A model without rotary tables adds one of positions, which is held as the weights are.
        positions = 0 if config["use_rotary_positional_embeddings"] else tokens * width * (size if frozen else 4)
        hosted = None
        if accumulate is not None:
            numbers = block // size
            hosted = Hosted(
                block=block,
                states=numbers * 16,  # master, gradient, two moments, fp32
                host=numbers * (2 * size + 8 + (4 if accumulate > 1 else 0)),
            )
        return cls(
            layers=config["num_layers"],
            activation=batch * tokens * width * size,
            block=block if frozen else 0,
            rest=(rest if frozen else 0) + positions,
            trained=trained,
            arriving=arriving,
            attention=4 * batch * tokens**2 * width,
            products=24 * batch * tokens * width**2,
            streams=frozen and streams,
            hosted=hosted,
        )


@dataclass(frozen=True)
class Plan:
    """How the blocks of a run are run.

    ``keep`` is of each block; ``park`` moves what they keep to host memory, ``stream``
    the frozen weights; ``train_on_host`` says of how many blocks, the last ones, weights, gradients and
    optimizer states are there; ``chunks`` are the feed-forward layer's.
    """

    keep: tuple[Keep, ...]
    park: bool = False
    stream: bool = False
    train_on_host: int = 0
    chunks: int = 1
    compiled: bool = False

    @classmethod
    def to_draw(cls, layers: int) -> Plan:
        """Of a model that is not trained, beside one that is: next to nothing of it is on the GPU."""
        return cls(_each("inputs", layers), stream=True)

    @property
    def uncompiled(self) -> Plan:
        """The same without a compiler. A selective checkpoint then keeps what it selects in a place that hooks
        do not reach, and so nothing of it could be parked."""
        keep = _each("inputs", len(self.keep)) if self.park else self.keep
        return replace(self, keep=keep, compiled=False)

    def peak(self, load: Load) -> int:
        """Predicted bytes of GPU memory at the worst moment of a step."""
        work = _WORK_COMPILED if self.compiled else _WORK_PLAIN
        if self.compiled and "inputs" in self.keep:
            work += _WORK_ATTENTION_AGAIN
        each = [ALL_UNCOMPILED if keep == "all" and not self.compiled else ACTIVATIONS[keep] for keep in self.keep]
        kept = min(sum(each), max(each) + _PARKED_BESIDE) if self.park else sum(each)
        blocks = min(load.layers, 2) if self.stream else load.layers
        weights, arriving = load.rest + load.trained + blocks * load.block, load.arriving
        if self.train_on_host:
            assert load.hosted
            weights += min(self.train_on_host, 2) * _HOSTED_IN_FLIGHT * load.hosted.block
            weights -= self.train_on_host * load.hosted.states
            arriving -= self.train_on_host * load.hosted.states // 4 if arriving else 0
        # What is kept goes as the gradients come, and is less than they are, or more.
        first = weights - arriving + (kept + work) * load.activation
        last = weights + (min(kept, each[0]) + work) * load.activation
        return int(max(first, last))

    def evaluating(self, load: Load, held_out: Load) -> int:
        """Predicted bytes of GPU memory of a forward pass without gradients, on a held-out load."""
        blocks = min(load.layers, 2) if self.stream else load.layers
        weights = load.rest + load.trained - load.arriving + blocks * load.block
        if self.train_on_host:
            assert load.hosted
            weights += min(self.train_on_host, 2) * load.hosted.block
            weights -= self.train_on_host * load.hosted.states * (3 if load.arriving else 4) // 4
        return int(weights + FORWARD * held_out.activation)

    def host(self, load: Load) -> int:
        """Bytes of host memory, most of them page-locked; beside the masters of what is trained there."""
        kept = sum(ACTIVATIONS[keep] for keep in self.keep) * load.activation if self.park else 0
        hosted = self.train_on_host * load.hosted.host if load.hosted else 0
        return int(kept + hosted + (load.layers * load.block if self.stream else 0))

    def __str__(self) -> str:
        words: dict[Keep, str] = {
            "all": "nothing is recomputed",
            "matmuls": "only norms and activations are recomputed",
            "feedforward": "all but the attention and the feed-forward layer's middle is recomputed",
            "attention": "all but the attention is recomputed",
            "inputs": "everything is recomputed",
        }
        counts = {keep: self.keep.count(keep) for keep in words if keep in self.keep}
        parts = [f"{words[keep]}" + (f" in {n} blocks" if len(counts) > 1 else "") for keep, n in counts.items()]
        if self.park:
            parts.append("what is kept waits in host memory")
        if self.stream:
            parts.append("frozen weights come from host memory")
        if self.train_on_host:
            some = f" of {counted(self.train_on_host, 'block')}" if self.train_on_host < len(self.keep) else ""
            parts.append(f"weights, gradients and optimizer states{some} are in host memory")
        parts.append("blocks compiled" if self.compiled else "not compiled")
        return ", ".join(parts)


def choose(
    memory: Memory, load: Load, *, free: int, host_free: int, compiled: bool, gpu: bool = True,
    cost: Callable[[Plan], float] | None = None,
) -> Plan:  # fmt: skip
    """The fastest plan of its kind that fits; the smallest one where none does.

    Args:
        free: bytes of GPU memory that this process may use.
        host_free: bytes of host memory that nobody else needs, those of the frozen weights among them.
        gpu: on a CPU there is one memory: what is kept has to fit there and, but for ``low``, nothing moves.
        cost: seconds of a step; without it copies count as hidden behind the computation. ``low`` moves what it can,
            whatever it costs.
    """
    if not gpu:
        # There the block that is computed, and what is trained, need their part of the same memory.
        all_fits = Plan(_each("all", load.layers)).peak(load) <= _HOST_USABLE * host_free
        keep: Keep = "all" if memory == "fast" or (memory == "auto" and all_fits) else "inputs"
        return Plan(
            keep=(keep,) * load.layers, park=memory == "low", stream=memory == "low" and load.streams,
            train_on_host=load.layers if memory == "low" and load.hosted else 0, compiled=compiled,
        )  # fmt: skip
    plans = [plan for plan in ladder(memory, load, compiled) if plan.host(load) <= _HOST_USABLE * host_free]
    fitting = [plan for plan in plans if fits(plan, load, free)]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak(load))
    if cost is None or memory == "low":
        return fitting[0]
    costs = [cost(plan) for plan in fitting]
    return next(plan for plan, takes in zip(fitting, costs, strict=True) if takes <= _AS_FAST * min(costs))


def fits(plan: Plan, load: Load, free: int) -> bool:
    """Whether a plan leaves of the GPU's free bytes what else is needed there."""
    return plan.peak(load) <= USABLE * free


def ladder(memory: Memory, load: Load, compiled: bool) -> Iterator[Plan]:
    """Plans from fast to small, where copies hide behind the computation."""
    layers = load.layers
    attention = _each("attention", layers)
    inputs = _each("inputs", layers)
    feedforward = _each("feedforward", layers)
    parked = attention if compiled else inputs  # as in Plan.uncompiled
    if memory == "fast":
        for whole in range(layers, 0, -1):
            yield Plan(keep=_each("matmuls", whole) + attention[whole:], compiled=compiled)
    if memory != "low":
        yield Plan(keep=attention, compiled=compiled)
        if compiled:
            yield Plan(keep=feedforward, park=True, compiled=True)
        yield Plan(keep=parked, park=True, compiled=compiled)
    every = layers if load.hosted else 0
    if memory != "low" and load.hosted:
        for some in range(1, layers):
            if compiled:
                yield Plan(keep=feedforward, park=True, train_on_host=some, compiled=True)
            yield Plan(keep=parked, park=True, train_on_host=some, compiled=compiled)
        yield Plan(keep=attention, train_on_host=every, compiled=compiled)
    moved = partial(Plan, stream=load.streams, train_on_host=every, chunks=_CHUNKS, compiled=compiled)
    if memory != "low" and compiled:
        yield moved(keep=feedforward, park=True)
    yield moved(keep=parked, park=True)
    yield moved(keep=inputs, park=True)
    if load.streams or load.hosted:  # host memory is short, too
        yield moved(keep=inputs)
    yield Plan(keep=inputs, park=True, chunks=_CHUNKS, compiled=compiled)
    yield Plan(keep=inputs, chunks=_CHUNKS, compiled=compiled)


def _each(keep: Keep, blocks: int) -> tuple[Keep, ...]:
    return (keep,) * blocks


def gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
