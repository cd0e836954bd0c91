"""Lines instead of tracebacks, on streams that fail: what the scripts have around their work."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, toy_trainer, toy_words
from PIL import Image

import condrl
from condrl.commands.console import exit_code
from condrl.errors import UsageError, blaming, naming, stopping_at, warn_of_address_limit
from condrl.io.records import write_json
from condrl.prompts import Row
from condrl.rewards.scoring import make_reward
from condrl.toys.plots import axes_of, save
from condrl.training.checkpoint import newest_checkpoint
from condrl.training.pictures import LABEL_HEIGHT, save_grid

TALKS = """
import sys
from pathlib import Path
from tqdm import tqdm
from condrl.errors import print_main
from condrl.commands.console import exit_code

def work():
    for number in tqdm(range(20000), mininterval=0):
        print(f"a line that fills the pipe {number}", flush=number % 2 == 0)
        print_main(f"another one {number}")
    Path("done").touch()

sys.exit(exit_code(work))
"""


def python(code: str, folder: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, **options)


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_a_reader_that_goes_away_stops_no_work(which, tmp_path):
    """As `| head -1`: the rest is done, the exit code is 0, and nobody is told of a broken pipe."""
    process = python(TALKS, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for name in ("stdout", "stderr") if which == "both" else (which,):
        stream = getattr(process, name)
        os.read(stream.fileno(), 10)
        stream.close()
        setattr(process, name, None)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()
    assert b"Broken" not in (out or b"") + (said or b"")
    if which == "stdout":
        assert b"another one 19999" in said


def test_output_that_fills_its_disk_is_a_warning(tmp_path):
    with Path("/dev/full").open("wb") as full:
        process = python(TALKS, tmp_path, stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0
    assert said.count("warning: standard output cannot be written ([Errno 28] No space left on device)") == 1
    assert "another one 19999" in said


def test_streams_that_the_shell_closed_are_nowhere(tmp_path):
    with python(TALKS, tmp_path, preexec_fn=lambda: (os.close(1), os.close(2))) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_letters_that_a_terminal_lacks_are_escapes(env, tmp_path):
    code = "from condrl.commands.console import *; exit_code(lambda: (print('\\u732b \\U0001f600'), print_main('\\u732b')))"
    out, said = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env).communicate(timeout=60)
    assert out == b"\\u732b \\U0001f600\n"
    assert said == b"\\u732b\n"


# ---------------------------------------------------------------------------------------------- memory


def too_much():
    return torch.empty(10**14)


def short(error):
    def fail():
        raise error

    return fail


MEMORY = [
    too_much,
    lambda: bytearray(10**15),
    short(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    short(OSError(errno.ENOMEM, "Cannot allocate memory")),
    short(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
]


@pytest.mark.parametrize("work", MEMORY)
def test_too_little_memory_is_a_line_that_says_what_to_lower(work, capsys):
    assert exit_code(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: out of memory: lower train.loss_batch, train.rollout_batch or model.decode_batch")
    assert said.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        exit_code(short(RuntimeError("a mistake in the code")))


@pytest.mark.parametrize("kind", ["algorithm", "model", "reward", None])
def test_a_failing_gpu_is_a_line_that_blames_no_plugin(kind, capsys):
    message = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress'"

    def work():
        around = {"algorithm": blaming("algorithm", "nft"), "model": stopping_at("the model failed")}
        around["reward"] = make_reward("brightness", {}).blamed()
        with around.get(kind, nullcontext()):
            raise torch.AcceleratorError(message)

    assert exit_code(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: the GPU failed: CUDA_LAUNCH_BLOCKING=1 in the environment shows which")
    assert "model.attention=_native_flash" in said
    assert "AcceleratorError: CUDA error: an illegal memory access" in said
    assert said.count("\n") == 1
    assert exit_code(short(RuntimeError("CUDA error: out of memory"))) == 1
    assert capsys.readouterr().err.startswith("stopped: out of memory")


def test_an_update_without_memory_stops_with_a_checkpoint_from_before(tmp_path, monkeypatch, capsys):
    trainer = toy_trainer("dpok", tmp_path, "run.checkpoint_seconds=1e9")
    loss = trainer.algorithm.loss
    monkeypatch.setattr("condrl.training.trainer.LONG", 0.0)
    monkeypatch.setattr(trainer.algorithm, "loss", lambda *a: too_much() if trainer.epoch == 2 else loss(*a))
    assert exit_code(trainer.fit) == 1
    assert "stopped: out of memory: lower train.loss_batch" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["epoch"] == 2


@condrl.reward
def greedy(samples, prompts):
    return too_much()


def test_a_reward_without_memory_is_named(capsys):
    assert exit_code(lambda: make_reward("greedy", {})(torch.zeros(1, 3, 8, 8), [Row(0, "a red star")])) == 1
    assert "stopped: the reward 'greedy' ran out of memory: lower train.loss_batch" in capsys.readouterr().err


def test_a_limit_of_addresses_is_told_and_counts_as_memory(monkeypatch, capsys):
    from condrl.training.memory import free_gb

    warn_of_address_limit()
    assert capsys.readouterr().err == ""
    whole, taken = free_gb(torch.device("cpu")), int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + 10**9, resource.RLIM_INFINITY))
    warn_of_address_limit()
    assert "warning: ulimit -v limits this process" in capsys.readouterr().err
    assert free_gb(torch.device("cpu")) == pytest.approx(1, abs=0.1)
    assert whole > 1.2


# ---------------------------------------------------------------------------------------------- disks


@contextmanager
def largest_file(size):
    """Within it, no file can become larger, as with ulimit -f."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def plot(folder):
    figure, _ = axes_of(1, 1)
    save(figure, folder / "x.png")


