"""The cache of samples: bounded, shared, checked, and never in the way."""

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from faulty_server import FaultyServer
from waiting import wait_until

from cogcommon.errors import SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.store import store
from cogtrain.data.batches import Collator, prefetch
from cogtrain.data.sampler import Slot
from cogtrain.data.shards import open_shards
from cogtrain.model.objective import Objective
from cogtrain.store.cache import SampleCache


def item(number, size=1000):
    data = bytearray(number.to_bytes(8, "big") * (size // 8))
    return hashlib.sha256(data).digest(), data


def kept(folder):
    return sorted((folder / "cogtrain-cache").glob("[0-9a-f][0-9a-f]/[!.]*"))


@pytest.fixture
def served(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=6)
    server = FaultyServer(tmp_path)
    yield server
    server.stop()


def test_what_was_put_is_got_by_any_process(tmp_path):
    sha256, data = item(1)
    SampleCache(tmp_path, 10**6).put(sha256, data)
    assert SampleCache(tmp_path, 10**6).get(sha256) == data
    assert SampleCache(tmp_path, 10**6).get(item(2)[0]) is None


def test_what_is_damaged_is_fetched_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "FAULTS", store.Faults())
    cache = SampleCache(tmp_path, 10**6)
    for change in (lambda path: path.write_bytes(b"x" * 1000), lambda path: os.truncate(path, 10)):
        sha256, data = item(1)
        cache.put(sha256, data)
        change(kept(tmp_path)[0])
        assert cache.get(sha256) is None and kept(tmp_path) == []
        cache.put(sha256, data)
        assert cache.get(sha256) == data
    assert f"--cache {tmp_path}: a sample's copy was damaged; it is read again" in capsys.readouterr().err
    assert "2 x a sample's copy was damaged" in str(store.FAULTS)


def test_a_copy_whose_times_cannot_be_set_is_used(tmp_path, monkeypatch):
    """Another user's: what nobody else may write to is whole all the same."""

    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    cache = SampleCache(tmp_path, 10**6)
    cache.put(*item(1))
    monkeypatch.setattr(os, "utime", refused)
    assert cache.get(item(1)[0]) == item(1)[1]


def test_it_holds_no_more_than_asked_and_drops_what_was_longest_unused(tmp_path):
    cache = SampleCache(tmp_path, 10_000)
    for number in range(30):
        cache.put(*item(number))
        for age, path in enumerate(sorted(kept(tmp_path), key=lambda path: path.stat().st_mtime)):
            os.utime(path, (age, age))
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 10_000
    assert cache.get(item(29)[0]) and not cache.get(item(0)[0])


def test_what_this_run_reads_again_stays(tmp_path, capsys):
    SampleCache(tmp_path, 10_000).put(*item(99))
    cache = SampleCache(tmp_path, 10_000)
    cache.protect(pa.chunked_array([pa.array([item(number)[0] for number in range(50)], pa.binary())]))
    for number in range(50):
        cache.put(*item(number))
    assert not cache.has(item(99)[0])  # another run's made room
    assert [number for number in range(50) if cache.has(item(number)[0])] == list(range(10))
    assert "nothing is added" in capsys.readouterr().err


def test_nothing_foreign_is_touched(tmp_path):
    root = tmp_path / "cogtrain-cache"
    name = hashlib.sha256(b"").hexdigest()
    (tmp_path / "elsewhere").mkdir()
    foreign = [tmp_path / name, root / name, root / "ab" / "notes.txt", root / "zz" / name, root / "ab" / f".{name}",
               root / "ab" / name, root / name[:2] / "sub" / name, tmp_path / "elsewhere" / name]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 3000)
        os.utime(path, (0, 0))
    (root / "cd").symlink_to(tmp_path / "elsewhere")
    (root / name[:2] / ("e3" + "0" * 62)).symlink_to(tmp_path / name)
    cache = SampleCache(tmp_path, 5_000)
    for number in range(20):
        cache.put(*item(number))
    assert all(path.read_bytes() == b"x" * 3000 for path in foreign)


