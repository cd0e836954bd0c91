import dataclasses
import functools
import importlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import ROOT, run_python

import condrl
from condrl import UsageError
from condrl.algorithms.base import Algorithm
from condrl.algorithms.examples import Examples
from condrl.config import GridConfig, RewardConfig
from condrl.diffusion.schedule import VP
from condrl.diffusion.transition import Coefficients
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.registry import COMMON, load_file, snake_case
from condrl.training.build import make_sampler, make_trainer
from condrl.training.checks import check_combination
from condrl.training.preflight import preflight


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def test_shipped_files_are_found_by_name_and_listed():
    plugin = condrl.reward.find("jpeg_compressibility")
    assert plugin.options["quality"].default == 95
    assert plugin.options["quality"].comment == "JPEG quality, 1 to 95"
    assert "kB" in plugin.description
    assert {"shapes", "shapes_exact", "jpeg_compressibility", "jpeg_incompressibility"} <= set(condrl.reward.names())


def test_every_shipped_plugin_has_a_description_and_comments():
    for kind in (condrl.reward, condrl.sampler, condrl.algorithm, condrl.model):
        for name in kind._shipped():
            plugin = kind.find(name)
            assert plugin.description, name
            assert all(option.comment for option in plugin.options.values()), name


def test_a_module_beside_shipped_plugins_is_no_plugin(tmp_path, monkeypatch):
    write(tmp_path / "shared_part.py", "VALUE = 1\n")
    monkeypatch.setattr(sys.modules["condrl.plugins.rewards"], "__path__", [str(tmp_path)])
    assert "shared_part" not in condrl.reward._shipped()


@pytest.mark.slow
def test_what_is_typed_at_a_prompt_can_be_registered(tmp_path):
    code = """
        import sys
        import condrl
        del sys.modules["__main__"].__file__

        @condrl.reward
        class Typed:
            def __init__(self, *, gain: float = 2.0): ...
            def __call__(self, samples, prompts): ...

        @condrl.reward
        def typed_too(samples, prompts, *, gain: float = 3.0): ...

        print([condrl.reward.find(name).options["gain"].default for name in ("typed", "typed_too")])
    """
    (tmp_path / "prompt.py").write_text(f"exec(compile({textwrap.dedent(code)!r}, '<stdin>', 'exec'))")
    done = run_python(str(tmp_path / "prompt.py"), cwd=ROOT)
    assert done.stdout.strip() == "[2.0, 3.0]", done.stderr


def test_unknown_names_get_the_list_and_the_nearest():
    with pytest.raises(UsageError, match=r"unknown reward 'shape'\. Did you mean 'shapes'\? Available: .*jpeg_comp"):
        condrl.reward.find("shape")


def test_snake_case():
    assert [snake_case(n) for n in ("DDPO", "StableDiffusion", "QLearning", "redness")] == [
        "ddpo",
        "stable_diffusion",
        "q_learning",
        "redness",
    ]


def test_duplicates_name_both_files(tmp_path):
    body = "import condrl\n@condrl.reward\ndef twice(samples, prompts):\n    return samples.mean((1, 2, 3))\n"
    first, second = write(tmp_path / "one.py", body), write(tmp_path / "two.py", body)
    load_file(str(first))
    load_file(str(first))  # the same file again is no duplicate
    with pytest.raises(UsageError, match=r"'twice'.*one\.py.*two\.py"):
        load_file(str(second))


