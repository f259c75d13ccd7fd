"""Files behind http and https: ranges, signed URLs, and servers that do not do what they should.

requests and not fsspec's HTTPFileSystem: that hides the answer's headers, so a server that sends
the whole file, other bytes or compressed ones goes unseen.
"""

from __future__ import annotations

import fnmatch
import functools
import html.parser
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin

from ..words import in_words
from . import http_faults
from .http_faults import NO_LIST, SIGN_AGAIN, fault_of, page_instead, refusal
from .network import certificates, is_page
from .store import SLOWEST, STALLED, NoRanges, ReadPart, StoreFault

if TYPE_CHECKING:
    import requests

_PIECE = 2**20  # bytes taken from the socket at a time
_RECORD_MOST = 2**28  # bytes of a file that is read whole


class HttpStore:
    """Files behind URLs; see `store.Store`."""

    remote = True

    def read(self, path: str, start: int, end: int) -> ReadPart:
        with self._get(path, f"bytes={start}-{end - 1}") as answer:
            if answer.status_code == 416:
                return ReadPart(bytearray(), _size_when_past_the_end(answer, start), _etag(answer))
            if answer.status_code == 200:
                size = _length(answer)
                whole = start == 0 and size is not None and size <= end
                data = _body(answer, size) if whole else bytearray(answer.raw.read1(_PIECE))
                if is_page(data):
                    raise page_instead()
                if not whole:
                    raise NoRanges
                return ReadPart(data, size, _etag(answer))
            first, last, size = _content_range(answer)
            if first != start or last != min(end, size or end) - 1:
                raise StoreFault(f"the server sends other bytes than asked for ({first}-{last}, not {start}-{end - 1})")
            length = _length(answer)
            if length is not None and length != last + 1 - first:
                raise StoreFault(
                    f"the server's answer contradicts itself: Content-Length {length} for {last + 1 - first}"
                )
            return ReadPart(_body(answer, last + 1 - first), size, _etag(answer))

    def read_all(self, path: str) -> ReadPart:
        with self._get(path) as answer:
            size = _length(answer)
            data = _body(answer, size)
            return ReadPart(data, len(data), _etag(answer))

    def stat(self, path: str, *, fresh: bool = False) -> ReadPart:
        """Size and etag, by a GET of one byte: signed URLs do not allow HEAD."""
        with self._get(path, "bytes=0-0") as answer:
            if answer.status_code == 206:
                return ReadPart(bytearray(), _content_range(answer)[2], _etag(answer))
            if answer.status_code == 416:
                return ReadPart(bytearray(), _size_when_past_the_end(answer, 0), _etag(answer))
            # The connection is closed before the body comes.
            return ReadPart(bytearray(), _length(answer), _etag(answer))

    def download(self, path: str) -> Iterator[bytes]:
        """The whole file, piece by piece."""
        with self._get(path) as answer:
            for number, piece in enumerate(_pieces(answer, _length(answer))):
                if number == 0 and is_page(piece):
                    raise page_instead()
                yield piece

    def names(self, folder: str) -> list[str]:
        """What a folder's page links to."""
        folder, mark, query = folder.partition("?")
        folder = folder.rstrip("/") + "/"
        page = _Links()
        try:
            page.feed(self.read_all(folder + mark + query).data.decode(errors="replace"))
        except StoreFault as fault:
            if fault.fix == SIGN_AGAIN:
                fault.fix = f"{NO_LIST}; or check the credentials"
            raise
        found = {urljoin(folder, link).partition("?")[0].partition("#")[0] for link in page.links}
        inside = (url for url in found if _name(url) and unquote(url.removesuffix(_name(url))) == unquote(folder))
        return [url + mark + query for url in sorted(inside)]

    def matching(self, pattern: str) -> list[str]:
        pattern, mark, query = pattern.partition("?")
        folder, _, name = pattern.rpartition("/")
        if any(sign in folder for sign in "*["):
            raise StoreFault("a web server's folders cannot be searched; only the last name may hold *", passing=False)
        entries = self.names(folder + mark + query)
        return [one for one in entries if fnmatch.fnmatchcase(unquote(_name(one)), unquote(name))]

    @contextmanager
    def _get(self, url: str, range_: str | None = None) -> Iterator[requests.Response]:
        """One GET, its status checked; whatever goes wrong until the body has been read is a `StoreFault`."""
        import requests
        import urllib3

        headers = {"Accept-Encoding": "identity"} | ({"Range": range_} if range_ else {})
        try:
            with _session().get(url, headers=headers, stream=True, timeout=(http_faults.CONNECT, STALLED)) as answer:
                _check(answer, asked_for_range=range_ is not None)
                yield answer
        except FileNotFoundError:
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError, OSError) as error:
            raise fault_of(error, url) from None


