"""What a desk has of the folder behind an address (see `desk`), and the file that remembers it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from cogcommon.files.atomic import commit_bytes


@dataclass(frozen=True)
class SeenObject:
    """An object as the desk has it."""

    size: int
    etag: str
    sha256: str  # of its content, in hex

    @property
    def version(self) -> tuple[int, str]:
        """As `Entry.version`."""
        return self.size, self.etag


class SeenObjects:
    """Objects by name, each noted in a file as it is seen.

    The file has a line of JSON for every change, ``{NAME: [SIZE, ETAG, SHA256]}`` or ``{NAME: null}``, so that a note
    costs the same however many there are; `begin` makes one line of all. A line that is lost, or of which a kill has
    left a part, is an object that is read again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: dict[str, SeenObject] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def __getitem__(self, name: str) -> SeenObject:
        return self._seen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def noted(self) -> dict[str, SeenObject]:
        """What the runs before have noted; what does not read is left out."""
        found: dict[str, SeenObject] = {}
        try:
            lines = self._file.read_bytes().splitlines()
        except OSError:
            return found
        for line in lines:
            with suppress(ValueError, TypeError, AttributeError):
                for name, seen in json.loads(line).items():
                    found.pop(name, None)
                    if seen is not None:
                        found[name] = SeenObject(*seen)
        return found

    def begin(self, seen: Mapping[str, SeenObject]) -> None:
        """Have these and no others."""
        self._seen = dict(seen)
        told = {name: astuple(one) for name, one in self._seen.items()}
        commit_bytes(self._file, json.dumps(told).encode())

    def note(self, name: str, seen: SeenObject) -> None:
        self._seen[name] = seen
        self._add({name: astuple(seen)})

    def forget(self, name: str) -> None:
        if self._seen.pop(name, None) is not None:
            self._add({name: None})

    def _add(self, change: dict[str, object]) -> None:
        with suppress(OSError), self._file.open("ab") as stream:
            stream.write(b"\n" + json.dumps(change).encode())
