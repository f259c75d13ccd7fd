"""Data-parallel groups: the global batch is divided between them, however many processes each has."""

import json

import pytest
import torch

from cogtrain.distributed.groups import DataGroups, data_groups
from cogtrain.runs.folder import read_metrics
from cogtrain.settings.training import LoraSettings


def test_every_process_is_a_group_today():
    for world in (1, 2, 8):
        groups = data_groups(world)
        assert (groups.count, groups.size) == (world, 1)
        assert [groups.of(rank) for rank in range(world)] == list(range(world))
        gathered = torch.arange(world * 3)
        assert torch.equal(groups.once(gathered), gathered)


def test_ranks_that_follow_each_other_are_one_group_and_count_once():
    groups = DataGroups(world=4, count=2)
    assert [groups.of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [groups.leads(rank) for rank in range(4)] == [True, False, True, False]
    losses = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]])  # by rank, two samples each
    assert groups.once(losses.flatten()).tolist() == [1, 2, 3, 4]
    rows = losses[:, :, None].expand(-1, -1, 5).flatten(0, 1)
    assert groups.once(rows).shape == (4, 5)


def test_two_processes_of_one_group_train_as_one_process_does(tmp_path, make_shards, run_ranks, train_here, losses):
    """Dropout in it, so that the two must also draw alike; held-out samples, so that each must count once."""
    make_shards(tmp_path / "out", samples=6)
    make_shards(tmp_path / "held", samples=3, seed=5, captions=("held",))
    given = {
        "shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "held")], "validate_every": 2, "rank": 4,
        "steps": 2, "lr": 1e-2, "lora_dropout": 0.2, "accumulate": 2, "timesteps": "stratified",
    }  # fmt: skip
    alone = train_here(LoraSettings(**given, out=tmp_path / "alone"))
    case = {"name": "run", "method": "lora", "settings": given | {"out": tmp_path / "run"}, "groups": 1}
    first, second = run_ranks(2, [case], tmp_path / "ranks")["run"]
    assert first["samples"] == second["samples"] and len(first["samples"]) == 4

    runs = [json.loads((run / "facts.json").read_text()) for run in (alone, tmp_path / "run")]
    assert [run["processes"] for run in runs] == [1, 2]
    assert [run["global_batch"] for run in runs] == [2, 2]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-6)
    held = [[line.val_loss for line in read_metrics(run / "metrics.jsonl")[1]] for run in (alone, tmp_path / "run")]
    assert len(held[0]) == 1 and held[0] == pytest.approx(held[1], rel=1e-6)
