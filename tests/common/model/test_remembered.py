"""What is kept of weight files (`remembered`): found out once, and anew after any change."""

import os

import pytest
from waiting import wait_until

from cogcommon.errors import ModelError
from cogcommon.model import checkpoint as checkpoints
from cogcommon.model import remembered, weights
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.remembered import Remembered
from cogcommon.model.tiny import builtin_folder

PART = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A local checkpoint whose files are not too young to be remembered, in a cache of its own."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(builtin_folder("random-tiny"), folder)
    monkeypatch.setenv("COGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_YOUNG_NS", 0)
    return open_checkpoint(str(folder))


def counted(monkeypatch, module, name):
    calls = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or real(*given))
    return calls


def test_weights_are_hashed_once_and_again_when_they_change(model, monkeypatch):
    hashed = counted(monkeypatch, checkpoints, "_sha256")
    first = model.identity("transformer")
    assert (model.identity("transformer"), len(hashed)) == (first, 1)
    file = model.root / PART
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1

    def change():
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a tool that keeps times would leave it
        return file.stat().st_ctime_ns != times.st_ctime_ns

    wait_until(change)  # within a tick of the file system's clock nothing could tell
    other = model.identity("transformer")
    assert other.weights_sha256 != first.weights_sha256 and len(hashed) == 2


def test_a_part_that_was_whole_is_looked_at_again_when_a_file_changes(model, monkeypatch):
    looked = counted(monkeypatch, weights, "_check")
    model.check_weights("transformer")
    model.check_weights("transformer")
    assert len(looked) == 1
    (model.root / PART).write_bytes(b"\0" * 100)
    for _ in range(2):  # a fault is never kept
        with pytest.raises(ModelError):
            model.check_weights("transformer")
    assert len(looked) == 3


def test_a_file_that_is_still_young_is_not_remembered(model, monkeypatch):
    monkeypatch.setattr(remembered, "_YOUNG_NS", 3_600_000_000_000)
    answers = iter("ab")
    file = model.root / PART
    assert [Remembered(file.parent).recall("it", [file], lambda: next(answers)) for _ in range(2)] == ["a", "b"]


def test_what_another_process_finds_out_meanwhile_is_kept_too(model):
    file = model.root / PART

    def slowly():
        assert Remembered(file.parent).recall("other", [file], lambda: "theirs") == "theirs"
        return "ours"

    assert Remembered(file.parent).recall("it", [file], slowly) == "ours"
    kept = Remembered(file.parent)
    assert [kept.recall(what, [file], lambda: "again") for what in ("it", "other")] == ["ours", "theirs"]


def test_a_cache_that_cannot_be_written_costs_only_time(model, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    answers = iter("ab")
    file = model.root / PART
    assert [Remembered(file.parent).recall("it", [file], lambda: next(answers)) for _ in range(2)] == ["a", "b"]


def test_damage_in_the_cache_is_passed_over(model):
    file = model.root / PART
    kept = Remembered(file.parent)
    assert kept.recall("it", [file], lambda: "found") == "found"
    kept._file.path.write_text('{"folder": 3')
    assert Remembered(file.parent).recall("it", [file], lambda: "again") == "again"
