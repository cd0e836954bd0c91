import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT, run_python

import condrl
from condrl import UsageError
from condrl.registry import load_file, snake_case


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


def test_unknown_names_get_the_list_and_the_nearest():
    with pytest.raises(UsageError, match=r"unknown reward 'shape'\. Did you mean 'shapes'\? There are: .*jpeg_comp"):
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
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path, body, message):
    with pytest.raises(UsageError, match=message) as error:
        load_file(str(write(tmp_path / "bad.py", body)))
    assert "bad.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(UsageError, match="no file nowhere.py"):
        load_file("nowhere.py")


def test_dotted_path(tmp_path, monkeypatch):
    write(
        tmp_path / "elsewhere.py", "def plain(samples, prompts, *, gain: float = 2.0):\n    '''A plain function.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugin = condrl.reward.find("elsewhere:plain")
    assert plugin.options["gain"].default == 2.0
    with pytest.raises(UsageError, match=r"no 'plane'. Did you mean 'plain'"):
        condrl.reward.find("elsewhere:plane")


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


def test_entry_point_of_an_installed_package_from_outside_the_repository(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    third_party_package(site)
    code = "import condrl; p = condrl.reward.find('glow'); print(p.description, p.options['gamma'].default)"
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.strip() == "Mean glow. 1.0", done.stderr
    listed = run_python(str(ROOT / "scripts" / "plugins.py"), "glow", cwd=tmp_path, PYTHONPATH=str(site))
    assert "reward glow: Mean glow." in listed.stdout, listed.stderr


def test_import_is_light():
    code = "import sys, condrl; print([m for m in ('torch', 'diffusers', 'peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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
    assert "ddpo" in wrong.stderr
