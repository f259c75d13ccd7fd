"""``cogtrain watch``: the report of one run or several, live on the loopback address; with a button that ends a run."""

from __future__ import annotations

import html
import http.server
import secrets
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cogcommon.cli.names import plain, quoted
from cogcommon.cli.progress import paused
from cogcommon.errors import CogError, SettingError
from cogcommon.files.ownership import is_file

from ..report.page import comparison, page
from ..runs.checkpoint import run_and_checkpoint
from ..runs.folder import COMPARED, GENERATED, VALIDATION, RecordedRun, ask_to_stop, asked_to_stop, read_run
from ..settings.results import WatchSettings

_EVERY = 3  # seconds between the page's looks at what is new
_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_HERE = "127.0.0.1"


def run(settings: WatchSettings) -> None:
    """Serve until Ctrl-C.

    Raises:
        CogError: a folder is no run's, or the port is taken.
    """
    if not settings.runs:
        raise SettingError("no run is named", where="RUNS", fix="cogtrain watch runs/mine")
    runs = [run_and_checkpoint(folder)[0] for folder in settings.runs]
    for folder in runs:
        read_run(folder)
    server = serve(runs, settings.port)
    address = f"http://{_HERE}:{server.server_port}/"
    print(f"{address}  (Ctrl-C ends it; from elsewhere: ssh -L {server.server_port}:{_HERE}:{server.server_port} HOST)")
    sys.stdout.flush()
    try:
        with paused():
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def serve(runs: Sequence[Path], port: int | None) -> http.server.ThreadingHTTPServer:
    """A server of the runs' pages, on the loopback address alone; it is not running yet.

    Args:
        port: None: 8420, or where that is taken any other; 0: any.

    Raises:
        SettingError: the port that was asked for cannot be had.
    """
    handler = partial(_Handler, runs=list(runs), token=secrets.token_urlsafe(16))
    for number in (8420, 0) if port is None else (port,):
        try:
            return http.server.ThreadingHTTPServer((_HERE, number), handler)
        except (OSError, OverflowError) as error:
            fault = error
    reason = getattr(fault, "strerror", None) or str(fault)
    raise SettingError(f"port {port} cannot be had: {reason}", where=f"--port {port}", fix="leave --port out")


class _Handler(http.server.BaseHTTPRequestHandler):
    """``/`` is the page of the one run, or of all beside one another; ``/N/`` is run N's, ``/N/…`` its videos."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, runs: list[Path], token: str, **options: Any) -> None:
        self._runs, self._token = runs, token
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if not self._from_here():
            return
        words = [unquote(word) for word in urlsplit(self.path).path.split("/")[1:]]
        try:
            if words == [""]:
                if len(self._runs) > 1:
                    self._page(self._all())
                else:
                    self.send_response(302)
                    self.send_header("Location", "/0/")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
            elif len(words) > 1 and words[0].isdecimal() and int(words[0]) < len(self._runs):
                number, rest = int(words[0]), words[1:]
                if rest == [""]:
                    self._page(self._one(number))
                else:
                    self._file(self._runs[number], rest)
            else:
                self.send_error(404)
        except CogError as error:
            self._page(f"<!doctype html><meta charset=utf-8><pre>{html.escape(plain(str(error)))}</pre>", 503)

    def do_POST(self) -> None:
        """``/N/stop``, from our own page only: it knows the token."""
        if not self._from_here():
            return
        words = self.path.split("/")[1:]
        named = len(words) == 2 and words[0].isdecimal() and int(words[0]) < len(self._runs) and words[1] == "stop"
        if not named or not secrets.compare_digest(self.headers.get("X-Token", "").encode(), self._token.encode()):
            self.send_error(403)
            return
        try:
            ask_to_stop(self._runs[int(words[0])])
        except CogError as error:
            self._send(str(error).encode(), "text/plain; charset=utf-8", 409)
            return
        self._send(b"it will save and stop after this step", "text/plain; charset=utf-8")

    def _from_here(self) -> bool:
        """Whether the browser asked for this address by its own name: no other site's page may read a run."""
        port = self.server.server_port  # type: ignore[attr-defined]
        if self.headers.get("Host") in (f"{_HERE}:{port}", f"localhost:{port}"):
            return True
        self.send_error(403)
        return False

    def _one(self, number: int) -> str:
        run = read_run(self._runs[number])
        return page(run, live=_EVERY, beside=_button(run, self._token))

    def _all(self) -> str:
        found = [(f"/{number}/", read_run(folder)) for number, folder in enumerate(self._runs)]
        return comparison(found, live=_EVERY)

    def _page(self, text: str, status: int = 200) -> None:
        self._send(plain(text).encode(), "text/html; charset=utf-8", status)

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _file(self, run: Path, words: Sequence[str]) -> None:
        """A video or picture of the run, whole or the part that a browser asks for; nothing else, and no links."""
        path = run.joinpath(*words)
        inside = words[0] in (VALIDATION, GENERATED, COMPARED) and not {"", ".", ".."} & set(words)
        kind = _TYPES.get(path.suffix)
        if not inside or kind is None or not is_file(path) or not path.resolve().is_relative_to(run.resolve()):
            self.send_error(404)
            return
        size = path.stat().st_size
        part = _range(self.headers.get("Range"), size)
        if part is None:
            self.send_error(416)
            return
        first, last = part
        whole = (first, last) == (0, size - 1) and "Range" not in self.headers
        self.send_response(200 if whole else 206)
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if not whole:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with path.open("rb") as stream:
            stream.seek(first)
            if last == size - 1:
                shutil.copyfileobj(stream, self.wfile)
            else:
                self.wfile.write(stream.read(last - first + 1))

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the browser has left
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks every few seconds."""


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte that are asked for; None where there are none such. Of several ranges the first."""
    if not header:
        return 0, size - 1
    first, dash, last = header.removeprefix("bytes=").split(",")[0].strip().partition("-")
    if not dash or not (first or last).isdecimal() or not all(end.isdecimal() for end in (first, last) if end):
        return None
    if not first:
        return (max(0, size - int(last)), size - 1) if int(last) and size else None
    return (
        (int(first), min(int(last or size), size - 1))
        if int(first) < size and int(last or size) >= int(first)
        else None
    )


def _button(run: RecordedRun, token: str) -> str:
    """What ends a run that still trains."""
    if run.facts.ended or (run.steps and run.steps[-1].step >= run.facts.steps):
        return ""
    if asked_to_stop(run.folder):
        return '<p class="asked">asked to save and stop</p>'
    command = html.escape(plain(quoted(str(run.folder))))
    return (
        f'<p><button type="button" class="stop" data-token="{token}">save and stop</button> '
        f'<span class="faint">the run in {command} ends after its present step, with a checkpoint</span></p>'
    )
