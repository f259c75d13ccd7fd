"""Shards that go to a bucket: moto's S3 server on this machine, and faults in front of it.

Most of it runs the real plan, engine, writer and outlet with drawn latents, as `crash_driver` does for files.
"""

import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import s3fs
from bucket import faulty, files, s3_server
from places import CHILDREN

from cogcommon.errors import CogError, SettingError, StoreError
from cogcommon.shards.contract import CONTRACT_FILE, Contract
from cogcommon.shards.records import read_table, shard_number
from cogcommon.store import fsspec_store, remote_folder, store
from cogcommon.store.fsspec_store import FsspecStore
from cogprep.commands.clean_cache import run as clean_cache
from cogprep.commands.encode import encode, run
from cogprep.commands.index import run as index
from cogprep.commands.inspection import run as inspect
from cogprep.commands.validate import validate
from cogprep.commands.verify import run as verify
from cogprep.plan.folder import commit_contract
from cogprep.settings.encode import ValidateSettings
from cogprep.settings.shards import CleanSettings, IndexSettings, InspectSettings, VerifySettings
from cogprep.store import desk, remote_outlet
from cogprep.store.outlet import open_image, open_outlet

sys.path.insert(0, str(CHILDREN))
from crash_driver import BUCKET, CLIPS, DrawnLatents, bring_up_to_date, in_child

OUT = Path("s3://bucket/out")


@pytest.fixture(scope="module")
def s3():
    with s3_server() as url:
        yield url


@pytest.fixture
def there(s3):
    """Reads the bucket as a person would: ``there() -> {name: bytes}``; ``there.fs`` changes it."""
    fs = files(s3)
    for name in fs.find("bucket"):
        fs.rm(name)

    def read():
        return {name.removeprefix("bucket/out/"): fs.cat_file(name) for name in fs.find("bucket/out")}

    read.fs = fs
    return read


@pytest.fixture
def proxy(s3, there, tmp_path):
    with faulty(s3, tmp_path) as server:
        yield server


@pytest.fixture
def contract(encoded_once):
    text = (encoded_once / "out" / CONTRACT_FILE).read_bytes()
    return dataclasses.replace(Contract.from_json(text, where=""), settings={"resolution": [str(BUCKET)]})


@pytest.fixture
def bring(contract, tmp_path):
    """``bring("fresh")``: an encode to the bucket, from the plan on, of a machine of its own."""

    def go(scenario="fresh", machine="one", latents=None):
        with open_outlet(OUT, cache=tmp_path / machine, slice_="1/1") as outlet:
            outlet.agree(lambda: commit_contract(outlet.folder, contract, b"nothing"))
            return bring_up_to_date(outlet.folder, contract, CLIPS[scenario], outlet=outlet, latents=latents)

    return go


@pytest.fixture
def on_disk(contract, tmp_path):
    """``on_disk("fresh")``: the tars of the same encodes to a folder of this machine."""

    def go(*scenarios):
        out = tmp_path / "disk"
        out.mkdir()
        for scenario in scenarios:
            bring_up_to_date(out, contract, CLIPS[scenario])
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.tar")}

    return go


def tars_of(found):
    return {name: data for name, data in found.items() if name.endswith(".tar")}


def check(found):
    """Every record has its tar, of the size that it says."""
    for name, data in found.items():
        if shard_number(name.removeprefix("val/")) is not None:
            header, _ = read_table(io.BytesIO(data), ["key"])
            assert len(found[name.removesuffix("parquet") + "tar"]) == header.tar_size, name


