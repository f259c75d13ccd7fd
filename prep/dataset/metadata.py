"""Captions in one table for many clips, as other tools write them.

======================  ==============================  =====================  ==========================
tool                    file                            the clip               its caption
======================  ==============================  =====================  ==========================
Hugging Face            metadata.csv, .jsonl, .parquet  file_name, *_file_name  text
finetrainers            the same, metadata.json         file_name, video        caption
CogKit                  metadata.jsonl                  file_name               prompt
musubi-tuner            metadata.jsonl                  video_path              caption
diffusion-pipe          captions.json                   {"a.mp4": ["caption", "another"]}
======================  ==============================  =====================  ==========================
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogcommon.errors import DataRootError

_CLIP = ("file_name", "video_path", "video", "video_file", "media_path", "filename", "path", "file")
_CAPTION = ("caption", "text", "prompt")
_SHOWN = 12  # columns that a message names


@dataclass(frozen=True)
class Row:
    """What a table says of one clip."""

    line: int  # of the table, from 1; 0 where it has no lines
    clip: str  # as the table names it
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    unused: str = ""  # why nothing of it can be used


class BadTable(Exception):
    """What is wrong with a table, and where in it."""

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(what)
        self.line = line


def read_table(path: Path) -> Table:
    """A table of clips and captions. Rows that name no file are left out.

    Raises:
        DataRootError: it is damaged.
    """
    try:
        try:
            parquet = path.suffix == ".parquet"
            rows = list(_parquet(path) if parquet else _READERS[path.suffix](text_of(path.read_bytes())))
        except UnicodeDecodeError as error:
            raise BadTable("not UTF-8; save it as UTF-8", error.object.count(b"\n", 0, error.start) + 1) from None
        except OSError as error:
            raise BadTable(f"cannot be read: {error.strerror or error}") from None
        except RecursionError:
            raise BadTable("not JSON: it is nested too deeply") from None
    except BadTable as bad:
        raise DataRootError(
            str(bad),
            where=f"{path}:{bad.line}" if bad.line else str(path),
            fix=f"mend it, or give it another name than {path.name} if it is not about clips; no list was written",
        ) from None
    names = dict.fromkeys(name for _, row in rows for name in row)
    for what, known in (("clips", (*_CLIP, *_file_names(names))), ("captions", _CAPTION)):
        if rows and not any(name in map(str.lower, names) for name in known):
            theirs = ", ".join(list(names)[:_SHOWN])
            return Table([], f"no column of {what} ({', '.join(known)}); it has {theirs}")
    return Table([Row(line, name, _captions(row)) for line, row in rows if (name := _clip(row))])


def text_of(data: bytes) -> str:
    """A text that people or their tools wrote: UTF-8, or UTF-16 with its byte order mark, as Windows writes it.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")


def _csv(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A table with a line of names; commas, or what Excel puts in their place in many countries."""
    head = text.partition("\n")[0]
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        for row in reader:
            if None in row:
                more = "a caption with a comma in it must stand in quotes"
                raise BadTable(f"more columns than the first line names; {more}", reader.line_num)
            yield reader.line_num, row
    except csv.Error as error:
        raise BadTable(f"not CSV, in the row that begins here: {error}", reader.line_num + 1) from None


def _jsonl(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """An object a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _parse(line, number)
            if not isinstance(row, dict):
                raise BadTable("not an object with a clip and its caption", number)
            yield number, row


def _json(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A list of objects, alone or as "data"; or an object of names and captions."""
    told = _parse(text, 0)
    if isinstance(told, dict) and isinstance(told.get("data"), list):
        told = told["data"]
    if isinstance(told, dict):
        told = [
            {_CLIP[0]: name, **(of_it if isinstance(of_it, dict) else {_CAPTION[0]: of_it})}
            for name, of_it in told.items()
        ]
    if not isinstance(told, list) or not all(isinstance(row, dict) for row in told):
        raise BadTable('neither a list of {"file_name": ..., "caption": ...} nor an object of names and captions')
    yield from ((0, row) for row in told)


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A row a clip. Of other columns the names alone, and of a clip that is in the table itself its path."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            fields = list(table.schema_arrow)
            wanted = {*_CLIP, *_CAPTION, *_file_names(field.name for field in fields)}
            columns = [
                f"{field.name}.path" if pa.types.is_struct(field.type) else field.name
                for field in fields
                if field.name.lower() in wanted
            ]
            named: dict[str, Any] = {field.name: None for field in fields}
            rows = table.read(columns).to_pylist() if columns else [{}]
    except pa.ArrowException as error:
        raise BadTable(f"not Parquet: {error}") from None
    yield from ((0, {**named, **row}) for row in rows)


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".json": _json}


def _parse(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadTable(f"not JSON: {error.msg}", line or error.lineno) from None
    except ValueError as error:  # a number of more digits than Python takes
        raise BadTable(f"not JSON: {error}", line) from None


def _file_names(names: Iterable[str]) -> tuple[str, ...]:
    """Columns as ``video_file_name``, which Hugging Face reads as well."""
    return tuple(name.lower() for name in names if name.lower().endswith("_file_name"))


def _first(row: Mapping[str, Any], known: tuple[str, ...]) -> Any:
    """The value of the first of the names that a row has, in any capitals."""
    lower = {name.lower(): value for name, value in row.items()}
    return next((lower[name] for name in known if lower.get(name) not in (None, "")), None)


def _clip(row: Mapping[str, Any]) -> str:
    value = _first(row, (*_CLIP, *_file_names(row)))
    if isinstance(value, dict):  # as datasets writes a video
        value = value.get("path")
    return value.strip() if isinstance(value, str) else ""


def _captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = _first(row, _CAPTION)
    several = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(filter(None, (in_a_line(one) for one in several if isinstance(one, str)))))


def in_a_line(caption: str) -> str:
    """A caption as a line of prompts.txt: without line breaks, and what a list cannot hold."""
    words = " ".join(part.strip() for part in caption.replace("\0", "").splitlines() if part.strip())
    return words.encode("utf-8", "ignore").decode()
