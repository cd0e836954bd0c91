import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from condrl import UsageError
from condrl.schedule import epsilon_from_v, schedule_from_diffusers, score_from_epsilon, score_from_x0, x0_from_score

SD15 = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_table_is_that_of_diffusers(kind, zero_snr):
    config = {**SD15, "beta_schedule": kind, "rescale_betas_zero_snr": zero_snr}
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    schedule = schedule_from_diffusers(config)
    times = (torch.arange(1000) + 1).double() / 1000
    torch.testing.assert_close(schedule.alpha(times).square(), theirs, atol=2e-6, rtol=2e-4)
    torch.testing.assert_close(schedule.network_time(times), torch.arange(1000).float())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [10, 16, 50])
@pytest.mark.parametrize("to_one", [False, True])
def test_grid_is_that_of_diffusers(spacing, steps, to_one):
    config = {**SD15, "timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": to_one}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    schedule = schedule_from_diffusers(config)
    times = schedule.grid(steps)
    assert torch.equal(schedule.network_time(times[:-1]).long(), scheduler.timesteps)
    assert schedule.alpha(times[-1]).square().item() == pytest.approx(scheduler.final_alpha_cumprod.item(), abs=1e-6)


def test_drift_and_diffusion_are_derivatives_of_the_table():
    schedule = schedule_from_diffusers(SD15)
    t, dt = torch.tensor([0.0305, 0.2004, 0.7777], dtype=torch.float64), 1e-5
    f = (schedule.alpha(t + dt).log() - schedule.alpha(t - dt).log()) / (2 * dt)
    torch.testing.assert_close(schedule.f(t), f, rtol=1e-4, atol=0)
    variance = (schedule.sigma(t + dt).square() - schedule.sigma(t - dt).square()) / (2 * dt)
    torch.testing.assert_close(schedule.g2(t), variance - 2 * f * schedule.sigma(t).square(), rtol=1e-4, atol=0)


def test_conversions_agree_with_the_noise_that_was_added():
    schedule = schedule_from_diffusers({**SD15, "prediction_type": "v_prediction"})
    scheduler = DDPMScheduler(**SD15)
    x0, eps, index = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([3, 250, 600, 999])
    x, v = scheduler.add_noise(x0, eps, index), scheduler.get_velocity(x0, eps, index)
    t = (index + 1).double() / 1000
    alpha, sigma = (c(t).float()[:, None] for c in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(epsilon_from_v(v, x, alpha, sigma), eps, atol=1e-5, rtol=1e-4)
    score = score_from_epsilon(eps, sigma)
    torch.testing.assert_close(schedule.score(v, x, t), score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x0_from_score(score, x, alpha, sigma), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score_from_x0(x0, x, alpha, sigma), score, atol=1e-2, rtol=1e-3)


def test_network_predictions_of_every_kind_give_the_same_score():
    x0, eps, t = torch.randn(5, 3), torch.randn(5, 3), torch.linspace(0.1, 1, 5)
    scores = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = schedule_from_diffusers({**SD15, "prediction_type": kind})
        alpha, sigma = (c(t).float()[:, None] for c in (schedule.alpha, schedule.sigma))
        predicted = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
        scores[kind] = schedule.score(predicted, alpha * x0 + sigma * eps, t)
    torch.testing.assert_close(scores["v_prediction"], scores["epsilon"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores["sample"], scores["epsilon"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"prediction_type": "flow"}, "flow"), ({"timestep_spacing": "karras"}, "karras"), ({"beta_schedule": "x"}, "x")],
)
def test_unknown_scheduler_settings_are_refused(change, word):
    with pytest.raises(UsageError, match=word):
        schedule_from_diffusers({**SD15, **change})


def test_too_many_steps_are_refused():
    with pytest.raises(UsageError, match="between 1 and 1000"):
        schedule_from_diffusers(SD15).grid(1001)
