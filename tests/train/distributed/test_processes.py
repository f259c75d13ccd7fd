"""The same run on 1, 2 and 4 processes; every setting on each of them."""

import pytest

from cogtrain.runs.folder import read_run

STRATEGIES = ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


def test_one_two_and_four_processes_are_the_same_run(tmp_path, make_shards, run_ranks, losses):
    first, *_ = make_shards(tmp_path / "out", samples=20, captions_each=2, posterior="moments")
    common = {
        "shards": [str(tmp_path / "out")], "rank": 4, "epochs": 2, "lr": 1e-2, "lr_schedule": "cosine", "seed": 3,
        "timesteps": "stratified", "caption_dropout": 0.3, "warmup": 1, "captions": "one", "repeat": [f"{first}=3"],
    }  # fmt: skip
    shapes = {1: (4, 1), 2: (1, 2), 4: (1, 1)}  # world: batch size, accumulation; always 4 samples a step
    found = {}
    for world, (size, accumulate) in shapes.items():
        run = tmp_path / f"run{world}"
        settings = common | {"out": run, "batch_size": size, "accumulate": accumulate}
        ranks = run_ranks(world, [{"name": "run", "method": "lora", "settings": settings}], tmp_path / f"w{world}")[
            "run"
        ]
        found[world] = (losses(run), ranks, [line.lr for line in read_run(run).steps])
    reference, (alone,), one_rates = found[1]
    assert len(reference) == 6 and len(alone["samples"]) == 24
    assert len({noise for _, _, noise in alone["samples"]}) == 24  # also of the clip that comes three times an epoch
    assert one_rates[-1] == 0 and one_rates[0] == 1e-2  # the cosine ends at zero
    for world in (2, 4):
        others, ranks, other_rates = found[world]
        assert others == pytest.approx(reference, rel=1e-4)
        assert other_rates == one_rates
        together = [tuple(sample) for rank in ranks for sample in rank["samples"]]
        assert sorted(together) == sorted(tuple(sample) for sample in alone["samples"])
        # No two ranks ever share a timestep or a noise by accident.
        for sample in zip(*(rank["samples"] for rank in ranks), strict=True):
            assert len({noise for _, _, noise in sample}) == world
            assert len({t for _, t, _ in sample}) == world
    for step in range(6):  # stratified: each quarter of the range once a step
        drawn = [t for _, t, _ in alone["samples"][4 * step : 4 * step + 4]]
        assert sorted(t // 250 for t in drawn) == [0, 1, 2, 3]


def test_every_setting_reaches_the_live_optimizer(tmp_path, make_shards, run_ranks):
    make_shards(tmp_path / "out", samples=8)
    values = {
        "lr": 3e-3, "beta1": 0.8, "beta2": 0.7, "eps": 1e-5, "weight_decay": 0.02, "max_grad_norm": 0.25,
        "batch_size": 2, "accumulate": 2, "steps": 1, "warmup": 0,
    }  # fmt: skip
    cases = [
        {
            "name": strategy,
            "method": "sft",
            "settings": values | {"shards": [str(tmp_path / "out")], "out": tmp_path / strategy, "strategy": strategy},
        }
        for strategy in STRATEGIES
    ]
    for name, ranks in run_ranks(2, cases, tmp_path / "ranks").items():
        for rank in ranks:
            optimizer, engine = rank["optimizer"], rank["engine"]
            assert optimizer.pop("kind") == ("DeepSpeedCPUAdam" if "offload" in name else "AdamW")
            assert optimizer == {"lr": 3e-3, "betas": [0.8, 0.7], "eps": 1e-5, "weight_decay": 0.02}
            assert (engine["clip"], engine["accumulate"], engine["micro"], engine["batch"]) == (0.25, 2, 2, 8)
            assert engine["stage"] == int(name[4])
            assert ("cpu" in engine["optimizer offload"]) == ("offload" in name)
            assert ("cpu" in engine["parameter offload"]) == (name == "zero3-offload")
