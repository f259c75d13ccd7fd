"""A web server that serves a folder, and does one thing wrong.

A fault is a function of the request's handler. It returns None to let the request be served as it
should be, or does the wrong thing itself and returns True. As a proxy it serves the folder as that of any host.
"""

import gzip
import re
import socket
import struct
import threading
import urllib.parse
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cogcommon.store import store


class OwnTime(threading.local):
    """Each thread's own seconds, which stand still but for what the thread adds."""

    now = 0.0

    def monotonic(self):
        return self.now


def waits_take_no_time(monkeypatch):
    """A clock of waits between attempts, by which readers are patient, and which nothing else moves.

    So however slow the machine is, they make as many attempts as the patience of a quick one allows.
    """
    clock = OwnTime()

    def wait(stop, seconds):
        clock.now += seconds
        return stop._event.is_set()

    monkeypatch.setattr(store, "time", clock)
    monkeypatch.setattr(store.Stop, "wait", wait)
    return clock


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = False  # `stop` waits for them: none is left at work beside the next test
    request_queue_size = 64

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.fault = None
        self.asked = []  # (method, path, Range)
        self.times = defaultdict(int)  # requests for each path and range
        self.released = threading.Event()  # ends stalls
        self._connected = set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def begin(self, fault):
        self.asked.clear()
        self.times.clear()
        self.fault = fault

    def stop(self):
        self.released.set()
        self.shutdown()
        for connection in list(self._connected):  # clients keep them open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request, client_address):
        self._connected.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connected.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        pass  # a client that goes away is what many tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.body = self.sent()
        split = urllib.parse.urlsplit(self.path)
        self.name = urllib.parse.unquote(split.path).lstrip("/")
        self.query = split.query
        self.range = self.headers.get("Range", "")
        self.server.asked.append((self.command, self.name, self.range))
        self.server.times[self.name, self.range] += 1
        self.time = self.server.times[self.name, self.range]
        if self.server.fault is None or not self.server.fault(self):
            self.serve()

    def sent(self):
        """The request's body, whole."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    do_HEAD = do_PUT = do_POST = do_DELETE = do_CONNECT = do_GET

    @property
    def is_sample(self):
        """Whether this is a read of training, not one of opening."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.range)
        return bool(match) and self.name.endswith(".tar") and int(match[2]) - int(match[1]) > 20480

    @property
    def data(self):
        return (self.server.folder / self.name).read_bytes()

    def part(self):
        """First and one past the last byte asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.range)
        if not match:
            return 0, len(self.data)
        return int(match[1]), min(len(self.data), int(match[2]) + 1 if match[2] else len(self.data))

    def cut(self):
        """Announce all that was asked for, and break off."""
        start, end = self.part()
        self.serve(change=lambda body: body[:100], headers={"Content-Length": str(end - start)})
        return self.reset()

    def serve(self, *, ranges=True, length=True, headers=None, change=lambda body: body, etag=None):
        path = self.server.folder / self.name
        if path.is_dir():
            links = "".join(
                f'<a href="{urllib.parse.quote(one.name)}">{one.name}</a>' for one in sorted(path.iterdir())
            )
            return self.answer(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"})
        if not path.exists():
            return self.answer(404, b"")
        start, end = self.part()
        told = {"ETag": etag or f'"{path.stat().st_mtime_ns}"'}
        if self.range and ranges:
            if start >= len(self.data):
                return self.answer(416, b"", told | {"Content-Range": f"bytes */{len(self.data)}"})
            told["Content-Range"] = f"bytes {start}-{end - 1}/{len(self.data)}"
            return self.answer(206, change(self.data[start:end]), told | (headers or {}), length=length)
        return self.answer(200, change(self.data), told | (headers or {}), length=length)

    def answer(self, status, body=b"", headers=None, *, length=True):
        self.send_response(status)
        headers = dict(headers or {})
        if length:
            headers.setdefault("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def reset(self):
        """End the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        return True

    def stall(self, after=0):
        """Send some of what was asked for, then nothing."""
        if after:
            start, end = self.part()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(self.data[start : start + after])
            self.wfile.flush()
        self.server.released.wait(60)
        self.close_connection = True
        return True

    def slowly(self, piece, pause):
        """Send what was asked for in pieces, with pauses."""
        start, end = self.part()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        for at in range(start, end, piece):
            self.wfile.write(self.data[at : min(end, at + piece)])
            self.wfile.flush()
            if self.server.released.wait(pause):
                break
        return True


def zipped(handler):
    body = gzip.compress(handler.data)
    return handler.answer(200, body, {"Content-Encoding": "gzip"})
