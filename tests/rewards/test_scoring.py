import dataclasses
import io

import pytest
import torch
from helpers import ROOT
from PIL import Image

import condrl
from condrl import RunError, UsageError
from condrl.commands import sample
from condrl.commands.console import exit_code
from condrl.errors import RewardError, Stopped
from condrl.loading import load_config
from condrl.prompts import Row, load_prompts
from condrl.rewards.scoring import make_reward, score
from condrl.shapes import scenes
from condrl.training.build import make_measures, make_rewards, make_trainer
from condrl.training.checks import check_combination
from condrl.training.evaluate import evaluate
from condrl.training.preflight import preflight

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ROWS = [Row(0, "a red star", {"k": 1.0}), Row(1, "two small blue circles", {"k": 2.0})]


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@condrl.reward
def red_mean(samples, prompts, *, gain: float = 1.0):
    return gain * samples[:, 0].mean((1, 2))


@condrl.reward
def from_metadata(samples, prompts, metadata):
    return torch.tensor([row["k"] for row in metadata])


@condrl.reward
class Remembers:
    """A stateful reward."""

    def __init__(self, *, start: int = 0):
        self.calls = start

    def __call__(self, samples, prompts):
        self.calls += 1
        return torch.full((len(samples),), float(self.calls))


def test_weighted_sum_options_metadata_and_state():
    rewards = [
        make_reward("red_mean", {"weight": 2.0, "gain": 3.0}),
        make_reward("from_metadata", {"weight": -1.0}),
        make_reward("remembers", {"weight": 0.5, "start": 10}),
    ]
    x = images()
    scores = score(rewards, x, ROWS)
    assert set(scores.each) == {"red_mean", "from_metadata", "remembers"}
    expected = 2 * 3 * x[:, 0].mean((1, 2)) - torch.tensor([1.0, 2.0]) + 0.5 * 11
    torch.testing.assert_close(scores.total, expected)


def test_chunks_do_not_change_scores():
    rewards = [make_reward("red_mean", {"weight": 1.0})]
    x, rows = images(7), [Row(i, "p") for i in range(7)]
    few = [dataclasses.replace(reward, batch=3) for reward in rewards]
    torch.testing.assert_close(score(few, x, rows).total, score(rewards, x, rows).total)


def test_a_rewards_batch_is_how_many_images_it_is_given_at_a_time():
    seen = []
    condrl.reward(lambda samples, prompts: seen.append(len(samples)) or samples.mean((1, 2, 3)), name="notes_sizes")
    score([make_reward("notes_sizes", {"batch": 3})], images(7), [Row(i, "p") for i in range(7)])
    assert seen == [3, 3, 1]


def test_a_group_reward_is_given_all_images_of_a_prompt_row_and_only_them():
    """By row, not by text; however many there are."""
    seen = []

    @condrl.reward(per="group")
    def ranks(samples, prompts):
        seen.append((len(samples), prompts))
        return samples.mean((1, 2, 3)).argsort().argsort().float()

    rows = [Row(0, "a")] * 3 + [Row(1, "a")] * 70 + [Row(2, "b")]
    found = score([make_reward("ranks", {"batch": 2})], images(74), rows).total
    assert seen == [(3, ["a"] * 3), (70, ["a"] * 70), (1, ["b"])]
    assert sorted(found[:3].tolist()) == [0, 1, 2]
    assert sorted(found[3:73].tolist()) == list(range(70))


def test_groups_are_whole_in_the_trial_and_on_held_out_prompts(tmp_path):
    """Also where a batch would end within one."""
    sizes = []

    @condrl.reward(per="group")
    def grouped(samples, prompts):
        assert len(set(prompts)) == 1
        sizes.append(len(samples))
        return samples.mean(1)

    toy = str(ROOT / "configs" / "toy" / "p1.yaml")
    words = [toy, "rewards.quadratic.weight=0", "rewards.grouped.weight=1", f"run.dir={tmp_path}"]
    trainer = make_trainer(load_config(words), load_prompts("asset:toy/p1.jsonl", "x"))
    preflight(trainer)
    assert set(sizes) == {4, 128}  # the trial's groups, and whole ones for each row
    sizes.clear()
    measures = [make_reward("grouped", {})]
    evaluate(trainer.policy, trainer.rows, measures, seed=0, per_prompt=3, batch=8, pictures=0)
    assert sizes == [3] * 4


