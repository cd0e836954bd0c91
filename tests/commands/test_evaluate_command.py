"""`condrl evaluate`: what a run measured, again and image by image; other samplers, strengths, prompts and measures."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import toy_words
from PIL import Image

import condrl
from condrl import UsageError
from condrl.commands import evaluate as command
from condrl.commands import finetune
from condrl.commands.evaluation import cells
from condrl.diffusion.rollout import rollout
from condrl.loading import load_config
from condrl.models.lora import KOHYA_FILE, LORA_FILE
from condrl.models.points import Points
from condrl.training.build import make_policy
from condrl.training.evaluate import first_seed
from condrl.training.folder import RunFolder


@condrl.reward
def evaluated_level(samples, prompts):
    return samples.flatten(1).mean(1)


@condrl.reward
def evaluated_sometimes(samples, prompts):
    """No score below zero."""
    level = samples.flatten(1).mean(1)
    return level.where(level > 0, torch.nan)


@condrl.reward
def evaluated_until(samples, prompts):
    """Ctrl+C in the tuned model's second batch of two, after the trial and the base's."""
    evaluated_until.calls += 1
    if evaluated_until.calls == 5:
        raise KeyboardInterrupt
    return samples.flatten(1).mean(1)


@condrl.reward
def evaluated_beside(samples, prompts):
    """Notes whether the folder is taken."""
    try:
        evaluated_beside.folder.check()
        evaluated_beside.taken.append(False)
    except UsageError:
        evaluated_beside.taken.append(True)
    return samples.flatten(1).mean(1)


@condrl.reward
def evaluated_noted(samples, prompts):
    evaluated_noted.seen.append(samples.clone())
    return samples.flatten(1).mean(1)


evaluated_until.calls, evaluated_noted.seen, evaluated_beside.taken = 0, [], []
FEW = [
    "train.epochs=1", "train.prompts_per_epoch=1", "train.images_per_prompt=2", "train.rollout_batch=2",
    "sampler.steps=2", "train.updates_per_epoch=1", "algorithm.name=nft", "train.lr=0.05", "model.guidance=1",
    "model.lora_rank=2", "rewards.evaluated_level.weight=1", "evaluate.images_per_prompt=2", "evaluate.sampler.eta=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A finished run of a toy with four prompts, and 30 images of each to measure."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert finetune.main([*toy_words("dpok", folder), "evaluate.images_per_prompt=30", "train.lr=0.02"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory):
    """A finished run on images, with four held-out prompts, that was not trained on one of them."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "base.yaml").write_text("model: {name: stable_diffusion}\n")
    (folder / "train.txt").write_text("a red star\na blue circle\n")
    (folder / "heldout.txt").write_text("a red circle\na blue star\na red square\na black star\n")
    given = [f"model.path={pipeline}", f"prompts.train={folder}/train.txt", f"prompts.heldout={folder}/heldout.txt"]
    words = [str(folder / "base.yaml"), *given, *FEW]
    assert finetune.main([*words, f"run.dir={folder}/run"]) == 0
    assert finetune.main([*words, f"run.dir={folder}/second", f"model.lora={folder}/run/lora", "run.seed=3"]) == 0
    return folder / "run"


def evaluate(*words, out):
    """The exit code, the summary and the lines."""
    code = command.main([*map(str, words), "--out", str(out)])
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    return code, json.loads((out / "evaluation.json").read_text()), lines


def heldout(folder):
    return json.loads((folder / "result.json").read_text())["heldout"]


def refused(capsys, *words):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert command.main(list(map(str, words))) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(said) == 1
    return said[0]


# ---------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("which", ["toy", "run", "second"])
def test_a_run_is_measured_again_to_the_last_bit(which, run, toy, tmp_path):
    """Also one that began with a LoRA, whose base is that LoRA's model."""
    folder = {"toy": toy, "run": run, "second": run.with_name("second")}[which]
    code, result, _ = evaluate(folder, out=tmp_path / "x")
    assert code == 0
    assert result["evaluations"][0]["heldout"] == heldout(folder)
    assert all(row["difference"]["mean"] != 0 for row in heldout(folder).values())


