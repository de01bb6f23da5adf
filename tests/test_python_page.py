"""The examples of docs/python.md run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import comfyui_l2p.l2p_core as l2p

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "examples.py"
    script.write_text("\n".join(EXAMPLES), encoding="utf-8")
    names = runpy.run_path(str(script))
    assert names["image"].shape == (1, 3, 64, 64)
    red, green, blue = names["image"][0, :, 28:36, 28:36].mean((1, 2))
    assert red > 0.5 and max(green, blue) < 0.4, "the circle in the centre is red"
    assert names["result"].finished and names["loss"].isfinite()
    assert {path.name for path in tmp_path.iterdir()} >= {"init.safetensors", "merged.safetensors", "again.safetensors"}


@pytest.mark.parametrize("name", l2p.__all__)
def test_every_public_name_is_there_and_on_the_page(name: str) -> None:
    assert getattr(l2p, name) is not None
    assert name.startswith("__") or f"`{name}" in PAGE or f"{name}`" in PAGE


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pixels'"):
        _ = l2p.pixels
