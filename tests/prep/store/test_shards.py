"""The writer: committed or absent, and never anything in between."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from cogcommon.errors import CogError, DiskError, ShardError
from cogcommon.files.locks import NoLocks, locked_elsewhere
from cogcommon.shards.contract import CONTRACT_FILE, Contract
from cogcommon.shards.records import SampleRow, ShardRecord, extent_intact, read_record, split_extent
from cogprep.store import rewrite
from cogprep.store.committed import committed_shards
from cogprep.store.locks import ShardBusy, at_work
from cogprep.store.rewrite import drop_samples, recover_folder
from cogprep.store.shards import ShardDone, ShardWriter


@pytest.fixture
def three(tmp_path: Path, make_shards) -> Path:
    make_shards(tmp_path, samples=3, per_shard=3)
    return tmp_path


def contract_in(folder: Path) -> Contract:
    return Contract.from_json((folder / CONTRACT_FILE).read_text(), where="test")


def blank(row: SampleRow) -> SampleRow:
    """The row as the plan makes it: nothing is known of the extent."""
    return dataclasses.replace(
        row, offset=-1, size=-1, json_offset=-1, json_size=-1, tensors_offset=-1, tensors_size=-1, sha256=b""
    )


def samples_of(folder: Path) -> list[tuple[SampleRow, dict[str, torch.Tensor]]]:
    """The rows and tensors of shard 0, read by the record."""
    tar = (folder / "000000.tar").read_bytes()
    found = []
    for row in read_record(folder / "000000.parquet").rows:
        info, payload = split_extent(tar[row.offset :][: row.size], row)
        assert info["key"] == row.key
        found.append((blank(row), safetensors.torch.load(payload)))
    return found


def assert_whole(folder: Path, record: ShardRecord) -> None:
    data = (folder / f"{record.header.number:06d}.tar").read_bytes()
    assert len(data) == record.header.tar_size
    end = 0
    for row in record.rows:
        if row.status == "ok":
            assert row.offset == end and extent_intact(data[row.offset :][: row.size], row.sha256)
            end = row.offset + row.size
    assert not any(data[end:]) and len(data) - end >= 1024


def test_tar_and_webdataset_read_it_and_bf16_survives(three: Path) -> None:
    contract = contract_in(three)
    (row, tensors), *_ = samples_of(three)
    writer = ShardWriter(three, 1, contract, ())
    writer.add(row, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    writer.commit()
    with tarfile.open(three / "000001.tar") as tar:
        assert tar.getnames() == [f"{row.key}.json", f"{row.key}.safetensors"]
        assert {(member.mtime, member.uname) for member in tar} == {(0, "cogprep")}
    (sample,) = webdataset.WebDataset(str(three / "000001.tar"), shardshuffle=False)
    read = safetensors.torch.load(sample["safetensors"])
    assert read["latent_mean"].dtype == torch.bfloat16
    assert torch.equal(read["latent_mean"], tensors["latent_mean"].bfloat16())
    assert sample["__key__"] == row.key and b'"caption": "caption 1"' in sample["json"]


def test_offsets_and_hashes_cover_every_byte(three: Path) -> None:
    assert_whole(three, read_record(three / "000000.parquet"))


def test_a_shard_without_record_does_not_count(three: Path) -> None:
    assert committed_shards(three) == [0]
    (three / "000000.parquet").unlink()
    assert committed_shards(three) == []


def test_a_writer_takes_over_what_a_killed_one_finished(three: Path) -> None:
    contract, samples = contract_in(three), samples_of(three)
    keys = [row.key for row, _ in samples]
    whole = (three / "000000.tar").read_bytes()
    # Killed in the third sample, whose first half reached the disk.
    killed = ShardWriter(three, 1, contract, keys)
    for row, tensors in samples:
        killed.add(row, tensors)
    killed.abandon()
    temporary = three / ".000001.tar.tmp"
    temporary.write_bytes(temporary.read_bytes()[:-5000])
    again = ShardWriter(three, 1, contract, keys)
    assert again.left_behind() == set(keys[:2])
    for row, _ in samples[:2]:
        # What encoding found out is read back, not remembered.
        again.add_left_behind(dataclasses.replace(row, frames=[], effective_fps=0.0, caption_tokens=0))
    again.add(*samples[2])
    record = again.commit()
    assert (three / "000001.tar").read_bytes() == whole
    assert [row.frames for row in record.rows] == [row.frames for row, _ in samples]
    assert_whole(three, record)


@pytest.mark.parametrize("fault", ["flipped payload", "flipped header", "other plan"])
def test_what_is_not_true_to_its_hash_is_not_taken_over(three: Path, fault: str) -> None:
    contract, samples = contract_in(three), samples_of(three)
    keys = [row.key for row, _ in samples]
    killed = ShardWriter(three, 1, contract, keys)
    for row, tensors in samples:
        killed.add(row, tensors)
    killed.abandon()
    temporary = three / ".000001.tar.tmp"
    data = bytearray(temporary.read_bytes())
    second = read_record(three / "000000.parquet").rows[1]
    if fault != "other plan":
        data[second.tensors_offset + 100 if fault == "flipped payload" else second.offset + 3] ^= 1
    temporary.write_bytes(data)
    planned = [keys[0]] if fault == "other plan" else keys
    again = ShardWriter(three, 1, contract, planned)
    assert again.left_behind() == {keys[0]}
    again.abandon()


def test_a_tar_that_missed_its_record_is_taken_over(three: Path) -> None:
    samples = samples_of(three)
    whole = (three / "000000.tar").read_bytes()
    (three / "000000.parquet").unlink()
    writer = ShardWriter(three, 0, contract_in(three), [row.key for row, _ in samples])
    for row, _ in samples:
        writer.add_left_behind(row)
    assert_whole(three, writer.commit())
    assert (three / "000000.tar").read_bytes() == whole


def test_two_writers_never_share_a_shard(three: Path) -> None:
    contract = contract_in(three)
    first = ShardWriter(three, 5, contract, ())
    with pytest.raises(ShardBusy):
        ShardWriter(three, 5, contract, ())
    assert locked_elsewhere(three / ".000005.tar.tmp")
    first.add(*samples_of(three)[0])
    first.commit()
    with pytest.raises(ShardDone):
        ShardWriter(three, 5, contract, ())
    assert not (three / ".000005.tar.tmp").exists()


def test_a_lock_on_a_file_that_was_renamed_meanwhile_is_not_enough(three: Path, monkeypatch) -> None:
    """A rival commits between our open and our lock: the lock we got is on its finished tar."""
    contract, (sample, *_) = contract_in(three), samples_of(three)
    rival = ShardWriter(three, 5, contract, ())
    rival.add(*sample)
    taken = fcntl.flock

    def commit_first(descriptor, operation) -> None:
        monkeypatch.setattr(fcntl, "flock", taken)
        rival.commit()
        taken(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", commit_first)
    with pytest.raises(ShardDone):
        ShardWriter(three, 5, contract, ())
    assert_whole(three, read_record(three / "000005.parquet"))


def test_a_file_system_without_locks_is_refused_by_name_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(NoLocks, match="keeps no locks"), at_work(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_rejected_samples_are_rows_and_a_shard_may_hold_nothing_else(three: Path) -> None:
    row = dataclasses.replace(samples_of(three)[0][0], status="rejected", reason="decodes to 3 of 9 frames")
    writer = ShardWriter(three, 1, contract_in(three), ())
    writer.add_rejected(row)
    assert_whole(three, writer.commit())
    assert read_record(three / "000001.parquet").rows[0].reason == "decodes to 3 of 9 frames"
    with tarfile.open(three / "000001.tar") as tar:
        assert tar.getnames() == []


def test_dropping_samples_copies_the_others(three: Path) -> None:
    samples = samples_of(three)
    keep = {samples[0][0].key, samples[2][0].key}
    record = drop_samples(three, 0, lambda row: row.key in keep)
    assert record is not None and {row.key for row in record.rows} == keep
    assert_whole(three, record)
    assert read_record(three / "000000.parquet") == record
    kept = samples_of(three)
    assert torch.equal(kept[1][1]["latent_mean"], samples[2][1]["latent_mean"])
    assert sorted(path.name for path in three.glob("*.new")) == []
    assert drop_samples(three, 0, lambda _: False) is None
    assert committed_shards(three) == [] and not (three / "000000.tar").exists()


def test_dropping_from_a_damaged_shard_names_it_and_leaves_it(three: Path) -> None:
    tar = three / "000000.tar"
    data = bytearray(tar.read_bytes())
    rows = read_record(three / "000000.parquet").rows
    data[rows[0].tensors_offset + 200] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"is damaged") as caught:
        drop_samples(three, 0, lambda row: row.key == rows[0].key)
    assert "000000.tar" in str(caught.value)
    assert committed_shards(three) == [0] and tar.read_bytes() == bytes(data)


@pytest.mark.parametrize("stop", ["write_record", "unlink", "tar", "record"])
def test_a_rewrite_stopped_anywhere_is_finished_or_undone(three: Path, stop: str, monkeypatch) -> None:
    """Before its record the rewrite never was; after it, whoever comes next completes it."""
    before = (three / "000000.tar").read_bytes()
    rows = read_record(three / "000000.parquet").rows
    keep = {rows[1].key}

    class Killed(BaseException):
        pass

    def die(*_args, **_kwargs) -> None:
        raise Killed

    calls = {"tar": 0}

    def commit_until(temporary: Path, final: Path) -> None:
        calls["tar"] += 1
        if calls["tar"] == {"tar": 1, "record": 2}[stop]:
            raise Killed
        temporary.replace(final)

    if stop == "write_record":
        monkeypatch.setattr(rewrite, "commit_bytes", die)
    elif stop == "unlink":
        monkeypatch.setattr(rewrite, "fsync_folder", die)
    else:
        monkeypatch.setattr(rewrite, "commit", commit_until)
    with pytest.raises(Killed):
        drop_samples(three, 0, lambda row: row.key in keep)
    monkeypatch.undo()
    recover_folder(three)
    assert list(three.glob("*.new")) == [] and not (three / ".000000.tar.tmp").exists()
    record = read_record(three / "000000.parquet")
    assert_whole(three, record)
    if stop == "write_record":
        assert (three / "000000.tar").read_bytes() == before and len(record.rows) == 3
    else:
        assert [row.key for row in record.rows] == list(keep)


def test_a_full_disk_is_one_clear_error(three: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    writer = ShardWriter(three, 1, contract_in(three), ())
    writer._stream = full.open("wb", buffering=0)
    with pytest.raises(DiskError, match="the disk is full") as caught:
        writer.add(*samples_of(three)[0])
    assert "make room" in str(caught.value)


def test_a_tar_of_somebodys_is_not_written_over(three):
    """It has the name that the next shard would get."""
    theirs = three / "000005.tar"
    theirs.write_bytes(b"mine")
    with pytest.raises(ShardError, match="not one that cogprep made"):
        ShardWriter(three, 5, contract_in(three), ())
    assert theirs.read_bytes() == b"mine"
    theirs.unlink()
    theirs.symlink_to(three / "000000.tar")
    with pytest.raises(ShardError, match="not one that cogprep made"):
        ShardWriter(three, 5, contract_in(three), ())


def test_a_temporary_tar_that_is_a_link_is_not_written_through(three):
    (three / "theirs").write_bytes(b"mine")
    (three / ".000005.tar.tmp").symlink_to(three / "theirs")
    with pytest.raises(CogError):
        ShardWriter(three, 5, contract_in(three), ())
    assert (three / "theirs").read_bytes() == b"mine"


def test_a_record_of_somebodys_stays_though_it_has_no_tar(three):
    (three / "000005.parquet").write_bytes(b"mine")
    (three / "7.parquet").write_bytes(b"mine")
    recover_folder(three)
    assert (three / "000005.parquet").read_bytes() == b"mine" and 7 not in committed_shards(three)
