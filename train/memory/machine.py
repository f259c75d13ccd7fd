"""The machine that a plan is for: this one, or a card and a host that were named."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogcommon.errors import SettingError
from cogcommon.files.memory import free_host_memory, held_here
from cogcommon.model.cards import CARDS, Card, as_typed, card_like, card_named
from cogcommon.model.device import has_bf16, visible_gpus
from cogcommon.words import GIB, counted, in_gib

from ..blocks.attention import Kernel
from ..blocks.trial import can_have_flash4, flash4_is_there
from .cost import Speed
from .measured import gpu_here
from .seconds import published_speed, speed_of

if TYPE_CHECKING:
    from ..settings.planning import ForecastSettings

_GPUS_OF_A_HOST = 8  # at most; of more, each eight are taken to have a host of their own
TRY_IT = "`cogtrain plan --check` on such a machine makes two steps"
HOSTS = range(4, 32 * 1024 + 1)  # GB of memory that a host may have
_OF_A_HOST = 0.93  # of its memory, what the system and what runs beside leave


@dataclass(frozen=True)
class Machine:
    """What there is to train on. Bytes."""

    name: str  # of a card
    gpu: int  # memory of each
    gpus: int  # or processes, where there are none
    host: int | None = None  # free memory of each host; None: as much as it takes
    speed: Speed | None = None  # None: not known
    computed_on: str | None = None  # whose seconds those are
    untimed: str = ""  # where its speed is not known: why, and what to type
    kernel: Kernel = "cudnn"
    bf16: bool = True

    @property
    def together(self) -> int:
        """Processes that share a host."""
        return min(self.gpus, _GPUS_OF_A_HOST)

    @property
    def cpu(self) -> bool:
        """It trains on CPUs."""
        return self.gpu == 0

    def described(self) -> list[str]:
        """What it is, and what of it is assumed; lines that fit a terminal of 80 columns."""
        host = "as much host memory as it takes; --host 64GB names yours"
        if self.host is not None:
            host = f"{in_gib(self.host)} of host memory free"
        if self.cpu:
            return [f"on {counted(self.gpus, 'process', 'processes')} of CPUs", host, self.untimed]
        here = f"on {counted(self.gpus, 'GPU')}: {self.name}, {in_gib(self.gpu)} each"
        if self.speed is None:
            return [here, host, self.untimed]
        return [here, f"{host}; copies at {self.speed.link / 1e9:.0f} GB/s"]


def machine_for(settings: ForecastSettings) -> Machine:
    """The machine that the settings name, or this one.

    Raises:
        SettingError: there is no such card, host or link, or no GPU here.
    """
    machine = _named(settings)
    if settings.link is None:
        return machine
    if not 0.1 <= settings.link <= 1000:
        raise SettingError(f"no link copies {settings.link:g} GB/s", where="--link", fix="--link 12")
    if machine.speed is None:
        raise SettingError(
            "--link changes seconds alone, and there are none", where="--link", fix=f"leave it out; {machine.untimed}"
        )
    return replace(machine, speed=replace(machine.speed, link=settings.link * 1e9))


def _named(settings: ForecastSettings) -> Machine:
    """The same over its own link."""
    here = visible_gpus()
    if settings.check and not here:
        raise SettingError("--check needs a GPU, and there is none here", where="--check", fix="leave it out")
    if settings.check and (settings.gpu or settings.host or (settings.gpus or 1) > here):
        raise SettingError(
            "--check runs on the GPUs of this machine only", where="--check", fix="leave out --gpu, --gpus and --host"
        )
    if settings.gpu is None and not here:
        raise SettingError(
            "there is no GPU here to plan for",
            where="--gpu",
            fix="name one, or say its memory: --gpu 4090, --gpu 24GB; --gpu none for CPUs",
        )
    if settings.gpus is not None and settings.gpus < 1:
        raise SettingError(f"{settings.gpus} GPUs", where="--gpus", fix="--gpus 1 or more")
    if (settings.gpu or "").strip().lower() == "none":
        there = host_memory(settings.host) if settings.host else _here()
        return Machine(
            "no GPU", 0, settings.gpus or 1, there, untimed="no seconds of CPUs are known; a run's first steps say them"
        )
    gpus = settings.gpus or max(1, here)
    if settings.gpu is not None:
        card = card_named(settings.gpu)
        host = host_memory(settings.host) if settings.host else None
        return Machine(card.name, card.bytes, gpus, host, *_speed(card.name, card), bf16=card.bf16)
    import torch

    first = torch.device("cuda", 0)
    name, total = gpu_here() or "", torch.cuda.get_device_properties(first).total_memory
    return Machine(
        name, total, gpus,
        host_memory(settings.host) if settings.host else _here(),
        *_speed(name, card_like(name, total)),
        kernel="flash4" if can_have_flash4(first) and flash4_is_there() else "cudnn",
        bf16=has_bf16(first),
    )  # fmt: skip


def _here() -> int:
    """What a run finds of this host's memory once this process has ended."""
    return free_host_memory() + held_here()


def host_memory(text: str) -> int:
    """Bytes that are free of a host with so much memory.

    Raises:
        SettingError: it is no amount, or no host has it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB?|GiB|TB?|TiB)?\s*", text, re.IGNORECASE)
    if not match:
        raise SettingError(f"{text!r} is not an amount of memory", where="--host", fix="--host 64GB")
    gib = float(match[1]) * (1024 if (match[2] or "").upper().startswith("T") else 1)  # memory modules' GB are GiB
    if not HOSTS[0] <= gib <= HOSTS[-1]:
        raise SettingError(f"no host has {gib:g} GB of memory", where="--host", fix="--host 64GB")
    return int(gib * GIB * _OF_A_HOST)


def _speed(name: str, card: Card | None) -> tuple[Speed | None, str | None, str]:
    """What a card gives, and how its seconds are called; where that is not known, why."""
    if speed := speed_of(name):
        return speed, name, ""
    if card and (speed := published_speed(card)):
        return speed, f"{name}, from its published {card.rate:g} TFLOP/s", ""
    if card is None or card.rate:
        why = "which has no bf16 in hardware" if card else "which is not in our table"
        return None, None, f"no seconds of {name} are known, {why}; {TRY_IT}"
    timed = [it for it in CARDS if published_speed(it)]
    near = min(timed, key=lambda it: abs(it.usable - card.usable)).sold
    *some, last = [as_typed(it) for it in timed if it.sold == near][::2][:3]
    named = f"{', '.join(some)} or {last}" if some else last
    return None, None, f"seconds depend on the card: name yours for them, as --gpu {named}"
