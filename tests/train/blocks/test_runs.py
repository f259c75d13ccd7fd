"""Whole runs under each --memory: the same losses on one process and two, an export that answers alike."""

import pytest

from cogtrain.settings.training import LoraSettings

COMMON = {"rank": 4, "epochs": 1, "lr": 1e-2, "seed": 3}


def test_every_memory_setting_is_the_same_run(tmp_path, make_shards, train_here, losses):
    make_shards(tmp_path / "out", samples=4)
    found = {
        memory: losses(
            train_here(LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / memory, memory=memory, **COMMON))
        )
        for memory in ("fast", "auto", "low")
    }
    assert len(found["fast"]) == 4
    assert found["auto"] == pytest.approx(found["fast"], rel=1e-6)
    assert found["low"] == pytest.approx(found["fast"], rel=1e-6)


def test_streamed_on_two_processes(tmp_path, make_shards, run_ranks, train_here, losses):
    """DDP must neither copy nor refuse weights that live elsewhere."""
    make_shards(tmp_path / "out", samples=4)
    settings = COMMON | {"shards": [str(tmp_path / "out")], "memory": "low"}
    alone = losses(train_here(LoraSettings(**settings | {"out": tmp_path / "one", "batch_size": 2})))
    case = {"name": "two", "method": "lora", "settings": settings | {"out": tmp_path / "two"}}
    run_ranks(2, [case], tmp_path / "ranks")
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "two/pytorch_lora_weights.safetensors").is_file()
