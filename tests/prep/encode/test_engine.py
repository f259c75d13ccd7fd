"""Clips that the device still works on: bounded in number, and written in planned order."""

from __future__ import annotations

import gc
import hashlib
import weakref
from dataclasses import replace

import pytest

import cogprep.encode.models
from cogcommon.model.checkpoint import open_checkpoint
from cogprep.commands.encode import encode
from cogprep.dataset.surveyed import decode_as_surveyed
from cogprep.encode import decoding, pipeline
from cogprep.encode.models import Models
from cogprep.processes.pool import WORKER_BYTES, Pool
from cogprep.store.locks import ShardBusy
from cogprep.vae.encoder import LatentEncoder
from cogprep.vae.gpu_time import Span


class Stop(Exception):
    pass


class Event:
    """A GPU's event that has passed when somebody waited for it, or when a later clip says so."""

    def __init__(self, ms: float) -> None:
        self.ms, self.passed = ms, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: Event) -> float:
        return end.ms - self.ms


class Ahead(LatentEncoder):
    """The real encoder, made to look like a GPU: a clip takes 90 ms, one begins every 100 ms."""

    most = 0

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.ends: list[Event] = []

    def start(self, key, frames_FHWC, image_HWC):
        pending = super().start(key, frames_FHWC, image_HWC)
        begin = 100.0 * len(self.ends)
        self.ends.append(Event(begin + 90))
        if len(self.ends) == 3:  # the first two are done before anybody waits for them
            self.ends[0].passed = self.ends[1].passed = True
        Ahead.most = max(Ahead.most, sum(not end.passed for end in self.ends))
        return replace(pending, span=Span(Event(begin), self.ends[-1], True))


def test_a_device_that_works_ahead_gives_the_same_shards(encoded_once, settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(cogprep.encode.models, "LatentEncoder", Ahead)
    report = encode(settings_of(encoded_once, out=tmp_path / "out"))
    assert report.encoded == 5 and Ahead.most == 3  # two in flight, and the one that has just begun
    assert report.gpu_busy == 0.9184  # 5 * 90 / (5 * 90 + 4 * 10)
    for tar in sorted((encoded_once / "out").glob("*.tar")):
        digests = {
            hashlib.sha256((folder / tar.name).read_bytes()).hexdigest() for folder in (tar.parent, tmp_path / "out")
        }
        assert len(digests) == 1, tar.name


def test_the_first_clips_are_decoded_while_the_models_are_loaded(encoded_once, settings_of, tmp_path, monkeypatch):
    begin, embed, begun = Pool.begin, Models.embed_captions, []

    def noting(pool, function, arguments):
        task = begin(pool, function, arguments)
        begun.extend([task] * (function is decode_as_surveyed))
        return task

    def waiting(models, *given):
        assert len(begun) == 4  # of five: two a process
        assert all(task.done.wait(60) for task in begun)
        return embed(models, *given)

    monkeypatch.setattr(Pool, "begin", noting)
    monkeypatch.setattr(Models, "embed_captions", waiting)
    report = encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert report.encoded == len(begun) == 5


@pytest.mark.parametrize(("left", "begun"), [(-(1 << 30), 0), (WORKER_BYTES, 0), (2 * WORKER_BYTES, 1), (1 << 40, 4)])
def test_no_more_are_begun_than_memory_holds_beside_t5(encoded_once, settings_of, tmp_path, monkeypatch, left, begun):
    checkpoint, begin, seen = open_checkpoint("tiny"), Pool.begin, []

    def counting(pool, function, arguments):
        seen.extend([True] * (function is decode_as_surveyed))
        return begin(pool, function, arguments)

    def stop(*_given):
        raise Stop

    monkeypatch.setattr(Pool, "begin", counting)
    monkeypatch.setattr(decoding, "free_host_memory", lambda: checkpoint.bytes_of("text_encoder") + left)
    monkeypatch.setattr(Models, "embed_captions", stop)
    with pytest.raises(Stop):
        encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert len(seen) == begun


def test_what_was_begun_for_a_shard_that_somebody_else_encodes_goes(encoded_once, settings_of, tmp_path, monkeypatch):
    begin, open_writer, begun, alive = Pool.begin, pipeline.open_writer, [], []

    def noting(pool, function, arguments):
        task = begin(pool, function, arguments)
        begun.extend([weakref.ref(task)] * (function is decode_as_surveyed))
        return task

    def busy(folder, number, *given, **options):
        if number == 0:
            raise ShardBusy("another process writes it")
        return open_writer(folder, number, *given, **options)

    class Looking(LatentEncoder):
        def start(self, *given):
            gc.collect()
            alive.append([task() is not None for task in begun[:4]])
            return super().start(*given)

    monkeypatch.setattr(Pool, "begin", noting)
    monkeypatch.setattr(pipeline, "open_writer", busy)
    monkeypatch.setattr(cogprep.encode.models, "LatentEncoder", Looking)
    report = encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert report.encoded == 3 and report.busy
    assert alive[0][:2] == [False, False] and alive[0][3]
