"""`condrl benchmark` at tiny sizes: what it counts against what the algorithm does, and its operations against torch's."""

import json

import pytest
import torch
from flow_pipelines import FLUX_NETWORK, SD3_NETWORK
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import condrl.training.memory
import condrl.training.published
from condrl.__main__ import COMMANDS
from condrl.commands import benchmark as command
from condrl.commands.benchmark import Calls, Work, attention_on_a_cpu, compared, peak_flops, table
from condrl.training.published import Published

VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
UNET = {
    "class": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
DDPM = {"class": "PNDMScheduler", "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "skip_prk_steps": True}
FLOW = {"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
TINY = {
    "sd15": ("stable_diffusion", 5.0, [[7, 24]], UNET, DDPM),
    "sdxl": ("sdxl", 3.0, [[7, 24], [10]], UNET | ADDED, DDPM),
    "sd3.5-medium": ("sd3", 4.5, [[9, 48], [36]], {"class": "SD3Transformer2DModel", **SD3_NETWORK}, FLOW),
    "flux": ("flux", 1.0, [[9, 48], [16]], {"class": "FluxTransformer2DModel", **FLUX_NETWORK}, FLOW),
}
STEPS, BATCH, DRAWS = 3, 2, 4  # draws are nft's own


@pytest.fixture
def tiny(monkeypatch):
    """The published models, a few thousand weights each."""
    sizes = {}
    for name, (plugin, guidance, features, network, scheduler) in TINY.items():
        with torch.device("meta"):
            part = condrl.training.published.make_part(network)
        count = sum(p.numel() for p in part.parameters())
        sizes[name] = Published(name, plugin, 16, guidance, count, features, network, VAE, scheduler)
    monkeypatch.setattr(condrl.training.published, "published", lambda: sizes)
    monkeypatch.setattr(command, "peak_flops", lambda device, dtype: 1e12)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), zip(TINY, ["float32", "bfloat16"] * 2, strict=True))
def test_each_family_is_measured(name, dtype, tiny, tmp_path, capsys):
    """As many evaluations as the run makes: with guidance two a step, and of an update only those that it needs."""
    file = tmp_path / "found.json"
    words = [name, "--batch", str(BATCH), "--steps", str(STEPS), "--repeats", "0", "--dtype", dtype]
    assert command.main([*words, "--json", str(file), "model.lora_targets=[to_q]"]) == 0
    found = json.loads(file.read_text("utf-8"))
    guided = 1 if name == "flux" else 2
    assert found["weights"] == tiny[name].weights
    assert (found["dtype"], found["pixels"], found["batch"], found["steps"]) == (dtype, [16, 16], BATCH, STEPS)
    rolled, updated = found["rollout"], found["update"]
    assert (rolled["plain_calls"], rolled["learning_calls"]) == (guided * BATCH * STEPS, 0)
    assert updated["learning_calls"] == guided * BATCH * DRAWS
    assert updated["plain_calls"] == guided * BATCH * DRAWS  # of the policy that the draws' targets are of
    assert rolled["per_second"] * rolled["seconds"] == pytest.approx(BATCH)
    assert updated["per_second"] * updated["seconds"] == pytest.approx(BATCH * DRAWS)
    for row in (rolled, updated):
        assert row["of_bare"] == pytest.approx(row["per_second"] / row["bare_per_second"])
        assert 0 < row["of_peak"] < 1
    out = capsys.readouterr()
    assert f"{name}: {tiny[name].weights:,} weights in {dtype}, 16 x 16 pixels, batch 2, 3 steps" in out.out
    assert "memory: about" in out.err


@pytest.mark.slow
def test_the_run_can_be_changed(tiny, tmp_path):
    """Another algorithm, size and sampler: what it then does is counted."""
    file = tmp_path / "found.json"
    more = ["algorithm.name=ddpo", "sampler.eta=1", "model.height=32", "model.guidance=1", "train.steps_per_image=1"]
    assert command.main(["sd15", "--batch", "3", "--steps", "2", "--repeats", "1", *more, "--json", str(file)]) == 0
    found = json.loads(file.read_text("utf-8"))
    assert (found["algorithm"], found["pixels"], found["guidance"]) == ("ddpo", [32, 16], 1)
    assert found["rollout"]["plain_calls"] == 3 * 2
    assert found["update"]["learning_calls"] == 3


@pytest.mark.slow
def test_the_embedded_pipeline_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "peak_flops", lambda device, dtype: 1e12)
    file = tmp_path / "found.json"
    words = ["shapes", "--batch", "2", "--steps", "1", "--repeats", "0", "train.rollout_dtype=bfloat16"]
    assert command.main([*words, "--json", str(file)]) == 0
    found = json.loads(file.read_text("utf-8"))
    assert (found["model"], found["pixels"], found["rollout_dtype"]) == ("shapes", [64, 64], "bfloat16")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sd16"], "there is no model 'sd16' to measure. Did you mean 'sd15'? Available: shapes, sd15, sdxl"),
        (["sd15", "--batch", "0"], "--batch and --steps must be at least 1"),
        (["sd15", "--repeats", "-1"], "--repeats at least 0"),
        (["sd15", "model.heigth=3"], "model.heigth: there is no such key"),
        (["sd15", "algorithm.name=ddpo"], "the algorithm ddpo needs steps with noise"),
        (["flux", "--dtype", "float32"], "FLUX.1-dev has 47.6 GB of weights, and 20.0 GB are free on cpu"),
    ],
)
def test_what_cannot_be_is_one_line(words, line, monkeypatch, capsys):
    """Before anything is made."""
    monkeypatch.setattr(condrl.training.memory, "free_gb", lambda device: 20.0)
    assert command.main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_attention_has_the_operations_that_torch_counts():
    """Forward as its own products one by one; backward as torch's formula for other devices' kernels."""
    shapes = (2, 3, 10, 8), (2, 3, 14, 8), (2, 3, 14, 8)

    def count(backend, learning):
        q, k, v = (torch.randn(shape, requires_grad=learning) for shape in shapes)
        with FlopCounterMode(display=False, custom_mapping=attention_on_a_cpu()) as counter, sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            if learning:
                out.sum().backward()
        return counter.get_total_flops()

    plain = count(SDPBackend.FLASH_ATTENTION, False)
    assert plain == count(SDPBackend.MATH, False) > 0
    both = count(SDPBackend.FLASH_ATTENTION, True)
    assert both - plain == sdpa_backward_flop_count(shapes[0], *shapes)


