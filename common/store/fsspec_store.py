"""Shards in object stores (s3, gs, hf) and wherever else fsspec reaches, as a store."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn

from ..errors import StoreError
from .address import READERS
from .network import ANOTHER_SERVER, CERTIFICATES, PROXY, UNREACHED
from .store import STALLED, ReadPart, StoreFault, without_secrets

_SLOW = 64 * 1024  # bytes a second: fsspec tells nothing of progress, so an attempt may take this long in all
_CREDENTIALS = (
    "check the credentials that this machine gives (environment, configuration file or role), which may have expired, "
    "and the region"
)
# Refusals that another attempt may not meet, of those that name the request as what is wrong (400 to 499).
_PASSING_STATUS = {"408", "409", "425", "429"}
# botocore's, of what the environment and the files of ~/.aws say.
_NOT_SET_UP = {"ProfileNotFound", "ConfigParseError", "ConfigNotFound", "InvalidConfigError", "SSOError",
               "TokenRetrievalError"}  # fmt: skip
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}


def open_fsspec(url: str, option: str) -> tuple[FsspecStore, str]:
    """The store of a URL, and its path there.

    Raises:
        StoreError: nothing reads this kind of URL, or what does is not installed.
    """
    scheme = url.partition("://")[0].rpartition("::")[2].lower()
    shown = without_secrets(url)
    module, package, extra = READERS.get(scheme, ("", "", ""))
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            instead = f", or with cogtune's own extra: pip install -e '.[{extra}]'" if extra else ""
            raise StoreError(
                f"{scheme}:// needs {package}, which is not installed",
                where=f"{option} {shown}",
                fix=f"pip install {package}{instead}",
            ) from error
    options: dict[str, Any] = {}
    if module == "s3fs":  # one place tries again: `store.patiently`, which counts and tells
        options = {"config_kwargs": {"connect_timeout": 10, "read_timeout": STALLED, "retries": {"max_attempts": 0}}}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, OSError) as error:
        raise StoreError(
            f"{shown} cannot be looked up: {without_secrets(str(error))}",
            where=option,
            fix="a path, or a URL of http, https, s3, gs or hf",
        ) from error
    if module == "s3fs":
        fs.retries = 1
    return FsspecStore(fs), path


class FsspecStore:
    """Files of an fsspec file system; see `store.Store`."""

    remote = True

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str, start: int, end: int) -> ReadPart:
        try:
            data = self._call("cat_file", end - start, path, start=start, end=end)
        except StoreFault as fault:
            if not {"InvalidRange", "416"} & set(_codes(fault)):
                raise
            data = b""  # a range behind the file's end
        if len(data) > end - start:
            raise StoreFault(
                f"the store sends {len(data):,} bytes where {end - start:,} are asked for: it ignores ranges",
                passing=False,
                fix=ANOTHER_SERVER,
            )
        return ReadPart(bytearray(data))

    def read_all(self, path: str) -> ReadPart:
        data = self._call("cat_file", 0, path)
        return ReadPart(bytearray(data), len(data))

    def stat(self, path: str, *, fresh: bool = False) -> ReadPart:
        if fresh:
            self._fs.invalidate_cache()
        info = self._call("info", 0, path)  # from the folder's listing where that has been read already
        return ReadPart(bytearray(), info["size"], etag_of(info))

    def look_again(self) -> None:
        """Forget what listings of folders have told."""
        self._fs.invalidate_cache()

    def names(self, folder: str) -> list[str]:
        return [str(path) for path in self._call("ls", 0, folder, detail=False)]

    def matching(self, pattern: str) -> list[str]:
        found: Sequence[str] = self._call("glob", 0, pattern)
        return [str(path) for path in found]

    def info(self, path: str) -> dict[str, Any]:
        """What the store says of an object now."""
        self._fs.invalidate_cache()
        info: dict[str, Any] = self._call("info", 0, path)
        if info.get("type") == "directory":
            raise FileNotFoundError(path)
        return info

    def entries(self, folder: str) -> list[dict[str, Any]]:
        """What the store says of each object of a folder now; without folders in it, and an object of its name."""
        self._fs.invalidate_cache()
        found: list[dict[str, Any]] = self._call("ls", 0, folder, detail=True)
        inside = (one for one in found if str(one["name"]).strip("/") != folder.strip("/"))
        return [one for one in inside if one.get("type") != "directory" and not str(one["name"]).endswith("/")]

    def put(self, path: str, data: bytes, *, create: bool = False) -> None:
        """Write an object in one request.

        Raises:
            FileExistsError: there is one, and ``create`` was asked for.
        """
        self._write("pipe_file", len(data), path, data, create=create)

    def upload(self, path: str, file: Path, *, create: bool = False) -> None:
        """Write an object from a file. Raises as `put`."""
        self._write("put_file", file.stat().st_size, str(file), path, create=create)

    def copy(self, path: str, to: str) -> None:
        """Copy an object within the store."""
        self._call("cp_file", self.info(path)["size"], path, to)

    def remove(self, path: str) -> None:
        self._call("rm_file", 0, path)

    def _write(self, name: str, size: int, *args: Any, create: bool) -> None:
        try:
            self._call(name, size, *args, **({"mode": "create"} if create else {}))
        except StoreFault as fault:
            if create and _says_there_is_one(fault):
                raise FileExistsError from fault
            raise

    def _call(self, name: str, size: int, *args: Any, **options: Any) -> Any:
        """One call, with a time-out; what goes wrong is a `StoreFault`."""
        timeout = STALLED + size / _SLOW
        try:
            method = getattr(self._fs, "_" + name, None)
            if isinstance(self._fs, fsspec.asyn.AsyncFileSystem) and method is not None:
                return fsspec.asyn.sync(self._fs.loop, method, *args, timeout=timeout, **options)
            return _within(timeout, getattr(self._fs, name), *args, **options)
        except FileNotFoundError:
            raise
        except (TimeoutError, fsspec.exceptions.FSTimeoutError) as error:
            raise StoreFault(f"the store does not answer (nothing within {timeout:.0f} s)", fix=UNREACHED) from error
        except Exception as error:  # each file system raises its own kinds
            raise _fault_of(error) from error


def etag_of(info: dict[str, Any]) -> str:
    """What changes with an object's content, of what its store says of it."""
    names = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime", "created")
    return str(next((info[name] for name in names if info.get(name)), ""))


