"""Diffusion-DPO, which rolls nothing out and asks no reward, against its definition and on a toy."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from helpers import ROOT, toy_words

from condrl import UsageError
from condrl.commands import finetune
from condrl.diffusion.noise import seeded
from condrl.diffusion.rollout import rollout, sample
from condrl.diffusion.transition import Gaussian
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.rewards.pixels import to_pil
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock

G1 = [str(ROOT / "configs" / "toy" / "g1.yaml"), "algorithm.name=diffusion_dpo", "rewards.quadratic=null"]
G1 += ["train.prompts_per_epoch=512", "train.images_per_prompt=1", "train.rollout_batch=512", "algorithm.draws=24"]


def trainer_of(words):
    config = load_config(words)
    check_combination(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


def preferences(path, count=4000):
    """Pairs of draws of N(1, .49) of which x is preferred to y with odds exp(.9 (x - y))."""
    generator = torch.Generator().manual_seed(0)
    draws = 1 + 0.7 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    first = torch.rand(count, generator=generator) < torch.sigmoid(0.9 * (draws[:, 0] - draws[:, 1]))
    better, worse = draws.where(first[:, None], draws.flip(1)).T.tolist()
    rows = [{"prompt": "g1", "better": [b], "worse": [w]} for b, w in zip(better, worse, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"prompts.train={path}"


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_pairs_alone_find_the_tilted_distribution(kappa, tmp_path, monkeypatch):
    """p exp(r / kappa) of the reward behind the preferences: the mean moves by .9 * .49 / kappa."""
    words = [*G1, preferences(tmp_path / "pairs.jsonl"), f"algorithm.kappa={kappa}", "train.epochs=200"]
    trainer = trainer_of([*words, f"run.dir={tmp_path}/run"])
    monkeypatch.setattr("condrl.algorithms.base.rollout", None)  # there is none
    trainer.fit()
    final = rollout(trainer.policy, torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0), 20_000)
    moved = final.samples.mean().item() - 0.945  # where the pretrained chain ends
    assert moved == pytest.approx(0.441 / kappa, rel=0.15)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("reward" in key or key in ("diversity", "flat_groups", "path_kl") for key in lines[-1])
    assert all(line["diagnosis"] == [] for line in lines)
    assert lines[-1]["implicit_accuracy"] > 0.6
    assert lines[0]["network_calls"] == 512 * 24 * 2 * 2  # both sides of each draw, by the base and by the policy


@pytest.mark.slow
def test_held_out_pairs_are_measured_while_it_runs(tmp_path):
    """Without a reward or a measure; the order of a pair is what counts, and before the first update there is none."""
    train, heldout = preferences(tmp_path / "pairs.jsonl", 512), tmp_path / "heldout.jsonl"
    preferences(heldout, 300)
    words = [*G1, train, f"prompts.heldout={heldout}", f"run.dir={tmp_path}/run", "train.loss_batch=200"]
    words += ["train.epochs=8", "algorithm.draws=4", "evaluate.every=4", "train.lr=1e-2", "train.updates_per_epoch=8"]
    assert finetune.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before = {name: value for name, value in result["before"].items() if not name.endswith("_ci95")}
    assert before == {"heldout/implicit_accuracy": 0.5, "heldout/implicit_margin": 0.0}
    found = result["heldout"]["implicit_accuracy"]
    assert (found["base"]["mean"], found["tuned"]["mean"]) == (0.5, lines[7]["heldout/implicit_accuracy"])
    assert found["difference"]["ci95"][0] > 0
    assert [line["epoch"] for line in lines if "heldout/implicit_accuracy" in line] == [4, 8]
    assert lines[7]["heldout/implicit_accuracy"] > 0.6
    assert lines[7]["heldout/implicit_margin"] > 0


@pytest.mark.parametrize("change", [{}, {"worse": None}], ids=["good", "bad"])
def test_held_out_pairs_are_measured_before_and_after_whatever_is_evaluated(change, tmp_path, capsys):
    """A bad one is named before anything is learned."""
    train, heldout = preferences(tmp_path / "pairs.jsonl", 64), tmp_path / "heldout.jsonl"
    preferences(heldout, 40)
    rows = [json.loads(line) for line in heldout.read_text().splitlines()]
    rows[3] = {key: value for key, value in (rows[3] | change).items() if value is not None}
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*G1, train, f"prompts.heldout={heldout}", f"run.dir={tmp_path}/run", "train.epochs=1"]
    assert finetune.main(words) == (2 if change else 0)
    if change:
        assert 'row 4 has no "worse"' in capsys.readouterr().err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["heldout"].keys() == {"implicit_accuracy", "implicit_margin"}
    assert "no held-out prompts" not in capsys.readouterr().out


def test_a_held_out_pair_turned_around_counts_the_other_way(tmp_path):
    trainer = trainer_of([*G1, preferences(tmp_path / "pairs.jsonl", 512), f"run.dir={tmp_path}/run", "train.epochs=1"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.learner.weights:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    rows = trainer.rows[:100]
    turned = [
        dataclasses.replace(row, metadata={"better": row.metadata["worse"], "worse": row.metadata["better"]})
        for row in rows
    ]

    def measured(some, batch):
        train = dataclasses.replace(trainer.config.train, loss_batch=batch)
        found = trainer.algorithm.measures(trainer.policy, some, "heldout", train)
        return {name: values.mean().item() for name, values in found.items()}

    found, other = measured(rows, 30), measured(turned, 1000)
    assert 0.2 < found["implicit_accuracy"] < 0.8
    assert other["implicit_accuracy"] == pytest.approx(1 - found["implicit_accuracy"], abs=1e-6)
    assert other["implicit_margin"] == pytest.approx(-found["implicit_margin"], rel=1e-3)
    with pytest.raises(UsageError, match=r'config prompts\.heldout: row 2 has no "worse"'):
        measured([rows[0], dataclasses.replace(rows[1], metadata={"better": [1.0]})], 30)
    assert measured([dataclasses.replace(row, metadata={}) for row in rows], 30) == {}


@pytest.mark.parametrize("weighting", ["path", "epsilon"])
def test_the_loss_is_its_definition(weighting, tmp_path):
    """Its terms are KLs of the true step, which knows where it ends, to the policy's own transition."""
    words = [*G1, preferences(tmp_path / "pairs.jsonl", 64), "train.prompts_per_epoch=64", "train.rollout_batch=64"]
    words += ["sampler.name=ddim", "algorithm.kappa=0.7", f"algorithm.weighting={weighting}", f"run.dir={tmp_path}/run"]
    trainer = trainer_of([*words, "train.epochs=1"])
    policy, algorithm = trainer.policy, trainer.algorithm
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.learner.weights:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    batch = examples.at(*examples.every_pair().unbind(1))
    loss, metrics = algorithm.loss(policy, batch)
    schedule, times = policy.model.schedule, policy.sampler.times
    alpha, sigma = schedule.alpha(times[batch.step])[:, None], schedule.sigma(times[batch.step])[:, None]
    steps = policy.sampler.stochastic.sum().item()

    def kl(side, reference):
        clean = batch.states[:, side].double()
        x = (alpha * clean + sigma * batch.noise.double()).float()
        true, _ = policy.sampler.step(batch.step, x, lambda y, t: (-batch.noise.double() / sigma).float())
        with policy.model.reference() if reference else torch.no_grad():
            ours = policy.transition(x, batch.step, batch.condition)
        nats = Gaussian(true.mean, true.std).kl(ours)
        if weighting == "path":
            return nats
        sampler, noisy = (
            policy.sampler,
            policy.sampler.stochastic,
        )  # the same total weight, alike for every step's noise
        path = (sampler.B**2 / (2 * sampler.S**2) / schedule.sigma(times[:-1]) ** 2)[noisy]
        own = (sampler.B**2 / (2 * sampler.S**2) / schedule.sigma(times[:-1]) ** 2)[batch.step]
        return nats * (path.mean() / own).float()

    with torch.no_grad():
        better, worse = (kl(side, True) - kl(side, False) for side in (0, 1))
    margin = 0.7 * steps * (better - worse)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin), rtol=2e-3, atol=2e-3)
    assert metrics["implicit_accuracy"].item() == pytest.approx((margin > 0).float().mean().item(), abs=0.01)
    assert margin.abs().mean() > 0.1


