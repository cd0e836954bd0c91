"""Several processes: the same gradients as one, one error for all, and a checkpoint that any number can go on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import ALGORITHMS, ROOT, run_python, toy_words
from safetensors.torch import load_file

from condrl import RunError, UsageError
from condrl.diffusion.noise import Noise
from condrl.loading import load_config
from condrl.plugins.models.mixture import Mixture
from condrl.processes import Processes
from condrl.training.host import check_equal_calls, make_accelerator

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FINETUNE = str(ROOT / "scripts" / "finetune.py")
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
SMALL = ["train.prompts_per_epoch=4", "evaluate.images_per_prompt=5"]
FAULTY = """
import os
import condrl

@condrl.reward
def faulty(samples, prompts, *, fails_in: int = 1):
    if int(os.environ.get("RANK", "0")) == fails_in:
        raise ValueError("no license found")
    return samples[:, 0]
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """For every registered algorithm, over two epochs of two updates, with prompts that come twice."""
    worker = str(ROOT / "tests" / "distributed.py")
    for start, folder in (([], "one"), (TORCHRUN, "two")):
        done = run_python(*start, worker, str(tmp_path / folder), cwd=ROOT / "tests", **CPU)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / folder / "gradients.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert {key.split()[0] for key in one} == set(ALGORITHMS)
    for key, expected in one.items():
        assert expected.norm() > 0, key
        torch.testing.assert_close(two[key], expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    for name in ALGORITHMS:  # and each line of the record, which the first process writes once
        records = [(tmp_path / f / name / "metrics.jsonl").read_text().splitlines() for f in ("one", "two")]
        assert len(records[0]) == len(records[1]) == 2
        for line, other in zip(*(map(json.loads, record) for record in records), strict=True):
            assert line.keys() == other.keys()
            for key in line.keys() - {"diagnosis", "network_calls"}:  # each process checks some ratios
                assert other[key] == pytest.approx(line[key], rel=1e-3, abs=1e-4), (name, key)


def test_an_error_in_one_process_ends_all_with_it(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    more = [f"plugins=[{tmp_path / 'faulty.py'}]", "rewards.quadratic.weight=0", "rewards.faulty.weight=1"]
    words = [*toy_words("ddpo", tmp_path / "run"), *SMALL, *more, "prompts.heldout=null"]
    begun = time.monotonic()
    done = run_python(*TORCHRUN, FINETUNE, *words, cwd=tmp_path, CONDRL_DEBUG="1", **CPU)
    assert done.returncode != 0
    said = "error: process 1 failed: UsageError: the reward 'faulty' failed for the prompt"
    assert any(line.startswith(said) and line.endswith("no license found") for line in done.stderr.splitlines())
    assert 'raise ValueError("no license found")' in done.stderr  # the traceback of process 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begun < 120


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Two processes are asked to stop; one goes on, and the run ends as if one had done it all."""
    words = [*toy_words("adjoint_matching", tmp_path / "parts"), *SMALL, "train.epochs=150", "run.resume=auto"]
    command = [sys.executable, *TORCHRUN, FINETUNE, *words]
    environment = {**os.environ, **CPU}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    record = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while (not record.exists() or len(record.read_bytes().splitlines()) < 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert "stopped by SIGTERM" in said
    assert 5 <= len(record.read_bytes().splitlines()) < 150
    done = run_python(FINETUNE, *words, cwd=tmp_path, **CPU)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from" in done.stderr
    whole = [*toy_words("adjoint_matching", tmp_path / "whole"), *SMALL, "train.epochs=150"]
    assert run_python(FINETUNE, *whole, cwd=tmp_path, **CPU).returncode == 0
    weights = [load_file(tmp_path / folder / "lora" / "network.safetensors") for folder in ("parts", "whole")]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-2, atol=1e-3)
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("parts", "whole")]
    assert results[0]["images"] == results[1]["images"]


@pytest.mark.parametrize("more", [["algorithm.advantage=prompt", "train.images_per_prompt=1"], ["train.kl_budget=100"]])
def test_a_run_of_two_processes_ends_like_one(more, tmp_path):
    """From the config to result.json, with prompts that come twice in one process only, and a budget."""
    words = [
        "train.prompts_per_epoch=6",
        "train.rollout_batch=48",
        "train.updates_per_epoch=1",
        "evaluate.every=3",
        *more,
    ]
    results = []
    for start, folder in (([], "one"), (TORCHRUN, "two")):
        command = [*start, FINETUNE, *toy_words("ddpo", tmp_path / folder), *words, "evaluate.images_per_prompt=20"]
        done = run_python(*command, cwd=tmp_path, **CPU)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads((tmp_path / folder / "result.json").read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["images"] == two["images"]
    for who in ("base", "tuned"):
        means = [result["heldout"]["quadratic"][who]["mean"] for result in results]
        assert means[1] == pytest.approx(means[0], rel=1e-3, abs=1e-3)
    records = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    for line, other in zip(*(map(json.loads, record) for record in records), strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"diagnosis", "network_calls"}:
            assert other[key] == pytest.approx(line[key], rel=1e-2, abs=1e-2), key


def test_a_process_whose_scores_all_failed_does_not_hold_up_the_others(tmp_path):
    judge = FAULTY.replace('raise ValueError("no license found")', "return samples[:, 0] * float('nan')")
    (tmp_path / "faulty.py").write_text(judge)
    more = [f"plugins=[{tmp_path / 'faulty.py'}]", "rewards.quadratic.weight=0", "rewards.faulty.weight=1"]
    words = [*toy_words("ctrl", tmp_path / "run"), *SMALL, *more, "prompts.heldout=null", "train.max_failed=0.6"]
    done = run_python(*TORCHRUN, FINETUNE, *words, cwd=tmp_path, **CPU)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["failed_scores"] for line in lines] == [16] * 6
    assert all(line["grad_norm"] > 0 and line["value_explains"] == line["value_explains"] for line in lines)


SHARDED = {"ACCELERATE_USE_FSDP": "true"}
IMAGES = [
    str(ROOT / "configs" / "quickstart.yaml"),
    *("algorithm.name=grpo", "algorithm.kappa=0.1", "sampler.steps=3", "train.epochs=2", "train.max_failed=0"),
    "train.rollout_dtype=null",  # half precision would make more of a merged LoRA than of one beside the weights
    *("train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.updates_per_epoch=2", "train.loss_batch=3"),
    *("evaluate.images_per_prompt=1", "evaluate.every=1", "evaluate.prompts=3", "run.check_ratios=true"),
]


HALVES = """
import torch
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.training.memory import here

torch.distributed.init_process_group("gloo")
model = StableDiffusion(torch.device("cpu"), guidance=1.0)
condition, weights = model.encode(["a red star"]), list(model.module.parameters())
x, t = torch.ones(1, 4, 8, 8), torch.full((1,), 0.5)
whole, count = model.score(x, t, condition), sum(p.numel() for p in weights)
seen = model.network_features(x, t, condition)
lora = sum(p.numel() for p in weights if p.requires_grad)
model.shard()
torch.testing.assert_close(model.score(x, t, condition), whole, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(model.network_features(x, t, condition), seen, rtol=1e-5, atol=1e-5)
parts = [here(p) for p in model.module.parameters()]
assert sum(p.numel() for p in parts if p.requires_grad) == lora
assert sum(p.numel() for p in parts) - lora <= 0.51 * (count - lora)
torch.distributed.destroy_process_group()
"""


def test_each_process_holds_half_of_the_frozen_weights(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    done = run_python(*TORCHRUN, str(tmp_path / "halves.py"), cwd=tmp_path, **CPU)
    assert done.returncode == 0, done.stderr[-2000:]


BLOCKS = """
import sys
import torch
import torch.distributed.fsdp._fully_shard._fully_shard as torchs
from torch.distributed.tensor import DTensor
from condrl.loading import load_config
from condrl.models.latent import STAYS_ON_HOST, LatentModel
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import Row
from condrl.training.build import make_trainer

networks, held, kept = [], [], []
take, load, shard = torchs._get_modules_and_states, StableDiffusion.load, LatentModel.shard

def taking(*given):
    found = take(*given)  # moves parameters and buffers to the device
    parts = sum(p.to_local().nbytes for p in networks[0].parameters() if isinstance(p, DTensor))
    held.append(parts + sum(x.nbytes for x in (*found[-2], *found[-1])))
    return found

def loading(self):
    kept.append(STAYS_ON_HOST.get())
    return load(self)

def sharding(self):
    networks.append(self.module)
    shard(self)

torchs._get_modules_and_states, StableDiffusion.load, LatentModel.shard = taking, loading, sharding
torch.manual_seed(0)
trainer = make_trainer(load_config(sys.argv[1:]), [Row(0, "a red star"), Row(1, "a blue circle")])
frozen = sum(p.nbytes for p in StableDiffusion(trainer.policy.model.device).module.parameters() if not p.requires_grad)
assert kept == [True, False], kept
assert len(held) > 10, held
assert max(held) < 0.7 * frozen, (max(held), frozen)
trainer.processes.end()
"""


def test_no_process_has_the_whole_network_on_its_device(tmp_path):
    """It is on the host until it is split; a device is given a block beside the parts of those before it."""
    (tmp_path / "blocks.py").write_text(BLOCKS)
    words = [*IMAGES, f"run.dir={tmp_path / 'run'}"]
    done = run_python(*TORCHRUN, str(tmp_path / "blocks.py"), *words, cwd=tmp_path, **CPU, **SHARDED)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sharded_weights_tune_like_whole_ones(tmp_path):
    """Three held-out prompts for two processes, a KL to the base model, ratios, minibatches and pictures."""
    results, loras = [], []
    for name, more in (("whole", {}), ("sharded", SHARDED)):
        words = [*IMAGES, f"run.dir={tmp_path / name}"]
        done = run_python(*TORCHRUN, FINETUNE, *words, cwd=tmp_path, **CPU, **more)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (next(tmp_path.rglob(f"{name}/metrics.jsonl"))).read_text().splitlines()
        results.append([json.loads(line) for line in lines])
        assert ("sharded weights 0.007 GB" in done.stderr) == (name == "sharded")  # of .013, with the LoRA
        loras.append(load_file(next(tmp_path.rglob(f"{name}/lora/*.safetensors"))))
    assert loras[0].keys() == loras[1].keys()
    whole, sharded = (torch.cat([lora[key].flatten() for key in sorted(loras[0])]) for lora in loras)
    assert (sharded - whole).norm() < 0.02 * whole.norm()  # Adam makes much of gradients near zero
    for line, other in zip(*results, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"diagnosis", "network_calls"}:
            assert other[key] == pytest.approx(line[key], rel=1e-2, abs=1e-3), key


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.prompts_per_epoch=3"], "prompts_per_epoch: must be a multiple of the 2 processes"),
        (["train.updates_per_epoch=8"], "images_per_prompt: must be a multiple of updates_per_epoch"),
        (["train.max_failed=0.1"], "max_failed: must be 0"),
        (["train.kl_budget=1"], "kl_budget: must be left out"),
        (["algorithm.name=alignprop", "train.max_failed=0"], "the algorithm alignprop draws how many steps"),
    ],
)
def test_what_cannot_compute_in_step_is_refused(more, said, monkeypatch):
    config = load_config([*IMAGES, *more])
    with pytest.raises(UsageError, match=said):
        check_equal_calls(config, 2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    make_accelerator(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=said):
        make_accelerator(config)
    toy = Mixture(torch.device("cpu"), distributions={"x": {"weights": [1], "means": [0], "variances": [1]}})
    with pytest.raises(UsageError, match="a model of points cannot be sharded"):
        toy.shard()


def test_a_process_with_sharded_weights_says_why_it_fails_and_meets_nobody(monkeypatch, capsys):
    class Started:
        num_processes, process_index, device = 2, 1, torch.device("cpu")

    def fail():
        raise RunError("no license found")

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match="no license found"):
        Processes(Started()).synchronized(fail)
    assert capsys.readouterr().err == "process 1 failed: RunError: no license found\n"


def test_prompts_that_cannot_be_shared_out_are_refused(tmp_path):
    words = [*toy_words("ddpo", tmp_path / "run"), "train.prompts_per_epoch=1"]
    done = run_python(*TORCHRUN, FINETUNE, *words, cwd=tmp_path, **CPU)
    assert done.returncode != 0
    line = "error: config train.prompts_per_epoch: 1 prompts cannot be distributed over 2 processes"
    assert done.stderr.count(line) == 1  # not once for each


@pytest.mark.parametrize("group", [1, 4, 12])
def test_noise_does_not_depend_on_how_it_is_split(group):
    whole = Noise("seed", range(12), group)
    first, second = whole.normal((2, 3)), whole.normal((2, 3))
    assert not torch.equal(first, second)
    for parts in ([range(5), range(5, 12)], [range(1), range(1, 2), range(2, 12)]):
        pieces = [Noise("seed", indices, group) for indices in parts]
        assert torch.equal(torch.cat([piece.normal((2, 3)) for piece in pieces]), first)
        assert torch.equal(torch.cat([piece.normal((2, 3)) for piece in pieces]), second)
    assert torch.equal(whole[3:7].normal((2, 3)), first[3:7])
    assert len(first.flatten().unique()) == first.numel()


@pytest.mark.parametrize("parts", [[range(12)], [range(5), range(5, 12)], [range(1), range(1, 2), range(2, 12)]])
def test_a_group_can_start_from_the_same_noise(parts):
    """Where chains begin, and nowhere else; no two groups begin alike."""
    pieces = [Noise("seed", indices, 4, same_start=True) for indices in parts]
    start = torch.cat([piece.start((2, 3)) for piece in pieces])
    then = torch.cat([piece.normal((2, 3)) for piece in pieces])
    assert torch.equal(start, start[::4].repeat_interleave(4, 0))
    assert len(start.flatten().unique()) == 3 * 6
    assert len(then.flatten().unique()) == then.numel()
    apart = Noise("seed", range(12), 4)
    assert torch.equal(apart.start((2, 3)), Noise("seed", range(12), 4).normal((2, 3)))
    assert torch.equal(Noise("seed", range(12), 4, same_start=True)[3:7].start((2, 3)), start[3:7])


def test_noise_is_standard_normal():
    x = Noise("seed", range(4000), 8).normal((10,))
    assert x.mean().abs() < 4 / 40_000**0.5
    assert x.std() == pytest.approx(1, abs=0.02)
    assert x.T.corrcoef().fill_diagonal_(0).abs().max() < 4.5 / 4000**0.5
    images = x.view(-1, 8, 10).transpose(0, 1).flatten(1)
    assert images.corrcoef().fill_diagonal_(0).abs().max() < 4.5 / 5000**0.5


def test_the_folder_of_a_running_run_is_not_taken(tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_python(FINETUNE, *toy_words("ddpo", tmp_path / "run"), cwd=Path(tmp_path), **CPU)
    assert done.returncode == 2
    assert "another process is writing to" in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_is_one_that_accelerate_reads(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == {"cpu": 1, "single_gpu": 1, "multi_gpu": 8, "multi_node": 16, "fsdp": 8}[file.stem]
    assert config.mixed_precision == "no"


def test_launching_with_an_example(tmp_path):
    example = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", example, FINETUNE]
    done = run_python(*launch, *toy_words("nft", tmp_path / "run"), "--dry-run", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "2 prompts x 8 images = 16 images" in done.stderr


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "DEEPSPEED"])
def test_a_model_split_over_processes_is_refused(kind, monkeypatch):
    from accelerate import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", getattr(DistributedType, kind))
    with pytest.raises(UsageError, match="is not supported: use one of"):
        make_accelerator(load_config(toy_words("nft", Path("run"))))
