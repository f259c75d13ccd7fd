"""Our blocks under ZeRO-3 (--compile on) are the run that diffusers' own blocks make there, on two processes."""

import itertools
import json

import pytest

from cogcommon.families import FAMILIES

FORMS = [family.builtin for family in FAMILIES]
IN_CI = [("zero3", "lora", "tiny-1.5-i2v", "low"), ("zero3", "sft", "tiny", "auto")]
ALL = [
    *itertools.product(["zero3"], ("lora", "sft"), FORMS, ("auto", "low", "fast")),
    ("zero3-offload", "sft", "tiny-1.5-i2v", "low"),
]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    "rows", [pytest.param(IN_CI, id="ci"), pytest.param(ALL, id="all", marks=pytest.mark.full)]
)  # four minutes
def test_two_steps_with_a_resume_between_and_an_export(tmp_path, make_shards, run_ranks, rows):
    """Compiled as on a GPU, up to the machine's code. The run itself loads its export back and compares."""
    for form in {form for _, _, form, _ in rows}:
        make_shards(tmp_path / form, form, samples=4, image_variants=1)
    cases = []
    for strategy, method, form, memory in rows:
        for whose in ("ours", "diffusers"):
            run = tmp_path / f"{strategy}-{method}-{form}-{memory}-{whose}"
            settings = {"shards": [str(tmp_path / form)], "out": str(run), "strategy": strategy, "lr": 1e-2}
            settings |= {"rank": 4} if method == "lora" else {}
            settings |= {"memory": memory, "compile": "on"} if whose == "ours" else {}
            for steps in (1, 2):
                case = {"name": f"{run.name}-{steps}", "method": method, "settings": settings | {"steps": steps}}
                cases.append(case | {"compiler": "aot_eager"})
    run_ranks(2, cases, tmp_path / "ranks")
    for strategy, method, form, memory in rows:
        ours, theirs = (tmp_path / f"{strategy}-{method}-{form}-{memory}-{whose}" for whose in ("ours", "diffusers"))
        plan = json.loads((ours / "facts.json").read_text())["plan"]
        assert "blocks compiled" in plan and ("waits in host memory" in plan) == (memory == "low")
        expected = losses(theirs)
        assert sorted(expected) == [1, 2]
        assert losses(ours) == pytest.approx(expected, rel=1e-5), ours.name
        assert list(ours.glob("*.safetensors" if method == "lora" else "transformer/*.safetensors"))
