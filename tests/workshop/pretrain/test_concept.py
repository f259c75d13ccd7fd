"""Fine-tuning learns: the whole chain of commands, judged by what the tuned model draws."""

import pytest
from forked import Forked

from cogcommon.model.checkpoint import open_checkpoint
from workshop.draw import write_data_set
from workshop.pretrain.concept import examine_run, tell
from workshop.pretrain.exam import motion_for

NEW, KNOWN = 28, 72  # clips
LORA = "lora --rank 64 --lr 2e-3"
CASES = {
    "tiny": LORA,
    "tiny-i2v": LORA,
    "tiny-1.5": LORA,
    "tiny-1.5-i2v": LORA,
    "tiny by sft": "sft --lr 3e-4 --strategy ddp",
}


def taught(folder, form, method, *, new=NEW, known=KNOWN, steps=360, seed=42):
    """A run folder: clips of the new motion and known ones, encoded each by themselves and trained on together."""
    write_data_set(folder / "new", new, seed=0, new=motion_for(open_checkpoint(form).family))
    if known:
        write_data_set(folder / "known", known, seed=0)
    encode = f"cogprep encode --resolution 17x64x96 --model {form}"
    for command in (
        f"{encode} --data-root new --holdout 4 --out shards/new",
        *([f"{encode} --data-root known --out shards/known"] if known else []),
        f"cogtrain {method} --shards shards/*/*.tar --validate-shards shards/new/val/*.tar --validate-every {steps} "
        f"--steps {steps} --batch-size 4 --lr-schedule cosine --ema 0.98 --timesteps stratified --seed {seed} "
        "--out run",
    ):
        code, _, said = Forked(command.split(), folder).end(1200)
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


def test_a_short_run_already_learns(tmp_path):
    """The lean case: enough steps to see it learn, and nothing that would keep what is known."""
    run = taught(tmp_path, "tiny", LORA, new=20, known=0, steps=40)
    proof, animation = examine_run(run, clips=4, steps=8, guidance=3.0, seed=0)
    assert proof.recognised[0] == 0 and proof.recognised[1] >= 0.75
    base, tuned = proof.held_out_loss
    assert tuned < 0.8 * base
    assert len(animation.pictures) == 17
    assert "the new motion is recognised" in tell(proof)
