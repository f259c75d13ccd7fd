"""Shards behind a web server that misbehaves: right data, or the true reason within a stated time.

The patience is shortened here, and STALLED where a server stalls; the times of a real run are 20 s an attempt, 60 s
while opening and 300 s in training.
"""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from faulty_server import FaultyServer, OwnTime, waits_take_no_time, zipped

from cogcommon.errors import CogError, ShardError, StoreError
from cogcommon.store import http_faults, http_store, store
from cogtrain.data import shard_set
from cogtrain.data.batches import read_sample
from cogtrain.data.shards import open_shards
from cogtrain.settings.training import LoraSettings

STALL, PATIENCE = 0.25, 0.8  # seconds
WITHIN = 8.0  # seconds of waits between attempts with which each case must have ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("served")
    make_shards(folder / "out", samples=4)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    shards = open_shards([str(folder / "out")])
    return [bytes(shards.read(shards.extent(index))) for index in range(4)]


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(store, "OPENING", store.Patience(2 * PATIENCE))  # a second's Retry-After, too
    monkeypatch.setattr(shard_set, "TRAINING", store.Patience(PATIENCE))
    monkeypatch.setattr(store, "FAULTS", store.Faults())
    server = FaultyServer(folder)
    yield server
    server.stop()


@pytest.fixture
def clock(monkeypatch):
    return waits_take_no_time(monkeypatch)


class EveryPiece(OwnTime):
    """A time by which each piece of a body comes 15 seconds after the one before."""

    def monotonic(self):
        self.now += 15
        return self.now


def hurry(fault, monkeypatch):
    """Make times short of which the fault is a matter; a machine that is slow is taken for none of the others."""
    if "stall" in fault:
        monkeypatch.setattr(http_store, "STALLED", STALL)
    if "slow" in fault or "drip" in fault:
        monkeypatch.setattr(http_store, "time", EveryPiece())


def read_everything(server, query=""):
    shards = open_shards([f"{server.url}/out/{{000000..000001}}.tar{query}"])
    return [bytes(shards.read(shards.extent(index))) for index in range(len(shards))]


def always(act):
    return lambda handler: act(handler)


def once(act, of=lambda handler: True):
    """The first time each thing is asked for."""
    return lambda handler: act(handler) if handler.time == 1 and of(handler) else None


def samples(act):
    return lambda handler: act(handler) if handler.is_sample else None


def status(code, headers=None, body=b""):
    return lambda handler: handler.answer(code, body, headers)


def wrong_range(handler):
    start, end = handler.part()
    return handler.serve(headers={"Content-Range": f"bytes {start + 512}-{end + 511}/{len(handler.data)}"})


def wrong_size(handler):
    start, end = handler.part()
    return handler.range and handler.serve(headers={"Content-Range": f"bytes {start}-{end - 1}/99999999"})


def shifted(handler):
    """The right headers, other bytes."""
    return handler.serve(change=lambda body: body[512:] + body[:512])


def random_bytes(handler):
    return handler.serve(change=lambda body: bytes(len(body) - 8) + time.monotonic_ns().to_bytes(8, "big"))


def to_other_path(handler):
    if handler.name.startswith("other/"):
        handler.name = handler.name.removeprefix("other/")
        return handler.serve()
    return handler.answer(302, b"", {"Location": f"/other/{handler.name}?X-Amz-Signature=SECRET"})


LOGIN = b"<!doctype html><title>Log in</title>"
EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message><Sign>SECRET</Sign></Error>"

# What the server does: right data, whatever it costs.
SURVIVED = {
    "500 once": once(status(500)),
    "502 once": once(status(502)),
    "503 once, with Retry-After": once(status(503, {"Retry-After": "1"}), lambda h: "parquet" in h.name),
    "503 once, until a date": once(status(503, {"Retry-After": "Sun, 01 Jan 2017 00:00:00 GMT"})),
    "429 once": once(status(429)),
    "a reset once": once(lambda handler: handler.reset()),
    "a stall once, before a sample's answer": once(lambda handler: handler.stall(), lambda h: h.is_sample),
    "a stall once, inside a sample": once(lambda handler: handler.stall(after=10_000), lambda h: h.is_sample),
    "a body cut once": once(lambda handler: handler.cut()),
    "other bytes once": once(shifted, lambda handler: handler.is_sample),
    "a wrong Content-Range once": once(wrong_range, lambda handler: bool(handler.range)),
    "no Content-Length": always(lambda handler: handler.serve(length=False)),
    "slow, but steady": samples(lambda handler: handler.slowly(50_000, 0.05)),
    "a redirect": always(to_other_path),
    "HEAD refused": lambda handler: handler.answer(403) if handler.command == "HEAD" else None,
    "another ETag each time": always(lambda handler: handler.serve(etag=f'"{time.monotonic_ns()}"')),
    "no ETag": always(lambda handler: handler.serve(headers={"ETag": None})),
    "connections closed after each answer": always(lambda handler: setattr(handler, "close_connection", True)),
    "headers in lower case, and a charset": always(lambda h: h.serve(headers={"content-type": "text/plain;charset=x"})),
}

