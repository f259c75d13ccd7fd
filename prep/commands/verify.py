"""`cogprep verify`: every shard against its record, and samples against a second encode."""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcommon.cli.names import command_line, json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import SettingError, ShardError
from cogcommon.files.failures import machines_fault
from cogcommon.files.hashes import sha256_of
from cogcommon.files.readers import THREADS, read_in_order
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import (
    IMAGE_CLEAN_MEAN,
    IMAGE_MEAN,
    LATENT_MEAN,
    TEXT,
    ShardRecord,
    extent_intact,
    read_record,
    split_extent,
    tar_name,
)
from cogcommon.words import counted, in_bytes

from ..encode.reencode import Difference
from ..plan.folder import SPLITS, Split, read_contract, records_in, shard_label, split_folder
from ..settings.shards import VerifySettings
from ..store.committed import tars_without_record
from ..store.outlet import Outlet, open_image
from ..store.proof import OF_THE_SHARDS, is_ours

_OTHER_SETTINGS = f"encoded with other settings than {CONTRACT_FILE} says"
_NO_RECORD = "has no record, so it does not count"
_TARS = 2  # from an address, on this machine's disk at a time


@dataclass(frozen=True)
class Problem:
    """Something that is not as the record says.

    Args:
        shard: its tar, or its record if that is at fault, or another file, from the folder.
        fix: what helps; empty where the file is to be removed, a tar with its record, and encoded again.
    """

    shard: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Verified:
    shards: int
    samples: int
    bytes_read: int
    problems: Sequence[Problem]
    differences: Sequence[Difference]

    def to_json(self) -> str:
        return json_text(dataclasses.asdict(self))


def run(settings: VerifySettings) -> None:
    """The command.

    Raises:
        ShardError: there is any problem.
    """
    with open_image(settings.out, "OUT") as image:
        if settings.reencode and not image.keeps:
            raise SettingError(
                "samples are encoded again beside shards of this machine only",
                where=f"--reencode {settings.reencode}, {image.place}",
                fix="leave --reencode out, or copy the folder to this machine first",
            )
        verified = verify(
            image.folder, reencode=settings.reencode, workers=settings.workers, model=settings.model, image=image
        )
        problems = [dataclasses.replace(one, fix=image.told(one.fix)) for one in verified.problems]
        _tell(dataclasses.replace(verified, problems=problems), settings, image)


def _tell(verified: Verified, settings: VerifySettings, image: Outlet) -> None:
    if settings.json:
        print(verified.to_json())
    else:
        console = Console(soft_wrap=True)
        for difference in verified.differences:
            console.print(
                f"{difference.source}: encoded again, at most {difference.largest:.3g} apart ({difference.tensor})"
            )
        for problem in verified.problems:
            console.print(f"{problem.shard}: {problem.what}{': ' * bool(problem.fix)}{problem.fix}", style="red")
        if not verified.problems and not verified.shards:
            console.print(f"no shard in {image.place} is finished: there is nothing to verify yet")
        elif not verified.problems:
            size = in_bytes(verified.bytes_read)
            console.print(
                f"{counted(verified.shards, 'shard')}, {counted(verified.samples, 'sample')}, {size}: all as recorded"
            )
    if verified.problems:
        damaged = sorted({problem.shard for problem in verified.problems})
        raise ShardError(
            _summary(verified),
            where=", ".join(damaged),
            fix=_remedy(verified.problems, image.folder),
        )


def _summary(verified: Verified) -> str:
    """The problems in one line: of shards with a record, of tars without one, and of what lies beside them."""
    names = {problem.shard for problem in verified.problems}
    unrecorded = {problem.shard for problem in verified.problems if problem.what == _NO_RECORD}
    beside = sorted(name for name in names if name in OF_THE_SHARDS)
    parts = []
    if bad := names - unrecorded - set(beside):
        parts.append(f"{len(bad)} of {counted(verified.shards, 'shard')} not as recorded")
    if unrecorded:
        parts.append(f"{counted(len(unrecorded), 'tar')} without a record")
    if beside:
        parts.append(f"{' and '.join(beside)} not as {'it' if len(beside) == 1 else 'they'} should be")
    return "; ".join(parts)


