"""What lies between this machine and a store: proxies, certificates, and pages that come in a file's place."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

# What helps.
PROXY = (
    "check HTTPS_PROXY (HTTP_PROXY for http://), as http://NAME:PASSWORD@HOST:PORT, and NO_PROXY=HOST for what is "
    "reached without it"
)
CERTIFICATES = (
    "where a company's proxy or server has certificates of its own: export REQUESTS_CA_BUNDLE=FILE (SSL_CERT_FILE=FILE "
    "for gs and hf), a .pem file that holds them"
)
UNREACHED = (
    "check the address, and what this machine needs to reach it: a VPN, a proxy (HTTPS_PROXY, HTTP_PROXY for "
    "http://); then run the same command again"
)
ANOTHER_SERVER = "another server or mirror; a proxy between may be at fault"
IN_A_BROWSER = "open the URL in a browser: it may be the page of a login or of a proxy"

_PAGE = re.compile(rb"\s*<(!doctype\s+html|html|head)\b", re.IGNORECASE)


def is_page(start: bytes | bytearray) -> bool:
    """Whether a file that begins so is a web page; no clip, picture or tar does."""
    return _PAGE.match(start) is not None


def certificates() -> str | bool:
    """The file of certificates that the environment names for Python's own TLS, if it is there.

    requests goes by REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, and by certifi's file where neither is set.
    """
    named = os.environ.get("SSL_CERT_FILE", "")
    return named if os.path.isfile(named) else True  # noqa: PTH113 pathlib raises for a name that is too long


def proxy_of(url: str) -> str:
    """The proxy through which requests asks for a URL, without name and password; empty where there is none."""
    import requests

    try:
        proxy = str(requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or "").rpartition("@")[2]
    except ValueError:  # it is no URL
        return ""
    return urlsplit(proxy).netloc or proxy
