"""120 steps under each ZeRO stage beside DDP: the same losses. Prodigy, which would not give them, is refused there."""

import pytest
from forked import Forked, ForkedRanks

STEPS = 120


def words_for(tmp_path, strategy, *options):
    words = ["lora", "--shards", str(tmp_path / "out"), "--out", str(tmp_path / strategy), "--steps", str(STEPS)]
    words += ["--save-every", "1000", "--precision", "fp32", "--rank", "4", "--seed", "1"]
    return [*words, "--strategy", strategy, *options]


@pytest.mark.full  # a minute
def test_adamw_gives_ddps_losses_under_every_stage(tmp_path, make_shards, losses):
    make_shards(tmp_path / "out", "random-tiny", samples=8)
    found = {}
    for strategy in ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"):
        ranks = ForkedRanks(2, ["cogtrain", *words_for(tmp_path, strategy, "--lr", "1e-2")], tmp_path).end()
        assert [code for code, _, _ in ranks] == [0, 0], ranks
        found[strategy] = losses(tmp_path / strategy)
        assert len(found[strategy]) == STEPS
    reference = found.pop("ddp")
    assert len(set(reference.values())) > STEPS / 2  # it trains
    for strategy, theirs in found.items():
        worst = max(abs(theirs[step] / reference[step] - 1) for step in reference)
        print(f"{strategy:<14} at most {worst:.1e} from DDP's loss, {STEPS} steps")
        assert worst < 1e-3, strategy


def test_prodigy_under_zero_is_refused_once_by_the_command(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=2)
    words = [*words_for(tmp_path, "zero2", "--optimizer", "prodigy", "--lr", "1"), "--nproc", "2"]
    code, out, err = Forked(["cogtrain", *words]).end()
    assert code == 2 and "Traceback" not in err
    said = " ".join((out + err).split())
    assert said.count("Prodigy finds one rate from all weights") == 1 and "--strategy ddp" in said
    assert not (tmp_path / "zero2").exists()
