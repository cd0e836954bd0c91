"""What is said before the first epoch, and what it refuses."""

import dataclasses

import pytest
import torch
from helpers import ALGORITHMS, ROOT, run_python, toy_words

import condrl
import condrl.training.memory as memory
from condrl import RunError, UsageError
from condrl.loading import load_config
from condrl.prompts import Row, load_prompts
from condrl.rewards.scoring import make_reward
from condrl.training.build import make_trainer
from condrl.training.preflight import attempt, preflight, typical
from condrl.training.trainer import Trainer

FINETUNE = str(ROOT / "scripts" / "finetune.py")


def make(*words: str) -> Trainer:
    config = load_config(list(words))
    torch.manual_seed(0)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_trial_leaves_no_trace_and_counts_what_an_epoch_calls(name, tmp_path):
    words = [*toy_words(name, tmp_path / "run"), "train.epochs=2"]
    (tmp_path / "run").mkdir()
    trainer, other = make(*words), make(*words)
    trial = attempt(trainer)
    assert trainer.policy.model.evaluations == 0
    trainer.config.run.check_ratios = other.config.run.check_ratios = False
    trainer.run_epoch(0)
    other.run_epoch(0)
    for mine, theirs in zip(trainer.learner.parameters, other.learner.parameters, strict=True):
        assert torch.equal(mine, theirs)
    images = trainer.config.images_per_epoch
    expected, found = images * (trial.calls_to_gather + trial.calls_to_learn), trainer.policy.model.evaluations
    if trainer.algorithm.calls_evenly:
        assert expected == found
    else:  # each image draws how many steps are differentiated, uniformly among K: 4 standard errors of both means
        steps = trainer.policy.steps
        tried = 2 * trial.images
        error = ((steps**2 - 1) / 12 * (1 / tried + 1 / images)) ** 0.5
        assert trial.calls_to_gather == steps
        assert expected / images == pytest.approx(found / images, abs=4 * error)
    assert trial.needs.learn.gb(1) > 0


def test_calls_with_some_steps_of_each_image(tmp_path):
    words = [
        *toy_words("ddpo", tmp_path),
        "algorithm.advantage=group",
        "train.steps_per_image=2",
        "run.check_ratios=false",
    ]
    trainer = make(*words)
    trial = attempt(trainer)
    trainer.run_epoch(0)
    images = trainer.config.images_per_epoch
    assert images * (trial.calls_to_gather + trial.calls_to_learn) == trainer.policy.model.evaluations == images * 7


def test_a_long_chain_is_tried_in_part(tmp_path, monkeypatch):
    """Some pairs of early and late steps are differentiated, and the calls of all are counted."""
    trainer, seen = make(*toy_words("ddpo", tmp_path), "sampler.steps=60", "run.check_ratios=false"), []
    loss = trainer.algorithm.loss

    def noted(self, policy, batch):
        seen.append(batch.k)
        return loss(policy, batch)

    monkeypatch.setattr(type(trainer.algorithm), "loss", noted)
    trial = attempt(trainer)
    assert len(seen) <= 5
    steps = torch.cat(seen)
    assert steps.min() < 10
    assert steps.max() > 40
    assert trial.calls_to_learn == 60


def test_the_sentences(tmp_path, monkeypatch):
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", "algorithm.kappa=0.5")
    lines = preflight(trainer)
    assert lines[0] == (
        "an epoch: 1 prompts x 512 images = 512 images, 24 steps each; 2 updates of 256 images; about 49,152 network "
        "calls. 300 epochs: 153,600 images, 600 updates"
    )
    assert "GB are free" in lines[1]
    assert "warning" not in " ".join(lines)
    monkeypatch.setattr(memory, "free_gb", lambda device: 1e-6)
    assert "may not be enough: lower train.loss_batch" in preflight(trainer)[1]


def test_a_kl_without_a_gradient_is_refused(tmp_path, monkeypatch):
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", "algorithm.kappa=0.5")
    whole = trainer.policy.transition

    def cut(x, k, condition, memory=None):
        transition = whole(x, k, condition, memory)
        return dataclasses.replace(transition, mean=transition.mean.detach() + 0 * trainer.learner.weights[0].sum())

    assert attempt(trainer).kl_gradient > 0
    monkeypatch.setattr(trainer.policy, "transition", cut)
    with pytest.raises(RunError, match="it has no gradient"):
        preflight(trainer)


