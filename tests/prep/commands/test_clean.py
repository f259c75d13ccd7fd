"""`clean-cache`: what goes, what stays, and when it asks."""

from __future__ import annotations

import errno
import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from waiting import wait_until

from cogcommon.errors import SettingError
from cogcommon.files.atomic import temporary_beside
from cogcommon.files.locks import open_locked
from cogcommon.shards.records import read_record, write_record
from cogprep.commands import clean_cache
from cogprep.commands.clean_cache import run
from cogprep.commands.encode import encode
from cogprep.settings.shards import CleanSettings
from cogprep.store.locks import at_work, removing
from cogprep.store.shards import ShardWriter

OF_THE_SHARDS = {"contract.json", "origin.json", "empty_caption.safetensors"}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def cleaned(out: Path, **options) -> set[str]:
    """Run with --yes; gives the names that went."""
    before = names(out)
    run(CleanSettings(out=out, **({"yes": True} | options)))
    return before - (names(out) if out.exists() else set())


def test_nothing_to_remove_asks_nothing(encoded, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    before = names(encoded)
    run(CleanSettings(out=encoded / "out"))
    run(CleanSettings(out=tmp_path / "no such folder"))
    assert names(encoded) == before and capsys.readouterr().out.count("nothing to remove") == 2


def test_half_written_and_orphaned_files_go(encoded):
    out = encoded / "out"
    dead = temporary_beside(out / "report.json").name
    for name in (".000009.tar.tmp", dead, ".000001.tar.new"):
        (out / name).write_bytes(b"half")
    shutil.copy(out / "000000.tar", out / "000008.tar")
    record = read_record(out / "000000.parquet")
    write_record(replace(record, header=replace(record.header, number=7)), out / "000007.parquet")
    live = temporary_beside(out / "contract.json")
    with open_locked(live):
        before = names(out)
        (out / "000003.tar.backup").write_bytes(b"somebody's own")
        (out / "000010.tar").write_bytes(b"somebody's own")
        (out / "000011.parquet.new").write_bytes(b"somebody's own")
        (out / f".report.json.{os.getpid()}.tmp").write_bytes(b"somebody's own")
        (out / "notes.txt").write_bytes(b"somebody's own")
        assert cleaned(out) == {".000009.tar.tmp", dead, ".000001.tar.new", "000008.tar", "000007.parquet"}
        assert live.exists() and before


def test_what_a_live_writer_holds_stays(encoded):
    out = encoded / "out"
    contract = read_record(out / "000000.parquet").header.contract
    writer = ShardWriter(out, 5, contract, ())
    assert cleaned(out) == set()
    before = names(encoded / "ds")
    assert ".000005.tar.tmp" not in cleaned(out, all=True)
    # What it writes would be worth nothing without the contract.
    assert names(out) == {".000005.tar.tmp", *OF_THE_SHARDS}
    assert names(encoded / "ds") == before
    writer.abandon()
    assert cleaned(out, all=True) == {".000005.tar.tmp", *OF_THE_SHARDS}
    assert not out.exists()


def test_a_rewrite_that_lacks_its_last_renames_is_finished_not_removed(encoded):
    out = encoded / "out"
    (out / "000000.tar").rename(out / ".000000.tar.new")
    (out / "000000.parquet").rename(out / ".000000.parquet.new")
    run(CleanSettings(out=out, dry_run=True))
    assert (out / ".000000.tar.new").exists()
    assert cleaned(out) == {".000000.tar.new", ".000000.parquet.new"}
    assert (out / "000000.tar").exists() and (out / "000000.parquet").exists()


def test_stale_samples_go_and_the_rest_of_their_shard_stays(encoded, lay_lists):
    lay_lists(encoded / "ds", ["wave number 0", "wave number 1", "changed"], ["0.mp4", "1.mp4", "2.mp4"])
    (encoded / "ds" / "1.mp4").write_bytes((encoded / "ds" / "4.mp4").read_bytes())
    out = encoded / "out"
    assert cleaned(out) == {"000001.parquet", "000001.tar", "000002.parquet", "000002.tar"}
    assert [row.caption for row in read_record(out / "000000.parquet").rows] == ["wave number 0"]


def test_what_is_stale_is_judged_by_the_settings_of_the_folder(root, run_encode, tmp_path, draw_clip):
    """A clip that only --short repeat takes, and that was touched, is read again; it is still there."""
    draw_clip(root / "2.mp4", 2, frames=4)
    assert run_encode(short="repeat").encoded == 5
    os.utime(root / "2.mp4", ns=(1, 1))
    assert cleaned(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        ("data root", "ds cannot be read (there is no such data root)"),
        ("a list", "ds have faults, videos.txt: the list is missing"),
        ("origin", "out does not say what it was encoded from"),
        ("a caption", "ds have faults, prompts.txt:1"),
        ("every clip", "none of the clips of "),
    ],
)
def test_nothing_is_stale_where_it_cannot_be_told_what_the_data_root_has(encoded, loss, why, capsys):
    if loss == "data root":
        (encoded / "ds").rename(encoded / "elsewhere")
    elif loss == "a list":
        (encoded / "ds" / "videos.txt").unlink()
    elif loss == "origin":
        (encoded / "out" / "origin.json").unlink()
    elif loss == "a caption":
        captions = encoded / "ds" / "prompts.txt"
        captions.write_text("\n".join(["", *captions.read_text().splitlines()[1:]]) + "\n")
    else:
        for clip in (encoded / "ds").glob("*.mp4"):
            clip.unlink()
    assert cleaned(encoded / "out") == set()
    said = " ".join(capsys.readouterr().out.split())
    assert "no sample is called stale: " in said and why in said