@functools.cache
def _session() -> requests.Session:
    """One for all threads; proxies, .netrc and certificates as requests finds them."""
    import requests

    session = requests.Session()
    session.verify = certificates()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=64, max_retries=0))
    return session


def _check(answer: requests.Response, *, asked_for_range: bool) -> None:
    status = answer.status_code
    if status in (404, 410):
        raise FileNotFoundError(status)
    if status not in ((200, 206, 416) if asked_for_range else (200,)):
        raise refusal(answer)
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity") and status != 416:
        raise StoreFault(
            f"the server compresses what it sends (Content-Encoding: {coding}), though asked not to",
            passing=False,
            fix="switch compression off for .tar and .parquet there",
        )


def _body(answer: requests.Response, size: int | None) -> bytearray:
    if size is None:
        return bytearray().join(_pieces(answer, None, _RECORD_MOST))
    if size > _RECORD_MOST and answer.status_code == 200:
        raise StoreFault(f"the server sends {size:,} bytes, more than any record has", passing=False)
    data = bytearray(size)
    end = 0
    for piece in _pieces(answer, size):
        data[end : end + len(piece)] = piece
        end += len(piece)
    return data


def _pieces(answer: requests.Response, size: int | None, most: int | None = None) -> Iterator[bytes]:
    """A body as it comes; fewer bytes than announced, or too few in `STALLED` seconds, are a `StoreFault`."""
    total = lately = 0
    since = time.monotonic()
    while size is None or total < size:
        piece = answer.raw.read1(_PIECE if size is None else min(_PIECE, size - total))
        if not piece:
            break
        total += len(piece)
        lately += len(piece)
        if most is not None and total > most:
            raise StoreFault("the server does not stop sending", passing=False)
        if (now := time.monotonic()) - since > STALLED:
            if lately < SLOWEST * STALLED:
                raise StoreFault(f"the server stalls ({lately:,} bytes in {in_words(now - since)})")
            since, lately = now, 0
        yield piece
    if size is not None and total < size:
        raise StoreFault(f"the answer is cut short ({total:,} of {size:,} bytes)")


def _content_range(answer: requests.Response) -> tuple[int, int, int | None]:
    """First byte, last byte, and bytes of the whole file where told."""
    told = answer.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", told.strip(), re.ASCII)
    if not match:
        raise StoreFault(f"the server sends a part of the file without saying which (Content-Range: {told[:60]!r})")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


def _size_when_past_the_end(answer: requests.Response, start: int) -> int:
    match = re.fullmatch(r"bytes \*/(\d{1,18})", answer.headers.get("Content-Range", "").strip(), re.ASCII)
    if match and int(match[1]) > start:
        raise StoreFault(f"the server refuses bytes from {start:,} on, of a file of {int(match[1]):,}")
    if not match:
        raise StoreFault("the server refuses the range (416), and does not say how long the file is")
    return int(match[1])


def _length(answer: requests.Response) -> int | None:
    told = answer.headers.get("Content-Length", "").strip()
    return int(told) if re.fullmatch(r"\d{1,18}", told, re.ASCII) else None


def _etag(answer: requests.Response) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified", ""))


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]