@pytest.mark.parametrize("flags", [{"per": "groups"}, {"per": "group", "cached": True}])
def test_a_group_reward_is_declared_as_one(flags):
    with pytest.raises(UsageError, match=r"per must be image or group, and the scores of a group cannot be cached"):
        condrl.reward(lambda samples, prompts: samples, name="bad_flags", **flags)


def test_what_would_cut_groups_is_refused(tmp_path):
    condrl.reward(lambda samples, prompts: samples.mean((1, 2, 3)), name="alike", per="group")
    config = load_config(["algorithm.name=draft", "rewards.alike.weight=1", f"run.dir={tmp_path}"], QUICKSTART)
    with pytest.raises(UsageError, match="alike needs all images of a prompt"):
        check_combination(config)
    check_combination(load_config(["rewards.alike.weight=1", f"run.dir={tmp_path}"], QUICKSTART))
    words = ["--prompt", "x", "--steer", "smc", "rewards.alike.weight=1"]
    with pytest.raises(UsageError, match="'alike' compares the images of a prompt, and cannot steer one"):
        sample.read_request(sample.parse(words))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, 1), r"'bad' returned shape \(2, 1\) for 2 samples.*'a red star'.*shape \(2,\)"),
        ([1.0, 2.0], r"'bad' returned list for 2 samples"),
    ],
)
def test_bad_returns_name_the_reward_and_the_prompt(returned, message):
    condrl.reward(lambda samples, prompts: returned, name="bad")
    with pytest.raises(RunError, match=message):
        score([make_reward("bad", {"weight": 1.0})], images(), ROWS)


def test_failed_scores_are_missing_numbers_with_a_reason():
    good = make_reward("red_mean", {"weight": 1.0})
    returned = torch.tensor([float("-inf"), 1.0])
    condrl.reward(lambda samples, prompts: returned, name="bad")
    scores = score([good, make_reward("bad", {"weight": 1.0})], images(), ROWS)
    assert scores.total.isnan().tolist() == scores.each["bad"].isnan().tolist() == [True, False]
    assert not scores.each["red_mean"].isnan().any()
    said = "the reward 'bad' failed for the prompt 'a red star': it returned a score that is not finite"
    assert scores.failure == said
    assert score([good], images(), ROWS).failure is None


# ---------------------------------------------------------------------------------------------- whatever goes wrong


def of_body(body, name="raising", **flags):
    """A reward whose function is given by its body."""
    space = {}
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    exec(f"import sys, torch\ndef fault(samples, prompts, metadata):\n{lines}", space)
    condrl.reward(name=name, **flags)(space["fault"])
    return make_reward(name, {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return undefined", "NameError: name 'undefined' is not defined"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise RuntimeError", "RuntimeError"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("return [next(iter([]))]", "StopIteration"),
        ("return samples @ torch.zeros(3)", "RuntimeError: "),
        ("return {}[7]", "KeyError: 7"),
        ("return {}['colour']", "KeyError: 'colour'"),  # its own, not the metadata's
    ],
)
def test_whatever_a_reward_raises_is_one_line(body, message):
    reward = of_body(body)
    with pytest.raises(RewardError) as error:
        score([reward], images(), ROWS)
    assert str(error.value).startswith(f"the reward 'raising' failed for the prompt 'a red star': {message}")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, RunError)


def test_a_reward_that_is_defined_anew_has_a_cache_of_its_own():
    found = []
    for value in (torch.ones(2), torch.full((2,), 5.0)):  # as a notebook's cell that is run again
        condrl.reward(lambda samples, prompts: value, name="anew", cached=True)  # noqa: B023
        found.append(make_reward("anew", {})(images(2), ROWS[:2]).tolist())
    assert found == [[1.0, 1.0], [5.0, 5.0]]


