"""A bucket on this machine: moto's S3 server, and a server in front of it that can do wrong."""

import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from faulty_server import FaultyServer

from cogcommon.store import remote_folder, store

_HOP = {"host", "expect", "transfer-encoding", "connection"}  # headers of one connection


@contextmanager
def s3_server():
    """The URL of an S3 server that has ``s3://bucket``; the environment names it."""
    pytest.importorskip("moto", reason="pip install 'moto[s3]' flask flask-cors")
    pytest.importorskip("s3fs", reason="pip install s3fs")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT_URL": url,
            "ACCESS_KEY_ID": "AKIAKEY",
            "SECRET_ACCESS_KEY": "SECRETKEY",
            "DEFAULT_REGION": "us-east-1",
            "EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        # What another server in this process was given is here, too: moto keeps it by the process.
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()  # those of another server
        files(url).mkdir("bucket")
        yield url
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def files(url):
    """The file system of a server's buckets, as a person sees it: nothing is remembered or tried again."""
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True, use_listings_cache=False)


@contextmanager
def faulty(url, folder):
    """A server in front of an S3 server, which the environment names; ``wrong`` is its fault, ``after`` one once
    the request has been carried out: a function of the handler, which returns True where it has answered."""

    def forward(handler):
        server = handler.server
        if server.wrong is not None and server.wrong(handler):
            return True
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
        headers.setdefault("Content-Type", "application/octet-stream")  # urllib's own says that it is a form
        data = handler.body if handler.command in ("PUT", "POST") else None
        request = urllib.request.Request(url + handler.path, data=data, headers=headers, method=handler.command)
        try:
            with urllib.request.urlopen(request) as answer:
                status, told, body = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            status, told, body = error.code, error.headers, error.read()
        if server.after is not None and server.after(handler):
            return True
        keep = {name: value for name, value in told.items() if name.lower() not in ("connection", "date", "server")}
        return handler.answer(status, body, keep)

    import s3fs

    server = FaultyServer(folder)
    server.wrong = server.after = None
    server.begin(forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setattr(store, "_FIRST_WAIT", 0.05)
        for module, name in ((store, "OPENING"), (remote_folder, "OPENING"), (remote_folder, "WRITING")):
            patch.setattr(module, name, store.Patience(10))
        patch.setattr(store, "FAULTS", store.Faults())
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()
