"""Each stage reads a file once: on a network disk that is what one waits for. The system counts the bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogcommon.media.video import write_mp4
from cogcommon.model.families import Resolution
from cogprep.dataset.probe import Look, Probed, look_at, probe_clips
from cogprep.dataset.surveyed import decode_as_surveyed
from cogprep.plan.survey import hash_image
from cogprep.processes import pool
from cogprep.show.source_view import SourceView, view_source
from cogprep.source import source_file
from cogprep.source.clip import ClipFault
from cogprep.source.source_file import Source
from cogprep.video.cut import Cut
from cogprep.video.decode import Clip, Picture, look_at_picture

SIZE = Resolution(9, 64, 96)
IO = Path("/proc/thread-self/io")  # of this thread: others may read as they like


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Noise, so that a second is 2 MB."""
    noise = np.random.default_rng(0).integers(0, 255, (18, 240, 320, 3), np.uint8)
    path = tmp_path_factory.mktemp("noise") / "a.mp4"
    write_mp4(path, noise, 16, crf=1, preset="ultrafast")
    return path


def bytes_read(stage: Callable[[], Any]) -> tuple[int, Any]:
    """What all read calls of this thread brought while a stage ran, and its result."""

    def count() -> int:
        return int(IO.read_text().split()[1])

    stage()  # imports what it needs, which is reading too
    before = count()
    own = count() - before
    before = count()
    result = stage()
    return count() - before - own, result


@pytest.mark.skipif(not IO.exists(), reason="the system does not count read calls")
@pytest.mark.parametrize("held", [True, False], ids=["in memory", "too large for memory"])
def test_every_stage_reads_a_file_once(clip, held, monkeypatch):
    if not held:
        monkeypatch.setattr(source_file, "IN_MEMORY", 0)
        monkeypatch.setattr(source_file, "_GAP", 1 << 17)
    size = clip.stat().st_size
    most = (1 if held else 1.15) * size + 4096  # FFmpeg reads the first packets, and the index, of a large one again
    read, found = bytes_read(lambda: probe_clips([clip], [SIZE], Cut(), 8)[0])
    assert isinstance(found, Probed)
    assert size <= read <= most
    read, seen = bytes_read(lambda: look_at([clip], [SIZE], Cut(), 8)[0])
    assert isinstance(seen, Look)
    assert size <= read <= most * (1 if held else 1.5), "of a large one, the key frames that are looked at too"
    cut = Cut(frames="even")
    read, decoded = bytes_read(lambda: decode_as_surveyed(found.clip, b"", clip, SIZE, cut, 8, "key"))
    assert isinstance(decoded, Clip)
    assert size <= read <= most * (1 if held else 2), "a large one is demuxed for its times, then decoded"
    read, view = bytes_read(lambda: view_source(clip, found.clip.sha256, SIZE, cut, 8, "key", 1))
    assert isinstance(view, SourceView)
    if held:
        assert read <= most


@pytest.mark.skipif(not IO.exists(), reason="the system does not count read calls")
@pytest.mark.parametrize("held", [True, False], ids=["in memory", "too large for memory"])
def test_a_part_reads_its_file_once_and_of_a_large_one_its_own_pictures(clip, held, monkeypatch):
    if not held:
        monkeypatch.setattr(source_file, "IN_MEMORY", 0)
        monkeypatch.setattr(source_file, "_GAP", 1 << 17)
    size = clip.stat().st_size
    part = Path(f"{clip}#t=0,0.25")
    cut = Cut(short="repeat")  # it has 4 frames
    probe_clips([part], [SIZE], cut, 8)  # goes through the whole file, which is remembered
    read, found = bytes_read(lambda: probe_clips([part], [SIZE], cut, 8)[0])
    assert isinstance(found, Probed)
    assert read <= size + 4096 if held else read < size / 2
    read, decoded = bytes_read(lambda: decode_as_surveyed(found.clip, b"", part, SIZE, cut, 8, "key"))
    assert isinstance(decoded, Clip)
    assert read <= size + 4096 if held else read < size / 2
    read, view = bytes_read(lambda: view_source(part, found.clip.sha256, SIZE, cut, 8, "key", 1))
    assert isinstance(view, SourceView)
    assert read <= (1 if held else 2) * size + 4096


