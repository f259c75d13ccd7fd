"""`cogprep index`: put back what the shards themselves still prove.

A tar whose record is lost gets a new one, if the tar is whole: every extent in
it carries the hash of its tensors. A lost contract.json comes back from any
record. What only the data root knows (times and hashes of the clips) stays
empty; the next `cogprep encode` recognises the samples by their keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import json_text
from cogcommon.cli.terminal import Console
from cogcommon.errors import ShardError
from cogcommon.files.atomic import commit_bytes
from cogcommon.shards.contract import CONTRACT_FILE, Contract
from cogcommon.shards.records import (
    SampleRow,
    ShardHeader,
    ShardRecord,
    read_table,
    record_name,
    tar_name,
    write_record,
)
from cogcommon.words import counted

from ..plan.folder import SPLITS, contract_if_there, records_in, split_folder
from ..settings.shards import IndexSettings
from ..store.committed import tars_without_record
from ..store.extents import INFO_FIELDS, tar_end_whole, whole_extents
from ..store.locks import ShardBusy, at_work, lock_shard, shard_disk_errors
from ..store.outlet import Outlet, open_image
from ..store.proof import check_shards_output, is_ours
from ..store.rewrite import recover_folder
from ..store.shards import ShardDone


@dataclass(frozen=True)
class Indexed:
    """What was put back, and what cannot be."""

    contract: bool
    records: list[str]
    broken: list[str]  # tars that are not whole
    samples: int  # in all committed shards


def run(settings: IndexSettings) -> None:
    """The command.

    Raises:
        ShardError: a tar without a record is not whole, or there is no contract to be had.
    """
    with open_image(settings.out, "OUT", changing=True) as image:
        done = index(image.folder, image)
        _tell(done, settings, image)


def _tell(done: Indexed, settings: IndexSettings, image: Outlet) -> None:
    console = Console(stderr=settings.json, soft_wrap=True)
    if settings.json:
        print(json_text(done.__dict__))
    if done.contract:
        console.print(f"put back {CONTRACT_FILE}")
    for name in done.records:
        console.print(f"put back the record of {name}")
    if not done.contract and not done.records:
        console.print("nothing was lost" if not done.broken else "nothing could be put back")
    console.print(f"{image.place} holds {counted(done.samples, 'sample')}")
    if done.broken:
        raise ShardError(
            f"{counted(len(done.broken), 'tar')} without a record, and not whole",
            where=", ".join(done.broken),
            fix="run the `cogprep encode` command again: it keeps what is whole in them and makes the rest",
        )


def index(out: Path, image: Outlet | None = None) -> Indexed:
    """Rebuild a folder's lost records and contract from its shards.

    Args:
        image: where its tars come from and its records go, if not there.

    Raises:
        ShardError: there is neither a contract nor a record to take it from.
    """
    image = image or Outlet(out)
    check_shards_output(out, "OUT")
    if not out.is_dir():
        raise _nothing_left(out)
    with at_work(out), shard_disk_errors(out):
        for split in SPLITS:
            recover_folder(split_folder(out, split))
        contract = contract_if_there(out)
        rebuilt = contract is None
        if contract is None:
            contract = _contract_of_a_record(out)
            commit_bytes(out / CONTRACT_FILE, contract.to_json().encode(), exclusive=True)
            image.put(CONTRACT_FILE)
        records: list[str] = []
        broken: list[str] = []
        for split in SPLITS:
            folder = split_folder(out, split)
            for tar in tars_without_record(folder):
                try:
                    with lock_shard(folder, int(tar.stem)):
                        if not is_ours(tar) or tar.with_suffix(".parquet").exists():
                            continue
                        with image.at_hand(tar):
                            whole = _put_back(folder, int(tar.stem), contract)
                            if whole:
                                image.publish(folder, int(tar.stem))
                except (ShardBusy, ShardDone):
                    continue
                (records if whole else broken).append(str(tar.relative_to(out)))
        samples = sum(read_table(path, ["key"])[1].num_rows for _, _, path in records_in(out))
    return Indexed(rebuilt, records, broken, samples)


def _put_back(folder: Path, number: int, contract: Contract) -> bool:
    """Write the record of a tar, if the tar is whole."""
    rows: list[SampleRow] = []
    with (folder / tar_name(number)).open("rb") as stream:
        end = 0
        for extent in whole_extents(stream):
            if not extent.info.keys() >= set(INFO_FIELDS):
                return False
            rows.append(extent.placed(_row(extent.info), extent.offset))
            end = extent.offset + extent.size
        ending = tar_end_whole(stream, end)
    if ending is None:
        return False
    size, digest = ending
    write_record(ShardRecord(ShardHeader(number, size, digest, contract), rows), folder / record_name(number))
    return True


def _row(info: object) -> SampleRow:
    assert isinstance(info, dict)
    return SampleRow(
        key=info["key"],
        status="ok",
        source_line=0,
        source_size=-1,
        source_mtime_ns=-1,
        source_sha256=b"",
        image_sha256=b"",
        **{name: info[name] for name in INFO_FIELDS},
    )


def _contract_of_a_record(out: Path) -> Contract:
    for _, _, path in records_in(out):
        return read_table(path, ["key"])[0].contract
    raise _nothing_left(out)


def _nothing_left(out: Path) -> ShardError:
    return ShardError(
        "neither a contract nor a record is left",
        where=str(out),
        fix="`cogprep encode` with the same settings keeps what is whole and makes the rest",
    )
