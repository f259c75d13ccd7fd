"""Compiled blocks under ZeRO-3, which lends them their weights, make the run that DDP makes; what needs room."""

import errno
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from cogcommon.errors import DiskError
from cogcommon.model.families import FAMILIES
from cogtrain.distributed import strategy as strategies
from cogtrain.distributed import zero
from cogtrain.distributed.peers import ALONE
from cogtrain.distributed.strategy import Runtime

FORMS = [family.builtin for family in FAMILIES]
IN_CI = [("zero3", "lora", "tiny-1.5-i2v", "low"), ("zero3", "sft", "tiny", "auto")]
ALL = [
    *itertools.product(["zero3"], ("lora", "sft"), FORMS, ("auto", "low", "fast")),
    ("zero3-offload", "sft", "tiny-1.5-i2v", "low"),
]


@pytest.mark.parametrize(
    "rows", [pytest.param(IN_CI, id="ci"), pytest.param(ALL, id="all", marks=pytest.mark.full)]
)  # four minutes
def test_two_steps_with_a_resume_between_and_an_export(tmp_path, make_shards, run_ranks, losses, rows):
    """Compiled as on a GPU, up to the machine's code. The run itself loads its export back and compares."""
    for form in {form for _, _, form, _ in rows}:
        make_shards(tmp_path / form, form, samples=4, image_variants=1)
    plain = [("ddp", method, form, "auto") for method, form in sorted({row[1:3] for row in rows})]
    cases = []
    for strategy, method, form, memory in (*plain, *rows):
        run = tmp_path / f"{strategy}-{method}-{form}-{memory}"
        settings = {"shards": [str(tmp_path / form)], "out": str(run), "strategy": strategy, "lr": 1e-2}
        settings |= {"rank": 4} if method == "lora" else {}
        settings |= {} if strategy == "ddp" else {"memory": memory, "compile": "on"}
        for steps in (1, 2):
            case = {"name": f"{run.name}-{steps}", "method": method, "settings": settings | {"steps": steps}}
            cases.append(case | {"compiler": "aot_eager"})
    run_ranks(2, cases, tmp_path / "ranks")
    for strategy, method, form, memory in rows:
        ours, theirs = tmp_path / f"{strategy}-{method}-{form}-{memory}", tmp_path / f"ddp-{method}-{form}-auto"
        plan = json.loads((ours / "facts.json").read_text())["block_plan"]
        assert plan["compiled"] and plan["offload_activations"] == (memory == "low")
        expected = losses(theirs)
        assert sorted(expected) == [1, 2]
        assert losses(ours) == pytest.approx(expected, rel=1e-5), ours.name
        assert list(ours.glob("*.safetensors" if method == "lora" else "transformer/*.safetensors"))


def test_room_for_a_model_is_that_of_all_its_weights_though_they_lie_in_parts(monkeypatch):
    """ZeRO-3 leaves nothing in a parameter itself; a second model beside it is whole."""
    weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    weight.ds_numel = 1000
    model = torch.nn.ParameterList([weight])
    runtime = Runtime(SimpleNamespace(device=torch.device("cuda")), "zero3", "bf16", {}, ALONE)
    for free, room in ((2500, "cuda"), (2000, "cpu")):
        monkeypatch.setattr(strategies, "free_gpu_memory", lambda device, free=free: free)
        assert runtime.room_for(model) == torch.device(room)


def test_a_disk_without_room_for_the_converted_checkpoint_is_told_as_such_and_keeps_none_of_it(tmp_path, monkeypatch):
    """The checkpoint is whole: nobody is told to resume an older one."""
    checkpoint = tmp_path / "run" / "checkpoint-3"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "states.pt").write_bytes(bytes(3_000_000))

    def convert(folder, into):
        into.mkdir()
        (into / "half.pt").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zero, "convert", convert)
    runtime = Runtime(SimpleNamespace(process_index=0), "zero2", "fp32", {}, ALONE, converts=True)
    with pytest.raises(DiskError, match="the disk is full: 3 MB are to be written") as caught:
        runtime.load_state(None, None, None, checkpoint)
    assert "as many processes as wrote" in caught.value.fix and str(checkpoint) == caught.value.where
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint-3"]