def test_a_half_written_file_of_a_dead_process_goes_after_an_hour(tmp_path):
    SampleCache(tmp_path, 10**6).put(*item(1))
    (whole,) = kept(tmp_path)
    for name, age in (("old", 0), ("new", None)):
        path = whole.with_name(f".{whole.name}.host-{name}.tmp")
        path.touch()
        if age is not None:
            os.utime(path, (age, age))
    SampleCache(tmp_path, 10**6)
    assert [path.name for path in kept(tmp_path)] == [whole.name]
    assert [path.name.split("-")[1] for path in whole.parent.glob(".*")] == ["new.tmp"]


def _fill(folder, first):
    cache = SampleCache(folder, 20_000)
    for number in range(first, first + 60):
        cache.put(*item(number % 80))
        found = cache.get(item(number % 80)[0])
        assert found in (None, item(number % 80)[1])


def test_many_processes_keep_the_bound_together(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path, 20 * n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 0 < sum(path.stat().st_size for path in kept(tmp_path)) <= 20_000
    assert not list((tmp_path / "cogtrain-cache").glob("*/.*"))


@pytest.mark.parametrize("where", ["a file", "not writable", "a link"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, where):
    folder = tmp_path / "cache"
    if where == "a file":
        folder.touch()
    elif where == "a link":
        folder.mkdir()
        (tmp_path / "other").mkdir()
        (folder / "cogtrain-cache").symlink_to(tmp_path / "other")
    else:
        folder = Path("/proc/cache")
    with pytest.raises(SettingError, match="cannot be kept there") as caught:
        SampleCache(folder, 1000)
    assert "--cache" in caught.value.where


def test_a_full_disk_costs_only_the_cache(tmp_path, monkeypatch, capsys, served):
    """ENOSPC in the middle of a write, and a disk that has little left."""
    real, cache = os.statvfs, SampleCache(tmp_path, 10**9)

    def nearly_full(path):
        found = list(real(path))
        found[4] = found[3] = 10
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    shards = open_shards([f"{served.url}/out"], cache=cache)
    assert all(shards.read(shards.extent(index)) for index in range(6))
    assert kept(tmp_path) == [] and "the disk is nearly full" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists() or not shutil.which("mount"), reason="needs Linux")
def test_a_write_that_fails_costs_only_the_cache(tmp_path, monkeypatch, capsys):
    cache = SampleCache(tmp_path, 10**6)
    real = Path.open

    def full(path, *args, **options):
        return real(Path("/dev/full") if path.name.endswith(".tmp") else path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    cache.put(*item(1))
    assert "No space left" in capsys.readouterr().err and kept(tmp_path) == []
    cache.put(*item(2))
    assert capsys.readouterr().err == ""  # said once


def test_the_second_epoch_asks_the_server_for_nothing(tmp_path, served, make_shards):
    local = open_shards([str(tmp_path / "out")])
    collate = Collator(Objective.of(open_checkpoint("tiny")), 0)
    places = [[Slot(index, epoch, 0)] for epoch in range(3) for index in range(6)]
    expected = list(prefetch(local, iter(places), collate, ahead=2, pin=False))
    shards = open_shards([f"{served.url}/out"], cache=SampleCache(tmp_path / "cache", 10**9))
    served.begin(None)
    batches = list(prefetch(shards, iter(places), collate, ahead=2, pin=False))
    assert all(one.latent_BFCHW.equal(two.latent_BFCHW) for one, two in zip(batches, expected, strict=True))
    assert len(served.asked) == 6  # each sample once
    assert len(kept(tmp_path / "cache")) == 6


def test_it_reads_ahead_in_the_order_that_is_known(tmp_path, served):
    shards = open_shards([f"{served.url}/out"], cache=SampleCache(tmp_path / "cache", 10**9))
    served.begin(None)
    places = ([Slot(index, 0, 0)] for index in (3, 1, 5, 0, 2, 4))
    reading = prefetch(shards, places, Collator(Objective.of(open_checkpoint("tiny")), 0), ahead=1, pin=False)
    first = next(reading)
    wait_until(lambda: len(kept(tmp_path / "cache")) == 6)
    assert first.keys == (shards.extent(3).key,)
    served.begin(lambda handler: handler.answer(500))  # the server is gone: the rest is here
    assert len(list(reading)) == 5
