"""The engines by name, as ``--engine`` takes them. One more engine is one more row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from ..encode.engine import Engine, LocalEngine
from ..settings.encode import EncodeSettings, EngineName
from .ray_engine import ray_engine

ENGINES: Mapping[EngineName, Callable[[EncodeSettings], AbstractContextManager[Engine]]] = {
    "local": lambda _settings: nullcontext(LocalEngine()),
    "ray": ray_engine,
}
