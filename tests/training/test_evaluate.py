import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from helpers import ROOT

import condrl
from condrl.commands import finetune
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import OU
from condrl.loading import load_config
from condrl.prompts import Row
from condrl.rewards.pixels import to_pil
from condrl.rewards.scoring import make_reward
from condrl.toys import reference
from condrl.training.build import make_policy, make_sampler
from condrl.training.evaluate import Diversity, estimate, evaluate, paired, paired_difference, verdict
from condrl.training.folder import RunFolder
from condrl.training.pictures import LABEL_HEIGHT, grid, labelled, save_comparison

ROWS = [Row(0, "a red star"), Row(1, "a blue circle"), Row(2, "a red star")]


@condrl.reward
def mean_level(samples, prompts):
    return samples.mean((1, 2, 3))


def test_estimate_takes_prompts_as_the_unit():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])  # five prompts, two images each
    found = estimate(scores, 2)
    means = torch.tensor([0.5, 1.0, 0.0, 0.5, 0.5]).double()
    half = 2.776 * means.std().item() / 5**0.5  # Student's t, four degrees of freedom
    assert found.mean == 0.5
    assert found.ci95 == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(("yes", "count"), [(20, 20), (0, 3), (20, 40), (49, 50)])
def test_the_interval_of_a_share_is_wilsons_within_0_and_1(yes, count):
    """Its ends are the shares p from which what was seen is 1.96 standard deviations of p away."""
    scores = torch.zeros(count)
    scores[:yes] = 1
    low, high = estimate(scores, 1).ci95
    assert 0 <= low <= yes / count <= high <= 1
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert abs(yes / count - p) == pytest.approx(1.96 * (p * (1 - p) / count) ** 0.5)
    assert high - low > 0.01  # not even where all agree


def test_the_paired_interval_is_that_of_the_differences():
    generator = torch.Generator().manual_seed(0)
    base = 5 * torch.randn(400, generator=generator).double()  # prompts differ much more than the tuning changes them
    change = 0.2 + 0.5 * torch.randn(400, generator=generator).double()
    found = paired_difference(base, base + change)
    half = 1.96 * change.std().item() / 20
    assert found.mean == pytest.approx(change.mean().item())
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half), abs=0.01)
    nan = torch.full((3,), torch.nan)
    with_gaps = paired_difference(torch.cat([base, nan]), torch.cat([base + change, torch.ones(3)]))
    assert with_gaps.mean == pytest.approx(found.mean)  # a prompt without one of the two is left out


def test_a_verdict_rests_on_the_paired_interval():
    def row(low, high):
        return {"difference": {"mean": (low + high) / 2, "ci95": (low, high)}}

    rows = {
        "a": row(0.01, 0.2),
        "b": row(-0.1, 0.1),
        "c": row(-0.3, -0.1),
        "d": {"difference": {"mean": 1, "ci95": None}},
    }
    assert verdict(rows) == "better: a; worse: c; no difference shown: b, d"
    assert verdict(rows, {"a", "b", "c"}) == "better: c; worse: a; no difference shown: b, d"


def test_intervals_cover_the_truth_95_percent_of_the_time():
    g = torch.Generator().manual_seed(0)
    draws = [estimate((torch.rand(200, generator=g) < 0.4).float(), 1).ci95 for _ in range(1000)]
    covered = sum(low <= 0.4 <= high for low, high in draws) / 1000
    assert 0.93 < covered < 0.97


def test_evaluation_does_not_depend_on_the_batch_and_pairs_the_noise(model):
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 3, "spacing": None, "eta": 1.0}, model.schedule))
    measures = [make_reward("mean_level", {})]
    synchronized = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=6, pictures=3)
    apart = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=1, pictures=3)
    assert synchronized.measures["mean_level"].mean == pytest.approx(apart.measures["mean_level"].mean, abs=1e-5)
    assert synchronized.labels == ["a red star", "a red star", "a blue circle"]
    for one, other in zip(synchronized.pictures, apart.pictures, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert not torch.equal(synchronized.pictures[0], synchronized.pictures[1])  # the same prompt, another seed
    with model.reference():
        base = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=6, pictures=3)
    assert torch.equal(torch.stack(base.pictures), torch.stack(synchronized.pictures))  # a LoRA that is still zero