def test_all_removes_everything_derived_but_nothing_else(encoded):
    out = encoded / "out"
    (out / "notes.txt").write_text("mine")
    before = names(encoded / "ds")
    cleaned(out, all=True)
    assert names(out) == {"notes.txt"} and names(encoded / "ds") == before


def test_it_asks_and_takes_no_for_an_answer(encoded, monkeypatch):
    out = encoded / "out"
    (out / ".000008.tar.tmp").write_bytes(b"half")
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(clean_cache.sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert cleaned(out, yes=False) == set()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert cleaned(out, yes=False) == {".000008.tar.tmp"}


def test_finished_clips_in_what_is_half_written_are_told(encoded, capsys):
    """A stopped encode says that they are kept; whoever is asked whether they may go has to know of them."""
    out = encoded / "out"
    (out / "000001.parquet").unlink()  # stopped between its tar and its record
    row = read_record(out / "000000.parquet").rows[0]
    whole = (out / "000000.tar").read_bytes()[: row.size]
    (out / ".000007.tar.tmp").write_bytes(whole + b"the next one")
    (out / ".000008.tar.tmp").write_bytes(whole[:-512])
    (out / ".000009.tar.tmp").write_bytes(b"half")
    run(CleanSettings(out=out, dry_run=True))
    said = capsys.readouterr().out.splitlines()
    kept = ", with finished clips that the same `cogprep encode` takes over, "
    found = [line.partition(": ")[0] for line in said if kept in line]
    assert found == [str(out / "000001.tar"), str(out / ".000007.tar.tmp")]


def test_what_may_not_be_read_is_told_and_what_stays_is_not_listed(encoded, monkeypatch, capsys):
    out, system = encoded / "out", os.open

    def refuse(path, *more, **named):
        if Path(path) == out / "000000.tar":  # as chmod 000 has it, for whoever is not root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return system(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    gone = cleaned(out, all=True)
    said = capsys.readouterr().out
    assert names(out) == {"000000.tar", "000000.parquet", *OF_THE_SHARDS}
    assert f"no permission: {out / '000000.tar'}" in said and "in use" not in said
    assert f"removed {len(gone)} things" in said and "contract.json: " not in said


def test_what_a_run_needs_is_not_listed_while_it_lives(encoded, capsys):
    with at_work(encoded / "out"):
        gone = cleaned(encoded / "out", all=True)
    said = capsys.readouterr().out
    assert f"removed {len(gone)} things" in said and "in use" not in said and "contract.json: " not in said
    assert "kept for the shards that stay or are being written: empty_caption.safetensors" in said


def test_without_a_terminal_it_lists_and_fails(encoded, monkeypatch, capsys):
    out = encoded / "out"
    (out / ".000008.tar.tmp").write_bytes(b"half")
    monkeypatch.setattr(clean_cache.sys, "stdin", io.StringIO())
    with pytest.raises(SettingError, match="nothing was removed"):
        run(CleanSettings(out=out))
    assert ".000008.tar.tmp" in capsys.readouterr().out and (out / ".000008.tar.tmp").exists()


def test_the_data_root_itself_is_refused(encoded):
    root = encoded / "ds"
    shutil.copy(encoded / "out" / "origin.json", root / "origin.json")
    (root / "000008.tar").write_bytes(b"the user's own")
    with pytest.raises(SettingError, match="is a data root"):
        run(CleanSettings(out=root, yes=True, all=True))
    assert (root / "000008.tar").exists()


def test_somebodys_tars_are_nothing_to_remove(tmp_path, capsys):
    """A folder as other tools write it: no contract of ours, no record."""
    out = tmp_path / "F"
    (out / "val").mkdir(parents=True)
    for name in ("000000.tar", "000000.parquet", "val/000000.tar", "report.json", "index.html"):
        (out / name).write_bytes(b"mine")
    before = names(out)
    assert cleaned(out) == cleaned(out, all=True) == set() and names(out) == before
    assert "was not made by cogprep" in capsys.readouterr().out


def test_without_its_contract_no_sample_is_stale(encoded, capsys):
    (encoded / "out" / "contract.json").unlink()
    assert cleaned(encoded / "out") == set()
    assert "no sample is called stale" in (said := capsys.readouterr().out) and "how it was encoded" in said


def test_a_line_whose_file_is_away_keeps_its_sample(encoded):
    (encoded / "ds" / "1.mp4").unlink()
    assert cleaned(encoded / "out") == set()


def test_the_split_behind_a_link_is_left_alone(encoded):
    out, elsewhere = encoded / "out", encoded / "elsewhere"
    shutil.copytree(out, elsewhere)
    (out / "val").symlink_to(elsewhere)
    before = names(elsewhere)
    (encoded / "ds" / "prompts.txt").write_text("wave number 0\n")
    (encoded / "ds" / "videos.txt").write_text("0.mp4\n")
    cleaned(out)
    cleaned(out, all=True)
    assert names(elsewhere) == before and (out / "val").is_symlink()
    assert sum(len(read_record(path).rows) for path in elsewhere.glob("*.parquet")) == 5


def answer(monkeypatch, meanwhile) -> None:
    """Have the question stand while something happens, and then be answered with yes."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(clean_cache.sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda _: meanwhile() or "y")


def test_a_tar_that_gets_its_record_while_the_question_stands_stays(encoded, monkeypatch, capsys):
    out = encoded / "out"
    record = (out / "000001.parquet").read_bytes()
    (out / "000001.parquet").unlink()
    answer(monkeypatch, lambda: (out / "000001.parquet").write_bytes(record) and None)
    assert cleaned(out, yes=False) == set() and (out / "000001.parquet").exists()
    said = capsys.readouterr().out
    assert "000001.tar: a tar without a record" in said
    assert f"removed 0 things, 0 B; 1 in use or changed meanwhile, and left alone: {out / '000001.tar'}" in said


def test_a_line_that_comes_back_while_the_question_stands_keeps_its_sample(encoded, monkeypatch, lay_lists):
    root, out = encoded / "ds", encoded / "out"
    whole = (root / "prompts.txt").read_text(), (root / "videos.txt").read_text()
    lay_lists(root, ["wave number 0"], ["0.mp4"])

    def put_back() -> None:
        (root / "prompts.txt").write_text(whole[0]), (root / "videos.txt").write_text(whole[1])

    answer(monkeypatch, put_back)
    assert cleaned(out, yes=False) == set()
    assert sum(len(read_record(path).rows) for path in out.glob("*.parquet")) == 5


@pytest.mark.parametrize("everything", [False, True])
def test_what_is_written_while_the_question_stands_stays(encoded, monkeypatch, everything):
    out = encoded / "out"
    (out / ".000008.tar.tmp").write_bytes(b"half")

    def encode_more() -> None:
        for kind in ("tar", "parquet"):
            shutil.copy(out / f"000000.{kind}", out / f"new.{kind}")
            (out / f"new.{kind}").replace(out / f"000002.{kind}")
        record = read_record(out / "000002.parquet")
        write_record(replace(record, header=replace(record.header, number=2)), out / "000002.parquet")

    answer(monkeypatch, encode_more)
    cleaned(out, yes=False, all=everything)
    assert (out / "000002.tar").exists() and (out / "000002.parquet").exists() and (out / "contract.json").exists()


def test_what_tells_of_the_shards_stays_while_a_run_lives(encoded):
    out = encoded / "out"
    with at_work(out):
        assert "000000.tar" in cleaned(out, all=True)
    assert names(out) == OF_THE_SHARDS


def test_a_run_that_begins_while_the_last_files_go_waits_until_they_are_gone(encoded, settings_of):
    out = encoded / "out"
    undisturbed, begun = {path.name: path.read_bytes() for path in out.glob("*.tar")}, Event()

    def remove_everything() -> None:
        with removing(out) as busy:
            begun.set()
            assert not busy
            wait_until(lambda: any(out.glob(".encode.*.tmp")))
            time.sleep(0.3)  # a run that does not wait looks at the folder now
            for path in out.iterdir():
                if not path.name.endswith(".tmp"):
                    path.unlink()

    with ThreadPoolExecutor(1) as other:
        removal = other.submit(remove_everything)
        begun.wait()
        report = encode(settings_of(encoded))
        removal.result()
    assert (report.encoded, report.reused) == (5, 0) and (out / "contract.json").exists()
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == undisturbed


def test_the_lock_of_a_killed_removal_goes_with_the_next(encoded):
    out = encoded / "out"
    (out / ".clean-cache.guard.tmp").touch()
    assert cleaned(out) == {".clean-cache.guard.tmp"}
