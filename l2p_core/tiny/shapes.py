"""The image set of the tiny model: one coloured shape on a plain background, rendered from a caption's attributes.

Every scene is four attributes, which the caption names, and a jitter of position and size, which it does not.
Images are 64x64 RGB in [-1, 1], anti-aliased, and rendered for a whole batch at once.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 64  # pixels

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 32, 40),
    "green": (34, 158, 56),
    "blue": (38, 64, 220),
    "yellow": (250, 220, 30),
    "purple": (156, 42, 190),
    "cyan": (30, 200, 220),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (8, 8, 8),
    "grey": (134, 134, 134),
    "brown": (110, 66, 30),
}
# The centre of each place, (x, y) in pixels from the top left corner.
PLACES = {
    "top left": (19.0, 19.0),
    "top right": (45.0, 19.0),
    "bottom left": (19.0, 45.0),
    "bottom right": (45.0, 45.0),
    "centre": (32.0, 32.0),
}
POSITION_JITTER = 3.0  # pixels to either side, in x and in y
SIZE_RANGE = (10.0, 14.0)  # pixels from a shape's middle to its tip

PHRASINGS = (
    "a {colour} {shape} {where} on a {background} background",
    "{background} background with a {colour} {shape} {where}",
)


@dataclass(frozen=True)
class Attributes:
    """The content of a caption: the names of a shape, a colour, a place and a background."""

    shape: str
    colour: str
    place: str
    background: str


@dataclass(frozen=True)
class Scene:
    """One image: its attributes, its offset from the place's centre and its size, all in pixels."""

    attributes: Attributes
    dx: float = 0.0
    dy: float = 0.0
    size: float = sum(SIZE_RANGE) / 2


def all_attributes() -> list[Attributes]:
    """Every combination of shape, colour, place and background, in a fixed order."""
    return [Attributes(*names) for names in itertools.product(SHAPES, COLOURS, PLACES, BACKGROUNDS)]


def random_scene(rng: random.Random, attributes: Attributes | None = None) -> Scene:
    """A scene with the given attributes (default: drawn too), its position and size drawn uniformly."""
    if attributes is None:
        attributes = Attributes(*(rng.choice(list(names)) for names in (SHAPES, COLOURS, PLACES, BACKGROUNDS)))
    dx, dy = (rng.uniform(-POSITION_JITTER, POSITION_JITTER) for _ in range(2))
    return Scene(attributes, dx, dy, rng.uniform(*SIZE_RANGE))


def caption(attributes: Attributes, phrasing: int = 0) -> str:
    """The attributes in words, in one of ``len(PHRASINGS)`` phrasings."""
    where = "in the centre" if attributes.place == "centre" else f"at the {attributes.place}"
    return PHRASINGS[phrasing].format(
        colour=attributes.colour, shape=attributes.shape, where=where, background=attributes.background
    )


def random_caption(rng: random.Random, attributes: Attributes) -> str:
    """The attributes in a phrasing drawn uniformly."""
    return caption(attributes, rng.randrange(len(PHRASINGS)))


def all_captions() -> list[str]:
    """Every caption of the set: all attributes in all phrasings."""
    return [caption(attributes, i) for attributes in all_attributes() for i in range(len(PHRASINGS))]


def evaluation_captions(count: int, seed: int = 0) -> list[str]:
    """A fixed list to score a model by: no caption twice until all have been used; the same list for the same seed."""
    rng = random.Random(f"evaluation captions {seed}")
    captions: list[str] = []
    while len(captions) < count:
        captions += [random_caption(rng, a) for a in rng.sample(all_attributes(), len(all_attributes()))]
    return captions[:count]


def parse_caption(text: str) -> Attributes:
    """The attributes a caption names, whatever its phrasing.

    Raises ValueError when an attribute is missing or named twice.
    """
    words = re.findall(r"[a-z]+", text.lower())

    def only(kind: str, names: Sequence[str]) -> str:
        found = [word for word in words if word in names]
        if len(found) != 1:
            raise ValueError(
                f"The caption {text!r} names {len(found)} {kind}s; name exactly one of: {', '.join(names)}."
            )
        return found[0]

    return Attributes(
        only("shape", SHAPES),
        only("colour", list(COLOURS)),
        "centre" if "centre" in words else f"{only('row', ('top', 'bottom'))} {only('column', ('left', 'right'))}",
        only("background", list(BACKGROUNDS)),
    )


def palette(colours: dict[str, tuple[int, int, int]]) -> Tensor:
    """The colours of a table, in its order, as (N, 3) in [-1, 1]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32) / 127.5 - 1


def masks(scenes: Sequence[Scene]) -> Tensor:
    """How much of each pixel the shape covers: (B, 64, 64) in [0, 1].

    Coverage is the signed distance to the outline, clamped over the width of one pixel.
    """
    centres = torch.tensor(
        [(PLACES[s.attributes.place][0] + s.dx, PLACES[s.attributes.place][1] + s.dy, s.size) for s in scenes]
    )
    grid = torch.arange(IMAGE_SIZE) + 0.5
    x = grid.view(1, 1, -1) - centres[:, 0].view(-1, 1, 1)
    y = grid.view(1, -1, 1) - centres[:, 1].view(-1, 1, 1)
    size = centres[:, 2].view(-1, 1, 1)
    kinds = torch.tensor([SHAPES.index(s.attributes.shape) for s in scenes])

    distance = torch.empty(len(scenes), IMAGE_SIZE, IMAGE_SIZE)
    for kind, name in enumerate(SHAPES):
        rows = kinds == kind
        if rows.any():
            distance[rows] = _DISTANCES[name](x[rows], y[rows], size[rows])
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene]) -> Tensor:
    """Images of the scenes: (B, 3, 64, 64) in [-1, 1]."""
    colour = palette(COLOURS)[[list(COLOURS).index(s.attributes.colour) for s in scenes]]
    background = palette(BACKGROUNDS)[[list(BACKGROUNDS).index(s.attributes.background) for s in scenes]]
    mask = masks(scenes)[:, None]
    return background[:, :, None, None] + mask * (colour - background)[:, :, None, None]


def _circle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.sqrt(x**2 + y**2) - size


def _square(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * size


def _triangle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    # Upright, base as wide as the height: each slanted side runs from the tip (0, -size) to (+-size, size).
    slanted = (2 * x.abs() - y - size) / 5**0.5
    return torch.maximum(slanted, y - size)


def _cross(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    arm = 0.36 * size
    upright = torch.maximum(x.abs() - arm, y.abs() - size)
    level = torch.maximum(x.abs() - size, y.abs() - arm)
    return torch.minimum(upright, level)


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
