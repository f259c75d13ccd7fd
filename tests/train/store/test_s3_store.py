"""Shards in an S3 bucket, on moto's server: the real s3fs against a real HTTP API, on this machine."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bucket import faulty, files, s3_server
from faulty_server import waits_take_no_time

from cogcommon.errors import ShardError, StoreError
from cogcommon.store import fsspec_store, store
from cogcommon.store.remote_folder import open_folder
from cogtrain.data import growing, shard_set
from cogtrain.data.growing import committed
from cogtrain.data.shards import open_shards
from cogtrain.settings.training import LoraSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("uploaded")
    make_shards(folder / "out", samples=4)
    return folder


@pytest.fixture(scope="module")
def s3(folder):
    """The address of an S3 server that holds ``s3://bucket/out``; the environment names it."""
    with s3_server() as url:
        files(url).put(str(folder / "out"), "bucket/", recursive=True)
        yield url


@pytest.fixture
def clock(monkeypatch):
    return waits_take_no_time(monkeypatch)


@pytest.fixture
def proxy(s3, clock, tmp_path, monkeypatch):
    """A server in front of it that can do wrong; ``proxy.wrong`` is the fault."""
    with faulty(s3, tmp_path) as server:
        monkeypatch.setattr(store, "OPENING", store.Patience(1.5))
        monkeypatch.setattr(shard_set, "TRAINING", store.Patience(1.5))
        yield server


def read_everything(shards):
    return [bytes(shards.read(shards.extent(index))) for index in range(len(shards))]


def test_all_ways_to_name_a_bucket(s3, folder):
    local = open_shards([str(folder / "out")])
    for word in ("out", "out/", "out/*.tar", "out/{000000..000001}.tar"):
        shards = open_shards([f"s3://bucket/{word}"])
        assert shards.fingerprint == local.fingerprint
        assert read_everything(shards) == read_everything(local)
        assert shards.empty_caption() == local.empty_caption()
        assert shards.shards[0].shown.startswith("s3://bucket/out/")
    for word in ("s3://bucket/9*.tar", "s3://bucket/nothing/", "s3://no-such-bucket/out/"):
        with pytest.raises(ShardError, match="no shard matches"):
            open_shards([word])
    with pytest.raises(ShardError, match="no such shard"):
        open_shards(["s3://bucket/out/000009.tar"])


def test_a_bucket_is_listed_to_its_last_page_and_nothing_beside_the_folder(s3, folder, monkeypatch):
    """S3 gives a thousand names at a time; two here."""
    for beside in ("out-2", "outer", "out/val"):
        files(s3).put(f"{folder}/out/", f"bucket/pages/{beside}/", recursive=True)
    files(s3).put(f"{folder}/out/", "bucket/pages/out/", recursive=True)
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    files_of_out = {path.name for path in (folder / "out").iterdir()}
    assert open_folder("s3://bucket/pages/out", "--out").entries().keys() == files_of_out
    for word in ("out", "out/*.tar", "out/00000?.tar"):
        shown = [shard.shown for shard in open_shards([f"s3://bucket/pages/{word}"]).shards]
        assert sorted(shown) == [f"s3://bucket/pages/out/00000{number}.tar" for number in range(2)]
    files(s3).rm("bucket/pages", recursive=True)


def test_a_shard_that_was_replaced_after_its_folder_was_listed(s3, folder, make_shards, tmp_path):
    """The listing tells the old one's size still."""
    files(s3).put(f"{folder}/out/", "bucket/replaced/", recursive=True)
    assert len(open_shards(["s3://bucket/replaced/"])) == 4
    (tar,) = make_shards(tmp_path, samples=1)
    for ending in (".tar", ".parquet"):
        files(s3).put(str(tar.with_suffix(ending)), f"bucket/replaced/000000{ending}")
    assert len(open_shards(["s3://bucket/replaced/000000.tar"])) == 1
    files(s3).rm("bucket/replaced", recursive=True)


def test_shards_of_a_bucket_that_come_while_it_is_looked_at(s3, folder):
    """A tar counts once its record is there, and is opened again only where the record is another one."""
    fs = files(s3)
    words, known = ["s3://bucket/coming/", "s3://bucket/none-yet/"], {}
    assert committed(words, "--shards") == {}
    for number, names in enumerate((["empty_caption.safetensors", "000000.tar"], ["000000.parquet", "000001.tar"])):
        for name in names:
            fs.put(str(folder / "out" / name), f"bucket/coming/{name}")
        known = committed(words, "--shards", known=known)
        assert list(known) == ["s3://bucket/coming/000000.tar"][:number]
    assert committed(words, "--shards", known=known)["s3://bucket/coming/000000.tar"] is known[next(iter(known))]
    for ending in ("tar", "parquet"):
        fs.put(str(folder / "out" / f"000001.{ending}"), f"bucket/coming/000000.{ending}")
    (again,) = committed(words, "--shards", known=known).values()
    assert again.shard.header.tar_sha256 != known[again.shard.shown].shard.header.tar_sha256
    fs.rm("bucket/coming", recursive=True)


def test_a_shard_of_a_bucket_that_is_being_replaced_is_waited_for(s3, folder, make_shards, tmp_path, monkeypatch):
    """Its tar is the new one already, its record is not."""
    files(s3).put(f"{folder}/out/", "bucket/changing/", recursive=True)
    (tar,) = make_shards(tmp_path, samples=1)
    put = lambda ending: files(s3).put(str(tar.with_suffix(ending)), f"bucket/changing/000000{ending}")  # noqa: E731
    put(".tar")
    pause = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: put(".parquet"))
    monkeypatch.setattr(growing, "time", pause)
    opened = committed(["s3://bucket/changing/"], "--shards")
    assert [one.table.num_rows for one in opened.values()] == [1, 2]
    files(s3).rm("bucket/changing", recursive=True)


