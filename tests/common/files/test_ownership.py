"""Whose a folder or a file is, and that what is not ours stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogcommon.errors import SettingError
from cogcommon.files.ownership import (
    RECORD_FILE,
    Made,
    check_own_folder,
    remove_folder,
    replace_folder,
    seal,
    take_output,
)


def take(folder: Path) -> Made:
    return take_output(folder, "a test", "--out", "")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_a_folder_is_new_empty_or_ours(tmp_path):
    take(tmp_path / "new" / "folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"")
    take(tmp_path / "empty")
    take(tmp_path / "empty")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="did not make"):
        take(tmp_path / "theirs")
    assert names(tmp_path / "theirs") == {"notes.txt"}
    with pytest.raises(SettingError, match="holds a test"):
        take_output(tmp_path / "empty", "another", "--out")
    with pytest.raises(SettingError, match="no folder"):
        take(tmp_path / "theirs" / "notes.txt")


def test_a_new_folder_is_not_called_like_a_file(tmp_path):
    with pytest.raises(SettingError, match="the name of a file, and --out names a folder") as caught:
        take(tmp_path / "run.v2.mp4")
    assert caught.value.fix.startswith(f"--out {tmp_path / 'run.v2'},") and not names(tmp_path)
    (tmp_path / "old.mp4").mkdir()
    assert take(tmp_path / "old.mp4") and take(tmp_path / "run.v2")  # one that is there may be called anything


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt"])
def test_a_data_root_is_no_output_even_if_it_was_one(tmp_path, name):
    take(tmp_path)
    (tmp_path / name).write_text("a cat\n")
    with pytest.raises(SettingError, match=f"data root: it holds {name}"):
        check_own_folder(tmp_path, "a test", "--out")


def test_a_file_is_ours_as_long_as_it_is_as_we_made_it(tmp_path):
    made = take(tmp_path)
    made.commit_bytes("page.html", b"one")
    made.commit_bytes("page.html", b"two")
    assert take(tmp_path).owns("page.html")
    (tmp_path / "page.html").write_bytes(b"mine")
    with pytest.raises(SettingError, match="not as we made it"):
        take(tmp_path).commit_bytes("page.html", b"three")
    assert (tmp_path / "page.html").read_bytes() == b"mine"


def test_a_kill_between_the_record_and_the_file_leaves_either_ours(tmp_path, monkeypatch):
    made = take(tmp_path)
    made.commit_bytes("page.html", b"one")

    def killed(*_arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogcommon.files.ownership.commit", killed)
    with pytest.raises(KeyboardInterrupt):
        made.commit_bytes("page.html", b"two")
    monkeypatch.undo()
    again = take(tmp_path)
    assert (tmp_path / "page.html").read_bytes() == b"one" and again.owns("page.html")
    again.commit_bytes("page.html", b"two")
    assert names(tmp_path) == {"page.html", RECORD_FILE}


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{}", '{"by": "a test", "request": "", "files": []}', "[" * 10_000,
     '{"by": "a test", "request": "", "files": {"../outside": []}}',
     '{"by": "a test", "request": "", "files": {"/etc/hosts": []}}'],
)  # fmt: skip
def test_a_record_that_cannot_be_believed_is_none(tmp_path, record):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"theirs")
    (folder / RECORD_FILE).write_text(record)
    assert not remove_folder(folder, "a test") and (tmp_path / "outside").exists()
    with pytest.raises(SettingError, match="did not make"):
        take(folder)


def test_links_are_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for top in (outside, folder):
        (top / "inner").mkdir(parents=True)
        (top / "inner" / "a").write_bytes(b"same")
        (top / "b").write_bytes(b"same")
    seal(folder, "a test")
    (folder / "inner" / "a").unlink()
    (folder / "inner").rmdir()
    (folder / "inner").symlink_to(outside / "inner")
    (folder / "b").unlink()
    (folder / "b").symlink_to(outside / "b")
    assert remove_folder(folder, "a test")
    assert names(outside) == {"inner/a", "b"} and (folder / "b").is_symlink() and (folder / "inner").is_symlink()
    (tmp_path / "link").symlink_to(folder)
    assert not remove_folder(tmp_path / "link", "a test")


def test_a_folder_that_is_replaced_keeps_what_somebody_put_into_it(tmp_path):
    final = tmp_path / "final"
    for turn in ("one", "two"):
        scratch = tmp_path / "scratch"
        (scratch / "inner").mkdir(parents=True)
        (scratch / "weights").write_text(turn)
        (scratch / "inner" / "rank").write_text(turn)
        replace_folder(scratch, final, "a test")
        assert (final / "weights").read_text() == (final / "inner" / "rank").read_text() == turn
        (final / "inner" / "notes.txt").write_text("mine")
        (final / "weights").write_text(f"changed {turn}")
    assert (final / "inner" / "notes.txt").read_text() == "mine"
    assert (final / "weights-2").read_text() == "changed one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
    (final / RECORD_FILE).unlink()
    (tmp_path / "scratch").mkdir()
    with pytest.raises(SettingError, match="not as we made it"):
        replace_folder(tmp_path / "scratch", final, "a test")
    assert json.loads((tmp_path / "scratch" / RECORD_FILE).read_text())["by"] == "a test"