def test_pictures_hold_the_images(tmp_path):
    images = [torch.full((3, 8, 8), level) for level in (0.0, 1.0, 0.5, 0.25)]
    sheet = grid([labelled(to_pil(image), "x") for image in images], columns=2)
    assert sheet.getpixel((10, 10)) == (0, 0, 0)
    assert sheet.getpixel((6 + 192 + 6 + 10, 10)) == (255, 255, 255)
    assert sheet.getpixel((10, 6 + 192 + LABEL_HEIGHT + 6 + 10)) == (128, 128, 128)
    save_comparison(tmp_path / "x" / "c.png", images[:2], images[2:], ["a", "b"])
    assert (tmp_path / "x" / "c.png").stat().st_size > 100


def test_failed_scores_are_left_out_of_an_estimate():
    nan = float("nan")
    found = estimate(torch.tensor([1.0, nan, 3.0, 3.0, nan, nan]), 2)
    assert found.mean == 2.0  # of the first two prompts; the third has no score
    assert found.failed == 3
    assert estimate(torch.tensor([1.0, 3.0]), 1).failed == 0


# ---------------------------------------------------------------------------------------------- what a run says


@condrl.reward
def number_of_row(samples, prompts, metadata):
    number_of_row.asked.append([row["n"] for row in metadata])
    return torch.tensor([float(row["n"]) for row in metadata])


@condrl.reward
def second_moment(samples, prompts, *, factor: float = 1.0):
    second_moment.batches.append(samples.detach().clone())
    return factor * samples.flatten(1).square().sum(1)


number_of_row.asked, second_moment.batches = [], []


def toy(folder, *words, problem="p1", rows=None):
    """A finished short run of a toy: its result, and the lines of its record."""
    number_of_row.asked.clear()
    second_moment.batches.clear()
    train, heldout = (
        [{"prompt": "left", "linear": [5.0], "n": -1}],
        rows or [{"prompt": "far right", "linear": [1.0], "n": n} for n in (1, 10, 100)],
    )
    for name, content in (("train", train), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    few = ["train.epochs=5", "train.prompts_per_epoch=1", "train.images_per_prompt=8", "train.rollout_batch=8"]
    given = [
        f"prompts.train={folder}/train.jsonl",
        f"prompts.heldout={folder}/heldout.jsonl",
        f"run.dir={folder}/run",
        "run.overwrite=true",
    ]
    config = str(ROOT / "configs" / "toy" / f"{problem}.yaml")
    few += ["sampler.steps=5", "evaluate.images_per_prompt=1"]
    assert finetune.main([config, *given, *few, "train.lr=1e-3", *words]) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "run" / "result.json").read_text()), [json.loads(line) for line in lines]


@pytest.mark.slow
def test_the_held_out_prompts_are_measured_and_not_the_training_prompts(tmp_path):
    """E x of the held-out prompt's own distribution, .9 (-2) + .1 (1.5), with the reward of its own row."""
    many = ["evaluate.images_per_prompt=2000", "train.rollout_batch=2000"]
    result, lines = toy(tmp_path, *many, "sampler.steps=30", "evaluate.prompts=1", "train.lr=1e-6")
    for who in ("base", "tuned"):
        assert result["heldout"]["quadratic"][who]["mean"] == pytest.approx(0.9 * -2 + 0.1 * 1.5, abs=0.15)
    assert sum(line["reward/quadratic"] for line in lines) > 0  # of the training prompt, 5 E x with E x = .45


MEASURE = "evaluate.measures.number_of_row={}"


@pytest.mark.parametrize(("prompts", "mean"), [("null", 37.0), ("2", 5.5)])
def test_the_first_so_many_prompts_are_measured(prompts, mean, tmp_path):
    result, _ = toy(tmp_path, MEASURE, f"evaluate.prompts={prompts}")
    found = result["heldout"]["number_of_row"]
    assert (found["base"]["mean"], found["tuned"]["mean"]) == pytest.approx((mean, mean))


@pytest.mark.slow
def test_so_many_images_of_each_held_out_prompt_all_different(tmp_path):
    asked = {}
    for each in (1, 3):
        toy(tmp_path, MEASURE, "evaluate.measures.second_moment={}", f"evaluate.images_per_prompt={each}")
        numbers = [n for part in number_of_row.asked for n in part]
        asked[each] = [numbers.count(n) for n in (1, 10, 100)]
        last = torch.cat(second_moment.batches)[-3 * each :].flatten().tolist()
        assert len(set(last)) == 3 * each
    assert [many - few for many, few in zip(asked[3], asked[1], strict=True)] == [4, 4, 4]  # two more, base and tuned