def lora(folder):
    trainer = toy_trainer("dpok", folder)
    with largest_file(1000), trainer.folder.replacing("lora") as part:
        trainer.policy.model.save_adapter(part)


IMAGES = [torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))]
WRITERS = {
    "x.json": lambda folder: write_json(folder / "x.json", list(range(10_000))),
    "x.png": lambda folder: save_grid(folder / "x.png", IMAGES, ["a red star"]),
    "x.jpg": lambda folder: save_grid(folder / "x.jpg", IMAGES, ["a red star"]),
    "x.webp": lambda folder: save_grid(folder / "x.webp", IMAGES, ["a red star"]),
    "images/x.png": lambda folder: plot(folder),
    "condrl_files.txt": lambda folder: condrl.training.folder.RunFolder(folder).adopt(f"file {i}" for i in range(1000)),
    ".lora.part": lora,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_becomes_too_large_is_a_line_that_names_it(name, tmp_path, capsys):
    def work():
        with largest_file(1000):
            WRITERS[name](tmp_path)

    assert exit_code(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: [Errno 27] File too large: ")
    assert str(tmp_path / Path(name).name) in said
    assert said.count("\n") == 1


def test_a_record_and_a_checkpoint_that_do_not_fit_leave_the_earlier_checkpoint(tmp_path, capsys):
    trainer = toy_trainer("dpok", tmp_path)
    trainer.run_epoch(0)
    trainer.checkpoint()
    size = trainer.recorder.metrics_file.stat().st_size + 100
    with largest_file(size):
        code = exit_code(trainer.fit)
    said = capsys.readouterr().err
    assert code == 1
    assert f"stopped: [Errno 27] File too large: '{trainer.recorder.metrics_file}'" in said
    with largest_file(1000):
        assert exit_code(trainer.checkpoint) == 1
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "File too large" in said
    assert "earlier ones are intact" in said
    found, state = newest_checkpoint(tmp_path / "checkpoints")
    assert (found.name, state["epoch"]) == ("epoch_00000001", 1)


def test_an_error_keeps_the_name_that_it_has(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), naming(tmp_path):
        (tmp_path / "nowhere").read_bytes()


def test_what_was_written_is_read_again(tmp_path):
    """Images in each of the formats, as they were without the detour."""
    for name in ("x.png", "x.jpg", "x.webp", "deep/x.bmp"):
        assert save_grid(tmp_path / name, IMAGES, ["a red star"]) == [tmp_path / name]
        assert np.asarray(Image.open(tmp_path / name)).shape == (300 + LABEL_HEIGHT + 12, 4 * 306 + 6, 3)


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_leaves_everything_behind(tmp_path):
    """And where the locale has no letters of the prompts: what is printed of them are escapes, every file is UTF-8."""
    (tmp_path / "prompts.txt").write_text("\u732b\n\u732b\n\U0001f600\n", "utf-8")
    file, *few = toy_words("dpok", tmp_path / "run")
    distribution = "{weights: [1, 1], means: [0.5, 1], variances: [1, 1]}"
    distributions = f"model: {{distributions: {{\u732b: {distribution}, \U0001f600: {distribution}}}}}\n"
    (tmp_path / "distributions.yaml").write_text(distributions, "utf-8")
    prompts = [f"prompts.{which}={tmp_path}/prompts.txt" for which in ("train", "heldout")]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "finetune.py"),
        file,
        *few,
        str(tmp_path / "distributions.yaml"),
        *prompts,
    ]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen(
        [*command, "train.epochs=2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=tmp_path
    )
    process.stdout.close()
    said = process.stderr.read().decode("ascii")
    assert process.wait(100) == 0, said
    assert "the first '\\u732b' (rows 1 and 2)" in said
    for name in ("result.json", "lora/network.safetensors", "images/objective.png", "metrics.jsonl"):
        assert (tmp_path / "run" / name).is_file()
    assert "\u732b" in (tmp_path / "run" / "config.yaml").read_text("utf-8")


def test_the_process_that_prints_an_error_is_not_killed_before(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr("condrl.commands.console.time", SimpleNamespace(sleep=slept.append))

    def fail():
        raise UsageError("wrong")

    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert exit_code(fail) == 2
    assert slept == [2.0]
    assert capsys.readouterr().err == "error: wrong\n"