def _remedy(problems: Sequence[Problem], out: Path) -> str:
    """What to type."""
    fixes = list(dict.fromkeys(problem.fix for problem in problems if problem.fix))[:3]
    if broken := sorted(problem.shard for problem in problems if not problem.fix):
        one = out / broken[0]
        remove = command_line("rm", one, *([one.with_suffix(".parquet")] if one.suffix == ".tar" else []))
        anew = "run the `cogprep encode` command again: it makes them anew"
        fixes.append(f"remove each, a tar with its record, for example `{remove}`, and {anew}")
    return "; ".join(fixes)


def verify(
    out: Path, *, reencode: int = 0, workers: int = 1, model: str | None = None, image: Outlet | None = None
) -> Verified:
    """Read every byte of every committed shard.

    Args:
        image: where the folder's tars come from, one at a time, if not from there.
        reencode: samples to encode again, if all is as recorded.
        model: the checkpoint for that, if it is elsewhere than the contract says.
        workers: decode processes for that.

    Raises:
        ShardError: no contract, so no shards.
    """
    image = image or Outlet(out)
    contract = read_contract(out)
    if contract is None:
        raise ShardError("no shards here", where=str(out / CONTRACT_FILE), fix="name the --out of `cogprep encode`")
    problems = list(_of_the_folder(out, contract))
    records = list(records_in(out))
    first: dict[tuple[Split, str], str] = {}  # the shard in which a sample is found, by split and key
    readable = samples = bytes_read = 0

    def check(place: tuple[Split, int, Path]) -> tuple[ShardRecord | None, list[Problem]]:
        split, number, path = place
        label, tar = shard_label(split, number), path.with_suffix(".tar")
        try:
            record = read_record(path)
        except ShardError as error:
            return None, [Problem(label.removesuffix(".tar") + ".parquet", error.what)]
        with image.at_hand(tar):
            try:
                return record, [Problem(label, what) for what in check_shard(tar, record, contract)]
            except OSError as error:  # which says nothing of what is in it
                told = machines_fault(error)
                fix = told.fix if told and told.fix else "see to that, and verify again"
                return record, [Problem(label, f"cannot be read: {error.strerror}", fix)]

    good: list[tuple[Path, ShardRecord]] = []
    checked = read_in_order(check, records, threads=THREADS if image.keeps else _TARS)
    with stage("verifying", len(records), "shard") as bar:
        for (split, number, path), (record, faults) in zip(records, checked, strict=True):
            problems += faults
            if record is not None:
                problems += _found_twice(record, split, shard_label(split, number), first)
                readable += 1
                samples += sum(row.status == "ok" for row in record.rows)
                bytes_read += record.header.tar_size
                if reencode and not faults:
                    good.append((path.with_suffix(".tar"), record))
            bar.advance()
    other = [problem for problem in problems if problem.what == _OTHER_SETTINGS]
    if other and len(other) == readable:
        fix = (
            f"`{command_line('rm', out / CONTRACT_FILE)}`, then `{command_line('cogprep', 'index', out)}`, "
            "which takes it from the record of a shard"
        )
        problems = [problem for problem in problems if problem not in other]
        problems.insert(0, Problem(CONTRACT_FILE, "is not the contract of any shard here", fix))
    differences: list[Difference] = []
    if reencode and not problems:
        from ..encode.reencode import encode_again

        differences = encode_again(out, contract, good, count=reencode, workers=workers, model=model)
    return Verified(len(records), samples, bytes_read, problems, differences)


def _found_twice(
    record: ShardRecord, split: Split, label: str, first: dict[tuple[Split, str], str]
) -> Iterator[Problem]:
    """The samples of a shard that another one has, too; what is new is noted in ``first``."""
    there = [first.setdefault((split, row.key), label) for row in record.rows if row.status == "ok"]
    for other, count in sorted(Counter(there).items()):
        if other != label:
            drops = label.endswith(tar_name(record.header.number))  # else somebody has copied it
            fix = "`cogprep encode` drops the second" if drops else ""
            yield Problem(label, f"{counted(count, 'sample')} of it in {other}, too", fix)


