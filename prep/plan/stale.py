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
        self._unknown = ""
        self.kept = 0  # committed samples whose line is there, and whose file cannot be read

    def unknown(self) -> str:
        """Why it cannot be told what the data root has; empty where it can."""
        self._look()
        return self._unknown

    def has(self, key: str, source: str, caption: str) -> bool:
        """Whether a committed sample is wanted, or that cannot be told."""
        self._look()
        return bool(self._unknown) or key in self._keys or (source, caption) in self._lines

    def _look(self) -> None:
        origin = read_origin(self._out)
        state = origin, origin.state_of_lists() if origin else ()
        if state != self._state:
            self._unknown = self._read(origin)
            self._state = state

    def _read(self, origin: Origin | None) -> str:
        """Read the data root; what keeps it from being known, or nothing."""
        if origin is None:
            return f"{self._out} does not say what it was encoded from"
        contract = contract_if_there(self._out)
        if contract is None:
            return f"{self._out} does not say how it was encoded"
        try:
            data = origin.read_lists(contract.task)
        except DataRootError as error:
            return f"{origin.data_root} cannot be read ({error.what})"
        if data.faults:
            return f"the lists of {origin.data_root} have faults, {data.faults[0]}"
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
        return "" if found.keys else f"none of the clips of {origin.data_root} can be used"
