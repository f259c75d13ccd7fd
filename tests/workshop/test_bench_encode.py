"""The benchmark on a tiny size: real clips, a real checkpoint, real measurements, and the table of them."""

from __future__ import annotations

import json
import time

import pytest

from cogprep.commands.encode import encode
from cogprep.settings.encode import EncodeSettings
from workshop.bench_encode.__main__ import Bench
from workshop.bench_encode.make import glide, make_checkpoint, make_data_set
from workshop.bench_encode.pipeline import serial
from workshop.bench_encode.shape import SHAPES, Folder
from workshop.bench_encode.table import table
from workshop.bench_encode.vae import measure

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("bench"))
    make_checkpoint(folder.model, TINY, 1)
    make_data_set(folder.clips, TINY, 2)
    return folder


def test_what_it_makes_is_encoded_and_measured(folder):
    assert list(measure(folder, TINY, "exact")) == [] and folder.exact.exists()
    rows = [row for lever in ("diffusers, tiled", "diffusers, whole frames") for row in measure(folder, TINY, lever, 1)]
    assert [0 < row["error"] < 0.03 and row["s"] > 0 for row in rows] == [True, True]  # bf16 against fp32

    report = encode(
        EncodeSettings(
            data_root=folder.clips,
            out=folder.shards,
            model=str(folder.model),
            resolution=[TINY.resolution],
            shard_samples=2,
            workers=1,
        )
    )
    assert report.encoded == 4 and not report.rejected  # each of two clips under two captions
    loop = serial(folder, TINY, 1)
    assert loop["clips_per_minute"] == pytest.approx(60 / sum(loop["s_a_clip"].values()))

    text = table([*rows, {"encode": json.loads(report.to_json())}, json.loads(json.dumps(loop))])
    assert text.count("| diffusers, ") == 2 and "| cogprep encode" in text and "| ratio |" in text


def test_clips_move_and_differ():
    one, other = glide(0, 4, 64, 96), glide(1, 4, 64, 96)
    assert one.shape == (4, 64, 96, 3) and (one[0] != one[3]).mean() > 0.5 and (one != other).mean() > 0.5


def test_a_part_that_fails_or_hangs_leaves_its_last_line(tmp_path):
    (tmp_path / "boom.py").write_text("print('{\"a\": 1}'); raise SystemExit('out of memory')")
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    with (tmp_path / "log.txt").open("w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        bench = Bench(Folder(tmp_path), time.monotonic() + 100, log)
        assert not bench.finish(bench.start("boom"), 60)
        assert not bench.finish(bench.start("slow"), 3)
    said = (tmp_path / "log.txt").read_text()
    assert "boom: failed (1)" in said and "; out of memory" in said and "slow: failed (124)" in said
    assert bench.results == [{"a": 1}]
