from pathlib import Path

import pytest
from helpers import ROOT

from condrl import UsageError
from condrl.commands import finetune
from condrl.config import build_config, config_help, to_yaml
from condrl.loading import load_config

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def test_later_words_win_and_types_are_kept():
    config = load_config(
        [
            QUICKSTART,
            "train.lr=3e-4",
            "train.betas=[0.9, 0.98]",
            "rewards.jpeg_compressibility.weight=2",
            "sampler.eta=1",
        ]
    )
    assert config.train.lr == 3e-4
    assert tuple(config.train.betas) == (0.9, 0.98)
    assert config.rewards == {
        "shapes": {"batch": 64, "weight": 1.0, "smoothing": 0.0},
        "shapes_exact": {"batch": 64, "weight": 1.0, "smoothing": 0.0},
        "jpeg_compressibility": {"batch": 64, "weight": 2.0, "smoothing": 0.0, "quality": 95},
    }
    assert config.sampler["eta"] == 1.0
    assert config.algorithm["normalise"] is True  # a default of the plugin


def test_resolved_config_loads_again_to_itself(tmp_path):
    config = load_config([QUICKSTART, "train.steps=[1,2]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.epohcs=3", r"train\.epohcs: there is no such key\. Did you mean 'epochs'"),
        ("trian.epochs=3", r"trian.*'train'"),
        ("sampler.etaa=1", r"sampler\.etaa: .*'eta'"),
        ("algorithm.temprature=1", r"algorithm\.temprature: .*'temperature'"),
        ("rewards.shapes.wieght=1", r"rewards\.shapes\.wieght: .*'weight'"),
        ("model.guidence=1", r"model\.guidence: .*'guidance'"),
        ("train.lr=fast", r"train\.lr: .*'fast'"),
        ("train.epochs=2.5", r"train\.epochs: .*2\.5"),
        ("model.dtype=float8", r"model\.dtype: .*float8"),
        ("rewards.shapes.weight=heavy", r"rewards\.shapes\.weight: .*heavy"),
        ("rewards.shpes.weight=1", r"unknown reward 'shpes'. Did you mean 'shapes'"),
        ("algorithm.name=ppo", r"unknown algorithm 'ppo'.*ddpo"),
        ("sampler.name=ddmi", r"unknown sampler 'ddmi'. Did you mean 'ddim'"),
        ("model.name=sd", r"unknown model 'sd'.*stable_diffusion"),
        ("nowhere.yaml", r"no config file .nowhere\.yaml"),
        ("plugins=[nowhere.py]", r"no file nowhere\.py"),
        (
            "train.updates_per_epoch=3",
            r"updates_per_epoch: 16 prompts x 8 images = 128 images per epoch, not divisible by 3",
        ),
        ("train.rollout_batch=48", r"rollout_batch: .* = 128 images per epoch, not divisible by batches of 48"),
        ("train.images_per_prompt=0", r"images_per_prompt: must be at least 1"),
        ("train.lr={", r"cannot read 'train.lr=\{'"),
    ],
)
def test_mistakes_are_one_line(word, message):
    with pytest.raises(UsageError, match=message) as error:
        load_config([QUICKSTART, word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.epochs=010", "the number 010 would be read as 8"),
        ("train.epochs=1:30", "the number 1:30 would be read as 90"),
        ("train.lr=1:30.5", "the number 1:30.5 would be read as 90.5"),
        ("train={epochs: 010}", "the number 010 would be read as 8"),
        (f"train.lr=1{'0' * 400}", "^config: int too large"),
        ("train.normalise_rewards=2", "train.normalise_rewards: expected true or false, got 2"),
        ("model.compile=0.5", "model.compile: expected true or false, got 0.5"),
        ("train.betas=[0.9,true]", "train.betas: expected a number in the list, got True"),
        ("train.steps=[false]", "train.steps: expected a number in the list, got False"),
        ("model.lora_targets=[to_q,[to_k]]", r"model.lora_targets: expected text in the list, got \['to_k'\]"),
    ],
)
def test_values_that_would_be_read_as_others_are_refused(word, message):
    with pytest.raises(UsageError, match=message) as found:
        load_config([QUICKSTART, word])
    assert "\n" not in str(found.value)