def test_a_missing_metadata_key_is_said_with_its_row():
    reward = of_body("return torch.tensor([m['label'] for m in metadata])")
    rows = [Row(3, "a red star", {"label": 1.0, "k": 2}), Row(7, "a dog", {"k": 1, "lable": 2}), Row(8, "a cat")]
    with pytest.raises(RewardError) as error:
        reward(images(3), rows)
    said = "the reward 'raising' needs 'label' in each prompt's metadata, and row 8 of its prompts, 'a dog', has 'k', 'lable'"
    assert str(error.value) == said
    with pytest.raises(RewardError, match="row 9 of its prompts, 'a cat', has none"):
        reward(images(2), rows[::2])
    assert of_body("return torch.tensor([m.get('label', 5.0) for m in metadata])")(images(3), rows).tolist() == [
        1,
        5,
        5,
    ]


def test_what_the_reward_or_the_user_says_itself_stays():
    import builtins

    builtins.errors_of_test = condrl, KeyboardInterrupt, Stopped
    for body, kind, message in (
        (
            "raise errors_of_test[0].UsageError('choose another prompt')",
            UsageError,
            "^the reward 'raising': choose another prompt$",
        ),
        (
            "raise errors_of_test[0].RunError('the server is gone')",
            RewardError,
            "^the reward 'raising': the server is gone$",
        ),
        ("raise errors_of_test[1]", KeyboardInterrupt, None),
        ("raise errors_of_test[2](15)", Stopped, None),
    ):
        with pytest.raises(kind, match=message):
            of_body(body)(images(), ROWS)


@condrl.reward
class FailsWhenMade:
    def __init__(self, *, size: int = 0):
        self.inverse = 1 / size

    def __call__(self, samples, prompts):
        return samples

    def load(self):
        raise OSError("no such disk")


def test_what_fails_when_it_is_made_or_loaded_is_bad_input():
    with pytest.raises(UsageError, match="^the reward 'fails_when_made' failed: ZeroDivisionError: division by zero$"):
        make_reward("fails_when_made", {})
    with pytest.raises(UsageError, match="^the reward 'fails_when_made' failed: OSError: no such disk$"):
        make_reward("fails_when_made", {"size": 1}).load()
    make_reward("red_mean", {}).load()  # nothing to load


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UsageError("a\nb"), "error: a b", 2),
        (RunError("c"), "stopped: c", 1),
        (OSError(28, "No space left"), "stopped: [Errno 28] No space left", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (Stopped(15), "stopped by SIGTERM; the same command with run.resume=auto resumes it", 143),
    ],
)
def test_a_traceback_is_shown_when_asked_for(error, line, code, capsys, monkeypatch):
    def work():
        raise error from ValueError("the cause")

    monkeypatch.delenv("CONDRL_DEBUG", raising=False)
    assert exit_code(work) == code
    assert capsys.readouterr().err == f"{line}\n"
    monkeypatch.setenv("CONDRL_DEBUG", "1")
    assert exit_code(work) == code
    shown = capsys.readouterr().err
    assert shown.startswith("ValueError: the cause")
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith(f"{line}\n")


def test_an_error_that_no_line_explains_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)
    with pytest.raises(ConnectionError):
        exit_code(lambda: (_ for _ in ()).throw(ConnectionError("refused")))


# ---------------------------------------------------------------------------------------------- its own copy


def test_a_reward_that_works_in_place_changes_nothing_for_the_next():
    spoil = of_body(
        "samples.mul_(0)\nmetadata[0].clear()\nmetadata[1]['k'] = 9.0\nprompts[0] = ''\nreturn samples[:, 0, 0, 0]"
    )
    x, rows = images(), [Row(0, "a red star", {"k": 1.0}), Row(1, "a dog", {"k": 2.0})]
    kept = x.clone()
    scores = score([spoil, make_reward("red_mean", {}), make_reward("from_metadata", {})], x, rows)
    assert torch.equal(x, kept)
    assert scores.each["red_mean"].tolist() == kept[:, 0].mean((1, 2)).tolist()
    assert scores.each["from_metadata"].tolist() == [1.0, 2.0]
    assert rows[1].metadata == {"k": 2.0}