def _fault_of(error: Exception) -> StoreFault:
    """What went wrong, whether it may pass, and what helps: the store's refusal, or what this machine lacks."""
    text = without_secrets(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return StoreFault(text, passing=False, fix=CERTIFICATES)
    if "HTTPClientError" in kinds and any(isinstance(one, FileNotFoundError) for one in _causes(error)):
        return StoreFault("there is no such file of certificates as is named", passing=False, fix=CERTIFICATES)
    if "407" in _codes(error):
        return StoreFault("the proxy asks for a name and a password (407)", passing=False, fix=PROXY)
    if "proxies_config" in text:
        return StoreFault(text, passing=False, fix=PROXY)
    if "ProxyConnectionError" in kinds:
        return StoreFault(text, fix=PROXY)
    if isinstance(error, PermissionError) or _refused(error):
        return StoreFault(f"the store refuses: {text}", passing=False, fix=_CREDENTIALS)
    if kinds & _NOT_SET_UP or "Credentials" in type(error).__name__ or isinstance(error, ValueError | TypeError):
        return StoreFault(text, passing=False, fix=_CREDENTIALS)
    return StoreFault(text)


def _refused(error: BaseException) -> bool:
    """Whether a store will refuse the same request again. To a HEAD it gives the status alone: 400 of a token's end,
    301 of a bucket in another region."""
    told = set(_codes(error))
    refused = any(len(code) == 3 and code[0] in "34" and code.isdigit() for code in told) or "501" in told
    return refused and not told & (_PASSING_STATUS | _PASSING_CODES)


def _says_there_is_one(error: BaseException) -> bool:
    """Whether a store has refused to write over an object, each in its own words."""
    refusals = {"PreconditionFailed", "412", "BlobAlreadyExists", "conditionNotMet"}
    return any(isinstance(one, FileExistsError) for one in _causes(error)) or bool(refusals & set(_codes(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        told = getattr(error, "kwargs", None)  # where botocore keeps what it has wrapped
        inner = told.get("error") if isinstance(told, dict) else None
        error = inner if isinstance(inner, BaseException) else error.__cause__


def _codes(error: BaseException) -> Iterator[str]:
    """What an error, or what it came from, gives as its code or status: botocore's, aiohttp's, gcsfs's, Azure's."""
    for one in _causes(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            yield str(answer.get("Error", {}).get("Code", ""))
            yield str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        if any(kind.__name__ == "HttpProcessingError" for kind in type(one).__mro__):
            continue  # aiohttp's, of an answer that broke off: its 400 is nobody's status
        names = ("status",) if hasattr(one, "status") else ("code", "error_code")
        yield from (str(getattr(one, name, "")) for name in names)


def _within(seconds: float, act: Any, *args: Any, **options: Any) -> Any:
    """Call something that has no time-out of its own; a thread that it holds on to ends with the process."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(act(*args, **options))
        except BaseException as error:  # raised below, by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