def test_before_the_first_update_nothing_is_preferred(tmp_path):
    trainer = trainer_of([*toy_words("diffusion_dpo", tmp_path)])
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    loss, _ = trainer.algorithm.loss(trainer.policy, examples.at(*examples.every_pair().unbind(1)))
    torch.testing.assert_close(loss, torch.full_like(loss, 0.6931472))


def test_whole_numbers_are_points_too(tmp_path):
    rows = [{"prompt": "left", "better": [1], "worse": [-2]}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = trainer_of([*toy_words("diffusion_dpo", tmp_path / "run"), f"prompts.train={tmp_path}/pairs.jsonl"])
    states = trainer.collect(0, Clock()).states
    assert states.dtype == torch.float32
    assert states[:, 0, 0].tolist() == [1.0, -2.0]


# ---------------------------------------------------------------------------------------------- images


def picture_pairs(folder, size=64, count=2):
    """Two pairs of noise, whose paths are relative to the file of the pairs."""
    (folder / "pictures").mkdir(parents=True)
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(count):
        for side in ("better", "worse"):
            to_pil(torch.rand(3, size, size, generator=generator)).save(folder / "pictures" / f"{i}_{side}.png")
        rows.append({"prompt": "a red star"} | {side: f"pictures/{i}_{side}.png" for side in ("better", "worse")})
    return rows


def image_words(folder, rows):
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["algorithm.name=diffusion_dpo", f"prompts.train={folder}/pairs.jsonl", f"run.dir={folder}/run"]
    words += ["train.prompts_per_epoch=2", "train.images_per_prompt=1", "train.updates_per_epoch=1", "train.epochs=2"]
    return [*words, "train.rollout_batch=2", "model.guidance=1", "model.lora_targets=[to_q]"]


def test_images_are_read_encoded_and_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = image_words(tmp_path / "there", picture_pairs(tmp_path / "there"))
    trainer = trainer_of(words)
    collected = trainer.collect(0, Clock())
    assert collected.states.shape == (2, 2, *trainer.policy.model.state_shape)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "there" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["diagnosis"] for line in lines] == [[], []]
    assert any(weight.any() for name, weight in trainer.policy.model.module.named_parameters() if "lora_B" in name)