def test_a_shipped_name_is_not_taken_over(tmp_path):
    body = "import condrl\n@condrl.reward\ndef jpeg_incompressibility(samples, prompts):\n    return samples.mean((1, 2, 3))\n"
    with pytest.raises(UsageError, match=r"jpeg_incompressibility.*plugins.*mine\.py"):
        load_file(str(write(tmp_path / "mine.py", body)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def broken(:\n", r"line 1"),
        ("import surely_not_installed\n", r"surely_not_installed.*pip install"),
        ("1 / 0\n", r"ZeroDivisionError"),
        ("import sys\nsys.exit('good bye')\n", r"failed while it was imported: SystemExit: good bye"),
        ("raise BaseException('of\\nits own')\n", r"failed while it was imported: BaseException: of its own"),
        ("x = 1\0\n", r"null bytes"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", r"line 1"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path, body, message):
    with pytest.raises(UsageError, match=message) as error:
        load_file(str(write(tmp_path / "bad.py", body)))
    assert "bad.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_plugin_file(tmp_path):
    with pytest.raises(UsageError, match="no file nowhere.py"):
        load_file("nowhere.py")
    with pytest.raises(UsageError, match="is a folder: give the .py files in it"):
        load_file(str(tmp_path))
    with pytest.raises(UsageError, match=r"mine\.txt is not a \.py file"):
        load_file(str(write(tmp_path / "mine.txt", "")))


def test_files_whose_names_differ_in_a_sign_are_two_plugins(tmp_path):
    (tmp_path / "a").mkdir()
    for number, name in enumerate(("my-r.py", "my_r.py", "a/b.py", "a_b.py")):
        body = f"import condrl\n@condrl.reward\ndef of_sign_{number}(samples, prompts):\n    return {number}\n"
        load_file(str(write(tmp_path / name, body)))
    assert [condrl.reward.find(f"of_sign_{n}").target(None, None) for n in range(4)] == [0, 1, 2, 3]


WITH_HELPER = """
import condrl
import helper_beside
from pack_beside.inner import factor

@condrl.reward
def {name}(samples, prompts):
    import helper_beside as late
    return late.VALUE * factor, helper_beside.VALUE
"""


def test_a_plugin_file_that_has_changed_is_imported_again(tmp_path):
    """Also where only a digit has, in the second that it was written in."""
    file = tmp_path / "edited.py"
    found = []
    for value in (1, 7, 7):
        file.write_text(f"import condrl\n\n@condrl.reward\ndef edited(samples, prompts):\n    return {value}\n")
        found.append(load_file(str(file)))
        assert condrl.reward.find("edited").target(None, None) == value
    assert found[0] is not found[1] is found[2]


def test_a_plugin_file_is_imported_again_with_the_module_beside_it(tmp_path):
    """As Python runs it: without what condrl's own modules import from the future."""
    file, beside = tmp_path / "leaning.py", tmp_path / "leant_on.py"
    file.write_text(
        "import condrl, leant_on\n\n@condrl.reward\ndef leaning(samples, prompts, *, n: int = 1):\n"
        "    return leant_on.VALUE\n"
    )
    for value in (1, 20):
        beside.write_text(f"VALUE = {value}\n")
        module = load_file(str(file))
        assert condrl.reward.find("leaning").target(None, None) == value
    assert module.leaning.__annotations__ == {"n": int}


def test_a_plugin_file_imports_the_files_beside_it_and_no_others(tmp_path):
    """Two users have a helper.py each; and what is installed is not shadowed by a file beside a plugin."""
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder / "pack_beside").mkdir(parents=True)
        write(tmp_path / folder / "helper_beside.py", f"VALUE = {value}\n")
        write(tmp_path / folder / "random.py", "raise RuntimeError('not the one of the standard library')\n")
        write(tmp_path / folder / "pack_beside" / "__init__.py", "")
        write(tmp_path / folder / "pack_beside" / "inner.py", f"factor = {10 * value}\n")
        name = f"beside_{folder}"
        load_file(str(write(tmp_path / folder / "mine.py", "import random\n" + WITH_HELPER.format(name=name))))
    assert condrl.reward.find("beside_one").target(None, None)[1] == 1
    assert condrl.reward.find("beside_two").target(None, None) == (2 * 20, 2)
    assert not [entry for entry in sys.path if entry.startswith(str(tmp_path))]
    helpers = [sys.modules[condrl.reward.find(f"beside_{n}").target.__module__].helper_beside for n in ("one", "two")]
    assert [helper.VALUE for helper in helpers] == [1, 2]
    again = write(tmp_path / "one" / "other.py", WITH_HELPER.format(name="beside_again"))
    shared = load_file(str(again)).helper_beside
    assert shared is helpers[0]  # one folder, one module
    assert sys.modules["condrl.registry"].load_file is load_file  # and nothing of ours was imported anew


def test_a_file_beside_a_plugin_may_be_called_like_a_script(tmp_path, monkeypatch):
    """Python puts the folder of the script that runs before all others."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    path = sys.path[:]
    monkeypatch.delitem(sys.modules, "sample", raising=False)
    write(tmp_path / "sample.py", "VALUE = 3\n")
    assert load_file(str(write(tmp_path / "mine.py", "import sample\n"))).sample.VALUE == 3
    assert sys.path == path
    monkeypatch.delitem(sys.modules, "sample")


@pytest.mark.slow
def test_a_plugin_beside_condrl_itself_does_not_load_it_twice(tmp_path):
    """As a user's file in the repository's own root: `condrl` lies beside it."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import condrl
        from condrl.io.plugin_files import importing_beside
        from pathlib import Path
        known = condrl.reward
        with importing_beside(Path({str(ROOT)!r})):
            import condrl.rewards.pixels
        with importing_beside(Path({str(tmp_path)!r})):
            import condrl.rewards.pixels as again
        assert condrl.reward is known and again is condrl.rewards.pixels is sys.modules['condrl.rewards.pixels']
        print('same')
    """
    done = run_python("-c", textwrap.dedent(code), cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("samples", r"takes \(samples\) where a reward takes \(samples, prompts\[, metadata\]\[, \*, option"),
        ("prompts, samples", r"takes \(prompts, samples\)"),
        ("images, prompts", r"takes \(images, prompts\)"),
        ("samples, metadata", r"takes \(samples, metadata\)"),
        ("samples, prompts, gain=1.0", r"takes \(samples, prompts, gain\)"),
        ("samples, prompts, metadata, extra", r"takes \(samples, prompts, metadata, extra\)"),
        ("*args", r"takes \(\*args\)"),
        ("samples, prompts, **options", r"takes \(samples, prompts, \*\*options\)"),
        ("samples, prompts, *, weight: float = 1.0", r"an option 'weight', which means something else"),
        ("samples, prompts, *, name: str = ''", r"an option 'name'"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_with_the_right_signature(tmp_path, signature, message):
    body = f"import condrl\n@condrl.reward\ndef wrong_here({signature}):\n    return 0\n"
    with pytest.raises(UsageError, match=f"the reward 'wrong_here'.*{message}") as error:
        load_file(str(write(tmp_path / "wrong.py", body)))
    assert "\n" not in str(error.value)
    assert "wrong_here" not in condrl.reward.names()


def test_rewards_that_are_classes_are_checked_likewise():
    class Nothing:
        pass

    class Positional:
        def __init__(self, gain=1.0):
            self.gain = gain

        def __call__(self, samples, prompts):
            return samples

    class Short:
        def __call__(self, samples):
            return samples

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()

        def forward(self, samples, prompts):
            return samples

    for target, message in (
        (Nothing, r"without a method __call__\(self, samples, prompts\)"),
        (Positional, r"write a \* before gain"),
        (Short, r"__call__ takes \(samples\) where a reward takes \(self, samples, prompts\[, metadata\]\)"),
        (Module, r"__call__ takes \(\*args, \*\*kwargs\)"),
        (
            dataclasses.make_dataclass("Data", [("gain", float, 1.0)], namespace={"__call__": Positional.__call__}),
            "gain",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            condrl.reward(target)
    with pytest.raises(UsageError, match="is a partial: it should be a function or a class"):
        condrl.reward(functools.partial(max), name="partly_max")


def test_options_that_no_config_could_set_are_refused_for_every_kind():
    for registry, target, message in (
        (condrl.sampler, lambda schedule, times, eta=1.0: None, r"write a \* before eta"),
        (condrl.sampler, lambda schedule, times, *, steps=3: None, "option 'steps'"),
        (condrl.sampler, lambda schedule, times, *, spacing=None: None, "option 'spacing'"),
        (condrl.sampler, lambda schedule, times, *, noise_steps=None: None, "option 'noise_steps'"),
        (condrl.model, lambda device, path: None, r"write a \* before path"),
        (condrl.model, lambda device, *, name: None, "option 'name'"),
        (condrl.algorithm, lambda kappa=0.1: None, r"write a \* before kappa"),
        (condrl.algorithm, lambda *, name="": None, "option 'name'"),
    ):
        with pytest.raises(UsageError, match=message):
            registry(target, name="wrong_options")
        assert "wrong_options" not in registry.names()


def test_the_common_options_are_those_of_the_config():
    assert {*COMMON["reward"]} == {"name", *(field.name for field in dataclasses.fields(RewardConfig))}
    assert {*COMMON["sampler"]} == {"name", *(field.name for field in dataclasses.fields(GridConfig))}


@pytest.mark.parametrize(
    "name", ["total", "mine_std", "mine_ci95", "my.reward", "my reward", "", "1st", "a/b", "<lambda>"]
)
def test_names_that_a_config_or_a_record_cannot_hold(name):
    with pytest.raises(UsageError, match="cannot be called|cannot name a reward") as error:
        condrl.reward(lambda samples, prompts: samples, name=name or None)
    assert "test_registry.py" in str(error.value)


def test_names_with_a_hyphen_are_names():
    condrl.reward(lambda samples, prompts: samples, name="my-own")
    assert "my-own" in load_config(["rewards.my-own.weight=2"]).rewards


def test_dotted_path(tmp_path, monkeypatch):
    write(
        tmp_path / "elsewhere.py", "def plain(samples, prompts, *, gain: float = 2.0):\n    '''A plain function.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugin = condrl.reward.find("elsewhere:plain")
    assert plugin.options["gain"].default == 2.0
    with pytest.raises(UsageError, match=r"no 'plane'. Did you mean 'plain'"):
        condrl.reward.find("elsewhere:plane")
    assert (plugin.differentiable, plugin.cached) == (True, False)


def test_a_dotted_path_keeps_the_flags(tmp_path, monkeypatch):
    (tmp_path / "flagged").mkdir()
    body = """
        import condrl

        @condrl.reward(differentiable=False, cached=True)
        def of_flags(samples, prompts, *, gain: float = 2.0):
            return samples

        def wrong(samples):
            return samples

        whole = 3
        """
    write(tmp_path / "flagged" / "__init__.py", "")
    write(tmp_path / "flagged" / "part.py", body)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = condrl.reward.find("flagged.part:of_flags")
    assert (plugin.name, plugin.differentiable, plugin.cached) == ("flagged.part:of_flags", False, True)
    write(tmp_path / "mine.yaml", "rewards: {'flagged.part:of_flags': {weight: 3, gain: 4}}")
    assert load_config([str(tmp_path / "mine.yaml")]).rewards == {
        "flagged.part:of_flags": {"batch": 64, "weight": 3.0, "smoothing": 0.0, "gain": 4.0}
    }
    with pytest.raises(UsageError, match=r"'flagged.part:wrong' takes \(samples\)"):
        condrl.reward.find("flagged.part:wrong")
    with pytest.raises(UsageError, match=r"unknown reward 'flagged.part:whole'"):
        condrl.reward.find("flagged.part:whole")


def third_party_package(site):
    """What `pip install` leaves of a package with an entry point in the group condrl.plugins."""
    write(
        site / "bright_pack.py",
        """
        import condrl

        @condrl.reward
        def glow(samples, prompts, *, gamma: float = 1.0):
            "Mean glow."
            return samples.mean((1, 2, 3)) ** gamma
        """,
    )
    info = site / "bright_pack-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: bright-pack\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[condrl.plugins]\nglow = bright_pack\n")


@pytest.mark.slow
def test_entry_point_of_an_installed_package_from_outside_the_repository(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    third_party_package(site)
    path = os.pathsep.join([str(site), str(ROOT)])
    code = "import condrl; p = condrl.reward.find('glow'); print(p.description, p.options['gamma'].default)"
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert done.stdout.strip() == "Mean glow. 1.0", done.stderr
    listed = run_python(str(ROOT / "scripts" / "plugins.py"), "glow", cwd=tmp_path, PYTHONPATH=path)
    assert "reward glow: Mean glow." in listed.stdout, listed.stderr


def test_import_is_light():
    code = "import sys, condrl; print([m for m in ('torch', 'diffusers', 'peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_plugins_script_lists_everything():
    done = run_python(str(ROOT / "scripts" / "plugins.py"), cwd=ROOT)
    for word in (
        "sampler ddim",
        "algorithm ddpo",
        "reward shapes",
        "model stable_diffusion",
        "eta: float = 1.0",
        "clip_range",
    ):
        assert word in done.stdout
    wrong = run_python(str(ROOT / "scripts" / "plugins.py"), "dpo", cwd=ROOT)
    assert wrong.returncode == 2
    assert "no plugin is called 'dpo'. Did you mean 'dpok'? Available: aesthetic, box" in wrong.stderr


@pytest.mark.slow
def test_help_of_the_plugin_scripts_needs_no_torch():
    for script, command in (("plugins", "plugins"), ("reward_server", "serve")):
        code = f"""
            import runpy, sys
            sys.argv = ["{script}", "--help"]
            try:
                runpy.run_path({str(ROOT / "scripts" / f"{script}.py")!r}, run_name="__main__")
            finally:
                print("torch" in sys.modules, file=sys.stderr)
        """
        done = run_python("-c", textwrap.dedent(code), cwd=ROOT)
        assert done.returncode == 0
        assert done.stderr.strip() == "False"
        assert f"condrl {command}" in done.stdout


# ---------------------------------------------------------------------------------------------- what newcomers get wrong


@condrl.sampler
def gives_numbers(schedule, times):
    return times[:-1], times[:-1], times[:-1]


@condrl.sampler
def one_number_too_many(schedule, times):
    return Coefficients(schedule, times, times, times, times)


@condrl.sampler
def not_finite(schedule, times):
    return Coefficients(schedule, times, times[:-1] / 0, times[:-1], times[:-1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gives_numbers", "the sampler gives_numbers returned a tuple: it should return Coefficients.at"),
        ("one_number_too_many", r"has A of shape \(9,\): each of 8 steps needs a finite number"),
        ("not_finite", r"has A of values \[inf"),
    ],
)
def test_a_sampler_that_returns_something_else_is_one_line(name, said):
    with pytest.raises(UsageError, match=said):
        make_sampler({"name": name, "steps": 8, "spacing": "uniform"}, VP())


def test_a_plugin_takes_what_its_kind_is_given():
    with pytest.raises(UsageError, match=r"takes \(schedule\) where a sampler takes \(schedule, times\[, \*, option"):
        condrl.sampler(lambda schedule: None, name="too_few")
    with pytest.raises(UsageError, match=r"takes \(\) where a steering takes \(draws\["):
        condrl.steering(lambda: None, name="too_few")


def test_an_algorithm_is_a_dataclass_below_algorithm(tmp_path):
    class Plain(Algorithm):
        kappa: float = 0.0

    with pytest.raises(UsageError, match=r"has fields and is not a dataclass: write @dataclass\(kw_only=True\)"):
        condrl.algorithm(Plain, name="plain")

    @condrl.algorithm
    class Elsewhere:
        pass

    config = load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), "algorithm.name=elsewhere"])
    with pytest.raises(
        UsageError, match=r"elsewhere should be a class derived from condrl\.algorithms\.base\.Algorithm"
    ):
        check_combination(config)


@dataclasses.dataclass(kw_only=True)
class Mistaken(Algorithm):
    """Returns from its loss what it is told to."""

    returns: str = "fine"

    def examples(self, policy, experience, train, noise):
        return Examples(condition=experience.rollout.condition, k=torch.arange(2))

    def loss(self, policy, batch):
        loss = policy.action(torch.zeros(len(batch.k), 1), batch.k, batch.condition)[:, 0]
        value = loss.detach().mean()
        return {
            "fine": (loss, {"value": value}),
            "a mean": (loss.mean(), {}),
            "a tensor alone": loss,
            "detached": (loss.detach(), {}),
            "a float": (loss, {"value": 0.5}),
        }[self.returns]


condrl.algorithm(Mistaken, name="mistaken")


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ("fine", None),
        ("a mean", r"the algorithm's loss has shape \(\) for \d+ pairs: it should be the loss of each"),
        ("a tensor alone", "should return two things: a tensor, and a dict of metrics"),
        ("detached", "has no gradient in what is trained"),
        ("a float", "the algorithm's metric 'value' is a float: it should be a tensor"),
    ],
)
def test_a_loss_that_is_something_else_is_one_line_before_the_run(returns, said, tmp_path):
    words = ["algorithm.name=mistaken", f"algorithm.returns={returns}", f"run.dir={tmp_path}"]
    config = load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), *words])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    if said is None:
        assert preflight(trainer)
        return
    with pytest.raises(UsageError, match=said):
        preflight(trainer)


def test_a_changed_cell_of_a_notebook_replaces_its_plugin(tmp_path):
    """A notebook compiles each version of a cell as a file of its own; of two plugin files that is still an error."""
    code = "import condrl\n\n@condrl.reward\ndef of_a_cell(samples, prompts):\n    return samples[:, {}]\n"
    cells = [write(tmp_path / f"{i}.py", code.format(i)) for i in (0, 1)]
    for cell in cells:
        exec(compile(cell.read_text(), str(cell), "exec"), {"__name__": "__main__"})
    assert condrl.reward.find("of_a_cell").target(torch.tensor([[3.0, 5.0]]), ["x"]).item() == 5
    with pytest.raises(UsageError, match="two files define the reward 'of_a_cell'"):
        exec(compile(cells[0].read_text(), str(cells[0]), "exec"), {"__name__": "a_module"})
    del condrl.reward.plugins["of_a_cell"]


TWICE = """import condrl


@condrl.reward(name="given_twice")
def one(samples, prompts):
    return samples[:, 0]


@condrl.reward(name="{}")
def two(samples, prompts):
    return samples[:, 1]
"""


def test_a_file_that_gives_a_name_twice_is_refused(tmp_path):
    """The second would win in silence. A file may be edited, and a module reloaded."""
    file = write(tmp_path / "own_rewards.py", TWICE.format("given_once"))
    load_file(str(file))
    write(file, TWICE.format("given_twice"))
    with pytest.raises(UsageError, match=r"own_rewards\.py defines the reward 'given_twice' twice: give one another"):
        load_file(str(file))
    write(file, TWICE.format("given_once") + "# edited")
    assert load_file(str(file)).two is condrl.reward.find("given_once").target


def test_a_class_whose_name_is_given_twice_is_refused(tmp_path):
    code = "import condrl\n\n\n@condrl.reward\nclass Doubled:\n    def __call__(self, samples, prompts): ...\n"
    with pytest.raises(UsageError, match="defines the reward 'doubled' twice"):
        load_file(str(write(tmp_path / "own_class.py", code + code)))


def test_a_module_may_be_reloaded_and_a_function_called_again(tmp_path, monkeypatch):
    code = """import condrl


@condrl.reward
def of_a_module(samples, prompts):
    return samples[:, 0]


def register(factor):
    @condrl.reward
    def of_a_call(samples, prompts):
        return factor * samples[:, 0]
"""
    write(tmp_path / "reloaded_rewards.py", code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reloaded_rewards")
    importlib.reload(module)
    assert condrl.reward.find("of_a_module").target is module.of_a_module
    for factor in (1, 3):
        module.register(factor)
    assert condrl.reward.find("of_a_call").target(torch.ones(1, 1), ["x"]).item() == 3
