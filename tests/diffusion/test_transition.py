import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal, kl_divergence

from condrl import UsageError
from condrl.diffusion.noise import randn
from condrl.diffusion.schedulers import schedule_from_diffusers
from condrl.diffusion.transition import Gaussian
from condrl.registry import sampler
from condrl.training.build import make_sampler

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


def random_gaussian(seed, std):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    return Gaussian(mean, torch.full((5, 1, 1), std, dtype=torch.float64))


def as_torch(transition):
    return Independent(Normal(transition.mean, transition.std.expand_as(transition.mean)), 2)


def test_log_prob_and_kl_are_those_of_torch_distributions():
    p, q, x = random_gaussian(0, 0.3), random_gaussian(1, 0.7), random_gaussian(2, 1.0).mean
    torch.testing.assert_close(p.log_prob(x), as_torch(p).log_prob(x))
    torch.testing.assert_close(p.kl(q), kl_divergence(as_torch(p), as_torch(q)))
    torch.testing.assert_close(p.kl(p), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_log_ratio_of_two_distributions_has_mean_minus_kl():
    """docs/theory.md 4: with equal S the log-ratio is linear in the noise, mean -KL and variance 2 KL."""
    old, new = random_gaussian(0, 0.5), Gaussian(random_gaussian(0, 0.5).mean + 0.1, random_gaussian(0, 0.5).std)
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
        transition, _ = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
        theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(transition.sample(noise), theirs, atol=1e-5, rtol=1e-5)


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
        transition, _ = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
        reference = Normal(mean, std).log_prob(theirs).sum((1, 2, 3))
        torch.testing.assert_close(transition.log_prob(theirs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 7, 16, 30, 50, 96])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddims_steps_are_diffusers_for_every_spacing(spacing, steps, offset, to_one):
    """On one table in float64, so that nothing but the arithmetic is compared; eta = 0 and eta = 1."""
    config = {**SD15, "steps_offset": offset, "set_alpha_to_one": to_one, "timestep_spacing": spacing}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    schedule = schedule_from_diffusers(scheduler.config)
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.final_alpha_cumprod = torch.tensor(1.0) if to_one else schedule.alpha_bar[0]
    x, predicted, noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for eta in (0.0, 1.0):
        ours = ddim(schedule, schedule.grid(steps), eta=eta)
        for k, timestep in enumerate(scheduler.timesteps):
            transition, _ = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
            theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
            torch.testing.assert_close(transition.sample(noise), theirs, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- zero terminal SNR


def zero_snr(prediction="v_prediction", **changes):
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    return schedule_from_diffusers({**config, **changes})


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [4, 20])
def test_a_chain_from_pure_noise_is_diffusers(eta, prediction, steps):
    schedule = zero_snr(prediction)
    config = {**SD15, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == schedule.alpha(torch.tensor(1.0)) == 0
    # in float32 diffusers' first step is off by the root of a rounding error at eta = 1, and nan for 50 steps
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alpha_bar, atol=2e-6, rtol=0)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = schedule.alpha_bar, schedule.alpha_bar[0]
    ours = make_sampler({"name": "ddim", "steps": steps, "spacing": "trailing", "eta": eta}, schedule)
    g = torch.Generator().manual_seed(0)
    x, predicted, noise = torch.randn(3, 2, 4, generator=g, dtype=torch.float64)
    for k, timestep in enumerate(scheduler.timesteps):
        transition, _ = ours.step(torch.full((2,), k), x, lambda y, t: schedule.score(predicted, y, t))
        theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(transition.sample(noise), theirs, atol=1e-5, rtol=1e-5)
    first, _ = ours.step(torch.zeros(2, dtype=torch.long), x, lambda y, t: schedule.score(predicted, y, t))
    below = schedule.alpha(ours.times[1]), schedule.sigma(ours.times[1])
    clean = -predicted if prediction == "v_prediction" else predicted
    torch.testing.assert_close(first.mean, below[0] * clean + below[1] * (1 - eta**2) ** 0.5 * x)
    torch.testing.assert_close(first.std.flatten(), (eta * below[1]).expand(2))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["exponential", "dpm_solver_pp"])