class TestWhole:
    def test_the_bucket_holds_what_a_folder_would(self, encoded, there, settings_of, tmp_path, capfd):
        settings = settings_of(encoded, out=OUT, cache=tmp_path / "cache")
        run(settings)
        local = {path.relative_to(encoded / "out").as_posix(): path.read_bytes()
                 for path in (encoded / "out").rglob("*") if path.is_file()}  # fmt: skip
        found = there()
        assert found.keys() == local.keys() | {"report.json"}
        assert all(found[name] == data for name, data in local.items() if name != "report.json")
        said = capfd.readouterr()
        assert "encoded 5" in said.out and "cogtrain lora --shards s3://bucket/out/*.tar" in said.out
        assert json.loads(found["report.json"])["encoded"] == 5
        on_disk = [path for path in (tmp_path / "cache").rglob("*.tar") if path.stat().st_blocks]
        assert not on_disk and "SECRETKEY" not in said.out + said.err
        report = encode(settings_of(encoded, out=OUT, cache=tmp_path / "another machine"))
        assert (report.encoded, report.reused) == (0, 5)

    def test_the_other_commands(self, bring, there, capsys, monkeypatch):
        monkeypatch.setattr(desk, "_HEAD", 4096)  # a sample is larger than what is brought of a tar
        bring()
        verify(VerifySettings(out=OUT))
        inspect(InspectSettings(out=OUT, json=True))
        said = capsys.readouterr().out
        assert "3 shards, 5 samples" in said and '"out": "s3://bucket/out"' in said
        before = there()
        there.fs.rm("bucket/out/000001.parquet")
        index(IndexSettings(out=OUT))
        assert "put back the record of 000001.tar" in capsys.readouterr().out
        assert tars_of(there()) == tars_of(before) and there().keys() == before.keys()
        there.fs.rm("bucket/out/000001.parquet")
        there.fs.pipe_file("bucket/out/000009.tar", b"somebody's" * 2000)
        there.fs.pipe_file("bucket/out/notes.txt", b"somebody's")
        clean_cache(CleanSettings(out=OUT, dry_run=True))
        assert "s3://bucket/out/000001.tar: a tar without a record, with finished clips" in capsys.readouterr().out
        clean_cache(CleanSettings(out=OUT, yes=True))
        assert before.keys() - there().keys() == {"000001.tar", "000001.parquet"}
        assert there()["000009.tar"] == b"somebody's" * 2000
        there.fs.rm("bucket/out/000009.tar")
        clean_cache(CleanSettings(out=OUT, yes=True, all=True))
        assert there().keys() == {"notes.txt"}

    def test_a_damaged_tar_is_named(self, bring, there, capsys):
        bring()
        data = bytearray(there()["000000.tar"])
        data[3000] ^= 1
        there.fs.pipe_file("bucket/out/000000.tar", bytes(data))
        with pytest.raises(CogError, match="1 of 3 shards not as recorded") as caught:
            verify(VerifySettings(out=OUT))
        assert "remove s3://bucket/out/000000.tar s3://bucket/out/000000.parquet" in caught.value.fix

    def test_messages_name_the_bucket(self, encoded, settings_of, there, tmp_path, capfd):
        settings = settings_of(encoded, out=OUT, cache=tmp_path / "cache", strict=True)
        run(settings)
        (encoded / "ds" / "4.mp4").write_bytes(b"no video")
        with pytest.raises(CogError, match="1 clip kept") as caught:
            run(settings)
        assert caught.value.where == "s3://bucket/out/report.json"
        resolution, model = settings.resolution, settings.model
        moved = ValidateSettings(encoded / "ds", out=OUT, resolution=resolution, model=model, holdout=2, workers=1)
        assert "s3://bucket/out was encoded with --holdout" in " ".join(validate(moved).notes)
        with pytest.raises(CogError, match="s3://bucket/out was encoded with --holdout"):
            encode(dataclasses.replace(settings, holdout=2))
        for name in there():
            there.fs.rm(f"bucket/out/{name}")
        there.fs.pipe_file("bucket/out/report.json", b"{}")
        clean_cache(CleanSettings(out=OUT, yes=True))
        said = capfd.readouterr()
        assert "s3://bucket/out was not made by cogprep" in said.out and "/desk" not in said.out + said.err

    @pytest.mark.parametrize(("name", "says"), [("prompts.txt", "data root"), ("photo.jpg", "did not make")])
    def test_somebodys_folder_is_refused(self, bring, there, name, says):
        there.fs.pipe_file(f"bucket/out/{name}", b"somebody's")
        with pytest.raises(SettingError, match=says) as caught:
            bring()
        assert there() == {name: b"somebody's"} and caught.value.where == "--out s3://bucket/out"

    def test_an_object_of_the_folders_name_is_not_in_it(self, bring, there):
        there.fs.pipe_file("bucket/out", b"somebody's")
        bring()
        assert there.fs.cat_file("bucket/out") == b"somebody's" and there.fs.exists("bucket/out/000000.parquet")

    def test_a_changed_data_root_changes_the_shards(self, bring, there, on_disk):
        bring("fresh")
        bring("changed")
        assert tars_of(there()) == on_disk("fresh", "changed")
        assert not [name for name in there() if "new" in name or "tmp" in name]

    def test_a_web_server_takes_no_shards(self, encoded, settings_of):
        with pytest.raises(SettingError, match="takes no files"):
            encode(settings_of(encoded, out=Path("https://host/out")))


