"""Clips and lists in a bucket and behind http: moto's server on this machine, and servers that do wrong."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bucket import faulty, files, s3_server
from faulty_server import FaultyServer
from waiting import wait_until

from cogcommon.errors import CogError
from cogcommon.store import store
from cogprep.commands.encode import encode
from cogprep.commands.validate import validate
from cogprep.settings.encode import ValidateSettings
from cogprep.source import clip_cache, remote
from cogprep.source.addresses import named_without_secrets, remote_address
from cogprep.source.clip import BadClip
from cogprep.source.clip_cache import ObjectState, place_of, use_cache
from cogprep.source.remote import Unreached, open_object, read_object, state_of
from cogprep.source.source_file import file_state, hash_whole, open_named, unchanged


@pytest.fixture(scope="module")
def s3():
    with s3_server() as url:
        yield url


@pytest.fixture
def there(s3, drawn):
    """The file system of a bucket that holds the drawn clips and their lists in ``bucket/ds``."""
    fs = files(s3)
    for name in fs.find("bucket"):
        fs.rm(name)
    for index in range(5):
        fs.put_file(str(drawn / f"{index}.mp4"), f"bucket/ds/clips/{index}.mp4")
    fs.pipe_file("bucket/ds/prompts.txt", "".join(f"wave number {index}\n" for index in range(5)).encode())
    fs.pipe_file("bucket/ds/videos.txt", "".join(f"clips/{index}.mp4\n" for index in range(5)).encode())
    return fs


@pytest.fixture(autouse=True)
def _of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_answered", set())
    monkeypatch.setattr(remote, "_silent", set())
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(clip_cache, "_SPARE", 0)  # how full the disk is, is not on trial
    monkeypatch.setenv("COGPREP_SIGNED_CLIPS", "")
    monkeypatch.setenv("COGPREP_CLIP_CACHE", "")
    use_cache(tmp_path / "cache", 10**9)


@pytest.fixture
def web(drawn, tmp_path):
    for clip in drawn.glob("*.mp4"):
        shutil.copy(clip, tmp_path / clip.name)
    server = FaultyServer(tmp_path)
    yield server
    server.stop()


def tars(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("ds/s3:/bucket/a.mp4", "s3://bucket/a.mp4"),
        ("s3:/bucket/ds/a.mp4", "s3://bucket/ds/a.mp4"),
        ("s3:/bucket/ds/gs:/other/a.mp4", "gs://other/a.mp4"),
        ("/ds/https:/host/a.mp4?from=http:/x", "https://host/a.mp4?from=http:/x"),
        ("oss:/bucket/ds/prompts.txt", "oss://bucket/ds/prompts.txt"),
        ("/ds/webdav:/host/a.mp4", "webdav://host/a.mp4"),
        ("s33:/bucket/ds", "s33://bucket/ds"),  # which nothing reads, as will be said
        ("/ds/s33:/bucket/a.mp4", None),
        ("c:/ds/a.mp4", None),
        ("ds/videos/a.mp4", None),
        ("ds/file:/a.mp4", None),
        ("/data/s3/a.mp4", None),
    ],
)
def test_an_address_is_told_from_a_path(path, address):
    assert remote_address(Path(path)) == address


def keys_of(out):
    return {key for record in out.glob("*.parquet") for key in pq.read_table(record).column("key").to_pylist()}


def test_clips_in_a_bucket_among_local_ones(encoded, there, settings_of, tmp_path):
    entries = ["s3://bucket/ds/clips/0.mp4", "1.mp4", "s3://bucket/ds/clips/2.mp4", "3.mp4", "4.mp4"]
    (encoded / "ds" / "videos.txt").write_text("\n".join(entries))
    assert encode(settings_of(encoded, out=tmp_path / "mixed", cache=tmp_path / "cache")).encoded == 5
    assert keys_of(tmp_path / "mixed") == keys_of(encoded / "out")


def test_what_is_known_is_not_read_and_what_changed_is_encoded(encoded, there, s3, settings_of, tmp_path):
    new = tmp_path / "new"
    settings = settings_of(encoded, data_root=Path("s3://bucket/ds"), out=new, cache=tmp_path / "cache")
    assert encode(settings).encoded == 5 and keys_of(new) == keys_of(encoded / "out")
    assert json.loads((new / "origin.json").read_text())["data_root"] == "s3://bucket/ds"
    shutil.rmtree(tmp_path / "cache")
    with faulty(s3, tmp_path) as proxy:
        report = encode(settings)
        got = [path for method, path, _ in proxy.asked if method == "GET" and path.endswith(".mp4")]
    assert (report.encoded, report.reused, got) == (0, 5, [])
    there.cp_file("bucket/ds/clips/0.mp4", "bucket/ds/clips/3.mp4")
    report = encode(settings)
    assert (report.encoded, report.reused, report.dropped) == (1, 4, 1)


@pytest.mark.parametrize("fault", ["500", "reset", "slow", "cut"])
def test_a_passing_fault_is_made_good(fault, there, s3, tmp_path, drawn):
    with faulty(s3, tmp_path) as proxy:
        did = []

        def once(handler):
            if handler.command != "GET" or did:
                return None
            did.append(handler.path)
            if fault == "slow":
                return handler.server.released.wait(0.5)  # and is served then
            body = b"<Error><Code>InternalError</Code></Error>"
            return handler.reset() if fault == "reset" else handler.answer(500, body)

        proxy.wrong = None if fault == "cut" else once
        proxy.after = (lambda handler: once(handler)) if fault == "cut" else None
        state_of("s3://bucket/ds/clips/0.mp4")
        found = hash_whole(Path("s3://bucket/ds/clips/0.mp4"))
        assert did
    assert found.sha256 == hash_whole(drawn / "0.mp4").sha256


@pytest.mark.parametrize(
    ("status", "says"),
    [(403, "the server answers 403"), (500, "the server answers 500"), (404, "the file is missing"),
     (200, "the server sends a web page in place of the file")],
)  # fmt: skip
def test_what_a_server_refuses_is_told_as_it_is(status, says, web, monkeypatch):
    for name in ("_UNKNOWN", "_KNOWN"):
        monkeypatch.setattr(remote, name, store.Patience(0.1))
    web.begin(lambda handler: handler.answer(status, b"<!DOCTYPE html><title>Log in</title>"))
    with pytest.raises(BadClip, match=says) as caught:
        open_named(Path(f"ds/{web.url}/0.mp4?X-Amz-Signature=SECRET"))
    assert isinstance(caught.value, Unreached) == (status != 404)
    assert caught.value.fault().passing == (status != 404)
    assert "SECRET" not in str(caught.value) and "damaged" not in str(caught.value)


def test_a_page_in_place_of_a_list_is_none(web, monkeypatch):
    """Its lines would be clips and captions."""
    monkeypatch.setattr(remote, "_UNKNOWN", store.Patience(0.1))
    web.begin(lambda handler: handler.answer(200, b"\n<html><title>Log in</title></html>"))
    with pytest.raises(Unreached, match="a web page in place of the file"):
        read_object(f"{web.url}/prompts.txt")


def test_a_server_that_stalls(web, monkeypatch):
    from cogcommon.store import http_store

    monkeypatch.setattr(http_store, "STALLED", 0.3)
    monkeypatch.setattr(remote, "_UNKNOWN", store.Patience(0.1))
    web.begin(lambda handler: handler.stall())
    with pytest.raises(Unreached, match="does not answer"):
        open_named(Path(f"{web.url}/0.mp4"))


def test_a_refused_clip_waits_for_the_next_run(encoded, there, s3, settings_of, tmp_path):
    settings = settings_of(encoded, data_root=Path("s3://bucket/ds"), out=tmp_path / "new", cache=tmp_path / "cache")
    denied = b"<Error><Code>AccessDenied</Code><Message>AccessDenied it is</Message></Error>"
    with faulty(s3, tmp_path) as proxy:
        proxy.wrong = lambda handler: handler.answer(403, denied) if handler.path.endswith("/2.mp4") else None
        report = encode(settings)
    assert (report.encoded, report.postponed, report.rejected) == (4, 1, 0)
    assert "refuses" in report.postponed_samples[0].reason


def test_the_cache_is_bounded_and_notices_another_etag(web, tmp_path):
    path = Path(f"{web.url}/0.mp4")
    before = file_state(path)
    with open_named(path) as stream:
        assert stream.read() == (tmp_path / "0.mp4").read_bytes()
    web.begin(None)
    with open_named(path) as stream:
        assert stream.readall() and not web.asked
    use_cache(tmp_path / "cache", 10**9)  # another run asks whether it has changed
    with open_named(path) as stream:
        assert stream.readall() and [range_ for _, _, range_ in web.asked] == ["bytes=0-0"]
    size = (tmp_path / "0.mp4").stat().st_size
    use_cache(tmp_path / "cache", 2 * size)
    for index in range(5):
        open_named(Path(f"{web.url}/{index}.mp4")).close()
    kept = list((tmp_path / "cache" / "clips").iterdir())
    assert sum(file.stat().st_size for file in kept) <= 2.5 * size and len(kept) >= 1
    data = bytearray((tmp_path / "0.mp4").read_bytes())
    data[-1] ^= 1
    (tmp_path / "0.mp4").write_bytes(data)
    os.utime(tmp_path / "0.mp4", ns=(1, 1))
    use_cache(tmp_path / "cache", 10**9)  # another run
    hashed = hash_whole(path)
    assert (hashed.size, hashed.mtime_ns) != before[:2] and unchanged(path, hashed)
    with open_named(path) as stream:
        assert stream.readall() == bytes(data)


def test_a_full_cache_is_listed_now_and_then(tmp_path, monkeypatch):
    clips = tmp_path / "cache" / "clips"
    clips.mkdir(parents=True)
    use_cache(tmp_path / "cache", 400_000)
    listings, real = [], clip_cache._listed
    monkeypatch.setattr(clip_cache, "_listed", lambda folder: listings.append(real(folder)) or listings[-1])
    for index in range(1500):
        clip_cache.make_room(400)
        content, state = place_of(f"s3://bucket/{index}.mp4"), ObjectState(400, 2 * 10**9)
        (clips / "new").write_bytes(bytes(400))
        clip_cache.keep(clips / "new", content, state)
        clip_cache.believe(content, state, index)
    kept = [path for path in clips.iterdir() if path.stat().st_size]
    assert 800 < len(kept) <= 1000 and len(listings) < 300
    assert all(place_of(f"s3://bucket/{index}.mp4") in kept for index in range(700, 1500))  # the last ones
    assert len(list(clips.iterdir())) == 2 * len(kept)


def test_a_clip_in_use_is_still_asked_after(web, tmp_path, monkeypatch):
    """What a store has said is believed for a moment from when it was asked, not from the last use."""
    monkeypatch.setattr(clip_cache, "_MOMENT_NS", 10**8)
    path = Path(f"{web.url}/0.mp4")
    open_named(path).close()
    data = bytes(reversed((tmp_path / "0.mp4").read_bytes()))
    (tmp_path / "0.mp4").write_bytes(data)
    os.utime(tmp_path / "0.mp4", ns=(1, 1))  # the etag; within a tick of the file system's clock it would stay the same

    def noticed():
        with open_named(path) as stream:
            return stream.readall() == data

    wait_until(noticed, seconds=5)


def test_signed_urls_lose_what_signs_them(web, tmp_path):
    entries = [
        f"{web.url}/0.mp4?X-Amz-Signature=SECRET&X-Amz-Date=1",
        f"{web.url}/0.mp4?X-Amz-Signature=OTHER&X-Amz-Date=2#t=1,2",
        f"{web.url}/get?id=1&sig=SECRET",
        f"{web.url}/get?id=2&sig=SECRET",
        "videos/what?.mp4",
        "s3://bucket/a.mp4",
    ]
    names = named_without_secrets(entries)
    assert names[0] == f"{web.url}/0.mp4" and names[1] == f"{web.url}/0.mp4#t=1,2"
    assert names[4:] == entries[4:] and len(set(names)) == 6 and "SECRET" not in str(names)
    asked = []
    web.begin(lambda handler: asked.append(handler.query))
    open_named(tmp_path / names[0]).close()
    assert asked and all("Signature=" in query for query in asked)
    web.begin(lambda handler: handler.answer(200, handler.query.partition("&")[0].encode()))
    for number in (1, 2):
        with open_named(tmp_path / names[1 + number]) as stream:
            assert stream.readall() == f"id={number}".encode()


def test_validate_reads_a_bucket(there, tmp_path):
    settings = ValidateSettings(
        data_root=Path("s3://bucket/ds"), resolution=["9x64x96"], model="tiny", workers=1, cache=tmp_path / "cache"
    )
    assert not validate(settings).faults
    there.rm("bucket/ds/videos.txt")
    there.rm("bucket/ds/prompts.txt")
    with pytest.raises(CogError, match="neither") as caught:
        validate(settings)
    assert "s3://bucket/ds" in str(caught.value)


def test_an_empty_object_is_no_clip(there):
    there.pipe_file("bucket/ds/clips/9.mp4", b"")
    with pytest.raises(BadClip, match="empty"):
        open_named(Path("s3://bucket/ds/clips/9.mp4"))
    assert open_object("s3://bucket/ds/clips/0.mp4").readall()