def test_a_flat_reward_is_pointed_out(tmp_path):
    flat = ["rewards.quadratic.linear=[0]", "rewards.quadratic.curvature=[0]"]
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", *flat)
    assert "warning: the reward is the same for the 4 images tried of each prompt" in preflight(trainer)


def test_a_reward_that_some_prompts_lack_is_pointed_out(tmp_path):
    @condrl.reward(name="lacking")
    def lacking(samples, prompts):
        named = torch.tensor([prompt != "far left" for prompt in prompts])
        return samples[:, 0].where(named, float("nan"))

    words = ["rewards.quadratic.weight=0", "rewards.lacking.weight=1", f"run.dir={tmp_path}"]
    lines = preflight(make(str(ROOT / "configs" / "toy" / "p1.yaml"), *words))
    assert any(line.startswith("warning: the reward 'lacking' failed for the prompt") for line in lines)


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path):
    done = run_python(FINETUNE, *toy_words("nft", tmp_path / "run"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 prompts x 8 images = 16 images" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reward_that_fails_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "nan.py").write_text(
        "import condrl\n\n\n@condrl.reward\ndef broken(samples, prompts):\n    return samples[:, 0] * float('nan')\n"
    )
    more = [f"plugins=[{tmp_path / 'nan.py'}]", "rewards.quadratic.weight=0", "rewards.broken.weight=1"]
    done = run_python(FINETUNE, *toy_words("nft", tmp_path / "run"), *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: the reward 'broken' failed for the prompt" in done.stderr
    assert "(8 of the 8 images tried have no score)" in done.stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- rewards


@condrl.reward
def of_a_label(samples, prompts, metadata):
    return samples[:, 0] * torch.tensor([float(row["label"]) for row in metadata])


@condrl.reward
class Counted:
    """What it was asked is remembered; it is its state, too."""

    def __init__(self):
        self.prompts, self.loads = [], 0

    def __call__(self, samples, prompts):
        self.prompts += prompts
        return samples[:, 0] + len(self.prompts)

    def load(self):
        self.loads += 1

    def state_dict(self):
        return {"prompts": self.prompts}

    def load_state_dict(self, state):
        self.prompts = list(state["prompts"])


def toy(folder, *words: str) -> Trainer:
    return make(*toy_words("nft", folder), *words)


def labelled_rows(count: int, lacking: int | None = None) -> list[Row]:
    return [Row(i, f"prompt {i}", {} if i == lacking else {"label": 1}) for i in range(count)]


@pytest.mark.parametrize("lacking", [0, 3, 70, 999])
def test_a_heldout_row_without_what_a_measure_reads_is_found(tmp_path, lacking):
    """Wherever it stands in the file: one row of each set of keys is tried."""
    trainer, measure = toy(tmp_path), make_reward("of_a_label", {})
    preflight(trainer, labelled_rows(1000), [measure])
    with pytest.raises(UsageError) as error:
        preflight(trainer, labelled_rows(1000, lacking), [measure])
    place = f"row {lacking + 1} of its prompts, 'prompt {lacking}', has none"
    assert str(error.value) == f"the reward 'of_a_label' needs 'label' in each prompt's metadata, and {place}"


def test_a_row_of_the_training_prompts_without_it_is_found_too(tmp_path):
    """Although the first epoch draws others."""
    trainer = toy(tmp_path)
    trainer.rewards = [make_reward("of_a_label", {"weight": 1.0})]
    known = trainer.rows[0].prompt
    trainer.rows = [Row(i, known, {"label": 1}) for i in range(500)]
    preflight(trainer)
    trainer.rows[499] = Row(499, known, {"k": 2})
    with pytest.raises(UsageError, match=f"row 500 of its prompts, '{known}', has 'k'"):
        preflight(trainer)


def test_a_prompt_that_a_measure_cannot_read_is_found(tmp_path):
    def reads_stars_only(samples, prompts):
        if not all("star" in prompt for prompt in prompts):
            raise ValueError("a prompt without a star")
        return samples[:, 0]

    condrl.reward(reads_stars_only)
    rows = [Row(i, "a star") for i in range(50)]
    preflight(toy(tmp_path), rows, [make_reward("reads_stars_only", {})])
    rows[40] = Row(40, "a circle")
    with pytest.raises(
        UsageError, match="'reads_stars_only' failed for the prompt 'a star': ValueError: a prompt without"
    ):
        preflight(toy(tmp_path), rows, [make_reward("reads_stars_only", {})])


def test_scores_that_fail_are_said_when_most_do(tmp_path):
    failing = set()
    condrl.reward(
        lambda samples, prompts: torch.tensor([float("nan") if p in failing else 1.0 for p in prompts]),
        name="fails_for",
    )
    rows, measure = labelled_rows(10), make_reward("fails_for", {})
    failing |= {row.prompt for row in rows[:5]}
    preflight(toy(tmp_path), rows, [measure])
    failing.add(rows[5].prompt)
    with pytest.raises(UsageError, match=r"'fails_for' failed for the prompt 'prompt 0': .* \(6 of the 10 rows tried"):
        preflight(toy(tmp_path), rows, [measure])


def test_a_reward_that_raises_is_bad_input_in_the_trial(tmp_path):
    condrl.reward(lambda samples, prompts: samples @ torch.zeros(7), name="wrong_shape")
    trainer = toy(tmp_path)
    trainer.rewards = [make_reward("wrong_shape", {})]
    with pytest.raises(UsageError, match="the reward 'wrong_shape' failed for the prompt .*: RuntimeError: "):
        preflight(trainer)


def test_the_trial_loads_rewards_and_leaves_their_state(tmp_path):
    trainer, measure = toy(tmp_path), make_reward("counted", {})
    trainer.rewards = [make_reward("counted", {"weight": 1.0})]
    tried = trainer.rewards[0].call
    tried.prompts = ["before"]
    drawn = torch.get_rng_state()
    preflight(trainer, labelled_rows(5), [measure])
    assert (tried.loads, tried.prompts) == (1, ["before"])
    assert (measure.call.loads, measure.call.prompts) == (1, [])
    assert torch.equal(torch.get_rng_state(), drawn)


class Forgetful:
    """A reward whose state no checkpoint can hold."""

    def __call__(self, samples, prompts):
        return samples[:, 0]

    def state_dict(self):
        return {"seen": {1, 2}}


def test_a_rewards_state_that_cannot_be_saved_is_found_in_the_trial(tmp_path):
    condrl.reward(Forgetful, name="forgetful")
    with pytest.raises(UsageError, match="the state_dict of the reward 'forgetful' cannot be saved"):
        attempt(toy(tmp_path, "rewards.forgetful.weight=1"))


def test_rewards_whose_sum_is_not_finite_are_told_so(tmp_path):
    condrl.reward(lambda samples, prompts: 1e30 * samples[:, 0], name="huge")
    with pytest.raises(RunError, match="the weighted sum of the rewards is not finite: lower their weights"):
        attempt(toy(tmp_path, "rewards.huge.weight=1e10"))


def test_which_rows_are_tried():
    rows = [Row(i, "p", {"a": 1} | ({"b": 1} if i % 2 else {}) | ({"c": 1} if i == 90 else {})) for i in range(100)]
    assert [row.index for row in typical(rows, 4)] == [0, 1, 2, 90]
    assert typical(rows, 100) == rows
    assert typical([], 4) == []


def test_a_dear_reward_is_asked_about_few_rows(tmp_path):
    asked = []
    condrl.reward(lambda samples, prompts: asked.extend(prompts) or torch.ones(len(prompts)), name="dear", cached=True)
    preflight(toy(tmp_path), labelled_rows(30), [make_reward("dear", {})])
    assert asked == ["prompt 0", "prompt 1"]


@pytest.mark.slow
def test_a_dry_run_with_a_file_that_cannot_be_read_is_bad_input(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    config = ["rewards.clip.weight=1", "rewards.clip.model=ViT-B-32", f"rewards.clip.weights={tmp_path / 'w.pt'}"]
    done = run_python(FINETUNE, *toy_words("nft", tmp_path / "run"), *config, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert (
        said
        == f"error: config rewards.clip.weights: {tmp_path / 'w.pt'} is a Git LFS pointer, not the file: run git lfs pull"
    )
    assert "Traceback" not in done.stderr