def test_broken_yaml_is_one_line(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("train: [1,\n")
    with pytest.raises(UsageError, match=r"cannot read .*broken\.yaml") as error:
        load_config([str(file)])
    assert "\n" not in str(error.value)
    file.write_text("just words\n")
    with pytest.raises(UsageError, match="is not a config"):
        load_config([str(file)])


def test_an_option_without_default_must_be_given():
    import condrl

    @condrl.reward(name="needs_target")
    def needs_target(samples, prompts, *, target: str):
        return samples.mean((1, 2, 3))

    with pytest.raises(UsageError, match=r"rewards.needs_target: needs_target needs target"):
        build_config({"rewards": {"needs_target": {"weight": 1}}})
    assert build_config({"rewards": {"needs_target": {"target": "x"}}}).rewards["needs_target"]["target"] == "x"


def test_a_files_options_go_with_the_plugin_they_were_written_for(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("algorithm: {name: nft, draws: 2}\nsampler: {name: ddim, steps: 7, eta: 0.5}\n")
    config = load_config([str(file), "algorithm.name=ddpo", "algorithm.clip_range=0.1"])
    assert (config.algorithm["name"], config.algorithm["clip_range"]) == ("ddpo", 0.1)
    assert (config.sampler["steps"], config.sampler["eta"]) == (7, 0.5)
    assert load_config([str(file), "algorithm=ddpo"]).algorithm["name"] == "ddpo"
    assert load_config([str(file), "algorithm.name=nft"]).algorithm["draws"] == 2
    with pytest.raises(UsageError, match=r"algorithm\.draws: there is no such key"):
        load_config([str(file), "algorithm.draws=3", "algorithm.name=ddpo"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.name=2026_11_25", "2026_11_25"),
        ("run.name=007", "007"),
        ("run.name=1.10", "1.10"),
        ("run.name=12:30", "12:30"),
        ("run.name=no", "no"),
        ("run.name=1e3", "1e3"),
        ("run.name=null", "null"),
        ("run.name=2026-11-25", "2026-11-25"),
        ("run.name=~", "~"),
        ("run.dir=runs/try #2", "runs/try #2"),
        ("run.dir=null", None),
        ("run.dir=a: b", "a: b"),
        ("model.negative_prompt=blurry #1 ugly", "blurry #1 ugly"),
        ("model.negative_prompt=no", "no"),
        ("model.negative_prompt=", None),
        ("model.negative_prompt=[bad", "[bad"),
        ("model.negative_prompt='quoted'", "'quoted'"),
        ("model.negative_prompt=a=b", "a=b"),
        ("model.path=007", "007"),
        ("model.negative_prompt=price ${oc.env:HOME} ${run.name} $5", "price ${oc.env:HOME} ${run.name} $5"),
        ("run.name=${train.lr}", "${train.lr}"),
        ("model.lora=null", None),
        ("model.lora=0123", "0123"),
        ("train.lr_decay=none", "none"),
        ("sampler.spacing=null", None),
        ("model.lora_targets=[007,no]", ["007", "no"]),
        ("rewards.vlm_judge={url: 'http://x', model: 1.10, question: no}", {"model": "1.10", "question": "no"}),
        ("train.lr=1e-4", 1e-4),
        ("train.kl_budget=null", None),
        ("train.normalise_rewards=yes", True),
    ],
)
def test_text_is_text(word, value, tmp_path):
    """Where the schema says text, the word typed is the text; elsewhere it is YAML."""
    more = ["model.guidance=2"] if "negative_prompt" in word else []
    config = load_config([QUICKSTART, word, *more])
    section, key, *_ = word.split("=")[0].split(".")
    found = getattr(config, section)
    found = found[key] if isinstance(found, dict) else getattr(found, key)
    if isinstance(value, dict):
        found = {name: found[name] for name in value}
    assert (list(found) if isinstance(found, tuple) else found) == value
    assert type(found) is type(value) or isinstance(value, list)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_yaml(load_config([str(tmp_path / "config.yaml")])) == to_yaml(config)  # and is read again as it is


def test_text_in_a_file_is_text(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("run: {name: 2026_11_25}  # a comment\nmodel: {guidance: 2, negative_prompt: no, lora: null}\n")
    config = load_config([str(file)])
    assert (config.run.name, config.model["negative_prompt"], config.model["lora"]) == ("2026_11_25", "no", None)


def test_another_model_has_neither_the_measures_nor_the_spacing_of_the_quickstarts():
    def found(*words):
        config = load_config(words, default=Path(QUICKSTART))
        return set(config.evaluate.measures), config.sampler.get("spacing")

    own = found("train.lr=1e-4")
    assert own[0] >= {"shapes", "shapes_exact"}
    assert own[1] == "trailing"
    assert found("model.path=somewhere") == (set(), "trailing")
    assert found("model.path=somewhere", "evaluate.measures.brightness={}") == ({"brightness"}, "trailing")
    flow = ["model.name=sd3", "model.path=somewhere", "rewards.brightness.weight=1"]
    assert found(*flow)[1] is None
    assert found(*flow, "sampler.spacing=uniform")[1] == "uniform"


def test_rewards_on_the_command_line_replace_the_defaults():
    def names(*words, default=Path(QUICKSTART)):
        return load_config(words, default=default).rewards

    assert set(names()) == {"shapes", "shapes_exact"}
    assert names("rewards.sharpness.weight=2") == {"sharpness": {"batch": 64, "weight": 2.0, "smoothing": 0.0}}
    assert names("rewards.shapes.weight=2") == {"shapes": {"batch": 64, "weight": 2.0, "smoothing": 0.0}}
    assert set(names("rewards.shapes=null")) == {"shapes_exact"}
    assert set(names("rewards.shapes=null", "rewards.sharpness.weight=1")) == {"sharpness"}
    assert set(names("train.epochs=3", "evaluate.measures.sharpness={}")) == {"shapes", "shapes_exact"}
    assert set(names(QUICKSTART, "rewards.sharpness.weight=2")) == {"shapes", "shapes_exact", "sharpness"}
    assert set(names(QUICKSTART, "rewards.sharpness.weight=2", "rewards.shapes=null")) == {"shapes_exact", "sharpness"}
    assert set(load_config([QUICKSTART, "evaluate.measures.shapes=null"]).evaluate.measures) == {"shapes_exact", "clip"}


def test_a_resolved_config_loads_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "lora", "ref.png", "mine.txt", "mine.py"):
        (tmp_path / name).touch()
    words = ["model.path=model", "model.lora=lora", "rewards.similarity.images=ref.png", "prompts.train=mine.txt"]
    words += ["evaluate.measures.similarity.images=ref.png", "plugins=[mine.py]", "run.dir=out/run", "run.name=model"]
    text = to_yaml(load_config(words))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "config.yaml").write_text(text)
    config = load_config(["config.yaml"])
    assert config.model["path"] == str(tmp_path / "model")
    assert config.model["lora"] == str(tmp_path / "lora")
    assert config.rewards["similarity"]["images"] == str(tmp_path / "ref.png")
    assert config.evaluate.measures["similarity"]["images"] == str(tmp_path / "ref.png")
    assert config.plugins == [str(tmp_path / "mine.py")]
    assert config.folder == tmp_path / "out" / "run"
    assert config.run.name == "model"  # a name, also where a file has it
    assert to_yaml(config) == text


def test_a_text_that_is_no_path_is_not_made_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "openai", "quickstart"):
        (tmp_path / name).mkdir()
    words = ["model.negative_prompt=docs", "model.guidance=3", "rewards.clip.weights=openai", "run.name=quickstart"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(words)))
    config = load_config(["config.yaml"])
    assert config.model["negative_prompt"] == "docs"
    assert config.rewards["clip"]["weights"] == "openai"
    assert config.run.name == "quickstart"


