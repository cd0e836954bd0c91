"""`train.optimizer`: what is made, that a stopped run goes on exactly, and that what cannot work is one line."""

import importlib.util
import sys
from dataclasses import replace

import bitsandbytes_stand_in
import pytest
import torch
from chains import Recorded, Shaped, trainer_of
from helpers import toy_words

from condrl import UsageError
from condrl.commands.console import exit_code
from condrl.config import TrainConfig
from condrl.loading import load_config
from condrl.training.checkpoint import newest_checkpoint
from condrl.training.checks import check_combination
from condrl.training.memory import Growth, Needs, memory
from condrl.training.optimizer import MOMENT_BYTES, check_runs, make_optimizer, negative_moment, state_of_a_step
from condrl.training.resume import check_state

EIGHT = {"optimizer": "adamw8bit", "lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.03, "epochs": 4}
BIG = (3, 40, 40)  # its weights are more than the 4096 whose moments get 8 bits


def taken_out():
    """The modules of bitsandbytes that were imported, which are not any more."""
    names = [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The stand-in's module, in place of bitsandbytes."""
    real = taken_out()  # which cannot be imported twice
    bitsandbytes_stand_in.install(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    import bitsandbytes.optim

    yield bitsandbytes.optim
    taken_out()
    sys.modules.update(real)


def big_trainer(folder, **train):
    return trainer_of(folder, model=Shaped(BIG), train=EIGHT | train)


def test_it_is_made_with_the_runs_settings(stand_in, tmp_path):
    """Of each network: an algorithm's own has its own rate, betas and decay."""
    own = Recorded(own=True, betas=(0.1, 0.2), weight_decay=0.4)
    trainer = trainer_of(tmp_path, own=own, train=EIGHT)
    policy, other = stand_in.MADE[-1]
    assert [id(p) for p in policy["params"]] == [id(p) for p in trainer.learner.weights]
    assert [id(p) for p in other["params"]] == [id(p) for p in own.own.parameters()]
    assert (policy["betas"], policy["weight_decay"], policy["eps"]) == ((0.8, 0.95), 0.03, 1e-8)
    assert (other["betas"], other["weight_decay"], other["eps"]) == ((0.1, 0.2), 0.4, 1e-8)
    trainer.run_epoch(0)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == [0.02, 0.07]


def test_with_eight_bits_a_stopped_run_goes_on_exactly(stand_in, tmp_path):
    """Weights and record to the last bit, although its state is nested, of uint8, and shares tensors."""
    whole = big_trainer(tmp_path / "whole")
    whole.fit()
    first = big_trainer(tmp_path / "parts")
    for epoch in range(2):
        first.run_epoch(epoch)
    first.checkpoint()
    path, state = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    kept = state["optimizer"]["state"][0][stand_in.QUANTISED]
    assert kept["state1"].dtype == torch.uint8
    assert kept["state1"].float().std() > 1  # it is used
    again = big_trainer(tmp_path / "parts")
    check_state(again, state, path)
    again.load_state_dict(state)
    again.fit()
    for a, b in zip(whole.learner.weights, again.learner.weights, strict=True):
        assert torch.equal(a, b)
    records = [(tmp_path / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts")]
    assert records[0] == records[1]


def test_a_checkpoint_of_another_optimizer_is_refused(stand_in, tmp_path):
    """In both directions, and one whose scales are below zero."""
    states = {}
    for name in ("adamw", "adamw8bit"):
        trainer = big_trainer(tmp_path / name, optimizer=name)
        trainer.run_epoch(0)
        states[name] = trainer.state_dict()
    for name, state in states.items():
        others = next(other for other in states if other != name)
        check_state(big_trainer(tmp_path / others, optimizer=name), state, tmp_path)
        with pytest.raises(UsageError, match=r"optimizer\.state\.0 has other keys"):
            check_state(big_trainer(tmp_path / name, optimizer=others), state, tmp_path)
    states["adamw8bit"]["optimizer"]["state"][1][stand_in.QUANTISED]["absmax2"].neg_()
    with pytest.raises(UsageError, match=rf"optimizer\.state\.1\.{stand_in.QUANTISED}\.absmax2 is below zero"):
        check_state(big_trainer(tmp_path / "again"), states["adamw8bit"], tmp_path)


def test_without_the_package_it_is_one_line_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config([*toy_words("ddpo", tmp_path), "train.optimizer=adamw8bit"])
    assert exit_code(lambda: check_combination(config)) == 2
    assert capsys.readouterr().err == (
        "error: config train.optimizer: adamw8bit needs bitsandbytes: pip install 'condrl[bnb]'\n"
    )


def test_a_device_without_kernels_is_one_line(tmp_path, monkeypatch, stand_in):
    """And what works leaves no trace."""
    train = replace(TrainConfig(), optimizer="adamw8bit")
    drawn = torch.random.get_rng_state()
    check_runs(train, torch.device("cpu"))
    assert torch.equal(drawn, torch.random.get_rng_state())
    monkeypatch.setattr(stand_in, "DEVICE", "cuda")
    with pytest.raises(UsageError, match=r"adamw8bit does not work on the device cpu here .*no kernel for cpu"):
        check_runs(train, torch.device("cpu"))
    check_runs(TrainConfig(), torch.device("cpu"))


@pytest.mark.parametrize("name", MOMENT_BYTES)
def test_memory_counts_the_moments(name, stand_in, tmp_path):
    """Beside the gradients: what the optimiser holds after a step."""
    shape = (3, 400, 400)  # so that two decimals of a GB tell them apart
    trainer = trainer_of(tmp_path, model=Shaped(shape), train=EIGHT | {"optimizer": name})
    weights = trainer.learner.weights
    kept = state_of_a_step(trainer.config.train, weights)
    moments = sum(
        value.nbytes
        for state in kept.values()
        for value in (state.get(stand_in.QUANTISED) or state).values()
        if torch.is_tensor(value) and value.shape == weights[0].shape
    )
    grown = moments / sum(p.nbytes for p in weights)
    assert grown == MOMENT_BYTES[name] / 4
    none = Growth(0, 0)
    line = memory(trainer, Needs(none, none, none, none, none, 1))
    expected = (1 + grown) * sum(p.nbytes for p in weights) / 1e9
    assert f"optimiser {expected:.2f}" in line


def test_a_moment_below_zero_is_found_wherever_it_is():
    fine = {0: {"exp_avg": torch.tensor([-1.0]), "exp_avg_sq": torch.tensor([0.0])}}
    assert negative_moment(fine) is None
    nested = {3: {"step": 1, "kept": {"absmax2": torch.tensor([1.0, -1e-9]), "absmax1": torch.tensor([2.0])}}}
    assert negative_moment(fine | nested) == "state.3.kept.absmax2"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs condrl[bnb]")
def test_the_real_one_learns_like_adamw_and_can_be_kept():
    """Where it works on this device: AdamW's steps to within the rounding of its moments."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, ends = {name: replace(TrainConfig(), optimizer=name, lr=1e-2) for name in MOMENT_BYTES}, {}
    try:
        check_runs(train["adamw8bit"], device)
    except UsageError as error:
        pytest.skip(str(error))
    target = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(device)
    for name, settings in train.items():
        weight = torch.nn.Parameter(torch.zeros(5000, device=device))
        optimizer = make_optimizer(settings, [{"params": [weight]}])
        for step in range(40):
            if step == 20:  # as a run that is resumed
                state, optimizer = optimizer.state_dict(), make_optimizer(settings, [{"params": [weight]}])
                optimizer.load_state_dict(state)
            weight.grad = weight.detach() - target
            optimizer.step()
        ends[name] = weight.detach()
    assert (ends["adamw"] - ends["adamw8bit"]).norm() < 0.05 * ends["adamw"].norm()