# What it does, and what the error must say.
TOLD = {
    "no Range": (always(lambda handler: handler.serve(ranges=False)), "gives no parts of files"),
    "403": (always(status(403)), "answers 403 Forbidden"),
    "403 of an object store": (always(status(403, body=EXPIRED)), r"403 Forbidden \(Request has expired\)"),
    "401": (always(status(401)), "answers 401 Unauthorized"),
    "404": (always(status(404)), "no such shard"),
    "404 of the records": (lambda h: status(404)(h) if "parquet" in h.name else None, "without its record"),
    "404 of samples": (samples(status(404)), "the shard is gone"),
    "500 always": (always(status(500)), "answers 500 Internal Server Error .* attempts"),
    "503 always": (samples(status(503)), "answers 503 Service Unavailable .* attempts"),
    "503, come back in an hour": (always(status(503, {"Retry-After": "3600"})), "asks to wait 60 min"),
    "418": (always(status(418)), "answers 418"),
    "206 for all that is not asked for": (always(status(206)), "answers 206"),
    "304": (always(status(304)), "answers 304"),
    "signature that expires mid-run": (samples(status(403, body=EXPIRED)), "403 Forbidden .*expired"),
    "a stall": (always(lambda handler: handler.stall()), "does not answer"),
    "a stall inside samples": (samples(lambda handler: handler.stall(after=10_000)), "does not answer|stalls"),
    "a drip": (samples(lambda handler: handler.slowly(1, 0.01)), "stalls"),
    "cut bodies": (samples(lambda handler: handler.cut()), "broke off|cut short"),
    "a length too short": (samples(lambda h: h.serve(headers={"Content-Length": "100"})), "contradicts itself"),
    "resets": (always(lambda handler: handler.reset()), "broke off|connection"),
    "resets of samples": (samples(lambda handler: handler.reset()), "broke off|connection"),
    "redirects in a circle": (always(lambda h: h.answer(302, b"", {"Location": h.path})), "redirects in a circle"),
    "wrong Content-Range": (always(lambda h: wrong_range(h) if h.range else None), "other bytes than asked for"),
    "no numbers": (samples(lambda h: h.serve(headers={"Content-Range": "bytes"})), "without saying which"),
    "gzip": (always(zipped), "compresses what it sends"),
    "gzip of samples": (samples(zipped), "compresses what it sends"),
    "a login page for tars": (lambda h: status(200, body=LOGIN)(h) if "tar" in h.name else None, "a web page in place"),
    "a login page for samples": (samples(status(200, body=LOGIN)), "a web page in place of the file"),
    "a redirect to where nobody is": (always(status(302, {"Location": "http://localhost:9/?token=SECRET"})),
                                      "no connection to localhost, to which 127.0.0.1 redirects"),
    "a login page": (always(status(200, body=LOGIN)), "something else in place of the record"),
    "other bytes each time": (samples(random_bytes), "gives other bytes each time"),
    "a record cut somewhere else each time": (
        lambda h: h.serve(change=lambda body: body[: 1000 + h.time]) if "parquet" in h.name else None,
        "gives other bytes each time",
    ),
    "not http": (always(lambda h: h.wfile.write(b"SSH-2.0-OpenSSH\r\n") and h.reset()), "broke off|connection"),
    "a wrong size": (always(wrong_size), "other bytes than asked for"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SURVIVED)
def test_right_data_in_spite_of(server, clock, expected, fault, monkeypatch):
    for module, name in ((store, "OPENING"), (shard_set, "TRAINING")):
        monkeypatch.setattr(module, name, store.Patience(WITHIN))
    hurry(fault, monkeypatch)
    server.begin(SURVIVED[fault])
    assert read_everything(server) == expected
    assert clock.now < WITHIN
    if "once" in fault:
        assert sum(store.FAULTS.counts.values()) >= 1 and "made good" in str(store.FAULTS)


@pytest.mark.parametrize("fault", TOLD)
def test_the_true_reason_within_a_stated_time(server, clock, capfd, fault, monkeypatch):
    act, says = TOLD[fault]
    hurry(fault, monkeypatch)
    server.begin(act)
    with pytest.raises(CogError, match=says) as caught:
        read_everything(server, "?X-Amz-Signature=SECRET")
    assert clock.now < WITHIN
    told = f"{caught.value}{capfd.readouterr()}"
    assert server.url in told and "SECRET" not in told
    assert "damaged" not in told


def test_a_shard_that_was_replaced_mid_run_is_not_called_damaged(server, folder):
    shards = open_shards([f"{server.url}/out"])
    other = lambda handler: handler.serve(change=lambda body: bytes(len(body)), etag='"new"')  # noqa: E731
    server.begin(other)
    with pytest.raises(StoreError, match="has been replaced since the run was opened"):
        shards.read(shards.extent(0))


def test_an_upload_that_was_cut_short(server, tmp_path, make_shards):
    (tar,) = make_shards(tmp_path / "out", samples=2)
    server.folder = tmp_path
    for size in (tar.stat().st_size - 512, tar.stat().st_size // 2, 0):
        os.truncate(tar, size)
        with pytest.raises(StoreError, match=f"not the tar of its record: the tar has {size:,} bytes"):
            open_shards([f"{server.url}/out"])


def test_damage_is_proved_by_a_second_reading(server, tmp_path, make_shards):
    (tar,) = make_shards(tmp_path / "out", samples=2)
    server.folder = tmp_path
    shards = open_shards([f"{server.url}/out"])
    extent = shards.extent(0)
    with tar.open("r+b") as stream:
        stream.seek(extent.offset + 3000)
        stream.write(b"damage!!")
    os.utime(tar, ns=(0, int(shards.shards[0].etag.strip('"'))))
    server.begin(None)
    with pytest.raises(ShardError, match="a damaged shard: sample") as caught:
        shards.read(extent)
    assert caught.value.where == f"{server.url}/out/000000.tar"
    assert len(server.asked) == 3  # the sample, once more, and whether the file is still the same


def test_few_requests(server, expected):
    """A shard costs two, a sample one; signed URLs need no HEAD."""
    server.begin(None)
    assert read_everything(server, "?sig=1") == expected
    assert [method for method, _, _ in server.asked] == ["GET"] * 8
    opening, reading = server.asked[:4], server.asked[4:]
    assert sorted(name.rpartition(".")[2] for _, name, _ in opening) == ["parquet", "parquet", "tar", "tar"]
    assert len({(name, range_) for _, name, range_ in reading}) == 4
    server.begin(None)
    open_shards([f"{server.url}/out/*.tar"])
    assert len(server.asked) == 6  # and whether a file has this very name, and the folder's page


def test_all_ways_to_name_shards_behind_a_url(server, folder):
    whole = open_shards([str(folder / "out")]).fingerprint
    for word in ("out", "out/", "out/*.tar", "out/00000[01].tar", "out/{000000,000001}.tar?a=b&c={d}"):
        shards = open_shards([f"{server.url}/{word}"])
        assert shards.fingerprint == whole
        assert read_sample(shards, 0).caption.startswith("caption")
        assert shards.empty_caption()
    for word in ("out/9*.tar", "nothing/"):
        with pytest.raises(ShardError, match="no shard matches") as caught:
            open_shards([f"{server.url}/{word}"])
        assert "{000000..000007}.tar" in caught.value.fix
    server.begin(lambda handler: handler.answer(403) if handler.name == "out/" else None)
    with pytest.raises(StoreError, match="403 Forbidden") as caught:
        open_shards([f"{server.url}/out"])
    assert "{000000..000007}.tar" in caught.value.fix


def test_a_folder_whose_page_links_by_whole_paths(server, folder):
    """As some servers write them, encoded; the name that was typed is not."""
    page = "".join(f'<a href="/my%20{tar.parent.name}/{tar.name}">x</a>' for tar in (folder / "out").glob("*.tar"))

    def moved(handler):
        handler.name = handler.name.replace("my out/", "out/")
        return handler.answer(200, page.encode()) if handler.name == "out/" else None

    server.begin(moved)
    assert len(open_shards([f"{server.url}/my out/"]).shards) == 2


def test_a_page_in_place_of_the_empty_caption(server):
    shards = open_shards([f"{server.url}/out"])
    server.begin(always(status(200, body=LOGIN)))
    with pytest.raises(StoreError, match="something else in place of the embedding of the empty caption"):
        shards.empty_caption()


def test_each_url_may_be_signed_by_itself(server, folder):
    """As an object store signs: a signature opens one file, for GET alone."""

    def signed(handler):
        right = handler.query == f"X-Amz-Signature={handler.name.replace('/', '-')}"
        return None if right and handler.command == "GET" else handler.answer(403)

    def sign(name):
        return f"{server.url}/out/{name}?X-Amz-Signature=out-{name}"

    server.begin(signed)
    names = ["000000.tar", "000001.tar", "000000.parquet", "000001.parquet", "empty_caption.safetensors"]
    shards = open_shards([sign(name) for name in names])
    assert len(shards) == 4 and shards.read(shards.extent(0)) and shards.empty_caption()
    with pytest.raises(StoreError, match="403") as caught:
        open_shards([sign("000000.tar")])
    assert "000000.parquet" in caught.value.where and "Signature" not in str(caught.value)


def test_names_and_passwords_in_urls_are_used_and_never_shown(server):
    seen = []
    server.begin(lambda handler: seen.append(handler.headers.get("Authorization")) or handler.answer(403))
    with pytest.raises(StoreError) as caught:
        open_shards([server.url.replace("http://", "http://ann:pa55w0rd@") + "/out/000000.tar?token=SECRET"])
    assert seen[0].startswith("Basic ")
    assert caught.value.where == f"{server.url}/out/000000.parquet"
    assert "pa55w0rd" not in str(caught.value) and "SECRET" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "nobody.invalid"])
