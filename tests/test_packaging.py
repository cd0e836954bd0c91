import json
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, run_python

pytestmark = pytest.mark.slow

PROBE = """
import condrl, condrl.config
print(condrl.__file__, condrl.sampler.find("ddim").source, condrl.reward.names())
print((condrl.io.files.locate("asset:shapes") / "unet/diffusion_pytorch_model.safetensors").stat().st_size)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip install` from a wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("condrl-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_has_plugins_assets_and_types(wheel, tmp_path):
    done = run_python("-c", PROBE, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    first, size = done.stdout.splitlines()
    assert first.count(str(wheel)) == 2  # the wheel's files, not the checkout's
    assert "jpeg_compressibility" in first
    assert 1e6 < int(size) < 25e6
    assert (wheel / "condrl" / "py.typed").is_file()
    assert sum(f.stat().st_size for f in (wheel / "condrl" / "assets").rglob("*") if f.is_file()) < 25e6


def test_a_shipped_config_is_tuned_from_an_empty_folder(wheel, tmp_path):
    words = ["toy/g1", "train.epochs=2", "algorithm.name=nft"]
    done = run_python("-m", "condrl", "finetune", *words, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "result.json").is_file()
    command = json.loads((run / "result.json").read_text())["command"]
    assert command[1:] == ["finetune", *words]
    wrong = run_python("-m", "condrl.commands.finetune", "toy/g2", cwd=tmp_path, PYTHONPATH=str(wheel))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "there is no config file 'toy/g2'" in wrong.stderr


NOTEBOOK = """
import condrl

@condrl.reward
def redness(samples, prompts, *, channel: int = 0):
    return samples[:, channel].mean((1, 2)) - samples.mean((1, 2, 3))

short = ["train.epochs=1", "train.prompts_per_epoch=2", "train.images_per_prompt=4", "evaluate.prompts=2", "sampler.steps=3"]
result = condrl.finetune("rewards.redness.weight=1", *short, "train.updates_per_epoch=1", "train.rollout_batch=8")
images = condrl.sample("runs/quickstart", prompts=["a red star", "a cat"], seeds=[0, 1])
print(sorted(result["heldout"]), [image.size for image in images])
try:
    condrl.finetune("train.epochz=1")
except condrl.UsageError as error:
    print(error)
"""


def test_a_notebook_tunes_and_draws(wheel, tmp_path):
    done = run_python("-c", NOTEBOOK, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    *_, drawn, refused = done.stdout.splitlines()
    assert drawn == "['clip', 'redness', 'shapes', 'shapes_exact'] [(64, 64), (64, 64), (64, 64), (64, 64)]"
    assert refused.startswith("config train.epochz: there is no such key.")


def test_every_shipped_plugin_is_in_the_wheel(wheel):
    for room in ("rewards", "samplers", "algorithms", "models", "steering"):
        files = {file.name for file in (ROOT / "plugins" / room).glob("*.py")}
        assert files == {file.name for file in (wheel / "condrl" / "plugins" / room).glob("*.py")}
        assert len(files) > 2


def test_every_shipped_config_and_prompt_file_is_in_the_wheel(wheel):
    for folder, place in (("configs", "condrl/configs"), ("condrl/assets", "condrl/assets")):
        ours, theirs = (
            {file.relative_to(root) for file in root.rglob("*") if file.suffix in (".yaml", ".txt", ".jsonl")}
            for root in (ROOT / folder, wheel / place)
        )
        assert ours == theirs
        assert len(ours) > 5


def test_editable_install_reads_the_checkout(tmp_path):
    done = run_python("-c", PROBE, cwd=tmp_path)
    assert done.stdout.splitlines()[0].count(str(ROOT)) == 2, done.stderr
