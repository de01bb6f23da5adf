"""The picture of the rooms is the one that today's imports give."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_rooms.py"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_rooms", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_todays_imports(draw: ModuleType) -> None:
    expected = draw.svg(draw.imports())
    assert draw.PICTURE.read_text(encoding="utf-8") == expected, "run python docs/draw_rooms.py"


def test_arrows_that_others_imply_are_left_out_and_circles_named(draw: ModuleType) -> None:
    assert draw.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert draw.floors({"a": {"b"}, "b": set()}) == {"a": 1, "b": 0}
    with pytest.raises(ValueError, match="import each other: a, b"):
        draw.floors({"a": {"b"}, "b": {"a"}})
