import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from condrl import UsageError
from condrl.diffusion.schedule import epsilon_from_v, score_from_epsilon, score_from_x0, x0_from_score
from condrl.diffusion.schedulers import VP_SCHEDULERS, FlowSchedule, flow_from_diffusers, schedule_from_diffusers

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


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [False, True])
def test_noise_levels_of_ddims_steps_are_those_of_diffusers(spacing, offset, to_one):
    """From the level at a time to the level that DDIMScheduler.step takes for the one before, for nearly every N."""
    config = {**SD15, "timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    scheduler, schedule = DDIMScheduler(**config), schedule_from_diffusers(config)
    table = torch.cat([scheduler.final_alpha_cumprod[None], scheduler.alphas_cumprod]).double()
    refused = []
    for steps in [*range(1, 201), 333, 500, 501, 750, 999]:
        scheduler.set_timesteps(steps)
        try:
            times = schedule.grid(steps)
        except UsageError:
            refused.append(steps)
            continue
        before = (scheduler.timesteps - 1000 // steps).clamp(min=-1)
        for ours, theirs in ((times[:-1], scheduler.timesteps), (schedule.targets(times), before)):
            torch.testing.assert_close(schedule.alpha(ours).square(), table[theirs + 1], atol=1e-6, rtol=0)
        assert torch.equal(schedule.network_time(times[:-1]), scheduler.timesteps.float())
    assert refused == ([61, 103, 121, 122] if spacing == "trailing" else [])  # diffusers makes a step too many of them
    for steps in refused:
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps + 1
        with pytest.raises(UsageError, match=f"{steps + 1} times of {steps} steps.*one step more or less"):
            schedule.grid(steps)


def test_too_many_steps_are_refused():
    with pytest.raises(UsageError, match=r"sampler\.steps: must be between 1 and 1000, the training steps .*got 1001"):
        schedule_from_diffusers(SD15).grid(1001)


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_known_schedulers_have_this_table(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(**SD15)
    theirs = torch.as_tensor(scheduler.alphas_cumprod).double()
    torch.testing.assert_close(schedule_from_diffusers(scheduler.config).alpha_bar, theirs, atol=1e-6, rtol=0)


OTHERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "VQDiffusionScheduler",
)


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_of_other_processes_are_refused(name):
    with pytest.raises(UsageError, match=f"the model's scheduler is a {name}"):
        schedule_from_diffusers({**SD15, "_class_name": name})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DDIMScheduler", {"thresholding": True}),
    ],
)
def test_schedulers_that_change_the_process_are_refused(name, change):
    config = {**getattr(diffusers, name)(**SD15, **change).config, "_class_name": name}
    with pytest.raises(UsageError, match=f"{name} has {next(iter(change))}="):
        schedule_from_diffusers(config)


