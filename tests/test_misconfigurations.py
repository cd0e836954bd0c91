"""What users get wrong: exit code 2, one line that says what to change, before any model is loaded or file written."""

import pytest
import torch
from helpers import ROOT

import condrl.training.build
from condrl.commands import finetune, sample
from condrl.commands.console import exit_code

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TREE = {
    "prompts.txt": "a red star\ntwo blue circles\n",
    "empty.txt": "\n\n",
    "latin1.txt": "caf\xe9\n".encode("latin1"),
    "utf16.txt": "a red star\n".encode("utf-16"),
    "prompts.csv": "a red star\n",
    "broken.jsonl": '{"prompt": "a red star"}\n{"prompt"\n',
    "array.jsonl": '["a red star"]\n',
    "number.jsonl": '{"prompt": 7}\n',
    "pointer.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "broken.yaml": "train: [1,\n",
    "list.yaml": "- train\n",
    "text.yaml": "just words\n",
    "missing.yaml": "prompts:\n  train: ???\n",
    "null_reward.yaml": "rewards:\n  shapes:\n",
    "env.yaml": "run: {name: '${oc.env:HOME}'}\n",
    "section.yaml": "train: 5\n",
    "nul_name.yaml": 'run: {name: "a\\0b"}\n',
    "nul_dir.yaml": 'run: {dir: "a/b\\0c/d"}\n',
    "nul_path.yaml": 'prompts: {train: "a\\0b.txt"}\n',
    "surrogate.yaml": 'run: {name: "a\\ud800b"}\n',
    "syntax.py": "def broken(:\n",
    "raises.py": "raise RuntimeError('no luck')\n",
    "needs.py": "import a_package_that_is_not_there\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "clash.py": "import condrl\n@condrl.reward\ndef shapes(samples, prompts): return samples.mean((1, 2, 3))\n",
    "weight.py": "import condrl\n@condrl.reward\ndef mine(samples, prompts, *, weight: float = 1): return samples\n",
    "total.py": "import condrl\n@condrl.reward\ndef total(samples, prompts): return samples.mean((1, 2, 3))\n",
    "unprompted.py": "import condrl\n@condrl.reward\ndef mine(samples): return samples.mean((1, 2, 3))\n",
    "steps.py": "import condrl\n@condrl.sampler\ndef mine(schedule, times, *, steps: int = 1): return None\n",
    "wait.py": "import condrl\n@condrl.reward\nasync def mine(samples, prompts): return samples.mean((1, 2, 3))\n",
    "tensor.py": "import condrl, torch\n@condrl.reward\ndef mine(samples, prompts, *, gain: torch.Tensor = 1): return samples\n",
    "good.py": "import condrl\n@condrl.reward\ndef mine(samples, prompts, *, level: float): return samples.mean((1, 2, 3))\n",
    "a_file": "",
    "pictures/holiday.png": "mine",
}

CASES = [
    # keys and types
    ("train.epohcs=3", "train.epohcs: there is no such key. Did you mean 'epochs'?"),
    ("trian.epochs=3", "trian: there is no such key. Did you mean 'train'?"),
    ("lr=1e-4", "lr: there is no such key"),
    ("train.learning_rate=1e-4", "train.learning_rate: there is no such key. Available: epochs"),
    ("algorithm.kappa=1 algorithm.name=ddpo sampler.etaa=1", "sampler.etaa: there is no such key. Did you mean 'eta'?"),
    ("evaluate.sampler.nmae=ddim", "evaluate.sampler.nmae: there is no such key. Did you mean 'name'?"),
    ("evaluate.sampler.seed=1", "evaluate.sampler.seed: there is no such key. Available: "),
    ("model.guidence=1", "model.guidence: there is no such key. Did you mean 'guidance'?"),
    ("rewards.shapes.wieght=1", "rewards.shapes.wieght: there is no such key. Did you mean 'weight'?"),
    ("evaluate.measures.shapes.weight=1", "evaluate.measures.shapes.weight: there is no such key"),
    ("train.lr=fast", "train.lr: "),
    ("train.lr=", "train.lr: "),
    ("train.epochs=2.5", "train.epochs: "),
    ("train.epochs=ten", "train.epochs: "),
    ("train.normalise_rewards=perhaps", "train.normalise_rewards: "),
    ("train.lr={", "cannot read 'train.lr={'"),
    ("train.=3", "cannot read 'train.=3'"),
    ("=3", "there is no config file '=3'"),
    ("train", "there is no config file 'train'; settings are written key=value, without spaces or dashes"),
    ("quickstrt", "there is no config file 'quickstrt'. Did you mean 'quickstart'? Settings are written key=value"),
    ("sd15/compressibilty", "Did you mean 'sd15/compressibility'?"),
    ("--epochs 3", "there is no config file '--epochs'"),
    ("train=5", "train: expected a section of keys, got 5"),
    ("rewards=shapes", "rewards: expected a section of keys, got 'shapes'"),
    ("rewards.shapes=1", "rewards.shapes: expected a section of keys, got 1"),
    ("model.dtype=float8", "model.dtype: "),
    ("train.lr_decay=cosine", "train.lr_decay: "),
    ("sampler.spacing=quadratic", "sampler.spacing: "),
    ("run.trackers=tensorboard", "run.trackers: expected a list, as in run.trackers=[tensorboard]"),
    ("run.trackers=[mlflow]", "run.trackers"),
    ("plugins=good.py", "plugins: expected a list, as in plugins=[good.py]"),
    ("train.betas=[.9]", "train.betas: expected 2 values, got [0.9]"),
    ("train.betas=.9", "train.betas: expected a list"),
    ("train.betas=[.9,1.5]", "train.betas: must be in [0, 1)"),
    ("algorithm.times=[0.1,0.5,0.9]", "algorithm.times: expected 2 values"),
    ("model.lora_targets=to_q", "model.lora_targets: expected a list, as in model.lora_targets=[to_q]"),
    ("train.epochs=${nowhere}", "nowhere"),
    # files
    ("nowhere.yaml", "there is no config file 'nowhere.yaml'"),
    ("a" * 5000, "there is no config file"),
    ("algorithm=nft algorithm.clip_range=1", "algorithm.clip_range: there is no such key. Available: temperature"),
    ("algorithm=7", "unknown algorithm '7'"),
    ("plugins=[tensor.py] rewards.mine.weight=1", "rewards.mine: a parameter of this plugin cannot be set"),
    ("broken.yaml", "cannot read broken.yaml"),
    ("list.yaml", "list.yaml is not a config"),
    ("text.yaml", "text.yaml is not a config"),
    ("section.yaml", "train: expected a section of keys, got 5"),
    ("missing.yaml rewards.shapes.weight=1", "prompts.train"),
    ("null_reward.yaml", "for its default options write rewards.shapes={}"),
    ("pictures", "'pictures' is a folder"),
    ("--train.epochs=1", "settings are written without dashes"),
    ("env.yaml", "run.name: '${oc.env:HOME}' may only refer to a key"),
    ("train.epochs=${oc.env:HOME}", "train.epochs: '${oc.env:HOME}' may only refer to a key"),
    ("", "there is no config file ''"),
    ("prompts.train=nowhere.txt", "prompts.train: there is no prompt file 'nowhere.txt'"),
    ("prompts.train=", "prompts.train"),
    ("prompts.train=pictures", "prompts.train"),
    ("prompts.train=empty.txt", "empty.txt is empty"),
    ("prompts.train=latin1.txt", "latin1.txt, line 1: not UTF-8 text"),
    ("prompts.train=utf16.txt", "utf16.txt"),
    ("prompts.train=prompts.csv", "prompts.csv is neither .txt"),
    ("prompts.train=broken.jsonl", "broken.jsonl, line 2: not usable JSON"),
    ("prompts.train=array.jsonl", "array.jsonl, line 1: expected an object"),
    ("prompts.train=number.jsonl", "number.jsonl, line 1: expected an object"),
    ("prompts.heldout=nowhere.txt", "prompts.heldout: there is no prompt file 'nowhere.txt'"),
    ("prompts.heldout=empty.txt", "empty.txt is empty"),
    # plugins
    ("plugins=[nowhere.py]", "there is no file nowhere.py"),
    ("plugins=[pictures]", "pictures"),
    ("plugins=[prompts.txt]", "prompts.txt"),
    ("plugins=[syntax.py]", "syntax.py, line 1"),
    ("plugins=[raises.py]", "RuntimeError: no luck"),
    ("plugins=[needs.py]", "a_package_that_is_not_there"),
    ("plugins=[leaves.py]", "leaves.py"),
    ("plugins=[clash.py]", "two files define the reward 'shapes'"),
    ("plugins=[weight.py]", "weight"),
    ("plugins=[total.py]", "total"),
    ("plugins=[unprompted.py]", "prompts"),
    ("plugins=[steps.py]", "steps"),
    ("plugins=[wait.py]", "is async: write def instead of async def"),
    ("plugins=[good.py] rewards.mine.weight=1", "rewards.mine: mine needs level"),
    ("plugins=[good.py] rewards.mine.level=high", "rewards.mine.level: "),
    ("rewards.beauty.weight=1", "unknown reward 'beauty'. Available: "),
    ("rewards.beauty.weight=2", "one of yours needs its file, as in plugins=[my_reward.py], and @condrl.reward in it"),
    ("rewards.shpes.weight=1", "unknown reward 'shpes'. Did you mean 'shapes'?"),
    ("evaluate.measures.beauty={}", "unknown reward 'beauty'"),
    ("rewards.os:getcwd.weight=1", "os:getcwd"),
    ("rewards.no_such_module:thing.weight=1", "no_such_module"),
    ("algorithm.name=ppo", "unknown algorithm 'ppo'"),
    ("algorithm=ppo", "unknown algorithm 'ppo'"),
    ("sampler.name=ddmi", "unknown sampler 'ddmi'. Did you mean 'ddim'?"),
    ("model.name=sd", "unknown model 'sd'"),
    ("evaluate.sampler.name=eular", "unknown sampler 'eular'"),
    # rewards
    ("rewards.shapes.weight=.nan", "rewards.shapes.weight: must be a finite number, got nan"),
    ("rewards.shapes.weight=.inf", "rewards.shapes.weight: must be a finite number, got inf"),
    ("rewards.shapes.weight=heavy", "rewards.shapes.weight: "),
    ("rewards.shapes.weight=0", "no reward has a weight"),
    ("rewards.shapes=null rewards.shapes_exact=null", "no reward has a weight"),
    ("rewards.sharpness=null", "rewards.sharpness: there is no sharpness for null to remove"),
    ("rewards.shapez=null rewards.shapes.weight=2", "rewards.shapez: there is no shapez for null to remove"),
    ("evaluate.measures.sharpness=null", "evaluate.measures.sharpness: there is no sharpness"),
    ("algorithm=null", "algorithm: is null; leave it out for ddpo"),
    ("model.negative_prompt=??? model.guidance=3", "model.negative_prompt: ??? stands for a value"),
    ("rewards.remote.weight=1", "rewards.remote: remote needs url"),
    ("rewards.remote.url=localhost:8200", "rewards.remote.url"),
    (
        "rewards.remote.url=http://me:sk-1@h",
        "rewards.remote.url: an address must not contain a user or password",
    ),
    ("model.path=https://me:sk-1@h/m", "model.path: an address must not contain a user or password"),
    (
        "rewards.vlm_judge.url=http://h rewards.vlm_judge.model=m rewards.vlm_judge.key=NO_SUCH_KEY",
        "NO_SUCH_KEY is not set",
    ),
    (
        "rewards.vlm_judge.url=http://h rewards.vlm_judge.model=m rewards.vlm_judge.key=sk-1",
        "by the name of an environment",
    ),
    ("rewards.vlm_judge.url=http://h rewards.vlm_judge.model=m rewards.vlm_judge.key=hf_sk", "variable is not set"),
    ("rewards.remote.url=http://a..b", "rewards.remote.url: expected an address"),
    (
        "rewards.remote.url=http://h rewards.remote.timeout=1e10",
        "remote.timeout: must be above 0 seconds and at most a day",
    ),
    ("rewards.remote.url=http://h rewards.remote.backoff=1e300", "remote.backoff: must be at most a day"),
    ("run.name=a\udcffb", "run.name: 'a\\udcffb' contains bytes that are not UTF-8 text"),
    ("run.name=a\x1b[31mb", "there are control characters in its name"),
    ("rewards.hps.version=v3", "rewards.hps.version"),
    ("rewards.similarity.images=nowhere.png", "nowhere.png"),
    ("rewards.clip.model=ViT-L-41", "ViT-L-41"),
    ("rewards.clip.model=ViT-B-32 rewards.clip.weights=nowhere.pt", "nowhere.pt"),
    ("rewards.aesthetic.head=prompts.txt", "prompts.txt"),
    ("algorithm.name=draft", "draft differentiates the reward, and shapes has no gradient"),
    # arithmetic
    ("train.epochs=0", "train.epochs: must be at least 1, got 0"),
    ("train.images_per_prompt=0", "train.images_per_prompt: must be at least 1"),
    ("train.images_per_prompt=1", "train.images_per_prompt=1 leaves nothing to compare"),
    ("train.updates_per_epoch=3", "128 images per epoch, not divisible by 3 updates"),
    ("train.rollout_batch=48", "128 images per epoch, not divisible by batches of 48"),
    ("train.loss_batch=-1", "train.loss_batch: must be at least 1"),
    ("train.lr=0", "train.lr: must be above 0"),
    ("train.lr=.nan", "train.lr: must be a finite number"),
    ("train.max_grad_norm=0", "train.max_grad_norm: must be above 0"),
    ("train.warmup=-1", "train.warmup: must be at least 0"),
    ("train.weight_decay=-1", "train.weight_decay: must be at least 0"),
    ("train.max_failed=1", "train.max_failed: must be in [0, 1)"),
    ("train.kl_budget=-1", "train.kl_budget: must be above 0"),
    ("train.over_budget=adapt", "train.over_budget: has no effect without train.kl_budget"),
    ("train.steps_per_image=0", "train.steps_per_image: must be at least 1"),
    ("evaluate.prompts=0", "evaluate.prompts: must be at least 1"),
    ("evaluate.every=0", "evaluate.every: must be at least 1"),
    ("evaluate.images_per_prompt=0", "evaluate.images_per_prompt: must be at least 1"),
    ("evaluate.pictures=-1", "evaluate.pictures: must be at least 0"),
    ("run.threads=0", "run.threads: must be at least 1"),
    ("run.seed=-1", "run.seed: must be in [0, 2^64), got -1"),
    ("run.seed=18446744073709551616", "run.seed: must be in [0, 2^64)"),
    ("run.keep_checkpoints=0", "run.keep_checkpoints: must be at least 1"),
    ("run.checkpoint_seconds=-1", "run.checkpoint_seconds: must be at least 0"),
    # samplers and algorithms
    ("sampler.steps=0", "sampler.steps"),
    ("sampler.steps=2000", "sampler.steps"),
    ("sampler.eta=2", "must be in [0, 1], got 2.0"),
    ("sampler.eta=-1", "sampler.eta"),
    ("sampler.noise_steps=[99]", "sampler.noise_steps"),
    ("algorithm.name=ddpo sampler.eta=0", "ddpo needs steps with noise"),
    ("algorithm.name=ddpo train.steps=[16]", "train.steps"),
    ("algorithm.name=ddpo train.steps_per_image=99", "train.steps_per_image"),
    ("train.rollout_dtype=float8", "train.rollout_dtype"),
    ("algorithm.name=ddpo train.window=0", "train.window: must be from 1 to"),
    ("algorithm.name=ddpo train.window=99", "train.window: must be from 1 to"),
    ("algorithm.name=ddpo train.window=2 train.steps=[0]", "train.steps: has no effect beside train.window"),
    ("algorithm.name=ddpo train.window=2 train.steps_per_image=3", "train.steps_per_image: must be from 1 to 2"),
    ("train.window=2", "nft does not choose among denoising steps: leave train.window out"),
    ("algorithm.name=ddpo algorithm.clip_range=0", "algorithm.clip_range: must be positive"),
    ("algorithm.name=ddpo algorithm.kappa=-1", "algorithm.kappa: must be at least 0"),
    ("algorithm.name=reinforce train.inner_epochs=2", "train.inner_epochs=1"),
    ("algorithm.name=ctrl sampler.name=heun", "affine in the score"),
    ("algorithm.name=dpok sampler.name=dpm_solver_pp sampler.eta=1", "remembers earlier steps"),
    ("train.steps=[0]", "nft does not choose among denoising steps"),
    ("algorithm.draws=0", "algorithm.draws: must be at least 1, got 0"),
    ("algorithm.temperature=-1", "algorithm.temperature: must be at least 0, got -1"),
    ("algorithm.times=[0.5,0.2]", "algorithm.times: must rise within (0, 1)"),
    ("algorithm.clip_range=1", "algorithm.clip_range: there is no such key. Available: temperature"),
    # folders
    ("run.name=a/b", "run.name: 'a/b' is not the name of a folder"),
    ("run.name=..", "run.name"),
    ("run.name=", "run.name"),
    ("run.dir=a_file", "a_file is a file"),
    ("run.dir=a_file/run", "a_file is a file"),
    ("run.dir=pictures", "pictures holds holiday.png, which no run wrote"),
    ("run.dir=pictures run.overwrite=true", "pictures holds holiday.png, which no run wrote"),
    ("run.dir=. run.overwrite=true", "which no run wrote"),
    ("run.dir=pictures run.resume=auto", "pictures holds holiday.png, which no run wrote"),
    ("run.name=../x", "run.name: '../x' is not the name of a folder"),
    ("run.name=a/../../x", "run.name: 'a/../../x' is not the name of a folder"),
    ("run.name=/tmp/x", "run.name: '/tmp/x' is not the name of a folder"),
    ("run.name=.", "run.name: '.' is not the name of a folder"),
    (f"run.name={'x' * 300}", "the run's folder cannot be made"),
    (f"run.dir=a/{'x' * 300}/b", "the run's folder cannot be made"),
    (f"run.dir={'x/' * 3000}", "the run's folder cannot be made"),
    (f"{QUICKSTART} nul_name.yaml", "there are control characters in its name"),
    (f"{QUICKSTART} nul_dir.yaml", "there are control characters in its name"),
    (f"{QUICKSTART} nul_path.yaml", "prompts.train: the prompt file 'a\\x00b.txt' cannot be read"),
    (f"{QUICKSTART} surrogate.yaml", "cannot read surrogate.yaml"),
    ("run.dir=~nobody_of_that_name/x", "run.dir: ~nobody_of_that_name/x: there is no user of that name"),
    ("run.resume=~nobody_of_that_name/x", "is not a complete checkpoint"),
    ("prompts.train=~nobody_of_that_name/x.txt", "there is no prompt file '~nobody_of_that_name/x.txt'"),
    ("plugins=[~nobody_of_that_name/x.py]", "there is no file ~nobody_of_that_name/x.py"),
    ("run.resume=nowhere", "nowhere is not a complete checkpoint"),
    ("--json", "--json needs a file"),
    ("--json pictures", "--json pictures: is not a file that can be written"),
    ("--json a_file/result.json", "--json a_file/result.json: is not a file"),
    ("--json a_file/of/result.json", "a_file is a file"),
    (f"--json {'x' * 300}.json", "is not a file that can be written"),
]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with files of all sorts, from which no model can be loaded."""

    def untouched(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(condrl.training.build, "make_policy", untouched)
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), CASES, ids=[words[:60] for words, _ in CASES])
def test_a_misconfiguration_is_one_line(words, message, tree, capsys):
    code = finetune.main(words.split(" "))
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    assert captured.err.startswith("error: ")
    assert message in captured.err
    there = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if "__pycache__" not in path.parts}
    assert there == {*TREE, "pictures"}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision bf16 has no effect here: use --mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend inductor has no effect here"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps 4 has no effect here"),
    ],
)
def test_options_of_accelerate_launch_without_effect_are_refused(variable, value, message, tree, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    assert finetune.main([]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


SAMPLES = [
    ("", "nothing to draw"),
    ("nowhere --prompt x", "there is no run or LoRA nowhere"),
    ("pictures --prompt x", "there is no LoRA at pictures"),
    ("a_file pictures --prompt x", "expected one run or LoRA"),
    ("pointer.safetensors --prompt x", "Git LFS"),
    ("prompts.txt --prompt x", "prompts.txt"),
    ("--prompt x --compare", "--compare and --strength need"),
    ("--prompt x --strength 0.5", "--compare and --strength need"),
    ("--prompt x --out picture", "--out picture: give the name of an image, such as picture.png"),
    ("--prompt x --out pictures", "--out pictures: give the name of an image"),
    ("--prompt x --out a_file/x.png", "a_file is a file"),
    ("--prompt x --folder a_file", "a_file is a file"),
    ("--prompt x --out x.xbm", "--out x.xbm: give the name of an image, such as x.png"),
    ("--prompt ", "--prompt: the prompt is empty"),
    ("--prompt a\udcff", "--prompt: the prompt has half of a surrogate pair"),
    (f"--prompt {'x' * 100_001}", "--prompt: the prompt has 100,001 characters; at most 100,000 are allowed"),
    ("--prompt x --out x.psd", "--out x.psd: give the name of an image, such as x.png"),
    (f"--prompt x --out {'x' * 300}.png", "--out: File name too long"),
    (f"--prompt x --out {'x' * 300}/x.png", "File name too long"),
    (f"--prompt x --folder {'x' * 300}", "File name too long"),
    (f"{'x' * 300} --prompt x", "there is no run or LoRA"),
    ("--prompt x --device foo", "--device foo cannot be used: "),
    ("--prompt x --device cuda", "--device cuda cannot be used: "),
    ("--prompt x --device meta", "--device meta cannot be used: "),
    ("pointer.safetensors --prompt x --strength nan", "Git LFS"),
    ('--prompt x model={"lora":x}', "has no effect here"),
    ("--prompt x --seeds -1", "--seeds"),
    ("--prompt x --batch 0", "--batch"),
    ("--prompts nowhere.txt", "--prompts: there is no prompt file"),
    ("--prompt x model.guidence=3", "Did you mean 'guidance'?"),
    ("--prompt x train.lr=1", "train.lr=1 has no effect on drawing"),
    ("--prompt x rewards.shapes.weight=1", "has no effect on drawing"),
    ("--prompt x model.compile=true", "model.compile=true has no effect on drawing: images are drawn sooner than"),
    ("--prompt x model.lora_alpha=4", "model.lora_alpha=4 has no effect here"),
    ("--prompt x model.lora=x", "model.lora=x has no effect here"),
]


@pytest.mark.parametrize(("words", "message"), SAMPLES, ids=[words[:60] for words, _ in SAMPLES])
def test_a_mistake_in_sampling_is_one_line(words, message, tree, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = sample
    code = exit_code(lambda: script.sample(script.parse(words.split(" ") if words else [])))
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    assert message in captured.err
    assert {path.relative_to(tree).as_posix() for path in tree.rglob("*")} == {*TREE, "pictures"}


def test_there_are_many():
    assert len(CASES) >= 120
