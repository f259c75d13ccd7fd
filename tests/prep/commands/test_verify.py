"""`verify`, `index` and `inspect`: damage is always named, and what can be put back is."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from forked import Forked

from cogcommon.errors import ShardError
from cogcommon.model.families import Resolution
from cogcommon.shards.records import ShardRecord, read_record
from cogprep.commands.index import index
from cogprep.commands.inspection import inspect
from cogprep.commands.verify import check_shard, run, verify
from cogprep.settings.shards import VerifySettings
from cogprep.store.shards import ShardWriter


@pytest.fixture
def small(tmp_path: Path, make_shards) -> tuple[Path, ShardRecord]:
    """A small shard of two samples, and its record."""
    (tar,) = make_shards(tmp_path / "small", samples=2, per_shard=2, resolutions=(Resolution(9, 16, 16),))
    return tar, read_record(tar.with_suffix(".parquet"))


def damaged(tar: Path, record: ShardRecord) -> bool:
    return any(check_shard(tar, record, record.header.contract))


def test_a_whole_folder_is_as_recorded(encoded, capsys):
    verified = verify(encoded / "out")
    assert (verified.shards, verified.samples, verified.problems) == (3, 5, [])
    run(VerifySettings(out=encoded / "out", json=True))
    assert json.loads(capsys.readouterr().out)["samples"] == 5


def test_each_kind_of_trouble_is_counted_by_its_own_name(make_shards, tmp_path, capsys):
    out = tmp_path / "out"
    tars = make_shards(out, samples=4, per_shard=2)

    def trouble() -> str:
        with pytest.raises(ShardError) as caught:
            run(VerifySettings(out=out))
        return caught.value.what

    tars[0].with_suffix(".parquet").unlink()
    assert trouble() == "1 tar without a record"
    tars[1].write_bytes(b"")
    assert trouble() == "1 of 1 shard not as recorded; 1 tar without a record"
    (out / "empty_caption.safetensors").unlink()
    assert trouble().endswith("; 1 tar without a record; empty_caption.safetensors not as it should be")
    tars[1].with_suffix(".parquet").unlink()
    tars[1].unlink()
    assert trouble() == "1 tar without a record; empty_caption.safetensors not as it should be"


def test_a_folder_in_which_nothing_is_finished_is_not_called_as_recorded(make_shards, tmp_path, capsys):
    (tar,) = make_shards(tmp_path / "out", samples=2, per_shard=2)
    tar.with_suffix(".parquet").unlink()
    tar.rename(tar.with_name(".000000.tar.tmp"))
    run(VerifySettings(out=tmp_path / "out"))
    said = capsys.readouterr().out
    assert "is finished: there is nothing to verify yet" in said and "as recorded" not in said


def test_a_tar_cut_at_every_block_is_named(small):
    tar, record = small
    whole = tar.read_bytes()
    assert not damaged(tar, record)
    blocks = range(0, len(whole), 512)
    for size in blocks:
        tar.write_bytes(whole[:size])
        assert damaged(tar, record), f"cut at {size}"
    assert len(blocks) > 200


def test_a_thousand_flipped_bytes_are_each_named(small):
    tar, record = small
    whole = tar.read_bytes()
    draw = random.Random(3)
    for _ in range(1000):
        position, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        data = bytearray(whole)
        data[position] ^= bit
        tar.write_bytes(data)
        assert damaged(tar, record), f"bit {bit} of byte {position}"


def test_damage_names_its_shard_and_fails_the_command(encoded):
    tar = encoded / "out" / "000001.tar"
    row = read_record(encoded / "out" / "000001.parquet").rows[0]
    data = bytearray(tar.read_bytes())
    data[row.tensors_offset + 500] ^= 4
    tar.write_bytes(data)
    (encoded / "out" / "000002.tar").unlink()
    (encoded / "out" / "000000.parquet").unlink()
    (encoded / "out" / "empty_caption.safetensors").write_bytes(b"?")
    with pytest.raises(ShardError) as caught:
        run(VerifySettings(out=encoded / "out"))
    for name in ("000000.tar", "000001.tar", "000002.tar", "empty_caption.safetensors"):
        assert name in str(caught.value)
    whats = [problem.what for problem in verify(encoded / "out").problems if problem.shard == "000001.tar"]
    assert any(row.source in what for what in whats)


def test_what_is_to_go_is_what_is_at_fault(small):
    """Of a damaged record the tar stays, of which encode takes what is whole; somebody's tar is nobody's to remove."""
    tar, _ = small
    tar.with_name("000007.tar").write_bytes(b"mine")
    (other,) = verify(tar.parent).problems
    assert other.shard == "000007.tar" and "move it elsewhere" in other.fix
    record = tar.with_suffix(".parquet")
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(ShardError) as caught:
        run(VerifySettings(out=tar.parent))
    assert "000000.parquet" in caught.value.where
    elsewhere, remove = caught.value.fix.split("; ", 2)[1:]
    assert elsewhere == "move it elsewhere" and f"for example `rm {record}`, and run the `cogprep encode`" in remove


@pytest.mark.parametrize("wrong", ["not finite", "shape", "dtype", "missing"])
def test_wrong_tensors_are_named_even_when_every_hash_is_right(small, wrong):
    tar, record = small
    row = record.rows[0]
    latent = torch.zeros(16, 3, 2, 2)
    tensors = {"latent_mean": latent, "latent_std": latent.clone(), "text": torch.zeros(226, 64)}
    if wrong == "not finite":
        latent[0, 0, 0, 0] = torch.nan
    elif wrong == "shape":
        tensors["latent_std"] = torch.zeros(16, 3, 2, 4)
    elif wrong == "dtype":
        tensors["text"] = tensors["text"].bfloat16()
    else:
        del tensors["latent_std"]
    writer = ShardWriter(tar.parent, 7, record.header.contract, ())
    writer.add(row, tensors)
    found = list(check_shard(tar.with_name("000007.tar"), writer.commit(), record.header.contract))
    assert len(found) == 1 and row.source in found[0]


def test_encoding_again_gives_the_same_numbers(encoded):
    differences = verify(encoded / "out", reencode=2).differences
    assert [difference.source for difference in differences] == ["0.mp4", "2.mp4"]
    assert all(difference.largest == 0 for difference in differences)  # on a CPU


def test_encoding_again_shows_a_clip_that_changed(encoded, draw_clip):
    draw_clip(encoded / "ds" / "0.mp4", 99)
    (difference,) = verify(encoded / "out", reencode=1).differences
    assert difference.largest > 0.01


def test_index_puts_back_a_lost_record_and_contract(encoded):
    out = encoded / "out"
    before = read_record(out / "000000.parquet")
    (out / "000000.parquet").unlink()
    (out / "contract.json").unlink()
    done = index(out)
    assert done.contract and done.records == ["000000.tar"] and done.broken == [] and done.samples == 5
    after = read_record(out / "000000.parquet")
    assert after.header == before.header
    assert [(row.key, row.sha256, row.frames, row.caption) for row in after.rows] == [
        (row.key, row.sha256, row.frames, row.caption) for row in before.rows
    ]
    assert verify(out).problems == []


def test_what_index_put_back_is_reused(encoded, settings_of):
    from cogprep.commands.encode import encode

    (encoded / "out" / "000000.parquet").unlink()
    index(encoded / "out")
    report = encode(settings_of(encoded))
    assert (report.encoded, report.reused, report.dropped) == (0, 5, 0)


def test_index_does_not_vouch_for_a_tar_that_is_cut(encoded):
    out = encoded / "out"
    (out / "000000.parquet").unlink()
    data = (out / "000000.tar").read_bytes()
    row = read_record(out / "000001.parquet").rows[0]
    for cut in (row.size, row.size + 512, len(data) - 10240, len(data) - 512):
        (out / "000000.tar").write_bytes(data[:cut])
        assert index(out).broken == ["000000.tar"], f"cut at {cut}"
    assert not (out / "000000.parquet").exists()


def test_inspect_counts(encoded):
    contents = inspect(encoded / "out")
    assert contents.shards == {"train": 3} and contents.samples == {"train": 5} and contents.clips == 5
    assert contents.buckets == {"9x64x96": 5} and contents.contract.task == "t2v"
    (encoded / "out" / "000002.parquet").unlink()
    (encoded / "out" / "000001.tar").unlink()
    contents = inspect(encoded / "out")
    assert contents.uncommitted == ["000002.tar"] and contents.lost == ["000001.tar"]
    with pytest.raises(ShardError, match="no shards here"):
        inspect(encoded / "ds")


def test_inspect_names_a_clip_as_it_is_named_now(encoded, lay_lists):
    root = encoded / "ds"
    (root / "3.mp4").rename(root / "three.mp4")
    lay_lists(root, [f"wave number {index}" for index in range(5)], ["0.mp4", "1.mp4", "2.mp4", "three.mp4", "4.mp4"])
    named = ["0.mp4", "1.mp4", "2.mp4", "three.mp4", "4.mp4"]
    assert [row.source for row in inspect(encoded / "out").rows] == named
    shutil.rmtree(root)
    assert inspect(encoded / "out").rows[3].source == "3.mp4"


def test_the_commands_from_a_shell(encoded):
    shutil.rmtree(encoded / "ds")  # none of them needs it
    for command in ("inspect", "verify", "index"):
        code, out, _ = Forked(["cogprep", command, encoded / "out", "--json"]).end()
        assert code == 0 and json.loads(out)
    code, _, err = Forked(["cogprep", "verify", "/nowhere"]).end()
    assert code == 2 and "no shards here" in err and "Traceback" not in err


def test_a_tar_that_cannot_be_read_is_not_called_damaged(small):
    tar, _ = small
    tar.unlink()
    tar.symlink_to(tar.name)  # whoever runs the tests, nobody reads that
    with pytest.raises(ShardError) as caught:
        run(VerifySettings(out=tar.parent))
    assert "instead of a link" in caught.value.fix and "rm " not in caught.value.fix
