"""The rule-based judge of the second tiny world: it determines which two objects an image shows, and whether the
caption says so.

Colour finds the objects, for the background has hardly any: pixels of one hue are one object. Its kind is the template,
of all kinds and rotations that occur, that overlaps it best, laid over it by centre of mass and radius of gyration. Its
texture is read from the light inside: even, in one direction, or in both. What is blurred, broken or doubled fits
nothing and shows nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import captions as world
from .content import CANVAS, COLOURS, KINDS, RELATIONS, TEXTURES, TILT, Content, Object, relation_of
from .rendering import IMAGE_SIZE, SHADE, kind_masks

CHROMA = 0.24
"""Largest minus smallest channel, above which a pixel belongs to an object."""
OVERLAP = 0.6
"""Intersection over union, from which on an object is of a kind."""
SMALLEST, STRAY = 150.0, 70.0
"""Units squared: the least that is an object, and the most of any other colour."""
EVEN, CONTRAST = 0.055, 0.10
"""Standard deviations of light: up to the first a surface is plain, from the second on it has a texture."""
ONE_WAY, BOTH_WAYS = 0.70, 0.50
"""Coherence of the light's slopes, of 1: from the first on stripes, up to the second spots."""
_CELLS, _REACH = 40, 2.6  # the square in which kinds are compared: cells a side; half its side in radii of gyration
_TURNS = 120
_CHUNK = 32


class Found(NamedTuple):
    """The content of an image: its objects, and their centres as (objects, 2) in units."""

    objects: list[Object]
    centre: Tensor


class SceneScore(NamedTuple):
    """Shares of images that show what their caption says, each in [0, 1].

    ``objects`` counts images of exactly two objects; ``kind``, ``colour`` and ``texture`` need them of both, as far as
    they are said; ``whole`` needs all of these.
    """

    objects: float
    kind: float
    colour: float
    texture: float
    relation: float
    whole: float


def score(images: Tensor, captions: Sequence[str]) -> SceneScore:
    """How well images (B, 3, S, S) in [-1, 1], of 64, 128 or 256 pixels, show what their captions say.

    Raises:
        ValueError: for another size, a caption that is not this world's, or as many captions as images.
    """
    if not len(images) == len(captions) > 0:
        raise ValueError(f"{len(images)} images came with {len(captions)} captions; give one caption per image.")
    wanted = [world.parse(text) for text in captions]
    right = [fits(found, content) for found, content in zip(recognise(images), wanted, strict=True)]
    return SceneScore(*torch.tensor(right).double().mean(0).tolist())


def fits(found: Found, content: Content) -> tuple[bool, ...]:
    """The parts of a content that an image shows, in the order of `SceneScore`; either object may be the first."""
    if len(found.objects) != 2:
        return (False,) * 6
    relation = RELATIONS[int(relation_of(found.centre[None]))]
    opposite = RELATIONS[int(relation_of(found.centre.flip(0)[None]))]
    one = _fits(found.objects, relation, content)
    other = _fits(found.objects[::-1], opposite, content)
    return max(one, other, key=lambda right: (right[-1], sum(right)))


def _fits(objects: Sequence[Object], relation: str, content: Content) -> tuple[bool, ...]:
    pairs = list(zip(objects, (content.first, content.second), strict=True))
    kind = all(shown.kind == said.kind for shown, said in pairs)
    colour = all(said.colour in (None, shown.colour) for shown, said in pairs)
    texture = all(said.texture in (None, shown.texture) for shown, said in pairs)
    related = relation == content.relation
    return True, kind, colour, texture, related, kind and colour and texture and related