@pytest.mark.parametrize(("every", "when"), [("null", []), ("2", [2, 4]), ("5", [5])])
def test_held_out_measures_are_taken_after_so_many_epochs(every, when, tmp_path):
    result, lines = toy(tmp_path, "train.lr=1e-2", f"evaluate.every={every}")
    assert [line["epoch"] for line in lines if "heldout/quadratic" in line] == when
    if 5 in when:  # of the policy that is then measured as the tuned one
        tuned = result["heldout"]["quadratic"]["tuned"]["mean"]
        assert lines[-1]["heldout/quadratic"] == pytest.approx(tuned, abs=1e-6)
        assert tuned != result["heldout"]["quadratic"]["base"]["mean"]


def test_the_difference_is_of_the_tuned_from_the_base(tmp_path):
    result, _ = toy(tmp_path, MEASURE, "train.lr=1e-2", "evaluate.images_per_prompt=3")
    moved, same = result["heldout"]["quadratic"], result["heldout"]["number_of_row"]
    expected = moved["tuned"]["mean"] - moved["base"]["mean"]
    assert abs(expected) > 1e-3
    assert moved["difference"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert moved["better"] + moved["worse"] == pytest.approx(1)
    assert (same["difference"]["mean"], same["better"], same["worse"]) == (0, 0, 0)


def test_measures_are_reported_beside_the_rewards_with_their_options(tmp_path):
    result, lines = toy(tmp_path, "evaluate.measures.second_moment.factor=-3", "evaluate.images_per_prompt=4")
    assert set(result["heldout"]) == {"quadratic", "second_moment"}
    points = (
        second_moment.batches[-1] if len(second_moment.batches[-1]) == 12 else torch.cat(second_moment.batches[-2:])
    )
    expected = -3 * points.square().mean().item()
    assert result["heldout"]["second_moment"]["tuned"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert "reward/second_moment" not in lines[0]  # it is no reward


def moment_of_chain(sampler, schedule):
    """E x^2 at the end of the chain of the pretrained N(1, .49)."""
    a, c, S = reference.gaussian_chain(sampler, schedule.alpha(sampler.times), schedule.sigma(sampler.times), 1.0, 0.49)
    m, v = 0.0, schedule.prior_std**2
    for k in range(len(a)):
        m, v = a[k] * m + c[k], a[k] ** 2 * v + S[k] ** 2
    return (m**2 + v).item()


def test_another_sampler_may_be_evaluated(tmp_path):
    """Two steps of Euler's method on the ODE, whose distribution is known, and not the one that tunes."""
    words = [
        "evaluate.sampler.steps=2",
        "evaluate.sampler.eta=0",
        "evaluate.images_per_prompt=4000",
        "train.rollout_batch=4000",
    ]
    rows = [{"prompt": "g1", "linear": [0.0], "curvature": [-2.0]}]
    (tmp_path / "g1.jsonl").write_text(json.dumps({"prompt": "g1"}) + "\n")
    result, _ = toy(tmp_path, *words, f"prompts.train={tmp_path}/g1.jsonl", problem="g1", rows=rows)
    schedule, found = OU(), result["heldout"]["quadratic"]["base"]["mean"]
    both = [
        moment_of_chain(
            make_sampler({"name": "euler_maruyama", "steps": n, "spacing": None, "eta": eta}, schedule), schedule
        )
        for n, eta in ((2, 0.0), (5, 1.0))
    ]
    assert abs(both[0] - both[1]) > 0.3
    assert found == pytest.approx(both[0], abs=0.1)


@pytest.mark.slow
def test_base_and_tuned_start_from_the_same_noise_and_seeds_from_other(tmp_path):
    found = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        result, _ = toy(tmp_path / str(seed), f"run.seed={seed}", "train.lr=1e-12", "train.epochs=1")
        base, tuned = (result["heldout"]["quadratic"][who]["mean"] for who in ("base", "tuned"))
        assert base == pytest.approx(tuned, abs=1e-6)
        found.append(base)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_so_many_pictures_are_shown(pictures, model):
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 2, "spacing": None, "eta": 1.0}, model.schedule))
    measures = [make_reward("mean_level", {})]
    found = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=4, pictures=pictures)
    assert len(found.pictures) == len(found.labels) == pictures
    assert found.measures["mean_level"].failed == 0