def test_the_base_of_a_run_from_a_lora_is_that_loras_model(run, tmp_path):
    second = run.with_name("second")
    _, first, _ = evaluate(run, "run.seed=3", out=tmp_path / "first")
    _, result, _ = evaluate(second, out=tmp_path / "second")
    name = "evaluated_level"
    assert result["base"].endswith(f"with the LoRA {run / 'lora'}")
    assert result["evaluations"][0]["heldout"][name]["base"] == first["evaluations"][0]["heldout"][name]["tuned"]
    _, plain, _ = evaluate(second, "model.lora=null", out=tmp_path / "plain")
    assert "LoRA" not in plain["base"]
    assert plain["evaluations"][0]["heldout"][name]["base"] == first["evaluations"][0]["heldout"][name]["base"]


def test_the_summary_is_that_of_the_lines(toy, tmp_path):
    _, result, lines = evaluate(toy, out=tmp_path / "x")
    row = result["evaluations"][0]["heldout"]["quadratic"]
    scores = {who: torch.tensor([line[who]["quadratic"] for line in lines]).double() for who in ("base", "tuned")}
    base, tuned = (values.view(4, 30).mean(1) for values in scores.values())
    assert [line["row"] for line in lines] == [i // 30 for i in range(120)]
    assert [line["seed"] for line in lines] == list(range(lines[0]["seed"], lines[0]["seed"] + 120))
    assert lines[0]["metadata"] == {"linear": [-0.9]}
    assert row["difference"]["mean"] == pytest.approx((tuned - base).mean().item())
    wins = (tuned > base).double() + (tuned == base).double() / 2
    assert row["win_rate"] == pytest.approx(wins.mean().item())


def test_the_diversity_is_the_deviation_from_the_prompts_mean(toy, tmp_path):
    evaluated_noted.seen.clear()
    _, result, _ = evaluate(toy, "evaluate.measures.evaluated_noted={}", "--batch", 7, out=tmp_path / "x")
    drawn = torch.cat(evaluated_noted.seen[1:]).double().view(2, 4, 30)  # base and tuned, after the trial
    expected = drawn.sub(drawn.mean(2, keepdim=True)).square().mean(2).sqrt().mean(1)
    found = result["evaluations"][0]["diversity"]
    assert [found[who]["mean"] for who in ("base", "tuned")] == pytest.approx(expected.tolist(), rel=1e-6)
    _, single, _ = evaluate(toy, "evaluate.images_per_prompt=1", out=tmp_path / "single")
    assert "diversity" not in single["evaluations"][0]


def test_the_path_kl_is_that_to_the_base(run, tmp_path, capsys):
    """None at no strength, and where steps have no noise that of DDPM's."""
    few = ["--samplers", "ddim,eta=1", "ddim,eta=0", "--steps", "3", "--strength", "0", "1"]
    _, result, _ = evaluate(run, *few, out=tmp_path / "x")
    found = {(e["strength"], e["sampler"]["eta"]): e["path_kl"] for e in result["evaluations"]}
    assert found[0, 1] == 0
    assert found[0, 0] == 0
    assert found[1, 0] == found[1, 1] > 0
    assert f"path KL to the base: {found[1, 1]:.4g} nats" in capsys.readouterr().out
    config = load_config([str(run / "config.yaml"), "sampler.eta=1", "sampler.steps=3"])
    policy = make_policy(config, torch.device("cpu"))
    policy.model.load_adapter(run / "lora")
    condition = policy.model.encode(["a red circle", "a blue star", "a red square", "a black star"])
    drawn = rollout(policy, condition, torch.Generator().manual_seed(first_seed(0)), 4)
    ratio = drawn.log_probs.sum(0)
    for k in range(3):
        steps = torch.full((4,), k)
        with policy.model.reference(), torch.no_grad():
            ratio -= policy.transition(drawn.states[k], steps, condition).log_prob(drawn.states[k + 1])
    noise = (2 * found[1, 1] / 4) ** 0.5  # of the mean of four log p - log p_base, whose variance is twice their KL
    assert found[1, 1] > 0
    assert ratio.mean().item() == pytest.approx(found[1, 1], abs=4 * noise)


def test_an_image_depends_on_its_seed_alone(run, tmp_path):
    """Not on the batch, nor on how many images or prompts there are before it."""
    _, _, whole = evaluate(run, out=tmp_path / "whole")
    _, _, apart = evaluate(run, "--batch", 3, "evaluate.prompts=3", out=tmp_path / "apart")
    assert [line["seed"] for line in apart] == [line["seed"] for line in whole[:6]]
    for one, other in zip(apart, whole, strict=False):
        for who in ("base", "tuned"):
            assert one[who]["evaluated_level"] == pytest.approx(other[who]["evaluated_level"], abs=1e-5)


@pytest.mark.slow
def test_samplers_steps_and_strengths_in_one_call(run, tmp_path, capsys):
    words = ["--samplers", "ddim", "ddim,eta=0", "--steps", 2, 3, "--strength", 0, 0.5, 1]
    code, result, lines = evaluate(run, *words, out=tmp_path / "x")
    assert code == 0
    found = [(e["sampler"]["eta"], e["sampler"]["steps"], e["strength"]) for e in result["evaluations"]]
    assert found == [(eta, n, s) for s in (0, 0.5, 1) for eta in (0.5, 0) for n in (2, 3)]
    assert len(lines) == 12 * 8
    bases = {(line["sampler"]["eta"], line["sampler"]["steps"], line["seed"], *line["base"].values()) for line in lines}
    assert len(bases) == 4 * 8  # drawn once for all strengths
    _, alone, _ = evaluate(run, "sampler.eta=0", "sampler.steps=3", out=tmp_path / "alone")
    assert alone["evaluations"][0]["heldout"] == result["evaluations"][-1]["heldout"]
    for entry in result["evaluations"]:
        row = entry["heldout"]["evaluated_level"]
        is_none = (row["difference"]["mean"], row["win_rate"]) == (0, 0.5) and row["tuned"] == row["base"]
        assert is_none == (entry["strength"] == 0)
    said = capsys.readouterr().out
    assert "ddim, 3 steps, eta=0.0, strength 0.5\n" in said


def test_another_sampler_takes_over_the_runs_grid(run, tmp_path):
    _, result, _ = evaluate(run, "--samplers", "dpm_solver_pp", out=tmp_path / "x")
    sampler = result["evaluations"][0]["sampler"]
    assert (sampler["name"], sampler["steps"]) == ("dpm_solver_pp", 2)
    assert "eta" not in sampler or sampler["eta"] != 0.5


def test_pictures_are_files_beside_each_other(run, tmp_path):
    _, _, lines = evaluate(run, "--pictures", 3, "--strength", 0.5, 1, out=tmp_path / "x")
    shown = [line for line in lines if line["pictures"]]
    assert [line["seed"] - lines[0]["seed"] for line in shown] == [0, 1, 2, 0, 1, 2]
    for line in shown:
        for who in ("base", "tuned"):
            image = np.asarray(Image.open(tmp_path / "x" / line["pictures"][who]), float) / 255
            assert image.shape == (16, 16, 3)
            assert image.mean() == pytest.approx(line[who]["evaluated_level"], abs=0.5 / 255)
    assert len(list((tmp_path / "x" / "pictures").rglob("*.png"))) == 9
    assert {line["pictures"]["base"] for line in shown[:3]} == {line["pictures"]["base"] for line in shown[3:]}


def test_points_have_no_pictures_and_no_strength(toy, tmp_path, capsys):
    _, _, lines = evaluate(toy, out=tmp_path / "x")
    assert not any(line["pictures"] for line in lines)
    assert not (tmp_path / "x" / "pictures").exists()
    assert "--strength is of a LoRA" in refused(capsys, toy, "--strength", 0.5, "--out", tmp_path / "y")


def test_one_prompt_has_no_interval(toy, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "left", "linear": [1.0]}\n')
    _, result, lines = evaluate(toy, "--prompts", tmp_path / "one.jsonl", out=tmp_path / "x")
    row = result["evaluations"][0]["heldout"]["quadratic"]
    assert row["difference"]["ci95"] is None
    assert {line["prompt"] for line in lines} == {"left"}
    assert "no difference shown: quadratic" in capsys.readouterr().out


def test_scores_that_fail_are_left_out_and_told(toy, tmp_path, capsys):
    code, result, lines = evaluate(toy, "evaluate.measures.evaluated_sometimes={}", out=tmp_path / "x")
    assert code == 0
    row = result["evaluations"][0]["heldout"]["evaluated_sometimes"]
    failed = sum(line["tuned"]["evaluated_sometimes"] is None for line in lines)
    assert 0 < failed == row["tuned"]["failed"] < len(lines)
    assert math.isfinite(row["difference"]["mean"])
    said = capsys.readouterr()
    assert f"{failed} of tuned" in said.out
    assert "warning: the reward 'evaluated_sometimes' failed for the prompt" in said.err


def test_measures_that_are_named_take_the_place_of_the_runs(toy, tmp_path):
    for words, names in (
        (["rewards.evaluated_level.weight=1"], ["evaluated_level"]),
        (["evaluate.measures.evaluated_level={}"], ["evaluated_level"]),
        (["evaluate.measures.evaluated_level={}", "evaluate.measures.quadratic={}"], ["evaluated_level", "quadratic"]),
    ):
        _, result, _ = evaluate(toy, *words, "--overwrite", out=tmp_path / "x")
        assert sorted(result["evaluations"][0]["heldout"]) == names
    found = result["evaluations"][0]["heldout"]["quadratic"]  # with the options that it has in the run
    assert found == heldout(toy)["quadratic"]


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_a_lora_alone_is_measured_by_what_is_named(name, run, pipeline, tmp_path):
    """It is what the run's own LoRA is, with the run's settings."""
    lora = tmp_path / "there" / "it" / "is" / "mine.safetensors"
    lora.parent.mkdir(parents=True)
    shutil.copy(run / "lora" / name, lora)
    words = [f"model.path={pipeline}", "model.guidance=1", "rewards.evaluated_level.weight=1", "sampler.steps=2"]
    words += ["sampler.eta=0.5", "evaluate.images_per_prompt=2", "--batch", 2]
    code, result, _ = evaluate(lora, *words, "--prompts", run.parent / "heldout.txt", out=tmp_path / "x")
    assert (code, result["run"]) == (0, None)
    found = result["evaluations"][0]["heldout"]["evaluated_level"]
    assert found["tuned"]["mean"] == pytest.approx(heldout(run)["evaluated_level"]["tuned"]["mean"], abs=1e-6)


def test_prompts_that_were_trained_on_are_told(run, toy, tmp_path, capsys):
    evaluate(run, "--prompts", run.parent / "train.txt", out=tmp_path / "x")
    assert "warning: 2 of the prompts were trained on, such as 'a blue circle'" in capsys.readouterr().err
    evaluate(run, out=tmp_path / "y")
    assert "trained on" not in capsys.readouterr().err


def test_from_python(toy, tmp_path):
    found = condrl.evaluate(toy, out=tmp_path / "x")
    assert found["evaluations"][0]["heldout"].keys() == heldout(toy).keys()
    assert json.loads((tmp_path / "x" / "evaluation.json").read_text())["seed"] == found["seed"]
    with pytest.raises(UsageError, match="holds an evaluation"):
        condrl.evaluate(str(toy), out=str(tmp_path / "x"))


@condrl.reward
def evaluated_needing(samples, prompts, metadata):
    return torch.tensor([float(row["count"]) for row in metadata])


# ---------------------------------------------------------------------------------------------- steering


@pytest.mark.slow
@pytest.mark.parametrize("steer", ["smc,particles=1", "best_of_n,n=1"])
def test_a_steering_that_chooses_among_one_is_the_plain_draw(steer, run, toy, tmp_path):
    """To the last bit, of the base and of the tuned model, which are those that are evaluated without steering."""
    for folder in (run, toy):
        _, before, _ = evaluate(folder, "--overwrite", out=tmp_path / "x")
        code, result, lines = evaluate(folder, "--steer", steer, "--overwrite", out=tmp_path / "y")
        assert code == 0
        assert [entry["strength"] for entry in result["evaluations"]] == [None, 1.0]
        assert all(line["plain"] == line["steered"] for line in lines)
        for entry, who in zip(result["evaluations"], ("base", "tuned"), strict=True):
            for name, row in entry["heldout"].items():
                assert row["plain"] == row["steered"] == before["evaluations"][0]["heldout"][name][who]
            assert entry["network_calls"]["plain"] == entry["network_calls"]["steered"]


def test_each_prompt_is_steered_by_its_own_reward(toy, tmp_path, capsys):
    """The rewards' slopes differ in sign; whatever is drawn at a time, the particles of an image stay together."""
    whole = evaluate(toy, "--steer", "smc,particles=6,kappa=0.3", out=tmp_path / "x")
    apart = evaluate(toy, "--steer", "smc,particles=6,kappa=0.3", "--batch", 7, out=tmp_path / "y")
    for one, other in zip(whole[2], apart[2], strict=True):
        assert one["steered"]["quadratic"] == pytest.approx(other["steered"]["quadratic"], abs=1e-4)
    _, result, lines = whole
    scores = {who: torch.tensor([line[who]["quadratic"] for line in lines]).view(2, 4, 30) for who in POINTS}
    assert (scores["steered"].mean(2) > scores["plain"].mean(2) + 0.05).all()
    for entry, plain, steered in zip(result["evaluations"], scores["plain"], scores["steered"], strict=True):
        row = entry["heldout"]["quadratic"]
        assert row["difference"]["mean"] == pytest.approx((steered - plain).mean().item(), abs=1e-6)
        assert entry["network_calls"] == {"plain": 5.0, "steered": 30.0}
    assert result["steer"]["name"] == "smc"
    assert (result["steer"]["particles"], result["steer"]["potential"]) == (6, "difference")
    assert result["steer"]["rewards"]["quadratic"]["weight"] == 1
    said = capsys.readouterr().out
    assert (
        "steered: smc, particles=6, kappa=0.3, potential=difference, resample_below=0.5; by quadratic (weight 1)"
        in said
    )
    assert "network calls of an image: 5 plain, 30 steered" in said
    assert "5 steps, base\n" in said
    assert "5 steps, strength 1\n" in said


POINTS = ("plain", "steered")


def test_guidance_follows_each_rows_gradient(toy, tmp_path):
    """By the command; a plain draw and a guided one have the same noise, so every point moves along its slope."""
    _, result, lines = evaluate(toy, "--steer", "guidance,kappa=2", out=tmp_path / "x")
    moved = [line["steered"]["quadratic"] - line["plain"]["quadratic"] for line in lines]
    assert min(moved) > 0
    assert result["evaluations"][0]["network_calls"] == {"plain": 5.0, "steered": 5.0}


def test_the_rewards_steer_and_measures_only_measure(run, tmp_path):
    """Steered by the level, or by its negative; the pictures are those that were measured."""
    found = {}
    for weight in (1, -1):
        words = [f"rewards.evaluated_level.weight={weight}", "evaluate.measures.brightness={}", "--pictures", 2]
        _, result, lines = evaluate(run, "--steer", "best_of_n,n=4", *words, "--overwrite", out=tmp_path / "x")
        row = result["evaluations"][0]["heldout"]
        assert sorted(row) == ["brightness", "evaluated_level"]
        assert list(result["steer"]["rewards"]) == ["evaluated_level"]
        found[weight] = row["evaluated_level"]["difference"]["mean"]
    assert found[1] > 0 > found[-1]
    shown = [line for line in lines if line["pictures"]]
    assert len({picture for line in shown for picture in line["pictures"].values()}) == 2 * 2 * 2
    for line in shown:
        for who in POINTS:
            image = np.asarray(Image.open(tmp_path / "x" / line["pictures"][who]), float) / 255
            assert image.mean() == pytest.approx(line[who]["evaluated_level"], abs=0.5 / 255)


def test_a_base_model_is_steered_without_a_lora(run, pipeline, tmp_path):
    words = [f"model.path={pipeline}", "model.guidance=1", "rewards.evaluated_level.weight=1", "sampler.steps=2"]
    words += ["sampler.eta=0.5", "evaluate.images_per_prompt=2", "--prompts", run.parent / "heldout.txt", "--batch", 2]
    found = condrl.evaluate(
        *map(str, words[:-4]), prompts=str(words[-3]), batch=2, steer="best_of_n,n=3", out=str(tmp_path / "python")
    )
    code, result, lines = evaluate("--steer", "best_of_n,n=3", *words, out=tmp_path / "x")
    assert code == 0
    assert result["evaluations"] == json.loads(json.dumps(found["evaluations"]))
    assert (result["run"], result["lora"], len(result["evaluations"]), len(lines)) == (None, None, 1, 8)
    row = result["evaluations"][0]["heldout"]["evaluated_level"]
    assert row["plain"]["mean"] == pytest.approx(heldout(run)["evaluated_level"]["base"]["mean"], abs=1e-6)
    assert row["difference"]["mean"] > 0


# ---------------------------------------------------------------------------------------------- where it is written


def test_a_measure_that_cannot_be_called_leaves_an_earlier_evaluation_alone(toy, tmp_path, capsys):
    _, _, lines = evaluate(toy, out=tmp_path / "x")
    words = ["evaluate.measures.evaluated_needing={}", "--overwrite", "--out", tmp_path / "x"]
    assert "the reward 'evaluated_needing' needs 'count'" in refused(capsys, toy, *words)
    assert len((tmp_path / "x" / "evaluation.jsonl").read_text().splitlines()) == len(lines)


def test_a_lora_that_does_not_fit_leaves_an_earlier_evaluation_alone(run, tmp_path, capsys):
    _, _, lines = evaluate(run, out=tmp_path / "x")
    words = ["model.lora_rank=1", "--overwrite", "--out", tmp_path / "x"]
    assert "set model.lora_rank=" in refused(capsys, run, *words)
    assert len((tmp_path / "x" / "evaluation.jsonl").read_text().splitlines()) == len(lines)


def test_a_steering_that_cannot_leaves_an_earlier_evaluation_alone(toy, tmp_path, capsys):
    """The second of two samplers has no noise."""
    evaluate(toy, out=tmp_path / "x")
    before = (tmp_path / "x" / "evaluation.jsonl").read_text()
    samplers = ["--samplers", "euler_maruyama", "euler_maruyama,eta=0", "--steer", "smc"]
    assert "the sampler has no noise" in refused(capsys, toy, *samplers, "--overwrite", "--out", tmp_path / "x")
    assert (tmp_path / "x" / "evaluation.jsonl").read_text() == before


def test_an_evaluation_lies_in_its_run_and_is_replaced_when_asked(run, capsys):
    assert command.main([str(run), "--pictures", "2"]) == 0
    folder = run / "evaluation"
    (folder / "notes.txt").write_text("mine")
    assert "holds an evaluation: choose another folder with --out, or --overwrite it" in refused(capsys, run)
    assert command.main([str(run), "--overwrite", "--pictures", "0"]) == 0
    assert not (folder / "pictures").exists()  # what the first wrote is gone
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["notes", "run"])
def test_what_no_evaluation_wrote_is_not_touched(what, run, toy, tmp_path, capsys):
    folder = {"notes": tmp_path / "notes", "run": toy}[what]
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "which no evaluation wrote" in refused(capsys, toy, "--out", folder, "--overwrite")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "a.txt").unlink()