@pytest.mark.skipif(not IO.exists(), reason="the system does not count read calls")
@pytest.mark.parametrize("stage", [probe_clips, look_at])
def test_parts_of_a_file_are_found_out_from_one_reading(clip, stage):
    """One that cannot be used, and another file between them, take nothing from the others."""
    parts = [Path(f"{clip}{part}") for part in ("#t=0,0.25", "#t=77", "#t=2,1", "#t=0.25,0.5", "#t=0.5")]
    cut = Cut(short="repeat")
    read, found = bytes_read(lambda: stage(parts, [SIZE], cut, 8))
    assert [type(one) is ClipFault for one in found] == [False, True, True, False, False]
    assert read <= clip.stat().st_size + 4096
    gone = clip.with_name("gone.mp4")
    mixed = stage([parts[0], gone, clip, *parts[3:]], [SIZE], cut, 8)
    assert [*mixed[:1], *mixed[3:]] == [found[0], *found[3:]]
    assert mixed[2] == stage([clip], [SIZE], cut, 8)[0] and "missing" in mixed[1].reason


@pytest.mark.skipif(not IO.exists(), reason="the system does not count read calls")
def test_a_first_frame_is_read_once(clip, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (400, 600, 3), np.uint8)).save(path)
    size, surveyed = path.stat().st_size, probe_clips([clip], [SIZE], Cut(), 8)[0].clip
    digest = hashlib.sha256(path.read_bytes()).digest()
    for stage, result in ((hash_image, digest), (look_at_picture, (digest, Picture(600, 400, "")))):
        read, found = bytes_read(lambda stage=stage: stage(path))
        assert found == result
        assert size <= read <= size + 4096
    alone, _ = bytes_read(lambda: decode_as_surveyed(surveyed, b"", clip, SIZE, Cut(), 8, "key"))
    both, found = bytes_read(lambda: decode_as_surveyed(surveyed, digest, clip, SIZE, Cut(), 8, "key", path))
    assert isinstance(found, Clip) and found.image_HWC is not None
    assert size <= both - alone <= size + 4096


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["in memory", "too large for memory"])
def test_the_hash_is_of_the_content_however_it_is_read(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(source_file, "IN_MEMORY", limit)
    monkeypatch.setattr(source_file, "_GAP", 300)
    dice = random.Random(0)
    path = tmp_path / "a"
    for _ in range(100):
        content = dice.randbytes(dice.randrange(1, 4000))
        path.write_bytes(content)
        with Source(path, hashing=dice.random() < 0.8) as source:
            stream = source.stream()
            for _ in range(dice.randrange(12)):
                start, size = dice.randrange(len(content) + 10), dice.randrange(1500)
                stream.seek(start)
                assert stream.read(size) == content[start : start + size]
                assert stream.tell() == min(start + size, max(start, len(content)))
            assert source.sha256 == hashlib.sha256(content).digest()


def test_a_read_error_is_no_verdict(clip, monkeypatch):
    """In the middle of a large file, as when a network disk goes away."""
    surveyed = probe_clips([clip], [SIZE], Cut(), 8)[0].clip
    monkeypatch.setattr(source_file, "IN_MEMORY", 0)
    reads = iter(())

    def read(file: int, size: int, start: int) -> bytes:
        if next(reads, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.read(file, size) if os.lseek(file, start, os.SEEK_SET) == start else b""

    monkeypatch.setattr(source_file.os, "pread", read)
    reads = iter(range(10))
    seen = look_at([clip], [SIZE], Cut(), 8)[0]
    assert isinstance(seen, ClipFault) and "Input/output error" in seen.reason
    reads = iter(range(10))
    found = decode_as_surveyed(surveyed, b"", clip, SIZE, Cut(), 8, "key")
    assert isinstance(found, ClipFault) and found.passing


@pytest.mark.parametrize(("held", "workers"), [(0, 1), (1, 1), (2, 2), (10_000, 4)])
def test_workers_fit_into_memory(held, workers, monkeypatch):
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(pool, "free_host_memory", lambda: held * pool.WORKER_BYTES + 1)
    assert pool.default_workers.__wrapped__() == workers
