"""Draw pairs of scenes by rule: one obeys its prompt, the other has one fault; for `condrl finetune pairs/shapes`.

    python scripts/research/shape_pairs.py      # runs/shape_pairs/: train.jsonl and validation.jsonl

A fault is one thing in which the worse scene differs from the better one: the colour, the shape or the size of an
object, an object too few or too many, or where the two stand.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from condrl.io.records import to_json
from condrl.prompts import load_prompts
from condrl.shapes import scenes
from condrl.shapes.scenes import Request, SceneObject

Scene = list[SceneObject]


def obeying(request: Request, rng: random.Random) -> Scene:
    """A scene that a request asks for."""
    while True:
        scene: Scene = []
        for phrase in request.objects:
            size = phrase.size or rng.choice(list(scenes.DIAMETERS))
            if thing := scenes.place(scene, phrase.shape, phrase.color, size, rng):
                scene.append(thing)
        if obeys(scene, request):
            return scene


def obeys(scene: Scene, request: Request) -> bool:
    """Whether the scene is what the request asks for, by its image."""
    return scenes.grade_scene(seen(scene), request) == 1


def seen(scene: Scene) -> Scene:
    """The scene's image, read back."""
    return scenes.read(scenes.draw(scene).transpose(2, 0, 1) / np.float32(255))


def is_readable(scene: Scene) -> bool:
    """Whether every object can be read from the image: none is cut off, and none touches another."""
    drawn, found = (Counter((thing.shape, thing.color, thing.size) for thing in side) for side in (scene, seen(scene)))
    return drawn == found


def faulty(scene: Scene, request: Request, rng: random.Random) -> tuple[Scene, str]:
    """A scene with a single fault, and what it is."""
    while True:
        name = rng.choice(list(FAULTS))
        made = FAULTS[name](scene, request, rng)
        if made and is_readable(made) and not obeys(made, request):
            return made, name


# ---------------------------------------------------------------------------------------------- faults


def other_colour(scene: Scene, request: Request, rng: random.Random) -> Scene:
    return changed(scene, rng, lambda thing: replace(thing, color=another(scenes.COLORS, thing.color, rng)))


def other_shape(scene: Scene, request: Request, rng: random.Random) -> Scene:
    return changed(scene, rng, lambda thing: replace(thing, shape=another(scenes.SHAPES, thing.shape, rng)))


def other_size(scene: Scene, request: Request, rng: random.Random) -> Scene:
    """Larger or smaller where it stands."""

    def resized(thing: SceneObject) -> SceneObject:
        size = another(scenes.DIAMETERS, thing.size, rng)
        return replace(thing, diameter=rng.randint(*scenes.DIAMETERS[size]))

    return changed(scene, rng, resized)


def too_few(scene: Scene, request: Request, rng: random.Random) -> Scene:
    missing = rng.choice(scene)
    return [thing for thing in scene if thing is not missing]


def too_many(scene: Scene, request: Request, rng: random.Random) -> Scene:
    more = rng.choice(scene)
    thing = scenes.place(scene, more.shape, more.color, more.size, rng)
    return [*scene, thing] if thing else []


def other_places(scene: Scene, request: Request, rng: random.Random) -> Scene:
    """The same objects elsewhere, a fault only where the prompt names a relation."""
    placed: Scene = []
    for thing in scene:
        if again := scenes.place(placed, thing.shape, thing.color, thing.size, rng):
            placed.append(again)
    return placed if len(placed) == len(scene) else []


FAULTS: dict[str, Callable[[Scene, Request, random.Random], Scene]] = {
    "colour": other_colour,
    "shape": other_shape,
    "size": other_size,
    "too few": too_few,
    "too many": too_many,
    "places": other_places,
}


def changed(scene: Scene, rng: random.Random, change: Callable[[SceneObject], SceneObject]) -> Scene:
    """The scene with one of its objects changed."""
    i = rng.randrange(len(scene))
    return [change(thing) if j == i else thing for j, thing in enumerate(scene)]


def another(values: Any, value: str, rng: random.Random) -> str:
    return rng.choice([each for each in values if each != value])


# ---------------------------------------------------------------------------------------------- files


def pairs(prompts: list[str], each: int, seed: int) -> Iterator[tuple[str, Scene, Scene, str]]:
    """A prompt, a scene that obeys it, one that does not, and the fault."""
    for prompt in prompts:
        rng, request = random.Random(f"{seed} {prompt}"), scenes.parse(prompt)
        for _ in range(each):
            better = obeying(request, rng)
            yield prompt, better, *faulty(better, request, rng)


def write(out: Path, name: str, prompts: list[str], each: int, seed: int) -> None:
    """Write out/name.jsonl, and the images that it names into the folder out/name.

    Raises: FileExistsError where that folder exists.
    """
    (out / name).mkdir(parents=True)
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        found = tqdm(pairs(prompts, each, seed), total=each * len(prompts), desc=name)
        for i, (prompt, better, worse, fault) in enumerate(found):
            paths = {"better": f"{name}/{i:05d}_better.png", "worse": f"{name}/{i:05d}_worse.png"}
            for path, scene in zip(paths.values(), (better, worse), strict=True):
                Image.fromarray(scenes.draw(scene)).save(out / path)
            file.write(to_json({"version": 1, "prompt": prompt, **paths, "fault": fault}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shape_pairs"), help="a folder that does not exist yet")
    parser.add_argument("--each", type=int, default=8, help="pairs of a training prompt; a validation prompt has one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: remove it, or choose another folder with --out")
    for name, each in (("train", args.each), ("validation", 1)):
        prompts = [row.prompt for row in load_prompts(f"asset:shapes/{name}.txt", "prompts")]
        write(args.out, name, prompts, each, args.seed)


if __name__ == "__main__":
    main()
