"""Clips that the device still works on: bounded in number, and written in planned order."""

from __future__ import annotations

import gc
import hashlib
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cogprep.encode.models
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogprep.commands.encode import encode
from cogprep.dataset.surveyed import decode_as_surveyed
from cogprep.encode import decoding, pipeline
from cogprep.encode.clock import Clock
from cogprep.encode.models import Models
from cogprep.processes.pool import WORKER_BYTES, Pool
from cogprep.store.locks import ShardBusy
from cogprep.vae.encoder import LatentEncoder
from cogprep.vae.gpu_time import Span
from cogprep.video.cut import Cut

SOURCES = ("a.mp4", "s3://bucket/b.mp4", "c.mp4")


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


@pytest.fixture
def begun(monkeypatch):
    """Weak references to the tasks that were begun to decode a clip."""
    begin, tasks = Pool.begin, []

    def noting(pool, function, arguments):
        task = begin(pool, function, arguments)
        tasks.extend([weakref.ref(task)] * (function is decode_as_surveyed))
        return task

    monkeypatch.setattr(Pool, "begin", noting)
    return tasks


@pytest.fixture
def all_decoded(begun, monkeypatch):
    """Before the models are loaded all that was begun must be decoded; how many were begun then."""
    embed, counts = Models.embed_captions, []

    def waiting(models, *given):
        counts.append(len(begun))
        assert all(task().done.wait(60) for task in begun)
        return embed(models, *given)

    monkeypatch.setattr(Models, "embed_captions", waiting)
    return counts


def test_the_first_clips_are_decoded_while_the_models_are_loaded(
    encoded_once, settings_of, tmp_path, begun, all_decoded
):
    report = encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert all_decoded == [4] and report.encoded == len(begun) == 5  # two a process


@pytest.mark.parametrize(("left", "count"), [(-(1 << 30), 0), (WORKER_BYTES, 0), (2 * WORKER_BYTES, 1), (1 << 40, 4)])
def test_no_more_are_begun_than_memory_holds_beside_t5(
    encoded_once, settings_of, tmp_path, monkeypatch, all_decoded, left, count
):
    t5 = open_checkpoint("tiny").bytes_of("text_encoder")
    monkeypatch.setattr(Models, "text_bytes", 2 * t5)
    monkeypatch.setattr(decoding, "free_host_memory", lambda: 2 * t5 + left)
    assert encode(settings_of(encoded_once, out=tmp_path / "out", workers=2)).encoded == 5
    assert all_decoded == [count]


@pytest.mark.parametrize(("there", "count"), [(4, 2), (3, 1), (2, 0)])
def test_each_of_several_gpus_of_a_host_takes_its_part_of_the_memory(
    encoded_once, settings_of, tmp_path, monkeypatch, all_decoded, there, count
):
    """T5 is loaded by each of them, too."""
    t5 = 4 * WORKER_BYTES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(Models, "text_bytes", t5)
    monkeypatch.setattr(decoding, "free_host_memory", lambda: 8 * (t5 + (there - 1) * WORKER_BYTES))
    encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert all_decoded == [count]


def test_t5_takes_more_than_its_files_where_it_computes_in_four_bytes(encoded_once, settings_of):
    checkpoint, settings = open_checkpoint("tiny"), settings_of(encoded_once)
    takes = [Models(checkpoint, torch.device("cpu"), p, settings, Clock()).text_bytes for p in ("bf16", "fp32")]
    assert takes == [checkpoint.bytes_of("text_encoder"), 2 * checkpoint.bytes_of("text_encoder")]


def test_a_clip_behind_an_address_is_fetched_by_who_has_patience(begun):
    """And what comes after it, in the plan's order."""
    planned = [SimpleNamespace(key=source, sample=SimpleNamespace(source=source, image="")) for source in SOURCES]
    shard = SimpleNamespace(samples=planned, bucket=Resolution.parse("9x64x96"))
    nobody = SimpleNamespace(workers=8, begin=lambda *_: begun.append(0))
    ahead = decoding.Decoding(Path("root"), Cut(), 8, nobody)
    ahead._arguments = lambda planned: ()
    ahead.begin([shard], 0)
    assert len(begun) == 1


def test_what_was_begun_for_a_shard_that_somebody_else_encodes_goes(
    encoded_once, settings_of, tmp_path, monkeypatch, begun, all_decoded
):
    open_writer, alive = pipeline.open_writer, []

    def busy(folder, number, *given, **options):
        if number == 0:
            raise ShardBusy("another process writes it")
        return open_writer(folder, number, *given, **options)

    class Looking(LatentEncoder):
        def start(self, *given):
            gc.collect()
            alive.append([task() is not None for task in begun[:4]])
            return super().start(*given)

    monkeypatch.setattr(pipeline, "open_writer", busy)
    monkeypatch.setattr(cogprep.encode.models, "LatentEncoder", Looking)
    report = encode(settings_of(encoded_once, out=tmp_path / "out", workers=2))
    assert report.encoded == 3 and report.busy and all_decoded == [4]
    assert alive[0][:2] == [False, False] and alive[0][3]
