"""What a run folder is held to, and when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.folder import RunFolder

FIRST = recipes.parse({"model": {"base": "a"}, "training": {"blocks": 1}})
OTHER = recipes.parse({"model": {"base": "a"}, "training": {"blocks": 2}})


def test_a_run_that_has_saved_nothing_gives_way(tmp_path: Path) -> None:
    """So that a mistake found in preparation is put right without another word."""
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    run.identify({"base": "1", "data": "1"})
    run.init.write_bytes(b"of another base")
    run.begin(OTHER)
    assert recipes.load(run.recipe) == OTHER and not run.init.exists()
    run.identify({"base": "2", "data": "2"})


def test_a_run_that_has_saved_is_held_to(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin(FIRST)
    run.identify({"base": "1", "data": "1"})
    run.state.write_bytes(b"saved")
    with pytest.raises(ValueError, match="holds a run with .training. blocks = 1, but the recipe says 2"):
        run.begin(OTHER)
    with pytest.raises(ValueError, match="other content of .data. path"):
        run.identify({"base": "1", "data": "2"})
    run.begin(FIRST)
    assert run.state.exists()