def test_also_where_it_is_differentiated():
    squares = of_body("samples.mul_(samples.clone())\nreturn samples.sum((1, 2, 3))", differentiable=True)
    x = images().requires_grad_()
    scores = score([squares, make_reward("red_mean", {})], x, ROWS)
    gradient = torch.autograd.grad(scores.each["raising"].sum(), x)[0]
    torch.testing.assert_close(gradient, 2 * x.detach())
    torch.testing.assert_close(scores.each["red_mean"].detach(), x[:, 0].mean((1, 2)).detach())


def test_nested_metadata_is_copied_too():
    spoil = of_body("metadata[0]['list'].append(1)\nreturn samples[:, 0, 0, 0]")
    row = Row(0, "p", {"list": [0]})
    spoil(images(1), [row])
    assert row.metadata == {"list": [0]}


@condrl.reward
class Counts:
    """A reward that depends on how often it was called."""

    def __init__(self):
        self.calls = torch.zeros(())

    def __call__(self, samples, prompts):
        self.calls += 1
        return self.calls.expand(len(samples)).clone()

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"].clone()


def test_a_state_is_saved_and_goes_on():
    first, second = make_reward("counts", {}), make_reward("counts", {})
    for _ in range(3):
        first(images(1), ROWS[:1])
    second.load_state_dict(first.state_dict())
    assert second(images(1), ROWS[:1]).tolist() == [4.0]
    for stateless in ("red_mean", "remembers"):
        reward = make_reward(stateless, {})
        assert reward.state_dict() == {}
        reward.load_state_dict({})


def test_images_outside_the_unit_range_are_refused():
    with pytest.raises(RunError, match=r"\[0, 1\].*from -1"):
        score([make_reward("red_mean", {"weight": 1.0})], images() * 2 - 1.0001, ROWS)


def test_the_default_quality_is_the_one_that_is_shown():
    """95, as Black et al. 2024's: sizes at the library's own default are about half of it."""
    x = images()
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        assert torch.equal(make_reward(name, {})(x, ROWS), make_reward(name, {"quality": 95})(x, ROWS))
    buffer = io.BytesIO()
    Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    assert make_reward("jpeg_incompressibility", {})(x, ROWS)[0].item() == pytest.approx(len(buffer.getvalue()) / 1000)


@pytest.mark.parametrize("quality", [0, 96, 100, -3])
def test_a_quality_that_no_jpeg_has(quality):
    with pytest.raises(UsageError, match=f"quality is from 1 to 95, not {quality}"):
        make_reward("jpeg_compressibility", {"quality": quality})(images(), ROWS)


@pytest.mark.parametrize("quality", [50, 95])
def test_jpeg_rewards_are_file_sizes_in_kilobytes(quality):
    x = images()
    small = make_reward("jpeg_compressibility", {"quality": quality})(x, ROWS)
    large = make_reward("jpeg_incompressibility", {"quality": quality})(x, ROWS)
    assert torch.equal(small, -large)
    for image, size in zip(x, large, strict=True):
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        assert size.item() == pytest.approx(len(buffer.getvalue()) / 1000)
    flat = make_reward("jpeg_incompressibility", {"quality": quality})(torch.full((2, 3, 16, 16), 0.5), ROWS)
    assert (flat < large).all()


def test_shapes_rewards_read_the_image():
    star = scenes.draw([scenes.SceneObject("star", "red", 30, 30, 24)])
    circle = scenes.draw([scenes.SceneObject("circle", "blue", 20, 20, 14)])
    x = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in (star, circle)])
    graded = make_reward("shapes", {})(x, ROWS)
    assert graded.tolist() == pytest.approx([1.0, 0.5])
    assert make_reward("shapes_exact", {})(x, ROWS).tolist() == [1.0, 0.0]


# ---------------------------------------------------------------------------------------------- points

POINTS = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])


