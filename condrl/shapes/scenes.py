"""Coloured shapes on a plain background: scenes drawn by rule, their prompts, and a checker that reads an image back.

    prompt  -> Request          parse("a red star left of a small blue square")
    Scene   -> image            draw(scene)
    image   -> objects          read(image)
    (image, Request) -> score   grade_scene(read(image), request)      1 means the prompt is obeyed exactly

Grammar:  phrase := (a | an | two | three) [small | large] colour shape[s]
          prompt := phrase | phrase relation phrase | phrase and phrase | phrase, phrase and phrase
A prompt asks for at most three objects, and a relation stands between two single ones.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from condrl.errors import UsageError

SIDE = 64  # pixels
BACKGROUND = (236, 236, 232)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (246, 220, 50),
    "green": (44, 160, 70),
    "cyan": (60, 200, 220),
    "blue": (40, 80, 210),
    "purple": (140, 60, 180),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star")
DIAMETERS = {"small": (13, 15), "large": (22, 25)}  # pixels, inclusive
SIZE_BOUNDARY = 18.0  # pixels: between the largest small and the smallest large object
COUNTS = ("a", "two", "three")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_GAP = 8.0  # pixels between the centres, along the relation's axis, which must be the longer one
MAX_OBJECTS = 3
SPECK = 8  # pixels: smaller blobs are ignored
UNKNOWN = "unknown"


@dataclass(frozen=True)
class SceneObject:
    """One object in an image: centre and bounding-box diameter in pixels."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float

    @property
    def size(self) -> str:
        return "small" if self.diameter < SIZE_BOUNDARY else "large"


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one colour and shape, and one size unless `size` is None (any)."""

    shape: str
    color: str
    size: str | None = None
    count: int = 1

    def __str__(self) -> str:
        words = [self.size, self.color, self.shape + "s" * (self.count > 1)]
        text = " ".join(word for word in words if word)
        article = "an" if text[0] in "aeiou" else "a"
        return f"{COUNTS[self.count - 1] if self.count > 1 else article} {text}"


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: phrases, and a relation that places the first object against the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    def __str__(self) -> str:
        first, *rest = map(str, self.phrases)
        if self.relation:
            return f"{first} {self.relation} {rest[0]}"
        return ", ".join([first, *rest[:-1]]) + (f" and {rest[-1]}" if rest else "")

    @property
    def objects(self) -> list[Phrase]:
        return [p for p in self.phrases for _ in range(p.count)]


# ---------------------------------------------------------------------------------------------- prompts


def parse(prompt: str) -> Request:
    """Read a prompt of the grammar above.

    Raises: UsageError naming the words that are not understood.
    """
    for relation in RELATIONS:
        first, found, second = prompt.partition(f" {relation} ")
        if found:
            request = Request((_parse_phrase(first, prompt), _parse_phrase(second, prompt)), relation)
            if len(request.objects) > 2:
                raise UsageError(f"the prompt {prompt!r} relates more than one object to another: that is ambiguous")
            return request
    parts = prompt.replace(" and ", ", ").split(", ")
    request = Request(tuple(_parse_phrase(part, prompt) for part in parts))
    if len(request.objects) > MAX_OBJECTS:
        raise UsageError(f"the prompt {prompt!r} asks for more than {MAX_OBJECTS} objects")
    return request


def _parse_phrase(text: str, prompt: str) -> Phrase:
    words = ["a" if word == "an" else word for word in text.split()]
    size = words[1] if len(words) == 4 and words[1] in DIAMETERS else None
    if size:
        del words[1]
    if len(words) == 3 and words[0] in COUNTS and words[1] in COLORS:
        count = COUNTS.index(words[0]) + 1
        shape = words[2].removesuffix("s") if count > 1 else words[2]
        if shape in SHAPES:
            return Phrase(shape, words[1], size, count)
    raise UsageError(
        f"the shapes vocabulary does not cover {text!r} in the prompt {prompt!r}: "
        "write (a | two | three) [small | large] colour shape, as in 'a small red star left of a blue square'; "
        f"colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}"
    )


def describe(
    scene: Sequence[SceneObject], rng: random.Random, mention_size: float = 0.4, relate: float = 0.65
) -> Request:
    """A true description of a scene, one of many: order, sizes and relation are drawn by `rng`."""
    groups: dict[tuple[str, str], list[SceneObject]] = {}
    for thing in scene:
        groups.setdefault((thing.shape, thing.color), []).append(thing)
    members = list(groups.values())
    rng.shuffle(members)
    phrases = tuple(_describe_group(group, rng, mention_size) for group in members)
    if len(phrases) == len(scene) == 2 and rng.random() < relate:
        return Request(phrases, relation_between(members[0][0], members[1][0]))
    return Request(phrases)


def _describe_group(group: list[SceneObject], rng: random.Random, mention_size: float) -> Phrase:
    sizes = {thing.size for thing in group}
    size = sizes.pop() if len(sizes) == 1 and rng.random() < mention_size else None
    return Phrase(group[0].shape, group[0].color, size, len(group))


def meaning(request: Request) -> tuple[str, ...]:
    """The same for two prompts that ask for the same: "A left of B" and "B right of A", "A and B" and "B and A"."""
    first, *rest = map(str, request.phrases)
    if request.relation in ("right of", "below"):
        return rest[0], INVERSE[request.relation], first
    return (first, request.relation, *rest) if request.relation else tuple(sorted([first, *rest]))


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """Where `first` lies seen from `second`, along the longer axis; None when they are too close to say."""
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < RELATION_GAP:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# ---------------------------------------------------------------------------------------------- drawing


def random_scene(rng: random.Random, weights: Sequence[float] = (2, 4, 3), repeat: float = 0.35) -> list[SceneObject]:
    """Objects that do not touch; `weights` are of one, two, ... objects.

    With probability `repeat` an object copies the one before.
    """
    while True:
        scene: list[SceneObject] = []
        for _ in range(rng.choices(range(1, len(weights) + 1), weights)[0]):
            shape, color, size = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(DIAMETERS))
            if scene and rng.random() < repeat:
                shape, color, size = scene[-1].shape, scene[-1].color, scene[-1].size
            thing = place(scene, shape, color, size, rng)
            if thing is None:
                break
            scene.append(thing)
        else:
            return scene


def place(scene: list[SceneObject], shape: str, color: str, size: str, rng: random.Random) -> SceneObject | None:
    """An object at a random position clear of the scene's, with a random diameter of its size; None if none fits."""
    for _ in range(40):
        diameter = rng.randint(*DIAMETERS[size])
        low, high = diameter / 2 + 2, SIDE - diameter / 2 - 2
        thing = SceneObject(shape, color, rng.uniform(low, high), rng.uniform(low, high), diameter)
        if all(_gap(thing, other) >= 4 for other in scene):
            return thing
    return None