def test_nobody_answers(server, clock, host):
    with pytest.raises(StoreError, match="no connection to") as caught:
        open_shards([f"http://{host}/out/000000.tar?sig=SECRET"])
    assert "SECRET" not in str(caught.value) and clock.now < WITHIN
    assert "check the address" in caught.value.fix


def test_a_run_that_ends_does_not_wait_for_its_readers(server, monkeypatch):
    monkeypatch.setattr(store, "_FIRST_WAIT", 60.0)  # seconds, which are not waited for
    shards = open_shards([f"{server.url}/out"])
    server.begin(samples(status(503)))
    stop = store.Stop()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    file = shards.shards[0].file
    with pytest.raises(StoreError, match="the run has ended"):
        file.read(0, 10**6, store.Patience(100), stop)
    assert time.monotonic() - began < 60


LEAVES = """
import sys
from cogcommon.cli.leaving import run_and_leave
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.store import http_store
from cogtrain.data.batches import Collator, prefetch
from cogtrain.data.sampler import Slot
from cogtrain.data.shards import open_shards
from cogtrain.model.objective import Objective

def run():
    http_store.STALLED = 1000.0
    shards = open_shards([sys.argv[1]])
    batches = prefetch(
        shards, iter([[Slot(index, 0, 0)] for index in range(len(shards))]),
        Collator(Objective.of(open_checkpoint("random-tiny")), 0), ahead=4, pin=False,
    )
    next(batches)
    print("leaving", flush=True)
    if sys.argv[2] == "failed":
        raise SystemExit(2)
    batches.close()

run_and_leave(run)  # as both programs end: the interpreter's own end can abort a thread that is inside C++
"""


