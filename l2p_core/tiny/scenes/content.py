"""The content of images of the second tiny world: two objects of a kind, a colour and a texture, in a relation.

Kinds, colours, textures and relations are tables, in whose order indices count. Everything a caption does not say is
drawn freely: positions, sizes, rotations, the textures' direction and phase, the background and its fine weave.
Lengths are in units of which an image is 128 wide, whatever its size in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CANVAS = 128.0
"""The side of an image in units."""

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "yellow": (0.94, 0.84, 0.10),
    "green": (0.12, 0.66, 0.20),
    "cyan": (0.10, 0.76, 0.84),
    "blue": (0.16, 0.26, 0.90),
    "purple": (0.70, 0.14, 0.82),
}
"""Red, green and blue in [0, 1], a sixth of the colour circle apart."""
TEXTURES = ("plain", "striped", "spotted")
FIGURES = ("circle", "square", "triangle", "cross")
LETTERS = ("E", "H", "L", "T")
KINDS = (*FIGURES, *LETTERS)
"""Figures have any texture; letters are plain, as their strokes are thin."""
RELATIONS = ("above", "below", "left of", "right of")
"""The relation of the first object to the second; the larger of the distances in x and y decides."""

RADIUS = (20.0, 26.0)
REACH = 1.12
"""The distance of an object's farthest point from its centre, in radii."""
GAP = 4.0
CLARITY = 1.3
"""How much larger than the other the decisive distance of a relation is, at least."""
TILT = math.radians(20)
"""The largest rotation of an object to either side."""
_TRIES = 32


@dataclass(frozen=True)
class Scenes:
    """B images' contents; per object first to last, two of each.

    Attributes:
        kind, colour, texture: (B, 2) indices of the tables.
        centre: (B, 2, 2) as x, y in units, y downwards.
        radius: (B, 2) units.
        angle: (B, 2) radians.
        pattern: (B, 2, 3) direction of the texture and its two phases, radians.
        background: (B, 2, 3) the colours in [0, 1] between which the background runs.
        slope: (B,) its direction, radians.
        weave: (B, 2) direction and phase of the background's fine lines, radians.
    """

    kind: Tensor
    colour: Tensor
    texture: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor
    pattern: Tensor
    background: Tensor
    slope: Tensor
    weave: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def to(self, device: torch.device | str) -> Scenes:
        """The same on a device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Scenes]) -> Scenes:
        """The scenes of all parts, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)))


@dataclass(frozen=True)
class Object:
    """A caption's statement about an object; None leaves it open."""

    kind: str
    colour: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Content:
    """A caption's statement about an image: the first object is in the relation to the second."""

    first: Object
    relation: str
    second: Object


def relation_of(centre: Tensor) -> Tensor:
    """The relation (B,) of two centres (B, 2, 2), an index of `RELATIONS`."""
    x, y = (centre[:, 0] - centre[:, 1]).unbind(-1)
    return torch.where(y.abs() > x.abs(), (y > 0).long(), 2 + (x > 0).long())


def random_scenes(count: int, generator: torch.Generator, wanted: Sequence[Content] | None = None) -> Scenes:
    """Scenes with everything drawn from the generator, but for what `wanted` says, one content a scene."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def index(options: int, *shape: int) -> Tensor:
        return torch.randint(options, (count, *shape), generator=generator)

    kind, texture = index(len(KINDS), 2), index(len(TEXTURES), 2)
    first = index(len(COLOURS))
    colour = torch.stack([first, (first + 1 + index(len(COLOURS) - 1)) % len(COLOURS)], 1)
    radius = uniform(*RADIUS, 2)
    centre = _centres(radius, generator)
    if wanted is not None:
        assert len(wanted) == count, "a content for each scene"
        kind, colour, texture = _as_wanted(wanted, kind, colour, texture)
        centre = _related(centre, torch.tensor([RELATIONS.index(content.relation) for content in wanted]))
    letter = kind >= len(FIGURES)
    turn = 2 * math.pi
    lightness = uniform(0.08, 0.92, 2)[:, :, None]
    return Scenes(
        kind,
        colour,
        texture.masked_fill(letter, 0),
        centre,
        radius,
        uniform(-TILT, TILT, 2),
        uniform(0, turn, 2, 3),
        (lightness + uniform(-0.03, 0.03, 2, 3)).clamp(0, 1),
        uniform(0, turn),
        uniform(0, turn, 2),
    )


def _centres(radius: Tensor, generator: torch.Generator) -> Tensor:
    """Free positions (B, 2, 2) inside the image, apart from each other and in a clear relation."""
    margin = REACH * radius
    found = torch.zeros(len(radius), 2, 2)
    missing = torch.arange(len(radius))
    while len(missing):
        inside = margin[missing, None, :, None]
        tries = torch.rand(len(missing), _TRIES, 2, 2, generator=generator)
        tries = inside + (CANVAS - 2 * inside) * tries
        apart = tries[:, :, 0] - tries[:, :, 1]
        shorter, longer = apart.abs().sort(-1).values.unbind(-1)
        good = (apart.norm(dim=-1) > margin[missing].sum(1, keepdim=True) + GAP) & (longer > CLARITY * shorter)
        some = good.any(1)
        found[missing[some]] = tries[some, good[some].int().argmax(1)]
        missing = missing[~some]
    return found


def _related(centre: Tensor, relation: Tensor) -> Tensor:
    """The same positions, mirrored and transposed until they are in the relation."""
    transposed = (relation_of(centre) >= 2) != (relation >= 2)
    centre = torch.where(transposed[:, None, None], centre.flip(-1), centre)
    mirrored = (relation_of(centre) != relation)[:, None, None]
    return torch.where(mirrored, CANVAS - centre, centre)


def _as_wanted(
    wanted: Sequence[Content], kind: Tensor, colour: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The drawn indices, replaced by those that are said; the objects' colours still differ."""
    kind, colour, texture = kind.clone(), colour.clone(), texture.clone()
    names = list(COLOURS)
    for row, content in enumerate(wanted):
        for place, told in enumerate((content.first, content.second)):
            kind[row, place] = KINDS.index(told.kind)
            if told.texture is not None:
                texture[row, place] = TEXTURES.index(told.texture)
            if told.colour is not None:
                colour[row, place] = names.index(told.colour)
        if colour[row, 0] == colour[row, 1]:
            free = 0 if content.first.colour is None else 1
            colour[row, free] = (colour[row, free] + 1) % len(names)
    return kind, colour, texture