def test_a_rows_own_coefficients_come_first():
    rows = [Row(0, "a", {"linear": [1, 2], "curvature": 2}), Row(1, "b")]
    found = make_reward("quadratic", {"linear": [3.0], "curvature": [1.0, 4.0], "constant": 5.0})(POINTS, rows)
    assert found.tolist() == [1 * 1 + 2 * 2 - (2 * 1 + 2 * 4) / 2 + 5, 3 * -1 + 3 * 0.5 - (1 * 1 + 4 * 0.25) / 2 + 5]
    rows = [Row(0, "a", {"low": [1, 2], "high": 2}), Row(1, "b")]
    assert make_reward("box", {"low": [-1.0, 0.0], "high": [1.0]})(POINTS, rows).tolist() == [1, 1]
    assert make_reward("box", {"low": [-0.9, 0.0], "high": [1.0]})(POINTS, rows).tolist() == [1, 0]
    assert make_reward("box", {"low": [-1.0], "high": [1.0, 0.4]})(POINTS, rows).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "metadata", "options", "message"),
    [
        (
            "quadratic",
            {"linear": [1, 2, 3]},
            {},
            "'linear' should be a number, or 2 .* for the prompt 'b' it is .1, 2, 3.",
        ),
        ("quadratic", {"curvature": "big"}, {}, "'curvature' should be a number, or 2 .* prompt 'b' it is 'big'"),
        ("quadratic", {"linear": []}, {}, r"prompt 'b' it is \[\]"),
        ("quadratic", {"linear": None}, {}, "prompt 'b' it is None"),
        ("quadratic", {"linear": [[1, 2]]}, {}, r"prompt 'b' it is \[\[1, 2\]\]"),
        ("quadratic", {"linear": True}, {}, "prompt 'b' it is True"),
        ("quadratic", {}, {"linear": [1.0, 2.0, 3.0]}, "'linear' should be a number, or 2 .* prompt 'a'"),
        ("box", {"low": [1, 2, 3]}, {}, "'low' should be a number, or 2 .* prompt 'b'"),
        ("box", {"high": {"x": 1}}, {}, "'high' should be a number, or 2 .* prompt 'b'"),
        ("box", {"low": 3}, {}, "'low' is above 'high' for the prompt 'b'"),
        ("box", {}, {"low": [0.0, 2.0]}, "'low' is above 'high' for the prompt 'a'"),
    ],
)
def test_coefficients_that_do_not_fit_name_the_prompt(name, metadata, options, message):
    with pytest.raises(UsageError, match=message):
        make_reward(name, options)(POINTS, [Row(0, "a"), Row(1, "b", metadata)])


@pytest.mark.parametrize("name", ["quadratic", "box"])
def test_rewards_of_points_say_so_of_images(name):
    with pytest.raises(
        UsageError, match=r"is for points \(B, d\), and the model makes samples of shape \(2, 3, 16, 16\)"
    ):
        make_reward(name, {})(images(), ROWS)


# ---------------------------------------------------------------------------------------------- smoothing


