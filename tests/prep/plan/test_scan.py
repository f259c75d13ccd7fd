"""What the records of a folder say, where somebody or another process has been at it, and what a plan makes of that."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from cogcommon.errors import ShardError
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import CONTRACT_FILE
from cogcommon.shards.records import ShardRecord, read_record, write_record
from cogprep.commands.clean_cache import run as clean
from cogprep.commands.index import index
from cogprep.commands.verify import run, verify
from cogprep.dataset.lists import Sample
from cogprep.plan.folder import read_contract, scan
from cogprep.plan.plan import Candidate, EncodePlan, make_plan
from cogprep.settings.shards import CleanSettings, VerifySettings
from cogprep.source.clip import Hashed
from cogprep.store.committed import read_tensors
from cogprep.store.rewrite import drop_samples
from cogprep.store.shards import ShardWriter
from cogtrain.data.shards import open_shards

SMALL = Resolution(9, 16, 16)


@pytest.fixture
def out(tmp_path: Path, make_shards) -> Path:
    """Two shards of two samples."""
    make_shards(tmp_path / "out", samples=4, per_shard=2, resolutions=(SMALL,))
    return tmp_path / "out"


def keys_of(out: Path, number: int) -> list[str]:
    return [row.key for row in read_record(out / f"{number:06d}.parquet").rows]


def plan_of(out: Path, keys: list[str], *, retry_rejected: bool = False) -> EncodePlan:
    lines = [
        Candidate(Sample(line, "", f"{line}.mp4", ""), Hashed(1, 1, key.encode()), b"") for line, key in enumerate(keys)
    ]
    return make_plan(
        lines, keys, ["train"] * len(keys), dict.fromkeys(keys, SMALL), scan(out, retry_rejected=retry_rejected),
        bucket_order=[SMALL], chunk={SMALL: 2},
    )  # fmt: skip


def test_a_sample_of_two_shards_leaves_the_second(out: Path) -> None:
    """Two processes encode, and a line goes between their plans: each puts the same clip elsewhere."""
    tar, record = out / "000001.tar", read_record(out / "000001.parquet")
    writer = ShardWriter(out, 2, record.header.contract, ())
    for row in record.rows[1:]:
        writer.add(row, read_tensors(tar, row))
    writer.commit()
    with pytest.raises(ShardError, match="in more than one of these shards"):
        open_shards([str(out)])
    (problem,) = verify(out).problems
    assert (
        problem.shard == "000002.tar" and "1 sample of it in 000001.tar, too" in problem.what and "drops" in problem.fix
    )
    keys = keys_of(out, 0) + keys_of(out, 1)
    plan = plan_of(out, keys)
    assert [(drop.number, sorted(drop.keep)) for drop in plan.drops] == [(2, [])]
    assert (plan.reused, plan.new, plan.dropped) == (4, 0, 0)  # nothing of the data goes
    for drop in plan.drops:
        drop_samples(out, drop.number, drop.keeps)
    assert sorted(open_shards([str(out)]).table["key"].to_pylist()) == sorted(keys)
    assert verify(out).problems == [] and plan_of(out, keys).drops == []


def test_a_number_is_free_only_where_its_record_goes(out: Path) -> None:
    """A clip that was rejected is replaced by a good one: with --retry-rejected, too, its shard is dropped first."""
    record = read_record(out / "000001.parquet")
    rejected = [dataclasses.replace(row, status="rejected", reason="black") for row in record.rows]
    (out / "000001.parquet").unlink()
    write_record(ShardRecord(record.header, rejected), out / "000001.parquet")
    for retry in (False, True):
        plan = plan_of(out, [*keys_of(out, 0), "new"], retry_rejected=retry)
        assert [(shard.number, shard.completes) for shard in plan.shards] == [(1, False)]
        assert [(drop.number, sorted(drop.keep)) for drop in plan.drops] == [(1, [])]
    retried = plan_of(out, keys_of(out, 0) + keys_of(out, 1), retry_rejected=True)
    assert [(shard.number, shard.completes) for shard in retried.shards] == [(1, True)] and retried.drops == []


def test_a_shard_under_another_number_is_refused_with_the_way_back(out: Path) -> None:
    for kind in ("tar", "parquet"):
        shutil.copy(out / f"000000.{kind}", out / f"000007.{kind}")
    with pytest.raises(ShardError, match="renamed or copied") as copied:
        scan(out)
    assert (
        copied.value.where == str(out / "000007.tar") and "000007.parquet to a folder of their own" in copied.value.fix
    )
    problems = verify(out).problems
    assert [problem.what for problem in problems] == ["2 samples of it in 000000.tar, too"] and not problems[0].fix
    for kind in ("tar", "parquet"):
        (out / f"000000.{kind}").unlink()
    with pytest.raises(ShardError) as renamed:
        scan(out)
    assert renamed.value.fix == (
        f"`mv {out}/000007.tar {out}/000000.tar` and `mv {out}/000007.parquet {out}/000000.parquet`"
    )
    clean(CleanSettings(out=out, yes=True, all=True))
    assert {path.stem for path in out.iterdir() if path.suffix in (".tar", ".parquet")} == {"000007"}  # both, or none
    assert len(list(out.glob("000007.*"))) == 2


def test_a_shard_on_a_disk_that_is_not_mounted_is_not_taken_for_gone(out: Path) -> None:
    (out / "000001.tar").unlink()
    (out / "000001.tar").symlink_to("/big/000001.tar")
    with pytest.raises(ShardError, match=r"a link to /big/000001\.tar, and nothing is there"):
        scan(out)


def test_a_shard_of_other_settings_is_refused_before_it_is_dropped(out: Path, make_shards) -> None:
    wide = Resolution(9, 16, 32)
    make_shards(out.parent / "other", samples=6, per_shard=2, resolutions=(wide,))
    for kind in ("tar", "parquet"):
        shutil.move(out.parent / "other" / f"000002.{kind}", out / f"000002.{kind}")
    with pytest.raises(ShardError, match=r"000002\.tar was encoded with other settings.*9x16x32.*9x16x16"):
        scan(out)
    (problem,) = verify(out).problems
    assert (problem.shard, problem.fix) == ("000002.tar", "")


def test_a_contract_that_is_lost_or_anothers_is_not_blamed_on_the_shards(out: Path, make_shards) -> None:
    make_shards(out.parent / "other", samples=1, resolutions=(Resolution(9, 16, 32),))
    shutil.copy(out.parent / "other" / CONTRACT_FILE, out / CONTRACT_FILE)
    with pytest.raises(ShardError) as anothers:
        run(VerifySettings(out=out))
    assert anothers.value.fix == f"`rm {out}/{CONTRACT_FILE}`, then `cogprep index {out}`, " + (
        "which takes it from the record of a shard"
    )
    (out / CONTRACT_FILE).unlink()
    for look in (verify, read_contract):
        with pytest.raises(ShardError, match="is lost") as lost:
            look(out)
        assert f"`cogprep index {out}`" in lost.value.fix
    assert index(out).contract and verify(out).problems == []
