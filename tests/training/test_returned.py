"""Plugins that fail, or return something else than they should: each is one line before the run."""

import dataclasses
import errno
from typing import Any

import pytest
import torch
from helpers import ROOT, toy_trainer
from torch import Tensor, nn

import condrl
from condrl import RunError, UsageError
from condrl.algorithms.base import Algorithm, OwnNetwork
from condrl.algorithms.examples import Examples, per_image, per_step
from condrl.diffusion.schedule import OU
from condrl.diffusion.transition import Coefficients, Sampler, Transition
from condrl.loading import load_config
from condrl.plugins.models.mixture import Mixture
from condrl.prompts import load_prompts
from condrl.training.build import make_measures, make_sampler, make_trainer
from condrl.training.checks import check_combination
from condrl.training.preflight import attempt, preflight


def raising(error: BaseException):
    def change(value: Any) -> Any:
        raise error

    return change


# ---------------------------------------------------------------------------------------------- samplers

STEPS = {  # (times, x, what is returned) -> what is returned instead
    "right": (lambda found: found, None),
    "one std": (lambda found: dataclasses.replace(found, std=torch.tensor(0.1, dtype=torch.float64)), None),
    "a number as std": (lambda found: dataclasses.replace(found, std=0.1), "step 0 has a std of type float"),
    "std (B,)": (
        lambda found: dataclasses.replace(found, std=torch.ones(2)),
        r"step 0 has a std of shape \(2,\) in float32 for states of shape \(2, 3\) in float32: it should be one number",
    ),
    "std (B, 1)": (
        lambda found: dataclasses.replace(found, std=torch.ones(2, 1)),
        r"std of shape \(2, 1\) in float32 for states of shape \(2, 4, 2, 3\)",
    ),
    "std in float64": (
        lambda found: dataclasses.replace(found, std=torch.ones_like(found.mean).double()),
        r"std of shape \(2, 3\) in float64",
    ),
    "a narrow mean": (lambda found: dataclasses.replace(found, mean=found.mean[:, :1]), r"a mean of shape \(2, 1\)"),
    "a mean in float64": (lambda found: dataclasses.replace(found, mean=found.mean.double()), "in float64 for states"),
    "no mean": (lambda found: dataclasses.replace(found, mean=None), "a mean of type NoneType"),
    "nan": (lambda found: dataclasses.replace(found, mean=found.mean * torch.nan), "not finite"),
    "no noise": (lambda found: dataclasses.replace(found, std=0 * found.std), "step 0 has noise by `stochastic`"),
    "raises": (raising(IndexError("broken")), "the sampler 'stepping' failed when it was made: IndexError: broken"),
    "leaves": (raising(SystemExit(3)), "the sampler 'stepping' failed when it was made: SystemExit: 3"),
}


@dataclasses.dataclass(frozen=True)
class Stepping(Sampler):
    schedule: Any
    times: Tensor
    error: str = "right"
    states: tuple[Any, Any] = (None, None)

    @property
    def stochastic(self):
        if self.error == "a list":
            return [True] * (len(self.times) - 1)
        return torch.ones(len(self.times) - 1, dtype=torch.bool)

    def init(self, x):
        return self.states[0]

    def step(self, k, x, model, state=None):
        action = model(x, self.times[k])
        std = torch.full((len(x), *(1,) * (x.dim() - 1)), 0.1)
        found = Transition(0.9 * x + 0.1 * action, std, action, x)
        return STEPS.get(self.error, STEPS["right"])[0](found), self.states[1]


@condrl.sampler
def stepping(schedule, times, *, error: str = "right"):
    return Stepping(schedule, times, error)


def made(name: str, **options: Any) -> Sampler:
    return make_sampler({"name": name, "steps": 5, "spacing": "uniform", **options}, OU())


@pytest.mark.parametrize("error", STEPS)
def test_a_step_returns_a_distribution_of_states(error):
    said = STEPS[error][1]
    if said is None:
        assert isinstance(made("stepping", error=error), Sampler)
        return
    with pytest.raises(UsageError, match=said):
        made("stepping", error=error)