class Killed(BaseException):
    """The process is gone: nothing more reaches the store."""


def vanish():
    raise Killed


class Requests:
    """Counts the requests of a process, and ends it at one of them: ``at`` does not reach the store, or, with
    ``after``, is the last that does."""

    def __init__(self, patch, at=10**6, after=False, end=vanish):
        real, self.done = FsspecStore._call, []

        def call(fs, name, *args, **options):
            self.done.append(name)
            if len(self.done) > at + after:
                end()
            result = real(fs, name, *args, **options)
            if len(self.done) > at:
                end()
            return result

        patch.setattr(FsspecStore, "_call", call)


@pytest.fixture
def empty(there):
    def go():
        for name in there.fs.find("bucket"):
            there.fs.rm(name)

    return go


SCENARIOS = {"fresh": ["fresh"], "changed": ["fresh", "changed"]}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_a_request(scenario, bring, there, empty, on_disk, monkeypatch, capfd):
    *before, last = SCENARIOS[scenario]
    want = on_disk(*SCENARIOS[scenario])
    for step in before:
        bring(step)
    with monkeypatch.context() as patch:
        requests = Requests(patch)
        bring(last)
    assert tars_of(there()) == want
    total = len(requests.done)
    assert total > 20
    for number, at in enumerate(range(total // 4, total, total // 2 + 1 if before else total // 4)):
        empty()
        for step in before:
            bring(step, machine=f"{number}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Requests(patch, at, after=bool(number % 2))
            bring(last, machine=f"{number}")
        check(there())
        outcome = bring(last, machine=f"{number}" if number < 2 else "another")
        assert tars_of(there()) == want, (at, requests.done[at])
        check(there())
        assert outcome.encoded < 5 or at < total // 2
    assert "damaged" not in capfd.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_request(scenario, after, same_machine, bring, there, empty, on_disk, monkeypatch):
    """With SIGKILL, in a process of its own each time.

    A tar without a record that this run would not write counts as another writer's until it is ten minutes old; here,
    where all that a killed removal leaves is seconds old, it is replaced at once.
    """
    monkeypatch.setattr(remote_outlet, "_ABANDONED_S", 0.0)
    *before, last = SCENARIOS[scenario]
    want = on_disk(*SCENARIOS[scenario])
    at = 0
    while True:
        empty()
        for step in before:
            bring(step, machine=f"{at}")
        s3fs.S3FileSystem.clear_instance_cache()

        def disturbed(at=at):
            Requests(pytest.MonkeyPatch(), at, after, end=lambda: os.kill(os.getpid(), signal.SIGKILL))
            bring(last, machine=f"{at}")

        code = in_child(disturbed)
        check(there())
        bring(last, machine=f"{at}" if same_machine else f"other {at}")
        assert tars_of(there()) == want, at
        if code == 0:
            break
        assert code == 9
        at += 1
    assert at > 20


def test_every_request_fails_once(bring, there, proxy, on_disk, capfd):
    """Every other one with 500, the others by a reset when they have been carried out."""
    failed = []

    def fail(handler, turn, act):
        request = handler.command, handler.path
        if request in failed or len(failed) % 2 != turn:
            return None
        failed.append(request)
        return act()

    body = b"<Error><Code>InternalError</Code></Error>"
    proxy.wrong = lambda handler: fail(handler, 0, lambda: handler.answer(500, body))
    proxy.after = lambda handler: fail(handler, 1, handler.reset)
    bring()
    assert tars_of(there()) == on_disk("fresh")
    check(there())
    assert len(failed) > 20 and sum(store.FAULTS.counts.values()) >= 10
    assert "damaged" not in capfd.readouterr().err


def test_a_tar_that_is_gone_from_a_bucket_is_named(bring, there, capsys):
    bring()
    name = next(name for name in there() if name.endswith(".tar") and "/" not in name)
    there.fs.rm(f"bucket/out/{name}")
    with pytest.raises(CogError):
        verify(VerifySettings(out=OUT))
    said = capsys.readouterr().out
    assert name in said and "cannot be read" in said
    assert name.removesuffix("tar") + "parquet" in there()  # nothing is removed by looking
    bring()
    assert name in there()
    check(there())


@pytest.mark.parametrize("gone", [("000000.parquet",), ("000000.parquet", "000000.tar")], ids=["record", "both"])
def test_a_shard_that_somebody_has_removed_is_encoded_anew(gone, bring, there, on_disk):
    """The desk still has its record, and a stand-in of its tar, which must never pass for the tar itself."""
    bring()
    for name in gone:
        there.fs.rm(f"bucket/out/{name}")
    bring()
    found = there()
    check(found)
    assert tars_of(found) == on_disk("fresh")


def test_what_a_killed_run_has_left_goes_nowhere_once_the_contract_is_another(bring, there, monkeypatch):
    """The folder was removed and encoded anew with other settings, from another machine."""
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(remote_outlet.RemoteOutlet, "_commit", Mock(side_effect=KeyboardInterrupt))
        bring()
    monkeypatch.undo()
    with open_image(OUT, "--out") as image:
        old = Contract.from_json((image.folder / CONTRACT_FILE).read_bytes(), where="")
    other = dataclasses.replace(old, image_variants=7)
    there.fs.pipe_file(f"bucket/out/{CONTRACT_FILE}", other.to_json())
    with pytest.raises(CogError, match="encoded with other settings"):
        bring()
    assert not [name for name in there() if name.endswith((".tar", ".parquet"))]


def test_a_tar_that_is_committed_while_somebody_thinks_stays(bring, there):
    """clean-cache asks, for as long as it takes; a writer that was between a tar and its record has gone on."""
    bring()
    name = next(name for name in there() if name.endswith(".parquet") and "/" not in name)
    record, tar = f"bucket/out/{name}", f"bucket/out/{name.removesuffix('parquet')}tar"
    data = there.fs.cat_file(record)
    there.fs.rm(record)
    with open_image(OUT, "OUT", changing=True, leftovers=True) as image:
        (image.folder / Path(tar).name).unlink()
        there.fs.pipe_file(record, data)
        assert image.publish_changes() == [Path(tar).name]
    there.fs.invalidate_cache()
    assert there.fs.exists(tar) and there.fs.exists(record)
    check(there())


def test_only_what_was_changed_is_asked_after(bring, there, monkeypatch):
    bring()
    with open_image(OUT, "OUT", changing=True, leftovers=True) as image:
        requests = Requests(monkeypatch)
        assert image.publish_changes() == [] and not requests.done
        (image.folder / "000000.parquet").unlink()
        assert image.publish_changes() == [] and 0 < len(requests.done) < 6
    assert "000000.parquet" not in there() and "000001.parquet" in there()


def test_a_note_is_a_line_and_one_that_is_cut_costs_a_reading(bring, there, on_disk, tmp_path, monkeypatch):
    bring()
    (file,) = (tmp_path / "one" / "desks").glob("*.json")
    lines = file.read_bytes().splitlines()
    names = ["val/000000.parquet", "000000.parquet", "000001.parquet"]
    assert [list(json.loads(line)) for line in lines[-3:]] == [[name] for name in names]
    file.write_bytes(b"\n".join([*lines[:-2], lines[-2][:-9], b"null", lines[-1]]))
    with monkeypatch.context() as patch:
        requests = Requests(patch)
        assert bring().encoded == 0
    assert requests.done.count("cat_file") == 1
    assert len(file.read_bytes().splitlines()) == 2  # all in one, and the one that was read again
    assert tars_of(there()) == on_disk("fresh")


def test_an_answer_that_is_lost_is_no_other_writer(bring, there, proxy, on_disk, capfd):
    lost = set()

    def reset(handler):
        if handler.command == "PUT" and handler.path not in lost:
            lost.add(handler.path)
            return handler.reset()
        return None

    proxy.after = reset
    outcome = bring()
    assert len(lost) == 8 and outcome.encoded == 5 and not outcome.busy
    assert tars_of(there()) == on_disk("fresh") and "another writer" not in capfd.readouterr().err


class OtherNoise(DrawnLatents):
    """The latents of another GPU, whose last bits differ."""

    def start(self, key, frames, image):
        return super().start(key + "other", frames, image)


@pytest.mark.parametrize("moment", ["000000.tar", "000000.parquet"])
def test_of_two_writers_one_wins_and_the_other_says_so(moment, bring, there, proxy, capfd):
    """The second one begins and ends while the first one's request for this object is on its way."""
    outcomes = []

    def meanwhile(handler):
        if handler.command == "PUT" and handler.path.partition("?")[0] == f"/bucket/out/{moment}" and not outcomes:
            outcomes.append(None)
            outcomes.append(bring(machine="two", latents=OtherNoise()))

    proxy.wrong = meanwhile
    first = bring(machine="one")
    assert first.encoded == 5 and outcomes[1].recovered == (2 if moment == "000000.parquet" else 0)
    found = there()
    check(found)
    # Of the tar whose record is on its way the second one takes the samples over: both mean the same record.
    said = "\n" + capfd.readouterr().err
    assert ("\n000000.tar: another writer committed it first" in said) == (moment == "000000.tar")
    verify(VerifySettings(out=OUT))


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [(403, "AccessDenied", "refuses"), (500, "InternalError", "attempts"), (404, "NoSuchBucket", "no such bucket")],
)
def test_a_bucket_that_refuses_is_told_as_it_is(status, code, says, bring, there, proxy, capfd, monkeypatch):
    monkeypatch.setattr(remote_folder, "WRITING", store.Patience(1))
    body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
    proxy.wrong = lambda handler: handler.answer(status, body) if handler.command == "PUT" else None
    with pytest.raises(StoreError, match=says) as caught:
        bring()
    told = f"{caught.value}{capfd.readouterr()}"
    assert "s3://bucket/out/contract.json" in told and "damaged" not in told
    assert "SECRETKEY" not in told and "Signature" not in told and "desks" not in told


def test_a_bucket_that_stalls(bring, there, proxy, monkeypatch):
    monkeypatch.setattr(fsspec_store, "STALLED", 0.3)
    monkeypatch.setattr(fsspec_store, "_SLOW", 10**9)
    monkeypatch.setattr(remote_folder, "WRITING", store.Patience(1))
    proxy.wrong = lambda handler: handler.stall() if handler.command == "PUT" else None
    with pytest.raises(StoreError, match="does not answer"):
        bring()