def _gap(a: SceneObject, b: SceneObject) -> float:
    """Pixels between two bounding boxes, along the axis that separates them best."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) - (a.diameter + b.diameter) / 2


def draw(scene: Sequence[SceneObject], supersample: int = 4) -> np.ndarray:
    """The image of a scene, uint8 (SIDE, SIDE, 3), anti-aliased."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (SIDE * supersample, SIDE * supersample), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        corners = [
            ((thing.x + u * thing.diameter / 2) * supersample, (thing.y + v * thing.diameter / 2) * supersample)
            for u, v in outline(thing.shape)
        ]
        pen.polygon(corners, fill=COLORS[thing.color])
    return np.asarray(canvas.reduce(supersample))


@functools.cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape that fills the square [-1, 1]^2, y pointing down."""
    if shape == "square":
        return ((-1, -1), (1, -1), (1, 1), (-1, 1))
    if shape == "triangle":
        return ((0, -1), (1, 1), (-1, 1))
    if shape == "circle":
        return tuple((math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False))
    angles = [-math.pi / 2 + k * math.pi / 5 for k in range(10)]
    points = np.array([(math.cos(a), math.sin(a)) for a in angles]) * np.tile([1.0, 0.48], 5)[:, None]
    low, high = points.min(0), points.max(0)
    return tuple(map(tuple, (2 * (points - low) / (high - low) - 1).tolist()))


# ---------------------------------------------------------------------------------------------- reading


def read(image: np.ndarray) -> list[SceneObject]:
    """Find the objects in an image, float (3, SIDE, SIDE) in [0, 1]; shape or colour is 'unknown' where it is neither.

    Raises: UsageError on an image of another size.
    """
    if image.shape != (3, SIDE, SIDE):
        raise UsageError(f"the shapes checker reads images of {SIDE} x {SIDE} pixels, got shape {image.shape}")
    pixels = image.transpose(1, 2, 0)
    ground = np.array(BACKGROUND) / 255
    foreground = np.abs(pixels - ground).max(-1) > 0.25
    return [_identify(pixels, blob) for blob in connected_components(foreground) if blob.sum() >= SPECK]


def connected_components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected blobs of a boolean (H, W) mask, each as a mask, in reading order."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread = np.where(mask, np.maximum.reduce([labels, *neighbours]), 0)
        spread = np.where(mask, spread.ravel()[spread - 1], 0)  # a label is a pixel: continue to that pixel's label
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _identify(pixels: np.ndarray, blob: np.ndarray) -> SceneObject:
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    crop = blob[top:bottom, left:right]
    return SceneObject(
        _shape_of(crop),
        _color_of(pixels[blob]),
        float(left + right) / 2,
        float(top + bottom) / 2,
        float(bottom - top + right - left) / 2,
    )


def _color_of(pixels: np.ndarray) -> str:
    """The palette colour of a blob; unknown unless 70 % of its core (the half farthest from the ground) agree."""
    distance = np.abs(pixels - np.array(BACKGROUND) / 255).sum(-1)
    core = pixels[distance >= np.median(distance)]
    palette = np.array(list(COLORS.values())) / 255
    errors = np.linalg.norm(core[:, None] - palette, axis=-1)
    nearest = np.where(errors.min(1) < 0.3, errors.argmin(1), -1)
    winner, votes = Counter(nearest.tolist()).most_common(1)[0]
    return list(COLORS)[winner] if winner >= 0 and votes >= 0.7 * len(core) else UNKNOWN


def _shape_of(crop: np.ndarray) -> str:
    """The template with the highest intersection over union in the blob's own bounding box."""
    height, width = crop.shape
    if not 0.7 <= height / width <= 1.43:
        return UNKNOWN
    scores = {shape: _overlap(crop, _template(shape, height, width)) for shape in SHAPES}
    best = max(scores, key=lambda shape: scores[shape])
    return best if scores[best] >= 0.7 else UNKNOWN


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@functools.lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width * 8, height * 8))
    corners = [((u + 1) * width * 4, (v + 1) * height * 4) for u, v in outline(shape)]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.reduce(8)) > 70  # as `read` thresholds an anti-aliased edge