@condrl.reward
def sloped(samples, prompts, *, slope: float = 3.0):
    """<slope (1, 2, ..., n), x>."""
    flat = samples.flatten(1)
    return flat @ (slope * torch.arange(1.0, flat.shape[1] + 1))


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_smoothed_linear_reward_is_lower_by_its_slope(shape):
    """b x - d sqrt(n) |b| within root mean square distance d of x in n dimensions, with the gradient b."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows, b = [Row(i, "p") for i in range(5)], 3.0 * torch.arange(1.0, shape[0] + 1)
    found = make_reward("sloped", {"smoothing": 0.2})(x, rows)
    torch.testing.assert_close(found, x @ b - 0.2 * shape[0] ** 0.5 * b.norm())
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, b.expand(5, -1))
    with torch.no_grad():
        torch.testing.assert_close(make_reward("sloped", {"smoothing": 0.2})(x, rows), found)


def test_a_smoothed_quadratic_reward_is_the_lowest_of_an_interval():
    """For -.6 x^2 / 2 + .9 x, by looking: also on both sides of its peak, and its gradient is that of the lowest there."""
    x = torch.linspace(-3, 4, 41, dtype=torch.float32)[:, None].requires_grad_()
    rows, options = [Row(i, "p") for i in range(41)], {"linear": [0.9], "curvature": [0.6]}
    found = make_reward("quadratic", {**options, "smoothing": 0.5})(x, rows)
    near = x.detach() + torch.linspace(-0.5, 0.5, 201)
    lowest, where = (0.9 * near - 0.3 * near.square()).min(1)
    torch.testing.assert_close(found, lowest)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient[:, 0], 0.9 - 0.6 * near.gather(1, where[:, None])[:, 0])
    plain = make_reward("quadratic", options)(x.detach(), rows)
    assert (found < plain - 0.05).all()


def test_a_smoothed_image_stays_an_image_and_keeps_its_gradient():
    """Pixels that are 0 or 1 do not leave [0, 1]; they are followed all the same."""
    x = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5), torch.ones(3, 4, 4)]).requires_grad_()
    seen = []

    def watched(samples, prompts):
        seen.append(samples.detach())
        return red_mean(samples, prompts)

    reward = dataclasses.replace(make_reward("red_mean", {"smoothing": 0.01}), call=watched)
    found = reward(x, [Row(i, "p") for i in range(3)])
    assert seen[-1].min() >= 0
    assert seen[-1].max() <= 1
    step = 0.01 * 3**0.5  # a third of the values carry all of it
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5 - step, 1.0 - step]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient[:, 0], torch.full((3, 4, 4), 1 / 16))


def test_a_reward_without_a_slope_is_what_it_is():
    x = torch.zeros(2, 1)
    scores = make_reward("quadratic", {"linear": [0.0], "curvature": [1.0], "smoothing": 0.1})(x, ROWS)
    assert scores.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewards.shapes.smoothing=0.01"], "rewards.shapes.smoothing: .* and shapes has no gradient: leave it out"),
        (["rewards.alike.smoothing=0.01"], "rewards.alike.smoothing: .* alike looks at all images of a prompt"),
        (["rewards.brightness.smoothing=-1"], "rewards.brightness.smoothing: must be at least 0, got -1"),
        (["evaluate.measures.brightness.smoothing=0.1"], "evaluate.measures.brightness.smoothing: there is no such"),
    ],
)
def test_what_cannot_be_smoothed_is_one_line(words, message, tmp_path):
    condrl.reward(lambda samples, prompts: samples.mean((1, 2, 3)), name="alike", per="group")
    with pytest.raises(UsageError, match=message):
        load_config([*words, f"run.dir={tmp_path}"], QUICKSTART)


def test_what_is_learned_from_is_smoothed_and_what_is_measured_is_not(tmp_path):
    words = [str(ROOT / "configs" / "toy" / "g1.yaml"), "rewards.quadratic.smoothing=0.5", f"run.dir={tmp_path}"]
    config = load_config(words)
    x, rows = torch.tensor([[0.0], [1.0]]), [Row(0, "g1"), Row(1, "g1")]
    (learned,), (measured,) = make_rewards(config), make_measures(config)
    torch.testing.assert_close(learned(x, rows), 0.9 * (x[:, 0] - 0.5) - 0.3 * (x[:, 0] - 0.5).square())
    torch.testing.assert_close(measured(x, rows), 0.9 * x[:, 0] - 0.3 * x[:, 0].square())


def test_an_error_names_the_section_that_has_the_reward(tmp_path):
    """Following it would otherwise tune on what is only measured."""
    for section in ("rewards", "evaluate.measures"):
        for name, option in (("clip", "weights"), ("aesthetic", "head"), ("similarity", "images")):
            missing = {option: str(tmp_path / "none.pt"), **({"weights": "none.pt"} if name == "aesthetic" else {})}
            with pytest.raises(UsageError, match=rf"config {section}\.{name}\.\w+: ") as error:
                make_reward(name, missing, section).load()
            assert error.value.args[0].count("rewards.") == (section == "rewards")