# ---------------------------------------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_action_where_there_is_no_signal_is_the_denoised_prediction(kind):
    """v = alpha eps - sigma x0 says x0 where alpha = 0; rows of a batch before and after are scores as ever."""
    schedule = schedule_from_diffusers({**SD15, "prediction_type": kind, "rescale_betas_zero_snr": True})
    t = torch.tensor([1.0, 0.999, 0.5], dtype=torch.float64)
    alpha, sigma = (c(t).float()[:, None] for c in (schedule.alpha, schedule.sigma))
    assert alpha.flatten().gt(0).tolist() == [False, True, True]
    x0, eps = torch.randn(2, 3, 4)
    predicted = {"v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
    x = alpha * x0 + sigma * eps
    action = schedule.score(predicted, x, t)
    torch.testing.assert_close(action[0], x0[0])
    torch.testing.assert_close(action[1:], (-eps / sigma)[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x0_from_score(action, x, alpha, sigma), x0, atol=2e-2, rtol=1e-3)


def test_log_snr_spacing_has_no_start_at_zero_terminal_snr():
    schedule = schedule_from_diffusers({**SD15, "rescale_betas_zero_snr": True})
    with pytest.raises(UsageError, match=r"sampler\.spacing: log_snr is infinite.*another spacing"):
        schedule.grid(10, "log_snr")
    assert schedule.grid(10, "uniform").isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"beta_start": -1}, {"beta_start": 0}, {"beta_end": 2}, {"beta_end": math.nan}, {"beta_end": "x"},
        {"num_train_timesteps": 0}, {"num_train_timesteps": "a"}, {"trained_betas": [0.1, 2]}, {"trained_betas": "x"},
        {"trained_betas": []}, {"trained_betas": [0.5, -0.1] * 50},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_values_by_which_noise_does_not_rise_are_named(change):
    (key,) = change
    with pytest.raises(
        UsageError, match=f"scheduler has noise levels that do not rise from 0 to 1, by .*{key}="
    ) as said:
        schedule_from_diffusers({**SD15, **change})
    assert len(str(said.value)) < 300


@pytest.mark.parametrize("offset", [-5, 1000, "x", 0.5])
def test_an_offset_outside_the_table_is_refused(offset):
    with pytest.raises(UsageError, match=rf"scheduler has steps_offset={offset!r}; it is from 0 to 999"):
        schedule_from_diffusers({**SD15, "steps_offset": offset})


# ---------------------------------------------------------------------------------------------- flows


DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
FLOWS = [
    {},
    {"shift": 3.0},
    {"shift": 2.0, "num_train_timesteps": 500},
    {"shift": 3.0, "shift_terminal": 0.1},
    DYNAMIC,
    {**DYNAMIC, "base_shift": 0.3, "max_shift": 2.0, "base_image_seq_len": 64, "max_image_seq_len": 1024},
    {**DYNAMIC, "time_shift_type": "linear"},
    {**DYNAMIC, "shift_terminal": 0.02},
]
LENGTHS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


@pytest.mark.parametrize("config", FLOWS)
@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("tokens", [256, 1536])
def test_a_flows_times_are_those_of_diffusers(config, evenly, tokens):
    """As Stable Diffusion 3's pipeline asks its scheduler for them, and as FLUX's does."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    schedule = flow_from_diffusers(scheduler.config, tokens, evenly)
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in LENGTHS))
    for steps in (1, 2, 7, 28):
        if steps == 1 and "shift_terminal" in config:
            with pytest.raises(UsageError, match=r"sampler\.steps: must be at least 2"):
                schedule.grid(steps)
            continue
        scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps) if evenly else None, mu=mu)
        times = schedule.grid(steps)
        torch.testing.assert_close(times.float(), scheduler.sigmas, atol=3e-7, rtol=0)
        torch.testing.assert_close(schedule.network_time(times[:-1]), scheduler.timesteps, atol=3e-4, rtol=0)
        assert (times[0], times[-1]) == (1, 0)


@pytest.mark.parametrize(
    "key", ["invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"]
)
def test_flows_with_other_times_or_steps_are_refused(key):
    with pytest.raises(UsageError, match=f"FlowMatchEulerDiscreteScheduler has {key}=True, which is not supported"):
        flow_from_diffusers({key: True}, 256)
    with pytest.raises(UsageError, match=r"scheduler is a DDIMScheduler; a flow needs a FlowMatchEuler"):
        flow_from_diffusers({**SD15, "_class_name": "DDIMScheduler"}, 256)


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 0}, {"shift": -1}, {"shift": math.nan}, {"shift": 1e9}, {"shift": "3"}, {"num_train_timesteps": 0},
        {"shift_terminal": 1.0}, {"shift_terminal": 2}, {"shift_terminal": -0.5}, {"shift_terminal": "x"},
        {**DYNAMIC, "max_shift": 1e4}, {**DYNAMIC, "max_shift": -1e4}, {**DYNAMIC, "max_image_seq_len": 256},
        {**DYNAMIC, "base_shift": None}, {**DYNAMIC, "time_shift_type": "cubic"},
        {**DYNAMIC, "time_shift_type": "linear", "max_shift": -3, "base_shift": -3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("evenly", [False, True])
def test_values_by_which_times_do_not_fall_are_named(config, evenly):
    key, value = list(config.items())[-1]
    with pytest.raises(UsageError, match=rf"Scheduler has times that do not fall from 1 to 0, by .*{key}={value!r}"):
        flow_from_diffusers(config, 1024, evenly)


def test_a_flow_has_one_grid_beside_uniform_times():
    schedule = FlowSchedule(shift=3.0)
    torch.testing.assert_close(schedule.grid(4, "uniform"), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    with pytest.raises(UsageError, match=r"sampler\.spacing: a flow's scheduler has no trailing times: set it to null"):
        schedule.grid(4, "trailing")
    with pytest.raises(UsageError, match=r"sampler\.spacing: log_snr is infinite"):
        schedule.grid(4, "log_snr")
    with pytest.raises(UsageError, match=r"sampler\.steps: must be at least 1, got 0"):
        schedule.grid(0)


def test_the_action_of_a_velocity_is_the_score_of_the_noise_that_was_added():
    """And where there is no signal the denoised prediction, x - v."""
    schedule, t = FlowSchedule(), torch.tensor([1.0, 0.999, 0.5, 1e-3], dtype=torch.float64)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha, sigma = (c(t)[:, None] for c in (schedule.alpha, schedule.sigma))
    x = alpha * x0 + sigma * eps
    action = schedule.score(eps - x0, x, t)
    torch.testing.assert_close(action[0], x0[0])
    torch.testing.assert_close(action[1:], (-eps / sigma)[1:])
    torch.testing.assert_close(x0_from_score(action, x, alpha, sigma), x0)