@pytest.mark.parametrize("how", ["done", "failed"])
def test_a_process_that_ends_does_not_wait_for_a_server(server, how):
    """Readers blocked in a socket would hold it for as long as an attempt may stall, here 1000 s."""
    first = open_shards([f"{server.url}/out"]).shards[0].shown.rpartition("/")[2]
    server.begin(samples(lambda handler: not handler.name.endswith(first) and handler.stall()))
    with subprocess.Popen(
        [sys.executable, "-c", LEAVES, f"{server.url}/out", how], stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "leaving\n"
        assert process.wait(60) == (2 if how == "failed" else 0)  # 1 s alone on a machine


def test_a_server_that_never_accepts(server, monkeypatch):
    for module, name in ((http_faults, "CONNECT"), (http_store, "STALLED")):
        monkeypatch.setattr(module, name, STALL)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        with pytest.raises(StoreError, match="does not answer"):
            open_shards([f"http://127.0.0.1:{deaf.getsockname()[1]}/out/000000.tar"])


def test_a_signature_that_expires_mid_run_costs_no_step(server, folder, tmp_path, train_here, losses, capfd):
    """The run ends with the reason; signed anew, the same command goes on to the undisturbed losses."""

    def settings(out, where):
        return LoraSettings(shards=where, out=tmp_path / out, steps=8, rank=4, seed=1, save_every=1)

    undisturbed = losses(train_here(settings("undisturbed", [str(folder / "out")])))
    server.begin(
        lambda h: h.answer(403, EXPIRED) if "OLD" in h.query and h.is_sample and len(server.asked) > 10 else None
    )
    tars = f"{server.url}/out/{{000000..000001}}.tar?X-Amz-Signature="
    with pytest.raises(StoreError, match=r"403 Forbidden .*Request has expired"):
        train_here(settings("run", [tars + "OLD"]))
    saved = losses(tmp_path / "run")
    assert 0 < len(saved) < 8
    train_here(settings("run", [tars + "NEW"]))
    assert losses(tmp_path / "run") == undisturbed
    written = "".join(one.read_text(errors="replace") for one in (tmp_path / "run").rglob("*") if one.is_file())
    assert "X-Amz" not in written + str(capfd.readouterr()) and server.url in written
