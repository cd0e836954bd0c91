import random
from dataclasses import replace

import numpy as np
import pytest

from condrl import UsageError
from condrl.io.files import ASSETS
from condrl.prompts import load_prompts
from condrl.shapes import scenes


def as_float(pixels):
    return pixels.astype(np.float32).transpose(2, 0, 1) / 255


def drawn(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        scene = scenes.random_scene(rng)
        yield scene, as_float(scenes.draw(scene)), scenes.describe(scene, rng)


@pytest.mark.slow
def test_checker_reads_fresh_scenes():
    cases = [(scene, scenes.read(image), request) for scene, image, request in drawn(seed=11, count=1000)]
    assert np.mean([scenes.grade_scene(things, request) == 1 for _, things, request in cases]) >= 0.99

    def looks(things):
        return sorted((thing.shape, thing.color, thing.size) for thing in things)

    assert np.mean([looks(things) == looks(scene) for scene, things, _ in cases]) >= 0.99


def test_places_are_read_to_a_pixel():
    for scene, image, _ in drawn(seed=5, count=50):
        for thing in scene:
            nearest = min(scenes.read(image), key=lambda t: abs(t.x - thing.x) + abs(t.y - thing.y))
            assert abs(nearest.x - thing.x) <= 1.5
            assert abs(nearest.y - thing.y) <= 1.5
            assert abs(nearest.diameter - thing.diameter) <= 2


def corruptions(scene):
    """Scenes that disobey a full description of `scene` in one respect each."""
    first, rest = scene[0], scene[1:]
    yield "missing", rest
    yield "colour", [replace(first, color=next(c for c in scenes.COLORS if c != first.color)), *rest]
    yield "shape", [replace(first, shape=next(s for s in scenes.SHAPES if s != first.shape)), *rest]
    yield "size", [replace(first, diameter=24 if first.size == "small" else 14), *rest]
    extra = scenes.place(scene, "circle", "red", "small", random.Random(0))
    if extra:
        yield "extra", [*scene, extra]


def test_checker_notices_every_corruption():
    for scene, image, _ in drawn(seed=3, count=60):
        request = scenes.describe(scene, random.Random(0), mention_size=1.0)
        if scenes.grade_scene(scenes.read(image), request) < 1:
            continue  # at most 1 %, by the test above
        for what, wrong in corruptions(scene):
            if what == "size" and any(p.size is None for p in request.phrases):
                continue
            score = scenes.grade_scene(scenes.read(as_float(scenes.draw(wrong))), request)
            assert score < 1, (what, str(request))


def test_checker_notices_wrong_relations_and_defaced_images():
    left, right = scenes.SceneObject("star", "red", 16, 30, 24), scenes.SceneObject("square", "blue", 48, 34, 14)
    image = as_float(scenes.draw([left, right]))
    right_words = scenes.parse("a red star left of a blue square")
    assert scenes.grade_scene(scenes.read(image), right_words) == 1
    assert scenes.grade_scene(scenes.read(image), scenes.parse("a blue square right of a red star")) == 1
    for words in ("right of", "above", "below"):
        assert scenes.grade_scene(scenes.read(image), scenes.parse(f"a red star {words} a blue square")) == 0.75
    noise = np.random.default_rng(0).uniform(size=image.shape).astype(np.float32)
    assert scenes.grade_scene(scenes.read(noise), right_words) < 0.5
    assert scenes.grade_scene(scenes.read(np.zeros_like(image)), right_words) < 0.5
    half = image.copy()
    half[:, 28:, :] = np.array(scenes.BACKGROUND)[:, None, None] / 255  # cuts both objects
    assert scenes.grade_scene(scenes.read(half), right_words) < 1


def test_grades_rise_with_obedience():
    request = scenes.parse("a red star left of a blue square")
    star, square = scenes.SceneObject("star", "red", 16, 30, 24), scenes.SceneObject("square", "blue", 48, 34, 14)
    ladder = [
        [],
        [star],
        [star, replace(square, color="green", x=10, y=60)],
        [star, replace(square, color="green")],
        [star, square],
    ]
    grades = [scenes.grade_scene(things, request) for things in ladder]
    assert grades == sorted(set(grades))
    assert (grades[0], grades[-1]) == (0, 1)


def test_touching_objects_are_no_object():
    a, b = scenes.SceneObject("square", "red", 20, 30, 14), scenes.SceneObject("square", "blue", 33, 30, 14)
    things = scenes.read(as_float(scenes.draw([a, b])))
    assert len(things) == 1
    assert things[0].shape == scenes.UNKNOWN


@pytest.mark.parametrize(
    "prompt",
    [
        "a red star",
        "an orange circle",
        "two small green triangles",
        "three blue stars",
        "a red star above a large cyan square",
        "a red star and two blue circles",
        "a red star, a black square and an orange circle",
    ],
)
def test_prompts_are_read_as_they_are_written(prompt):
    assert str(scenes.parse(prompt)) == prompt


@pytest.mark.parametrize(
    "prompt", ["a red dog", "a reddish star", "four red stars", "a red stars", "", "a cat on a mat"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="vocabulary"):
        scenes.parse(prompt)


def test_prompt_lists_are_disjoint_and_readable():
    train, heldout = ([row.prompt for row in load_prompts(f"asset:shapes/{n}.txt", n)] for n in ("train", "heldout"))
    assert len(train) == len(heldout) == 512
    requests = [scenes.parse(prompt) for prompt in train + heldout]
    assert len({scenes.meaning(request) for request in requests}) == 1024  # none twice, in other words either
    assert {len(r.objects) for r in requests} == {1, 2, 3}
    assert {r.relation for r in requests} == {*scenes.RELATIONS, None}
    assert (ASSETS / "shapes" / "README.md").is_file()


@pytest.mark.parametrize("prompt", ["two red stars left of a blue square", "two red stars and two blue circles"])
def test_prompts_that_could_mean_two_things_or_too_much_are_refused(prompt):
    with pytest.raises(UsageError, match="more than"):
        scenes.parse(prompt)


def test_meaning_is_what_a_prompt_asks_for():
    def meaning(text):
        return scenes.meaning(scenes.parse(text))

    assert meaning("a red star left of a blue square") == meaning("a blue square right of a red star")
    assert meaning("a red star above a blue square") == meaning("a blue square below a red star")
    assert meaning("a red star and a black square") == meaning("a black square and a red star")
    assert meaning("a red star left of a blue square") != meaning("a red star right of a blue square")
    assert meaning("a red star and a blue square") != meaning("a red star left of a blue square")


def test_other_image_sizes_are_refused():
    with pytest.raises(UsageError, match="64 x 64"):
        scenes.read(np.zeros((3, 128, 128), np.float32))


def test_connected_components_against_flood_fill():
    mask = np.random.default_rng(1).uniform(size=(40, 40)) < 0.55
    blobs = scenes.connected_components(mask)
    assert np.array_equal(np.sum(blobs, axis=0), mask)
    seen = np.zeros_like(mask)
    for blob in blobs:
        start = tuple(np.argwhere(blob)[0])
        stack, filled = [start], np.zeros_like(mask)
        while stack:
            y, x = stack.pop()
            if 0 <= y < 40 and 0 <= x < 40 and mask[y, x] and not filled[y, x]:
                filled[y, x] = True
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert np.array_equal(filled, blob)
        assert not (seen & blob).any()
        seen |= blob
