"""Fine-tuning learns: the whole chain of commands, judged by what the tuned model draws."""

import pytest
from forked import Forked

from workshop.pretrain.concept import examine_run, tell
from workshop.pretrain.proof import CASES, LORA, lessons, method_of


def taught(folder, form, method, **lesson):
    """A run folder, by forked commands."""
    for command in lessons(folder, form, method, **lesson):
        code, _, said = Forked(command, folder).end(1200)
        assert code == 0, said
    return folder / "run"


@pytest.mark.full  # a quarter of an hour each
@pytest.mark.parametrize("case", CASES)
def test_a_new_motion_is_learned_and_nothing_forgotten(tmp_path, case):
    run = taught(tmp_path, case.split()[0], CASES[case])
    proof, animation = examine_run(run, clips=100, steps=20, guidance=3.0, seed=0)
    animation.save(tmp_path / "concept.webp")
    print(case, proof)
    before, after = proof.recognised
    assert before <= 0.2 and after >= 0.8
    assert proof.kept[1] >= 0.7
    base, tuned = proof.held_out_loss
    assert tuned < 0.8 * base


def test_a_case_is_taught_at_another_rate_if_told():
    assert method_of("tiny-1.5") == CASES["tiny-1.5"]
    assert method_of("tiny by sft", 1e-3) == "sft --lr 0.001 --strategy ddp"


def test_a_short_run_already_learns(tmp_path):
    """The lean case: enough steps to see it learn, and nothing that would keep what is known."""
    run = taught(tmp_path, "tiny", LORA, new=20, known=0, steps=40)
    proof, animation = examine_run(run, clips=4, steps=8, guidance=3.0, seed=0)
    assert proof.recognised[0] == 0 and proof.recognised[1] >= 0.75
    base, tuned = proof.held_out_loss
    assert tuned < 0.8 * base
    assert len(animation.pictures) == 17
    assert "the new motion is recognised" in tell(proof)
