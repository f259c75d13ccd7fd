"""Every strategy, method and family on two processes."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file

from cogcommon.cli.settings import resolve
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, FAMILIES
from cogtrain.memory.disk import writes
from cogtrain.model import lora
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings

STRATEGIES = ["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


def size_of(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def matrix(strategies, root, methods=("lora", "sft"), forms=tuple(family.builtin for family in FAMILIES)):
    """Two cases each: one step with a checkpoint, then resumed for the second, and exported."""
    cases = []
    for strategy, method, form in itertools.product(strategies, methods, forms):
        name = f"{strategy}-{method}-{form}"
        settings = {"shards": [str(root / form)], "out": str(root / "runs" / name), "strategy": strategy, "lr": 1e-2}
        settings |= {"rank": 4} if method == "lora" else {}
        cases.append({"name": f"{name}-a", "method": method, "settings": settings | {"steps": 1}})
        cases.append({"name": f"{name}-b", "method": method, "settings": settings | {"steps": 2}})
    return cases


@pytest.mark.parametrize(
    "strategies, families",
    [
        pytest.param(["ddp"], FAMILIES, id="ddp"),
        pytest.param(STRATEGIES[1:], (BY_NAME["1.5-5b-i2v"],), id="zero"),
        pytest.param(STRATEGIES[1:], FAMILIES, id="zero-all", marks=pytest.mark.full),  # two minutes
    ],
)
def test_every_strategy_method_and_family_trains_resumes_and_exports(
    tmp_path, make_shards, run_ranks, strategies, families, losses
):
    from diffusers import CogVideoXTransformer3DModel

    for family in families:
        make_shards(tmp_path / family.builtin, family.builtin, samples=4, image_variants=1)
    forms = [family.builtin for family in families]
    run_ranks(2, matrix(strategies, tmp_path, forms=forms), tmp_path / "ranks")
    reference = {}
    for strategy, method, family in itertools.product(strategies, ("lora", "sft"), families):
        run = tmp_path / "runs" / f"{strategy}-{method}-{family.builtin}"
        found = losses(run)
        assert sorted(found) == [1, 2]
        # The same numbers whatever the strategy, also after the resume.
        assert found == pytest.approx(reference.setdefault((method, family.builtin), found), rel=1e-5), run.name
        cls = LoraSettings if method == "lora" else SftSettings
        settings = resolve(cls, {}, run / "config.toml")
        foretold = writes(open_run(dataclasses.replace(settings, resume="never"), torch.device("cpu"), 2))
        weights = run / (lora.FILE if method == "lora" else "transformer")
        assert size_of(run / "checkpoint-2") == pytest.approx(foretold.checkpoint, rel=0.02, abs=80_000), run.name
        assert size_of(weights) == pytest.approx(foretold.export, rel=0.04, abs=30_000), run.name
        if method == "lora":
            state = load_file(run / lora.FILE)
            assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in state.values())
        else:
            tuned = CogVideoXTransformer3DModel.from_pretrained(run / "transformer")
            base = open_checkpoint(family.builtin).load_transformer(torch.float32).state_dict()
            assert any(not torch.equal(tensor, base[name]) for name, tensor in tuned.state_dict().items())