def test_other_samplers_start_from_pure_noise_too(name, eta):
    """alpha x0 + sigma e^{-eta^2 h} x with an infinite gain h: none of the noise is kept, but all of it by the ODE."""
    schedule = zero_snr()
    x, v = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = make_sampler({"name": name, "steps": 10, "spacing": "trailing", "eta": eta}, schedule)
    transition, _ = ours.step(torch.zeros(1, dtype=torch.long), x, lambda y, t: schedule.score(v, y, t), ours.init(x))
    alpha, sigma = schedule.alpha(ours.times[1]), schedule.sigma(ours.times[1])
    torch.testing.assert_close(transition.mean, -alpha * v + (sigma * x if eta == 0 else 0))
    assert transition.std.item() == pytest.approx(0.0 if eta == 0 else sigma.item())
    assert ours.stochastic[:-1].eq(eta > 0).all()


def test_distribution_and_kl_from_pure_noise_are_those_of_torch_distributions():
    schedule = zero_snr()
    ours = make_sampler({"name": "ddim", "steps": 5, "spacing": "trailing", "eta": 1.0}, schedule)
    g = torch.Generator().manual_seed(0)
    x, v, other = torch.randn(3, 4, 3, 2, generator=g, dtype=torch.float64)
    k = torch.zeros(4, dtype=torch.long)
    p, q = (ours.step(k, x, lambda y, t, v=v: schedule.score(v, y, t))[0] for v in (v, other))
    alpha, sigma = schedule.alpha(ours.times[1]), schedule.sigma(ours.times[1])
    mine, theirs = (Independent(Normal(-alpha * v, sigma.expand_as(v)), 2) for v in (v, other))
    y = p.sample(torch.randn(x.shape, generator=g, dtype=torch.float64))
    torch.testing.assert_close(p.log_prob(y), mine.log_prob(y))
    torch.testing.assert_close(p.kl(q), kl_divergence(mine, theirs))


@pytest.mark.parametrize("name", ["euler_maruyama", "heun", "flow_sde", "dance_sde"])
def test_samplers_that_cannot_start_from_pure_noise_are_refused(name):
    section = {"name": name, "steps": 5, "spacing": "trailing"}
    with pytest.raises(UsageError, match=rf"sampler {name} cannot start .*zero terminal SNR.*sampler\.spacing=leading"):
        make_sampler(section, zero_snr())
    make_sampler({**section, "spacing": "leading"}, zero_snr())


def test_noise_predictions_from_pure_noise_are_refused():
    with pytest.raises(UsageError, match=r"the noise that the model predicts.*sampler\.spacing=leading"):
        make_sampler({"name": "ddim", "steps": 10, "spacing": "trailing"}, zero_snr("epsilon"))
    make_sampler({"name": "ddim", "steps": 10, "spacing": "leading"}, zero_snr("epsilon"))


def test_ddim_eta_zero_is_deterministic_and_last_step_to_data_too():
    schedule = schedule_from_diffusers({**SD15, "set_alpha_to_one": True})
    assert not ddim(schedule, schedule.grid(10), eta=0.0).stochastic.any()
    assert ddim(schedule, schedule.grid(10), eta=1.0).stochastic.tolist() == [True] * 9 + [False]


def test_ddim_refuses_what_it_cannot_do():
    schedule = schedule_from_diffusers(SD15)
    with pytest.raises(UsageError, match=r"eta.*1.5"):
        ddim(schedule, schedule.grid(10, "leading"), eta=1.5)


def test_steps_may_differ_within_a_batch():
    schedule = schedule_from_diffusers(SD15)
    ours = ddim(schedule, schedule.grid(10))
    x, k = torch.randn(3, 4, 2, 2), torch.tensor([0, 4, 9])
    synchronized, _ = ours.step(k, x, lambda y, t: -y)
    for i in range(3):
        alone, _ = ours.step(k[i : i + 1], x[i : i + 1], lambda y, t: -y)
        torch.testing.assert_close(synchronized.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(synchronized.std[i : i + 1], alone.std)


def test_listed_generators_do_not_depend_on_the_batch():
    cpu = torch.device("cpu")
    pair = randn((2, 3), [torch.Generator().manual_seed(s) for s in (5, 6)], cpu)
    alone = randn((1, 3), [torch.Generator().manual_seed(6)], cpu)
    assert torch.equal(pair[1:], alone)
    assert not torch.equal(pair[0], pair[1])
