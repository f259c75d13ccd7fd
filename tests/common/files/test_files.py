import os
import pathlib

import pytest

from cogcommon.files.atomic import commit_bytes


@pytest.mark.parametrize(("module", "call"), [(os, "fsync"), (pathlib.Path, "replace")])
def test_a_failed_commit_leaves_the_old_file(tmp_path, monkeypatch, module, call):
    path = tmp_path / "a.json"
    commit_bytes(path, b"old")

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, call, fail)
    with pytest.raises(OSError, match="No space"):
        commit_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_first_of_two_exclusive_writers_wins(tmp_path):
    path = tmp_path / "a.json"
    assert commit_bytes(path, b"first", exclusive=True)
    assert not commit_bytes(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
