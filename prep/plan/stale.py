"""What the data root of an output folder has now, by which samples are called stale."""

from __future__ import annotations

from pathlib import Path

from cogcommon.errors import DataRootError

from ..processes.pool import Pool, default_workers
from ..video.cut import Cut
from .folder import contract_if_there, scan
from .holdout import Holdout
from .origin import Origin, read_origin
from .probe_cache import SurveyCache
from .slice import Slice
from .survey import survey


class Wanted:
    """The samples of a data root as it is at the moment it is asked: a changed list is read again.

    A line that is there wants its sample, even if its file is not: a disk may not be mounted.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._state: object = None
        self._keys: set[str] = set()
        self._lines: set[tuple[str, str]] = set()  # source and caption of lines whose file cannot be read
        self._known = False
        self.kept = 0  # committed samples whose line is there, and whose file cannot be read

    def known(self) -> bool:
        """Whether the data root says what it has."""
        self._look()
        return self._known

    def has(self, key: str, source: str, caption: str) -> bool:
        """Whether a committed sample is wanted, or that cannot be told."""
        self._look()
        return not self._known or key in self._keys or (source, caption) in self._lines

    def _look(self) -> None:
        origin = read_origin(self._out)
        state = origin, origin.state_of_lists() if origin else ()
        if state != self._state:
            self._known = origin is not None and self._read(origin)
            self._state = state

    def _read(self, origin: Origin) -> bool:
        try:
            contract = contract_if_there(self._out)
            data = None if contract is None else origin.read_lists(contract.task)
        except DataRootError:
            return False
        if contract is None or data is None or data.faults:
            return False
        with Pool(default_workers()) as pool:
            found = survey(
                data,
                scan(self._out),
                contract,
                buckets=contract.buckets,
                cut=Cut.of(contract),
                holdout=None,
                before=Holdout(),
                pool=pool,
                advance=lambda: None,
                cache=SurveyCache(None, data.root, "", Slice(1, 1, "default")),
            )
        self._keys = found.current
        unusable = [*found.rejected, *(one.line for one in found.kept)]
        self._lines = {(line.sample.source, line.sample.caption) for line in unusable}
        self.kept = sum(one.status == "ok" for one in found.kept)
        return bool(found.keys)