def test_which_steps_have_noise_is_a_tensor():
    with pytest.raises(UsageError, match="stochastic should be a tensor of 5 bools"):
        made("stepping", error="a list")


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ((None, torch.ones(2, 3)), "init and step should both return a solver state, or both None"),
        ((torch.ones(2, 3), None), "init and step should both return a solver state, or both None"),
        (([0], [0]), "its solver state is type list for states of shape"),
        ((torch.ones(2, 3), torch.ones(2)), r"its solver state is shape \(2,\) in float32 for states of shape"),
    ],
)
def test_a_solver_state_is_one_of_the_states(states, said):
    condrl.sampler(lambda schedule, times: Stepping(schedule, times, states=states), name="remembering")
    with pytest.raises(UsageError, match=said):
        made("remembering")


def test_a_sampler_keeps_the_times_that_it_was_given():
    def other_times(schedule, times):
        ones = torch.ones(3, dtype=torch.float64)
        return Coefficients(schedule, times[[0, 1, 2, 5]], ones, ones, ones)

    condrl.sampler(other_times)
    with pytest.raises(UsageError, match="the sampler other_times has other times than it was given"):
        made("other_times")


# ---------------------------------------------------------------------------------------------- models

MODELS = {  # what is changed, into what, and what is said
    "right": ("", lambda value: value, None),
    "a narrow score": (
        "score",
        lambda value: value[:, :1],
        r"a score of shape \(2, 1\) in float32 for states of .*2, 2",
    ),
    "a sum": ("score", lambda value: value.sum(1), r"the model mistaken has a score of shape \(2,\)"),
    "float64": ("score", lambda value: value.double(), r"shape \(2, 2\) in float64 for states of shape"),
    "none": ("score", lambda value: None, "a score of type NoneType"),
    "nan": ("score", lambda value: value * torch.nan, "a score that is not finite, before any update"),
    "raises": ("score", raising(ValueError("lost")), "^the model 'mistaken' failed: ValueError: lost$"),
    "no encoding": ("encode", raising(KeyError("p")), "^the model 'mistaken' failed: KeyError: 'p'$"),
    "a wide image": ("decode", lambda value: value.repeat(1, 2), r"decodes to shape \(2, 4\) in float32, and by its"),
    "no start": ("init", raising(OSError("no file")), "the model 'mistaken' failed when it was made: OSError: no file"),
    "no module": ("init", lambda value: delattr(value, "module"), "the model mistaken has no module: it should have"),
    "no schedule": ("init", lambda value: delattr(value, "schedule"), "the model mistaken has no schedule"),
    "a number": (
        "init",
        lambda value: setattr(value, "state_shape", 2),
        "state_shape should be a Sequence, and is a int",
    ),
}


@condrl.model(name="mistaken")
class MistakenModel(Mixture):
    def __init__(self, device, *, distributions: dict[str, Any], schedule: str = "ou", error: str = "right"):
        self.where, self.change, _ = MODELS[error]
        super().__init__(device, distributions=distributions, schedule=schedule, correction="affine")
        self.at("init", self)

    def at(self, where: str, value: Any) -> Any:
        return self.change(value) if where == self.where else value

    def encode(self, prompts):
        return self.at("encode", super().encode(prompts))

    def predict(self, x, t, condition):
        return self.at("score", super().predict(x, t, condition))

    def decode(self, x):
        return self.at("decode", x)


@pytest.mark.parametrize("error", MODELS)
def test_a_model_that_is_mistaken_is_named(error, tmp_path):
    said = MODELS[error][2]
    toy = load_config(
        [str(ROOT / "configs" / "toy" / "plane.yaml"), f"run.dir={tmp_path}", "train.images_per_prompt=8"]
    )
    distributions = toy.model["distributions"]
    config = dataclasses.replace(toy, model={"name": "mistaken", "error": error, "distributions": distributions})

    def tried() -> None:
        attempt(make_trainer(config, load_prompts(config.prompts.train, "prompts.train")))

    if said is None:
        tried()
        return
    with pytest.raises(UsageError, match=said):
        tried()