def test_few_requests_to_a_bucket(proxy):
    """The folder's listing tells all sizes; a shard costs two more, a sample one."""
    shards = open_shards(["s3://bucket/out"])
    opening = len(proxy.asked)
    read_everything(shards)
    assert (opening, len(proxy.asked) - opening) == (5, 4)


def test_a_bucket_that_fails_for_a_moment(proxy, folder):
    shards = open_shards(["s3://bucket/out/000000.tar", "s3://bucket/out/000001.tar"])
    failed = []

    def slow_down(handler):
        if len(failed) < 2 and handler.command == "GET":
            failed.append(handler.path)
            return handler.answer(503, b"<Error><Code>SlowDown</Code><Message>Slower</Message></Error>")
        return None

    proxy.wrong = slow_down
    assert read_everything(shards) == read_everything(open_shards([str(folder / "out")]))
    assert len(failed) == 2 == sum(store.FAULTS.counts.values())


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [(403, "AccessDenied", "refuses"), (400, "ExpiredToken", "the store refuses"), (500, "InternalError", "attempts"),
     (503, "SlowDown", "attempts"), (404, "NoSuchKey", "the shard is gone")],
)  # fmt: skip
def test_a_bucket_that_fails_for_good(proxy, clock, capfd, status, code, says):
    shards = open_shards(["s3://bucket/out"])
    body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
    proxy.wrong = lambda handler: handler.answer(status, body)
    with pytest.raises(StoreError, match=says) as caught:
        read_everything(shards)
    told = f"{caught.value}{capfd.readouterr()}"
    assert clock.now < 10 and "damaged" not in told
    assert "SECRETKEY" not in told and "Signature" not in told and "s3://bucket/out/" in told


def test_a_bucket_that_ignores_ranges(proxy):
    """A gateway before it, for one: what comes is no sample, and nothing behind the last one."""
    proxy.wrong = lambda handler: handler.headers.__delitem__("Range")
    with pytest.raises(StoreError, match="it ignores ranges") as caught:
        open_shards(["s3://bucket/out"])
    assert caught.value.where.startswith("s3://bucket/out/00000") and "upload" not in str(caught.value)


def test_a_bucket_that_stalls(proxy, monkeypatch):
    shards = open_shards(["s3://bucket/out"])
    monkeypatch.setattr(fsspec_store, "STALLED", 0.5)
    monkeypatch.setattr(fsspec_store, "_SLOW", 10**9)
    proxy.wrong = lambda handler: handler.stall()
    with pytest.raises(StoreError, match="does not answer"):
        read_everything(shards)


def test_an_object_that_was_replaced_mid_run(proxy):
    shards = open_shards(["s3://bucket/out"])

    def other(handler):
        if handler.command == "HEAD":
            return handler.answer(
                200,
                b"",
                {"Content-Length": "246272", "ETag": '"new"', "Last-Modified": "Sun, 01 Jan 2017 00:00:00 GMT"},
            )
        start, end = map(int, handler.range.removeprefix("bytes=").split("-"))
        body = bytes(end + 1 - start)
        return handler.answer(206, body, {"Content-Range": f"bytes {start}-{end}/246272", "ETag": '"new"'})

    proxy.wrong = other
    with pytest.raises(StoreError, match="replaced since the run was opened"):
        shards.read(shards.extent(0))


def test_no_credentials(s3, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"[Cc]redentials") as caught:
        open_shards(["s3://bucket/out"])
    assert "credentials" in caught.value.fix
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "module", "fix"),
    [("s3://b/*.tar", "s3fs", r"install s3fs, .*\[s3\]"), ("gs://b/x.tar", "gcsfs", r"install gcsfs, .*\[gcs\]"),
     ("hf://datasets/a/b/x.tar", "huggingface_hub", r"\[hf\]"), ("az://b/x.tar", "adlfs", "pip install adlfs")],
)  # fmt: skip
def test_a_package_that_is_missing_is_named(monkeypatch, url, module, fix):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StoreError, match=f"needs {module}") as caught:
        open_shards([url])
    assert re.search(fix, caught.value.fix)


def test_a_run_from_a_bucket_is_the_run_from_the_disk(s3, folder, tmp_path, train_here, losses):
    common = {"steps": 4, "rank": 4, "seed": 1}
    local = train_here(LoraSettings(shards=[str(folder / "out")], out=tmp_path / "local", **common))
    remote = train_here(LoraSettings(shards=["s3://bucket/out/*.tar"], out=tmp_path / "remote", **common))
    assert losses(remote) == losses(local)


@pytest.mark.full
def test_the_command_itself_trains_from_a_bucket(s3, folder, tmp_path, train_here, losses):
    """In its own process, with a cache; the second time the samples come from there."""
    local = train_here(LoraSettings(shards=[str(folder / "out")], steps=4, rank=4, out=tmp_path / "local", seed=1))
    for name in ("first", "second"):
        words = f"lora --shards s3://bucket/out/*.tar --steps 4 --rank 4 --seed 1 --out {name} --cache kept"
        done = subprocess.run(
            [sys.executable, "-m", "cogtrain", *words.split()],
            capture_output=True, text=True, timeout=600, cwd=tmp_path, env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / name) == losses(local)
        assert len(list((tmp_path / "kept" / "cogtrain-cache").glob("[0-9a-f][0-9a-f]/*"))) == 4
    written = "".join(p.read_text(errors="replace") for p in (tmp_path / "first").rglob("*") if p.is_file())
    assert "SECRETKEY" not in written + done.stdout + done.stderr and "s3://bucket/out/*.tar" in written
