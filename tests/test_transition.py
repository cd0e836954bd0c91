import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal, kl_divergence

from condrl import UsageError
from condrl.noise import randn
from condrl.registry import sampler
from condrl.run import make_sampler
from condrl.schedule import schedule_from_diffusers
from condrl.transition import Transition

SD15 = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
ddim = sampler.find("ddim").target


def random_law(seed, std):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    return Transition(mean, torch.full((5, 1, 1), std, dtype=torch.float64))


def as_torch(law):
    return Independent(Normal(law.mean, law.std.expand_as(law.mean)), 2)


def test_log_prob_and_kl_are_those_of_torch_distributions():
    p, q, x = random_law(0, 0.3), random_law(1, 0.7), random_law(2, 1.0).mean
    torch.testing.assert_close(p.log_prob(x), as_torch(p).log_prob(x))
    torch.testing.assert_close(p.kl(q), kl_divergence(as_torch(p), as_torch(q)))
    torch.testing.assert_close(p.kl(p), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_log_ratio_of_two_laws_has_mean_minus_kl():
    """THEORY 4.1: with equal S the log-ratio is linear in the noise, mean -KL and variance 2 KL."""
    old, new = random_law(0, 0.5), Transition(random_law(0, 0.5).mean + 0.1, random_law(0, 0.5).std)
    g = torch.Generator().manual_seed(3)
    ratios = []
    for _ in range(4000):
        x = old.sample(torch.randn(old.mean.shape, generator=g, dtype=torch.float64))
        ratios.append(new.log_prob(x) - old.log_prob(x))
    ratios, kl = torch.stack(ratios), old.kl(new)
    torch.testing.assert_close(ratios.mean(0), -kl, atol=5 * (2 * kl.max() / 4000).sqrt().item(), rtol=0)
    torch.testing.assert_close(ratios.var(0), 2 * kl, rtol=0.15, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_diffusers_step(eta, prediction, steps):
    scheduler = DDIMScheduler(**SD15, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    schedule = schedule_from_diffusers(scheduler.config)
    ours = ddim(schedule, schedule.grid(steps), eta=eta)
    g = torch.Generator().manual_seed(0)
    x, predicted, noise = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(3))
    for k, timestep in enumerate(scheduler.timesteps):
        law = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
        theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(law.sample(noise), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 50])
def test_log_probs_are_those_of_diffusers_step(eta, prediction, steps):
    """In float64, the table included: float32 tables move a log-probability by more than 1e-5."""
    scheduler = DDIMScheduler(**SD15, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    schedule = schedule_from_diffusers(scheduler.config)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = schedule.alpha_bar, schedule.alpha_bar[0]
    ours = ddim(schedule, schedule.grid(steps), eta=eta)
    g = torch.Generator().manual_seed(0)
    x, predicted, noise = (torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    for k, timestep in enumerate(scheduler.timesteps):
        mean = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=torch.zeros_like(noise)).prev_sample
        theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise).prev_sample
        std = eta * scheduler._get_variance(timestep, timestep - 1000 // steps).sqrt()
        law = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
        reference = Normal(mean, std).log_prob(theirs).sum((1, 2, 3))
        torch.testing.assert_close(law.log_prob(theirs), reference, atol=1e-5, rtol=0)


def test_ddim_eta_zero_is_deterministic_and_last_step_to_data_too():
    schedule = schedule_from_diffusers({**SD15, "set_alpha_to_one": True})
    assert not ddim(schedule, schedule.grid(10), eta=0.0).stochastic.any()
    assert ddim(schedule, schedule.grid(10), eta=1.0).stochastic.tolist() == [True] * 9 + [False]


def test_ddim_refuses_what_it_cannot_do():
    schedule = schedule_from_diffusers({**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    with pytest.raises(UsageError, match=r"zero terminal SNR.*leading"):
        make_sampler({"name": "ddim", "steps": 10, "spacing": "trailing"}, schedule)
    with pytest.raises(UsageError, match=r"eta.*1.5"):
        ddim(schedule, schedule.grid(10, "leading"), eta=1.5)


def test_steps_may_differ_within_a_batch():
    schedule = schedule_from_diffusers(SD15)
    ours = ddim(schedule, schedule.grid(10))
    x, k = torch.randn(3, 4, 2, 2), torch.tensor([0, 4, 9])
    together = ours.step(k, x, lambda y, t: -y)
    for i in range(3):
        alone = ours.step(k[i : i + 1], x[i : i + 1], lambda y, t: -y)
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(together.std[i : i + 1], alone.std)


def test_listed_generators_do_not_depend_on_the_batch():
    cpu = torch.device("cpu")
    pair = randn((2, 3), [torch.Generator().manual_seed(s) for s in (5, 6)], cpu)
    alone = randn((1, 3), [torch.Generator().manual_seed(6)], cpu)
    assert torch.equal(pair[1:], alone)
    assert not torch.equal(pair[0], pair[1])