# ---------------------------------------------------------------------------------------------- scoring


def grade(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """How well each image (B, 3, H, W) in [0, 1] obeys its prompt.

    Raises: UsageError on a prompt outside the vocabulary.
    """
    return [
        _grade_cached(np.ascontiguousarray(image, np.float32).tobytes(), image.shape, prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]


@functools.lru_cache(maxsize=512)  # `shapes` and `shapes_exact` ask about the same images
def _grade_cached(pixels: bytes, shape: tuple[int, ...], prompt: str) -> float:
    return grade_scene(read(np.frombuffer(pixels, np.float32).reshape(shape)), parse(prompt))


def grade_scene(things: Sequence[SceneObject], request: Request) -> float:
    """How well the objects obey the request, in [0, 1]; 1 if and only if they do so exactly.

    Each wanted object earns shape .4, colour .4 and size .2 from the object matched to it, missing and
    superfluous objects earn nothing, and a relation is worth a quarter of the whole.
    """
    wanted = request.objects
    candidates = sorted(things, key=lambda thing: -thing.diameter)[:5]
    slots = [*candidates, *[None] * len(wanted)]
    best = 0.0
    for match in set(itertools.permutations(slots, len(wanted))):
        likeness = sum(map(_likeness, match, wanted)) / max(len(wanted), len(things))
        if request.relation:
            likeness = 0.75 * likeness + 0.25 * _related(match, request.relation)
        best = max(best, likeness)
    return round(best, 6)


def _likeness(thing: SceneObject | None, phrase: Phrase) -> float:
    if thing is None:
        return 0.0
    size_right = phrase.size is None or thing.size == phrase.size
    return 0.4 * (thing.shape == phrase.shape) + 0.4 * (thing.color == phrase.color) + 0.2 * size_right


def _related(match: Sequence[SceneObject | None], relation: str) -> bool:
    first, second = match[0], match[1]
    return first is not None and second is not None and relation_between(first, second) == relation
