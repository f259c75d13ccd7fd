import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogcommon.errors import ModelError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.model.diffusion import Schedule, squared_error


@pytest.mark.parametrize("form", ["tiny-2b", "tiny"])
@pytest.mark.parametrize("cls", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_schedule_is_diffusers(form, cls):
    config = open_checkpoint(form).scheduler_config
    assert config["snr_shift_scale"] == {"tiny-2b": 3.0, "tiny": 1.0}[form]
    ours, theirs = Schedule.from_config(config).abar_T, cls.from_config(config).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-12, atol=0)
    assert ours[999] == 0


def test_rescaling_before_the_shift_would_be_another_schedule():
    config = dict(open_checkpoint("tiny-2b").scheduler_config)
    swapped = Schedule.from_config(config | {"snr_shift_scale": 1.0}).abar_T
    swapped = swapped / (3 - 2 * swapped)
    ours = Schedule.from_config(config).abar_T
    assert abs(swapped[990] / ours[990] - 1) > 0.03


def test_a_scheduler_of_another_kind_is_refused():
    config = dict(open_checkpoint("tiny").scheduler_config)
    with pytest.raises(ModelError, match="epsilon"):
        Schedule.from_config(config | {"prediction_type": "epsilon"})


def test_noise_and_velocity_equal_the_scheduler():
    config = open_checkpoint("tiny").scheduler_config
    scheduler, schedule = CogVideoXDDIMScheduler.from_config(config), Schedule.from_config(config)
    x0, noise = torch.randn(2, 4, 3, 16, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 999])
    noisy = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(x0, noise, t), rtol=1e-9, atol=1e-12)
    # get_velocity(model output, noisy, t) gives x0 back from v.
    back = scheduler.get_velocity(schedule.velocity(x0, noise, t), noisy, t)
    torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-9)
    assert torch.equal(noisy[3], noise[3])  # nothing but noise at the end


def test_coefficients_are_not_rounded_to_bf16_at_the_first_timesteps():
    schedule = Schedule.from_config(open_checkpoint("tiny").scheduler_config)
    for t in (0, 1):
        signal, noise = schedule._coefficients(torch.tensor([t]), torch.zeros(1, 1))
        exact = float(schedule.abar_T[t])
        assert float(signal) == pytest.approx(exact**0.5, rel=1e-7) and float(signal) < 1
        assert float(noise) == pytest.approx((1 - exact) ** 0.5, rel=1e-6) and float(noise) > 0.02
        assert float(signal.bfloat16()) == 1.0  # which is why


def test_min_snr_weight():
    schedule = Schedule.from_config(open_checkpoint("tiny").scheduler_config)
    t = torch.arange(1000)
    abar = schedule.abar_T.numpy()
    with np.errstate(divide="ignore"):
        snr = abar / (1 - abar)
    expected = np.minimum(snr, 5.0) / (snr + 1)
    np.testing.assert_allclose(schedule.min_snr_weight(t, 5.0).numpy(), expected, rtol=1e-9, atol=1e-15)


def test_squared_error_is_by_sample_and_in_the_targets_type():
    target = torch.zeros(2, 3, 4)
    losses = squared_error(torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)]).bfloat16(), target)
    assert losses.dtype == torch.float32 and losses.tolist() == [1.0, 4.0]
