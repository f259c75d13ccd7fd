"""What ``--json`` of a training prints: one object on stdout, and nothing else there."""

import json
import os
import signal

from forked import Forked
from waiting import wait_for_steps

from cogtrain.runs.folder import read_run


def test_a_run_of_two_processes_that_is_stopped_then_ended_then_typed_again(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=4)
    make_shards(tmp_path / "held", samples=1, seed=9, captions=("a",))
    run = tmp_path / "run"
    line = ["cogtrain", "lora", "--shards", "out", "--validate-shards", "held", "--out", "run", "--rank", 4]
    line += ["--global-batch", 2, "--json"]

    process = Forked([*line, "--steps", 10_000, "--nproc", 2], tmp_path)
    assert wait_for_steps(run, 2, process), process.end()
    os.kill(process.pid, signal.SIGINT)
    code, out, err = process.end()
    told, made = json.loads(out), read_run(run).steps
    assert code == 130 and "stopped; to resume" in err
    assert told["resume"] == "cogtrain lora --config run/config.toml" and told["weights"] is None
    assert (told["out"], told["steps"], told["of"], told["loss"]) == ("run", len(made), 10_000, made[-1].loss)
    assert told["checkpoint"] == f"run/checkpoint-{len(made)}"
    assert "json" not in read_run(run).settings  # its last line would make a script of a person

    steps = len(made) + 1
    code, out, err = Forked([*line, "--steps", steps], tmp_path).end()
    ended = json.loads(out)
    assert code == 0 and "loaded back" in err
    assert (ended["weights"], ended["weights_step"]) == ("run/pytorch_lora_weights.safetensors", steps)
    assert ended["val_loss"] == read_run(run).validations[-1].val_loss and ended["base_val_loss"] > 0
    assert ended["s_per_step"] > 0 and ended["peak_gib"] > 0 and ended["resume"] is None

    code, out, err = Forked([*line, "--steps", steps], tmp_path).end()
    assert code == 0 and "nothing is left to train" in err and json.loads(out) == ended
