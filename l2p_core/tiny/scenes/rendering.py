"""Renders scenes of the second tiny world, a whole batch at once on any device.

Objects are signed distances, anti-aliased over a pixel. The background's weave, lines 3 units apart, is the fine detail
that an autoencoder of 8 x 8 pixels a cell loses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .content import CANVAS, COLOURS, KINDS, RADIUS, REACH, TEXTURES, Scenes

IMAGE_SIZE = 128
"""Pixels of the source's images."""
SHADE = 0.5
"""What a texture's dark parts leave of the colour."""
STRIPES, SPOTS = 16.0, 17.0  # periods, units
WEAVE, WEAVE_CONTRAST = 3.0, 0.05  # period in units; amplitude, of 1

_STROKE = 0.19  # half the width of a letter's strokes, in radii
_TOP, _SIDE = 0.92 - _STROKE, 0.66 - _STROKE  # how far the strokes' middle lines are from the centre
_STROKES = {  # of a letter: middle lines as x0, y0, x1, y1
    "E": ((-1, -1, -1, 1), (-1, -1, 1, -1), (-1, 0, 0.8, 0), (-1, 1, 1, 1)),
    "H": ((-1, -1, -1, 1), (1, -1, 1, 1), (-1, 0, 1, 0)),
    "L": ((-1, -1, -1, 1), (-1, 1, 1, 1)),
    "T": ((-1, -1, 1, -1), (0, -1, 0, 1)),
}


