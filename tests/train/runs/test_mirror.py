"""``--mirror s3://...``: a run's copy in a bucket (moto's server), restored where there is none; kills and faults."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bucket import faulty, files, s3_server
from forked import Forked
from safetensors.torch import load_file
from waiting import steps_made, wait_for_steps, wait_until

from cogcommon.errors import RunError, SettingError, StoreError
from cogcommon.store import store
from cogcommon.store.fsspec_store import FsspecStore
from cogcommon.store.remote_folder import open_folder
from cogtrain.distributed.signals import Stopped
from cogtrain.distributed.snapshot import STATE_FILE
from cogtrain.model import lora
from cogtrain.runs.checkpoint import find_checkpoint, list_checkpoints
from cogtrain.runs.folder import EPOCHS_FILE, MIRROR_FILE, ask_to_stop, read_run
from cogtrain.runs.mirror import restore as restoring
from cogtrain.runs.mirror.index import read_index
from cogtrain.runs.mirror.mirror import Mirror
from cogtrain.runs.mirror.restore import local_run, restore
from cogtrain.settings.training import LoraSettings

WRITES = ("pipe_file", "put_file", "rm_file", "cp_file")


class Killed(BaseException):
    """The end of a process that nobody asks."""


@pytest.fixture(scope="module", autouse=True)
def s3():
    """The address of an S3 server, which the environment names."""
    with s3_server() as url:
        yield url


@pytest.fixture
def begun(tmp_path, make_shards, train_here):
    """begun(name, after_step, ...) -> run folder, in ``tmp_path / name``."""
    make_shards(tmp_path / "out", samples=8)

    def run(name, after_step=None, **settings):
        common = {"shards": [str(tmp_path / "out")], "out": tmp_path / name, "rank": 4, "lr": 1e-2, "save_every": 2}
        before = threading.enumerate()
        try:
            return train_here(LoraSettings(**common | settings), after_step=after_step)
        finally:  # a process that ends takes its uploads with it, before another one goes on
            for thread in threading.enumerate():
                if thread.name == "cogtrain-mirror" and thread not in before:
                    thread.join(60)

    return run


def address(request):
    return f"s3://bucket/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def there(request):
    """The address of a folder of the test's own."""
    return address(request)


def index_of(there):
    return read_index(open_folder(there, "--mirror"))


def objects(there):
    fs = files(os.environ["AWS_ENDPOINT_URL"])
    bucket = there.removeprefix("s3://")
    return {name.removeprefix(bucket + "/"): fs.cat_file(name) for name in fs.find(bucket)}


def waiter(folder, there, step, checkpoint):
    """After a step the run waits until a checkpoint is in the mirror: steps as quick as these overtake uploads.

    The step before has waited until the thread that writes it has ended: the mirror is told between the two steps.
    """

    def written():
        writing = any(thread.name == "cogtrain-checkpoint" for thread in threading.enumerate())
        return not writing and (folder / checkpoint / STATE_FILE).exists()

    def after_step(made):
        if made == step - 1:
            wait_until(written, seconds=60)
        if made == step:
            wait_until(lambda: checkpoint in index_of(there).checkpoints, seconds=60)

    return after_step


def killer(folder, there, step, checkpoint):
    """After a step the process ends, once a checkpoint is in the mirror."""
    wait = waiter(folder, there, step, checkpoint)

    def after_step(made):
        wait(made)
        if made == step:
            raise Killed

    return after_step


def test_a_run_that_lost_its_machine_makes_the_same_steps_on_a_bare_one(begun, tmp_path, there, losses, capsys):
    held_out = {"validate_shards": [str(tmp_path / "out" / "000003.tar")], "validate_every": 2, "keep_best": True}
    whole = begun("whole", steps=7, keep=1, **held_out)
    with pytest.raises(Killed):
        begun("first", killer(tmp_path / "first", there, 6, "checkpoint-4"), steps=7, keep=1, mirror=there, **held_out)
    shutil.rmtree(tmp_path / "first")
    bare = begun("bare", steps=7, keep=1, mirror=there, **held_out)
    said = capsys.readouterr()
    assert f"restored checkpoint-4 from {there} into {bare}" in said.err and "continues" in said.out
    assert losses(bare) == losses(whole)
    assert [line.val_loss for line in read_run(bare).validations] == [
        line.val_loss for line in read_run(whole).validations
    ]
    # All of it is there, nothing else, and nothing that opens the bucket.
    index, found = index_of(there), objects(there)
    assert index.names == sorted({f"checkpoint-{index.best}", "checkpoint-7"})
    files = {f"{name}/{file}" for name in index.names for file in index.checkpoints[name]}
    assert set(found) == files | set(index.files) | {MIRROR_FILE}
    assert {lora.FILE, "config.toml", "report.html", "README.md", "metrics.jsonl", "facts.json"} < set(index.files)
    assert all((bare / name).read_bytes() == found[name] for name in files | set(index.files))
    local = b"".join(path.read_bytes() for path in bare.rglob("*") if path.is_file())
    assert not any(b"SECRETKEY" in text for text in (local, *found.values(), str(said).encode()))


