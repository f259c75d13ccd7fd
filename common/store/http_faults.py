"""What goes wrong between this machine and a web server, in true words: no URL in them, for it may hold a signature."""

from __future__ import annotations

import email.utils
import re
import ssl
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..words import in_words
from .network import CERTIFICATES, IN_A_BROWSER, PROXY, UNREACHED, proxy_of
from .store import STALLED, StoreFault

if TYPE_CHECKING:
    import requests

CONNECT = 10.0  # seconds
SIGN_AGAIN = (
    "check the credentials; where a signed URL has expired, sign it again: the same command with the new URLs goes on "
    "where it was"
)
NO_LIST = (
    "a web server gives the list of a folder only where it has been set to: name the tars, as "
    "https://.../out/{000000..000007}.tar"
)


def fault_of(error: Exception, url: str) -> StoreFault:
    """Of what the libraries raise; their own texts hold the URL."""
    import requests
    import urllib3

    told = _innermost(error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        within = CONNECT if isinstance(error, requests.ConnectTimeout) else STALLED
        return StoreFault(f"the server does not answer (nothing for {in_words(within)})", fix=UNREACHED)
    if isinstance(error, requests.TooManyRedirects):
        return StoreFault("the server redirects in a circle", passing=False)
    if isinstance(error, requests.exceptions.SSLError):
        cut = isinstance(_root(error), ssl.SSLEOFError)
        return StoreFault(f"no secure connection: {told}", passing=cut, fix=CERTIFICATES)
    if isinstance(error, requests.exceptions.ProxyError):
        return _of_the_proxy(error, url)
    unusable = requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema | UnicodeError
    if isinstance(error, unusable) or type(error) is ValueError:  # as PySocks raises, where it is installed
        if proxy := proxy_of(url):
            return StoreFault(f"the proxy {proxy} cannot be used for it", passing=False, fix=PROXY)
        return StoreFault("this is not a URL that can be asked for", passing=False)
    if isinstance(error, urllib3.exceptions.IncompleteRead | urllib3.exceptions.ProtocolError):
        return StoreFault(f"the connection broke off ({told})")
    if isinstance(error, requests.ConnectionError):
        return StoreFault(f"no connection to {_host(error, url)}: {told}", fix=UNREACHED)
    if "certificate bundle" in str(error):  # requests found no such file
        return StoreFault(str(error), passing=False, fix=CERTIFICATES)
    return StoreFault(f"the connection failed ({told})")


def refusal(answer: requests.Response) -> StoreFault:
    """Of a status that is none of those that were hoped for."""
    status = answer.status_code
    told = f"the server answers {status} {answer.reason or ''}".rstrip()
    if urlsplit(answer.url).scheme == "http" and (proxy := proxy_of(answer.url)):  # of https a proxy sees nothing
        told += f", through the proxy {proxy}"
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
        return StoreFault(told, wait=_retry_after(answer.headers.get("Retry-After", "")))
    fix = {401: SIGN_AGAIN, 403: SIGN_AGAIN, 407: PROXY}.get(status)
    return StoreFault(told + _s3_reason(answer), passing=False, fix=fix)


def page_instead() -> StoreFault:
    return StoreFault("the server sends a web page in place of the file", fix=IN_A_BROWSER)


def _of_the_proxy(error: Exception, url: str) -> StoreFault:
    """What a proxy did that was to connect: `Tunnel connection failed: 407 Proxy Authentication Required`, for one."""
    proxy = proxy_of(url)
    refused = re.fullmatch(r"Tunnel connection failed: (\d+) ?(.*)", str(_root(error)))
    if refused is None:
        return StoreFault(f"no connection to the proxy {proxy}: {_innermost(error)}", fix=PROXY)
    told = f"the proxy {proxy} answers {refused[1]} {refused[2]}".rstrip()
    return StoreFault(told, passing=refused[1].startswith("5"), fix=PROXY)


def _host(error: requests.RequestException, url: str) -> str:
    """Of the server that was asked, which is another one where the URL's own has redirected."""
    first = urlsplit(url).hostname
    host = urlsplit(error.request.url or "").hostname if error.request is not None else first
    return f"{host}" if host == first else f"{host}, to which {first} redirects"


def _retry_after(told: str) -> float:
    if told.strip().isdecimal() and len(told) < 9:
        return float(told)
    date = email.utils.parsedate_tz(told)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def _s3_reason(answer: requests.Response) -> str:
    """What an object store's XML says of the fault; the rest of it can hold signatures."""
    try:
        text = answer.raw.read(4096).decode(errors="replace")
    except Exception:  # the status alone will do
        return ""
    match = re.search(r"<Message>([^<>]{1,200})</Message>", text)
    return f" ({match[1].strip()})" if match else ""


def _innermost(error: BaseException) -> str:
    """The system's own words, of an error that libraries have wrapped."""
    error = _root(error)
    return (error.strerror if isinstance(error, OSError) and error.strerror else "") or type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The error that libraries have wrapped."""
    while True:
        inner = error.__cause__ or error.__context__ or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None:
            return error
        error = inner