def test_a_model_that_is_none_is_refused(tmp_path):
    condrl.model(lambda device: None, name="nothing")
    config = load_config([str(ROOT / "configs" / "toy" / "plane.yaml"), f"run.dir={tmp_path}"])
    config.model = {"name": "nothing"}
    with pytest.raises(UsageError, match="the model nothing has no schedule"):
        make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


# ---------------------------------------------------------------------------------------------- algorithms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Examples):
    weight: Tensor = per_image()
    t: Tensor = per_step()


def replaced(**changes: Any):
    return lambda found: dataclasses.replace(found, **{name: change(found) for name, change in changes.items()})


def metric(name: Any, value: Any):
    return lambda returned: (returned[0], {name: value(returned[0].detach())})


ALGORITHMS = {  # what is changed, into what, and what is said
    "right": ("", None, None),
    "setup": ("setup", raising(ZeroDivisionError("x")), "^the algorithm 'erring' failed: ZeroDivisionError: x$"),
    "networks": ("networks", lambda value: nn.Linear(2, 2), "^the algorithm 'erring' failed: AttributeError: "),
    "rollout": ("rollout", raising(KeyError("r")), "^the algorithm 'erring' failed: KeyError: 'r'$"),
    "no rollout": (
        "rollout",
        lambda value: None,
        "rollout returned a NoneType, not a condrl.diffusion.rollout.Rollout",
    ),
    "a short rollout": ("rollout", lambda value: value.first(2), "rollout returned 2 trajectories for 8 images"),
    "nothing collected": (
        "collect",
        lambda value: None,
        "collect returned a NoneType, not what context.score returned",
    ),
    "credit": ("credit", raising(ValueError("w")), "^the algorithm 'erring' failed: ValueError: w$"),
    "no examples": ("examples", lambda value: None, "the algorithm's examples returned a NoneType"),
    "a list": (
        "examples",
        replaced(k=lambda found: [0, 1]),
        r"k is type list: it should be the steps \(n,\), as int64",
    ),
    "floats": ("examples", replaced(k=lambda found: found.k.float()), r"k is shape \(2,\) in float32"),
    "a step too many": ("examples", replaced(k=lambda found: torch.arange(3)), "t has 2 rows, and k has the step 2"),
    "a weight too few": (
        "examples",
        replaced(weight=lambda found: found.weight[:-1]),
        r"weight is shape \(7,\) in float32: it should be a tensor \(B, ...\) of 8 images",
    ),
    "steps for images": (
        "examples",
        replaced(t=lambda found: found.t.T),
        r"t is shape \(8, 2\) in float32: it should be a tensor \(K, B, ...\) of 8 images",
    ),
    "a float to log": (
        "examples",
        replaced(metrics=lambda found: {"share": 0.5}),
        "the algorithm's metric 'share' is a float: it should be a tensor",
    ),
    "images to log": (
        "examples",
        replaced(metrics=lambda found: {"share": found.weight[:2]}),
        r"'share' is shape \(2,\)",
    ),
    "a value of each image": ("examples", replaced(metrics=lambda found: {"share": found.weight}), None),
    "loss": ("loss", raising(ZeroDivisionError("x")), "^the algorithm 'erring' failed: ZeroDivisionError: x$"),
    "loss leaves": ("loss", raising(SystemExit("bye")), "^the algorithm 'erring' failed: SystemExit: bye$"),
    "metrics in a list": ("loss", lambda found: (found[0], [found[0]]), "the algorithm's metrics are a list"),
    "the run's epoch": ("loss", metric("epoch", Tensor.mean), "'epoch' has a name that a run records itself"),
    "the run's reward": ("loss", metric("reward/total", Tensor.mean), "'reward/total' has a name that a run records"),
    "no text": ("loss", metric(3, Tensor.mean), "has a metric named 3, a int: it should be text"),
    "a matrix": ("loss", metric("m", lambda loss: loss[:, None]), r"'m' is shape \(1, 1\) .* one number, or \(1,\)"),
    "a value of each": ("loss", metric("m", lambda loss: loss), None),
    "nan": (
        "loss",
        lambda found: (found[0] * torch.nan, {}),
        "loss is not finite at the base model, before any update",
    ),
    "a steep loss": (
        "loss",
        lambda found: ((0 * found[0]).sqrt(), {}),
        "a gradient that is not finite at the base model",
    ),
    "its own loss": (
        "own_loss",
        Tensor.mean,
        r"the algorithm's own_loss\('own'\) has shape \(\) for 2 pairs: it should",
    ),
    "its own loss raises": ("own_loss", raising(KeyError("o")), "^the algorithm 'erring' failed: KeyError: 'o'$"),
    "after": ("after_update", raising(TypeError("a")), "^the algorithm 'erring' failed: TypeError: a$"),
    "state": ("state_dict", raising(TypeError("s")), "^the algorithm 'erring' failed: TypeError: s$"),
    "no way back": ("load_state_dict", raising(KeyError("n")), "^the algorithm 'erring' failed: KeyError: 'n'$"),
    "another state": ("state_dict", lambda state: {"other": 1}, "^the algorithm 'erring' failed: KeyError: 'seen'$"),
}


