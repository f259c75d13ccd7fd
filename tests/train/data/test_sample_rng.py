import pytest
import torch

from cogtrain.data.sample_rng import SampleRNG, seed_of


def test_a_draw_depends_on_seed_epoch_key_and_purpose_alone():
    same = SampleRNG(1, 2, "k").normal((4,), "noise")
    SampleRNG(1, 2, "k").uniform("timestep")  # another draw in between shifts nothing
    torch.rand(3)
    assert torch.equal(same, SampleRNG(1, 2, "k").normal((4,), "noise"))
    for other in (SampleRNG(2, 2, "k"), SampleRNG(1, 3, "k"), SampleRNG(1, 2, "l")):
        assert not torch.equal(same, other.normal((4,), "noise"))
    assert not torch.equal(same, SampleRNG(1, 2, "k").normal((4,), "posterior"))
    assert 0 <= seed_of(1, 2, "k", "noise") < 2**63


def test_uniform_timesteps_are_uniform():
    drawn = torch.tensor([SampleRNG(0, 0, str(index)).timestep(1000) for index in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 999
    counts = torch.histc(drawn.float(), 10, 0, 1000)
    # 400 expected in each tenth, standard deviation 19
    assert counts.min() > 310 and counts.max() < 490


@pytest.mark.parametrize("slots", [2, 8])
def test_stratified_timesteps_fill_every_stratum(slots):
    for epoch in range(20):
        drawn = [SampleRNG(0, epoch, f"k{slot}").timestep(1000, slot, slots) for slot in range(slots)]
        assert [t * slots // 1000 for t in drawn] == list(range(slots))


def test_a_choice_reaches_every_variant():
    assert {SampleRNG(0, 0, str(index)).choice(4, "image variant") for index in range(100)} == {0, 1, 2, 3}