def recognise(images: Tensor) -> list[Found]:
    """The content of each image (B, 3, S, S) in [-1, 1]; an object without a clear kind or texture has "" for it.

    Raises:
        ValueError: for images of other sizes.
    """
    size = images.shape[-1]
    if images.ndim != 4 or images.shape[1:] not in {(3, side, side) for side in (64, 128, 256)}:
        raise ValueError(f"The judge reads images of 64, 128 or 256 pixels a side, not {tuple(images.shape[1:])}.")
    found: list[Found] = []
    for chunk in images.detach().float().cpu().split(_CHUNK):
        if size < IMAGE_SIZE:
            chunk = F.interpolate(chunk, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
        elif size > IMAGE_SIZE:
            chunk = F.avg_pool2d(chunk, size // IMAGE_SIZE)
        found += _recognise((chunk.clamp(-1, 1) + 1) / 2)
    return found


def _recognise(images: Tensor) -> list[Found]:
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    masks = colour_masks(smooth)
    area = masks.sum((2, 3))  # (B, colours)
    order = area.sort(1, descending=True)
    two = (order.values[:, 1] >= SMALLEST) & (order.values[:, 2] <= STRAY)
    rows, picked = torch.arange(len(images))[:, None], order.indices[:, :2]
    mask, colour = masks[rows, picked].flatten(0, 1), picked.flatten()
    kind, centre = _kinds(mask)
    texture = _textures(smooth.repeat_interleave(2, 0), mask, colour)
    names = list(COLOURS)
    objects = [
        Object(KINDS[k] if k >= 0 else "", names[c], TEXTURES[t] if t >= 0 else "")
        for k, c, t in zip(kind.tolist(), colour.tolist(), texture.tolist(), strict=True)
    ]
    centre = centre.view(-1, 2, 2)
    return [
        Found(objects[2 * row : 2 * row + 2], centre[row]) if both else Found([], centre[row, :0])
        for row, both in enumerate(two.tolist())
    ]


def colour_masks(images: Tensor) -> Tensor:
    """Masks of the colours: (B, 3, S, S) in [0, 1] -> (B, colours, S, S), 1 or 0."""
    high, low = images.max(1).values, images.min(1).values
    chroma = high - low
    hues = _hues(torch.tensor(list(COLOURS.values())))
    difference = (_hues(images.movedim(1, -1))[:, None] - hues[:, None, None]).remainder(1)
    nearest = torch.minimum(difference, 1 - difference).argmin(1)
    return F.one_hot(nearest, len(COLOURS)).movedim(-1, 1).float() * (chroma > CHROMA)[:, None]


def _hues(colours: Tensor) -> Tensor:
    """Hue in [0, 1) of (..., 3)."""
    red, green, blue = colours.unbind(-1)
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue).div(2 * math.pi).remainder(1)


def _kinds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kind of each mask (N, S, S), -1 where none fits, and its centre (N, 2) in units."""
    centre, gyration = _moments(mask)
    side = mask.shape[-1]
    cells = (torch.arange(_CELLS) + 0.5) / _CELLS * 2 - 1
    around = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1) * _REACH
    at = centre[:, None, None] + gyration[:, None, None, None] * around
    cut = F.grid_sample(mask[:, None], at / (side / 2) - 1, align_corners=False)[:, 0]
    cut = (cut > 0.5).float().flatten(1)
    templates, of_kind, offset = _templates()
    common = cut @ templates.T
    overlap = common / (cut.sum(1, keepdim=True) + templates.sum(1) - common).clamp(min=1)
    best, index = overlap.max(1)
    kind = torch.where(best >= OVERLAP, of_kind[index], -1)
    return kind, (centre + gyration[:, None] * offset[index]) * (CANVAS / side)


def _moments(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass (N, 2) as x, y, and radius of gyration (N,), in pixels from the top left corner."""
    at = torch.arange(mask.shape[-1]) + 0.5
    weight = mask.sum((1, 2)).clamp(min=1e-6)
    columns, rows = mask.sum(1) / weight[:, None], mask.sum(2) / weight[:, None]
    x, y = (columns * at).sum(1), (rows * at).sum(1)
    square = (columns * (at - x[:, None]) ** 2).sum(1) + (rows * (at - y[:, None]) ** 2).sum(1)
    return torch.stack([x, y], 1), square.sqrt()


@functools.cache
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    """Every kind in every rotation that occurs: masks (T, cells), kinds (T,), and the way (T, 2) from the centre of
    mass to the centre, in radii of gyration."""
    turns = torch.arange(_TURNS) * (2 * math.pi / _TURNS)
    off = torch.minimum(turns, 2 * math.pi - turns)
    pairs = [
        (kind, turn)
        for kind in range(len(KINDS))
        for turn, tilt in zip(turns.tolist(), off.tolist(), strict=True)
        if tilt <= TILT + 0.1
    ]
    kinds = torch.tensor([kind for kind, _ in pairs])
    angles = torch.tensor([turn for _, turn in pairs])
    fine = (torch.arange(128) + 0.5) / 128 * 2.8 - 1.4
    centre, gyration = _moments(kind_masks(kinds, angles, fine.view(1, 1, -1), fine.view(1, -1, 1)))
    centre, gyration = centre / 128 * 2.8 - 1.4, gyration / 128 * 2.8
    cells = ((torch.arange(_CELLS) + 0.5) / _CELLS * 2 - 1) * _REACH
    x = centre[:, :1, None] + gyration[:, None, None] * cells.view(1, 1, -1)
    y = centre[:, 1:, None] + gyration[:, None, None] * cells.view(1, -1, 1)
    masks = kind_masks(kinds, angles, x.expand(-1, _CELLS, -1), y.expand(-1, -1, _CELLS))
    return masks.flatten(1), kinds, -centre / gyration[:, None]


def _textures(images: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """The texture of each object, -1 where it is unclear: images (N, 3, S, S), masks (N, S, S), colours (N,)."""
    tone = torch.tensor(list(COLOURS.values()))[colour]
    light = torch.einsum("nchw,nc->nhw", images, tone) / tone.square().sum(1)[:, None, None]
    inside = -F.max_pool2d(-mask[:, None], 5, stride=1, padding=2)[:, 0]
    weight = inside.sum((1, 2)).clamp(min=1)
    mean = (light * inside).sum((1, 2)) / weight
    spread = ((light - mean[:, None, None]).square() * inside).sum((1, 2)).div(weight).sqrt() / (2 * (1 - SHADE))
    slope_x = F.pad(light[:, 1:-1, 2:] - light[:, 1:-1, :-2], (1, 1, 1, 1))
    slope_y = F.pad(light[:, 2:, 1:-1] - light[:, :-2, 1:-1], (1, 1, 1, 1))
    xx, yy, xy = ((a * b * inside).sum((1, 2)) for a, b in ((slope_x, slope_x), (slope_y, slope_y), (slope_x, slope_y)))
    coherence = ((xx - yy).square() + 4 * xy.square()).sqrt() / (xx + yy).clamp(min=1e-9)
    texture = torch.full_like(colour, -1)
    texture[spread <= EVEN] = TEXTURES.index("plain")
    texture[(spread >= CONTRAST) & (coherence >= ONE_WAY)] = TEXTURES.index("striped")
    texture[(spread >= CONTRAST) & (coherence <= BOTH_WAYS)] = TEXTURES.index("spotted")
    return texture
