"""The Ray engine: connects to a cluster, and has a `Driver` hand out the shards."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from cogcommon.cli.progress import stage
from cogcommon.errors import SettingError
from cogcommon.model.device import device_type
from cogcommon.words import first_line

from ..encode.engine import Engine, Job
from ..plan.slice import choose_slice
from ..settings.encode import EncodeSettings
from ..source.addresses import any_signed, remote_address
from .actor import EncodeActor
from .driver import Driver
from .fleet import Fleet

_START = "`ray start --head --disable-usage-stats` on one host, `ray start --address=HEAD:6379` on the others"
_ANSWER_S = 10.0  # a head that has not answered by then is not there


@contextmanager
def ray_engine(settings: EncodeSettings, actor: type[EncodeActor] = EncodeActor) -> Iterator[Engine]:
    """Connected to the cluster of ``--ray-address`` inside the ``with``; our actors end with it.

    Args:
        actor: what runs on each GPU.

    Raises:
        SettingError: Ray is not installed, there is no such cluster, or the settings divide the work in another way.
    """
    _check(settings)
    _reach(settings.ray_address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # and no word about it
    import ray

    stops = signal.getsignal(signal.SIGTERM)
    try:
        # Its workers look for modules in this process's working folder first: the user's, where a queue.py may lie.
        with stage("connecting to Ray"), chdir("/"):
            ray.init(address=settings.ray_address, logging_level=logging.WARNING, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stops)  # Ray has put its own in its place
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(settings.ray_address, error) from error
    try:
        yield RayEngine(ray, actor)
    finally:
        ray.shutdown()


def _check(settings: EncodeSettings) -> None:
    """Refuse what cannot be meant, before anything is imported or connected."""
    if settings.ray_address.startswith("ray://"):
        raise SettingError(
            "a Ray client has no part in the cluster, and the driver reads the clips itself",
            where=f"--ray-address {settings.ray_address}",
            fix="run the command on a host of the cluster, without --ray-address",
        )
    if settings.gpus != "all":
        raise SettingError(
            "every GPU of the cluster takes part",
            where=f"--gpus {settings.gpus} --engine ray",
            fix="leave --gpus out; `ray start --num-gpus 2` says how many a host gives",
        )
    part = choose_slice(settings.worker, os.environ)
    if part.count > 1:
        raise SettingError(
            "the Ray engine hands out all shards, so one driver is enough",
            where=f"--engine ray, and slice {part} by {part.source}",
            fix="leave --worker out, and start one driver, not one a task",
        )
    if find_spec("ray") is None:
        raise SettingError("Ray is not installed", where="--engine ray", fix='pip install "cogtune[ray]"')


def _reach(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if not named or named == "auto":
        return  # Ray looks for a cluster on this host, which does not take long
    host, _, port = named.rpartition(":")
    if not host or not port.isdigit():
        raise SettingError(f"{named!r} is no address", where="--ray-address", fix="for example --ray-address HEAD:6379")
    try:
        with stage("connecting to Ray"), socket.create_connection((host, int(port)), timeout=_ANSWER_S):
            pass
    except (OSError, OverflowError) as error:
        raise _no_cluster(named, error) from error


def _no_cluster(address: str, error: Exception) -> SettingError:
    return SettingError(
        f"no Ray cluster answers: {first_line(error)}",
        where=f"--ray-address {address}",
        fix=f"start one: {_START}; or name its head: --ray-address HEAD:6379",
    )


class RayEngine:
    """See `Engine`; one actor a GPU of the cluster.

    Args:
        ray: the library, connected.
        actor: what runs on each GPU.
    """

    def __init__(self, ray: Any, actor: type[EncodeActor] = EncodeActor) -> None:
        self._ray = ray
        self._actor = actor
        self._device_type: str | None = None

    def device_type(self) -> str:
        """See `Engine`; the first GPU that is free is asked."""
        if self._device_type is None:
            ask = self._ray.remote(num_gpus=1, num_cpus=0, max_retries=-1)(device_type)
            with stage("waiting for a GPU of the cluster"):
                self._device_type = self._ray.get(ask.remote())
        return self._device_type

    def encode(self, job: Job) -> None:
        """See `Engine`.

        Raises:
            SettingError: clips have signed addresses, which do not leave this host.
        """
        if any_signed():
            raise SettingError(
                "the lists name signed addresses, and what signs them does not leave this host",
                where="--engine ray",
                fix="addresses that the nodes' own credentials open (s3://...), or --worker i/n on each host",
            )
        root = job.settings.root
        settings = replace(
            job.settings,
            data_root=root if remote_address(root) is not None else root.resolve(),
            out=job.settings.out.resolve(),
            model=job.contract.model,
            precision=job.precision,
        )
        fleet = Fleet(self._ray, self._actor, (settings, job.contract, self.device_type()))
        try:
            Driver(fleet, job, settings).run()
        finally:
            fleet.end()