@condrl.algorithm
@dataclasses.dataclass(kw_only=True)
class Erring(Algorithm):
    """Weights actions; what `error` names goes wrong."""

    error: str = "right"

    def at(self, where: str, value: Any) -> Any:
        place, change, _ = ALGORITHMS[self.error]
        return change(value) if where == place else value

    def setup(self, policy):
        self.own = nn.Linear(1, 1)
        self.at("setup", None)

    def networks(self):
        return self.at("networks", {"own": OwnNetwork(self.own, lr=1e-3, extra_steps=self.error.startswith("its own"))})

    def collect(self, context, rows):
        return self.at("collect", super().collect(context, rows))

    def rollout(self, policy, condition, noise, batch):
        return self.at("rollout", super().rollout(policy, condition, noise, batch))

    def examples(self, policy, experience, train, noise):
        weight = experience.credit(lambda rewards, groups: self.at("credit", rewards), experience.scores.total)
        found = Weighted(
            condition=experience.rollout.condition,
            k=torch.arange(2),
            weight=weight.where(experience.scored, torch.nan),
            t=torch.ones(2, len(weight)),
        )
        return self.at("examples", found)

    def loss(self, policy, batch):
        action = policy.action(torch.zeros(len(batch.k), 1), batch.k, batch.condition)[:, 0]
        return self.at("loss", (batch.weight * action, {}))

    def own_loss(self, name, policy, batch):
        return self.at("own_loss", self.own(batch.weight[:, None])[:, 0])

    def after_update(self, policy):
        self.at("after_update", None)

    def state_dict(self):
        return self.at("state_dict", {"seen": 1})

    def load_state_dict(self, state):
        self.at("load_state_dict", state["seen"])


@pytest.mark.parametrize("error", ALGORITHMS)
def test_an_algorithm_that_errs_is_one_line(error, tmp_path):
    said = ALGORITHMS[error][2]
    if said is None:
        attempt(toy_trainer("erring", tmp_path, f"algorithm.error={error}"))
        return
    with pytest.raises(UsageError, match=said) as refused:
        attempt(toy_trainer("erring", tmp_path, f"algorithm.error={error}"))
    assert "\n" not in str(refused.value)


def test_needs_that_fail_are_one_line(tmp_path):
    class Needy(Erring):
        @property
        def needs(self):
            return (raising(ZeroDivisionError("n")),)

    condrl.algorithm(Needy, name="needy")
    words = [str(ROOT / "configs" / "toy" / "p1.yaml"), "algorithm.name=needy", f"run.dir={tmp_path}"]
    with pytest.raises(UsageError, match="^the algorithm 'needy' failed: ZeroDivisionError: n$"):
        check_combination(load_config(words))
    with pytest.raises(UsageError, match="^the algorithm 'needy' failed: ZeroDivisionError: n$"):
        toy_trainer("needy", tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), OSError(errno.ENOSPC, "full")])