def test_a_folder_of_pairs_is_the_file_of_pairs(tmp_path):
    """The same states and prompts, whether a line of a file names the images or their folders do."""
    rows = picture_pairs(tmp_path / "file")
    for i, side in itertools.product(range(2), ("better", "worse")):
        target = tmp_path / "folder" / side / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "file" / "pictures" / f"{i}_{side}.png", target)
    for i in range(2):
        (tmp_path / "folder" / "better" / f"{i}.txt").write_text("a red star")
    words = image_words(tmp_path / "file", rows)
    first = trainer_of(words).collect(0, Clock())
    words = [*words, f"prompts.train={tmp_path}/folder", f"run.dir={tmp_path}/run"]
    second = trainer_of(words).collect(0, Clock())
    assert torch.equal(first.states, second.states)
    assert [row.prompt for row in second.rows] == ["a red star"] * 2
    (tmp_path / "folder" / "worse" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"row 2: .*worse/1\.png cannot be read as an image"):
        trainer_of(words)


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_record_of_another_version_is_refused(version, tmp_path):
    rows = picture_pairs(tmp_path)
    trainer_of(image_words(tmp_path, [{"version": 1, **rows[0]}, rows[1]]))
    with pytest.raises(
        UsageError, match=rf"train: row 2 has \"version\" {version!r}: diffusion_dpo reads pairs of ver"
    ):
        trainer_of(image_words(tmp_path, [rows[0], {"version": version, **rows[1]}]))


def test_encoding_undoes_decoding(tmp_path):
    """As far as the embedded VAE goes: its own scenes come back."""
    trainer = trainer_of(image_words(tmp_path / "x", picture_pairs(tmp_path / "x")))
    model, policy = trainer.policy.model, trainer.policy
    with torch.no_grad():
        images = model.decode(sample(policy, model.encode(["a red star"] * 4), seeded([0, 1, 2, 3]), 4))
        again = model.decode(model.encode_images(images))
    assert images.shape[1:] == model.sample_shape
    assert (again - images).square().mean().sqrt() < 0.05


WRONG = {
    'has no "worse"': lambda row, folder: row.pop("worse"),
    "none.png does not exist": lambda row, folder: row.update(better="pictures/none.png"),
    "should be the path of an image": lambda row, folder: row.update(better=[0.5]),
    "has 32 x 32 pixels, and the model draws 64 x 64": lambda row, folder: row.update(better="small/0_better.png"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_row_that_is_no_pair_is_named_before_any_work(said, tmp_path):
    rows = picture_pairs(tmp_path)
    picture_pairs(tmp_path / "other", size=32)
    (tmp_path / "other" / "pictures").rename(tmp_path / "small")
    WRONG[said](rows[1], tmp_path)
    with pytest.raises(UsageError, match=rf"config prompts\.train: row 2.*{said}"):
        trainer_of(image_words(tmp_path, rows))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rewards.quadratic.weight=1"], r"does not learn from rewards: leave them out with rewards\.quadratic=null"),
        (["train.normalise_rewards=true"], r"train\.normalise_rewards: has no effect on the algorithm diffusion_dpo"),
        (["train.max_failed=0.5"], r"train\.max_failed: has no effect"),
        (["train.same_start=true"], r"train\.same_start: has no effect, the algorithm diffusion_dpo rolls nothing out"),
        (["train.rollout_dtype=bfloat16"], r"train\.rollout_dtype: has no effect"),
        (["train.images_per_prompt=2"], r"reads one pair from each row: set train\.images_per_prompt=1"),
        (["train.kl_budget=1"], r"train\.kl_budget: as configured, the algorithm does not roll out the policy"),
        (["sampler.name=heun", "sampler.eta=1"], "affine in the score"),
        (["sampler.eta=0"], "needs steps with noise"),
        (["algorithm.kappa=0"], r"algorithm\.kappa: must be positive"),
        (["train.steps=[1]"], "does not choose among denoising steps"),
    ],
)
def test_what_it_cannot_do_is_refused(words, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        check_combination(load_config([*toy_words("diffusion_dpo", tmp_path), *words]))
