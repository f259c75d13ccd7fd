"""The processes of one run: how they meet, and their collectives over the CPU."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cogcommon.errors import CogError, RunError, SettingError

from . import elastic
from .connections import connect
from .leaving import LOST, REFUSED, Leaving, PeerFailed, PeerLost

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_T = TypeVar("_T")
_MEET = timedelta(minutes=10)  # images are pulled, nodes boot
_QUIET = 20.0  # seconds after which a process says that it waits for the others
_PATIENCE = timedelta(days=1)  # of a collective: one rank may draw videos meanwhile; `Leaving` notices peers that die


@dataclass(frozen=True)
class Node:
    """Where a process runs."""

    machine: str  # one kernel, whose memory its processes share
    host: str  # as the network calls it; a container may have a name of its own

    @classmethod
    def here(cls) -> Node:
        boot = Path("/proc/sys/kernel/random/boot_id")  # not namespaced, as names are
        host = socket.gethostname()
        return cls(boot.read_text().strip() if boot.exists() else host, host)


@dataclass
class Peers:
    """One process of a run, and collectives over all of them.

    Attributes:
        nodes: of all processes, by rank.
        started_by: their launchers, and their job of Slurm (`elastic.is_restart`).
    """

    rank: int
    world: int
    nodes: tuple[Node, ...]
    started_by: tuple[str, ...] = ()
    _group: Any = None  # process group on the CPU
    _leaving: Leaving | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> Node:
        return self.nodes[self.rank]

    @property
    def here(self) -> int:
        """Processes of the run on this machine."""
        return sum(place.machine == self.node.machine for place in self.nodes)

    def all_reduce_max(self, value: int) -> int:
        """The largest of all ranks' values; over the CPU, so that no GPU waits."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_max(0)

    def all_gather(self, value: _T) -> list[_T]:
        """All ranks' values, by rank, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: _T) -> _T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def together(self, act: Callable[[], _T]) -> _T:
        """Run something that may fail on some ranks; if it fails on one, all raise, so that none waits for ever.

        Raises:
            CogError: on rank 0 its own error, or that of the first that has one; on the others `PeerFailed`.
        """
        results: list[_T] = []
        fault: CogError | None = None
        try:
            results.append(act())
        except CogError as error:
            fault = error
        if not self.all_reduce_max(int(fault is not None)):
            return results[0]
        parts = (fault.what, fault.where, fault.fix, isinstance(fault, PeerLost)) if fault else None
        failed = [(rank, parts) for rank, parts in enumerate(self.all_gather(parts)) if parts]
        rank, (what, where, fix, lost) = failed[0]
        if not self.main:
            raise PeerFailed(LOST if lost else REFUSED)
        if fault is not None:
            raise fault
        place = f"process {rank} of {self.world}, on {self.nodes[rank].host}"
        where = f"{where} ({place})" if where else place
        raise (PeerLost if lost else RunError)(what, where=where, fix=fix)

    def leaving_together(self) -> AbstractContextManager[None]:
        """Leave when a peer fails, and have the peers leave when this process fails (`Leaving`)."""
        return self._leaving.together() if self._leaving else nullcontext()


ALONE = Peers(0, 1, (Node.here(),))
_met: list[Peers] = []  # one process joins one run


def have_met() -> bool:
    return bool(_met)


def meet() -> Peers:
    """Join the other processes that RANK and WORLD_SIZE tell of; as `ALONE` where there are none.

    Sets LOCAL_RANK and LOCAL_WORLD_SIZE where the launcher did not, by who is on the same host.

    Raises:
        SettingError: the environment does not say where they meet.
        PeerLost: not all of them came.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return dataclasses.replace(ALONE, started_by=_started_by())
    if not _met:
        _met.append(_join(int(os.environ["RANK"]), world))
    return _met[0]


def _join(rank: int, world: int) -> Peers:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise SettingError(
            f"RANK and WORLD_SIZE are set, and {' and '.join(missing)} not: they do not know where to meet",
            where="the environment",
            fix="start them with torchrun, or export MASTER_ADDR=<host of rank 0> MASTER_PORT=29500 for all of them",
        )
    store = _rendezvous(rank, world)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world)
    # gloo's own half hour is less than a validation video takes on a slow GPU, for which the other ranks wait.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore)
    own = TCPStore(store.host, store.port, None, False, wait_for_workers=False)
    peers = Peers(rank, world, (), _group=group)
    gathered = peers.all_gather((Node.here(), _started_by()))
    peers.nodes = tuple(node for node, _ in gathered)
    peers.started_by = tuple(sorted({name for _, names in gathered for name in names}))
    connections, unheard = connect(rank, world, (store.host, store.port), peers.broadcast, peers.all_gather)
    if unheard and rank == 0:
        hosts = ", ".join(sorted({peers.nodes[other].host for other in unheard}))
        print(f"note: {hosts} cannot connect to {peers.node.host}: if a host is lost, the network library alone may "
              "notice, after minutes", file=sys.stderr)  # fmt: skip
    attempt = peers.broadcast(secrets.token_hex(8))  # a launcher's store outlives the processes that it starts again
    hosts_of = [(node.machine, node.host) for node in peers.nodes]
    peers._leaving = Leaving(own, connections, rank, hosts_of, attempt)
    _set_local_rank(peers)
    return peers


def _started_by() -> tuple[str, ...]:
    return tuple(name for name in (elastic.launcher(), elastic.slurm_job()) if name)


def _rendezvous(rank: int, world: int) -> Store:
    """The store that rank 0, or the launcher, holds for all; once all are connected to it."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    waiting = threading.Timer(_QUIET, _say_waiting, (rank, world, address, port))
    waiting.daemon = True
    waiting.start()
    try:
        store: Store = next(rendezvous("env://", rank, world, timeout=_MEET))[0]
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise PeerLost(
            f"the {world} processes of the run have not met: {str(error).splitlines()[0]}",
            where=f"process {rank} of {world}, at MASTER_ADDR={address} MASTER_PORT={port}",
            fix="start all of them within ten minutes, with an address of rank 0 that every host reaches "
            "and a port that is free there",
        ) from error
    finally:
        waiting.cancel()
    return store


def _say_waiting(rank: int, world: int, address: str, port: str) -> None:
    try:
        socket.getaddrinfo(address, port)
        unknown = ""
    except OSError:
        unknown = ", a name that does not resolve on this host"
    who = "the other processes" if rank == 0 else "process 0"
    print(f"process {rank} of {world} waits for {who} at {address}:{port}{unknown}", file=sys.stderr, flush=True)


def _set_local_rank(peers: Peers) -> None:
    from cogcommon.model.device import visible_gpus

    here = [rank for rank, place in enumerate(peers.nodes) if place == peers.node]
    # Among the GPUs that it sees: all of the host's, or its own alone.
    os.environ.setdefault("LOCAL_RANK", str(here.index(peers.rank) % max(1, visible_gpus())))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(len(here)))