def test_the_peak_is_of_the_fastest_product(monkeypatch):
    times = iter([3.0, 0.5, *[2.0] * 8])
    monkeypatch.setattr("condrl.training.clock.seconds", lambda work: next(times))
    assert peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5


def test_a_phase_is_beside_its_bare_calls():
    works = [Work(seconds, 12, Calls(10, 5)) for seconds in (4.0, 3.0, 8.0)]
    row = compared(works, bare=2.0, cost=(7.0, 20.0), peak=100.0)
    assert (row["per_second"], row["bare_per_second"], row["of_bare"]) == (3.0, 6.0, 0.5)
    assert row["of_peak"] == pytest.approx((10 * 7 + 5 * 20) / 4.0 / 100)


def test_what_is_counted_is_counted_once(tiny):
    """And afterwards the model's own method is called."""
    config = command.load_config(command.settings(command.parse(["sd15", "--batch", "2"]), tiny["sd15"]))
    trainer = command.make(config, tiny["sd15"])
    model = trainer.policy.model
    with command.counted(trainer) as calls:
        command.bare_call(trainer, 3, learning=True, rounded=False)
        command.bare_call(trainer, 5, learning=False, rounded=True)
        assert command.take(calls) == Calls(5, 3)
        assert command.take(calls) == Calls(0, 0)
    assert "predict" not in vars(model)
    assert all(p.grad is None for p in model.module.parameters())


def test_the_table_has_what_was_measured():
    row = {"per_second": 2.5, "bare_per_second": 3.0, "of_bare": 0.83, "of_peak": 0.4}
    found = {
        **{"model": "sd15", "weights": 1000, "dtype": "float32", "rollout_dtype": "bfloat16", "pixels": [512, 768]},
        "quantize": None,
        **{"batch": 4, "steps": 3, "guidance": 5.0, "algorithm": "nft", "device": "a card", "peak_tflops": 0.5},
        **{"peak_memory_gb": 1.25, "rollout": row, "update": {**row, "per_second": 7.5}},
    }
    assert table(found) == [
        "sd15: 1,000 weights in float32, roll-outs in bfloat16, 768 x 512 pixels, batch 4, 3 steps, guidance 5, nft",
        "on a card: 0.5 TFLOP/s at its peak, 1.25 GB taken",
        "              a second  bare calls   of bare   of peak",
        "roll-out           2.5           3      0.83      0.40  images",
        "update             7.5           3      0.83      0.40  pairs of image and step",
    ]


def test_it_is_a_command():
    assert "benchmark" in COMMANDS