def test_a_kill_at_any_request_leaves_a_whole_checkpoint(begun, tmp_path, there, monkeypatch):
    run = begun("run", steps=4, keep=2)
    older, newer = (find_checkpoint(path) for path in list_checkpoints(run))
    call, left = FsspecStore._call, [10**9]

    def killing(self, name, *args, **options):
        if name in WRITES:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return call(self, name, *args, **options)

    monkeypatch.setattr(FsspecStore, "_call", killing)
    seen = []
    for number in range(100):
        place, folder = f"{there}/{number}", tmp_path / str(number)
        shutil.copytree(run, folder)
        (folder / newer.folder.name).rename(tmp_path / "newer")
        mirror = Mirror(folder, place, keep=1, done=2, say=print)
        mirror.finish()
        (tmp_path / "newer").rename(folder / newer.folder.name)
        left[0] = number
        killed = False
        try:
            mirror._upload(None)
        except Killed:
            killed = True
        left[0] = 10**9
        restore(tmp_path / f"bare-{number}", place)
        (found,) = list_checkpoints(tmp_path / f"bare-{number}")
        expected = older if found.name == older.folder.name else newer
        assert find_checkpoint(found).digest == expected.digest
        seen.append(found.name)
        # The same process, begun again, leaves nothing but what the index names.
        Mirror(folder, place, keep=1, done=4, say=print).finish()
        index = index_of(place)
        assert index.names == [newer.folder.name]
        files = {f"{newer.folder.name}/{file}" for file in index.checkpoints[newer.folder.name]}
        assert set(objects(place)) == files | set(index.files) | {MIRROR_FILE}
        if not killed:
            break
    assert seen == sorted(seen) and {"checkpoint-2", "checkpoint-4"} == set(seen) and len(seen) > 6


def test_a_store_that_fails_for_a_moment_or_for_good_does_not_stop_training(begun, there, s3, tmp_path, losses, capsys):
    whole, failed = begun("whole", steps=5), set()

    def once(handler):
        """Each object is refused once, and is asked for again."""
        if handler.command in ("PUT", "DELETE", "POST") and handler.name not in failed:
            failed.add(handler.name)
            return handler.answer(500, b"<Error><Code>InternalError</Code><Message>We erred</Message></Error>")
        return None

    def refused(handler):
        if handler.command == "PUT" and not handler.name.endswith(MIRROR_FILE):
            return handler.answer(403, b"<Error><Code>AccessDenied</Code><Message>No more</Message></Error>")
        return None

    with faulty(s3, tmp_path) as server:
        server.wrong = once
        run = begun("run", waiter(tmp_path / "run", there, 4, "checkpoint-2"), steps=4, mirror=there)
        assert len(failed) > 8 and index_of(there).names == ["checkpoint-2", "checkpoint-4"]
        assert sum(store.FAULTS.counts.values()) == len(failed)
        server.wrong = refused
        with pytest.raises(StoreError, match=r"the end of the run is not in the mirror: .*refuses") as caught:
            begun("run", steps=5, mirror=there)
    assert "the same command uploads what is missing" in caught.value.fix
    said = capsys.readouterr()
    assert "note: the mirror is behind" in said.out and "SECRETKEY" not in str(said) and "Signature" not in str(said)
    assert losses(run) == losses(whole) and read_run(run).facts.exported == 5
    assert index_of(there).names[-1] == "checkpoint-4"
    begun("run", steps=5, mirror=there)
    assert index_of(there).names[-1] == "checkpoint-5"
    assert hashlib.sha256((run / lora.FILE).read_bytes()).hexdigest() == index_of(there).files[lora.FILE]