def test_a_run_shows_as_many_as_it_is_asked_for(pipeline, tmp_path):
    """Three before | after pairs, two of them in the first of two rows."""
    from PIL import Image

    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\na red circle\na blue star\n")
    given = [f"model.path={pipeline}", "model.lora_rank=2", "model.guidance=1", f"prompts.train={tmp_path}/prompts.txt"]
    given += [f"prompts.heldout={tmp_path}/prompts.txt", "rewards.mean_level.weight=1", f"run.dir={tmp_path}/run"]
    few = ["train.epochs=1", "train.prompts_per_epoch=1", "train.images_per_prompt=2", "train.rollout_batch=2"]
    few += ["sampler.steps=2", "evaluate.pictures=3", "train.updates_per_epoch=1", "algorithm.name=nft"]
    (tmp_path / "base.yaml").write_text("model: {name: stable_diffusion}\n")
    assert finetune.main([str(tmp_path / "base.yaml"), *given, *few]) == 0
    sheet = np.asarray(Image.open(tmp_path / "run" / "images" / "before_after.png").convert("L"))
    height, width = (side // n for side, n in zip(sheet.shape, (2, 4), strict=True))
    tiles = [sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] for y in (0, 1) for x in range(4)]
    assert [(tile < 250).mean() > 0.3 for tile in tiles] == [True] * 6 + [False] * 2


@pytest.mark.slow
def test_a_runs_pages_are_its_own(pipeline, tmp_path, monkeypatch):
    """On its list, so that a later run replaces them, and with fewer pages leaves none of them."""
    monkeypatch.setattr("condrl.training.pictures.TILES", 4)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\na red circle\na blue star\n")
    given = [f"model.path={pipeline}", "model.lora_rank=2", "model.guidance=1", f"prompts.train={tmp_path}/prompts.txt"]
    given += [f"prompts.heldout={tmp_path}/prompts.txt", "rewards.mean_level.weight=1", f"run.dir={tmp_path}/run"]
    few = ["train.epochs=1", "train.prompts_per_epoch=1", "train.images_per_prompt=2", "train.rollout_batch=2"]
    few += ["sampler.steps=2", "train.updates_per_epoch=1", "algorithm.name=nft", "run.overwrite=true"]
    (tmp_path / "base.yaml").write_text("model: {name: stable_diffusion}\n")
    for pictures, names in ((3, ["before_after.png", "before_after_2.png"]), (2, ["before_after.png"])):
        words = [str(tmp_path / "base.yaml"), *given, *few, f"evaluate.pictures={pictures}"]
        assert finetune.main(words) == 0
        assert sorted(path.name for path in (tmp_path / "run" / "images").glob("before*")) == names
        assert {f"images/{name}" for name in names} <= RunFolder(tmp_path / "run").listed


@pytest.mark.parametrize("count", [250, 1000])
def test_evaluation_is_linear_in_the_images(count, tmp_path, monkeypatch):
    """Each image is drawn, scored and encoded for once, and no more than a batch is held at a time."""
    config = load_config([str(ROOT / "configs/toy/p1.yaml"), f"run.dir={tmp_path}", "sampler.steps=3"])
    policy = make_policy(config, torch.device("cpu"))
    rows, scored = [Row(i, "left") for i in range(count)], []
    measures = [dataclasses.replace(make_reward("mean_level", {}), call=lambda x, p: scored.append(len(x)) or x[:, 0])]
    encoded, encode = [], policy.model.encode
    monkeypatch.setattr(policy.model, "encode", lambda prompts: encoded.append(len(prompts)) or encode(prompts))
    kept, decode = [], policy.model.decode
    monkeypatch.setattr(policy.model, "decode", lambda x: kept.append(weakref.ref(y := decode(x).clone())) or y)
    found = evaluate(policy, rows, measures, seed=5, per_prompt=10, batch=50, pictures=0)
    assert policy.model.evaluations == 3 * 10 * count
    assert scored == [50] * (10 * count // 50)
    assert encoded == [10 * count]
    assert sum(ref() is not None for ref in kept) <= 1
    assert len(found.scores["mean_level"]) == count


@pytest.mark.parametrize("batch", [1, 4, 5, 7, 40])
def test_diversity_does_not_depend_on_how_samples_come(batch):
    samples = 3 + torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0))
    diversity = Diversity(5)
    for part in samples.split(batch):
        diversity.take(part)
    groups = samples.double().view(8, 5, 6)
    expected = (groups - groups.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
    assert diversity.found == pytest.approx(expected.tolist())


def test_the_win_rate_counts_ties_half_and_leaves_out_prompts_without_both():
    nan = float("nan")
    found = paired(torch.tensor([0.0, 0.0, 0.0, 1.0, nan]), torch.tensor([1.0, 0.0, -1.0, 2.0, 5.0]))
    assert (found["better"], found["worse"], found["win_rate"]) == (0.5, 0.25, 0.625)
