"""Killed at any moment: nothing is lost or doubled, and the next run ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from places import CHILDREN
from waiting import wait_until

from cogcommon.shards.contract import CONTRACT_FILE
from cogcommon.shards.records import read_record
from cogprep.commands.encode import encode
from cogprep.commands.verify import verify
from cogprep.store.extents import whole_extents

DRIVER = CHILDREN / "crash_driver.py"


def tars(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*.tar"))}


@pytest.mark.parametrize("scenario", ["fresh", "changed"])
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_fault_at_every_write_fsync_and_rename(mode, scenario, encoded, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    code, out, err = Forked([DRIVER, work, mode, scenario, encoded / "out" / "contract.json"]).end()
    assert code == 0, err[-2000:]
    result = json.loads(out.splitlines()[-1])
    assert result["wrong"] == []
    assert {"write", "fsync", "replace"} <= set(result["steps"]) and len(result["steps"]) > 20
    if scenario == "changed":
        assert "unlink" in result["steps"]


def command_line(folder: Path, *more: str, program: object = "cogprep") -> list[object]:
    return [
        program, "encode", "--data-root", str(folder / "ds"), "--out", str(folder / "new"),
        "--resolution", "9x64x96", "--model", "tiny", "--shard-samples", "2", "--workers", "1", *more,
    ]  # fmt: skip


def start(folder: Path, *more: str) -> Forked:
    """`cogprep encode` in a process group of its own, so that its decode children can be killed with it."""
    return Forked(command_line(folder, *more))


def finish(folder: Path, *more: str) -> dict:
    code, out, err = start(folder, "--json", *more).end()
    assert code == 0, err
    return json.loads(out)


def samples_on_disk(out: Path) -> int:
    """Samples that need not be encoded again: committed, or whole in a temporary tar or a tar without record."""
    count = 0
    for path in out.rglob("*.parquet"):
        if path.with_suffix(".tar").exists():
            count += sum(row.status == "ok" for row in read_record(path).rows)
    for path in [*out.rglob(".*.tar.tmp"), *out.rglob("[0-9]*.tar")]:
        if path.name.startswith(".") or not path.with_suffix(".parquet").exists():
            with path.open("rb") as stream:
                count += sum(1 for _ in whole_extents(stream))
    return count


def kill_at_random(folder: Path, undisturbed: dict[str, str], kills: int, seed: int) -> None:
    """Kill runs until ``kills`` of them were killed; every folder is then finished and compared."""
    draw = random.Random(seed)
    out = folder / "new"
    Forked(["cogprep", "--version"]).end()  # from now on the server has imported what they need
    begun = time.monotonic()
    finish(folder)
    usual = time.monotonic() - begun
    assert tars(out) == undisturbed
    killed = 0
    while killed < kills:
        for path in out.rglob("*"):
            # Begin with a folder that lacks something, but for what is written before the first shard.
            if path.is_file() and path.name != CONTRACT_FILE and draw.random() < 0.7:
                path.unlink()
        for _ in range(3):
            process = start(folder)
            time.sleep(draw.uniform(0.2, 0.9) * usual)
            killed += process.kill()
        before = samples_on_disk(out)
        begun = time.monotonic()
        report = finish(folder)
        usual = time.monotonic() - begun  # the load of the machine changes, and kills should hit all stages
        print(f"{killed} kills, {before} samples whole, {usual:.1f} s", flush=True)
        assert tars(out) == undisturbed, f"after {killed} kills (seed {seed})"
        assert report["encoded"] == 5 - before, "a sample was encoded again that was whole on the disk"
        assert verify(out).problems == []


def test_four_random_kills(encoded):
    kill_at_random(encoded, tars(encoded / "out"), kills=4, seed=7)


@pytest.mark.full
def test_two_hundred_random_kills(encoded):
    kill_at_random(encoded, tars(encoded / "out"), kills=200, seed=11)


# What `sbatch --signal` sends before the time is up; what Kubernetes sends. (Ctrl-C is in the test below.)
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_interrupted_it_says_how_to_go_on(encoded, number, tmp_path):
    out = encoded / "new"
    held = tmp_path / "held.py"  # however late the signal is, the models are still to be loaded
    held.write_text(
        "import time, cogprep.encode.models as models\n"
        "models.LatentEncoder = lambda *_arguments, **_options: time.sleep(600)\n"
        "from cogprep.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    process = Forked(command_line(encoded, program=held))
    assert wait_until(out.exists, process)
    os.kill(process.pid, number)
    code, _, said = process.end()
    # Python 3.11 ends by SIGINT itself, which a shell shows as 130 too, if one came during an exec().
    assert code in (128 + number, -signal.SIGINT)
    assert "run the same command again" in said and "Traceback" not in said
    finish(encoded)
    assert tars(out) == tars(encoded / "out")


def test_an_interrupt_that_a_library_drops_still_stops_the_work(encoded, tmp_path):
    """It comes while the VAE is loaded, inside a bare ``except:``."""
    dropping = tmp_path / "dropping.py"
    dropping.write_text(
        "import os, signal, cogprep.encode.models as models\n"
        "load = models.LatentEncoder\n"
        "def interrupted(*arguments, **options):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except: pass\n"
        "    return load(*arguments, **options)\n"
        "models.LatentEncoder = interrupted\n"
        "from cogprep.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    code, _, said = Forked(command_line(encoded, program=dropping)).end()
    assert code in (130, -signal.SIGINT) and "run the same command again" in said
    finish(encoded)
    assert tars(encoded / "new") == tars(encoded / "out")


@pytest.mark.parametrize("count, later", [(2, 3), (4, 2)])
def test_workers_at_once_one_killed_and_another_division_finishes(
    count, later, encoded, one_a_shard, settings_of, tmp_path
):
    """Every slice has a process; the first, which has most to do, is killed after its first shard."""
    halting = tmp_path / "halting.py"  # however late the kill is, it comes before the second shard is committed
    halting.write_text(
        "import os, time\n"
        "replace = os.replace\n"
        "def halt(source, target, **options):\n"
        "    if str(target).endswith('.parquet') and not str(target).endswith('000000.parquet'): time.sleep(600)\n"
        "    return replace(source, target, **options)\n"
        "os.replace = halt\n"
        "from cogprep.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    out, one = encoded / "new", ("--shard-samples", "1")
    first = Forked(command_line(encoded, *one, "--worker", f"1/{count}", program=halting))
    others = [start(encoded, *one, "--worker", f"{index}/{count}") for index in range(2, count + 1)]
    wait_until((out / "000000.parquet").exists, first)
    assert first.kill(), first.end()
    for worker in others:
        code, _, err = worker.end()
        assert code == 0, err
    left_by_the_killed = {number for number in range(5) if number % count == 0}
    assert {int(path.stem) for path in out.glob("*.parquet")} == {*range(5)} - left_by_the_killed | {0}
    reports = [json.loads((out / f"report-{index}-of-{count}.json").read_text()) for index in range(2, count + 1)]
    assert sum(report["encoded"] for report in reports) == 5 - len(left_by_the_killed)
    before = samples_on_disk(out)
    slices = [f"{index}/{later}" for index in range(later, 0, -1)]
    rest = [encode(settings_of(encoded, out=out, shard_samples=1, worker=worker)) for worker in slices]
    assert sum(report.encoded for report in rest) == 5 - before
    assert tars(out) == one_a_shard
    assert verify(out).problems == []


@pytest.fixture(scope="module")
def one_a_shard(encoded_once, tmp_path_factory, settings_of) -> dict[str, str]:
    """The tars of the same clips, one sample each, by one process that nothing happened to."""
    out = tmp_path_factory.mktemp("one") / "out"
    encode(settings_of(encoded_once, out=out, shard_samples=1))
    return tars(out)


def test_a_slice_that_nobody_took_is_named_and_a_twin_does_no_harm(encoded, settings_of, tmp_path):
    """The twin, a mistake, begins and ends while the first has its tar and no record yet: the report is the first's."""
    undisturbed, out = tars(encoded / "out"), encoded / "new"
    told = out / "report-1-of-3.json"
    halting = tmp_path / "halting.py"
    halting.write_text(
        "import os, time\n"
        "replace = os.replace\n"
        "def halt(source, target, **options):\n"
        "    for _ in range(30_000 * str(target).endswith('.parquet')):\n"
        f"        if os.path.exists({str(told)!r}): break\n"
        "        time.sleep(0.02)\n"
        "    return replace(source, target, **options)\n"
        "os.replace = halt\n"
        "from cogprep.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    first = Forked(command_line(encoded, "--worker", "1/3", program=halting))
    assert wait_until((out / "000000.tar").exists, first), first.end()
    twin = encode(settings_of(encoded, out=out, worker="1/3"))
    assert twin.busy == ["000000.tar"]
    twin.write(out)
    code, _, err = first.end()
    assert code == 0, err
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["000000.tar"]
    report = json.loads(told.read_text())
    assert report["unfinished"] == ["000001.tar", "000002.tar"] and report["unfinished_slices"] == ["2/3", "3/3"]
    assert encode(settings_of(encoded, out=out)).encoded == 3
    assert tars(out) == undisturbed
    assert verify(out).problems == []


def test_a_full_disk_is_one_message_and_what_was_committed_stays(encoded, tmp_path):
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "from cogprep.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    code, _, said = Forked(command_line(encoded, "--shard-samples", "5", program=limited)).end()
    assert code == 2 and "larger than files may be" in said and "Traceback" not in said
    assert not list((encoded / "new").glob("*.tar"))
    before = samples_on_disk(encoded / "new")
    assert before >= 2
    report = finish(encoded, "--shard-samples", "5")
    assert (report["encoded"], report["recovered"]) == (5 - before, before)
    assert verify(encoded / "new").problems == []