def test_nobody_is_blamed_for_the_machine(error, tmp_path, monkeypatch):
    monkeypatch.setattr(Erring, "loss", raising_always(error))
    with pytest.raises(type(error)) as found:
        attempt(toy_trainer("erring", tmp_path))
    assert found.value is error


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        (lambda rows: {"own": torch.ones(len(rows))}, None),
        (lambda rows: {"own": 0.5}, r"measure 'own' is type float: it should be a value of each row, \(2,\)"),
        (
            lambda rows: {"quadratic": torch.ones(len(rows))},
            "'quadratic' has the name of a reward that is measured too",
        ),
        (lambda rows: [0.5], "the algorithm's measures are a list"),
        (lambda rows: {1: torch.ones(len(rows))}, "a metric named 1, a int"),
        (lambda rows: rows[9], "^the algorithm 'erring' failed: IndexError: list index out of range$"),
    ],
)
def test_what_an_algorithm_measures_itself_is_tried(measures, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Erring, "measures", lambda self, policy, rows, name, train: measures(rows))
    trainer = toy_trainer("erring", tmp_path)
    if said is None:
        preflight(trainer, trainer.rows, make_measures(trainer.config))
        return
    with pytest.raises(UsageError, match=said):
        preflight(trainer, trainer.rows, make_measures(trainer.config))


def raising_always(error: Exception):
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_the_loss_of_an_image_without_a_score_may_be_anything(tmp_path):
    """Nothing is learned from it; here it is nan for half of the images."""

    def every_other(samples, prompts):
        return samples[:, 0].where(torch.arange(len(samples)) % 2 == 0, torch.nan)

    condrl.reward(every_other)
    trainer = toy_trainer("erring", tmp_path, "rewards.quadratic.weight=0", "rewards.every_other.weight=1")
    assert not attempt(trainer).collected.scored.all()


def test_the_mean_of_a_metric_is_recorded(tmp_path, monkeypatch):
    """Of the pairs, as of the loss, or of the images."""
    trainer = toy_trainer("erring", tmp_path, "algorithm.error=a value of each", "train.loss_batch=3")
    line = trainer.run_epoch(0)
    assert line["m"] == line["loss"] != 0
    trainer = toy_trainer("erring", tmp_path / "images", "algorithm.error=a value of each image")
    line = trainer.run_epoch(0)
    assert line["share"] == pytest.approx(line["reward/total"])


LATER = {  # what goes wrong after the trial: what loss does then, and what is said
    "raises": (raising(KeyError("late")), "the algorithm or the model failed in epoch 2: KeyError: 'late'"),
    "leaves": (raising(SystemExit("bye")), "failed in epoch 2: SystemExit: bye; with CONDRL_DEBUG=1"),
    "no loss": (lambda returned: None, "the algorithm's loss should return two things"),
    "a float": (metric("share", lambda loss: 0.5), "the algorithm's metric 'share' is a float"),
    "a name of the run's": (metric("epoch", lambda loss: loss.mean()), "'epoch' has a name that a run records itself"),
}  # fmt: skip


@pytest.mark.parametrize("later", LATER)
def test_what_an_algorithm_does_wrong_after_the_trial_stops_the_run_in_a_line(later, tmp_path):
    trainer, (change, message) = toy_trainer("rwr", tmp_path), LATER[later]
    trainer.run_epoch(0)
    right = trainer.algorithm.loss
    trainer.algorithm.loss = lambda policy, batch: change(right(policy, batch))
    with pytest.raises(RunError, match=message):
        trainer.run_epoch(1)
    assert len(trainer.recorder.lines) == 1


def test_a_metric_that_is_there_now_and_then_is_its_mean_where_it_is(tmp_path):
    trainer = toy_trainer("rwr", tmp_path)
    right, calls = trainer.algorithm.loss, []

    def loss(policy, batch):
        calls.append(len(batch.k))
        return right(policy, batch)[0], {"rare": torch.tensor(3.0)} if len(calls) == 1 else {}

    trainer.algorithm.loss = loss
    assert trainer.run_epoch(0)["rare"] == pytest.approx(3)
    assert len(calls) > 1