def render(scenes: Scenes, size: int = IMAGE_SIZE) -> Tensor:
    """Images (B, 3, size, size) in [-1, 1] on the scenes' device.

    Sizes below 128 are averages of 128 pixels, so that the weave fades there instead of making moire patterns.

    Raises:
        ValueError: if such a size does not divide 128.
    """
    if size < IMAGE_SIZE:
        if size < 1 or IMAGE_SIZE % size:
            raise ValueError(f"Images are rendered in {IMAGE_SIZE} pixels or more, or a divisor of it, not {size}.")
        return F.avg_pool2d(render(scenes), IMAGE_SIZE // size)
    grid = (torch.arange(size, device=scenes.kind.device) + 0.5) * (CANVAS / size)
    image = _background(scenes, grid.view(1, 1, -1), grid.view(1, -1, 1))
    for number in range(scenes.kind.shape[1]):
        _draw(image, scenes, number)
    return image * 2 - 1


def _draw(image: Tensor, scenes: Scenes, number: int) -> None:
    """Draw an object of each scene into the square around it."""
    size = image.shape[-1]
    pixel = CANVAS / size
    side = min(size, math.ceil(2 * REACH * RADIUS[1] / pixel) + 4)
    corner = (scenes.centre[:, number] / pixel - side / 2).round().long().clamp(0, size - side)
    columns, rows = (corner[:, :, None] + torch.arange(side, device=image.device)).unbind(1)
    x, y = ((columns + 0.5) * pixel)[:, None], ((rows + 0.5) * pixel)[:, :, None]
    mask = _mask(scenes, number, x, y, pixel)
    light = 1 - (1 - SHADE) * _darkness(scenes, number, x, y)
    colours = torch.tensor(list(COLOURS.values()), device=image.device)[scenes.colour[:, number]]
    at = (torch.arange(len(image), device=image.device)[:, None, None], slice(None), rows[:, :, None], columns[:, None])
    # Advanced indices around a slice put the channels last.
    below, drawn = image[at], colours[:, None, None] * light[..., None]
    image[at] = torch.lerp(below, drawn, mask[..., None])


def coverage(scenes: Scenes, cells: int) -> Tensor:
    """How much of each cell of the image each object covers: (B, objects, cells, cells) in [0, 1]."""
    points = 4 * cells
    pixel = CANVAS / points
    grid = (torch.arange(points, device=scenes.kind.device) + 0.5) * pixel
    x, y = grid.view(1, 1, -1), grid.view(1, -1, 1)
    masks = [_mask(scenes, number, x, y, pixel) for number in range(scenes.kind.shape[1])]
    return F.avg_pool2d(torch.stack(masks, 1), 4)


def kind_masks(kind: Tensor, angle: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Where objects of B kinds and angles (B,) are, of points u, v (1, rows, columns) in radii from their centre."""
    return (_distance(kind, *_turned(u, v, angle)) < 0).float()


def _mask(scenes: Scenes, number: int, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """How much of each pixel, of so many units, an object covers: (B, H, W) in [0, 1]."""
    centre, radius = scenes.centre[:, number, :, None, None], scenes.radius[:, number].view(-1, 1, 1)
    u, v = _turned(x - centre[:, 0], y - centre[:, 1], scenes.angle[:, number])
    distance = _distance(scenes.kind[:, number], u / radius, v / radius) * radius
    return (0.5 - distance / pixel).clamp(0, 1)


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (B, H, W) along axes turned by B angles."""
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * x + sin * y, cos * y - sin * x


def _distance(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The signed distance to each row's kind, in radii, negative inside."""
    distance = torch.empty(torch.broadcast_shapes(u.shape, (len(kind), 1, 1)), device=u.device)
    for number, name in enumerate(KINDS):
        rows = (kind == number).nonzero()[:, 0]
        if len(rows):
            at = (u[rows], v[rows]) if len(u) > 1 else (u, v)
            distance[rows] = _DISTANCES[name](*at) if name in _DISTANCES else _letter(name, *at)
    return distance


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.sqrt(u * u + v * v) - 0.92


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.78


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v, u.abs() * math.sqrt(0.75) - 0.5 * v) - 0.54


def _cross(u: Tensor, v: Tensor) -> Tensor:
    longer, shorter = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    return torch.maximum(longer - 1.0, shorter - 0.34)


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def _letter(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Strokes are boxes."""
    boxes = [
        ((x0 + x1) / 2 * _SIDE, (y0 + y1) / 2 * _TOP, (x1 - x0) / 2 * _SIDE + _STROKE, (y1 - y0) / 2 * _TOP + _STROKE)
        for x0, y0, x1, y1 in _STROKES[name]
    ]
    distance = None
    for x, y, wide, high in boxes:
        box = torch.maximum((u - x).abs() - wide, (v - y).abs() - high)
        distance = box if distance is None else torch.minimum(distance, box)
    assert distance is not None
    return distance


def _darkness(scenes: Scenes, number: int, x: Tensor, y: Tensor) -> Tensor:
    """How dark an object's texture is at each point, (B, H, W) in [0, 1]."""
    texture = scenes.texture[:, number]
    dark = torch.zeros(len(scenes), y.shape[1], x.shape[2], device=x.device)
    for name, wave in (("striped", _stripes), ("spotted", _spots)):
        rows = (texture == TEXTURES.index(name)).nonzero()[:, 0]
        if len(rows):
            direction, first, second = (part.view(-1, 1, 1) for part in scenes.pattern[rows, number].unbind(-1))
            along, across = _turned(x[rows], y[rows], direction)
            dark[rows] = wave(along, across, first, second).clamp(0, 1)
    return dark


def _stripes(along: Tensor, across: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return 0.5 + 1.8 * torch.cos(2 * math.pi / STRIPES * along + first)


def _spots(along: Tensor, across: Tensor, first: Tensor, second: Tensor) -> Tensor:
    waves = torch.cos(2 * math.pi / SPOTS * along + first) + torch.cos(2 * math.pi / SPOTS * across + second)
    return 0.5 + 1.6 * (waves - 0.7)


def _background(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """A gradient between two colours under fine lines, (B, 3, H, W)."""
    cos, sin = scenes.slope.cos().view(-1, 1, 1), scenes.slope.sin().view(-1, 1, 1)
    share = (0.5 + (cos * (x / CANVAS - 0.5) + sin * (y / CANVAS - 0.5)) / math.sqrt(2)).clamp(0, 1)
    direction, phase = (part.view(-1, 1, 1) for part in scenes.weave.unbind(-1))
    lines = torch.cos(2 * math.pi / WEAVE * (direction.cos() * x + direction.sin() * y) + phase)
    start, end = (colour[:, :, None, None] for colour in scenes.background.unbind(1))
    return (torch.lerp(start, end, share[:, None]) + WEAVE_CONTRAST * lines[:, None]).clamp(0, 1)