@pytest.mark.full
def test_a_store_that_is_slower_than_the_steps(begun, there, s3, tmp_path, losses, capsys):
    """A checkpoint stays on the disk until it is uploaded; those that a newer one overtakes are left out."""
    whole, seen = begun("whole", steps=9), set()

    def slow(handler):
        if handler.command == "PUT" and "checkpoint" in handler.name:
            seen.add(handler.name.split("/")[-2])
            time.sleep(0.1)

    with faulty(s3, tmp_path) as server:
        server.wrong = slow
        run = begun("run", steps=9, save_every=1, keep=1, mirror=there)
    assert losses(run) == losses(whole) and "behind" not in capsys.readouterr().out
    assert index_of(there).names == ["checkpoint-9"] == [path.name for path in list_checkpoints(run)]
    assert len(seen) < 9


def test_a_run_that_is_asked_to_stop_waits_for_its_mirror_and_follows_on_from_there(begun, tmp_path, there, losses):
    options = {"mirror": there, "follow": True, "steps": 20}
    with pytest.raises(Stopped):
        begun("run", lambda step: ask_to_stop(tmp_path / "run") if step == 11 else None, **options)
    assert index_of(there).names[-1] == "checkpoint-11" and EPOCHS_FILE in index_of(there).files
    bare = begun("bare", **options)
    assert sorted(losses(bare)) == list(range(1, 21))
    first, second = (json.loads((tmp_path / name / EPOCHS_FILE).read_text()) for name in ("run", "bare"))
    assert second["epochs"][:2] == first["epochs"]


def test_a_run_that_is_lost_before_its_first_checkpoint_begins_anew(begun, tmp_path, there, losses):
    def kill(step):
        raise Killed

    with pytest.raises(Killed):
        begun("run", kill, steps=2, mirror=there)
    assert index_of(there).names == []
    shutil.rmtree(tmp_path / "run")
    assert sorted(losses(begun("run", steps=2, mirror=there))) == [1, 2]
    assert index_of(there).names == ["checkpoint-2"]


