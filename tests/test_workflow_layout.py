"""Where nodes of the shared workflows stand: nothing is hidden behind anything else, in either frontend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TITLE = 30
SLOT = 20
"""Heights in the frontend's units; a slot's dot is at 0.7 of its row."""
CARD_LETTERS = 36
"""Of a name, before the gallery cuts it at its narrowest cards."""
Node = dict[str, Any]
Point = tuple[float, float]


def box(node: Node) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def slot(node: Node, side: str, number: int) -> Point:
    right = node["size"][0] if side == "outputs" else 0
    return node["pos"][0] + right, node["pos"][1] + (number + 0.7) * SLOT


def wire(start: Point, end: Point, pieces: int = 200) -> list[Point]:
    """The frontend's curve between two slots: level at both ends, its handles a quarter of the distance long."""
    reach = math.dist(start, end) / 4
    handles = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    points = []
    for piece in range(pieces + 1):
        t = piece / pieces
        shares = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
        across, down = (
            sum(share * handle[axis] for share, handle in zip(shares, handles, strict=True)) for axis in (0, 1)
        )
        points.append((across, down))
    return points


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_wire_runs_behind_a_node(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, output, target, number, _ in workflow["links"]:
        for x, y in wire(slot(nodes[source], "outputs", output), slot(nodes[target], "inputs", number)):
            for node in nodes.values():
                left, top, right, bottom = box(node)
                assert not (left < x < right and top < y < bottom), (
                    f"the wire from {nodes[source]['type']} to {nodes[target]['type']} is behind {node['type']}"
                )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_covers_another(path: Path) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    for number, node in enumerate(nodes):
        left, top, right, bottom = box(node)
        for other in nodes[:number]:
            its_left, its_top, its_right, its_bottom = box(other)
            apart = right <= its_left or its_right <= left or bottom <= its_top or its_bottom <= top
            assert apart, f"{node['type']} and {other['type']}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_card_of_a_workflow_is_a_small_square(path: Path) -> None:
    """As the gallery's places are, in which the line of words below the result can be read; it loads all at once."""
    card = path.with_suffix(".jpg")
    assert card.stat().st_size < 61_440
    with Image.open(card) as picture:
        assert picture.format == "JPEG" and picture.width == picture.height >= 400


def test_each_workflow_has_a_number_and_a_description_of_its_own() -> None:
    """The gallery shows them in the order of their numbers, with one line each in the user's language."""
    numbers = [int(path.stem.split(" ")[0]) for path in WORKFLOWS]
    assert sorted(numbers) == list(range(1, len(WORKFLOWS) + 1))
    assert max(len(path.stem) for path in WORKFLOWS) <= CARD_LETTERS
    for language in (ROOT / "locales").glob("*/main.json"):
        described = json.loads(language.read_text(encoding="utf-8"))["templateWorkflows"]["templateDescription"]
        for folder, lines in described.items():
            assert set(lines) == {path.stem for path in WORKFLOWS}, (language, folder)
            assert all(lines.values())