def test_nothing_is_written_through_a_link(toy, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (toy / "evaluation").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused(capsys, toy)
    (toy / "evaluation").unlink()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_two_evaluations_do_not_write_into_one_folder(toy, tmp_path, capsys):
    folder = tmp_path / "x"
    assert evaluate(toy, "evaluate.measures.quadratic={}", "evaluate.images_per_prompt=1", out=folder)[0] == 0
    before = (folder / "evaluation.jsonl").read_text()
    words = [toy, "evaluate.measures.quadratic={}", "--out", folder, "--overwrite"]
    with RunFolder(folder).locked():
        assert "another process is writing to" in refused(capsys, *words)
    assert (folder / "evaluation.jsonl").read_text() == before


def test_an_evaluation_holds_its_folder_until_its_end(toy, tmp_path):
    evaluated_beside.folder = RunFolder(tmp_path / "x")
    assert evaluate(toy, "evaluate.measures.evaluated_beside={}", "--batch", "60", out=tmp_path / "x")[0] == 0
    assert evaluated_beside.taken[-4:] == [True] * 4  # base and tuned, in two batches each
    evaluated_beside.folder.check()


def test_ctrl_c_keeps_the_lines_so_far(toy, tmp_path, capsys):
    evaluated_until.calls = 0
    words = [str(toy), "evaluate.measures.evaluated_until={}", "--batch", "60", "--out", str(tmp_path / "x")]
    assert command.main(words) == 130
    assert len((tmp_path / "x" / "evaluation.jsonl").read_text().splitlines()) == 60
    assert not (tmp_path / "x" / "evaluation.json").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert command.main([*words, "--overwrite"]) == 0  # it is interrupted once


def test_the_summary_is_written_where_json_says(toy, tmp_path, capsys):
    _, result, _ = evaluate(toy, "--json", tmp_path / "there.json", out=tmp_path / "x")
    assert json.loads((tmp_path / "there.json").read_text()) == result
    assert "is not a file that can be written" in refused(capsys, toy, "--json", tmp_path, "--out", tmp_path / "y")


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["ALONE", "model.lora_targets=[to_q]", "rewards.sharpness.weight=1", "--prompts", "EMPTY"],
            "whose file has its modules",
        ),
        ([], "nothing to evaluate"),
        (["nowhere"], "there is no run or LoRA nowhere"),
        (["TOY", "RUN"], "expected one run or LoRA"),
        (["RUN", "train.lr=1"], "train.lr=1 has no effect on an evaluation"),
        (["RUN", "evaluate.measurez.x=1"], "has no effect on an evaluation"),
        (["RUN", "model.guidence=1"], "config model.guidence: there is no such key. Did you mean 'guidance'?"),
        (["RUN", "rewards.brihgtness.weight=1"], "unknown reward 'brihgtness'. Did you mean 'brightness'?"),
        (["RUN", "rewards.evaluated_level.weight=0"], "there is nothing to measure"),
        (["RUN", "--prompts", "EMPTY"], "is empty"),
        (["RUN", "--prompts", "none.txt"], "there is no prompt file 'none.txt'"),
        (["RUN", "--steps", "0"], "steps"),
        (["RUN", "--steps", "5", "5"], "--steps has 5 twice"),
        (["RUN", "--samplers", "ddim", "ddim,eta=0.5"], "two of them are the same"),
        (["RUN", "--samplers", "didm"], "unknown sampler 'didm'"),
        (["RUN", "--samplers", "ddim,eta"], "--samplers ddim,eta: give NAME or NAME,option=value"),
        (["RUN", "--samplers", "ddim,etta=1"], "config evaluate.sampler.etta: there is no such key"),
        (["RUN", "--strength", "nan"], "--strength must be finite"),
        (["RUN", "--pictures", "-1"], "--pictures at least 0"),
        (["RUN", "--batch", "0"], "--batch must be at least 1"),
        (["ALONE"], "belongs to no run, so nothing says what to measure"),
        (["ALONE", "rewards.evaluated_level.weight=1"], "belongs to no run"),
        (["RUN", "--steer", "smc,8"], "--steer smc,8: give NAME or NAME,option=value, as in smc,particles=8"),
        (["RUN", "--steer", "smc", "evaluate.measures.brightness={}"], "--steer needs rewards to draw with"),
        (["RUN", "--steer", "guidance", "rewards.shapes.weight=1"], "--steer guidance differentiates the reward, and"),
        (["--steer", "smc", "--strength", "0.5"], "--strength is of a LoRA, and none is named"),
        (["--steer", "smc", "model.path=somewhere"], "the base model has no held-out prompts: give --prompts FILE"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_before_any_model_is_loaded(words, said, run, toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condrl.training.build.make_policy", lambda *_: pytest.fail("a model is loaded"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    alone = tmp_path / "a" / "b" / "c" / "mine.safetensors"
    shutil.copy(run / "lora" / LORA_FILE, alone)
    places = {"RUN": run, "TOY": toy, "EMPTY": tmp_path / "empty.txt", "ALONE": alone}
    words = [str(places.get(word, word)) for word in words]
    assert said in refused(capsys, *words, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def copied(run, folder, change):
    """A copy of a run with another config."""
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(change(text))
    assert (folder / "config.yaml").read_text() != text
    return folder


def test_a_run_that_lacks_prompts_or_its_base_says_so(run, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    bare = copied(
        run, tmp_path / "bare", lambda text: text.replace(f"heldout: {run.parent}/heldout.txt", "heldout: null")
    )
    assert "has no held-out prompts: give --prompts FILE" in refused(capsys, bare, *out)
    lost = copied(run.with_name("second"), tmp_path / "lost", lambda text: text.replace(f"{run}/lora", "/nowhere/lora"))
    assert "the run started from a LoRA, which is its base" in refused(capsys, lost, *out)
    shutil.rmtree(bare / "lora")
    assert "is not finished" in refused(capsys, bare, *out)


@pytest.fixture
def stranger(run, tmp_path):
    """A run that measures by a reward in a plugin file, which tells that it was imported."""
    mine = tmp_path / "mine.py"
    name = f"mine_{abs(hash(str(tmp_path)))}"
    body = "import condrl, pathlib\npathlib.Path(__file__).with_name('ran').touch()\n\n@condrl.reward\n"
    mine.write_text(f"{body}def {name}(samples, prompts):\n    return samples.flatten(1).mean(1)\n")
    edit = lambda text: text.replace("plugins: []", f"plugins: [{mine}]").replace("evaluated_level:", f"{name}:")  # noqa: E731
    return copied(run, tmp_path / "run", edit)


def test_a_runs_own_plugins_are_imported_when_it_is_trusted(stranger, run, tmp_path, capsys):
    assert "which is code, and that file was found, not named: pass --trust" in refused(
        capsys, stranger, "--out", tmp_path / "x"
    )
    evaluate(stranger, "rewards.evaluated_level.weight=1", out=tmp_path / "named")
    assert not (tmp_path / "ran").exists()
    code, result, _ = evaluate(stranger, f"plugins=[{tmp_path / 'mine.py'}]", out=tmp_path / "x")
    assert (code, (tmp_path / "ran").exists()) == (0, True)
    _, trusted, _ = evaluate(stranger, "--trust", out=tmp_path / "y")
    (found,), (other,) = (r["evaluations"][0]["heldout"].values() for r in (result, trusted))
    assert found == other == heldout(run)["evaluated_level"]


@pytest.mark.parametrize(
    "reward",
    [
        "remote: {url: 'http://127.0.0.1:9', weight: 1.0}",
        "remote: {url: 'http:${run.name}', weight: 1.0}",
        "stranger_beside:f: {weight: 1.0}",
    ],
)
def test_a_found_config_asks_no_server_and_imports_nothing(reward, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "stranger_beside.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    tree = "model: {name: stable_diffusion}\nrun: {name: //127.0.0.1}\nrewards:\n  "
    found = copied(run, tmp_path / "run", lambda _: tree + reward + "\n")
    said = refused(capsys, found, "--prompts", run.parent / "heldout.txt", "--out", tmp_path / "x")
    assert "that file was found, not named: pass --trust" in said


def test_a_run_with_a_samplers_file_says_how_to_trust_it(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import condrl\nfrom condrl.diffusion.transition import euler_maruyama\n\n@condrl.sampler\n"
        "def of_this_test(schedule, times, *, eta: float = 1.0):\n    return euler_maruyama(schedule, times, eta)\n"
    )
    words = [*toy_words("nft", tmp_path / "run"), f"plugins=[{file}]", "sampler.name=of_this_test", "train.epochs=1"]
    assert finetune.main([*words, "evaluate.images_per_prompt=20"]) == 0
    from condrl.registry import sampler

    del sampler.plugins["of_this_test"]
    capsys.readouterr()
    assert command.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert (
        f"was found, not named, so its plugin files are not imported: if you trust them, give plugins=[{file}]" in error
    )


def test_where_a_reward_is_to_be_lowered_those_that_fell_have_won():
    estimate = {"mean": 0.5, "ci95": None, "failed": 0}
    row = {"base": estimate, "tuned": estimate, "difference": estimate, "win_rate": 0.2}
    assert cells("x", row, ("base", "tuned"), {"y"})[-1] == "20%"
    assert cells("x", row, ("base", "tuned"), {"x"})[-1] == "80%"


@pytest.mark.parametrize(
    ("decodes", "code", "said"),
    [
        (0, 2, "error: the model 'mixture' failed: KeyError: 'late'"),
        (1, 1, "stopped: the model failed while images were drawn: KeyError: 'late'; with CONDRL_DEBUG=1"),
    ],
)
def test_a_model_that_fails_is_one_line(decodes, code, said, toy, tmp_path, capsys, monkeypatch):
    fail_after(decodes, monkeypatch)
    assert command.main([str(toy), "--out", str(tmp_path / "out")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("decodes", range(2, 7))
def test_a_model_that_fails_on_held_out_prompts_stops_a_run_in_one_line(decodes, tmp_path, capsys, monkeypatch):
    """After the two of the trial: in the base's images, an epoch's, those measured after it, the same of a second epoch."""
    few = ["evaluate.every=1", "evaluate.images_per_prompt=2", "train.epochs=2", "train.prompts_per_epoch=1"]
    fail_after(decodes, monkeypatch)
    assert finetune.main([*toy_words("dpok", tmp_path / "run"), *few]) == 1
    assert ": KeyError: 'late'; with CONDRL_DEBUG=1" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_cannot_write_its_lora_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    """Its checkpoint is there."""

    def save_adapter(model, folder, metadata=None):
        raise KeyError("late")

    monkeypatch.setattr(Points, "save_adapter", save_adapter)
    assert finetune.main(toy_words("dpok", tmp_path / "run")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stopped: the model could not write its LoRA: KeyError: 'late'")
    assert (tmp_path / "run" / "checkpoints" / "epoch_00000006").is_dir()


def fail_after(decodes, monkeypatch):
    """Have a toy's model fail once it has decoded some states."""
    right, done = Points.decode, []

    def decode(model, x):
        done.append(x)
        if len(done) > decodes:
            raise KeyError("late")
        return right(model, x)

    monkeypatch.setattr(Points, "decode", decode)
