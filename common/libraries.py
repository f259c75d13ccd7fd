"""Large libraries, imported without chatter, without what they would import beside, and as fast as it goes."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any, Literal

from .cli.progress import stage

if TYPE_CHECKING:
    import torch

_NOT_OURS = {"sklearn", "scipy"}  # 1.3 s on the host of an H200


@contextmanager
def importing() -> Iterator[None]:
    """No search for garbage inside the ``with``: it takes a quarter of the time of importing large libraries."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _None(MetaPathFinder):
    """Finds nothing, and lets nobody else look, for one name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == self._name:
            raise ModuleNotFoundError(f"{fullname} is hidden", name=fullname)


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Who imports this module meanwhile is told that there is none, unless it has been imported already.

    For pyarrow, whose Cython takes the None that `quiet_library` lays into ``sys.modules`` for the module itself.
    """
    finder = _None(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@stage("loading the libraries")
def quiet_libraries(*names: Literal["transformers", "diffusers"]) -> None:
    """Switch off the progress bars and chatter of transformers and diffusers; we draw our own.

    Args:
        names: of those that will be used; both by default. Each takes seconds to import.
    """
    for name in names or ("diffusers", "transformers"):
        quiet_library(name)


@importing()
def quiet_library(name: Literal["transformers", "diffusers"]) -> Any:
    """Import one of them, without its chatter, and without what it would import for models that are not ours."""
    from importlib import metadata

    absent = dict.fromkeys(_NOT_OURS - sys.modules.keys())
    sys.modules.update(absent)  # type: ignore[arg-type]  # None is how Python notes that there is no such module
    remembering = _packages_distributions()
    asked, metadata.packages_distributions = metadata.packages_distributions, remembering
    try:
        library = import_module(name)
        if name == "transformers":
            library.utils.is_sklearn_available(), library.utils.is_scipy_available()  # which remember the answers
    finally:
        metadata.packages_distributions = asked
        for module in absent:
            del sys.modules[module]
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@cache
def _packages_distributions() -> Callable[[], Any]:
    """That of ``importlib.metadata``, but its answer is remembered: both libraries ask, for 0.6 s on an H200's host."""
    from importlib import metadata

    return cache(metadata.packages_distributions)


def hash_triton_ahead(device: torch.device) -> None:
    """Have Triton hashed in a thread; to compile a kernel, or find it compiled, asks for that: a second, most of it
    without Python."""
    if device.type != "cuda":
        return
    try:
        from triton.runtime.cache import triton_key
    except Exception:  # an older one has it elsewhere; and who compiles says what is wrong
        return

    def work() -> None:
        with suppress(Exception):  # who asks next says what is wrong
            triton_key()  # which remembers its answer

    threading.Thread(target=work, daemon=True).start()