def check_shard(tar: Path, record: ShardRecord, contract: Contract) -> Iterator[str]:
    """What is wrong with one shard: size, hash, members, keys, extents, values.

    Raises:
        OSError: it is there, and cannot be read.
    """
    header = record.header
    if header.contract.fingerprint != contract.fingerprint:
        yield _OTHER_SETTINGS
    try:
        size = tar.stat().st_size
        if size != header.tar_size:
            yield f"{size} bytes; the record says {header.tar_size}"
            return
        if sha256_of(tar) != header.tar_sha256:
            yield "its content is not what was recorded (sha256)"
        rows = [row for row in record.rows if row.status == "ok"]
        keys = [row.key for row in record.rows]
        if len(set(keys)) < len(keys):
            yield "a key twice in the record"
        with tarfile.open(tar) as archive:
            members = archive.getnames()
        if sorted(members) != sorted(f"{row.key}.{kind}" for row in rows for kind in ("json", "safetensors")):
            yield "its members are not the recorded samples"
        with tar.open("rb") as stream:
            for row in rows:
                stream.seek(row.offset)
                extent = stream.read(row.size)
                if not extent_intact(extent, row.sha256):
                    yield f"sample {row.key} ({row.source}) is damaged"
                    continue
                info, payload = split_extent(extent, row)
                if info["key"] != row.key:
                    yield f"sample {row.key} calls itself {info['key']}"
                yield from (
                    f"sample {row.key} ({row.source}): {what}" for what in _check_tensors(payload, row.bucket, contract)
                )
    except FileNotFoundError:
        yield "cannot be read: it is gone"
    except (tarfile.TarError, ValueError) as error:
        yield f"cannot be read: {error}"


def _check_tensors(payload: bytes, bucket: str, contract: Contract) -> Iterator[str]:
    import safetensors.torch

    tensors = safetensors.torch.load(payload)
    shapes = expected_shapes(bucket, contract)
    if tensors.keys() != shapes.keys():
        yield f"has {', '.join(sorted(tensors))}; {', '.join(sorted(shapes))} are due"
    for name, tensor in tensors.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            yield f"{name} is {tuple(tensor.shape)}, not {shapes[name]}"
        if str(tensor.dtype) != f"torch.{contract.dtype}":
            yield f"{name} is {tensor.dtype}, not {contract.dtype}"
        if not tensor.isfinite().all():
            yield f"{name} has values that are not finite"


def expected_shapes(bucket: str, contract: Contract) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a sample."""
    latent = contract.family_row.latent(Resolution.parse(bucket))
    shapes: dict[str, tuple[int, ...]] = {LATENT_MEAN: latent}
    if contract.task == "i2v":
        shapes[IMAGE_MEAN] = (contract.image_variants, *latent.still)
        shapes[IMAGE_CLEAN_MEAN] = latent.still
    if contract.posterior == "moments":
        shapes |= {name.replace("mean", "std"): shape for name, shape in shapes.items()}
    shapes[TEXT] = (contract.text_tokens, contract.text_dim)
    return shapes


def _of_the_folder(out: Path, contract: Contract) -> Iterator[Problem]:
    path = out / EMPTY_CAPTION_FILE
    if not path.exists():
        yield Problem(EMPTY_CAPTION_FILE, "missing", "`cogprep encode` makes it anew")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != contract.empty_caption_sha256:
        yield Problem(EMPTY_CAPTION_FILE, f"its sha256 is not the one in {CONTRACT_FILE}")
    for split in SPLITS:
        for tar in tars_without_record(split_folder(out, split)):
            fix = "`cogprep encode` finishes it, or `cogprep clean-cache` removes it"
            if not is_ours(tar):
                fix = "cogprep did not make it; move it elsewhere"
            yield Problem(shard_label(split, int(tar.stem)), _NO_RECORD, fix)
