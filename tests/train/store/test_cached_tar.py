"""Whole tars in the cache, of a server without ranges: what is wrong with a copy is never the address's fault."""

import os
import shutil
import threading

import pytest
from faulty_server import FaultyServer

from cogcommon.errors import CogError, ShardError, StoreError
from cogcommon.store import store
from cogtrain.data.shards import open_shards
from cogtrain.store import cached_tar
from cogtrain.store.cache import SampleCache

ENDINGS = (".tar", ".parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("served")
    make_shards(folder / "out", samples=6)
    return folder


@pytest.fixture
def served(folder, monkeypatch):
    """Gives whole files only."""
    monkeypatch.setattr(store, "FAULTS", store.Faults())
    server = FaultyServer(folder)
    server.begin(lambda handler: handler.serve(ranges=False))
    yield server
    server.stop()


@pytest.fixture
def expected(folder):
    return everything(open_shards([str(folder / "out")]))


def everything(shards):
    return [bytes(shards.read(shards.extent(index))) for index in range(len(shards))]


def opened(served, tmp_path, size=10**9):
    return open_shards([f"{served.url}/out"], cache=SampleCache(tmp_path / "cache", size))


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "cogtrain-cache").glob("[0-9a-f][0-9a-f]/[!.]*"))


def counted(tmp_path):
    return int((tmp_path / "cache" / "cogtrain-cache" / "lock").read_text())


def fetched(served):
    """Tars that came whole; the server's answers to ranges are not read to their ends."""
    return sum(name.endswith(".tar") and not range_ for _, name, range_ in served.asked)


def spoil(path):
    with path.open("r+b") as stream:
        stream.seek(3000)
        stream.write(b"damage!!")


def spoil_end(path):
    with path.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"damage!!")


DAMAGES = {
    "other bytes": spoil,
    "other bytes behind the last sample": spoil_end,
    "half copied": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.open("ab").write(b"more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_fetched_again_and_told(served, tmp_path, expected, capsys, damage):
    """Found by the run that has it open, and by the next one."""
    for already_open in (True, False):
        shards = opened(served, tmp_path)
        assert everything(shards) == expected
        for path in kept(tmp_path):
            DAMAGES[damage](path)
        if not already_open:
            served.asked.clear()
            shards = opened(served, tmp_path)
        assert everything(shards) == expected
    healed = [path for path in kept(tmp_path) if cached_tar.sha256_of(path) == path.name]
    assert len(healed) == len(kept(tmp_path)) == 3 or damage in ("longer", "other bytes behind the last sample")
    assert counted(tmp_path) == sum(path.stat().st_size for path in kept(tmp_path))
    told = capsys.readouterr().err
    assert f"--cache {tmp_path}/cache, {served.url}/out/" in told and "the cache's copy was damaged" in told


def test_a_copy_that_is_gone_is_fetched_again(served, tmp_path, expected, capsys):
    """Another run made room, or somebody removed the folder."""
    shards = opened(served, tmp_path)
    kept(tmp_path)[0].unlink()
    assert everything(shards) == expected and fetched(served) == 4
    assert "the cache's copy was removed: is --cache-size enough" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    assert everything(shards) == expected and len(kept(tmp_path)) == 3


def test_many_readers_of_a_damaged_copy_fetch_it_once(served, tmp_path, expected):
    """Threads, each with a cache of its own, as the processes of a host have."""
    runs = [opened(served, tmp_path) for _ in range(4)]
    for path in kept(tmp_path):
        spoil(path)
    served.asked.clear()
    results = []
    threads = [threading.Thread(target=lambda one=one: results.append(everything(one))) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4 and fetched(served) == 3


def test_the_address_is_named_where_it_is_at_fault(served, tmp_path, folder):
    """What comes again is wrong, too; has become another shard; or does not come."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tars = sorted((other / "out").glob("*.tar"))
    for changed, says, kind in (
        (lambda: [spoil(tar) for tar in tars], "a damaged shard: the tar is not what its record says", ShardError),
        (lambda: [shutil.copy(tars[1].with_suffix(end), tars[0].with_suffix(end)) for end in ENDINGS],
         "has been replaced since the run was opened", StoreError),
        (lambda: [tar.unlink() for tar in tars], "no longer has it", StoreError),
    ):  # fmt: skip
        served.folder = folder
        shards = opened(served, tmp_path)
        for path in kept(tmp_path):
            spoil(path)
        changed()
        served.folder = other
        with pytest.raises(CogError, match=says) as caught:
            everything(shards)
        assert isinstance(caught.value, kind) and served.url in caught.value.where
        assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_server_without_ranges_is_read_through_the_cache(tmp_path, served, expected):
    with pytest.raises(StoreError, match="gives no parts of files") as caught:
        open_shards([f"{served.url}/out"])
    assert "--cache" in caught.value.fix
    for _ in range(2):
        shards = opened(served, tmp_path)
        assert everything(shards) == expected
        assert shards.shards[0].shown.startswith("http://")
    assert fetched(served) == 3 == len(kept(tmp_path))
    with pytest.raises(StoreError, match="no room in the cache") as caught:
        opened(served, tmp_path / "small", 1000)
    assert "--cache-size" in caught.value.fix


def test_a_whole_tar_that_comes_wrong(tmp_path, served, monkeypatch):
    monkeypatch.setattr(cached_tar, "OPENING", store.Patience(0.5))
    for change, says in (
        (lambda body: body[:5000] + b"x" * 10 + body[5010:], "damaged shard"),
        (lambda body: os.urandom(len(body)), "other bytes each time"),
        (lambda body: b"<!DOCTYPE html><title>Log in</title>", "a web page in place of the file"),
    ):

        def fault(handler, change=change):
            right = handler.name.endswith("parquet") or handler.range
            return handler.serve(ranges=False, change=(lambda body: body) if right else change)

        served.begin(fault)
        with pytest.raises(CogError, match=says):
            opened(served, tmp_path)
        assert kept(tmp_path) == [] and not list((tmp_path / "cache").rglob("*.tmp"))
