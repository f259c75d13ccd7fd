"""`cogtrain lora` from shards to weights, as a user starts it."""

import json
import subprocess
import sys

from cogtrain import lora


def cogtrain(*words, cwd, ok=True, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-m", "cogtrain", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
        timeout=300,
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_steps_from_several_words(tmp_path, make_shards):
    tars = make_shards(tmp_path / "out")
    assert len(tars) == 3
    done = cogtrain("lora", "--shards", *tars, "--steps", 2, "--rank", 4, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in metrics(run))
    state = lora.load_file(run / lora.FILE)
    assert len(state) == 2 * 4 * 4  # A and B, four blocks, four layers each
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)
    assert done.stdout.splitlines()[-1].startswith("next: cogtrain generate --run runs/")


def test_full_fine_tuning(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=2)
    cogtrain("sft", "--shards", "out", "--steps", 2, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "transformer" / "config.json").exists()