def test_a_mirror_is_one_runs(begun, tmp_path, there):
    run = begun("run", steps=2, mirror=there)
    for change, error in (({"mirror": "bucket/x"}, "is no address"), ({"out": None}, "its folder is not named")):
        with pytest.raises(SettingError, match=error):
            begun("run", steps=2, **{"mirror": there} | change)
    with pytest.raises(RunError, match="another run is mirrored there"):
        begun("another", steps=2, mirror=there, resume="never")
    begun("third", steps=2)
    with pytest.raises(RunError, match="the mirror is of another run"):
        begun("third", steps=3, mirror=there)
    open_folder(f"{there}/sub", "--mirror").put("mine.txt", b"mine")
    with pytest.raises(RunError, match="no run has put there"):
        begun("third", steps=3, mirror=f"{there}/sub")
    # Of two processes that go on with one run, the one that began later has the mirror.
    first = Mirror(run, there, keep=3, done=2, say=print)
    shutil.copytree(run, tmp_path / "elsewhere")
    second = Mirror(tmp_path / "elsewhere", there, keep=3, done=2, say=print)
    (run / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(StoreError, match="another process has taken the mirror over"):
        first.finish()
    second.finish()
    for mirror in (first, second):
        mirror.close(None, None, None)


def test_a_checkpoint_that_was_changed_in_the_bucket_is_not_taken(begun, tmp_path, there, capsys):
    begun("run", waiter(tmp_path / "run", there, 4, "checkpoint-2"), steps=4, mirror=there)
    remote = open_folder(there, "--mirror")
    remote.put("checkpoint-4/weights.safetensors", b"other")
    restore(tmp_path / "bare", there)
    assert [path.name for path in list_checkpoints(tmp_path / "bare")] == ["checkpoint-2"]
    assert "checkpoint-4 of the mirror is not whole: a file is not what was uploaded" in capsys.readouterr().err
    remote.remove("checkpoint-2/weights.safetensors")
    with pytest.raises(RunError, match="not what was uploaded"):
        restore(tmp_path / "other", there)
    remote.put(MIRROR_FILE, b'{"schema": 1, "run": "r", "holder": "h", "files": {"../../a": "b"}}')
    with pytest.raises(RunError, match="index is damaged"):
        restore(tmp_path / "third", there)


def test_a_damaged_best_checkpoint_does_not_keep_the_newest_away(begun, tmp_path, there, capsys):
    begun("run", waiter(tmp_path / "run", there, 4, "checkpoint-2"), steps=4, mirror=there)
    remote = open_folder(there, "--mirror")
    remote.put(MIRROR_FILE, dataclasses.replace(index_of(there), best=2).to_json())
    remote.put("checkpoint-2/weights.safetensors", b"other")
    restore(tmp_path / "bare", there)
    assert [path.name for path in list_checkpoints(tmp_path / "bare")] == ["checkpoint-4"]
    assert "checkpoint-2 of the mirror is not whole" in capsys.readouterr().err


def test_a_job_that_comes_back_takes_what_others_have_mirrored(begun, tmp_path, there, monkeypatch, capsys):
    """Requeued: first here, then on another machine, then here again, where the folder is older than the mirror."""
    here = begun("run", steps=2, mirror=there)
    begun("elsewhere", steps=4, mirror=there)
    monkeypatch.setattr("cogtrain.runs.resuming.own_folder", lambda *_: here)
    begun("run", steps=5, mirror=there)
    assert f"restored checkpoint-4 from {there} into {here}" in capsys.readouterr().err
    assert index_of(there).names[-1] == "checkpoint-5" and "checkpoint-4" in index_of(there).names


def test_hosts_that_restore_into_one_folder_do_so_one_after_another(begun, tmp_path, there, monkeypatch):
    """What starts a run's processes looks at the run first, on each host, in a folder that all share."""
    begun("run", steps=2, mirror=there)
    fetch, fetched, meeting = restoring._fetch_checkpoint, [], threading.Barrier(2)
    monkeypatch.setattr(restoring, "read_index", lambda remote: (read_index(remote), meeting.wait(60))[0])

    def slowly(*arguments):
        fetched.append(arguments[1])
        time.sleep(0.7)
        fetch(*arguments)

    monkeypatch.setattr(restoring, "_fetch_checkpoint", slowly)
    with ThreadPoolExecutor(2) as hosts:
        list(hosts.map(lambda _: restore(tmp_path / "shared", there), range(2)))
    assert fetched == ["checkpoint-2"]
    assert [path.name for path in list_checkpoints(tmp_path / "shared")] == fetched


def test_a_runs_own_folder_is_not_made_older_from_its_mirror(begun, tmp_path, there, monkeypatch, capsys):
    """Named by its address, from the folder above: the run has gone on since, or goes on at this moment."""
    name = f"runs/{there.rpartition('/')[2]}"
    home = begun(name, steps=2, mirror=there)
    monkeypatch.chdir(tmp_path)

    def brought():
        folder = local_run(Path(there))
        return {file: (folder / file).read_bytes() for file in ("metrics.jsonl", lora.FILE)}

    def after_step(step):  # it trains, and holds the folder
        if step == 3:
            before = (home / lora.FILE).read_bytes()
            assert brought()[lora.FILE] == before

    begun(name, after_step, steps=4)
    newer = {file: (home / file).read_bytes() for file in ("metrics.jsonl", lora.FILE)}
    assert len(newer["metrics.jsonl"].splitlines()) == 4
    assert brought() == newer
    assert "is the run's own folder, and no older than" in capsys.readouterr().err
    # Elsewhere it has gone on further, and a copy follows its mirror.
    copy = tmp_path / "elsewhere" / name
    monkeypatch.chdir((copy.parents[1]).mkdir(parents=True) or copy.parents[1])
    older = brought()
    begun(name, steps=5, mirror=there)
    assert brought() != older and brought()["metrics.jsonl"] == (home / "metrics.jsonl").read_bytes()
    begun(str(copy.relative_to(tmp_path)), steps=6, mirror=there)  # which makes it the run's home
    kept = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(kept + b"\n")
    assert brought()["metrics.jsonl"] == kept + b"\n"


def test_a_run_is_exported_from_its_mirror(begun, tmp_path, there, monkeypatch, capsys):
    from cogtrain.commands import export
    from cogtrain.settings.results import ExportSettings

    run = begun("run", waiter(tmp_path / "run", there, 4, "checkpoint-2"), steps=4, mirror=there)
    for place in ("elsewhere", "taken"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    name = there.rpartition("/")[2]
    for named, step in ((there, 4), (f"{there}/checkpoint-2", 2)):
        export.run(ExportSettings(run=Path(named)))
        assert f"step {step}" in capsys.readouterr().out
    exported = tmp_path / "elsewhere" / "runs" / name / "exported" / "diffusers" / lora.FILE
    assert load_file(exported).keys() == load_file(run / lora.FILE).keys()
    assert all((tensor == load_file(run / lora.FILE)[key]).all() for key, tensor in load_file(exported).items())
    monkeypatch.chdir(tmp_path / "taken")
    (tmp_path / "taken" / "runs" / name).mkdir(parents=True)
    (tmp_path / "taken" / "runs" / name / "mine.txt").write_text("mine")
    for named, says in ((there, "holds something else"), (f"{there}/checkpoint-9", "there are checkpoint-2, "),
                        ("s3://bucket/nothing", "no run is mirrored there")):  # fmt: skip
        with pytest.raises(RunError, match=says):
            export.run(ExportSettings(run=Path(named)))


@pytest.mark.full
def test_from_a_bucket_that_is_being_filled_into_a_bucket(begun, tmp_path, there, s3, losses, capsys):
    """Shards that come to one folder of a bucket, and a run that follows them and is lost, in another."""
    fs, shards = files(s3), f"{there}-shards"

    def come(number):
        for name in ("empty_caption.safetensors", f"{number:06d}.tar", f"{number:06d}.parquet"):
            fs.put(str(tmp_path / "out" / name), f"{shards.removeprefix('s3://')}/{name}")

    def whole(step):
        if step in (1, 4):
            come({1: 1, 4: 2}[step])

    def lost(step):
        whole(step)
        killer(tmp_path / "first", there, 10, "checkpoint-8")(step)

    options = {"shards": [f"{shards}/"], "follow": True, "steps": 14}
    come(0)
    expected = losses(begun("whole", whole, **options))
    assert "epoch 2 (from step 7): 6 samples in 3 shards, 2 new since epoch 1" in capsys.readouterr().out
    fs.rm(shards.removeprefix("s3://"), recursive=True)
    come(0)
    with pytest.raises(Killed):
        begun("first", lost, mirror=there, **options)
    come(3)
    shutil.rmtree(tmp_path / "first")
    found = losses(begun("bare", mirror=there, **options))
    assert sorted(found) == list(range(1, 15))
    assert {step: found[step] for step in range(1, 13)} == {step: expected[step] for step in range(1, 13)}
    assert "epoch 3 (from step 13): 8 samples in 4 shards, 2 new since epoch 2" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("number", range(6))
def test_processes_killed_anywhere_lose_their_disks_each_time(begun, tmp_path, there, losses, number):
    """Each goes on in an empty folder, on one process or two; the numbers are those of a run that nothing met."""
    whole, rng = begun("whole", steps=12, batch_size=2), random.Random(number)
    words = ["cogtrain", "lora", "--shards", "out", "--rank", 4, "--lr", 1e-2, "--save-every", 2, "--steps", 12]
    Forked(["cogtrain", "--version"]).end()
    for attempt in range(4):
        on = ["--nproc", 2] if (attempt + number) % 2 else ["--batch-size", 2]
        process = Forked([*words, *on, "--out", f"run-{attempt}", "--mirror", there], tmp_path, dict(os.environ))
        run = tmp_path / f"run-{attempt}"
        wait_for_steps(run, 1, process)
        wait_for_steps(run, steps_made(run) + rng.randint(1, 4), process)
        time.sleep(rng.random() * 0.3)
        print("killed" if process.lose() else "it had ended", index_of(there).names)
        if attempt % 2:
            shutil.rmtree(tmp_path / f"run-{attempt}")
    code, out, err = Forked(
        [*words, "--batch-size", 2, "--out", "last", "--mirror", there], tmp_path, dict(os.environ)
    ).end()
    assert code == 0, (out, err)
    assert losses(tmp_path / "last") == pytest.approx(losses(whole), rel=1e-5)
    assert (tmp_path / "last" / lora.FILE).read_bytes() == objects(there)[lora.FILE]