def test_references_lead_to_plugins_too(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "run: {name: dpok}\nalgorithm: ${run.name}\nevaluate: {sampler: '${sampler}'}\nsampler: {eta: 0.5}\n"
    )
    config = load_config([str(file)])
    assert config.algorithm["name"] == "dpok"
    assert config.evaluate.sampler["eta"] == 0.5


def test_merged_keys_of_yaml_are_text_too(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("run: {<<: {name: 007}, seed: 3}\n")
    config = load_config([str(file)])
    assert (config.run.name, config.run.seed) == ("007", 3)


def test_a_reward_may_be_named_by_module_and_object(tmp_path, monkeypatch):
    (tmp_path / "dotted_pack").mkdir()
    (tmp_path / "dotted_pack" / "inner.py").write_text(
        "import condrl\n@condrl.reward(differentiable=False)\ndef dotted(samples, prompts, *, level: float = 0.5): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "dotted_pack.inner:dotted"
    words = [f"rewards.{name}.weight=2", f"rewards.{name}.level=0.25", f"evaluate.measures.{name}={{}}"]
    config = load_config([QUICKSTART, *words])
    assert config.rewards[name] == {"batch": 64, "weight": 2.0, "smoothing": 0.0, "level": 0.25}
    assert config.evaluate.measures[name] == {"batch": 64, "level": 0.5}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


def test_a_plugin_named_in_a_word_takes_options_from_others(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("algorithm: dpok\nsampler: {name: ddim, steps: 7}\n")
    config = load_config([str(file), "algorithm.kappa=0.3", "sampler=exponential", "sampler.eta=0.5"])
    assert (config.algorithm["name"], config.algorithm["kappa"]) == ("dpok", 0.3)
    assert (config.sampler["name"], config.sampler["steps"], config.sampler["eta"]) == ("exponential", 7, 0.5)
    config = load_config(["algorithm=dpok", "algorithm.kappa=0.3", "evaluate.sampler={name: exponential}"])
    assert (config.algorithm["name"], config.algorithm["kappa"]) == ("dpok", 0.3)


def test_a_long_text_is_no_path():
    question = "why? " * 100
    words = ["rewards.vlm_judge.url=http://x", "rewards.vlm_judge.model=m", f"rewards.vlm_judge.question={question}"]
    assert load_config([QUICKSTART, *words]).rewards["vlm_judge"]["question"] == question
    to_yaml(load_config([QUICKSTART, *words]))


def test_help_shows_every_key_with_a_comment():
    lines = config_help().splitlines()
    assert any(line.startswith("  lr: 0.0003  # AdamW learning rate") for line in lines)
    assert all(line.endswith(":") or len(line.split("  # ")[1]) > 3 for line in lines), config_help()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.epohcs=3"], "Did you mean 'epochs'"),
        (["--json"], "--json needs a file"),
        (["train.lr=fast"], "train.lr"),
        (["prompts.train=nowhere.txt"], "prompts.train: there is no prompt file 'nowhere.txt'"),
        (["prompts.train={empty}"], "is empty"),
        (["prompts.train={broken}"], "line 2: not usable JSON"),
        (["rewards.beauty.weight=1"], "unknown reward 'beauty'. Available: "),
        (["plugins=[{syntax}]"], "line 1"),
        (["train.updates_per_epoch=5"], "not divisible"),
        (["algorithm.name=ddpo", "sampler.eta=0"], "ddpo needs steps with noise"),
        (["train.steps=[0]"], "nft does not choose among denoising steps"),
        (["algorithm.draws=0"], "algorithm.draws: must be at least 1, got 0"),
        (["algorithm.temperature=-1"], "algorithm.temperature: must be at least 0, got -1"),
        (["algorithm.times=[0.5,0.2]"], "algorithm.times: must rise within (0, 1), got [0.5, 0.2]"),
        (["sampler.eta=2"], "must be in [0, 1], got 2.0"),
        (["rewards.shapes.weight=0", "rewards.shapes_exact.weight=0"], "no reward has a weight"),
        (["algorithm.name=ddpo", "train.steps=[16]"], "train.steps"),
    ],
)
def test_finetune_exits_with_2_before_any_model_work(words, message, tmp_path, monkeypatch, capsys):
    import condrl.models.latent

    def untouched(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(condrl.models.latent, "load_pipeline", untouched)
    monkeypatch.chdir(tmp_path)
    files = {"empty": "empty.txt", "broken": "broken.jsonl", "syntax": "syntax.py"}
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a red star"}\n{"prompt"\n')
    (tmp_path / "syntax.py").write_text("def broken(:\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n")
    defaults = [f"prompts.{which}={prompts}" for which in ("train", "heldout")]
    code = finetune.main([*defaults, *(word.format(**files) for word in words)])
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "/tmp/x", ""])
def test_a_run_name_is_no_path(name):
    with pytest.raises(UsageError, match=r"run\.name: .* is not the name of a folder"):
        build_config({"run": {"name": name}})
    build_config({"run": {"name": name, "dir": "anywhere/else"}})
