import dataclasses
import random
from importlib import metadata

import pytest

from cogcommon import __version__
from cogcommon.errors import DiskError, ShardError
from cogcommon.shards.records import ShardRecord, read_record, record_bytes, write_record


@pytest.fixture
def record(make_shards, tmp_path) -> ShardRecord:
    (tar,) = make_shards(tmp_path / "shards", samples=3, per_shard=3)
    return read_record(tar.with_suffix(".parquet"))


def test_a_record_reads_back_as_it_was_written(record, tmp_path):
    write_record(record, tmp_path / "000000.parquet")
    assert read_record(tmp_path / "000000.parquet") == record
    assert record_bytes(record) == (tmp_path / "000000.parquet").read_bytes()


def test_no_flipped_byte_of_a_record_changes_what_it_says(record, tmp_path):
    path = tmp_path / "000000.parquet"
    good = record_bytes(record)
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            found = read_record(path)
        except ShardError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            # Statistics and the like may change; what we read may not.
            assert found.rows == record.rows
            assert found.header.tar_sha256 == record.header.tar_sha256
    assert refused > 200


def test_the_contract_tells_which_fact_differs(record):
    contract = record.header.contract
    other = dataclasses.replace(contract, posterior="sample", tool_version="0.0.0")
    assert contract.differences(other) == ["posterior: 'moments' here, 'sample' there"]
    assert contract.fingerprint != other.fingerprint
    drawn = {**contract.settings, "crop": "random", "seed": 1, "resolution": ["9x64x64"]}
    many = dataclasses.replace(contract, family="2b", scaling_factor=0.5, settings=drawn)
    names = [line.partition(":")[0] for line in contract.differences(many)]  # the likeliest cause first
    assert names == ["family", "--resolution", "--crop", "scaling_factor"]  # nobody chose a seed
    seeds = [dataclasses.replace(contract, settings={**drawn, "seed": seed}) for seed in (1, 2)]
    assert seeds[0].differences(seeds[1]) == ["--seed: 1 here, 2 there"]
    alone = dataclasses.replace(contract, settings={**contract.settings, "seed": 1})
    assert alone.differences(contract) == ["--seed: 1 here, not recorded there"]
    assert contract.fingerprint == dataclasses.replace(contract, tool_version="0.0.0", model="elsewhere").fingerprint


def test_the_installed_project_has_the_version_that_its_code_says():
    assert metadata.version("cogtune") == __version__


def test_a_record_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    """That message says to remove it."""
    (tmp_path / "000000.parquet").mkdir()
    with pytest.raises(DiskError) as caught:
        read_record(tmp_path / "000000.parquet")
    assert "damaged" not in str(caught.value) and "there is a folder" in str(caught.value)
