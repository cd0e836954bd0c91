"""A run that was killed, stopped or copied goes on as if nothing had happened."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import Recorded, trainer_of
from helpers import ALGORITHMS, ROOT, toy_trainer, toy_words
from safetensors import SafetensorError

import condrl
import condrl.training.trainer
from condrl import RunError, UsageError
from condrl.commands import finetune as command
from condrl.commands.console import exit_code
from condrl.diffusion.noise import rng_state, set_rng_state
from condrl.errors import Stopped
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer
from condrl.training.checkpoint import (
    MANIFEST,
    PLAIN,
    TENSORS,
    checkpoints,
    drop_later,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from condrl.training.folder import RunFolder
from condrl.training.learner import Learner
from condrl.training.resume import check_state, find_checkpoint
from condrl.training.trainer import Trainer

KILLS = int(os.environ.get("KILLS", "3"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_going_on_is_not_having_stopped(name, tmp_path):
    """Weights, value networks and every recorded number, to the last bit, for each algorithm there is."""
    whole = toy_trainer(name, tmp_path / "whole")
    whole.fit()
    first = toy_trainer(name, tmp_path / "parts")
    for epoch in range(3):
        first.run_epoch(epoch)
    first.checkpoint()
    first.run_epoch(3)  # lost: recorded, but after the checkpoint
    torch.rand(7)
    again = toy_trainer(name, tmp_path / "parts")
    again.load_state_dict(newest_checkpoint(tmp_path / "parts" / "checkpoints")[1])
    again.fit()
    for a, b in zip(whole.learner.weights, again.learner.weights, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.algorithm.networks().values(), again.algorithm.networks().values(), strict=True):
        for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
            assert torch.equal(p, q)
    records = [(tmp_path / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts")]
    assert records[0] == records[1]
    assert len(records[0].splitlines()) == 6


@condrl.reward
def drawn_by_chance(samples, prompts):
    """As a plugin may: it draws from the generators of torch, numpy and Python."""
    scores = [torch.rand(()).item() + np.random.rand() + random.random() for _ in samples]
    return samples[:, 0] + torch.tensor(scores)


def test_a_budget_that_is_spent_stays_spent(tmp_path):
    words = ["train.kl_budget=1e-9", "train.over_budget=stop"]
    first = toy_trainer("dpok", tmp_path, *words)
    first.fit()
    assert 0 < first.epoch < first.config.train.epochs
    again = toy_trainer("dpok", tmp_path, *words)
    again.load_state_dict(newest_checkpoint(tmp_path / "checkpoints")[1])
    again.fit()
    assert again.epoch == first.epoch


REMEMBERED = {
    "global generators": ("dpok", ["rewards.drawn_by_chance.weight=1"]),
    "adapted kappa": ("dpok", ["train.kl_budget=1e-6", "train.over_budget=adapt", "algorithm.kappa=0.5"]),
    "prompt statistics": ("ddpo", ["algorithm.tracker_length=40", "algorithm.tracker_least=2"]),
    "moments": ("nft", ["train.betas=[0.99,0.999]", "train.warmup=5"]),
    "average": ("nft", ["train.ema=0.9"]),
    "warm-up": ("nft", ["train.warmup=20", "train.lr_decay=linear"]),
}


@pytest.mark.parametrize("what", REMEMBERED)
def test_what_a_run_remembers_goes_on(what, tmp_path):
    """Whatever epochs to come depend on: each of these runs ends otherwise if it is forgotten."""
    name, words = REMEMBERED[what]
    whole = toy_trainer(name, tmp_path / "whole", *words)
    state = rng_state()  # `make` seeds torch's alone
    whole.fit()
    set_rng_state(state)
    first = toy_trainer(name, tmp_path / "parts", *words)
    for epoch in range(3):
        first.run_epoch(epoch)
    first.checkpoint()
    random.seed(1)
    np.random.seed(1)
    again = toy_trainer(name, tmp_path / "parts", *words)
    again.load_state_dict(newest_checkpoint(tmp_path / "parts" / "checkpoints")[1])
    again.fit()
    records = [(tmp_path / part / "metrics.jsonl").read_text().splitlines() for part in ("whole", "parts")]
    assert records[0] == records[1]
    for deployed in (nullcontext, Learner.deploying):
        with deployed(whole.learner), deployed(again.learner):
            for a, b in zip(whole.learner.weights, again.learner.weights, strict=True):
                assert torch.equal(a, b)
    if what == "adapted kappa":
        kappas = [json.loads(line)["kappa"] for line in records[0]]
        assert kappas[3] > 1.2 * kappas[0]


def test_bad_updates_are_counted_across_a_stop(tmp_path):
    """Two in a row before it and one after are three, and the record goes on with how many there were."""
    first = trainer_of(tmp_path, own=Recorded(bad=(2, 3)), train={"max_bad_updates": 3, "epochs": 5})
    for epoch in range(3):
        first.run_epoch(epoch)
    state = first.state_dict()
    again = trainer_of(tmp_path, own=Recorded(bad=(1,)), train={"max_bad_updates": 3, "epochs": 5})
    again.load_state_dict(state)
    with pytest.raises(RunError):
        again.fit()
    other = trainer_of(tmp_path, own=Recorded(bad=(2,)), train={"max_bad_updates": 3, "epochs": 5})
    other.load_state_dict(state)
    other.fit()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["skipped_updates"], line["updates"], line["images"]) == (3, 2, 80)


def test_a_diagnosis_is_against_the_runs_first_epoch(tmp_path):
    """The collapse of a run that was resumed is seen, and measured by how it began."""

    few = ["train.images_per_prompt=64", "train.rollout_batch=64", "sampler.steps=4", "model.knots=4"]
    words = ["algorithm.name=draft", "algorithm.kappa=0", "sampler.eta=0", "train.epochs=2", f"run.dir={tmp_path}"]
    config = load_config([str(ROOT / "configs/toy/g1.yaml"), *few, *words])

    def short() -> Trainer:
        return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))

    first = short()
    first.run_epoch(0)
    again = short()
    again.load_state_dict(first.state_dict())
    with torch.no_grad():  # all points go to the same place
        table = again.learner.weights[0]
        table[0] -= 1 / again.policy.sampler.B.max()
    again.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["diversity"] < 0.1 * lines[0]["diversity"]
    assert "collapse" in lines[1]["diagnosis"]
    assert "collapse" not in lines[0]["diagnosis"]


def finetune(folder: Path, *more: str, name: str = "ddpo") -> list[str]:
    long = ["train.epochs=40", "run.checkpoint_seconds=0", "run.resume=auto", "evaluate.images_per_prompt=20"]
    return [sys.executable, str(ROOT / "scripts" / "finetune.py"), *toy_words(name, folder), *long, *more]


def shapes(folder: Path) -> list[str]:
    """A few small epochs of the embedded pipeline."""
    few = ["train.epochs=8", "train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.updates_per_epoch=2"]
    more = ["sampler.steps=5", "run.checkpoint_seconds=0", "run.resume=auto", "evaluate.prompts=4", f"run.dir={folder}"]
    return [sys.executable, str(ROOT / "scripts" / "finetune.py"), *few, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kills", "adapter"),
    [
        (finetune, KILLS, "network.safetensors"),
        (shapes, KILLS if KILLS > 3 else 1, "pytorch_lora_weights.safetensors"),
        *((partial(finetune, name=name), KILLS - 3, "network.safetensors") for name in ALGORITHMS),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(command, kills, adapter, tmp_path):
    """kill -9 at random instants of the epochs: the record and the weights are the same to the last bit.

    KILLS=20 in the environment kills more often, and every algorithm.
    """
    if not kills:
        pytest.skip("only with KILLS=20 in the environment")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    began = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    lines = (whole / "timings.jsonl").read_text().splitlines()
    epochs = sum(sum(v for k, v in json.loads(line).items() if k != "epoch") for line in lines)
    print(f"undisturbed: {time.monotonic() - began:.0f} s, epochs {epochs:.1f} s")
    rng, killed, starts = random.Random(0), 0, 0
    while killed < kills and starts < 3 * kills:
        if (parts / "result.json").exists():  # it got to its end: begin again
            shutil.rmtree(parts)
        starts += 1
        process = subprocess.Popen(command(parts), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if wait_for_line(process, "tuning:"):
            time.sleep(rng.uniform(0, min(0.9, 2.5 / kills) * epochs))
        process.kill()
        process.stderr.close()
        killed += process.wait() == -signal.SIGKILL
    assert killed == kills
    ended = subprocess.run(command(parts), check=True, capture_output=True, text=True)
    assert "resuming from" in ended.stderr
    for file in ("metrics.jsonl", f"lora/{adapter}"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    held = [json.loads((folder / "result.json").read_text())["heldout"] for folder in (whole, parts)]
    assert held[0] == held[1]


def wait_for_line(process: subprocess.Popen, text: str) -> bool:
    """Read what a process says until a line has the text; False when it ends without."""
    return any(text in line for line in process.stderr)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_epoch_and_saves(number, code, tmp_path):
    command = finetune(tmp_path / "run", "train.epochs=100000", "run.checkpoint_seconds=1e9")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run.resume=auto resumes it" in said
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert read_checkpoint(path)["epoch"] == len(lines)
    assert (tmp_path / "run" / "lora" / "network.safetensors").exists()


def test_stopping_is_an_error_of_its_own(tmp_path):
    trainer = toy_trainer("ddpo", tmp_path)
    trainer.processes.stop(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.fit()
    assert trainer.epoch == 0
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["epoch"] == 0


# ---------------------------------------------------------------------------------------------- files

STATE = {"epoch": 3, "list": [torch.arange(4.0), None, 1.5], "by number": {0: torch.zeros(()), 7: "x"}}


def test_a_checkpoint_holds_what_it_was_given(tmp_path):
    save_checkpoint(tmp_path, "epoch_3", STATE, keep=2)
    found = read_checkpoint(tmp_path / "epoch_3")
    assert torch.equal(found["list"][0], STATE["list"][0])
    assert found["list"][1:] == [None, 1.5]
    assert found["by number"][7] == "x"
    assert found["by number"][0].shape == ()
    assert not list(tmp_path.glob(".*"))


def test_only_the_newest_are_kept(tmp_path):
    for number in range(5):
        save_checkpoint(tmp_path, f"epoch_{number}", {"epoch": number}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_3", "epoch_4"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", [TENSORS, PLAIN, MANIFEST])
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(file, damage, tmp_path, capsys):
    for number in (1, 2):
        save_checkpoint(tmp_path, f"epoch_{number}", {**STATE, "epoch": number}, keep=2)
    damage(tmp_path / "epoch_2" / file)
    path, state = newest_checkpoint(tmp_path)
    assert (path.name, state["epoch"]) == ("epoch_1", 1)
    assert "epoch_2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(failure, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "epoch_1", STATE, keep=2)

    def full(*_, **__):
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunError, match="No space left.*earlier ones are intact"):
        save_checkpoint(tmp_path, "epoch_2", STATE, keep=2)
    assert newest_checkpoint(tmp_path)[0].name == "epoch_1"
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1"]


def test_other_settings_are_refused(tmp_path, monkeypatch):
    from condrl.config import to_yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("left\n")  # a relative path, kept as an absolute one
    mine = "prompts.train=mine.txt"
    trainer = toy_trainer("ddpo", tmp_path, mine)
    (tmp_path / "config.yaml").write_text(to_yaml(trainer.config))
    trainer.checkpoint()
    same = [*toy_words("ddpo", tmp_path), mine, "run.resume=auto"]
    path, state = find_checkpoint(load_config(same))
    assert (path, state["epoch"]) == (tmp_path / "checkpoints" / "epoch_00000000", 0)
    with pytest.raises(UsageError, match=r"planned for 6 epochs .* so it cannot be made longer$"):
        find_checkpoint(load_config([*same, "train.epochs=9"]))
    for other in ("train.lr=0.5", "run.seed=5"):
        with pytest.raises(UsageError, match=rf"that run had {other.split('=')[0]}=.*, and this config has"):
            find_checkpoint(load_config([*same, other]))
    (tmp_path / "b").mkdir()
    RunFolder(tmp_path / "b").file("metrics.jsonl").touch()
    with pytest.raises(UsageError, match="holds a run that would be lost"):
        find_checkpoint(
            load_config([*toy_words("ddpo", tmp_path / "b"), mine, f"run.resume={path}", "run.overwrite=false"])
        )
    with pytest.raises(UsageError, match="is not a complete checkpoint"):
        find_checkpoint(load_config([*toy_words("ddpo", tmp_path), f"run.resume={tmp_path}/nowhere"]))
    assert find_checkpoint(load_config([*toy_words("ddpo", tmp_path / "new"), "run.resume=auto"])) is None


def test_a_run_without_its_record_is_not_resumed(tmp_path):
    """Nor with a part of it; in another folder it goes on without."""
    trainer = toy_trainer("dpok", tmp_path / "run")
    for epoch in range(2):
        trainer.run_epoch(epoch)
    trainer.checkpoint()
    words = [*toy_words("dpok", tmp_path / "run"), "run.resume=auto"]
    path, _ = find_checkpoint(load_config(words))
    record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    advice = rf"put it back, or resume in another folder with run\.name=\.\.\. run\.resume={path}$"
    trainer.recorder.metrics_file.write_bytes(record[:-1])
    with pytest.raises(
        UsageError, match=rf"metrics\.jsonl has {len(record) - 1:,} of the {len(record):,} bytes.*{advice}"
    ):
        find_checkpoint(load_config(words))
    trainer.recorder.metrics_file.unlink()
    for which in ("auto", path):
        with pytest.raises(UsageError, match=rf"metrics\.jsonl is missing.*{advice}"):
            find_checkpoint(load_config([*words, f"run.resume={which}"]))
    found, state = find_checkpoint(load_config([*toy_words("dpok", tmp_path / "other"), f"run.resume={path}"]))
    assert (found, state["epoch"]) == (path, 2)
    trainer.recorder.metrics_file.write_bytes(record + b"a line more")  # of an epoch that is taken back
    assert find_checkpoint(load_config(words))[0] == path


@pytest.mark.slow
def test_a_finished_run_is_resumed_elsewhere_without_a_record(tmp_path):
    run, few = command.main, ["train.epochs=2", "evaluate.images_per_prompt=20"]
    assert run([*toy_words("ddpo", tmp_path / "a"), *few]) == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "epoch_00000002"
    assert run([*toy_words("ddpo", tmp_path / "b"), *few, f"run.resume={checkpoint}"]) == 0
    networks = [(tmp_path / name / "lora" / "network.safetensors").read_bytes() for name in "ab"]
    assert networks[0] == networks[1]
    plots = [(tmp_path / name / "images" / "objective.png").exists() for name in "ab"]
    assert plots == [True, False]  # there is nothing to plot


@pytest.mark.slow
def test_a_run_of_points_that_cannot_be_made_longer_is_told_of_no_lora(tmp_path, capsys):
    words = [*toy_words("dpok", tmp_path / "run"), "train.lr_decay=linear", "evaluate.images_per_prompt=20"]
    assert command.main([*words, "train.epochs=1"]) == 0
    assert command.main([*words, "train.epochs=2", "run.resume=auto"]) == 2
    assert "so it cannot be made longer\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_is_made_longer(tmp_path, capsys):
    """It ends like a run that was as long from the start, to the last bit."""
    run = command.main
    quick = ["train.lr_decay=none", "evaluate.images_per_prompt=20"]

    def words(folder, epochs, *more):
        return [*toy_words("dpok", tmp_path / folder), *quick, f"train.epochs={epochs}", *more]

    assert run(words("whole", 6)) == 0
    assert run(words("parts", 3)) == 0
    assert run(words("parts", 6)) == 2  # neither told to replace it nor to go on
    assert "holds a run already" in capsys.readouterr().err
    assert run(words("parts", 6, "run.resume=auto")) == 0
    for name in ("metrics.jsonl", "lora/network.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("whole", "parts")]
    assert results[0]["heldout"] == results[1]["heldout"]
    assert run(words("parts", 4, "run.resume=auto")) == 2
    assert "has had 6 epochs already, more than train.epochs=4" in capsys.readouterr().err


@pytest.mark.slow
def test_replacing_a_run_leaves_the_users_files(tmp_path):
    run = command.main
    words = [*toy_words("dpok", tmp_path / "run"), "train.epochs=2", "evaluate.images_per_prompt=20"]
    assert run(words) == 0
    own = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    mine = [tmp_path / "run" / name for name in ("notes.txt", "images/holiday.png", "lora/mine", "checkpoints/best/x")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("the user's")
    assert run([*words, "run.overwrite=true", "run.seed=1"]) == 0
    assert [path.read_text() for path in mine] == ["the user's"] * 4
    assert {path for path in (tmp_path / "run").rglob("*") if path.is_file()} == own | set(mine)


def test_checkpoints_keep_what_is_not_theirs(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, f"epoch_{number}", {"epoch": number}, keep=3)
    for name in ("epoch_best/x", "epoch_1/notes.txt", "epoch_3_copy/tensors.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the user's")
    save_checkpoint(tmp_path, "epoch_4", {"epoch": 4}, keep=1)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "epoch_1/notes.txt",
        "epoch_3_copy/tensors.safetensors",
        "epoch_4/manifest.json",
        "epoch_4/state.json",
        "epoch_4/tensors.safetensors",
        "epoch_best/x",
    ]
    assert newest_checkpoint(tmp_path)[1] == {"epoch": 4}


def test_a_checkpoint_tells_keys_apart_and_takes_any_number(tmp_path):
    """Also keys that look alike when joined, numbers that JSON does not have, and integers as keys."""
    state = {
        "a.b": torch.ones(2),
        "a": {"b": torch.zeros(3)},
        "nan": float("nan"),
        "inf": [-float("inf")],
        "n": {3: None},
    }
    save_checkpoint(tmp_path, "epoch_1", state, keep=1)
    found = read_checkpoint(tmp_path / "epoch_1")
    assert torch.equal(found["a.b"], torch.ones(2))
    assert torch.equal(found["a"]["b"], torch.zeros(3))
    assert np.isnan(found["nan"])
    assert (found["inf"], found["n"]) == ([-float("inf")], {3: None})
    assert "NaN" not in (tmp_path / "epoch_1" / "state.json").read_text()


def test_going_on_from_an_earlier_one_drops_the_later(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, f"epoch_{number}", {"epoch": number}, keep=3)
    drop_later(tmp_path / "epoch_1")
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch_1"]


def test_a_finished_run_without_checkpoints_is_not_replaced_by_resuming(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a run that would be lost"):
        find_checkpoint(load_config([*toy_words("ddpo", tmp_path), "run.resume=auto", "run.overwrite=false"]))


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "phase", "number"),
    [
        *((name, "update", signal.SIGTERM) for name in ALGORITHMS),
        ("nft", "rollout", signal.SIGINT),
        ("nft", "save", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_point_loses_nothing(name, phase, number, tmp_path, monkeypatch):
    """Long epochs are given up at once, and the run that goes on ends bit for bit like an undisturbed one."""
    monkeypatch.setattr("condrl.training.trainer.LONG", 0.0)
    whole = toy_trainer(name, tmp_path / "whole")
    whole.fit()
    first = toy_trainer(name, tmp_path / "parts", "run.checkpoint_seconds=0")
    saving = condrl.training.trainer, "save_checkpoint"
    spot = {"rollout": (first.policy, "step"), "update": (first.algorithm, "loss"), "save": saving}
    owner, attribute = spot[phase]
    original, calls = getattr(owner, attribute), []
    count = {"rollout": 7, "update": 4, "save": 3}[phase]

    def interrupted(*arguments):
        calls.append(1)
        done = original(*arguments)
        if len(calls) == count:
            first.processes.stop(number)
        return done

    monkeypatch.setattr(owner, attribute, interrupted)
    with pytest.raises(Stopped):
        first.fit()
    assert len(calls) >= count
    _, state = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert state["epoch"] == {"rollout": 1, "update": 1, "save": 3}[phase]
    again = toy_trainer(name, tmp_path / "parts")
    again.load_state_dict(state)
    again.fit()
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for a, b in zip(whole.learner.weights, again.learner.weights, strict=True):
        assert torch.equal(a, b)


def test_a_run_whose_reward_fails_goes_on_from_that_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("condrl.training.trainer.LONG", 0.0)
    whole = toy_trainer("dpok", tmp_path / "whole")
    whole.fit()
    first = toy_trainer("dpok", tmp_path / "parts", "run.checkpoint_seconds=1e9")
    scored, collect = [], first.collect

    def failing(epoch, clock):
        scored.append(epoch)
        if epoch == 3:
            raise RunError("the reward server is gone")
        return collect(epoch, clock)

    monkeypatch.setattr(first, "collect", failing)
    with pytest.raises(RunError, match="server is gone"):
        first.fit()
    _, state = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert state["epoch"] == 3
    again = toy_trainer("dpok", tmp_path / "parts")
    again.load_state_dict(state)
    again.fit()
    for a, b in zip(whole.learner.weights, again.learner.weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_going_on_elsewhere_leaves_the_other_runs_checkpoints(tmp_path):
    trainer = toy_trainer("dpok", tmp_path / "a")
    for epoch in range(2):
        trainer.run_epoch(epoch)
        trainer.checkpoint()
    source = tmp_path / "a" / "checkpoints" / "epoch_00000001"
    command = finetune(tmp_path / "b", f"run.resume={source}", "train.epochs=2", name="dpok")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {source}" in done.stderr
    assert len(checkpoints(tmp_path / "a" / "checkpoints")) == 2


def test_global_generators_go_on_where_they_were():
    state = rng_state()
    draws = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)]
    save = json.loads(json.dumps({name: state[name] for name in ("python", "numpy")}))
    set_rng_state({**state, **save})
    assert [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(2)] == draws


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(finetune(tmp_path / "file" / "run", "run.resume=never"), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path / 'file'} is a file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_under_the_record_is_one_line(tmp_path, monkeypatch, capsys):
    trainer = toy_trainer("dpok", tmp_path)
    file = trainer.folder.file
    monkeypatch.setattr(
        trainer.folder, "file", lambda name: Path("/dev/full") if name == "metrics.jsonl" else file(name)
    )
    assert exit_code(trainer.fit) == 1
    assert "stopped: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_end_of_accelerate_launch_stops_the_run(tmp_path):
    long = ["train.epochs=100000", "run.checkpoint_seconds=1e9"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *finetune(tmp_path / "run", *long)[1:]]
    process = subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    process.kill()
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "lora").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert read_checkpoint(path)["epoch"] > 0


def test_why_a_state_cannot_be_loaded_is_not_hidden(tmp_path, monkeypatch):
    """Not even where the one from before cannot be loaded either."""
    trainer = toy_trainer("nft", tmp_path)
    state, path = trainer.state_dict(), tmp_path / "epoch_00000001"
    check_state(trainer, state, path)

    def forget(state):
        raise KeyError(f"failure {next(failures)}")

    failures = itertools.count(1)
    monkeypatch.setattr(trainer.algorithm, "load_state_dict", forget)
    with pytest.raises(UsageError, match="its algorithm, rewards or rng: KeyError: 'failure 1'"):
        check_state(trainer, state, path)
    assert next(failures) == 3
