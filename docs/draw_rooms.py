"""Draw the rooms of the package from its imports: `python docs/draw_rooms.py` writes docs/images/rooms.svg.

A box is a flat file of `l2p_core`, or a room (a folder); an arrow is an import that no other arrows imply. Floors are
computed from the imports, so a change of the code changes the picture, and a test holds the two together.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
TOP = ("nodes", "train")
LATE = ("config", "sources")
"""An import inside a function, which is not drawn: `ModelConfig.from_shapes` asks the sources, whose configurations are
subclasses of it."""
Graph = dict[str, set[str]]

_WIDTH, _BOX, _GAP, _FLOOR = 560, 34, 14, 62
_LETTER = 7.6
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2937; text-anchor: middle }
  .room { fill: #dbeafe; stroke: #2563eb }
  .file { fill: #fef3c7; stroke: #d97706 }
  .top { fill: #dcfce7; stroke: #16a34a }
  path { fill: none; stroke: #9ca3af; stroke-width: 1.1 }
  .ground { fill: #ffffff }
"""


def place(module: tuple[str, ...]) -> str | None:
    """The box that a module belongs to: `nodes`, `train`, or what lies below `l2p_core`."""
    if module[0] in TOP:
        return module[0]
    return module[1] if module[0] == "l2p_core" and len(module) > 1 and module[1] != "__init__" else None


def imports() -> Graph:
    """Which boxes each box imports from; every box is a key."""
    found: Graph = {}
    for part in ("l2p_core", *TOP):
        for path in (ROOT / part).rglob("*.py"):
            module = path.relative_to(ROOT).with_suffix("").parts
            here = place(module)
            if here is None:
                continue
            found.setdefault(here, set())
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = (*module[: len(module) - node.level], *(node.module.split(".") if node.module else ()))
                    named = {place((*base, alias.name)) for alias in node.names}
                    found[here] |= {name for name in named if name and name != here and (here, name) != LATE}
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Each box's floor: one above the highest of those that it imports from.

    Raises:
        ValueError: if boxes import each other.
    """
    found: dict[str, int] = {}
    while len(found) < len(graph):
        ready = [name for name in graph if name not in found and graph[name] <= found.keys()]
        if not ready:
            raise ValueError(f"These import each other: {', '.join(sorted(graph.keys() - found.keys()))}.")
        found |= {name: 1 + max((found[below] for below in graph[name]), default=-1) for name in ready}
    return found


def reduced(graph: Graph) -> Graph:
    """The graph without the arrows that longer ways imply."""
    levels = floors(graph)
    reach: Graph = {}
    for name in sorted(graph, key=lambda name: levels[name]):
        reach[name] = graph[name].union(*(reach[below] for below in graph[name]))
    return {
        name: {below for below in direct if not any(below in reach[other] for other in direct)}
        for name, direct in graph.items()
    }


def svg(graph: Graph) -> str:
    """The picture."""
    levels = floors(graph)
    top = max(levels.values())
    levels |= dict.fromkeys((name for name in TOP if name in levels), top)
    rows = [sorted(name for name in graph if levels[name] == level) for level in range(top, -1, -1)]
    places: dict[str, tuple[float, int]] = {}
    boxes = []
    for number, row in enumerate(rows):
        widths = [_LETTER * len(name) + 28 for name in row]
        left = (_WIDTH - sum(widths) - _GAP * (len(row) - 1)) / 2
        y = 16 + number * _FLOOR
        for name, width in zip(row, widths, strict=True):
            kind = "top" if name in TOP else "room" if (ROOT / "l2p_core" / name).is_dir() else "file"
            middle = left + width / 2
            places[name] = middle, y
            boxes.append(
                f'<rect class="{kind}" x="{left:.0f}" y="{y}" width="{width:.0f}" height="{_BOX}" rx="6"/>'
                f'<text x="{middle:.0f}" y="{y + 22}">{escape(name)}</text>'
            )
            left += width + _GAP
    arrows = []
    for name, below in sorted(reduced(graph).items()):
        for other in sorted(below):
            (x, start), (to_x, end) = places[name], places[other]
            middle = (start + _BOX + end) / 2
            arrows.append(
                f'<path d="M{x:.0f} {start + _BOX} C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {end}"/>'
            )
    height = 16 + len(rows) * _FLOOR
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
    )
    ground = f'<rect class="ground" width="{_WIDTH}" height="{height}"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", ground, *arrows, *boxes, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg(imports()), encoding="utf-8")
